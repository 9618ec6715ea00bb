"""The server over real loopback sockets: answers, refusals, pipelining, hang-ups, shutdown."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import h11
import pytest
import trio

from lloom_sidecar.http.errors import ClientDisconnectedError, HttpUsageError, error_body
from lloom_sidecar.http.guard import OriginGuard, Refusal
from lloom_sidecar.http.limits import HttpLimits
from lloom_sidecar.http.listeners import open_tcp_listeners, open_unix_listener
from lloom_sidecar.http.server import Handler, Request, Response, serve
from lloom_sidecar.http.wire import HangupWatch

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST_GET = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
SOON_S = 5.0


class Running:
    """A server and what it reported."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.errors: list[BaseException] = []
        self.shutdown = trio.Event()
        self.ended = trio.Event()

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def talk(self, data: bytes) -> bytes:
        """Send ``data``, return everything up to the server's close."""
        async with await self.connect() as stream:
            await stream.send_all(data)
            return await read_all(stream)


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    got = b""
    with trio.fail_after(SOON_S):
        while data := await stream.receive_some(65536):
            got += data
    return got


async def read_until(stream: trio.abc.ReceiveStream, end: bytes) -> bytes:
    got = b""
    with trio.fail_after(SOON_S):
        while not got.endswith(end):
            data = await stream.receive_some(65536)
            assert data, f"closed after {got!r}"
            got += data
    return got


@asynccontextmanager
async def running(handler: Handler, **options: Any) -> AsyncIterator[Running]:
    (listener,) = await open_tcp_listeners("127.0.0.1", 0)
    state = Running(listener.port)

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await serve(
            [listener],
            handler,
            on_error=lambda exc, request: state.errors.append(exc),
            shutdown=state.shutdown,
            task_status=task_status,
            **options,
        )
        state.ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        yield state
        nursery.cancel_scope.cancel()


async def echo(request: Request, response: Response) -> None:
    body = await request.body()
    await response.send(200, [(b"x-path", request.path.encode())], body or b"empty")


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def body_of(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


async def test_an_answer_is_valid_http() -> None:
    async with running(echo) as state:
        answer = await state.talk(
            b"POST /a HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi"
        )
    parser = h11.Connection(h11.CLIENT)
    parser.send(h11.Request(method="POST", target="/a", headers=[("Host", "x"), ("Content-Length", "2")]))
    parser.send(h11.Data(data=b"hi"))
    parser.send(h11.EndOfMessage())
    parser.receive_data(answer)
    parser.receive_data(b"")
    head = parser.next_event()
    assert isinstance(head, h11.Response)
    assert head.status_code == 200
    assert dict(head.headers)[b"x-path"] == b"/a"
    assert set(dict(head.headers)) == {b"date", b"content-length", b"x-path", b"connection"}
    data = parser.next_event()
    assert isinstance(data, h11.Data)
    assert bytes(data.data) == b"hi"
    assert isinstance(parser.next_event(), h11.EndOfMessage)
    assert state.errors == []


async def test_what_a_handler_sees() -> None:
    seen: list[Any] = []

    async def handler(request: Request, response: Response) -> None:
        seen.append((request.method, request.path, request.raw_path, request.query, request.target, request.host))
        seen.append(
            (request.header("X-Y"), request.header("none"), request.scheme, request.has_body, request.is_http11)
        )
        seen.append((request.client, response.started, response.is_complete, response.status))
        seen.append((await request.body(), await request.body()))
        await response.send(200)
        seen.append((response.started, response.is_complete, response.status))

    async with running(handler) as state, await state.connect() as stream:
        await stream.send_all(b"GET http://h:1/a%20b?c HTTP/1.1\r\nHost: x\r\nX-y: 1\r\nConnection: close\r\n\r\n")
        await read_all(stream)
        address = stream.socket.getsockname()
    assert seen == [
        ("GET", "/a b", b"/a%20b", b"c", b"http://h:1/a%20b?c", "h:1"),
        ("1", None, "http", False, True),
        (address, False, False, 0),
        (b"", b""),
        (True, True, 200),
    ]


@pytest.mark.parametrize("cut", [1, 40, 60])
async def test_bodies_in_pieces(cut: int) -> None:
    data = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    data += b"5\r\nhello\r\n0\r\nx: y\r\n\r\n"
    async with running(echo) as state, await state.connect() as stream:
        for i in range(0, len(data), cut):
            await stream.send_all(data[i : i + cut])
            await trio.testing.wait_all_tasks_blocked()
        assert body_of(await read_all(stream)) == b"hello"


async def test_a_large_body_both_ways() -> None:
    body = bytes(range(256)) * 8192
    async with running(echo) as state:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        assert body_of(await state.talk(head + body)) == body


async def test_keep_alive_and_pipelining_in_order() -> None:
    async with running(echo) as state, await state.connect() as stream:
        await stream.send_all(GET)
        await read_until(stream, b"empty")
        posts = b"".join(
            b"POST /%d HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n%d" % (i, i) for i in range(8)
        )
        await stream.send_all(posts + LAST_GET)
        answer = await read_all(stream)
    assert [int(part[:1]) for part in answer.split(b"x-path: /")[1:9]] == list(range(8))
    assert answer.count(b"HTTP/1.1 200 OK") == 9


async def test_pipelined_data_waits_behind_a_running_request() -> None:
    release = trio.Event()
    order: list[str] = []

    async def handler(request: Request, response: Response) -> None:
        order.append(request.path)
        if request.path == "/slow":
            await release.wait()
        await response.send(200, (), request.path.encode())

    async with running(handler) as state, await state.connect() as stream:
        await stream.send_all(GET.replace(b"/ ", b"/slow ") + GET.replace(b"/ ", b"/next "))
        await trio.testing.wait_all_tasks_blocked()
        assert order == ["/slow"]
        release.set()
        await read_until(stream, b"/next")
    assert order == ["/slow", "/next"]


async def test_an_unread_body_at_hand_is_skipped() -> None:
    async def handler(request: Request, response: Response) -> None:
        await response.send(200, (), request.path.encode())

    async with running(handler) as state:
        answer = await state.talk(b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc" + LAST_GET)
    assert answer.count(b"200 OK") == 2


async def test_an_unread_body_on_its_way_closes_the_connection_behind_the_answer() -> None:
    async def handler(request: Request, response: Response) -> None:
        await response.send(200, (), b"early")

    head = b"POST /a HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\n\r\n"
    async with running(handler) as state, await state.connect() as stream:
        await stream.send_all(head)
        answer = await read_until(stream, b"early")
        await stream.send_all(b"x" * 300_000)
        assert await read_all(stream) == b""
    assert b"connection: close" in answer


async def test_streaming() -> None:
    async def handler(request: Request, response: Response) -> None:
        await response.start(200, [(b"content-type", b"text/event-stream")], b"first")
        assert response.started
        assert not response.is_complete
        await response.write(b"")
        await response.write(b"second")
        await response.finish(b"third")

    async with running(handler) as state:
        answer = await state.talk(LAST_GET)
        assert b"transfer-encoding: chunked" in answer
        assert body_of(answer) == b"5\r\nfirst\r\n6\r\nsecond\r\n5\r\nthird\r\n0\r\n\r\n"
        old = await state.talk(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"transfer-encoding" not in old
        assert b"connection: close" in old
        assert body_of(old) == b"firstsecondthird"
        assert body_of(await state.talk(LAST_GET.replace(b"GET", b"HEAD"))) == b""


async def test_streaming_with_a_length() -> None:
    async def handler(request: Request, response: Response) -> None:
        await response.start(200, (), b"ab", content_length=4)
        await response.write(b"cd")
        if request.path == "/long":
            await response.write(b"e")
        await response.finish()

    async with running(handler) as state:
        answer = await state.talk(LAST_GET)
        assert b"content-length: 4\r\n" in answer
        assert body_of(answer) == b"abcd"
        assert body_of(await state.talk(GET.replace(b"/ ", b"/long "))) == b"abcd"
        assert isinstance(state.errors[0], HttpUsageError)


async def test_head_has_the_length_and_no_body() -> None:
    async with running(echo) as state:
        answer = await state.talk(GET.replace(b"GET", b"HEAD") + LAST_GET.replace(b"GET", b"HEAD"))
    assert answer.count(b"content-length: 5\r\n") == 2
    assert b"empty" not in answer


async def test_no_content() -> None:
    async def handler(request: Request, response: Response) -> None:
        await response.send(204)

    async with running(handler) as state:
        answer = await state.talk(GET + LAST_GET)
    assert answer.count(b"204 No Content") == 2
    assert b"content-length" not in answer


async def test_http_1_0_keep_alive() -> None:
    async with running(echo) as state, await state.connect() as stream:
        await stream.send_all(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert b"connection: keep-alive" in await read_until(stream, b"empty")
        await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
        assert b"connection: close" in await read_all(stream)


async def test_expect_continue() -> None:
    head = (
        b"POST / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 2\r\nConnection: close\r\n\r\n"
    )
    async with running(echo) as state, await state.connect() as stream:
        await stream.send_all(head)
        assert await read_until(stream, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await stream.send_all(b"hi")
        assert body_of(await read_all(stream)) == b"hi"
        assert b"100 Continue" not in await state.talk(head + b"hi")


async def test_expect_continue_is_not_sent_when_the_body_is_not_wanted() -> None:
    async def handler(request: Request, response: Response) -> None:
        await response.send(403)

    async with running(handler) as state:
        answer = await state.talk(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403")
    assert b"connection: close" in answer


@pytest.mark.parametrize(
    ("status", "code", "data"),
    [
        (400, "bad_request", b"\x16\x03\x01\x02\x00"),
        (400, "bad_request", b"GET / HTTP/1.1\n\n"),
        (400, "bad_request", b"GET / HTTP/1.1\r\n\r\n"),
        (413, "body_too_large", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n"),
        (413, "body_too_large", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n"),
        (400, "bad_request", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n"),
        (417, "expectation_failed", b"GET / HTTP/1.1\r\nHost: a\r\nExpect: x\r\n\r\n"),
        (431, "head_too_large", b"GET / HTTP/1.1\r\nX: " + b"a" * 600 + b"\r\n\r\n"),
        (431, "head_too_large", b"GET / HTTP/1.1\r\nX: " + b"a" * 600),
        (501, "transfer_coding_not_supported", b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n"),
        (505, "http_version_not_supported", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ],
)
async def test_refusals_close_and_explain(status: int, code: str, data: bytes) -> None:
    limits = HttpLimits(max_head_bytes=512, max_body_bytes=1000)
    async with running(echo, limits=limits) as state, await state.connect() as stream:
        await stream.send_all(data + b"some more that is never looked at" * (status == 413))
        answer = await read_all(stream)
    assert status_of(answer) == status
    assert b"connection: close" in answer
    assert json.loads(body_of(answer))["error"]["code"] == code
    assert state.errors == []


async def test_the_guard_speaks_first_and_keeps_the_connection() -> None:
    async with running(echo, guard=OriginGuard().check) as state:
        answer = await state.talk(GET.replace(b"localhost", b"evil.example") + LAST_GET)
    assert answer.startswith(b"HTTP/1.1 403")
    assert b"host_not_allowed" in answer
    assert b"200 OK" in answer
    assert b"access-control" not in answer.lower()


async def test_a_broken_guard_is_a_500() -> None:
    def guard(request: Request) -> Refusal | None:
        raise ZeroDivisionError

    async with running(echo, guard=guard) as state:
        assert status_of(await state.talk(LAST_GET)) == 500
    assert isinstance(state.errors[0], ZeroDivisionError)


async def test_failing_handlers() -> None:
    async def handler(request: Request, response: Response) -> None:
        if request.path == "/raise":
            raise ZeroDivisionError
        if request.path == "/late":
            await response.start(200, (), b"begun")
            raise ZeroDivisionError
        if request.path == "/unfinished":
            await response.start(200, (), b"begun")

    async with running(handler) as state:
        for path in (b"/raise", b"/nothing"):
            answer = await state.talk(LAST_GET.replace(b"/ ", path + b" "))
            assert status_of(answer) == 500
            assert json.loads(body_of(answer))["error"]["type"] == "server_error"
        for path in (b"/late", b"/unfinished"):
            answer = await state.talk(GET.replace(b"/ ", path + b" "))
            assert status_of(answer) == 200
            assert body_of(answer) == b"5\r\nbegun\r\n"
    kinds = [type(exc) for exc in state.errors]
    assert kinds == [ZeroDivisionError, HttpUsageError, ZeroDivisionError, HttpUsageError]


async def test_without_on_error_failures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(request: Request, response: Response) -> None:
        raise ZeroDivisionError

    (listener,) = await open_tcp_listeners("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve([listener], handler, task_status=task_status))
        async with await trio.open_tcp_stream("127.0.0.1", listener.port) as stream:
            await stream.send_all(LAST_GET)
            assert status_of(await read_all(stream)) == 500
        nursery.cancel_scope.cancel()
    assert "http_handler_failed" in caplog.text


@pytest.mark.parametrize(
    "misuse",
    [
        lambda r: r.write(b"x"),
        lambda r: r.finish(),
        lambda r: r.send(100),
        lambda r: r.send(204, (), b"x"),
        lambda r: r.send(200, [(b"Content-Length", b"1")]),
        lambda r: r.send(200, [(b"x", b"a\r\nb: c")]),
    ],
)
async def test_misuse_is_told(misuse: Callable[[Response], Any]) -> None:
    async def handler(request: Request, response: Response) -> None:
        await misuse(response)

    async with running(handler) as state:
        assert status_of(await state.talk(LAST_GET)) == 500
    assert isinstance(state.errors[0], HttpUsageError)


async def test_two_answers_are_told() -> None:
    async def handler(request: Request, response: Response) -> None:
        await response.send(200, (), b"one")
        await response.send(200, (), b"two")

    async with running(handler) as state:
        assert body_of(await state.talk(GET)) == b"one"
    assert isinstance(state.errors[0], HttpUsageError)


async def test_abort_leaves_the_body_visibly_cut() -> None:
    async def handler(request: Request, response: Response) -> None:
        await response.start(200, (), b"begun")
        response.abort()
        response.abort()
        with pytest.raises(HttpUsageError):
            await response.write(b"x")

    async with running(handler) as state:
        assert body_of(await state.talk(GET)) == b"5\r\nbegun\r\n"
        async with await state.connect() as stream:
            await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
            with pytest.raises(trio.BrokenResourceError):
                await read_all(stream)


class Watched:
    """A handler that waits, and tells when it was cancelled."""

    def __init__(self, *, streams: bool, reads_body: bool = False) -> None:
        self.streams = streams
        self.reads_body = reads_body
        self.began = trio.Event()
        self.cancelled = trio.Event()

    async def __call__(self, request: Request, response: Response) -> None:
        try:
            self.began.set()
            if self.streams:
                await response.start(200, (), b"begun")
            if self.reads_body:
                await request.body()
            await trio.sleep_forever()
        except trio.Cancelled:
            self.cancelled.set()
            raise


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("way", ["fin", "rst", "half", "pipelined"])
async def test_a_hang_up_cancels_the_handler(streams: bool, way: str) -> None:
    handler = Watched(streams=streams)
    async with running(handler) as state:
        stream = await state.connect()
        await stream.send_all(GET + (GET if way == "pipelined" else b""))
        await handler.began.wait()
        if way == "half":
            await stream.send_eof()
        else:
            if way == "rst":
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await stream.aclose()
        before = trio.current_time()
        with trio.fail_after(SOON_S):
            await handler.cancelled.wait()
        assert trio.current_time() - before < 0.1
        await stream.aclose()
    assert state.errors == []


@pytest.mark.parametrize("use_epoll", [True, False])
async def test_the_hangup_watch(use_epoll: bool) -> None:
    watch = HangupWatch(use_epoll=use_epoll)
    pairs = [socket.socketpair() for _ in range(3)]
    told = [trio.Event() for _ in pairs]
    for (ours, _), event in zip(pairs, told, strict=True):
        ours.setblocking(False)
        watch.add(ours, event.set)
    watch.remove(pairs[1][0])
    watch.remove(pairs[1][0])
    pairs[1][1].close()
    pairs[2][1].send(b"unread")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        pairs[0][1].close()
        with trio.fail_after(SOON_S):
            await told[0].wait()
        assert not told[1].is_set()
        assert not told[2].is_set()
        nursery.cancel_scope.cancel()
    watch.close()
    for pair in pairs:
        for sock in pair:
            sock.close()


async def test_a_hang_up_within_the_body() -> None:
    handler = Watched(streams=False, reads_body=True)
    async with running(handler) as state:
        stream = await state.connect()
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc")
        await handler.began.wait()
        await stream.aclose()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (await state.talk(b"bad\n")).startswith(b"HTTP/1.1 400")
    assert state.errors == []


async def test_writing_to_a_client_that_has_gone() -> None:
    caught: list[BaseException] = []
    gone = trio.Event()
    done = trio.Event()

    async def handler(request: Request, response: Response) -> None:
        with trio.CancelScope(shield=True):
            await gone.wait()
            try:
                await response.start(200)
                for _ in range(10_000):
                    await response.write(b"x" * 1000)
            except ClientDisconnectedError as exc:
                caught.append(exc)
            done.set()
        raise ClientDisconnectedError("again")

    async with running(handler) as state:
        stream = await state.connect()
        await stream.send_all(GET)
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()
        gone.set()
        with trio.fail_after(SOON_S):
            await done.wait()
    assert len(caught) == 1
    assert state.errors == []


async def test_a_write_that_a_handler_cancels_closes_the_connection() -> None:
    async def handler(request: Request, response: Response) -> None:
        await response.start(200)
        with trio.move_on_after(0.05):
            while True:
                await response.write(b"x" * 65536)
        with pytest.raises(HttpUsageError):
            await response.finish()

    async with running(handler) as state, await state.connect() as stream:
        await stream.send_all(GET)
        answer = await read_all(stream)
        assert not answer.endswith(b"0\r\n\r\n")


async def test_a_body_read_that_a_handler_cancels_goes_on_later() -> None:
    async def handler(request: Request, response: Response) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await request.body()
        await response.send(200, (), await request.body())

    for framing, body in (
        (b"Content-Length: 6", b"abcdef"),
        (b"Transfer-Encoding: chunked", b"6\r\nabcdef\r\n0\r\n\r\n"),
    ):
        async with running(handler) as state, await state.connect() as stream:
            await stream.send_all(
                b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + framing + b"\r\n\r\n" + body[:5]
            )
            await trio.testing.wait_all_tasks_blocked()
            await stream.send_all(body[5:])
            assert body_of(await read_all(stream)) == b"abcdef"


QUICK = 0.08


@pytest.mark.parametrize(
    ("limits", "sent", "status"),
    [
        (HttpLimits(idle_timeout_s=QUICK), b"", 0),
        (HttpLimits(head_timeout_s=QUICK), b"GET / HT", 408),
        (HttpLimits(body_timeout_s=QUICK), b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc", 408),
    ],
)
async def test_what_comes_too_slowly_is_closed(limits: HttpLimits, sent: bytes, status: int) -> None:
    async with running(echo, limits=limits) as state:
        answer = await state.talk(sent)
    assert (status_of(answer) if answer else 0) == status


async def test_a_client_that_does_not_read_is_cut() -> None:
    cancelled = trio.Event()

    async def handler(request: Request, response: Response) -> None:
        await response.start(200)
        try:
            while True:
                await response.write(b"x" * 65536)
        finally:
            cancelled.set()

    async with running(handler, limits=HttpLimits(write_timeout_s=QUICK)) as state, await state.connect() as stream:
        await stream.send_all(GET)
        with trio.fail_after(SOON_S):
            await cancelled.wait()
    assert state.errors == []


async def test_too_many_connections() -> None:
    async with running(echo, limits=HttpLimits(max_connections=1)) as state, await state.connect() as stream:
        await stream.send_all(GET)
        await read_until(stream, b"empty")
        async with await state.connect() as second:
            assert status_of(await read_all(second)) == 503


async def test_shutdown_closes_idle_connections_and_lets_the_others_finish() -> None:
    release = trio.Event()
    began = trio.Event()

    async def handler(request: Request, response: Response) -> None:
        began.set()
        await release.wait()
        await response.send(200, (), b"done")

    async with running(handler, grace_s=SOON_S) as state:
        idle = await state.connect()
        busy = await state.connect()
        await busy.send_all(GET)
        await began.wait()
        state.shutdown.set()
        assert await read_all(idle) == b""
        with pytest.raises(OSError):
            await state.connect()
        release.set()
        answer = await read_all(busy)
        assert b"connection: close" in answer
        assert body_of(answer) == b"done"
        with trio.fail_after(SOON_S):
            await state.ended.wait()
        await idle.aclose()
        await busy.aclose()


async def test_a_client_that_never_reads_cannot_hold_up_the_shutdown() -> None:
    blocked = trio.Event()

    async def handler(request: Request, response: Response) -> None:
        await response.start(200)
        for i in range(10_000):
            if i == 200:
                blocked.set()
            await response.write(b"x" * 65536)

    async with running(handler, grace_s=0.05) as state, await state.connect() as stream:
        await stream.send_all(GET)
        await trio.testing.wait_all_tasks_blocked(0.02)
        state.shutdown.set()
        with trio.fail_after(2):
            await state.ended.wait()


async def test_cancelling_the_server_closes_everything() -> None:
    handler = Watched(streams=True)
    async with running(handler) as state:
        stream = await state.connect()
        await stream.send_all(GET)
        await handler.began.wait()
    assert handler.cancelled.is_set()
    assert not (await read_all(stream)).endswith(b"0\r\n\r\n")
    await stream.aclose()


async def test_unix_clients(tmp_path: Path) -> None:
    clients: list[Any] = []

    async def handler(request: Request, response: Response) -> None:
        clients.append(request.client)
        await response.send(200)

    path = str(tmp_path / "s")
    listener = open_unix_listener(path)
    shutdown = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve([listener], handler, shutdown=shutdown, task_status=task_status))
        async with await trio.open_unix_socket(path) as stream:
            await stream.send_all(LAST_GET)
            await read_all(stream)
        shutdown.set()
    assert clients == ["unix"]
    assert not Path(path).exists()


async def test_no_descriptors_left_is_reported_and_survived() -> None:
    (listener,) = await open_tcp_listeners("127.0.0.1", 0)
    real = listener.sock

    class Exhausted:
        failures: ClassVar[list[OSError]] = [OSError(24, "Too many open files"), ConnectionAbortedError(103, "aborted")]

        def fileno(self) -> int:
            return real.fileno()

        def accept(self) -> Any:
            if self.failures:
                raise self.failures.pop(0)
            return real.accept()

        def close(self) -> None:
            real.close()

    listener.sock = Exhausted()  # type: ignore[assignment]
    errors: list[BaseException] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve(
                [listener], echo, on_error=lambda exc, request: errors.append(exc), task_status=task_status
            )
        )
        async with await trio.open_tcp_stream("127.0.0.1", real.getsockname()[1]) as stream:
            await stream.send_all(LAST_GET)
            assert status_of(await read_all(stream)) == 200
        nursery.cancel_scope.cancel()
    assert [getattr(exc, "errno", None) for exc in errors] == [24]


def test_error_bodies() -> None:
    body = json.loads(error_body(404, "no", None, "x", {"lloom": {"a": 1}, "message": "other"}))
    assert body == {
        "error": {"lloom": {"a": 1}, "message": "no", "type": "invalid_request_error", "code": "x", "param": None}
    }


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="max_headers"):
        HttpLimits(max_headers=0)


def _contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


async def test_tls() -> None:
    server, client = _contexts()
    body = b"x" * 300_000
    async with running(echo, ssl_context=server) as state:
        tcp = await state.connect()
        async with trio.SSLStream(tcp, client, server_hostname="localhost", https_compatible=True) as stream:
            head = b"POST / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
            await stream.send_all(head + body)
            assert body_of(await read_all(stream)) == body
        assert await state.talk(GET) != b"HTTP/1.1 200"
    assert state.errors == []


async def test_a_hang_up_under_tls_cancels_the_handler() -> None:
    server, client = _contexts()
    handler = Watched(streams=True)
    async with running(handler, ssl_context=server) as state:
        tcp = await state.connect()
        stream = trio.SSLStream(tcp, client, server_hostname="localhost", https_compatible=True)
        await stream.send_all(GET)
        await handler.began.wait()
        await tcp.aclose()
        with trio.fail_after(SOON_S):
            await handler.cancelled.wait()

"""The pooled client against scripted servers: what is a whole answer, what is retried, what each wait ends with."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from lloom_sidecar.http.client import HttpClient, open_client
from lloom_sidecar.http.errors import (
    BadResponseError,
    BodyTooLargeError,
    HttpClientError,
    HttpConnectError,
    HttpTimeoutError,
    IncompleteBodyError,
    RemoteClosedError,
)
from lloom_sidecar.http.limits import ClientLimits, HttpLimits
from lloom_sidecar.http.listeners import open_tcp_listeners, open_unix_listener
from lloom_sidecar.http.server import Request, Response, serve

SOON_S = 5.0
QUICK = 0.08
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Scripted:
    """A server that plays one script a connection and notes what it was sent."""

    def __init__(self, *scripts: Callable[[trio.SocketStream, Scripted], Awaitable[None]]) -> None:
        self.scripts = list(scripts)
        self.connections = 0
        self.closed = trio.Event()
        self.base = ""

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.base = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"

        async def play(stream: trio.SocketStream) -> None:
            script = self.scripts[min(self.connections, len(self.scripts) - 1)]
            self.connections += 1
            try:
                await script(stream, self)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.closed.set()

        async with trio.open_nursery() as nursery:
            task_status.started()
            await trio.serve_listeners(play, listeners, handler_nursery=nursery)


async def read_request(stream: trio.SocketStream) -> bytes:
    got = b""
    while b"\r\n\r\n" not in got:
        data = await stream.receive_some(65536)
        if not data:
            raise trio.BrokenResourceError
        got += data
    return got


def says(*answers: bytes, close: bool = False) -> Callable[[trio.SocketStream, Scripted], Awaitable[None]]:
    """Answers request after request; then closes, or reads until the client closes."""

    async def script(stream: trio.SocketStream, server: Scripted) -> None:
        async with stream:
            for answer in answers:
                await read_request(stream)
                await stream.send_all(answer)
            if not close:
                while await stream.receive_some(65536):
                    pass
                server.closed.set()

    return script


@asynccontextmanager
async def scripted(
    *scripts: Callable[[trio.SocketStream, Scripted], Awaitable[None]], limits: ClientLimits | None = None
) -> AsyncIterator[tuple[Scripted, HttpClient]]:
    server = Scripted(*scripts)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        async with open_client(server.base, limits=limits) as client:
            with trio.fail_after(SOON_S):
                yield server, client
        nursery.cancel_scope.cancel()


async def get(client: HttpClient) -> bytes:
    async with client.request("GET", "/") as response:
        return await response.read(1000)


@asynccontextmanager
async def real_server() -> AsyncIterator[int]:
    async def handler(request: Request, response: Response) -> None:
        body = await request.body()
        if request.path == "/p/stream":
            await response.start(200, [(b"x", request.target)], b"one")
            await response.write(b"two")
            await response.finish(b"three")
        else:
            await response.send(200, [(b"x", request.target), (b"h", request.host.encode())], body)

    (listener,) = await open_tcp_listeners("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve([listener], handler, task_status=task_status))
        yield listener.port
        nursery.cancel_scope.cancel()


async def test_against_our_server() -> None:
    async with real_server() as port, open_client(f"http://127.0.0.1:{port}/p/") as client:
        for size in (0, 10, 300_000):
            async with client.request("POST", "/a?b=c", [(b"y", b"z")], b"x" * size) as response:
                assert response.status == 200
                assert response.framed
                assert response.header("X") == "/p/a?b=c"
                assert response.header("h") == f"127.0.0.1:{port}"
                assert response.header("none") is None
                assert await response.read(300_000) == b"x" * size
                assert response.complete
                assert await response.receive_some() == b""
        async with client.request("GET", b"/stream") as response:
            assert await response.read(1000) == b"onetwothree"
        async with client.request("HEAD", "/") as response:
            assert await response.read(0) == b""
        assert client.idle_connections == 1


async def test_what_is_sent() -> None:
    seen: list[bytes] = []

    async def script(stream: trio.SocketStream, server: Scripted) -> None:
        seen.append(await read_request(stream))
        await stream.send_all(OK)

    async with (
        scripted(script) as (server, client),
        client.request("POST", "/a", [(b"accept", b"*/*")]) as response,
    ):
        await response.read(10)
    host = server.base.removeprefix("http://").encode()
    assert seen == [b"POST /a HTTP/1.1\r\nhost: " + host + b"\r\ncontent-length: 0\r\naccept: */*\r\n\r\n"]


async def test_unix(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = open_unix_listener(path)

    async def handler(request: Request, response: Response) -> None:
        await response.send(200, (), request.host.encode())

    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve([listener], handler, task_status=task_status))
        async with open_client(f"unix:{path}") as client:
            assert await get(client) == b"localhost"
        nursery.cancel_scope.cancel()


async def test_tls_is_pooled_and_verified() -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server_context)
    client_context = ssl.create_default_context()
    authority.configure_trust(client_context)

    async def handler(request: Request, response: Response) -> None:
        await response.send(200, (), await request.body())

    (listener,) = await open_tcp_listeners("127.0.0.1", 0)
    base = f"https://localhost:{listener.port}"
    body = b"x" * 300_000
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve([listener], handler, ssl_context=server_context, task_status=task_status)
        )
        async with open_client(base, ssl_context=client_context) as client:
            for _ in range(2):
                async with client.request("POST", "/", (), body) as response:
                    assert await response.read(len(body)) == body
            assert client.idle_connections == 1
        async with open_client(base) as stranger:
            with pytest.raises(HttpConnectError, match=r"(?i)certificate"):
                await get(stranger)
        nursery.cancel_scope.cancel()


async def test_keep_alive_uses_one_connection() -> None:
    async with scripted(says(OK, OK, OK)) as (server, client):
        for _ in range(3):
            assert await get(client) == b"ok"
        assert server.connections == 1


async def test_a_server_that_closes_after_each_answer_while_saying_keep_alive() -> None:
    async with scripted(says(OK, close=True)) as (server, client):
        for _ in range(4):
            assert await get(client) == b"ok"
            await trio.testing.wait_all_tasks_blocked()
        assert server.connections == 4


async def test_a_pooled_connection_that_dies_is_retried_once_on_a_fresh_one() -> None:
    async def dies_on_the_second(stream: trio.SocketStream, server: Scripted) -> None:
        async with stream:
            await read_request(stream)
            await stream.send_all(OK)
            await read_request(stream)

    async with scripted(dies_on_the_second, says(OK)) as (server, client):
        assert await get(client) == b"ok"
        assert await get(client) == b"ok"
        assert server.connections == 2


async def test_a_fresh_connection_that_dies_is_not_retried() -> None:
    async def dies(stream: trio.SocketStream, server: Scripted) -> None:
        async with stream:
            await read_request(stream)

    async with scripted(dies) as (server, client):
        with pytest.raises(RemoteClosedError):
            await get(client)
        assert server.connections == 1


async def test_a_pooled_connection_that_dies_within_the_answer_is_not_retried() -> None:
    async with scripted(says(OK, b"HTTP/1.1 2", close=True)) as (server, client):
        assert await get(client) == b"ok"
        with pytest.raises(BadResponseError):
            await get(client)
        assert server.connections == 1


async def test_interim_answers_are_skipped() -> None:
    async with scripted(says(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK)) as (
        _,
        client,
    ):
        assert await get(client) == b"ok"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 Switching\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 16,
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 2000,
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 2000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 11 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Le",
    ],
)
async def test_bad_heads(answer: bytes) -> None:
    limits = ClientLimits(max_head_bytes=1000, max_headers=10)
    async with scripted(says(answer, close=True), limits=limits) as (_, client):
        with pytest.raises(BadResponseError):
            await get(client)
        assert client.idle_connections == 0


CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
        CHUNKED_HEAD,
        CHUNKED_HEAD + b"2\r\nab\r\n",
        CHUNKED_HEAD + b"2\r\nab\r\n0\r\n",
        CHUNKED_HEAD + b"5\r\nab",
        CHUNKED_HEAD + b"2\r\nab\r\nx\r\n",
    ],
)
async def test_a_cut_or_broken_body_is_never_an_end(answer: bytes) -> None:
    async with scripted(says(answer, close=True)) as (_, client):
        async with client.request("GET", "/") as response:
            for _ in range(2):
                with pytest.raises(IncompleteBodyError):
                    await response.read(1000)
            assert not response.complete
        assert client.idle_connections == 0


async def test_a_reset_within_the_body() -> None:
    async def resets(stream: trio.SocketStream, server: Scripted) -> None:
        await read_request(stream)
        await stream.send_all(CHUNKED_HEAD + b"2\r\nab\r\n")
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await stream.aclose()

    async with scripted(resets) as (_, client), client.request("GET", "/") as response:
        with pytest.raises(IncompleteBodyError):
            await response.read(1000)


async def test_a_body_that_ends_with_the_connection_is_flagged() -> None:
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall"
    async with scripted(says(answer, close=True)) as (_, client):
        async with client.request("GET", "/") as response:
            assert not response.framed
            assert await response.read(1000) == b"all"
        assert client.idle_connections == 0


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"surplus",
        CHUNKED_HEAD + b"2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
        b"HTTP/1.1 204 No\r\n\r\nsurplus",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    ],
)
async def test_connections_that_must_not_be_used_again(answer: bytes) -> None:
    async with scripted(says(answer)) as (_, client):
        assert await get(client) in (b"ok", b"")
        assert client.idle_connections == 0


async def test_leaving_before_the_end_closes_at_once() -> None:
    async with scripted(says(CHUNKED_HEAD + b"2\r\nab\r\n")) as (server, client):
        async with client.request("GET", "/") as response:
            assert await response.receive_some() == b"ab"
        await server.closed.wait()
        with pytest.raises(HttpClientError):
            await response.receive_some()


async def test_bodies_over_the_callers_limit() -> None:
    for answer in (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", CHUNKED_HEAD + b"3\r\nabc\r\n"):
        async with scripted(says(answer)) as (_, client), client.request("GET", "/") as response:
            with pytest.raises(BodyTooLargeError):
                await response.read(2)


async def test_an_answer_that_comes_before_the_body_was_taken() -> None:
    async def refuses(stream: trio.SocketStream, server: Scripted) -> None:
        await read_request(stream)
        await stream.send_all(b"HTTP/1.1 413 Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno")
        await stream.send_eof()
        with trio.move_on_after(QUICK):
            while await stream.receive_some(65536):
                pass
        await stream.aclose()

    async with scripted(refuses) as (_, client), client.request("POST", "/", (), b"x" * 5_000_000) as response:
        assert response.status == 413
        assert await response.read(10) == b"no"


async def hangs(stream: trio.SocketStream, server: Scripted) -> None:
    await trio.sleep_forever()


async def hangs_in_body(stream: trio.SocketStream, server: Scripted) -> None:
    await read_request(stream)
    await stream.send_all(CHUNKED_HEAD + b"2\r\nab\r\n")
    while await stream.receive_some(65536):
        pass
    server.closed.set()


async def test_a_hung_write() -> None:
    async with scripted(hangs, limits=ClientLimits(write_timeout_s=QUICK)) as (_, client):
        with pytest.raises(HttpTimeoutError) as caught:
            async with client.request("POST", "/", (), b"x" * 20_000_000):
                pass
    assert caught.value.phase == "write"


async def test_a_hung_first_byte() -> None:
    async with scripted(hangs, limits=ClientLimits(first_byte_timeout_s=QUICK)) as (_, client):
        with pytest.raises(HttpTimeoutError) as caught:
            await get(client)
    assert caught.value.phase == "first_byte"


async def test_a_hung_body() -> None:
    async with scripted(hangs_in_body, limits=ClientLimits(between_bytes_timeout_s=QUICK)) as (server, client):
        async with client.request("GET", "/") as response:
            assert await response.receive_some() == b"ab"
            for _ in range(2):
                with pytest.raises(HttpTimeoutError) as caught:
                    await response.receive_some()
        await server.closed.wait()
    assert caught.value.phase == "between_bytes"


async def test_a_slow_reader_of_the_answer_is_no_timeout() -> None:
    answer = CHUNKED_HEAD + b"2\r\nab\r\n0\r\n\r\n"
    limits = ClientLimits(between_bytes_timeout_s=QUICK)
    async with scripted(says(answer), limits=limits) as (_, client), client.request("GET", "/") as response:
        await trio.sleep(2 * QUICK)
        assert await response.read(10) == b"ab"


async def test_connection_failures() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with open_client(f"http://127.0.0.1:{unused.getsockname()[1]}") as client:
            with pytest.raises(HttpConnectError):
                await get(client)
    async with open_client("unix:/nonexistent/socket") as client:
        with pytest.raises(HttpConnectError):
            await get(client)


async def test_a_hung_connect() -> None:
    server = Scripted(hangs)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        base = server.base.replace("http://", "https://")
        async with open_client(base, limits=ClientLimits(connect_timeout_s=QUICK)) as client:
            with pytest.raises(HttpTimeoutError) as caught:
                await get(client)
        nursery.cancel_scope.cancel()
    assert caught.value.phase == "connect"


async def test_a_full_pool() -> None:
    limits = ClientLimits(max_connections=1, pool_timeout_s=QUICK)
    async with scripted(says(OK, OK), limits=limits) as (server, client):
        async with client.request("GET", "/") as response:
            with pytest.raises(HttpTimeoutError) as caught:
                await get(client)
            await response.read(10)
        assert caught.value.phase == "pool"
        assert await get(client) == b"ok"
        assert server.connections == 1


async def test_a_waiting_request_gets_the_connection_that_comes_free() -> None:
    async with scripted(says(OK, OK), limits=ClientLimits(max_connections=1)) as (server, client):
        got: list[bytes] = []

        async def second() -> None:
            got.append(await get(client))

        async with trio.open_nursery() as nursery, client.request("GET", "/") as response:
            nursery.start_soon(second)
            await trio.testing.wait_all_tasks_blocked()
            await response.read(10)
        assert got == [b"ok"]
        assert server.connections == 1


async def test_unused_connections_are_closed() -> None:
    async with scripted(says(OK), limits=ClientLimits(idle_s=QUICK)) as (server, client):
        await get(client)
        assert client.idle_connections == 1
        await server.closed.wait()
        assert client.idle_connections == 0


@pytest.mark.parametrize("script", [hangs, hangs_in_body])
@pytest.mark.parametrize("body", [b"", b"x" * 20_000_000])
async def test_cancellation_closes_the_connection_and_frees_its_place(
    script: Callable[[trio.SocketStream, Scripted], Awaitable[None]], body: bytes
) -> None:
    async with scripted(script, says(OK), limits=ClientLimits(max_connections=1)) as (_, client):
        with trio.move_on_after(QUICK):
            async with client.request("POST", "/", (), body) as response:
                while True:
                    await response.receive_some()
        assert client.idle_connections == 0
        assert await get(client) == b"ok"


async def test_a_cancelled_read_loses_nothing() -> None:
    release = trio.Event()

    async def script(stream: trio.SocketStream, server: Scripted) -> None:
        await read_request(stream)
        await stream.send_all(CHUNKED_HEAD)
        await release.wait()
        await stream.send_all(b"2\r\nab\r\n0\r\n\r\n")

    async with scripted(script) as (_, client), client.request("GET", "/") as response:
        with trio.CancelScope() as scope:
            scope.cancel()
            await response.receive_some()
        release.set()
        assert await response.read(10) == b"ab"


async def test_it_must_run() -> None:
    client = HttpClient("http://127.0.0.1:1")
    with pytest.raises(HttpClientError, match="not running"):
        await get(client)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        with pytest.raises(RuntimeError):
            await client.run()
        nursery.cancel_scope.cancel()


async def test_an_error_in_the_block_stays_itself() -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_client("http://127.0.0.1:1"):
            raise ZeroDivisionError


@pytest.mark.parametrize(
    "base",
    ["", "127.0.0.1:1", "ftp://a", "http://", "http://a:0", "http://a:65536", "http://u@a", "http://a/?q", "unix:rel"],
)
def test_bad_bases(base: str) -> None:
    with pytest.raises(ValueError, match="is no backend address"):
        HttpClient(base)


def test_good_bases() -> None:
    for base in ("http://a", "https://[::1]:8000/v1", "unix:///run/x", "unix:/run/x", "HTTP://a.b:80/"):
        assert HttpClient(base).base == base


def test_requests_that_cannot_be_sent() -> None:
    client = HttpClient("http://a")
    for method, path, headers in (
        ("GET X", "/", []),
        ("GET", "x", []),
        ("GET", "/a b", []),
        ("GET", "/\r\n", []),
        ("GET", "/", [(b"Host", b"x")]),
        ("GET", "/", [(b"x", b"a\r\nb: c")]),
    ):
        with pytest.raises(ValueError):
            client.request(method, path, headers)


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="idle_s"):
        ClientLimits(idle_s=0)
    assert HttpLimits().max_connections == 20_000

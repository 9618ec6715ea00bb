"""The OpenAI API over real HTTP on loopback, on a router that plays scripts."""

from __future__ import annotations

import gzip
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import httpx
import pytest
import trio

from lloom_sidecar.client.api import ApiSettings, OpenAiApi
from lloom_sidecar.client.openai import Attempt
from lloom_sidecar.client.route import Route
from lloom_sidecar.client.router import Router
from lloom_sidecar.errors import (
    DaemonUnavailableError,
    LloomError,
    NoExecutorError,
    PeerBusyError,
    RefusedError,
    RoutingError,
    StreamLostError,
    UnknownModelError,
)
from lloom_sidecar.http.listeners import open_tcp_listeners
from lloom_sidecar.http.server import serve
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call
from lloom_sidecar.peers.hedging import Hedge
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import Policy, Wanted
from lloom_sidecar.protocol.compression import compress
from lloom_sidecar.protocol.exchange import HeadReceived
from lloom_sidecar.protocol.offers import Announcement, Kind, Load, ModelOffer
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

EXECUTOR = PeerId.from_ed25519(bytes(32))
ME = PeerId.from_ed25519(b"m" * 32)
BODY = {"model": "m", "messages": []}
STREAMED = {**BODY, "stream": True}


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


TEXT = event({"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]})
END = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + b"data: [DONE]\n\n"
LOST = StreamLostError("cut")


class FakeExchange:
    """Pieces, exceptions and waits; the end of the script is a verified end."""

    def __init__(self, script: list[Any]) -> None:
        self.peer = EXECUTOR
        self.head = HeadReceived("text/event-stream", 0, 1000)
        self.first_at = trio.current_time()
        self.receipt = None
        self.sent = SimpleNamespace(checkpoint=None)
        self._script = script

    async def receive(self) -> bytes | None:
        await trio.lowlevel.checkpoint()
        while self._script:
            line = self._script.pop(0)
            if isinstance(line, trio.Event):
                await line.wait()
            elif isinstance(line, Exception):
                raise line
            else:
                return cast("bytes", line)
        return None


class FakeRouter(Router):
    """Hands a scripted exchange to ``use``, or raises; what ``use`` raises it raises, as the real one does.

    A list in the script is that of one call; a NoExecutorError is raised for one.
    """

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.error: LloomError | None = None
        self.attempts: list[Attempt] = []
        self.calls: list[Call] = []
        self.wanted: list[Wanted] = []
        self.policies: list[Policy] = []
        self.marks: dict[str, Any] = {}
        self.absent: RoutingError = UnknownModelError("no such model")
        self.began = trio.Event()
        self.ended = trio.Event()

    def absence(self, model: str) -> RoutingError:
        return self.absent

    async def run(self, call: Call, wanted: Wanted, policy: Policy, use: Any, route: Route) -> None:
        script = self.script
        if script and isinstance(script[0], list):
            script = script.pop(0)
        elif script and isinstance(script[0], NoExecutorError):
            raise script.pop(0)
        self.calls.append(call)
        self.wanted.append(wanted)
        self.policies.append(policy)
        self.began.set()
        try:
            route.attempts += self.attempts
            route.asked = len(self.attempts)
            for name, value in self.marks.items():
                setattr(route, name, value)
            if self.error is not None:
                raise self.error
            route.asked += 1
            route.executor = EXECUTOR
            await use(route, FakeExchange(script))
        finally:
            self.ended.set()


class Observer:
    def __init__(self) -> None:
        self.started = 0
        self.received: list[str] = []
        self.ended: list[tuple[str, PeerId | None, str, int]] = []
        self.has_ended = trio.Event()

    def http_started(self) -> None:
        self.started += 1

    def http_received(self, request_id: str, model: str) -> None:
        self.received.append(model)

    def http_ended(
        self,
        request_id: str,
        model: str,
        peer: PeerId | None,
        code: str,
        seconds: float,
        first_s: float | None,
        attempts: int,
    ) -> None:
        self.ended.append((model, peer, code, attempts))
        self.has_ended.set()


class Bench:
    def __init__(self, router: FakeRouter, settings: ApiSettings) -> None:
        self.router = router
        self.observer = Observer()
        self.faults: list[BaseException] = []
        self.book = PeerBook(me=ME, is_open=True, allow_list=frozenset())
        self.api = OpenAiApi(router=router, book=self.book, settings=settings, observer=self.observer, started_at_s=77)
        self.port = 0
        self.client = httpx.AsyncClient()

    async def post(self, body: Any = BODY, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(path, content=content, headers=names)

    def code(self) -> str:
        """How the only call ended."""
        assert self.observer.started == len(self.observer.ended) == 1
        return self.observer.ended[0][2]


@asynccontextmanager
async def bench(*script: Any, **settings: Any) -> AsyncIterator[Bench]:
    b = Bench(FakeRouter(*script), ApiSettings(**settings))
    listeners = await open_tcp_listeners("127.0.0.1", 0)
    b.port = listeners[0].port
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve(
                listeners, b.api, on_error=lambda exc, request: b.faults.append(exc), task_status=task_status
            )
        )
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{b.port}", timeout=10) as b.client:
            yield b
        nursery.cancel_scope.cancel()
    assert b.faults == []


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    found: dict[str, Any] = response.json()["error"]
    assert set(found) >= {"message", "type", "param", "code", "lloom"}
    return found


class TestPaths:
    @pytest.mark.parametrize("path", ["/", "/v1", "/v1/responses", "/v1/chat/completions/", "/v1/modelsx"])
    async def test_404(self, path: str) -> None:
        async with bench() as b:
            response = await b.post(path=path)
            assert response.status_code == 404
            assert error_of(response)["code"] == "not_found"
            assert b.observer.started == 0

    async def test_405(self) -> None:
        async with bench() as b:
            for method, path, allowed in (
                ("GET", "/v1/chat/completions", "POST"),
                ("DELETE", "/v1/embeddings", "POST"),
                ("POST", "/v1/models", "GET, HEAD"),
                ("PUT", "/v1/models/m", "GET, HEAD"),
            ):
                response = await b.client.request(method, path)
                assert (response.status_code, response.headers["allow"]) == (405, allowed)
                assert error_of(response)["code"] == "method_not_allowed"

    async def test_the_key(self) -> None:
        async with bench(b"{}", api_keys=("k1", "k2")) as b:
            for given in (
                {},
                {"authorization": "Bearer k3"},
                {"authorization": "k1"},
                {"authorization": "Bearer \xe9"},
            ):
                response = await b.client.post(
                    "/v1/chat/completions",
                    json=BODY,
                    headers=[(b"authorization", v.encode("latin-1")) for v in given.values()],
                )
                assert response.status_code == 401
                assert error_of(response)["type"] == "authentication_error"
            assert (await b.client.get("/v1/models")).status_code == 401
            assert b.router.calls == []
            assert (await b.post(authorization="Bearer k2")).status_code == 200


class TestModels:
    def offer(self, b: Bench, *models: ModelOffer) -> None:
        b.book.apply(
            Announcement(EXECUTOR, 1, 0, 900, Kind.INITIAL, b"", True, (), models, Load(), "", b"", b"d" * 32, b"d"),
            now=trio.current_time(),
            direct=True,
            source=None,
        )

    async def test_list_and_one(self) -> None:
        async with bench() as b:
            assert (await b.client.get("/v1/models")).json() == {"object": "list", "data": []}
            self.offer(b, ModelOffer("org/m:1", context_length=9, features=frozenset({"chat"})))
            one = {
                "id": "org/m:1",
                "object": "model",
                "created": 77,
                "owned_by": "lloom",
                "lloom": {"executors": 1, "context_length": 9, "features": ["chat"]},
            }
            assert (await b.client.get("/v1/models")).json() == {"object": "list", "data": [one]}
            assert (await b.client.get("/v1/models/org/m:1")).json() == one
            assert (await b.client.get("/v1/models/org%2Fm:1")).json() == one
            assert (await b.client.head("/v1/models")).status_code == 200
            missing = await b.client.get("/v1/models/x")
            assert missing.status_code == 404
            assert error_of(missing)["code"] == "model_not_found"
            b.router.absent = NoExecutorError("not complete", retry_after_s=2.0)
            missing = await b.client.get("/v1/models/x")
            assert (missing.status_code, missing.headers["retry-after"]) == (503, "2")


class TestCalls:
    async def test_a_whole_answer(self) -> None:
        async with bench(b'{"a":', b"1}") as b:
            b.router.attempts = [Attempt("p", "open", "x", 1.0)]
            response = await b.post(idempotency_key="k" * 200, traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
            assert (response.status_code, response.content) == (200, b'{"a":1}')
            assert response.headers["content-type"] == "application/json"
            assert response.headers["x-lloom-executor"] == str(EXECUTOR)
            assert response.headers["x-lloom-attempts"] == "2"
            assert float(response.headers["x-lloom-overhead-ms"]) >= 0
            call = b.router.calls[0]
            assert response.headers["x-request-id"] == call.request_id.hex()
            assert (call.operation, call.model, json.loads(call.body)) == (pb.OPERATION_CHAT, "m", BODY)
            assert call.idempotency_key == b"k" * 128
            assert call.traceparent.startswith("00-aaaa")
            assert call.deadline_ms == 600_000
            assert b.observer.ended == [("m", EXECUTOR, "ok", 2)]
            assert b.observer.received == ["m"]

    @pytest.mark.parametrize(
        "traceparent", [b"\xfc", b"a\tb", b"x" * 65, b"00-" + b"0" * 32 + b"-" + b"b" * 16 + b"-01"]
    )
    async def test_a_traceparent_that_is_none_is_left_out(self, traceparent: bytes) -> None:
        async with bench(b"{}") as b:
            await b.client.post("/v1/chat/completions", json=BODY, headers={b"traceparent": traceparent})
            assert b.router.calls[0].traceparent == ""

    @pytest.mark.parametrize(
        ("path", "operation"),
        [("/v1/completions", pb.OPERATION_COMPLETIONS), ("/v1/embeddings", pb.OPERATION_EMBEDDINGS)],
    )
    async def test_operations(self, path: str, operation: int) -> None:
        async with bench(b"{}") as b:
            response = await b.post(path=path)
            assert (response.status_code, b.router.calls[0].operation) == (200, operation)

    @pytest.mark.parametrize("cut", [1, 5, 10_000])
    async def test_a_streamed_answer(self, cut: int) -> None:
        whole = TEXT * 3 + END
        async with bench(*[whole[i : i + cut] for i in range(0, len(whole), cut)]) as b:
            response = await b.post(STREAMED)
            assert (response.status_code, response.content) == (200, whole)
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.headers["cache-control"] == "no-cache"
            assert response.headers["x-lloom-executor"] == str(EXECUTOR)
            assert b.code() == "ok"

    async def test_an_answer_of_only_an_end(self) -> None:
        async with bench(END) as b:
            assert (await b.post(STREAMED)).content == END

    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[]", {"messages": []}, {"model": "\n"}, {"model": "x" * 300}, {"model": "m", "n": "2"}]
    )
    async def test_a_body_that_cannot_be_used(self, body: Any) -> None:
        async with bench() as b:
            response = await b.post(body)
            assert response.status_code == 400
            assert error_of(response)["type"] == "invalid_request_error"
            assert b.router.calls == []
            assert b.code() == "invalid_request"

    async def test_priority_and_timeout_go_with_the_request(self) -> None:
        async with bench(b"{}") as b:
            assert (await b.post(x_lloom_priority="-3", x_lloom_timeout="2.5")).status_code == 200
            assert (await b.post(x_lloom_timeout="999999")).status_code == 200
            said = [(call.priority, call.deadline_ms) for call in b.router.calls]
            assert said == [(-3, 2500), (0, 600_000)]

    @pytest.mark.parametrize(
        ("header", "text"),
        [
            *(("x_lloom_priority", text) for text in ("11", "-11", "1.5", "high", "9999999999")),
            *(("x_lloom_timeout", text) for text in ("0", "0.05", "-1", "1e3", "soon", "nan", "10s")),
        ],
    )
    async def test_a_priority_or_timeout_that_is_none(self, header: str, text: str) -> None:
        async with bench(b"{}") as b:
            response = await b.post(**{header: text})
            assert (response.status_code, b.router.calls) == (400, [])
            assert header.replace("_", "-") in error_of(response)["message"]

    @pytest.mark.parametrize(
        ("given", "policy"),
        [
            ("round-robin", Policy.ROUND_ROBIN),
            ("round_robin", Policy.ROUND_ROBIN),
            ("Race", Policy.RACE),
            ("cheapest", Policy.CHEAPEST),
            ("", Policy.FASTEST),
        ],
    )
    async def test_the_policy_of_the_request_goes_before_the_setting(self, given: str, policy: Policy) -> None:
        async with bench(b"{}", policy=Policy.FASTEST) as b:
            assert (await b.post(x_lloom_policy=given)).status_code == 200
            assert b.router.policies == [policy]

    async def test_hedging_by_header(self) -> None:
        for given, hedge in (("", Hedge.FREE), ("on", Hedge.ON), ("OFF", Hedge.OFF)):
            async with bench(b"{}", hedge=Hedge.FREE) as b:
                response = await b.post(x_lloom_hedge=given)
                assert b.router.wanted[0].hedge is hedge
                assert "x-lloom-hedged" not in response.headers

    @pytest.mark.parametrize(("header", "word"), [("x_lloom_policy", "quickest"), ("x_lloom_hedge", "maybe")])
    async def test_an_unknown_word_is_answered_with_the_known_ones(self, header: str, word: str) -> None:
        async with bench() as b:
            response = await b.post(**{header: word})
            assert response.status_code == 400
            message = error_of(response)["message"]
            assert word in message
            assert ("round-robin" in message) is (header == "x_lloom_policy")
            assert b.router.calls == []

    @pytest.mark.parametrize("body", [BODY, STREAMED])
    async def test_an_answer_says_that_several_were_asked(self, body: dict[str, Any]) -> None:
        async with bench(END) as b:
            b.router.marks = {"is_hedged": True, "raced": 3}
            response = await b.post(body)
            assert (response.headers["x-lloom-hedged"], response.headers["x-lloom-raced"]) == ("1", "3")

    async def test_without_a_key_the_request_id_serves(self) -> None:
        async with bench(b"{}") as b:
            await b.post()
            assert b.router.calls[0].idempotency_key == b.router.calls[0].request_id

    async def test_pinning(self) -> None:
        async with bench(b"{}") as b:
            await b.post(x_lloom_pin_executor=f"{EXECUTOR}, {ME}")
            assert b.router.wanted[0].pinned == {EXECUTOR, ME}
            response = await b.post(x_lloom_pin_executor="nobody")
            assert response.status_code == 400

    @pytest.mark.parametrize(
        ("error", "status", "code", "retry_after"),
        [
            (UnknownModelError("no"), 404, "model_not_found", None),
            (NoExecutorError("none"), 503, "no_executor", "2"),
            (NoExecutorError("none", retry_after_s=7.4), 503, "no_executor", "7"),
            (DaemonUnavailableError("away"), 503, "daemon_unavailable", "2"),
            (PeerBusyError("busy", retry_after_s=0.1), 503, "peer_busy", "1"),
            (RefusedError("many", code="peer_limit", http_status=429), 429, "peer_limit", "2"),
            (
                RefusedError("r", code="backend_rejected", http_status=422, body=b'{"error":{"message":"b"}}'),
                422,
                "backend_rejected",
                None,
            ),
        ],
    )
    @pytest.mark.parametrize("body", [BODY, STREAMED])
    async def test_an_error_before_the_answer(
        self, error: LloomError, status: int, code: str, retry_after: str | None, body: dict[str, Any]
    ) -> None:
        async with bench() as b:
            b.router.error = error
            response = await b.post(body)
            assert response.status_code == status
            assert error_of(response)["lloom"] == {"code": code, "attempts": []}
            assert response.headers.get("retry-after") == retry_after
            assert "x-should-retry" not in response.headers
            assert b.code() == code

    async def test_after_failover_the_client_need_not_retry(self) -> None:
        async with bench() as b:
            b.router.error = LOST
            b.router.attempts = [Attempt("p", "answer", "stream_lost", 1.5)]
            response = await b.post()
            assert (response.status_code, response.headers["x-should-retry"]) == (502, "false")
            assert error_of(response)["lloom"]["attempts"][0]["executor"] == "p"

    async def test_a_cut_whole_answer_is_an_error(self) -> None:
        async with bench(b'{"half":', LOST) as b:
            response = await b.post()
            assert response.status_code == 502
            assert error_of(response)["code"] == "stream_lost"

    async def test_the_deadline(self) -> None:
        async with bench(trio.Event(), deadline_s=0.05) as b:
            response = await b.post()
            assert response.status_code == 504
            assert error_of(response)["code"] == "deadline"
            assert b.router.calls[0].deadline_ms == 50


async def raw_post(b: Bench, body: dict[str, Any], more: bytes = b"") -> trio.SocketStream:
    content = json.dumps(body).encode()
    stream = await trio.open_tcp_stream("127.0.0.1", b.port)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    await stream.send_all(head + more + b"content-length: %d\r\n\r\n" % len(content) + content)
    return stream


async def read_all(stream: trio.SocketStream) -> bytes:
    data = b""
    with trio.fail_after(5):
        while piece := await stream.receive_some(65536):
            data += piece
    return data


class TestCutStreams:
    @pytest.mark.parametrize("script", [[TEXT, LOST], [TEXT, END, LOST]])
    async def test_an_error_event_and_no_last_chunk(self, script: list[Any]) -> None:
        async with bench(*script) as b:
            async with await raw_post(b, STREAMED) as stream:
                data = await read_all(stream)
            assert data.startswith(b"HTTP/1.1 200")
            assert TEXT in data
            assert b"[DONE]" not in data
            assert b'"stop"' not in data
            assert not data.endswith(b"0\r\n\r\n")
            told = json.loads(data[data.rindex(b"data: ") + 6 :].rstrip())["error"]
            assert (told["code"], told["lloom"]["code"]) == ("stream_lost", "stream_lost")
            assert b.code() == "stream_lost"

    async def test_httpx_sees_that_it_is_cut(self) -> None:
        async with bench(TEXT, LOST) as b:
            with pytest.raises(httpx.RemoteProtocolError):
                await b.post(STREAMED)

    async def test_the_deadline_in_the_middle(self) -> None:
        async with bench(TEXT, trio.Event(), deadline_s=0.1) as b:
            async with await raw_post(b, STREAMED) as stream:
                data = await read_all(stream)
            assert b'"code":"deadline"' in data
            assert not data.endswith(b"0\r\n\r\n")

    async def test_the_deadline_while_the_application_does_not_read(self) -> None:
        async with bench(*[TEXT * 20_000] * 4, trio.Event(), deadline_s=0.1) as b:
            async with await raw_post(b, STREAMED) as stream:
                with trio.fail_after(5):
                    await b.router.ended.wait()
                assert not (await read_all(stream)).endswith(b"0\r\n\r\n")
            assert b.code() == "deadline"


class TestResumedStreams:
    FIRST = event({"id": "a", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hel"}}]})
    MORE = event({"id": "b", "choices": [{"index": 0, "delta": {"content": "lo"}}]})
    END = event({"id": "b", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + b"data: [DONE]\n\n"
    ASKED: ClassVar = {**STREAMED, "messages": [{"role": "user", "content": "hi"}]}

    @asynccontextmanager
    async def bench(self, *script: Any, digest: bytes = b"d" * 32, **settings: Any) -> AsyncIterator[Bench]:
        async with bench(*script, **settings) as b:
            TestModels().offer(b, ModelOffer("m", digest=digest))
            yield b

    def chunks(self, response: httpx.Response) -> list[dict[str, Any]]:
        return [json.loads(one[6:]) for one in response.text.split("\n\n") if one.startswith("data: {")]

    async def test_two_parts_are_one_answer(self) -> None:
        async with self.bench([self.FIRST, LOST], [self.MORE, self.END]) as b:
            response = await b.post(self.ASKED, x_lloom_resume="on")
            assert response.content.startswith(self.FIRST + f": lloom resumed at {EXECUTOR}\n\n".encode())
            assert response.content.endswith(b"data: [DONE]\n\n")
            chunks = self.chunks(response)
            assert [one["id"] for one in chunks] == ["a", "a", "a"]
            assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks) == "Hello"
            assert b.router.wanted[1].digest == b"d" * 32
            assert json.loads(b.router.calls[1].body)["messages"][-1] == {"role": "assistant", "content": "Hel"}
            assert b.observer.ended == [("m", EXECUTOR, "ok", 2)]

    async def test_by_setting_and_not_for_who_declines(self) -> None:
        async with self.bench([self.FIRST, LOST], [self.MORE, self.END], resume=True) as b:
            assert (await b.post(self.ASKED)).status_code == 200
        async with self.bench([self.FIRST, LOST], [self.MORE, self.END], resume=True) as b:
            with pytest.raises(httpx.RemoteProtocolError):
                await b.post(self.ASKED, x_lloom_resume="off")
            assert (await b.post(self.ASKED, x_lloom_resume="maybe")).status_code == 400

    async def test_nobody_to_go_on(self) -> None:
        async with self.bench([self.FIRST, LOST], NoExecutorError("nobody")) as b:
            async with await raw_post(b, self.ASKED, b"x-lloom-resume: on\r\n") as stream:
                data = await read_all(stream)
            told = json.loads(data[data.rindex(b"data: ") + 6 :].rstrip())["error"]
            assert (told["code"], told["lloom"]["not_resumed"]) == ("stream_lost", "no_executor")
            assert not data.endswith(b"0\r\n\r\n")
            assert b.observer.ended == [("m", EXECUTOR, "stream_lost", 1)]

    async def test_a_limit_that_is_reached_needs_nobody(self) -> None:
        async with self.bench([self.FIRST, LOST]) as b:
            response = await b.post({**self.ASKED, "max_tokens": 1}, x_lloom_resume="on")
            assert self.chunks(response)[-1]["choices"][0]["finish_reason"] == "length"
            assert response.content.endswith(b"data: [DONE]\n\n")
            assert b.code() == "ok"

    async def test_a_stop_string_across_the_seam_ends_it(self) -> None:
        async with self.bench([self.FIRST, LOST], [self.MORE, trio.Event()]) as b:
            response = await b.post({**self.ASKED, "stop": "ello"}, x_lloom_resume="on")
            chunks = self.chunks(response)
            assert "".join(one["choices"][0]["delta"].get("content", "") for one in chunks) == "H"
            assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
            assert b.code() == "ok"

    async def test_weights_that_nobody_knows(self) -> None:
        async with self.bench([self.FIRST, LOST], [self.MORE, self.END], digest=b"") as b:
            with pytest.raises(httpx.RemoteProtocolError):
                await b.post(self.ASKED, x_lloom_resume="on")
            assert len(b.router.calls) == 1


class TestLeaving:
    @pytest.mark.parametrize("body", [BODY, STREAMED])
    @pytest.mark.parametrize("script", [[], [TEXT]])
    async def test_an_application_that_leaves_cancels_its_call(self, body: dict[str, Any], script: list[Any]) -> None:
        async with bench(*script, trio.Event()) as b:
            stream = await raw_post(b, body)
            with trio.fail_after(5):
                await b.router.began.wait()
                await stream.aclose()
                await b.router.ended.wait()
                await b.observer.has_ended.wait()
            assert b.code() == "cancelled"

    async def test_one_that_resets_while_it_is_written_to(self) -> None:
        async with bench(*[TEXT * 1000] * 300) as b:
            stream = await raw_post(b, STREAMED)
            await stream.receive_some(10)
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()
            with trio.fail_after(5):
                await b.router.ended.wait()
                await b.observer.has_ended.wait()
            assert b.code() == "cancelled"

    async def test_one_that_leaves_within_its_body(self) -> None:
        async with bench() as b:
            stream = await trio.open_tcp_stream("127.0.0.1", b.port)
            await stream.send_all(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n{"
            )
            await stream.aclose()
            with trio.fail_after(5):
                await b.observer.has_ended.wait()
            assert b.code() == "cancelled"
            assert b.router.calls == []

    async def test_the_same_connection_serves_the_next_request(self) -> None:
        async with bench(b"{}") as b:
            for _ in range(3):
                b.router.script = [b"{}"]
                assert (await b.post()).status_code == 200


class TestCompressedBodies:
    @pytest.mark.parametrize(
        ("coding", "pack"),
        [
            ("zstd", compress),
            ("gzip", gzip.compress),
            ("x-gzip", gzip.compress),
            ("GZIP", gzip.compress),
            ("identity", bytes),
        ],
    )
    async def test_the_call_is_what_was_meant(self, coding: str, pack: Callable[[bytes], bytes]) -> None:
        raw = json.dumps(BODY).encode()
        async with bench(b"{}") as b:
            response = await b.post(pack(raw), content_encoding=coding)
            assert response.status_code == 200
            assert b.router.calls[0].body == raw

    @pytest.mark.parametrize(
        ("coding", "body", "status", "code"),
        [
            ("br", b"x", 415, "content_encoding"),
            ("gzip, gzip", gzip.compress(gzip.compress(b"{}")), 415, "content_encoding"),
            ("zstd", b"{}", 400, "bad_encoding"),
            ("gzip", gzip.compress(b"{}")[:-1], 400, "bad_encoding"),
            ("gzip", gzip.compress(b"{}") + b"{}", 400, "bad_encoding"),
            ("zstd", compress(bytes(1 << 28)), 413, "body_too_large"),
            ("gzip", gzip.compress(bytes(1 << 26)), 413, "body_too_large"),
        ],
    )
    async def test_refusals(self, coding: str, body: bytes, status: int, code: str) -> None:
        async with bench(max_body_bytes=10_000) as b:
            response = await b.post(body, content_encoding=coding)
            assert (response.status_code, error_of(response)["code"]) == (status, code)
            assert b.router.calls == []

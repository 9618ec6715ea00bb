"""The backend's state as probes find it, and calls to it, on a small HTTP server."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lloom_sidecar.errors import BackendRejectedError, BackendTimeoutError, BackendUnavailableError
from lloom_sidecar.executor.backend import (
    DEFAULT_SLOTS,
    MAX_ERROR_BYTES,
    MAX_MODELS,
    MAX_TRY_OUT_BYTES,
    MAX_TRY_OUTS,
    PROBE_INTERVAL_S,
    PROBE_TIMEOUT_S,
    TRY_OUT_S,
    Backend,
    BackendState,
)
from lloom_sidecar.executor.body import BackendCall
from lloom_sidecar.http.listeners import open_unix_listener
from lloom_sidecar.http.server import Request, Response, serve

CALL = BackendCall("/v1/chat/completions", b"{}", wants_stream=True, is_streamed=True, strips_usage=True)


class Server:
    """Answers by path: (status, body), a function that gives one, None = never, "cut" = cut in the middle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Any] = {"/v1/models": models("m")}
        self.requests: list[tuple[str, str | None]] = []
        self.gone = trio.Event()

    async def __call__(self, request: Request, response: Response) -> None:
        await request.body()
        self.requests.append((request.path, request.header("authorization")))
        answer = self.answers.get(request.path, (404, b"{}"))
        if callable(answer):
            answer = answer()
        if answer is None:
            try:
                await trio.sleep_forever()
            finally:
                self.gone.set()
        if answer == "cut":
            await response.start(200, [], b"data: half")
            response.abort()
            return
        status, body = answer
        await response.send(status, [], body if isinstance(body, bytes) else msgspec.json.encode(body))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            listener = open_unix_listener(str(self.path))
            await nursery.start(lambda task_status: serve([listener], self, task_status=task_status))
            yield
            nursery.cancel_scope.cancel()


def models(*names: str, **fields: Any) -> tuple[int, Any]:
    return 200, {"object": "list", "data": [{"id": name, **fields} for name in names]}


@pytest.fixture
def server() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="lloom") as folder:
        yield Server(Path(folder, "b.sock"))


class Bench:
    def __init__(self, server: Server, **settings: Any) -> None:
        self.states: list[BackendState] = []
        self.backend = Backend(f"unix:{server.path}", on_change=self.states.append, **settings)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Backend]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.backend.run)
            yield self.backend
            nursery.cancel_scope.cancel()


async def probed(server: Server, **settings: Any) -> Backend:
    """A backend after its first probe."""
    b = Bench(server, **settings)
    async with server.running(), b.running() as backend:
        return backend


class TestListing:
    @pytest.mark.parametrize("field", ["max_model_len", "context_length", "context_window"])
    async def test_models_and_their_context(self, server: Server, field: str) -> None:
        server.answers["/v1/models"] = models("a", "org/b:1", **{field: 4096})
        backend = await probed(server, api_key="secret", features=frozenset({"chat"}))
        assert backend.is_up
        assert [offer.id for offer in backend.state.offers] == ["a", "org/b:1"]
        offer = backend.offer("org/b:1")
        assert offer is not None
        assert (offer.context_length, offer.features, offer.slots) == (4096, frozenset({"chat"}), DEFAULT_SLOTS)
        assert backend.offer("x") is None
        assert ("/v1/models", "Bearer secret") in server.requests

    async def test_llama_cpp_says_its_real_context_and_slots(self, server: Server) -> None:
        server.answers["/v1/models"] = models("m", max_model_len=99)
        server.answers["/props"] = 200, {"total_slots": 4, "default_generation_settings": {"n_ctx": 2048}}
        backend = await probed(server)
        assert (backend.state.slots, backend.state.offers[0].context_length) == (4, 2048)
        assert (await probed(server, slots=7)).state.slots == 7

    @pytest.mark.parametrize(
        "props",
        [(200, b"not json"), (200, []), (200, {"total_slots": "x"}), (500, b""), "cut", (200, {"total_slots": 0})],
    )
    async def test_strange_properties_do_not_matter(self, server: Server, props: Any) -> None:
        server.answers["/props"] = props
        backend = await probed(server)
        assert backend.is_up
        assert (backend.state.slots, backend.state.offers[0].context_length) == (DEFAULT_SLOTS, 0)

    async def test_an_alias_for_the_only_model(self, server: Server) -> None:
        server.answers["/v1/models"] = models("/models/x.gguf")
        backend = await probed(server, only_alias="nice")
        assert backend.offer("nice") is not None
        assert backend.backend_model("nice") == "/models/x.gguf"
        assert backend.backend_model("other") == "other"
        server.answers["/v1/models"] = models("a", "b")
        assert [o.id for o in (await probed(server, only_alias="nice")).state.offers] == ["a", "b"]

    async def test_entries_that_cannot_be_used_are_left_out(self, server: Server) -> None:
        data = [1, {}, {"id": 5}, {"id": ""}, {"id": "x" * 300}, {"id": "good", "max_model_len": "many"}]
        server.answers["/v1/models"] = 200, {"data": data}
        backend = await probed(server)
        assert [(o.id, o.context_length) for o in backend.state.offers] == [("good", 0)]
        server.answers["/v1/models"] = models(*[f"m{n}" for n in range(MAX_MODELS + 5)])
        assert len((await probed(server)).state.offers) == MAX_MODELS

    @pytest.mark.parametrize(
        ("answer", "reason"),
        [
            ((200, b"<html>"), "not JSON"),
            ((200, {}), "lists no models"),
            ((200, []), "lists no models"),
            ((200, {"data": {}}), "lists no models"),
            ((200, {"data": []}), "serves no model"),
            ((401, b""), "status 401"),
            ((503, b"loading"), "status 503"),
            ("cut", "cannot be reached"),
            ((200, b"[" * 100_000), "not JSON"),
            ((200, b'"\xff"'), "not JSON"),
        ],
    )
    async def test_a_listing_that_is_none_means_down(self, server: Server, answer: Any, reason: str) -> None:
        server.answers["/v1/models"] = answer
        backend = await probed(server)
        assert not backend.is_up
        assert reason in backend.state.reason

    async def test_nobody_there(self, server: Server) -> None:
        async with Bench(server).running() as backend:
            assert not backend.is_up
            assert "cannot be reached" in backend.state.reason


class TestProbing:
    async def test_changes_are_told_once(self, server: Server, autojump_clock: MockClock) -> None:
        b = Bench(server)
        async with server.running(), b.running():
            await trio.sleep(3 * PROBE_INTERVAL_S)
            assert len(b.states) == 1
            server.answers["/v1/models"] = models("n")
            await trio.sleep(PROBE_INTERVAL_S + 1)
            server.answers["/v1/models"] = 500, b""
            await trio.sleep(PROBE_INTERVAL_S + 1)
            server.answers["/v1/models"] = models("n")
            await trio.sleep(PROBE_INTERVAL_S + 0.1)
        assert [(s.is_up, [o.id for o in s.offers]) for s in b.states] == [
            (True, ["m"]),
            (True, ["n"]),
            (False, ["n"]),
            (True, ["n"]),
        ]

    async def test_properties_that_a_server_lacks_are_asked_for_once(
        self, server: Server, autojump_clock: MockClock
    ) -> None:
        async with server.running(), Bench(server).running() as backend:
            await trio.sleep(5.5 * PROBE_INTERVAL_S)
            paths = [path for path, _ in server.requests]
            assert (paths.count("/props"), paths.count("/v1/models")) == (1, 6)
            # After it was away it may be another server.
            server.answers["/v1/models"] = 500, b""
            await trio.sleep(PROBE_INTERVAL_S)
            server.answers["/v1/models"] = models("m")
            server.answers["/props"] = 200, {"total_slots": 3}
            await trio.sleep(3 * PROBE_INTERVAL_S)
            assert backend.state.slots == 3
            assert [path for path, _ in server.requests].count("/props") > 2

    async def test_a_call_for_a_model_that_is_gone_is_looked_into(
        self, server: Server, autojump_clock: MockClock
    ) -> None:
        b = Bench(server)
        async with server.running(), b.running() as backend:
            server.answers["/v1/models"] = models("n")
            with pytest.raises(BackendRejectedError):
                async with backend.call(CALL):
                    pass
            await trio.sleep(0.1)
            assert [offer.id for offer in backend.state.offers] == ["n"]

    async def test_one_slow_probe_is_forgiven_two_are_not(self, server: Server, autojump_clock: MockClock) -> None:
        b = Bench(server)
        async with server.running(), b.running() as backend:
            server.answers["/v1/models"] = None
            await trio.sleep(PROBE_INTERVAL_S + PROBE_TIMEOUT_S + 1)
            assert backend.is_up
            await trio.sleep(PROBE_INTERVAL_S + PROBE_TIMEOUT_S)
            assert not backend.is_up
            assert "does not answer within" in backend.state.reason

    async def test_a_suspicion_is_looked_into_at_once(self, server: Server, autojump_clock: MockClock) -> None:
        b = Bench(server)
        async with server.running(), b.running() as backend:
            server.answers["/v1/models"] = 500, b""
            backend.suspect()
            await trio.sleep(0.1)
            assert not backend.is_up


class TestCalls:
    async def test_the_body_of_a_good_answer(self, server: Server) -> None:
        server.answers[CALL.path] = 200, b"data: x\n\n"
        async with server.running(), Bench(server, api_key="k").running() as backend:
            async with backend.call(CALL) as answer:
                assert await answer.receive_some() == b"data: x\n\n"
                assert await answer.receive_some() == b""
        assert (CALL.path, "Bearer k") in server.requests

    @pytest.mark.parametrize(
        ("status", "retryable"), [(400, False), (422, False), (401, True), (404, True), (503, True)]
    )
    async def test_an_error_status(self, server: Server, status: int, retryable: bool) -> None:
        body = b'{"error":{"message":"no"}}'
        server.answers[CALL.path] = status, body
        async with server.running(), Bench(server).running() as backend:
            with pytest.raises(BackendRejectedError) as caught:
                async with backend.call(CALL):
                    pass
        assert (caught.value.status, caught.value.retryable, caught.value.body) == (status, retryable, body)

    @pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"x":"' + b"y" * MAX_ERROR_BYTES + b'"}', b"[" * 20_000])
    async def test_an_error_document_that_is_none_or_too_long_is_left_out(self, server: Server, body: bytes) -> None:
        server.answers[CALL.path] = 400, body
        async with server.running(), Bench(server).running() as backend:
            with pytest.raises(BackendRejectedError) as caught:
                async with backend.call(CALL):
                    pass
        assert (caught.value.http_status, caught.value.body) == (400, b"")

    async def test_a_cut_answer(self, server: Server) -> None:
        server.answers[CALL.path] = "cut"
        async with server.running(), Bench(server).running() as backend:
            with pytest.raises(BackendUnavailableError):
                async with backend.call(CALL) as answer:
                    while await answer.receive_some():
                        pass

    async def test_nobody_there_is_noticed_at_once(self, server: Server, autojump_clock: MockClock) -> None:
        b = Bench(server)
        async with b.running() as backend:
            async with server.running():
                await trio.sleep(PROBE_INTERVAL_S + 0.1)
                assert backend.is_up
            with pytest.raises(BackendUnavailableError):
                async with backend.call(CALL):
                    pass
            await trio.sleep(0.1)
            assert not backend.is_up

    async def test_silence(self, server: Server, autojump_clock: MockClock) -> None:
        server.answers[CALL.path] = None
        async with server.running(), Bench(server).running() as backend:
            with pytest.raises(BackendTimeoutError):
                async with backend.call(CALL):
                    pass

    async def test_leaving_closes_the_connection(self, server: Server) -> None:
        server.answers[CALL.path] = None

        async def call() -> None:
            async with backend.call(CALL):
                pass

        async with server.running(), Bench(server).running() as backend, trio.open_nursery() as nursery:
            nursery.start_soon(call)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True), trio.fail_after(5):
                await server.gone.wait()


def chat(*pieces: str) -> tuple[int, bytes]:
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    return 200, b"".join(b"data: " + msgspec.json.encode(e) + b"\n\n" for e in events) + b"data: [DONE]\n\n"


class TestResume:
    """Weights are told or computed; the ability is tried out, and only where the weights are known."""

    WEIGHTS = b"w" * 32

    async def test_digests(self, server: Server) -> None:
        assert (await probed(server, digests={"": self.WEIGHTS})).state.offers[0].digest == self.WEIGHTS
        assert (await probed(server, digests={"m": self.WEIGHTS})).state.offers[0].digest == self.WEIGHTS
        assert (await probed(server, digests={"x": self.WEIGHTS})).state.offers[0].digest == b""
        server.answers["/v1/models"] = models("m", "n")
        found = (await probed(server, digests={"": self.WEIGHTS, "n": self.WEIGHTS})).state.offers
        assert [offer.digest for offer in found] == [b"", self.WEIGHTS]

    async def test_tried_out_once_its_weights_are_known(self, server: Server, autojump_clock: MockClock) -> None:
        whole = ("one", " two", " three", " four")
        answers = iter([chat(*whole), chat(*whole[2:])])
        server.answers[CALL.path] = lambda: next(answers)
        async with server.running(), Bench(server, features=frozenset({"chat"})).running() as backend:
            await trio.sleep(3 * PROBE_INTERVAL_S)
            assert backend.state.offers[0].features == {"chat"}
            assert CALL.path not in dict(server.requests)
            backend.set_digest("m", self.WEIGHTS)
            await trio.sleep(1)
            assert backend.state.offers[0].features == {"chat", "resume"}
            await trio.sleep(3 * PROBE_INTERVAL_S)
            assert [path for path, _ in server.requests].count(CALL.path) == 2

    @pytest.mark.parametrize(("status", "tries"), [(400, 1), (503, MAX_TRY_OUTS), (401, MAX_TRY_OUTS)])
    async def test_one_that_refuses_or_fails(
        self, server: Server, autojump_clock: MockClock, status: int, tries: int
    ) -> None:
        server.answers[CALL.path] = status, {"error": {"message": "no"}}
        async with server.running(), Bench(server, digests={"": self.WEIGHTS}).running() as backend:
            await trio.sleep(10 * PROBE_INTERVAL_S)
            assert backend.state.offers[0].features == frozenset()
            assert [path for path, _ in server.requests].count(CALL.path) == tries

    async def test_one_that_comes_back_is_tried_anew(self, server: Server, autojump_clock: MockClock) -> None:
        server.answers[CALL.path] = chat("yes")
        async with server.running(), Bench(server, digests={"": self.WEIGHTS}).running():
            await trio.sleep(2 * PROBE_INTERVAL_S)
            server.answers["/v1/models"] = 500, b""
            await trio.sleep(2 * PROBE_INTERVAL_S)
            server.answers["/v1/models"] = models("m")
            await trio.sleep(2 * PROBE_INTERVAL_S)
            assert [path for path, _ in server.requests].count(CALL.path) == 2

    async def test_silence_and_too_much(self, server: Server, autojump_clock: MockClock) -> None:
        server.answers[CALL.path] = 200, b"x" * (MAX_TRY_OUT_BYTES + 1)
        async with server.running(), Bench(server, digests={"": self.WEIGHTS}).running() as backend:
            await trio.sleep(1)
            assert backend._abilities == {"m": frozenset()}
        server.answers[CALL.path] = None
        async with server.running(), Bench(server, digests={"": self.WEIGHTS}).running() as backend:
            await trio.sleep(TRY_OUT_S + PROBE_INTERVAL_S)
            assert backend._try_outs == {"m": 1}
            assert backend.is_up


def test_urls() -> None:
    for url in ("http://h:1", "http://h:1/v1", "http://h:1/v1/"):
        assert Backend(url, on_change=lambda state: None)._client.base == "http://h:1"
    with pytest.raises(ValueError, match="backend address"):
        Backend("h:1", on_change=lambda state: None)

"""The executor's side of a stream, driven frame by frame by its requester, on a backend that plays scripts."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from trio.testing import MockClock, wait_all_tasks_blocked

from lloom_sidecar.errors import (
    BackendRejectedError,
    BackendTimeoutError,
    BackendUnavailableError,
    RefusedError,
)
from lloom_sidecar.executor.admission import Admission
from lloom_sidecar.executor.body import BodyPolicy
from lloom_sidecar.executor.rates import RequestRates
from lloom_sidecar.executor.serve import Executor, ExecutorLimits, ServedReceipt
from lloom_sidecar.http.errors import IncompleteBodyError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.claims import check_receipt, salted_digest, seal_ack, seal_request
from lloom_sidecar.protocol.compression import Decoder, compress
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.exchange import (
    Accepted,
    DataReceived,
    EndReceived,
    ErrorReceived,
    Event,
    GoAwayReceived,
    HeadReceived,
    PongReceived,
    RequesterStream,
)
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.tracing.otel import OtelTracing
from tests.fakes.fake_backend import HELLO, USAGE, FakeBackend, Line, chunk, sse
from tests.fakes.request_stream import CLIENT, EXECUTOR, NOW_MS, stream_pair

SALT = b"s" * 16
NO_RATES = RequestRates(peer_per_s=0, subnet_per_s=0, global_per_s=0)
STREAMED = {"model": "m", "messages": [], "stream": True}
WHOLE = {"model": "m", "messages": []}


class Observer:
    """What the node would be told."""

    def __init__(self) -> None:
        self.received = 0
        self.ended: list[str] = []
        self.tokens: list[int] = []
        self.refusals: list[str] = []
        self.waits: list[float] = []
        self.receipts: list[ServedReceipt] = []

    def request_received(self, peer: PeerId, request_id: bytes, model: str) -> None:
        self.received += 1

    def request_ended(
        self,
        peer: PeerId,
        request_id: bytes,
        model: str,
        code: str,
        seconds: float,
        first_s: float | None,
        tokens: int,
    ) -> None:
        self.ended.append(code)
        self.tokens.append(tokens)

    def slot_given(self, waited_s: float) -> None:
        self.waits.append(waited_s)

    def refused(self, code: str) -> None:
        self.refusals.append(code)

    def receipt_made(self, served: ServedReceipt) -> None:
        self.receipts.append(served)


class Requester:
    """The other end of one stream."""

    def __init__(self, stream: P2PStream) -> None:
        self.stream = stream
        self.machine = RequesterStream()
        self.challenge = b""
        self.envelope = b""
        self.claims = pb.RequestClaims()
        self._events: deque[Event] = deque()

    async def next(self) -> Event | None:
        with trio.fail_after(300):
            while not self._events:
                data = await self.stream.receive_some()
                if not data:
                    return None
                self._events.extend(self.machine.receive(data))
            return self._events.popleft()

    async def open(self) -> Requester:
        await self.stream.send_all(self.machine.open())
        event = await self.next()
        assert isinstance(event, Accepted)
        self.challenge = event.challenge
        return self

    async def ask(self, body: bytes | dict[str, Any] = STREAMED, *, parts: int | None = None, **changes: Any) -> None:
        """A request; ``parts`` = how many of its writes to send, ``changes`` = claims that differ."""
        for data in self.request(body, **changes)[:parts]:
            await self.stream.send_all(data)

    def request(self, body: bytes | dict[str, Any] = STREAMED, **changes: Any) -> list[bytes]:
        """The writes of a request."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields: dict[str, Any] = {
            "request_id": b"r" * 16,
            "executor": EXECUTOR.peer.raw,
            "issued_at_ms": NOW_MS,
            "challenge": self.challenge,
            "exchange": self.machine.exchange + 1,
            "deadline_ms": 60_000,
            "operation": pb.OPERATION_CHAT,
            "model": "m",
            "body_digest": salted_digest(SALT, raw),
        }
        signer = changes.pop("signer", CLIENT)
        encoding = changes.pop("encoding", pb.ENCODING_IDENTITY)
        sent = changes.pop("sent", raw)  # as it is sent, when that is compressed
        body_size = changes.pop("body_size", 0)
        self.claims = pb.RequestClaims(**(fields | changes))
        self.envelope = seal_request(self.claims, signer)
        return self.machine.request(self.envelope, SALT, sent, encoding, body_size)

    async def answer(self, client: PeerId = CLIENT.peer) -> bytes:
        """The DATA of the answer, once its receipt holds."""
        answer = b""
        decoder: Decoder | None = None
        self.encoding: int = pb.ENCODING_IDENTITY
        self.sent_bytes = 0
        while True:
            event = await self.next()
            match event:
                case HeadReceived(encoding=encoding) if encoding != pb.ENCODING_IDENTITY:
                    self.encoding, decoder = encoding, Decoder(encoding)
                case DataReceived(data=data):
                    self.sent_bytes += len(data)
                    answer += data if decoder is None else decoder.decode(data, 1 << 26)
                case EndReceived(receipt=receipt):
                    if decoder is not None:
                        decoder.finish()
                    check_receipt(
                        receipt,
                        client=client,
                        executor=EXECUTOR.peer,
                        request_digest=hashlib.sha256(self.envelope).digest(),
                        request=self.claims,
                        answer_digest=salted_digest(SALT, answer),
                        answer_bytes=len(answer),
                    )
                    self.receipt = receipt
                    return answer
                case ErrorReceived(error=error):
                    raise error
                case None:
                    raise EOFError
                case _:
                    pass

    async def error(self) -> RefusedError:
        """The ERROR that ends the answer."""
        with pytest.raises(RefusedError) as caught:
            await self.answer()
        return caught.value

    async def ended(self) -> bool:
        """True when the stream ends without another event."""
        return await self.next() is None


async def write_to(requester: Requester, writes: list[bytes]) -> None:
    for data in writes:
        await requester.stream.send_all(data)


class Bench:
    """An executor and streams to it."""

    def __init__(self, nursery: trio.Nursery, backend: FakeBackend, **settings: Any) -> None:
        self.nursery = nursery
        self.backend = backend
        self.observer = Observer()
        self.is_member = True
        self.now_ms = NOW_MS
        self.executor = Executor(
            signer=EXECUTOR,
            backend=backend,
            admission=settings.get("admission", Admission(slots=2, queue_limit=2, max_per_peer=9)),
            policy=settings.get("policy", BodyPolicy()),
            limits=settings.get("limits", ExecutorLimits()),
            rates=settings.get("rates", NO_RATES),
            max_streams=lambda: 7,
            price=settings.get("price", Price()),
            may_ask=lambda peer: self.is_member,
            is_member=lambda peer: True,
            observer=self.observer,
            now_ms=lambda: self.now_ms,
            compresses_for=lambda peer: settings.get("compresses", False),
            compresses_streams=settings.get("compresses_streams", False),
            ledger_trouble=lambda: self.ledger_trouble,
            max_unacked=settings.get("max_unacked", 0),
            tracing=settings.get("tracing"),
        )
        self.ledger_trouble: str | None = None
        self.buffer_bytes: int | None = settings.get("buffer_bytes")
        self.streams: list[P2PStream] = []

    def connect(self, client: Signer = CLIENT) -> Requester:
        near, far = stream_pair(client.peer, EXECUTOR.peer, buffer_bytes=self.buffer_bytes)
        self.streams += [near, far]
        self.nursery.start_soon(self.executor.serve_stream, far)
        return Requester(near)

    async def open(self) -> Requester:
        return await self.connect().open()

    def is_idle(self) -> bool:
        """Nothing of any request is left."""
        e, a = self.executor, self.executor.admission
        is_told = self.observer.received == len(self.observer.ended)
        return (e.buffered_bytes, a.working, a.queued, e._turns, is_told) == (0, 0, 0, {}, True)


@asynccontextmanager
async def bench(script: Sequence[Line] = (), **settings: Any) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        b = Bench(nursery, FakeBackend(script), **settings)
        try:
            yield b
        finally:
            nursery.cancel_scope.cancel()
            for stream in b.streams:
                stream.close()


class TestStreamed:
    async def test_bytes_pass_untouched_and_the_added_usage_is_taken_out(self) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask()
            assert await r.answer() == b"".join(sse(*HELLO[:3]))
            served = b.observer.receipts[0]
            assert (served.client, served.request_id, served.exchange, served.model) == (
                CLIENT.peer,
                b"r" * 16,
                1,
                "m",
            )
            assert (served.request, served.receipt, served.salt, served.ack) == (r.envelope, r.receipt, SALT, None)
            assert b.observer.ended == ["ok"]
            assert b.observer.tokens == [2]
            assert b.backend.outcomes == ["left"]
            assert b.is_idle()

    async def test_usage_that_was_asked_for_stays(self) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask({**STREAMED, "stream_options": {"include_usage": True}})
            assert await r.answer() == b"".join(sse(*HELLO))

    @pytest.mark.parametrize("step", [1, 7, 10_000])
    async def test_any_cutting_gives_the_same_bytes(self, step: int) -> None:
        whole = b"".join(sse(*HELLO))
        async with bench([whole[i : i + step] for i in range(0, len(whole), step)]) as b:
            r = await b.open()
            await r.ask()
            assert await r.answer() == b"".join(sse(*HELLO[:3]))

    async def test_odd_bytes_stay_and_comments_go(self) -> None:
        odd = [
            b": keep-alive\n\n",
            b'event: x\r\nid: 1\r\ndata: {"choices": [ ]}\r\n\r\n',
            b":\n\n",
            b'data:{"choices":[{"index":0,"delta":{"content":"\\u00e9"},"finish_reason":null}]}\n\n',
            b": a comment in front of data\ndata: {}\n\n",
            b"retry: 5\n\n",
            b'data: {"usage":{"prompt_tokens":1},"choices":5}\n\n',
            *sse(chunk("", "stop")),
        ]
        async with bench(odd) as b:
            r = await b.open()
            await r.ask()
            assert await r.answer() == b"".join(e for e in odd if e not in (b": keep-alive\n\n", b":\n\n"))

    async def test_usage_beside_choices_stays_and_is_noted(self) -> None:
        last = chunk("x", "stop", usage={"prompt_tokens": 1, "completion_tokens": 9})
        async with bench(sse(last)) as b:
            r = await b.open()
            await r.ask()
            assert await r.answer() == b"".join(sse(last))
            assert b.observer.tokens == [9]

    async def test_without_usage_chunks_are_counted(self) -> None:
        async with bench(sse(chunk("a"), chunk("b"), chunk("", "stop"))) as b:
            r = await b.open()
            await r.ask()
            await r.answer()
            assert b.observer.tokens == [3]

    async def test_head_tells_the_backends_time(self, autojump_clock: MockClock) -> None:
        async with bench([2.0, *sse(*HELLO)]) as b:
            r = await b.open()
            await r.ask()
            head = await r.next()
            assert isinstance(head, HeadReceived)
            assert head.content_type == "text/event-stream"
            assert head.backend_us == pytest.approx(2_000_000, rel=0.01)

    async def test_many_exchanges_on_one_stream(self) -> None:
        async with bench() as b:
            r = await b.open()
            for number in range(1, 21):
                await r.ask()
                await r.answer()
                await r.stream.send_all(r.machine.ack(number, seal_ack(r.receipt, CLIENT)))
            await wait_all_tasks_blocked()
            assert sum(receipt.ack is not None for receipt in b.observer.receipts) == 20
            assert b.is_idle()


class TestWhole:
    async def test_one_document_from_the_chunks(self) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask(WHOLE)
            document = json.loads(await r.answer())
            assert document["choices"][0]["message"]["content"] == "Hello"
            assert document["usage"] == USAGE["usage"]
            assert json.loads(b.backend.calls[0].body)["stream"] is True

    async def test_embeddings_pass_as_they_are(self) -> None:
        raw = b'{"data":[ ],"usage":{"prompt_tokens":4}}'
        async with bench([raw[:5], raw[5:]]) as b:
            r = await b.open()
            await r.ask({"model": "m", "input": "x"}, operation=pb.OPERATION_EMBEDDINGS)
            assert await r.answer() == raw
            assert b.backend.calls[0].path == "/v1/embeddings"

    async def test_a_large_document_comes_in_several_frames(self) -> None:
        text = "x" * 300_000
        async with bench(sse(chunk(text), chunk("", "stop"))) as b:
            r = await b.open()
            await r.ask(WHOLE)
            assert json.loads(await r.answer())["choices"][0]["message"]["content"] == text


class TestBackendFails:
    @pytest.mark.parametrize("body", [STREAMED, WHOLE])
    @pytest.mark.parametrize(
        ("script", "code"),
        [
            (sse(chunk("a"), done=False), "backend_unavailable"),
            (sse({"object": "error", "message": "x"}), "backend_rejected"),
            ([*sse(chunk("a"), done=False), b'data: {"half'], "backend_unavailable"),
            ([], "backend_unavailable"),
            ([*sse(chunk("a"), done=False), BackendTimeoutError("silent")], "backend_timeout"),
            ([*sse(chunk("a"), done=False), BackendUnavailableError("cut")], "backend_unavailable"),
            ([b'data: {"error":{"message":"oom"}}\n\n', *sse(*HELLO)], "backend_rejected"),
            (
                [*sse(chunk("a"), done=False), b'data: { "error" : {"message":"oom"}}\n\n', *sse(*HELLO)],
                "backend_rejected",
            ),
            ([ZeroDivisionError()], "internal"),
        ],
        ids=["cut", "vllm", "half", "empty", "silent", "lost", "error", "late error", "bug"],
    )
    async def test_error_never_end(self, body: dict[str, Any], script: list[Line], code: str) -> None:
        async with bench([b": x\n\n", *script]) as b:
            r = await b.open()
            await r.ask(body)
            assert (await r.error()).code == code
            await wait_all_tasks_blocked()
            assert b.observer.ended == [code]
            told = [(served.receipt, served.checkpoint, served.reason) for served in b.observer.receipts]
            assert told == [(None, None, code)]
            assert b.is_idle()
            b.backend.script = sse(*HELLO)
            await r.ask(body)
            assert await r.answer()

    @pytest.mark.parametrize(
        "garbage", [b"data: {this is no json\n\n", b"data: []\n\n", b'data: {"choices":5}\n\n', b'data: "x"\n\n']
    )
    async def test_a_garbage_chunk_spoils_a_document(self, garbage: bytes) -> None:
        async with bench([garbage, *sse(*HELLO)]) as b:
            r = await b.open()
            await r.ask(WHOLE)
            assert (await r.error()).code == "backend_unavailable"
            assert b.backend.outcomes == ["BackendUnavailableError"]

    @pytest.mark.parametrize("garbage", [b"data: {this is no json\n\n", b"data: []\n\n", b'data: {"usage":\xff}\n\n'])
    async def test_a_garbage_chunk_cuts_a_stream_and_is_not_passed_on(self, garbage: bytes) -> None:
        first, *rest = sse(*HELLO)
        async with bench([first, garbage, *rest]) as b:
            r = await b.open()
            await r.ask()
            events = [await r.next(), await r.next(), await r.next()]
            assert [event.data for event in events if isinstance(event, DataReceived)] == [first]
            assert isinstance(events[-1], ErrorReceived)
            assert events[-1].error.code == "backend_unavailable"

    async def test_an_error_document_is_passed_on(self) -> None:
        async with bench() as b:
            b.backend.failure = BackendRejectedError("no", status=400, body=b'{"error":{"message":"context"}}')
            r = await b.open()
            await r.ask()
            error = await r.error()
            assert (error.http_status, error.retryable, error.body) == (400, False, b'{"error":{"message":"context"}}')

    @pytest.mark.parametrize("body", [STREAMED, WHOLE])
    @pytest.mark.parametrize("last", [{"usage": None}, {}])
    async def test_an_end_without_done_counts_when_a_reason_was_given(
        self, body: dict[str, Any], last: dict[str, Any]
    ) -> None:
        document = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **last}
        script = [b"data: " + json.dumps(document).encode() + b"\n\n"]
        async with bench(script) as b:
            r = await b.open()
            await r.ask(body)
            assert await r.answer()

    @pytest.mark.parametrize("after", [[5.0], [IncompleteBodyError("no last chunk")], [BackendUnavailableError("cut")]])
    async def test_what_comes_after_done_does_not_matter(self, after: list[Line], autojump_clock: MockClock) -> None:
        async with bench([*sse(*HELLO), *after]) as b:
            r = await b.open()
            await r.ask()
            assert await r.answer() == b"".join(sse(*HELLO[:3]))
            assert b.observer.ended == ["ok"]

    async def test_the_requests_deadline(self, autojump_clock: MockClock) -> None:
        async with bench([*sse(chunk("a"), done=False), trio.Event()]) as b:
            r = await b.open()
            await r.ask(deadline_ms=3000)
            began_at = trio.current_time()
            assert (await r.error()).code == "deadline"
            assert trio.current_time() - began_at == pytest.approx(3.0)
            assert b.backend.outcomes == ["cancelled"]
            assert b.observer.ended == ["deadline"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"signer": Signer(b"z" * 32)}, "wrong_signer"),
            ({"executor": CLIENT.peer.raw}, "misaddressed"),
            ({"challenge": b"y" * 16}, "replayed"),
            ({"exchange": 9}, "replayed"),
            ({"issued_at_ms": NOW_MS - 60_001}, "expired"),
            ({"deadline_ms": 0}, "bad_request"),
            ({"operation": pb.OPERATION_RESPONSES}, "unsupported_operation"),
            ({"encoding": pb.ENCODING_GZIP}, "bad_request"),
            ({"encoding": pb.ENCODING_GZIP, "body_size": (32 << 20) + 1}, "body_too_large"),
            ({"encoding": 9, "body_size": 9}, "bad_encoding"),
            ({"model": "other"}, "model_not_served"),
        ],
    )
    async def test_from_the_request_frame_alone(self, changes: dict[str, Any], code: str) -> None:
        body = json.dumps({**STREAMED, "pad": "x" * 200_000}).encode()
        async with bench() as b:
            r = await b.open()
            await r.ask(body, parts=1, **changes)  # not a byte of the body
            assert (await r.error()).code == code
            assert b.observer.refusals == [code]
            for at in range(0, len(body), 60_000):
                piece = body[at : at + 60_000]
                frame = pb.Frame(body=piece).SerializeToString()
                size = len(frame)
                prefix = bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14])
                await r.stream.send_all(prefix + frame)
            await r.ask()
            assert await r.answer()
            assert (b.observer.received, b.observer.ended) == (1, ["ok"])
            assert b.is_idle()

    async def test_the_order_of_the_checks(self) -> None:
        """Everything is wrong at once; mended one by one, in the order in which they are looked at."""
        price = Price(1, 1, "EUR")
        limits = ExecutorLimits(buffered_bodies_bytes=1)
        admission = Admission(slots=1, queue_limit=0, max_per_peer=0)
        async with bench(limits=limits, price=price, admission=admission) as b:
            r = await b.open()
            e, backend = b.executor, b.backend
            e.is_draining, b.is_member, backend.state = True, False, type(backend.state)(False)
            e.rates = RequestRates(peer_per_s=0, subnet_per_s=0, global_per_s=1e-9)
            e.rates.take(CLIENT.peer, None, trio.current_time())
            changes: dict[str, Any] = {"operation": 99, "model": "x", "executor": b"?", "encoding": 1}
            seen = []
            for mend in range(11):
                match mend:
                    case 1:
                        e.rates = NO_RATES
                    case 2:
                        e.is_draining = False
                    case 3:
                        b.is_member = True
                    case 4:
                        del changes["executor"]
                    case 5:
                        del changes["operation"]
                    case 6:
                        del changes["encoding"]
                    case 7:
                        backend.state = type(backend.state)(True)
                    case 8:
                        del changes["model"]
                    case 9:
                        changes["max_price"] = pb.Price(prompt_per_million=1, completion_per_million=1, currency="EUR")
                    case 10:
                        e.limits = ExecutorLimits()
                await r.ask(**changes)
                seen.append((await r.error()).code)
            assert seen == [
                "global_rate",
                "draining",
                "hello_required",
                "misaddressed",
                "unsupported_operation",
                "bad_request",
                "backend_unavailable",
                "model_not_served",
                "price_changed",
                "busy",
                "peer_limit",
            ]
            assert b.observer.received == 0
            assert b.is_idle()

    @pytest.mark.parametrize(
        ("body", "code"), [(b"{", "invalid_json"), ({"model": "x"}, "model_mismatch"), ({**STREAMED, "n": 99}, "limit")]
    )
    async def test_from_the_body(self, body: Any, code: str) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask(body)
            error = await r.error()
            assert (error.code, error.http_status, error.retryable) == (code, 400, False)
            assert b.backend.calls == []
            await wait_all_tasks_blocked()
            assert b.is_idle()

    async def test_an_empty_body(self) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask(b"")
            assert (await r.error()).code == "invalid_json"
            await r.ask()
            assert await r.answer()

    async def test_another_body_than_the_signed_one(self) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask(body_digest=b"x" * 32)
            assert (await r.error()).code == "bad_digest"

    async def test_the_price_is_fixed_when_the_request_is_taken(self) -> None:
        price = Price(1_000_000, 2_000_000, "EUR")
        async with bench(price=price) as b:
            r = await b.open()
            ceiling = pb.Price(prompt_per_million=1_000_000, completion_per_million=2_000_000, currency="EUR")
            await r.ask(max_price=ceiling)
            b.executor.price = Price(9, 9, "EUR")
            assert await r.answer()
            await r.ask(max_price=ceiling, max_cost_set=True, max_cost=1)
            await r.answer()
            b.executor.price = price
            await r.ask(max_price=ceiling, max_cost_set=True, max_cost=6)
            assert (await r.error()).code == "max_cost"

    async def test_the_bound_of_all_buffered_bodies(self) -> None:
        async with bench([trio.Event()], limits=ExecutorLimits(buffered_bodies_bytes=150)) as b:
            first, second = await b.open(), await b.open()
            await first.ask({**STREAMED, "x": "y" * 50})
            await wait_all_tasks_blocked()
            await second.ask({**STREAMED, "x": "y" * 50})
            error = await second.error()
            assert (error.code, error.retryable, error.retry_after_s) == ("busy", True, 1.0)
            first.stream.close()
            await wait_all_tasks_blocked()
            b.backend.script = sse(*HELLO)
            await second.ask({**STREAMED, "x": "y" * 50})
            assert await second.answer()

    async def test_bodies_that_together_became_too_many(self) -> None:
        """Their lengths were looked at one by one, before any of them had come."""
        async with bench([trio.Event()], limits=ExecutorLimits(buffered_bodies_bytes=300_000)) as b:
            first, second = await b.open(), await b.open()
            writes = [r.request({**STREAMED, "pad": "x" * 200_000}) for r in (first, second)]
            for write in writes:
                await write_to(first if write is writes[0] else second, write[:1])
            await wait_all_tasks_blocked()
            await write_to(first, writes[0][1:])
            await wait_all_tasks_blocked()
            await write_to(second, writes[1][1:])
            error = await second.error()
            assert (error.code, error.retryable, error.retry_after_s) == ("busy", True, 1.0)
            await wait_all_tasks_blocked()
            assert b.observer.ended == ["busy"]
            first.stream.close()
            await wait_all_tasks_blocked()
            b.backend.script = sse(*HELLO)
            await second.ask()
            assert await second.answer()
            assert b.is_idle()

    @pytest.mark.parametrize(("bucket", "status"), [("peer", 429), ("global", 503)])
    async def test_the_rates_come_before_the_signature(self, bucket: str, status: int) -> None:
        per_s = {"peer_per_s": 0.0, "subnet_per_s": 0.0, "global_per_s": 0.0, f"{bucket}_per_s": 2.0}
        async with bench(rates=RequestRates(**per_s)) as b:
            r = await b.open()
            errors = []
            for _ in range(4):
                await r.ask(signer=Signer(b"z" * 32))
                errors.append(await r.error())
            limit = f"{bucket}_rate"
            assert [error.code for error in errors] == ["wrong_signer", "wrong_signer", limit, limit]
            assert (errors[-1].http_status, errors[-1].retryable) == (status, True)
            assert errors[-1].retry_after_s == pytest.approx(0.5, abs=0.3)

    async def test_strangers_are_counted_by_where_they_come_from(self) -> None:
        async with bench(rates=RequestRates(peer_per_s=1.0, subnet_per_s=1.0, global_per_s=0)) as b:
            b.executor.is_member = lambda peer: False
            first, second = await b.open(), await b.open()
            await first.ask()
            assert await first.answer()
            await second.ask()
            error = await second.error()
            assert (error.code, error.http_status) == ("subnet_rate", 429)


class TestOpen:
    @pytest.mark.parametrize(("wrong", "code"), [("member", "hello_required"), ("draining", "draining")])
    async def test_a_refused_stream_is_told_why_and_ends(
        self, wrong: str, code: str, autojump_clock: MockClock
    ) -> None:
        async with bench() as b:
            b.is_member = wrong != "member"
            b.executor.is_draining = wrong == "draining"
            r = b.connect()
            await r.stream.send_all(r.machine.open())
            event = await r.next()
            assert isinstance(event, ErrorReceived)
            assert event.error.code == code
            assert await r.ended()

    async def test_another_major_version(self) -> None:
        async with bench() as b:
            r = b.connect()
            frame = pb.Frame(open=pb.Open(version_major=2)).SerializeToString()
            r.machine.open()
            await r.stream.send_all(bytes([len(frame)]) + frame)
            event = await r.next()
            assert isinstance(event, ErrorReceived)
            assert event.error.code == "version"

    async def test_accept_says_what_this_node_holds(self) -> None:
        async with bench(limits=ExecutorLimits(max_body_bytes=999)) as b:
            r = await b.open()
            assert r.machine.accepted is not None
            assert (r.machine.accepted.max_streams, r.machine.accepted.max_body_bytes) == (7, 999)
            assert r.machine.accepted.now_ms == NOW_MS
            assert (await b.open()).challenge != r.challenge

    async def test_whoever_says_nothing_is_closed(self, autojump_clock: MockClock) -> None:
        async with bench() as b:
            began_at = trio.current_time()
            assert await b.connect().ended()
            assert trio.current_time() - began_at == pytest.approx(10)

    @pytest.mark.parametrize("garbage", [b"\xff" * 20, b"\x03\x22\x01x", b"\x00"])
    async def test_garbage_ends_the_stream_and_is_counted(self, garbage: bytes) -> None:
        async with bench() as b:
            r = await b.open()
            await r.stream.send_all(garbage)
            assert await r.ended()
            assert len(b.observer.refusals) == 1

    @pytest.mark.parametrize("drips", [False, True])
    async def test_a_body_that_does_not_come_in_time(self, drips: bool, autojump_clock: MockClock) -> None:
        async with bench() as b:
            r = await b.open()
            parts = r.request({**STREAMED, "pad": "x" * 600_000})
            began_at = trio.current_time()
            await r.stream.send_all(parts[0])
            for part in parts[1:-1] if drips else ():
                await trio.sleep(2)
                await r.stream.send_all(part)
            assert await r.ended()
            assert trio.current_time() - began_at == pytest.approx(10 + 600_000 / 65536, abs=0.5)
            assert b.is_idle()
            assert b.observer.ended == ["cancelled"]
            assert b.observer.refusals == ["body_timeout"]


class TestLeaving:
    @pytest.mark.parametrize("body", [STREAMED, WHOLE])
    @pytest.mark.parametrize("script", [[trio.Event()], [*sse(chunk("a"), done=False), trio.Event()]])
    async def test_the_backend_is_stopped_at_once(self, body: dict[str, Any], script: list[Line]) -> None:
        async with bench(script) as b:
            r = await b.open()
            await r.ask(body)
            await wait_all_tasks_blocked()
            assert len(b.backend.calls) == 1
            r.stream.close()
            await wait_all_tasks_blocked()
            assert b.backend.outcomes == ["cancelled"]
            assert b.observer.ended == ["cancelled"]
            assert b.is_idle()

    async def test_one_that_waits_frees_its_place(self) -> None:
        go = trio.Event()
        admission = Admission(slots=1, queue_limit=1, max_per_peer=9)
        async with bench([go, *sse(*HELLO)], admission=admission) as b:
            first, second, third = [await b.open() for _ in range(3)]
            await first.ask()
            await wait_all_tasks_blocked()
            await second.ask()
            await wait_all_tasks_blocked()
            await third.ask()
            assert (await third.error()).code == "busy"
            second.stream.close()
            await wait_all_tasks_blocked()
            assert len(b.backend.calls) == 1
            await third.ask()
            await wait_all_tasks_blocked()
            go.set()
            assert await first.answer()
            assert await third.answer()
            assert b.observer.ended == ["cancelled", "ok", "ok"]
            assert b.is_idle()

    async def test_in_the_middle_of_the_body(self) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask({**STREAMED, "pad": "x" * 200_000}, parts=2)
            await wait_all_tasks_blocked()
            assert b.observer.received == 1
            r.stream.close()
            await wait_all_tasks_blocked()
            assert b.observer.ended == ["cancelled"]
            assert b.is_idle()

    async def test_while_the_answer_cannot_be_sent(self) -> None:
        async with bench([*sse(chunk("x" * 3_000_000), done=False), trio.Event()], buffer_bytes=4096) as b:
            r = await b.open()
            await r.ask()
            await wait_all_tasks_blocked()
            r.stream.close()
            await wait_all_tasks_blocked()
            assert b.backend.outcomes[0] in ("cancelled", "StreamClosedError")
            assert b.is_idle()

    async def test_a_node_that_ends(self) -> None:
        async with bench([trio.Event()]) as b:
            r = await b.open()
            await r.ask()
            await wait_all_tasks_blocked()
            b.nursery.cancel_scope.cancel()
        assert b.backend.outcomes == ["cancelled"]
        assert b.is_idle()


class TestMergedSize:
    """An answer that is merged into one document is bounded while it comes, not only at its end."""

    @pytest.mark.parametrize("grows", [True, False])
    async def test_what_grows_over_the_bound_is_given_up(self, grows: bool) -> None:
        value = "x" * (1 << 20)
        script = [sse({"choices": [], f"k{i if grows else 0}": value}, done=False)[0] for i in range(80)]
        async with bench([*script, *sse(*HELLO)]) as b:
            r = await b.open()
            await r.ask(WHOLE)
            if grows:
                error = await r.error()
                assert (error.code, error.retryable) == ("answer_too_large", True)
                assert b.backend.left_over > 80 - 70
            else:
                assert len(await r.answer()) < 2 << 20


class TestQueue:
    async def test_places_are_given_in_turn_and_resize_frees_some(self) -> None:
        gates = [trio.Event() for _ in range(3)]
        admission = Admission(slots=1, queue_limit=9, max_per_peer=9)
        async with bench(admission=admission) as b:
            requesters = []
            for gate in gates:
                b.backend.script = [gate, *sse(*HELLO)]
                requesters.append(await b.open())
                await requesters[-1].ask()
                await wait_all_tasks_blocked()
            assert (len(b.backend.calls), b.executor.working) == (1, 3)
            b.executor.resize(2)
            await wait_all_tasks_blocked()
            assert len(b.backend.calls) == 2
            for gate in gates:
                gate.set()
            for r in requesters:
                assert await r.answer()
            assert b.is_idle()

    async def test_without_its_body_a_request_holds_no_slot(self) -> None:
        admission = Admission(slots=1, queue_limit=1)
        async with bench(admission=admission) as b:
            idle, other = await b.open(), await b.open()
            await idle.ask({**STREAMED, "pad": "x" * 200_000}, parts=2)
            await wait_all_tasks_blocked()
            assert (admission.working, admission.queued) == (0, 1)
            await other.ask()
            assert await other.answer()
            assert len(b.observer.waits) == 1

    async def test_a_body_that_cannot_be_used_takes_no_slot(self) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask(b"{")
            assert (await r.error()).code == "invalid_json"
            assert b.observer.waits == []

    async def test_a_crowd_makes_room_for_another_peer(self) -> None:
        other = Signer(b"o" * 32)
        admission = Admission(slots=1, queue_limit=2)
        go = trio.Event()
        async with bench([go, *sse(*HELLO)], admission=admission) as b:
            crowd = [await b.open() for _ in range(3)]
            for r in crowd:
                await r.ask()
                await wait_all_tasks_blocked()
            alone = await b.connect(other).open()
            await alone.ask(signer=other)
            error = await crowd[2].error()
            assert (error.code, error.http_status, error.retryable) == ("busy", 503, True)
            assert error.retry_after_s is not None
            assert b.observer.ended == ["busy"]
            go.set()
            assert await crowd[0].answer()
            assert await alone.answer(other.peer)
            assert await crowd[1].answer()
            await wait_all_tasks_blocked()
            assert b.is_idle()

    async def test_what_cannot_be_answered_in_time_is_refused_at_once(self) -> None:
        async with bench([trio.Event()], admission=Admission(slots=1, queue_limit=9)) as b:
            first, second = await b.open(), await b.open()
            await first.ask()
            await wait_all_tasks_blocked()
            await second.ask(deadline_ms=500)
            error = await second.error()
            assert (error.code, error.http_status, error.retryable) == ("deadline_too_short", 503, True)
            assert error.retry_after_s == pytest.approx(1.5, abs=0.1)

    async def test_what_is_announced_of_its_speed(self, autojump_clock: MockClock) -> None:
        script: list[Line] = [
            2.0,
            *sse(chunk("a"), done=False),
            0.5,
            *sse(chunk("b"), done=False),
            0.5,
            *sse(*HELLO[2:]),
        ]
        async with bench(script, admission=Admission(slots=1, queue_limit=9)) as b:
            requesters = [await b.open() for _ in range(2)]
            for r in requesters:
                await r.ask()
            await wait_all_tasks_blocked()
            assert (b.executor.load.in_flight, b.executor.load.queued) == (1, 1)
            for r in requesters:
                assert await r.answer()
            await wait_all_tasks_blocked()
            load = b.executor.load
            assert (load.in_flight, load.queued) == (0, 0)
            # The second waited 3 s for its slot, which is no time to the first token.
            assert load.ttft_s == pytest.approx(2.0, abs=0.01)
            assert load.tokens_per_s == pytest.approx(1.0, abs=0.01)
            assert b.observer.waits == pytest.approx([0.0, 3.0], abs=0.01)

    async def test_the_deadline_counts_in_the_queue(self, autojump_clock: MockClock) -> None:
        admission = Admission(slots=1, queue_limit=9, max_per_peer=9)
        async with bench([trio.Event()], admission=admission) as b:
            first, second = await b.open(), await b.open()
            await first.ask(deadline_ms=50_000)
            await wait_all_tasks_blocked()
            await second.ask(deadline_ms=2000)
            assert (await second.error()).code == "deadline"
            assert len(b.backend.calls) == 1


class TestControl:
    async def test_pong_while_working(self) -> None:
        go = trio.Event()
        async with bench([go, *sse(*HELLO)]) as b:
            r = await b.open()
            await r.ask()
            await wait_all_tasks_blocked()
            await r.stream.send_all(r.machine.ping(42))
            assert await r.next() == PongReceived(42)
            go.set()
            assert await r.answer()

    async def test_pong_waits_for_the_frame_that_is_being_sent(self) -> None:
        text = "x" * 2_000_000
        async with bench(sse(chunk(text), chunk("", "stop")), buffer_bytes=4096) as b:
            r = await b.open()
            await r.ask()
            await wait_all_tasks_blocked()
            for payload in range(3):
                await r.stream.send_all(r.machine.ping(payload))
            await wait_all_tasks_blocked()
            assert len(await r.answer()) > len(text)

    async def test_an_ack_is_checked_and_recorded(self) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask()
            await r.answer()
            ack = seal_ack(r.receipt, CLIENT)
            await r.stream.send_all(r.machine.ack(1, ack))
            await wait_all_tasks_blocked()
            assert [served.ack for served in b.observer.receipts] == [None, ack]

    @pytest.mark.parametrize("signer", [CLIENT, Signer(b"z" * 32)])
    async def test_a_wrong_ack_ends_the_stream(self, signer: Signer) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask()
            await r.answer()
            ack = seal_ack(b"other" if signer is CLIENT else r.receipt, signer)
            await r.stream.send_all(r.machine.ack(1, ack))
            assert await r.ended()
            assert len(b.observer.receipts) == 1

    async def test_a_request_behind_an_end_that_is_still_being_followed_by_a_pong(self) -> None:
        """END went out, but the worker is still sending the PONG that waited behind it when the next request comes."""
        async with trio.open_nursery() as nursery:
            b = Bench(nursery, FakeBackend([b"".join(sse(*HELLO))]))
            near, far = stream_pair(CLIENT.peer, EXECUTOR.peer)
            b.streams += [near, far]
            r = Requester(near)
            gated = GatedStream(far)
            nursery.start_soon(b.executor.serve_stream, gated)
            await r.open()
            b.streams.append(gated)
            gated.gates = {1: trio.Event(), 2: trio.Event()}  # END's write (DATA went before it), then PONG's
            gated.count = -1
            await r.ask()
            await wait_all_tasks_blocked()
            await r.stream.send_all(r.machine.ping(1))
            await wait_all_tasks_blocked()
            gated.gates[1].set()
            assert await r.answer()
            await wait_all_tasks_blocked()
            await r.ask()
            await wait_all_tasks_blocked()
            gated.gates[2].set()
            with trio.fail_after(2):
                assert await r.answer()
            await wait_all_tasks_blocked()
            assert b.is_idle()
            nursery.cancel_scope.cancel()
        for stream in b.streams:
            stream.close()


class GatedStream(P2PStream):
    """A stream some of whose writes wait for an event: a full socket buffer, write by write."""

    def __init__(self, stream: P2PStream) -> None:
        sock, stream._sock = stream._sock, None
        assert sock is not None
        super().__init__(sock, stream.peer, b"", stream.protocol)
        self.gates: dict[int, trio.Event] = {}
        self.count = 0

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.count += 1
        gate = self.gates.get(self.count)
        if gate is not None:
            await gate.wait()
        await super().send_all(data)


class TestDrain:
    async def test_an_idle_stream_is_told_and_ends_soon(self, autojump_clock: MockClock) -> None:
        async with bench() as b:
            r = await b.open()
            assert b.executor.offers() != ()
            b.executor.drain()
            assert b.executor.offers() == ()
            assert isinstance(await r.next(), GoAwayReceived)
            began_at = trio.current_time()
            assert await r.ended()
            assert trio.current_time() - began_at == pytest.approx(5)

    async def test_a_working_one_finishes_first(self, autojump_clock: MockClock) -> None:
        async with bench([30.0, *sse(*HELLO)]) as b:
            r = await b.open()
            await r.ask()
            await wait_all_tasks_blocked()
            b.executor.drain()
            assert isinstance(await r.next(), GoAwayReceived)
            assert await r.answer() == b"".join(sse(*HELLO[:3]))
            ack = seal_ack(r.receipt, CLIENT)
            await r.stream.send_all(r.machine.ack(1, ack))
            assert await r.ended()
            assert b.observer.receipts[-1].ack == ack

    async def test_a_request_that_crosses_goaway(self) -> None:
        async with bench() as b:
            r = await b.open()
            b.executor.drain()
            await r.ask()
            error = await r.error()
            assert (error.code, error.retry_after_s) == ("draining", 5.0)

    async def test_it_takes_work_again_after_resume_on_new_streams_only(self, autojump_clock: MockClock) -> None:
        async with bench() as b:
            r = await b.open()
            b.executor.drain()
            b.executor.resume()
            assert b.executor.offers() != ()
            await r.ask()
            assert (await r.error()).code == "draining"
            fresh = await b.open()
            await fresh.ask()
            assert await fresh.answer()
            assert await r.ended()
            await fresh.ask()
            assert await fresh.answer()

    async def test_a_cut_ends_what_was_told_to_go_and_nothing_else(self) -> None:
        async with bench([trio.Event()]) as b:
            old = await b.open()
            await old.ask()
            await wait_all_tasks_blocked()
            b.executor.drain()
            b.executor.resume()
            new = await b.open()
            await new.ask()
            await wait_all_tasks_blocked()
            b.executor.cut()
            with pytest.raises(EOFError):
                await old.answer()
            await wait_all_tasks_blocked()
            assert (b.observer.ended, b.executor.working) == (["cancelled"], 1)

    async def test_a_stream_that_is_not_open_yet_is_closed(self) -> None:
        async with bench() as b:
            r = b.connect()
            await wait_all_tasks_blocked()
            b.executor.drain()
            assert await r.ended()


def test_offers_carry_the_price_and_vanish_with_the_backend() -> None:
    async def main() -> None:
        async with bench(price=Price(1, 2, "EUR")) as b:
            assert [offer.price for offer in b.executor.offers()] == [Price(1, 2, "EUR")]
            offer = b.executor.offer("m")
            assert offer is not None
            assert offer.price == Price(1, 2, "EUR")
            assert b.executor.offer("x") is None
            b.executor.set_price("m", Price(9, 9, "EUR"))
            offer = b.executor.offer("m")
            assert offer is not None
            assert [offer.price, *(one.price for one in b.executor.offers())] == [Price(9, 9, "EUR")] * 2
            with pytest.raises(LookupError):
                b.executor.set_price("x", Price())
            b.backend.state = type(b.backend.state)(False)
            assert b.executor.offers() == ()

    trio.run(main)


LONG = {**STREAMED, "messages": [{"role": "user", "content": "A sentence that is said again and again. " * 4000}]}


class TestCompression:
    @pytest.mark.parametrize("encoding", [pb.ENCODING_ZSTD, pb.ENCODING_GZIP])
    async def test_a_compressed_body_is_the_one_that_was_signed(self, encoding: pb.Encoding) -> None:
        body = json.dumps(LONG).encode()
        sent = compress(body) if encoding == pb.ENCODING_ZSTD else gzip.compress(body)
        async with bench() as b:
            r = await b.open()
            for _ in range(2):
                await r.ask(LONG, sent=sent, encoding=encoding, body_size=len(body))
                assert await r.answer() == b"".join(sse(*HELLO[:3]))
            assert json.loads(b.backend.calls[0].body)["messages"] == LONG["messages"]
            assert b.is_idle()

    async def test_what_is_held_counts_as_it_will_be_decompressed(self) -> None:
        body = json.dumps(LONG).encode()
        async with bench(limits=ExecutorLimits(buffered_bodies_bytes=len(body) - 1)) as b:
            r = await b.open()
            await r.ask(LONG, sent=compress(body), encoding=pb.ENCODING_ZSTD, body_size=len(body))
            assert (await r.error()).code == "busy"
            assert b.is_idle()

    @pytest.mark.parametrize(
        ("sent", "body_size"),
        [
            (compress(bytes(1 << 30)), 1000),  # a bomb
            (compress(bytes(1 << 30)), 32 << 20),  # within what may be said, and still not what was said
            (compress(bytes(1000)), 1001),
            (compress(bytes(1000))[:-1], 1000),
            (compress(bytes(1000)) + b"x", 1000),
            (os.urandom(200_000), 1000),  # refused long before its last frame
        ],
    )
    async def test_what_is_not_as_it_was_stated_is_refused_and_the_stream_goes_on(
        self, sent: bytes, body_size: int
    ) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask(bytes(1000), sent=sent, encoding=pb.ENCODING_ZSTD, body_size=body_size)
            assert (await r.error()).code == "bad_encoding"
            assert (b.observer.refusals, b.observer.ended) == (["bad_encoding"], ["bad_encoding"])
            assert b.is_idle()
            assert b.backend.calls == []
            await r.ask()
            assert await r.answer()

    async def test_a_document_goes_compressed_to_who_takes_it(self) -> None:
        script = sse(chunk("word " * 1000), chunk("", "stop"), USAGE)
        for takes in (False, True):
            async with bench(script, compresses=takes) as b:
                r = await b.open()
                await r.ask(WHOLE)
                answer = await r.answer()
                assert json.loads(answer)["choices"][0]["message"]["content"] == "word " * 1000
                assert r.encoding == (pb.ENCODING_ZSTD if takes else pb.ENCODING_IDENTITY)
                assert (r.sent_bytes < len(answer) / 10) is takes

    async def test_a_large_document_and_one_that_does_not_shrink(self) -> None:
        noise = "".join(chr(0x20 + byte % 0x40) for byte in os.urandom(400_000)).replace('"', "x").replace("\\", "x")
        for text, encoding in (("word " * 100_000, pb.ENCODING_ZSTD), (noise, pb.ENCODING_ZSTD), ("hi", 0)):
            async with bench(sse(chunk(text), chunk("", "stop"), USAGE), compresses=True) as b:
                r = await b.open()
                await r.ask(WHOLE)
                assert json.loads(await r.answer())["choices"][0]["message"]["content"] == text
                assert r.encoding == encoding
        raw = os.urandom(3000)
        async with bench([raw], compresses=True) as b:
            r = await b.open()
            await r.ask({"model": "m", "input": "x"}, operation=pb.OPERATION_EMBEDDINGS)
            assert await r.answer() == raw
            assert r.encoding == pb.ENCODING_IDENTITY

    async def test_a_stream_goes_compressed_by_setting_only_and_each_piece_at_once(self) -> None:
        gate = trio.Event()
        for streams in (False, True):
            gate = trio.Event()
            events = sse(*[chunk("word ")] * 50, done=False)
            script: list[Line] = [*events, gate, *sse(chunk("", "stop"), USAGE)]
            async with bench(script, compresses=True, compresses_streams=streams) as b:
                r = await b.open()
                await r.ask()
                head = await r.next()
                assert isinstance(head, HeadReceived)
                assert head.encoding == (pb.ENCODING_ZSTD if streams else pb.ENCODING_IDENTITY)
                first = await r.next()
                assert isinstance(first, DataReceived)
                out = Decoder(pb.ENCODING_ZSTD).decode(first.data, 1 << 20) if streams else first.data
                assert out == sse(chunk("word "))[0]
                gate.set()
        async with bench(
            sse(*[chunk("word ")] * 200, chunk("", "stop")), compresses=True, compresses_streams=True
        ) as b:
            r = await b.open()
            await r.ask()
            answer = await r.answer()
            assert answer == b"".join(sse(*[chunk("word ")] * 200, chunk("", "stop")))
            assert r.sent_bytes < len(answer) / 3


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class TestTracing:
    @pytest.mark.parametrize(("given", "sent"), [(PARENT, PARENT), ("", ""), ("00-no", "")])
    async def test_the_trace_context_goes_on_to_the_backend(self, given: str, sent: str) -> None:
        async with bench() as b:
            r = await b.open()
            await r.ask(traceparent=given)
            assert await r.answer()
            assert b.backend.traceparents == [sent]

    async def test_a_request_is_a_span(self) -> None:
        exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        async with bench(tracing=OtelTracing(provider)) as b:
            r = await b.open()
            await r.ask(traceparent=PARENT)
            assert await r.answer()
            b.backend.failure = BackendUnavailableError("gone")
            await r.ask(traceparent=PARENT)
            assert (await r.error()).code == "backend_unavailable"
            await wait_all_tasks_blocked()
        served, failed = exporter.get_finished_spans()
        assert (served.name, dict(served.attributes or {})["gen_ai.usage.output_tokens"]) == ("chat m", 2)
        assert dict(failed.attributes or {})["error.type"] == "backend_unavailable"
        for span, traceparent in zip((served, failed), b.backend.traceparents, strict=True):
            assert span.parent is not None
            assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
            context = span.get_span_context()
            assert context is not None
            assert f"{context.span_id:016x}" == traceparent.split("-")[2]

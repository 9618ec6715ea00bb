"""The executor's side of ``/lloom/request/1.0.0``: checks each request, runs it on the backend, answers with a receipt.

A stream has two tasks: one reads frames (and so notices at once when the requester closes, which cancels the work),
one works on the exchange that is under way. One bad stream ends itself only.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import msgspec
import structlog
import trio

from lloom_sidecar.errors import (
    BackendError,
    BackendRejectedError,
    BackendTimeoutError,
    BackendUnavailableError,
    DaemonError,
    LloomError,
    PeerBusyError,
    PriceError,
    RemoteProtocolError,
    RequestError,
    RoutingError,
)
from lloom_sidecar.http.errors import HttpClientError
from lloom_sidecar.http.sse import SseCutter, data_of
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.claims import (
    OPERATIONS_SERVED,
    CheckedRequest,
    check_ack,
    check_request,
    cost_of,
    salted_digest,
    seal_receipt,
)
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.exchange import (
    CHALLENGE_BYTES,
    AckReceived,
    BodyReceived,
    Event,
    OpenReceived,
    PingReceived,
    RequestReceived,
    ResponderStream,
    State,
)
from lloom_sidecar.protocol.names import VERSION_MAJOR
from lloom_sidecar.protocol.offers import ModelOffer, Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .admission import Admission, Ticket
from .aggregate import ChunkMerger
from .backend import Backend, BackendAnswer
from .body import BackendCall, BodyPolicy, prepare_body

OPEN_TIMEOUT_S: Final = 10.0
"""From the stream's arrival to its OPEN."""
BODY_STALL_S: Final = 60.0
"""Longest silence while a body is outstanding."""
IDLE_STREAM_S: Final = 600.0
"""A stream without an exchange is closed by the requester first; this is for one that forgot."""
MAX_EVENT_BYTES: Final = 4 * 1024 * 1024
"""Largest SSE event of a backend."""
MAX_DOCUMENT_BYTES: Final = 64 * 1024 * 1024
"""Largest unstreamed answer."""
DRAIN_ANSWER_S: Final = 1.0
GOAWAY_LINGER_S: Final = 5.0

_NO_USAGE: Final = re.compile(rb'"usage"\s*:\s*null')

log = structlog.get_logger("lloom.executor")


class ExecutorObserver(Protocol):
    """What the node wants to know of served requests; every method is quick and raises nothing."""

    def request_received(self, peer: PeerId, request_id: bytes, model: str) -> None:
        """A request passed every check; exactly one ``request_ended`` follows."""

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
        """It ended: ``ok``, ``cancelled`` or an error's code."""

    def refused(self, code: str) -> None:
        """A request or a stream was refused, or a request failed, with this code."""

    def receipt_made(self, served: ServedReceipt) -> None:
        """A receipt was signed, or (with ``ack``) countersigned."""


@dataclass(frozen=True, slots=True)
class ServedReceipt:
    """A receipt that this executor gave, and the client's countersignature once it came."""

    client: PeerId
    request_id: bytes
    exchange: int
    """Number of the exchange on its stream."""
    model: str
    request: bytes = field(repr=False)
    receipt: bytes = field(repr=False)
    salt: bytes = field(repr=False)
    ack: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ExecutorLimits:
    """Bounds of one executor node."""

    max_body_bytes: int = 32 * 1024 * 1024
    buffered_bodies_bytes: int = 256 * 1024 * 1024
    """Bodies of all requests together that are read and not yet handed to the backend."""
    requests_per_s: float = 2000.0
    """Of all peers; beyond it requests are refused before their signature is checked."""


@dataclass(slots=True)
class _Job:
    request: CheckedRequest
    envelope: bytes
    salt: bytes
    ticket: Ticket
    accepted_at: float
    accepted_at_ms: int
    body_length: int
    price: pb.Price
    """Fixed when the REQUEST was taken."""
    body: list[bytes] = field(default_factory=list)
    first_at_ms: int = 0
    is_ended: bool = False
    """The observer was told of its end."""


class Executor:
    """Serves the streams of one node's executor role."""

    def __init__(
        self,
        *,
        signer: Signer,
        backend: Backend,
        admission: Admission,
        policy: BodyPolicy,
        limits: ExecutorLimits,
        max_streams: Callable[[], int],
        price: Price,
        may_ask: Callable[[PeerId], bool],
        observer: ExecutorObserver,
        now_ms: Callable[[], int],
    ) -> None:
        """``max_streams``: said in ACCEPT, what this node's p2pd can hold of one peer. ``may_ask``: whether a peer is
        of our network (or this node is open); asked at OPEN and at every request.
        """
        self.signer = signer
        self.backend = backend
        self.admission = admission
        self.policy = policy
        self.limits = limits
        self.max_streams = max_streams
        self.price = price
        self.may_ask = may_ask
        self.observer = observer
        self.now_ms = now_ms
        self.buffered_bytes = 0
        self.is_draining = False
        self._sessions: set[_Session] = set()
        self._places: dict[Ticket, trio.Event] = {}
        self._allowance = limits.requests_per_s
        self._allowance_at = time.monotonic()

    async def serve_stream(self, stream: P2PStream) -> None:
        """Serve one inbound stream until it ends. Cancelled = the stream is closed, its work at the backend stopped."""
        session = _Session(self, stream)
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            stream.close()

    def drain(self) -> None:
        """Take no further exchange: idle streams are told GOAWAY and end, working ones after their exchange."""
        self.is_draining = True
        for session in list(self._sessions):
            session.go_away("this executor is shutting down")

    def offer(self, model: str) -> ModelOffer | None:
        """What is announced of one model, None when it is not served (now)."""
        found = self.backend.offer(model)
        return None if found is None else replace(found, price=self.price)

    def offers(self) -> tuple[ModelOffer, ...]:
        """Everything to announce; empty while the backend is down or this executor drains."""
        if self.is_draining or not self.backend.is_up:
            return ()
        return tuple(replace(offer, price=self.price) for offer in self.backend.state.offers)

    @property
    def working(self) -> int:
        """Exchanges under way, waiting ones included."""
        return self.admission.working + self.admission.queued

    def enter(self, peer: PeerId, priority: int) -> Ticket:
        """A place in the admission; ``wait_place`` waits for its turn. Raises PeerBusyError."""
        ticket = self.admission.enter(peer, priority=priority)
        if not ticket.is_admitted:
            self._places[ticket] = trio.Event()
        return ticket

    async def wait_place(self, ticket: Ticket) -> None:
        """Return when the ticket may work."""
        if not ticket.is_admitted:
            await self._places[ticket].wait()

    def leave(self, ticket: Ticket, held_s: float | None = None) -> None:
        """Give the place back and wake who is next. Idempotent."""
        self._places.pop(ticket, None)
        following = self.admission.leave(ticket, held_s=held_s)
        if following is not None:
            self._wake(following)

    def resize(self, slots: int) -> None:
        """The backend's parallelism changed."""
        for ticket in self.admission.resize(slots):
            self._wake(ticket)

    def take_allowance(self) -> None:
        """Global token bucket. Raises PeerBusyError when the node gets more requests than it may even look at."""
        now = time.monotonic()
        rate = self.limits.requests_per_s
        self._allowance = min(rate, self._allowance + (now - self._allowance_at) * rate)
        self._allowance_at = now
        if self._allowance < 1:
            raise PeerBusyError("this executor gets too many requests", code="rate_limit", retry_after_s=1.0)
        self._allowance -= 1

    def _wake(self, ticket: Ticket) -> None:
        event = self._places.pop(ticket, None)
        if event is not None:
            event.set()


class _Session:
    """One inbound stream."""

    def __init__(self, executor: Executor, stream: P2PStream) -> None:
        self._executor = executor
        self._stream = stream
        self._peer = stream.peer
        self._machine = ResponderStream(max_body_bytes=executor.limits.max_body_bytes)
        self._challenge = os.urandom(CHALLENGE_BYTES)
        self._job: _Job | None = None
        self._ready = trio.Event()
        self._unacked: dict[int, ServedReceipt] = {}
        self._is_sending = False
        self._control = bytearray()
        self._scope: trio.CancelScope | None = None

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            try:
                nursery.start_soon(self._work)
                await self._read()
            finally:
                nursery.cancel_scope.cancel()
                if self._job is not None:
                    self._drop_job(self._job)

    def go_away(self, reason: str) -> None:
        """Say GOAWAY; what is under way goes on, an idle stream ends when the requester closes it."""
        if self._machine.state in (State.NEW, State.CLOSED, State.BROKEN, State.OPENING):
            self._stream.close()
            return
        data = self._machine.go_away(reason)
        if self._is_sending:
            self._control += data
        else:
            self._stream.send_nowait(data)
        if self._job is None and self._scope is not None:
            # p2pd has no half-close: the requester closes, and we read to its end, for a while.
            self._scope.deadline = trio.current_time() + GOAWAY_LINGER_S

    # ------------------------------------------------------------------ reading
    async def _read(self) -> None:
        with trio.move_on_after(OPEN_TIMEOUT_S) as opening:
            while True:
                data = await self._stream.receive_some()
                if not data:
                    return
                try:
                    events = self._machine.receive(data)
                    for event in events:
                        await self._on_event(event)
                except RemoteProtocolError as exc:
                    self._count(exc)
                    return
                except DaemonError:
                    return  # the stream closed while we answered on it
                if self._machine.state is State.CLOSED:
                    # Refused before it was open: the requester reads ERROR and closes; closing first may lose it.
                    opening.deadline = trio.current_time() + OPEN_TIMEOUT_S
                    while await self._stream.receive_some():
                        pass
                    return
                opening.deadline = trio.current_time() + self._patience()

    def _patience(self) -> float:
        match self._machine.state:
            case State.NEW | State.OPENING:
                return OPEN_TIMEOUT_S
            case State.BODY | State.DISCARDING:
                return BODY_STALL_S
            case State.ANSWERING:
                return float("inf")  # the requester waits; the work has its own deadline
            case _:
                return IDLE_STREAM_S

    async def _on_event(self, event: Event) -> None:
        match event:
            case BodyReceived(data=data, is_last=is_last):
                if self._job is not None:
                    self._job.body.append(data)
                    if is_last:
                        self._ready.set()
            case RequestReceived():
                await self._on_request(event)
            case PingReceived(payload=payload):
                await self._send(self._machine.pong(payload))
            case AckReceived(exchange=exchange, envelope=envelope):
                self._on_ack(exchange, envelope)
            case OpenReceived():
                await self._on_open(event)
            case _:
                pass

    async def _on_open(self, event: OpenReceived) -> None:
        executor = self._executor
        refusal: LloomError | None = None
        if event.version_major != VERSION_MAJOR:
            refusal = RemoteProtocolError(
                f"this node speaks version {VERSION_MAJOR} of the protocol, not {event.version_major}", code="version"
            )
        elif executor.is_draining:
            refusal = PeerBusyError("this executor is shutting down", code="draining", retry_after_s=5.0)
        elif not executor.may_ask(self._peer):
            refusal = RemoteProtocolError(
                "say hello first: this node serves members of its network", code="hello_required"
            )
        if refusal is not None:
            self._count(refusal)
            await self._send(self._machine.error(refusal))
            return
        await self._send(
            self._machine.accept(
                now_ms=executor.now_ms(),
                challenge=self._challenge,
                max_streams=executor.max_streams(),
            )
        )

    async def _on_request(self, event: RequestReceived) -> None:
        """Everything that can be refused is refused here, from the REQUEST frame, before a BODY frame is read."""
        executor = self._executor
        try:
            executor.take_allowance()
            if executor.is_draining:
                raise PeerBusyError("this executor is shutting down", code="draining", retry_after_s=5.0)
            if not executor.may_ask(self._peer):
                raise RemoteProtocolError("say hello again: the membership has run out", code="hello_required")
            request = check_request(
                event.envelope,
                sender=self._peer,
                executor=executor.signer.peer,
                challenge=self._challenge,
                exchange=event.exchange,
                now_ms=executor.now_ms(),
            )
            claims = request.claims
            if claims.operation not in OPERATIONS_SERVED:
                raise RequestError(
                    "this executor does not serve that operation", code="unsupported_operation", http_status=501
                )
            if event.encoding != pb.ENCODING_IDENTITY:
                raise RemoteProtocolError("a body compressed in a way that was not agreed on", code="bad_request")
            if event.body_length == 0:
                raise RequestError("the request has no body", code="invalid_json")
            if not executor.backend.is_up:
                raise BackendUnavailableError("the backend of this executor is down")
            offer = executor.offer(claims.model)
            if offer is None:
                raise RoutingError("this executor does not serve that model", code="model_not_served", retryable=True)
            if not _is_under(offer.price, claims.max_price):
                raise PriceError(
                    "the price here is over the one that the request allows", code="price_changed", retryable=True
                )
            if executor.buffered_bytes + event.body_length > executor.limits.buffered_bodies_bytes:
                raise PeerBusyError("this executor holds too many bodies", code="busy", retry_after_s=1.0)
            ticket = executor.enter(self._peer, claims.priority)
        except LloomError as exc:
            self._count(exc)
            await self._send(self._machine.error(exc))
            return
        executor.buffered_bytes += event.body_length
        self._job = _Job(
            request=request,
            envelope=event.envelope,
            salt=event.salt,
            ticket=ticket,
            accepted_at=trio.current_time(),
            accepted_at_ms=executor.now_ms(),
            body_length=event.body_length,
            price=_price_message(offer.price),
        )
        executor.observer.request_received(self._peer, claims.request_id, claims.model)

    def _on_ack(self, exchange: int, envelope: bytes) -> None:
        served = self._unacked.pop(exchange, None)
        if served is None:
            return
        check_ack(envelope, client=self._peer, receipt=served.receipt)
        self._executor.observer.receipt_made(replace(served, ack=envelope))

    # ------------------------------------------------------------------ working
    async def _work(self) -> None:
        while True:
            await self._ready.wait()
            self._ready = trio.Event()
            job = self._job
            assert job is not None  # set before _ready
            try:
                await self._run_job(job)
            except DaemonError:
                self._cancel()  # the requester's side of the stream is gone
            finally:
                self._drop_job(job)
            if self._executor.is_draining:
                self._deadline_after_goaway()

    async def _run_job(self, job: _Job) -> None:
        executor = self._executor
        claims = job.request.claims
        code, first_s, tokens = "cancelled", None, 0
        try:
            with trio.fail_after(claims.deadline_ms / 1000):
                tokens = await self._answer(job)
            code = "ok"
        except trio.TooSlowError:
            code = "deadline"
            await self._fail(BackendTimeoutError("the answer took longer than the request's deadline", code="deadline"))
        except BackendRejectedError as exc:
            code = exc.code
            await self._fail(exc, exc.body)
        except DaemonError as exc:
            code = exc.code
            raise
        except LloomError as exc:
            code = exc.code
            await self._fail(exc)
        except Exception as exc:  # the end of this request's task: its bug must not end the stream's others
            code = "internal"
            log.error(
                "request_failed", peer=str(self._peer), model=claims.model, error=type(exc).__name__, exc_info=exc
            )
            await self._fail(LloomError("the executor failed on this request; its log has the cause", retryable=True))
        finally:
            if job.first_at_ms:
                first_s = (job.first_at_ms - job.accepted_at_ms) / 1000
            self._note_end(job, code, first_s, tokens)

    def _note_end(self, job: _Job, code: str, first_s: float | None = None, tokens: int = 0) -> None:
        """Exactly one for each ``request_received``: the first call counts."""
        if job.is_ended:
            return
        job.is_ended = True
        claims = job.request.claims
        seconds = trio.current_time() - job.accepted_at
        self._executor.observer.request_ended(
            self._peer, claims.request_id, claims.model, code, seconds, first_s, tokens
        )

    async def _answer(self, job: _Job) -> int:
        executor = self._executor
        claims = job.request.claims
        body = b"".join(job.body)
        job.body.clear()
        if salted_digest(job.salt, body) != claims.body_digest:
            raise RemoteProtocolError("a body that is not the signed one", code="bad_digest", http_status=400)
        backend_model = executor.backend.backend_model(claims.model)
        call = prepare_body(
            body, operation=claims.operation, model=claims.model, backend_model=backend_model, policy=executor.policy
        )
        await executor.wait_place(job.ticket)
        async with executor.backend.call(call) as answer:
            if call.is_streamed:
                meter = await self._relay_events(job, call, answer)
            else:
                meter = await self._relay_document(job, answer)
        usage, source = meter.usage()
        price = job.price
        cost = cost_of(price, usage)
        if claims.max_cost_set and cost > claims.max_cost:
            raise PriceError("the answer cost more than the request allows", code="max_cost", retryable=False)
        receipt = pb.ReceiptClaims(
            client=self._peer.raw,
            executor=executor.signer.peer.raw,
            request_digest=job.request.digest,
            answer_digest=meter.digest.digest(),
            answer_bytes=meter.size,
            model=claims.model,
            usage=usage,
            usage_source=source,
            price=price,
            cost=cost,
            accepted_at_ms=job.accepted_at_ms,
            first_at_ms=job.first_at_ms,
            ended_at_ms=executor.now_ms(),
            outcome=pb.OUTCOME_COMPLETE,
        )
        envelope = seal_receipt(receipt, executor.signer)
        exchange = self._machine.exchange
        served = ServedReceipt(self._peer, claims.request_id, exchange, claims.model, job.envelope, envelope, job.salt)
        self._unacked = {**dict(list(self._unacked.items())[-7:]), exchange: served}
        executor.observer.receipt_made(served)
        executor.leave(job.ticket, trio.current_time() - job.accepted_at)
        await self._send(self._machine.end(envelope))
        return int(usage.completion_tokens)

    async def _relay_events(self, job: _Job, call: BackendCall, answer: BackendAnswer) -> _Meter:
        """Pass SSE on as it comes (or merge it into one document), noting usage and the proper end."""
        cutter = SseCutter(MAX_EVENT_BYTES)
        merger = ChunkMerger(is_chat=job.request.claims.operation == pb.OPERATION_CHAT)
        meter = _Meter(job.salt, merger)
        is_done = False
        while not is_done:
            data = await answer.receive_some()
            if not data:
                break
            out: list[bytes] = []
            for event in cutter.feed(data):
                payload = data_of(event)
                if not payload:
                    if event[:1] == b":":
                        continue  # a comment that keeps a connection alive: PING does that here
                    out.append(event)
                    continue
                if payload == b"[DONE]":
                    is_done = True
                    out.append(event)
                    break
                if b'"error"' in payload and _is_error(payload):
                    raise _error_in_stream(payload)
                if not call.wants_stream:
                    _feed(merger, payload)
                elif b'"usage"' in payload and _NO_USAGE.search(payload) is None:
                    is_usage_only = meter.note_usage(payload)
                    if is_usage_only and call.strips_usage:
                        continue
                elif b'"finish_reason":"' in payload or b'"finish_reason": "' in payload:
                    merger.has_finished = True
                meter.chunks += 1
                out.append(event)
            if out and not job.first_at_ms:
                self._note_first(job)
            if out and call.wants_stream:
                await self._send_data(job, meter, out[0] if len(out) == 1 else b"".join(out), "text/event-stream")
        if not is_done and (cutter.rest() or not merger.has_finished):
            raise BackendUnavailableError("the backend ended its answer in the middle")
        with trio.move_on_after(DRAIN_ANSWER_S), suppress(HttpClientError, BackendError):
            # The end of the body lets the connection be used again; whoever keeps it open after [DONE], or cuts it
            # there, loses it. The answer is complete either way.
            await answer.receive_some()
        if not call.wants_stream:
            document = merger.document()
            if len(document) > MAX_DOCUMENT_BYTES:
                raise BackendError("the backend's answer is larger than 64 MiB", code="answer_too_large")
            await self._send_data(job, meter, document, "application/json")
        return meter

    async def _relay_document(self, job: _Job, answer: BackendAnswer) -> _Meter:
        document = await answer.read(MAX_DOCUMENT_BYTES)
        self._note_first(job)
        meter = _Meter(job.salt, ChunkMerger(is_chat=False))
        meter.note_usage(document)
        await self._send_data(job, meter, document, "application/json")
        return meter

    def _note_first(self, job: _Job) -> None:
        job.first_at_ms = max(1, self._executor.now_ms())

    async def _send_data(self, job: _Job, meter: _Meter, data: bytes, content_type: str) -> None:
        head = b""
        if meter.size == 0:
            backend_us = round((trio.current_time() - job.accepted_at) * 1e6)
            head = self._machine.head(content_type, backend_us=backend_us)
        meter.add(data)
        await self._send(head + self._machine.data(data))

    async def _fail(self, error: LloomError, body: bytes = b"") -> None:
        self._count(error)
        if self._machine.state is State.ANSWERING:
            await self._send(self._machine.error(error, body=body))

    # ------------------------------------------------------------------ sending
    async def _send(self, data: bytes) -> None:
        """Send whole frames; the reader's PONG and the worker's DATA never mix inside a frame."""
        if self._is_sending:
            self._control += data
            return
        self._is_sending = True
        try:
            await self._stream.send_all(data)
            while self._control:
                data = bytes(self._control)
                self._control.clear()
                await self._stream.send_all(data)
        finally:
            self._is_sending = False

    def _drop_job(self, job: _Job) -> None:
        """Give back what the job held. Idempotent; the next one may have come already, behind this one's END."""
        if self._job is job:
            self._job = None
        self._executor.buffered_bytes -= job.body_length
        job.body_length = 0
        self._executor.leave(job.ticket)
        self._note_end(job, "cancelled")  # where the stream ended before its body was complete

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    def _deadline_after_goaway(self) -> None:
        if self._scope is not None:
            self._scope.deadline = trio.current_time() + GOAWAY_LINGER_S

    def _count(self, error: LloomError) -> None:
        self._executor.observer.refused(error.code)
        log.info("refused", peer=str(self._peer), code=error.code)


class _Meter:
    """What the receipt states of an answer: its digest, size and usage."""

    def __init__(self, salt: bytes, merger: ChunkMerger) -> None:
        self.digest = hashlib.sha256(salt)
        self.size = 0
        self.chunks = 0
        self._merger = merger
        self._usage: dict[str, Any] | None = None

    def add(self, data: bytes) -> None:
        self.digest.update(data)
        self.size += len(data)

    def note_usage(self, payload: bytes) -> bool:
        """Remember the usage in a chunk or document. True when the chunk holds nothing else."""
        try:
            document = msgspec.json.decode(payload)
        except msgspec.DecodeError:
            return False
        if not isinstance(document, dict) or not isinstance(document.get("usage"), dict):
            return False
        self._usage = document["usage"]
        if any(isinstance(c, dict) and c.get("finish_reason") is not None for c in document.get("choices") or []):
            self._merger.has_finished = True
        return not document.get("choices")

    def usage(self) -> tuple[pb.Usage, pb.UsageSource]:
        """Token counts and who counted."""
        found = self._usage or self._merger.usage
        if found is not None:
            return (
                pb.Usage(
                    prompt_tokens=_count_of(found, "prompt_tokens"),
                    completion_tokens=_count_of(found, "completion_tokens"),
                ),
                pb.USAGE_SOURCE_BACKEND,
            )
        chunks = self._merger.chunks or self.chunks
        return pb.Usage(completion_tokens=chunks), pb.USAGE_SOURCE_CHUNKS if chunks else pb.USAGE_SOURCE_UNKNOWN


def _price_message(price: Price) -> pb.Price:
    return pb.Price(
        prompt_per_million=price.prompt_per_million,
        completion_per_million=price.completion_per_million,
        currency=price.currency,
    )


def _is_under(price: Price, ceiling: pb.Price) -> bool:
    return price.is_free or (
        price.currency == ceiling.currency
        and price.prompt_per_million <= ceiling.prompt_per_million
        and price.completion_per_million <= ceiling.completion_per_million
    )


def _count_of(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and 0 <= value < 2**48 else 0


def _feed(merger: ChunkMerger, payload: bytes) -> None:
    try:
        merger.feed(payload)
    except (ValueError, msgspec.DecodeError) as exc:
        raise BackendUnavailableError("the backend sent a chunk that cannot be read") from exc


def _is_error(payload: bytes) -> bool:
    """Whether an event is an error document: ``{"error": ...}``, or vLLM's older ``{"object": "error", ...}``."""
    try:
        document = msgspec.json.decode(payload)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and (bool(document.get("error")) or document.get("object") == "error")


def _error_in_stream(payload: bytes) -> BackendError:
    return BackendRejectedError("the backend failed in the middle of its answer", status=502, body=payload)

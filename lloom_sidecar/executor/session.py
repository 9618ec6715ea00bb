"""One inbound stream of ``/lloom/request/1.0.0``: one task reads frames, and so notices at once when the requester
closes, which cancels the work; another works on the exchange that is under way."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

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
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.claims import (
    OPERATIONS_SERVED,
    QUOTE_CONTENT_TYPE,
    CheckedRequest,
    check_ack,
    check_request,
    cost_of,
    is_under,
    price_message,
    salted_digest,
    seal_quote,
    seal_receipt,
)
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
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .admission import Ticket
from .backend import BackendAnswer
from .body import BackendCall, prepare_body
from .observer import ServedReceipt
from .quotes import QUOTE_ID_BYTES, offers_document
from .relay import MAX_DOCUMENT_BYTES, AnswerMeter, EventRelay

if TYPE_CHECKING:
    from .serve import Executor

OPEN_TIMEOUT_S: Final = 10.0
"""From the stream's arrival to its OPEN."""
BODY_STALL_S: Final = 60.0
"""Longest silence while a body is outstanding."""
IDLE_STREAM_S: Final = 600.0
"""A stream without an exchange is closed by the requester first; this is for one that forgot."""
DRAIN_ANSWER_S: Final = 1.0
GOAWAY_LINGER_S: Final = 5.0

QUERIES: Final = frozenset({pb.OPERATION_MODELS, pb.OPERATION_QUOTE})
"""Operations that the executor answers itself, without a place at the backend."""
MAX_TOKENS: Final = 2**31 - 1

log = structlog.get_logger("lloom.executor")


@dataclass(slots=True)
class _Job:
    request: CheckedRequest
    envelope: bytes
    salt: bytes
    ticket: Ticket | None
    """Its place at the backend; None for a query, which the executor answers itself."""
    accepted_at: float
    accepted_at_ms: int
    body_length: int
    price: pb.Price
    """Fixed when the REQUEST was taken."""
    body: list[bytes] = field(default_factory=list)
    first_at_ms: int = 0
    is_ended: bool = False
    """The observer was told of its end."""


class Session:
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
        """Read and work until the stream ends; cancelled = its work at the backend is stopped."""
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
            price = Price()
            if claims.operation != pb.OPERATION_MODELS:
                price = self._price_of(claims)
            if executor.buffered_bytes + event.body_length > executor.limits.buffered_bodies_bytes:
                raise PeerBusyError("this executor holds too many bodies", code="busy", retry_after_s=1.0)
            is_query = claims.operation in QUERIES
            ticket = None if is_query else executor.enter(self._peer, claims.priority)
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
            price=price_message(price),
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
        if job.ticket is None:
            meter = await self._answer_query(job)
        else:
            meter = await self._answer_from_backend(job, body, job.ticket)
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
        if job.ticket is not None:
            executor.leave(job.ticket, trio.current_time() - job.accepted_at)
        await self._send(self._machine.end(envelope))
        return int(usage.completion_tokens)

    async def _answer_from_backend(self, job: _Job, body: bytes, ticket: Ticket) -> AnswerMeter:
        executor = self._executor
        claims = job.request.claims
        call = prepare_body(
            body,
            operation=claims.operation,
            model=claims.model,
            backend_model=executor.backend.backend_model(claims.model),
            policy=executor.policy,
            affordable_tokens=_affordable_tokens(claims, job.price, len(body)),
        )
        await executor.wait_place(ticket)
        async with executor.backend.call(call) as answer:
            if call.is_streamed:
                return await self._relay_events(job, call, answer)
            return await self._relay_document(job, answer)

    async def _answer_query(self, job: _Job) -> AnswerMeter:
        """What this executor offers now, or a price that it promises: neither needs the backend."""
        executor = self._executor
        claims = job.request.claims
        meter = AnswerMeter(job.salt)
        meter.is_query = True
        if claims.operation == pb.OPERATION_MODELS:
            document = offers_document(executor.offers(), executor.admission.working, executor.admission.queued)
            await self._send_data(job, meter, document, "application/json")
            return meter
        offer = executor.offer(claims.model)
        if offer is None:
            raise RoutingError("this executor does not serve that model", code="model_not_served", retryable=True)
        now_ms = executor.now_ms()
        quote_id = os.urandom(QUOTE_ID_BYTES)
        quote = executor.quotes.promise(quote_id, self._peer, claims.model, offer.price, now_ms)
        envelope = seal_quote(
            pb.QuoteClaims(
                quote_id=quote_id,
                client=self._peer.raw,
                executor=executor.signer.peer.raw,
                model=claims.model,
                price=price_message(offer.price),
                issued_at_ms=now_ms,
                valid_until_ms=quote.valid_until_ms,
            ),
            executor.signer,
        )
        await self._send_data(job, meter, envelope, QUOTE_CONTENT_TYPE)
        return meter

    def _price_of(self, claims: pb.RequestClaims) -> Price:
        """The price of a request, fixed now: the promised one, else today's, if the request allows that."""
        executor = self._executor
        if not executor.backend.is_up:
            raise BackendUnavailableError("the backend of this executor is down")
        offer = executor.offer(claims.model)
        if offer is None:
            raise RoutingError("this executor does not serve that model", code="model_not_served", retryable=True)
        if claims.operation == pb.OPERATION_QUOTE:
            return Price()
        price = offer.price
        if claims.quote_id:
            quoted = executor.quotes.price_of(claims.quote_id, self._peer, claims.model, executor.now_ms())
            if quoted is None:
                raise PriceError("that quote does not hold here (any more)", code="quote_expired", retryable=True)
            price = quoted
        if not is_under(price, claims.max_price):
            raise PriceError(
                "the price here is over the one that the request allows",
                code="price_changed",
                retryable=True,
                details={"price": price},
            )
        return price

    async def _relay_events(self, job: _Job, call: BackendCall, answer: BackendAnswer) -> AnswerMeter:
        """Pass SSE on as it comes (or merge it into one document), up to the proper end."""
        meter = AnswerMeter(job.salt)
        relay = EventRelay(call, meter, is_chat=job.request.claims.operation == pb.OPERATION_CHAT)
        while not relay.is_done:
            data = await answer.receive_some()
            if not data:
                break
            out = relay.feed(data)
            if out and not job.first_at_ms:
                self._note_first(job)
            if out and call.wants_stream:
                await self._send_data(job, meter, out, "text/event-stream")
        relay.check_complete()
        with trio.move_on_after(DRAIN_ANSWER_S), suppress(HttpClientError, BackendError):
            # The end of the body lets the connection be used again; whoever keeps it open after [DONE], or cuts it
            # there, loses it. The answer is complete either way.
            await answer.receive_some()
        if not call.wants_stream:
            await self._send_data(job, meter, relay.document(), "application/json")
        return meter

    async def _relay_document(self, job: _Job, answer: BackendAnswer) -> AnswerMeter:
        document = await answer.read(MAX_DOCUMENT_BYTES)
        self._note_first(job)
        meter = AnswerMeter(job.salt)
        meter.note_usage(document)
        await self._send_data(job, meter, document, "application/json")
        return meter

    def _note_first(self, job: _Job) -> None:
        job.first_at_ms = max(1, self._executor.now_ms())

    async def _send_data(self, job: _Job, meter: AnswerMeter, data: bytes, content_type: str) -> None:
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
        if job.ticket is not None:
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


def _affordable_tokens(claims: pb.RequestClaims, price: pb.Price, body_bytes: int) -> int | None:
    """Most completion tokens that the request's max cost pays for, None = no limit.

    The prompt's tokens are not known before the backend counted them; they are at most as many as the body has bytes,
    so the executor never does work that the client need not pay.
    Raises PriceError when not even one token is left.
    """
    if not claims.max_cost_set or (price.prompt_per_million == 0 and price.completion_per_million == 0):
        return None
    left = claims.max_cost * 1_000_000 - price.prompt_per_million * body_bytes
    tokens = left // price.completion_per_million if price.completion_per_million else MAX_TOKENS if left >= 0 else 0
    if tokens < 1:
        raise PriceError("the request's max cost does not pay for its prompt here", code="max_cost", retryable=True)
    return min(tokens, MAX_TOKENS)

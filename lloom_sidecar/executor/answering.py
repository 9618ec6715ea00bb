"""The work on one exchange: from its complete body to its END or ERROR. Reading the stream is the session's part."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog
import trio

from lloom_sidecar.errors import (
    BackendError,
    BackendRejectedError,
    BackendTimeoutError,
    DaemonError,
    LloomError,
    PriceError,
    RemoteProtocolError,
    RoutingError,
)
from lloom_sidecar.http.errors import HttpClientError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.errors import StreamClosedError
from lloom_sidecar.protocol import compression
from lloom_sidecar.protocol.claims import (
    QUOTE_CONTENT_TYPE,
    CheckedRequest,
    is_free,
    price_message,
    salted_digest,
    seal_checkpoint,
    seal_quote,
    seal_receipt,
)
from lloom_sidecar.protocol.exchange import ResponderStream, State
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.tracing import NO_SPAN, Span, check_traceparent

from .admission import Ticket
from .backend import BackendAnswer
from .body import BackendCall, prepare_body
from .observer import ServedReceipt
from .quotes import QUOTE_ID_BYTES, offers_document
from .relay import MAX_DOCUMENT_BYTES, AnswerMeter, EventRelay
from .statements import CheckpointPacer, statement

if TYPE_CHECKING:
    from .serve import Executor

DRAIN_ANSWER_S: Final = 1.0
"""For the end of a backend's body after its answer is complete."""
MAX_TOKENS: Final = 2**31 - 1
EVENT_STREAM: Final = "text/event-stream"

log = structlog.get_logger("lloom.executor")


@dataclass(slots=True)
class Job:
    """One exchange that was taken, and what it holds here."""

    request: CheckedRequest
    envelope: bytes
    salt: bytes
    ticket: Ticket | None
    """Its place at the backend; None for a query, which the executor answers itself."""
    accepted_at: float
    accepted_at_ms: int
    deadline_at: float
    """When the whole answer is due, on trio's clock."""
    price: pb.Price
    """Fixed when the REQUEST was taken."""
    decoder: compression.SizedDecoder | None = None
    """Of a compressed body."""
    body: list[bytes] = field(default_factory=list)
    encoder: compression.Encoder | None = None
    """Of a compressed stream."""
    held_bytes: int = 0
    """Of its body, decompressed, counted in the executor's sum."""
    first_at: float = 0.0
    """When a streamed answer began, on trio's clock."""
    span: Span = NO_SPAN
    first_at_ms: int = 0
    checkpoint: bytes | None = None
    """The last one that was sent."""
    has_receipt: bool = False
    is_ended: bool = False
    """The observer was told of its end."""


class Answering:
    """Answers one job at a time on one stream."""

    def __init__(
        self,
        executor: Executor,
        peer: PeerId,
        *,
        machine: ResponderStream,
        send: Callable[[bytes], Awaitable[None]],
        keep: Callable[[ServedReceipt], None],
    ) -> None:
        """``send``: whole frames to the requester, raises DaemonError when its side is gone. ``keep``: the receipt
        whose ACK may come."""
        self._executor = executor
        self._peer = peer
        self._machine = machine
        self._send = send
        self._keep = keep

    async def run(self, job: Job) -> None:
        """Answer ``job``, whatever happens to it: its failures go to the requester.

        Raises DaemonError when the requester's side of the stream is gone. Cancelled: its work at the backend is
        stopped and the observer told.
        """
        claims = job.request.claims
        code, first_s, tokens = "cancelled", None, 0
        traceparent = check_traceparent(claims.traceparent)
        job.span = self._executor.tracing.served(claims.operation, claims.model, traceparent)
        try:
            with trio.fail_at(job.deadline_at):
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
            job.span.end(code, output_tokens=tokens if code == "ok" else None)
            self.note_end(job, code, first_s, tokens)

    def note_end(self, job: Job, code: str, first_s: float | None = None, tokens: int = 0) -> None:
        """Tell the observer that ``job`` ended. Exactly one for each ``request_received``: the first call counts."""
        if job.is_ended:
            return
        job.is_ended = True
        if not job.has_receipt:
            # Whether the reader or the writer met the closed stream first is chance.
            self._tell(job, reason="cancelled" if code == StreamClosedError.code else code)
        claims = job.request.claims
        seconds = trio.current_time() - job.accepted_at
        self._executor.observer.request_ended(
            self._peer, claims.request_id, claims.model, code, seconds, first_s, tokens
        )

    async def _answer(self, job: Job) -> int:
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
        receipt = self._statement(job, meter, pb.OUTCOME_STOPPED if meter.is_stopped else pb.OUTCOME_COMPLETE)
        envelope = seal_receipt(receipt, executor.signer)
        job.has_receipt = True
        self._keep(self._tell(job, receipt=envelope))
        if not is_free(job.price):
            executor.unacked.ended(self._peer, trio.current_time())
        if job.ticket is not None:
            executor.leave(job.ticket)
        if job.first_at:
            executor.meter.streamed(receipt.usage.completion_tokens, trio.current_time() - job.first_at)
        await self._send(self._machine.end(envelope))
        return int(receipt.usage.completion_tokens)

    def _statement(self, job: Job, meter: AnswerMeter, outcome: pb.Outcome) -> pb.ReceiptClaims:
        return statement(
            client=self._peer,
            executor=self._executor.signer.peer,
            request=job.request,
            price=job.price,
            meter=meter,
            outcome=outcome,
            accepted_at_ms=job.accepted_at_ms,
            first_at_ms=job.first_at_ms,
            now_ms=self._executor.now_ms(),
        )

    def _tell(self, job: Job, *, receipt: bytes | None = None, reason: str = "") -> ServedReceipt:
        """Hand what was signed so far to the node."""
        claims = job.request.claims
        served = ServedReceipt(
            client=self._peer,
            request_id=claims.request_id,
            exchange=claims.exchange,
            model=claims.model,
            request=job.envelope,
            salt=job.salt,
            receipt=receipt,
            checkpoint=job.checkpoint,
            reason=reason,
        )
        self._executor.observer.receipt_made(served)
        return served

    async def _send_checkpoint(self, job: Job, meter: AnswerMeter) -> None:
        claims = self._statement(job, meter, pb.OUTCOME_PARTIAL)
        job.checkpoint = seal_checkpoint(claims, self._executor.signer)
        self._tell(job)
        await self._send(self._machine.checkpoint(job.checkpoint))

    async def _answer_from_backend(self, job: Job, body: bytes, ticket: Ticket) -> AnswerMeter:
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
        await executor.take_slot(ticket)
        async with executor.backend.call(call, traceparent=job.span.traceparent) as answer:
            if call.is_streamed:
                return await self._relay_events(job, ticket, call, answer)
            return await self._relay_document(job, answer)

    async def _answer_query(self, job: Job) -> AnswerMeter:
        """What this executor offers now, or a price that it promises: neither needs the backend."""
        executor = self._executor
        claims = job.request.claims
        meter = AnswerMeter(job.salt)
        meter.is_query = True
        if claims.operation == pb.OPERATION_MODELS:
            document = offers_document(executor.offers(), executor.admission.working, executor.admission.queued)
            await self._send_document(job, meter, document)
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

    async def _relay_events(self, job: Job, ticket: Ticket, call: BackendCall, answer: BackendAnswer) -> AnswerMeter:
        """Pass SSE on as it comes (or merge it into one document), up to the proper end."""
        meter = AnswerMeter(job.salt)
        relay = EventRelay(call, meter, is_chat=job.request.claims.operation == pb.OPERATION_CHAT)
        has_checkpoints = call.wants_stream and not is_free(job.price)
        pacer = CheckpointPacer(trio.current_time()) if has_checkpoints else None
        while not relay.is_done:
            data = await answer.receive_some()
            if not data:
                break
            out = relay.feed(data)
            if out and not job.first_at:
                self._note_first(job)
                job.first_at = trio.current_time()
                self._executor.meter.first_token(job.first_at - ticket.began_at)
            if out and call.wants_stream:
                await self._send_data(job, meter, out, EVENT_STREAM)
            if relay.is_over_budget:
                # As a backend does at its limit of tokens. Leaving its answer unread stops it.
                meter.is_stopped = True
                last = relay.stop()
                if call.wants_stream:
                    await self._send_data(job, meter, last, EVENT_STREAM)
            elif pacer is not None and pacer.is_due(meter.chunks, trio.current_time()):
                await self._send_checkpoint(job, meter)
        relay.check_complete()
        if job.encoder is not None:
            await self._send(self._machine.data(job.encoder.finish()))
        with trio.move_on_after(0 if relay.is_over_budget else DRAIN_ANSWER_S), suppress(HttpClientError, BackendError):
            # The end of the body lets the connection be used again; whoever keeps it open after [DONE], or cuts it
            # there, loses it. The answer is complete either way.
            await answer.receive_some()
        if not call.wants_stream:
            await self._send_document(job, meter, relay.document())
        return meter

    async def _relay_document(self, job: Job, answer: BackendAnswer) -> AnswerMeter:
        document = await answer.read(MAX_DOCUMENT_BYTES)
        self._note_first(job)
        meter = AnswerMeter(job.salt)
        meter.note_usage(document)
        await self._send_document(job, meter, document)
        return meter

    def _note_first(self, job: Job) -> None:
        job.first_at_ms = max(1, self._executor.now_ms())

    async def _send_data(self, job: Job, meter: AnswerMeter, data: bytes, content_type: str) -> None:
        head = b""
        if meter.size == 0:
            if content_type == EVENT_STREAM and self._executor.compresses_stream_for(self._peer):
                job.encoder = compression.Encoder()
            head = self._head(job, content_type, pb.ENCODING_IDENTITY if job.encoder is None else pb.ENCODING_ZSTD)
        meter.add(data)
        if job.encoder is not None:
            data = job.encoder.encode(data)
        await self._send(head + self._machine.data(data))

    async def _send_document(self, job: Job, meter: AnswerMeter, document: bytes) -> None:
        meter.add(document)
        data, encoding = document, pb.ENCODING_IDENTITY
        if len(document) >= compression.MIN_BYTES and self._executor.compresses_for(self._peer):
            if len(document) <= compression.IN_THREAD_BYTES:
                packed = compression.compress(document)
            else:
                packed = await trio.to_thread.run_sync(compression.compress, document, abandon_on_cancel=True)
            if len(packed) < len(document):
                data, encoding = packed, pb.ENCODING_ZSTD
        await self._send(self._head(job, "application/json", encoding) + self._machine.data(data))

    def _head(self, job: Job, content_type: str, encoding: pb.Encoding) -> bytes:
        backend_us = round((trio.current_time() - job.accepted_at) * 1e6)
        return self._machine.head(content_type, backend_us=backend_us, encoding=encoding)

    async def _fail(self, error: LloomError, body: bytes = b"") -> None:
        self._executor.count_refused(self._peer, error)
        if self._machine.state is State.ANSWERING:
            await self._send(self._machine.error(error, body=body))


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

"""One request to one peer: sends it, gives the answer's bytes as they come, and ends only with a receipt that holds."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

import trio

from lloom_sidecar.errors import PeerUnreachableError, RefusedError, RemoteProtocolError, StreamLostError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol import compression
from lloom_sidecar.protocol.claims import (
    check_checkpoint,
    check_receipt,
    price_message,
    salted_digest,
    seal_ack,
    seal_request,
)
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.exchange import (
    SALT_BYTES,
    CheckpointReceived,
    DataReceived,
    EndReceived,
    ErrorReceived,
    Event,
    HeadReceived,
    PingReceived,
    PongReceived,
    State,
)
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.recount import doubts_of

from .stream_pool import Link, StreamPool

FREE: Final = Price()
RETRY_FRESH_CODES: Final = frozenset({"expired", "hello_required", "replayed"})
"""Refusals of a REUSED stream that a fresh one may cure: the clock offset or the membership was stale."""


@dataclass(frozen=True, slots=True)
class Call:
    """What is asked of whichever executor gets it: everything in a REQUEST but the addressee and the stream."""

    request_id: bytes
    """16 bytes, the same over all attempts."""
    operation: int
    model: str
    body: bytes = field(repr=False)
    deadline_ms: int
    """How long the answer may take as a whole, from now."""
    max_price: Price = FREE
    """Ceiling; with ``quote_id`` the quoted price."""
    max_cost: int | None = None
    """Minor units of the price's currency; None = no limit of its own."""
    quote_id: bytes = b""
    """A promise that the addressed executor gave this node."""
    priority: int = 0
    idempotency_key: bytes = b""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """A verified answer's proof, or that of the part of it that came: what was signed."""

    claims: pb.ReceiptClaims
    exchange: int
    """Number of the exchange on its stream."""
    envelope: bytes = field(repr=False)
    request: bytes = field(repr=False)
    salt: bytes = field(repr=False)
    ack: bytes = field(repr=False)
    """The countersignature; empty for a checkpoint."""
    doubts: tuple[str, ...] = ()
    """What of its numbers cannot be, though everything that is signed holds."""


@dataclass(slots=True, eq=False)
class Sent:
    """A REQUEST that went out, and what the executor has signed for it so far. It outlives the exchange, however that
    ends: what is owed for it can be said of every one."""

    peer: PeerId
    exchange: int
    """Number of the exchange on its stream."""
    request: bytes = field(repr=False)
    """Its envelope."""
    salt: bytes = field(repr=False)
    receipt: Receipt | None = None
    """Set once END was verified; the answer is complete then and only then."""
    checkpoint: Receipt | None = None
    """The last CHECKPOINT that was verified."""


class Exchange:
    """An exchange that the far side has begun to answer. Made by ``open_exchange``."""

    def __init__(self, link: Link, signer: Signer, call: Call, claims: pb.RequestClaims, sent: Sent) -> None:
        self.peer = link.peer
        self.link = link
        self.head: HeadReceived | None = None
        self.sent = sent
        self.first_at = math.inf
        """When the first frame of the answer was there, on trio's clock."""
        self._signer = signer
        self._call = call
        self._claims = claims
        self._digest = hashlib.sha256(sent.salt)
        self._answer_bytes = 0
        self._events: list[Event] = []
        self._decoder: compression.Decoder | None = None
        """Of a compressed answer."""
        self._room = 0
        self._has_more = False
        """True while the decoder may hold bytes of the answer that were not taken out of it."""
        self._chunks: int | None = None
        """Events of a streamed answer that is paid for; None = not counted."""
        self.on_checkpoint: Callable[[pb.ReceiptClaims], None] = lambda claims: None
        """Called with every checkpoint that holds; what it raises ends the exchange."""

    @property
    def receipt(self) -> Receipt | None:
        """Not None once END was verified; the answer is complete then and only then."""
        return self.sent.receipt

    async def receive(self) -> bytes | None:
        """The next bytes of the answer (one or more whole DATA frames), or None after END was verified.

        Raises:
            StreamLostError: the stream ended before END or ERROR: the answer is cut.
            RefusedError: ERROR came, before the answer or in its middle.
            ReceiptError: END came with a receipt that does not hold.
            RemoteProtocolError, PeerTimeoutError: the peer broke the rules, or went silent.
        """
        while self.receipt is None:
            pieces: list[bytes] = []
            if self._has_more:
                self._unpack(b"", pieces)
            while self._events and not self._has_more:
                event = self._events.pop(0)
                if isinstance(event, DataReceived):
                    if self._decoder is None:
                        pieces.append(event.data)
                    else:
                        self._unpack(event.data, pieces)
                elif pieces and isinstance(event, EndReceived | ErrorReceived | CheckpointReceived):
                    self._events.insert(0, event)
                    break
                else:
                    await self._handle(event)
            if pieces:
                data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
                self._digest.update(data)
                self._answer_bytes += len(data)
                if self._chunks is not None:
                    self._chunks += data.count(b"\n\n")
                return data
            if self.receipt is None:
                self._events = await self._read()
        return None

    def _unpack(self, data: bytes, pieces: list[bytes]) -> None:
        """Decompress ``data`` behind ``pieces``, until these are full: what is over it waits, compressed."""
        assert self._decoder is not None
        if not pieces:
            self._room = compression.PIECE_BYTES
        piece = self._decoder.decode(data, self._room)
        self._room -= len(piece)
        self._has_more = self._room == 0
        if piece:
            pieces.append(piece)

    async def wait_first(self) -> None:
        """Wait until any frame of the answer has come. Raises as ``receive`` does."""
        while self.head is None and self.receipt is None:
            if not self._events:
                self._events = await self._read()
            if isinstance(self._events[0], DataReceived | EndReceived):
                return
            await self._handle(self._events.pop(0))

    async def _read(self) -> list[Event]:
        machine = self.link.machine
        while True:
            data = await self.link.receive()
            if not data:
                before = machine.receive_eof()
                if before is State.PENDING:
                    raise PeerUnreachableError(f"{self.peer.short()} closed the stream without an answer")
                raise StreamLostError(f"{self.peer.short()} was lost in the middle of its answer")
            try:
                events = machine.receive(data)
            except RemoteProtocolError as exc:
                raise RemoteProtocolError(f"{self.peer.short()} broke the protocol: {exc}", code=exc.code) from exc
            if events:
                return events

    async def _handle(self, event: Event) -> None:
        match event:
            case HeadReceived():
                self.head = event
                if event.encoding != pb.ENCODING_IDENTITY:
                    self._decoder = compression.Decoder(event.encoding)
                if not self._call.max_price.is_free and event.content_type.startswith("text/event-stream"):
                    self._chunks = 0
            case ErrorReceived(error=error):
                raise error
            case EndReceived(receipt=envelope):
                if self._decoder is not None:
                    self._decoder.finish()
                self._on_end(envelope)
            case CheckpointReceived(envelope=envelope):
                self._on_checkpoint(envelope)
            case PingReceived(payload=payload):
                await self.link.send(self.link.machine.pong(payload))
            case PongReceived():
                self.link.note_pong()
            case _:
                pass  # GOAWAY: the machine remembers it

    def _on_end(self, envelope: bytes) -> None:
        claims = check_receipt(
            envelope,
            client=self._signer.peer,
            executor=self.peer,
            request_digest=hashlib.sha256(self.sent.request).digest(),
            request=self._claims,
            answer_digest=self._digest.digest(),
            answer_bytes=self._answer_bytes,
        )
        sent, body = self.sent, self._call.body
        doubts = doubts_of(claims, body_bytes=None if b'_url"' in body else len(body), chunks=self._chunks)
        ack = seal_ack(envelope, self._signer)
        sent.receipt = Receipt(claims, sent.exchange, envelope, sent.request, sent.salt, ack, doubts)

    def _on_checkpoint(self, envelope: bytes) -> None:
        sent = self.sent
        claims = check_checkpoint(
            envelope,
            client=self._signer.peer,
            executor=self.peer,
            request_digest=hashlib.sha256(sent.request).digest(),
            request=self._claims,
            answer_digest=self._digest.digest(),
            answer_bytes=self._answer_bytes,
            before=None if sent.checkpoint is None else sent.checkpoint.claims,
        )
        sent.checkpoint = Receipt(claims, sent.exchange, envelope, sent.request, sent.salt, b"")
        self.on_checkpoint(claims)


@asynccontextmanager
async def open_exchange(
    pool: StreamPool, signer: Signer, peer: PeerId, call: Call, on_sent: Callable[[Sent], None] = lambda sent: None
) -> AsyncGenerator[Exchange]:
    """Send ``call`` to ``peer`` and wait for the first frame of its answer.

    ``on_sent`` gets every REQUEST right before its first byte goes out: none that may have arrived is unknown to it.

    A REUSED stream that ends before any frame, or refuses because it is stale, is replaced once by a fresh one; the
    request is signed anew under the same idempotency key. Leaving the context before the receipt is there closes the
    stream at once, which is how a cancellation reaches the executor.

    Raises: as ``StreamPool.acquire`` and ``Exchange.receive``.
    """
    exchange = await _begin(pool, signer, peer, call, on_sent)
    link = exchange.link
    try:
        yield exchange
    except BaseException:
        pool.discard(link)
        raise
    if exchange.receipt is None:
        pool.discard(link)
        return
    ack = link.machine.ack(exchange.receipt.exchange, exchange.receipt.ack)
    if link.stream.send_nowait(ack):
        pool.release(link)
    else:
        pool.discard(link)  # its buffer is full: cheaper to open another stream than to wait here


async def _begin(
    pool: StreamPool, signer: Signer, peer: PeerId, call: Call, on_sent: Callable[[Sent], None]
) -> Exchange:
    link = await pool.acquire(peer)
    was_reused = link.exchanges > 0
    try:
        return await _send(pool, link, signer, call, on_sent)
    except RefusedError as exc:
        if not was_reused or exc.code not in RETRY_FRESH_CODES:
            raise
    except PeerUnreachableError:
        if not was_reused:
            raise
    link = await pool.acquire(peer, fresh=True)
    return await _send(pool, link, signer, call, on_sent)


async def _send(pool: StreamPool, link: Link, signer: Signer, call: Call, on_sent: Callable[[Sent], None]) -> Exchange:
    machine = link.machine
    if len(call.body) > link.accepted.max_body_bytes:
        pool.release(link)
        raise RefusedError(
            f"the body has {len(call.body)} bytes; {link.peer.short()} takes {link.accepted.max_body_bytes}",
            code="body_too_large",
            http_status=413,
        )
    salt = os.urandom(SALT_BYTES)
    claims = pb.RequestClaims(
        request_id=call.request_id,
        executor=link.peer.raw,
        issued_at_ms=pool.now_ms() + link.clock_offset_ms,
        challenge=link.accepted.challenge,
        exchange=machine.exchange + 1,
        deadline_ms=call.deadline_ms,
        operation=call.operation,  # type: ignore[arg-type]
        model=call.model,
        body_digest=salted_digest(salt, call.body),
        max_price=price_message(call.max_price),
        quote_id=call.quote_id,
        max_cost=call.max_cost or 0,
        max_cost_set=call.max_cost is not None,
        priority=call.priority,
        idempotency_key=call.idempotency_key,
        traceparent=call.traceparent,
    )
    sent = Sent(link.peer, machine.exchange + 1, seal_request(claims, signer), salt)
    try:
        link.exchanges += 1
        link.last_received_at = trio.current_time()
        link.ping_misses = 0
        packed = None
        if len(call.body) >= compression.MIN_BYTES and pool.takes_compressed(link.peer):
            packed = await _packed(call.body)
        on_sent(sent)
        if packed is None:
            frames = machine.request(sent.request, salt, call.body)
        else:
            frames = machine.request(sent.request, salt, packed, pb.ENCODING_ZSTD, len(call.body))
        for data in frames:
            await link.send(data)
        exchange = Exchange(link, signer, call, claims, sent)
        await exchange.wait_first()
        exchange.first_at = trio.current_time()
    except RefusedError as exc:
        # The machine is idle again unless the refusal came before the whole body was sent. A stale stream is not kept.
        if machine.state is State.IDLE and exc.code not in RETRY_FRESH_CODES:
            pool.release(link)
        else:
            pool.discard(link)
        raise
    except BaseException:
        pool.discard(link)
        raise
    return exchange


async def _packed(body: bytes) -> bytes | None:
    """``body`` compressed, None when that brings nothing."""
    if len(body) <= compression.IN_THREAD_BYTES:
        packed = compression.compress(body)
    else:
        packed = await trio.to_thread.run_sync(compression.compress, body, abandon_on_cancel=True)
    return packed if len(packed) < len(body) else None

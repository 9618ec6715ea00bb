"""One stream of ``/lloom/request/1.0.0`` as two state machines, the requester's and the responder's. Sans-IO.

Bytes go in by ``receive``, events come out; the methods that speak return the bytes to send. All transitions of the
wire are in this file. Once per stream ``OPEN -> ACCEPT``; then exchanges one at a time::

    REQUEST BODY*  ->  HEAD? (DATA | CHECKPOINT)* (END | ERROR)        ACK after END, GOAWAY and PING/PONG in between

A misuse by us raises LocalProtocolError (a bug). Anything else that the far side may send raises
RemoteProtocolError, after which the machine stays broken and the stream is reset.
Source: PROTOCOL.md, Exchange. The shape follows h11.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from google.protobuf.message import DecodeError

from lloom_sidecar.errors import LloomError, LocalProtocolError, RefusedError, RemoteProtocolError

from .claims import MAX_CURRENCY_CHARACTERS, price_message
from .framing import MAX_FRAME_BYTES, FrameCutter, frame
from .names import VERSION_MAJOR, VERSION_MINOR
from .offers import Price
from .pb import lloom_pb2 as pb
from .varint import decode_varint, encode_varint

CHALLENGE_BYTES: Final = 16
SALT_BYTES: Final = 16
MAX_DATA_BYTES: Final = MAX_FRAME_BYTES - 8
"""Most bytes in one BODY or DATA frame: the frame's limit less a tag and a length."""
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
"""Largest request body; a node may set less. Source: PROTOCOL.md, Limits."""
MAX_ERROR_BODY_BYTES: Final = 32 * 1024
MAX_ERROR_TEXT_BYTES: Final = 1000
MAX_CONTENT_TYPE_BYTES: Final = 200
MAX_UNACKED: Final = 8
"""Ended exchanges whose ACK may still come; older ones are forgotten."""

_ERROR_CODE: Final = re.compile(r"[a-z0-9_]{1,40}")
_TAG_BODY: Final = 0x22
_TAG_DATA: Final = 0x32
"""Field 4 and 6, length-delimited: these two are cut by hand, since nearly all frames are one of them."""


class State(Enum):
    """Where a stream stands. The same names serve both sides."""

    NEW = "new"
    OPENING = "opening"
    """Requester: OPEN was sent, ACCEPT has not come. Responder: OPEN came, ACCEPT was not sent."""
    IDLE = "idle"
    """Open, no exchange under way."""
    BODY = "body"
    """Responder: REQUEST came, its body is not complete."""
    DISCARDING = "discarding"
    """Responder: refused before the body was complete; what still comes of it is dropped."""
    PENDING = "pending"
    """Requester: REQUEST was sent, no frame of the answer has come."""
    ANSWERING = "answering"
    CLOSED = "closed"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class OpenReceived:
    """The requester's first frame; answer it with ``accept``, or ``error`` and close."""

    version_major: int
    version_minor: int


@dataclass(frozen=True, slots=True)
class Accepted:
    """The far sidecar is there and serves this stream: only now is it open."""

    now_ms: int
    """The responder's clock, Unix milliseconds."""
    challenge: bytes
    max_streams: int
    max_body_bytes: int


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A REQUEST frame; nothing in it has been checked but its lengths."""

    exchange: int
    """1 for the stream's first exchange."""
    envelope: bytes
    salt: bytes
    body_length: int
    encoding: int
    body_size: int
    """Of a compressed body: its bytes before that."""


@dataclass(frozen=True, slots=True)
class BodyReceived:
    """Bytes of the request's body, as sent; empty while a refused body is being dropped."""

    data: bytes
    is_last: bool


@dataclass(frozen=True, slots=True)
class HeadReceived:
    """What the answer's DATA is."""

    content_type: str
    encoding: int
    backend_us: int
    """What of the waiting time was the responder's queue and backend, in microseconds; its own word."""


@dataclass(frozen=True, slots=True)
class DataReceived:
    """Bytes of the answer, as sent."""

    data: bytes


@dataclass(frozen=True, slots=True)
class CheckpointReceived:
    """A receipt for the part of a priced answer that came so far; unchecked."""

    envelope: bytes


@dataclass(frozen=True, slots=True)
class EndReceived:
    """The answer is complete, if the receipt holds."""

    receipt: bytes
    """Envelope of kind receipt, unchecked."""


@dataclass(frozen=True, slots=True)
class ErrorReceived:
    """The exchange failed at the responder; ``during`` is the state it ended."""

    error: RefusedError
    during: State


@dataclass(frozen=True, slots=True)
class AckReceived:
    """A countersignature for an ended exchange; unchecked."""

    exchange: int
    envelope: bytes


@dataclass(frozen=True, slots=True)
class GoAwayReceived:
    """The responder serves no further exchange on this stream; one under way goes on."""

    reason: str
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class PingReceived:
    """Answer with ``pong(payload)``."""

    payload: int


@dataclass(frozen=True, slots=True)
class PongReceived:
    """The answer to our PING with this payload."""

    payload: int


Event = (
    OpenReceived
    | Accepted
    | RequestReceived
    | BodyReceived
    | HeadReceived
    | DataReceived
    | CheckpointReceived
    | EndReceived
    | ErrorReceived
    | AckReceived
    | GoAwayReceived
    | PingReceived
    | PongReceived
)


def error_frame(error: LloomError, *, body: bytes = b"") -> pb.Error:
    """``error`` as the wire carries it. Only its code, sentence and advice travel, never its cause."""
    retry_after_ms = 0 if error.retry_after_s is None else max(1, round(error.retry_after_s * 1000))
    price = error.details.get("price")
    return pb.Error(
        code=error.code,
        message=error.message[: MAX_ERROR_TEXT_BYTES // 4],
        http_status=error.http_status,
        retryable=error.retryable,
        retry_after_ms=min(retry_after_ms, 2**32 - 1),
        body=body if len(body) <= MAX_ERROR_BODY_BYTES else b"",
        price=price_message(price) if isinstance(price, Price) else None,
    )


def _refusal(message: pb.Error) -> RefusedError:
    if (
        _ERROR_CODE.fullmatch(message.code) is None
        or len(message.message) > MAX_ERROR_TEXT_BYTES
        or len(message.body) > MAX_ERROR_BODY_BYTES
    ):
        raise RemoteProtocolError("an ERROR frame over its limits", code="bad_frame")
    return RefusedError(
        message.message or message.code,
        code=message.code,
        http_status=message.http_status if 400 <= message.http_status <= 599 else 502,
        retryable=message.retryable,
        retry_after_s=message.retry_after_ms / 1000 if message.retry_after_ms else None,
        body=message.body or None,
        details={"price": _price(message.price)} if message.HasField("price") else None,
    )


def _price(message: pb.Price) -> Price:
    price = Price(message.prompt_per_million, message.completion_per_million, message.currency)
    if len(price.currency) > MAX_CURRENCY_CHARACTERS or not price.currency.isprintable():
        raise RemoteProtocolError("an ERROR frame over its limits", code="bad_frame")
    return price


class _Stream:
    """What both sides share: cutting, ping, the broken state."""

    def __init__(self) -> None:
        self.state = State.NEW
        self.exchange = 0
        """Number of the exchange under way, or of the last one; 0 before the first."""
        self._cutter = FrameCutter(MAX_FRAME_BYTES)

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes that arrived; returns the events that they complete, in order.

        Raises:
            RemoteProtocolError: the far side broke the rules; the events of this call are lost, the stream is to be
                reset.
            LocalProtocolError: the stream was broken before.

        What follows an ERROR that refused the stream is dropped.
        """
        if self.state is State.BROKEN:
            raise LocalProtocolError("bytes were fed to a stream that is broken")
        events: list[Event] = []
        try:
            for message in () if self._is_closed else self._cutter.feed(data):
                events.append(self._take(message))
                if self._is_closed:
                    break
        except RemoteProtocolError:
            self.state = State.BROKEN
            raise
        return events

    @property
    def _is_closed(self) -> bool:
        return self.state is State.CLOSED

    def receive_eof(self) -> State:
        """The far side closed. Returns the state that this ended: all but IDLE is a failure of what was under way."""
        before, self.state = self.state, State.CLOSED
        return State.BROKEN if before is State.IDLE and self._cutter.has_partial else before

    def ping(self, payload: int) -> bytes:
        """PING, only sent while somebody reads. ``payload``: 0 to 2**64 - 1."""
        return self._send(pb.Frame(ping=pb.Ping(payload=payload)))

    def pong(self, payload: int) -> bytes:
        """The answer to a PING."""
        return self._send(pb.Frame(pong=pb.Pong(payload=payload)))

    def _send(self, message: pb.Frame) -> bytes:
        if self.state in (State.NEW, State.CLOSED, State.BROKEN):
            raise LocalProtocolError(f"a frame was to be sent on a stream that is {self.state.value}")
        raw = message.SerializeToString()
        if len(raw) > MAX_FRAME_BYTES:
            raise LocalProtocolError(f"a frame of {len(raw)} bytes was to be sent; {MAX_FRAME_BYTES} is the limit")
        return frame(raw)

    def _take(self, message: bytes) -> Event:
        if message and (message[0] == _TAG_DATA or message[0] == _TAG_BODY):
            return self._bytes_event(message[0], _only_field(message))
        try:
            parsed = pb.Frame.FromString(message)
        except DecodeError as exc:
            raise RemoteProtocolError("bytes that are no frame", code="bad_frame") from exc
        kind = parsed.WhichOneof("kind")
        if kind == "ping":
            self._expect(kind, self.state is not State.NEW)
            return PingReceived(parsed.ping.payload)
        if kind == "pong":
            self._expect(kind, self.state is not State.NEW)
            return PongReceived(parsed.pong.payload)
        return self._event(kind, parsed)

    def _bytes_event(self, tag: int, data: bytes) -> Event:
        raise NotImplementedError

    def _event(self, kind: str | None, message: pb.Frame) -> Event:
        raise NotImplementedError

    def _expect(self, kind: str | None, allowed: bool) -> None:
        if not allowed:
            raise self._unexpected(kind)

    def _unexpected(self, kind: str | None) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"a frame of kind {kind or 'unknown'} while the stream was {self.state.value}", code="unexpected_frame"
        )

    def _demand(self, action: str, *states: State) -> None:
        if self.state not in states:
            raise LocalProtocolError(f"{action} while the stream was {self.state.value}")


class RequesterStream(_Stream):
    """The side that opened the stream and sends requests."""

    def __init__(self) -> None:
        super().__init__()
        self.accepted: Accepted | None = None
        self.is_draining = False
        """True after GOAWAY: no further exchange may begin."""
        self._unacked: set[int] = set()

    def open(self) -> bytes:
        """The first frame of the stream."""
        self._demand("open", State.NEW)
        self.state = State.OPENING
        return self._send(pb.Frame(open=pb.Open(version_major=VERSION_MAJOR, version_minor=VERSION_MINOR)))

    def request(
        self, envelope: bytes, salt: bytes, body: bytes, encoding: int = pb.ENCODING_IDENTITY, body_size: int = 0
    ) -> list[bytes]:
        """Begin the next exchange: the REQUEST frame, then the body in frames of at most 64 KiB.

        ``body`` is as it is sent; when ``encoding`` is another than identity, it had ``body_size`` bytes before.

        The first element may be sent alone; small bodies are joined to it, one write for both.
        """
        self._demand("request", State.IDLE)
        if self.is_draining:
            raise LocalProtocolError("request on a stream that said GOAWAY")
        self.exchange += 1
        self.state = State.PENDING
        head = self._send(
            pb.Frame(
                request=pb.Request(
                    envelope=envelope,
                    salt=salt,
                    body_length=len(body),
                    encoding=encoding,  # type: ignore[arg-type]
                    body_size=body_size,
                )
            )
        )
        if len(body) <= MAX_DATA_BYTES:
            return [head + _bytes_frame(_TAG_BODY, body)] if body else [head]
        return [head, *_bytes_frames(_TAG_BODY, body)]

    def ack(self, exchange: int, envelope: bytes) -> bytes:
        """Countersign the receipt of an ended exchange, once, while fewer than 8 others have begun after it.

        Raises LocalProtocolError otherwise: the responder has forgotten it and would reset the stream.
        """
        if not self.is_ack_awaited(exchange):
            raise LocalProtocolError(f"ack for exchange {exchange}, which did not end, was acknowledged or is too old")
        self._unacked.discard(exchange)
        return self._send(pb.Frame(ack=pb.Ack(exchange=exchange, envelope=envelope)))

    def is_ack_awaited(self, exchange: int) -> bool:
        """True while ``ack`` may be sent for ``exchange``."""
        return exchange in self._unacked and exchange > self.exchange - MAX_UNACKED

    def _bytes_event(self, tag: int, data: bytes) -> Event:
        self._expect("data" if tag == _TAG_DATA else "body", tag == _TAG_DATA and self._is_awaiting_answer)
        self.state = State.ANSWERING
        return DataReceived(data)

    @property
    def _is_awaiting_answer(self) -> bool:
        return self.state is State.PENDING or self.state is State.ANSWERING

    def _event(self, kind: str | None, message: pb.Frame) -> Event:
        if kind == "accept":
            self._expect(kind, self.state is State.OPENING)
            accept = message.accept
            if len(accept.challenge) != CHALLENGE_BYTES:
                raise RemoteProtocolError("an ACCEPT without a challenge of 16 bytes", code="bad_frame")
            self.state = State.IDLE
            self.accepted = Accepted(accept.now_ms, accept.challenge, accept.max_streams, accept.max_body_bytes)
            return self.accepted
        if kind == "error":
            self._expect(kind, self._is_awaiting_answer or self.state is State.OPENING)
            during = self.state
            self.state = State.CLOSED if during is State.OPENING else State.IDLE
            return ErrorReceived(_refusal(message.error), during)
        if kind == "go_away":
            self._expect(kind, self.state is not State.NEW)
            self.is_draining = True
            retry = message.go_away.retry_after_ms
            return GoAwayReceived(message.go_away.reason[:200], retry / 1000 if retry else None)
        self._expect(kind, self._is_awaiting_answer)
        if kind == "head":
            self._expect(kind, self.state is State.PENDING)
            content_type = message.head.content_type
            is_header_value = content_type.isascii() and content_type.isprintable()  # it becomes one, towards the app
            if not is_header_value or len(content_type) > MAX_CONTENT_TYPE_BYTES:
                raise RemoteProtocolError("a HEAD whose content type is no header value", code="bad_frame")
            self.state = State.ANSWERING
            return HeadReceived(content_type, message.head.encoding, message.head.backend_us)
        if kind == "checkpoint":
            self.state = State.ANSWERING
            return CheckpointReceived(message.checkpoint.envelope)
        if kind == "end":
            self.state = State.IDLE
            self._unacked = {n for n in self._unacked if n > self.exchange - MAX_UNACKED} | {self.exchange}
            return EndReceived(message.end.receipt)
        raise self._unexpected(kind)


class ResponderStream(_Stream):
    """The side that a stream was opened to and that answers."""

    def __init__(self, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        super().__init__()
        self._max_body_bytes = max_body_bytes
        self._body_left = 0
        self._unacked: list[int] = []
        self._has_begun_answer = False

    def accept(self, *, now_ms: int, challenge: bytes, max_streams: int) -> bytes:
        """Say that this stream is served. ``challenge``: 16 random bytes, never used for another stream."""
        self._demand("accept", State.OPENING)
        self.state = State.IDLE
        return self._send(
            pb.Frame(
                accept=pb.Accept(
                    now_ms=now_ms,
                    challenge=challenge,
                    max_streams=max_streams,
                    max_body_bytes=self._max_body_bytes,
                    version_minor=VERSION_MINOR,
                )
            )
        )

    def head(self, content_type: str, *, backend_us: int = 0, encoding: int = pb.ENCODING_IDENTITY) -> bytes:
        """What the DATA that follows is, and how long the backend took to begin it."""
        self._demand("head", State.ANSWERING)
        if self._has_begun_answer:
            raise LocalProtocolError("head after the answer had begun")
        self._has_begun_answer = True
        head = pb.Head(content_type=content_type, encoding=encoding, backend_us=min(backend_us, 2**32 - 1))  # type: ignore[arg-type]
        return self._send(pb.Frame(head=head))

    def data(self, data: bytes) -> bytes:
        """Bytes of the answer, in as many frames as they need."""
        self._demand("data", State.ANSWERING)
        self._has_begun_answer = True
        if len(data) <= MAX_DATA_BYTES:
            return _bytes_frame(_TAG_DATA, data)
        return b"".join(_bytes_frames(_TAG_DATA, data))

    def checkpoint(self, envelope: bytes) -> bytes:
        """A receipt for the DATA so far; ``envelope`` is of kind checkpoint."""
        self._demand("checkpoint", State.ANSWERING)
        self._has_begun_answer = True
        return self._send(pb.Frame(checkpoint=pb.Checkpoint(envelope=envelope)))

    def end(self, receipt: bytes) -> bytes:
        """The answer is complete; ``receipt`` is an envelope of kind receipt."""
        self._demand("end", State.ANSWERING)
        self.state = State.IDLE
        self._unacked = [*self._unacked[-MAX_UNACKED + 1 :], self.exchange]
        return self._send(pb.Frame(end=pb.End(receipt=receipt)))

    def error(self, error: LloomError, *, body: bytes = b"") -> bytes:
        """The exchange (or, before ACCEPT, the stream) failed. ``body``: the backend's own error document."""
        self._demand("error", State.OPENING, State.BODY, State.ANSWERING)
        data = self._send(pb.Frame(error=error_frame(error, body=body)))
        if self.state is State.OPENING:
            self.state = State.CLOSED
        elif self.state is State.BODY:
            self.state = State.DISCARDING
        else:
            self.state = State.IDLE
        return data

    def go_away(self, reason: str, retry_after_s: float = 0.0) -> bytes:
        """Ask for no further exchange on this stream."""
        return self._send(pb.Frame(go_away=pb.GoAway(reason=reason, retry_after_ms=round(retry_after_s * 1000))))

    def _bytes_event(self, tag: int, data: bytes) -> Event:
        self._expect(
            "body" if tag == _TAG_BODY else "data",
            tag == _TAG_BODY and (self.state is State.BODY or self.state is State.DISCARDING),
        )
        if not data or len(data) > self._body_left:
            raise RemoteProtocolError("a BODY frame that is empty or over the body's length", code="bad_frame")
        self._body_left -= len(data)
        is_last = self._body_left == 0
        if self.state is State.DISCARDING:
            if is_last:
                self.state = State.IDLE
            return BodyReceived(b"", is_last)
        if is_last:
            self.state = State.ANSWERING
        return BodyReceived(data, is_last)

    def _event(self, kind: str | None, message: pb.Frame) -> Event:
        if kind == "open":
            self._expect(kind, self.state is State.NEW)
            self.state = State.OPENING
            return OpenReceived(message.open.version_major, message.open.version_minor)
        if kind == "request":
            self._expect(kind, self.state is State.IDLE)
            request = message.request
            if len(request.salt) != SALT_BYTES:
                raise RemoteProtocolError("a REQUEST without a salt of 16 bytes", code="bad_frame")
            if request.body_length > self._max_body_bytes:
                raise RemoteProtocolError(
                    f"a body of {request.body_length} bytes; this node takes {self._max_body_bytes}", code="oversize"
                )
            self.exchange += 1
            self._has_begun_answer = False
            self._body_left = request.body_length
            self.state = State.BODY if self._body_left else State.ANSWERING
            return RequestReceived(
                self.exchange,
                request.envelope,
                request.salt,
                request.body_length,
                request.encoding,
                request.body_size,
            )
        if kind == "ack":
            self._expect(kind, self.state is not State.NEW and message.ack.exchange in self._unacked)
            self._unacked.remove(message.ack.exchange)
            return AckReceived(message.ack.exchange, message.ack.envelope)
        raise self._unexpected(kind)


def _only_field(message: bytes) -> bytes:
    """The payload of a frame whose only field is length-delimited."""
    try:
        decoded = decode_varint(message, 1, MAX_FRAME_BYTES)
    except ValueError as exc:
        raise RemoteProtocolError(f"a frame that cannot be read: {exc}", code="bad_frame") from exc
    if decoded is None or decoded[1] + decoded[0] != len(message):
        raise RemoteProtocolError("a BODY or DATA frame with something behind its bytes", code="bad_frame")
    return message[decoded[1] :]


def _bytes_frame(tag: int, data: bytes) -> bytes:
    inner = encode_varint(len(data))
    return b"".join((encode_varint(1 + len(inner) + len(data)), bytes((tag,)), inner, data))


def _bytes_frames(tag: int, data: bytes) -> list[bytes]:
    return [_bytes_frame(tag, data[i : i + MAX_DATA_BYTES]) for i in range(0, len(data), MAX_DATA_BYTES)]

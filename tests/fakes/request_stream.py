"""The far side of request streams, in this process: a daemon that opens them over socket pairs, a scripted responder.

    daemon = FakeStreamDaemon(nursery)
    daemon.play(serve())                      # the script of every stream that is opened from now on
    pool = StreamPool(lambda: daemon, ...)

The frames are made by the protocol's own ``ResponderStream``, so that a script can only break the rules on purpose,
with ``send_raw``.
"""

from __future__ import annotations

import hashlib
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from lloom_sidecar.errors import LloomError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.p2p.errors import StreamClosedError
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.claims import owed_cost, seal_checkpoint, seal_receipt
from lloom_sidecar.protocol.envelope import Signer, open_envelope
from lloom_sidecar.protocol.exchange import (
    AckReceived,
    BodyReceived,
    Event,
    OpenReceived,
    PingReceived,
    RequestReceived,
    ResponderStream,
)
from lloom_sidecar.protocol.names import KIND_REQUEST, PROTOCOL_REQUEST
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

CLIENT = Signer(b"c" * 32)
EXECUTOR = Signer(b"e" * 32)
ADDR = Multiaddr.parse("/ip4/10.0.0.1/tcp/4001")
NOW_MS = 1_790_000_000_000


def stream_pair(
    near: PeerId, far: PeerId, *, protocol: str = PROTOCOL_REQUEST, buffer_bytes: int | None = None
) -> tuple[P2PStream, P2PStream]:
    """Two ends of one stream: the first is ``near``'s (its peer is ``far``), the second ``far``'s."""
    socks = socket.socketpair()
    for sock in socks:
        sock.setblocking(False)
        if buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    return P2PStream(socks[0], far, ADDR.raw, protocol), P2PStream(socks[1], near, ADDR.raw, protocol)


@dataclass
class Asked:
    """One request as the responder got it."""

    exchange: int
    envelope: bytes
    salt: bytes
    body: bytes
    claims: pb.RequestClaims


class Responder:
    """One stream, seen from the executor. Its methods are a script's lines."""

    def __init__(self, stream: P2PStream, signer: Signer) -> None:
        self.stream = stream
        self.signer = signer
        self.machine = ResponderStream()
        self.acks: dict[int, bytes] = {}
        self.pings: list[int] = []
        self.answers_pings = True
        self._events: deque[Event] = deque()

    async def read(self) -> Event | None:
        """The next event; None at the stream's end. PINGs are answered and ACKs kept on the way."""
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, PingReceived):
                    self.pings.append(event.payload)
                    if self.answers_pings:
                        await self.send_raw(self.machine.pong(event.payload))
                elif isinstance(event, AckReceived):
                    self.acks[event.exchange] = event.envelope
                else:
                    return event
            data = await self.stream.receive_some()
            if not data:
                return None
            self._events.extend(self.machine.receive(data))

    async def accept(self, *, max_streams: int = 8, now_ms: int = NOW_MS, challenge: bytes = b"x" * 16) -> None:
        """Take OPEN, say ACCEPT."""
        assert isinstance(await self.read(), OpenReceived)
        await self.send_raw(self.machine.accept(now_ms=now_ms, challenge=challenge, max_streams=max_streams))

    async def refuse(self, error: LloomError) -> None:
        """Say ERROR, to OPEN or to a request."""
        await self.send_raw(self.machine.error(error))

    async def request(self) -> Asked | None:
        """The next request with its whole body; None when the requester closed first."""
        event = await self.read()
        if event is None:
            return None
        assert isinstance(event, RequestReceived)
        body = bytearray()
        while len(body) < event.body_length:
            piece = await self.read()
            if piece is None:
                return None
            assert isinstance(piece, BodyReceived)
            body += piece.data
        claims = pb.RequestClaims.FromString(open_envelope(event.envelope, KIND_REQUEST, expected_signer=None).payload)
        return Asked(event.exchange, event.envelope, event.salt, bytes(body), claims)

    def receipt(self, asked: Asked, answer: bytes, **changes: Any) -> bytes:
        """A receipt that fits, but for ``changes``."""
        return seal_receipt(self.statement(asked, answer, **changes), self.signer)

    def checkpoint(self, asked: Asked, answer: bytes, **changes: Any) -> bytes:
        """A checkpoint that fits, but for ``changes``."""
        return seal_checkpoint(self.statement(asked, answer, outcome=pb.OUTCOME_PARTIAL, **changes), self.signer)

    def statement(self, asked: Asked, answer: bytes, **changes: Any) -> pb.ReceiptClaims:
        """The claims of either; the cost follows from the usage."""
        usage = changes.get("usage", pb.Usage(prompt_tokens=3, completion_tokens=5))
        fields: dict[str, Any] = {
            "client": self.stream.peer.raw,
            "executor": self.signer.peer.raw,
            "request_digest": hashlib.sha256(asked.envelope).digest(),
            "answer_digest": hashlib.sha256(asked.salt + answer).digest(),
            "answer_bytes": len(answer),
            "model": asked.claims.model,
            "usage": usage,
            "usage_source": pb.USAGE_SOURCE_BACKEND,
            "price": asked.claims.max_price,
            "cost": owed_cost(asked.claims.max_price, usage, asked.claims),
            "outcome": pb.OUTCOME_COMPLETE,
        }
        return pb.ReceiptClaims(**(fields | changes))

    async def answer(self, asked: Asked, *pieces: bytes, **changes: Any) -> None:
        """HEAD, DATA for each piece, END; ``changes`` falsify the receipt."""
        await self.send_raw(self.machine.head("text/event-stream", backend_us=1500))
        for piece in pieces:
            await self.send_raw(self.machine.data(piece))
        await self.send_raw(self.machine.end(self.receipt(asked, b"".join(pieces), **changes)))

    async def send_raw(self, data: bytes) -> None:
        """Any bytes."""
        await self.stream.send_all(data)

    async def until_closed(self) -> None:
        """Read until the requester closes."""
        while await self.read() is not None:
            pass


Script = Callable[[Responder], Awaitable[None]]


def serve(*pieces: bytes, max_streams: int = 8) -> Script:
    """Answers request after request with the same pieces."""

    async def script(far: Responder) -> None:
        await far.accept(max_streams=max_streams)
        while (asked := await far.request()) is not None:
            await far.answer(asked, *(pieces or (b"data: hi\n\n",)))

    return script


@dataclass(eq=False)
class FakeStreamDaemon(Daemon):
    """A daemon that can only open streams; each is served by a script, in ``nursery``, and closed when that returns.

    Like the real one it proves nothing by opening: what the far side does is the script's. Unlike it there is no time
    between open_stream and the stream.
    """

    nursery: trio.Nursery
    signer: Signer = EXECUTOR
    buffer_bytes: int | None = None
    scripts: deque[Script] = field(default_factory=deque)
    responders: list[Responder] = field(default_factory=list)
    streams: list[P2PStream] = field(default_factory=list)
    """The near ends, as they were given out."""
    refusal: LloomError | None = None
    """Raised by open_stream instead."""
    hangs: bool = False
    """open_stream never returns."""

    def __post_init__(self) -> None:
        super().__init__(Multiaddr.parse("/unix/nowhere"))

    def play(self, *scripts: Script) -> None:
        """The scripts of the streams from now on, in order; the last one serves all the others."""
        self.scripts = deque(scripts)

    @property
    def opened(self) -> int:
        """Streams that were opened so far."""
        return len(self.responders)

    async def open_stream(self, peer: PeerId, protocol: str, *, timeout_s: float = 10.0) -> P2PStream:
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal
        if self.hangs:
            await trio.sleep_forever()
        near, far = stream_pair(CLIENT.peer, peer, protocol=protocol, buffer_bytes=self.buffer_bytes)
        script = self.scripts[0] if len(self.scripts) == 1 else self.scripts.popleft()
        responder = Responder(far, self.signer)
        self.streams.append(near)
        self.responders.append(responder)
        self.nursery.start_soon(self._run, script, responder)
        return near

    def close_streams(self) -> None:
        """Close both ends of all: a test's last line."""
        for stream in (*self.streams, *(responder.stream for responder in self.responders)):
            stream.close()

    async def _run(self, script: Script, responder: Responder) -> None:
        try:
            await script(responder)
        except StreamClosedError:
            pass  # the requester left
        finally:
            responder.stream.close()

"""A peer that a test plays by hand: a p2pd and a key of its own, no sidecar, every frame as the test wants it."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Generic, TypeVar

import trio

from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.p2p.errors import StreamClosedError
from lloom_sidecar.p2p.inbound import serve_inbound
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.framing import FrameCutter, frame
from lloom_sidecar.protocol.hello import Event, HelloAnswerer, HelloDone, HelloOpener, HelloRefused
from lloom_sidecar.protocol.names import PROTOCOL_HELLO, PROTOCOL_REQUEST
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.contract.binaries import RealNode, find_ours

from .node import Node

ANSWER_S = 20.0
"""How long any answer may take; an idle machine needs milliseconds."""


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


class HandPeer:
    """The peer. Its p2pd runs from ``__init__`` to ``stop``, outside any event loop, so it may serve many tests."""

    def __init__(self) -> None:
        self._node = RealNode(find_ours())
        self.signer = Signer.from_marshalled((self._node.directory / "identity.key").read_bytes())
        self.peer: PeerId = self._node.peer
        self.features: tuple[str, ...] = ()
        """What it states in hello."""

    def stop(self) -> None:
        """End its p2pd."""
        self._node.stop()

    def __enter__(self) -> HandPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def addrs(self) -> tuple[Multiaddr, ...]:
        """Where its p2pd listens."""
        return self._node.identity.addrs

    @property
    def address(self) -> str:
        """The same, one of them with /p2p, as ``--bootstrap`` takes it."""
        return f"{self.addrs[0]}/p2p/{self.peer}"

    @asynccontextmanager
    async def daemon(self, *to: Node) -> AsyncGenerator[Daemon]:
        """Its p2pd, connected to these nodes."""
        daemon = Daemon(self._node.control)
        try:
            for node in to:
                await daemon.connect(PeerId.parse(node.peer), [Multiaddr.parse(node.address)])
            yield daemon
        finally:
            daemon.close()

    @asynccontextmanager
    async def serving(self, handlers: dict[str, Callable[[P2PStream], Awaitable[None]]]) -> AsyncGenerator[Daemon]:
        """Answer these protocols by hand while the context lasts."""
        async with trio.open_nursery() as nursery:
            address: Multiaddr = await nursery.start(
                lambda task_status: serve_inbound(
                    self._node.directory / "hand.sock", handlers, max_streams=64, task_status=task_status
                )
            )
            async with self.daemon() as daemon:
                for protocol in handlers:
                    await daemon.register_handler(protocol, address)
                yield daemon
            nursery.cancel_scope.cancel()

    def info(self, *, roles: Sequence[pb.Role] = (pb.ROLE_CLIENT,), announcement: bytes = b"") -> pb.NodeInfo:
        """What it says of itself in hello."""
        return pb.NodeInfo(
            roles=roles, features=self.features, max_streams=64, announcement=announcement, now_ms=now_ms()
        )

    async def say_hello(
        self,
        daemon: Daemon,
        to: Node,
        keys: Sequence[NetworkKey] = (),
        *,
        is_open: bool = False,
        announcement: bytes = b"",
    ) -> Event:
        """A proper hello; returns HelloDone or HelloRefused."""
        peer = PeerId.parse(to.peer)
        stream = await daemon.open_stream(peer, PROTOCOL_HELLO)
        roles = (pb.ROLE_EXECUTOR,) if announcement else (pb.ROLE_CLIENT,)
        opener = HelloOpener(
            me=self.peer,
            peer=peer,
            keys=keys,
            is_open=is_open,
            node=self.info(roles=roles, announcement=announcement),
            nonce=os.urandom(32),
        )
        try:
            with trio.fail_after(ANSWER_S):
                await stream.send_all(opener.start())
                while data := await stream.receive_some():
                    out, events = opener.receive(data)
                    if out:
                        await stream.send_all(out)
                    for event in events:
                        if isinstance(event, HelloDone | HelloRefused):
                            return event
        finally:
            stream.close()
        raise AssertionError("the hello ended without an outcome")

    async def answer_hello(self, stream: P2PStream, keys: Sequence[NetworkKey]) -> None:
        """A proper answer to an inbound hello."""
        answerer = HelloAnswerer(
            me=self.peer, peer=stream.peer, keys=keys, is_open=False, node=self.info(), nonce=os.urandom(32)
        )
        while data := await stream.receive_some():
            out, _ = answerer.receive(data)
            if out:
                await stream.send_all(out)


FrameT = TypeVar("FrameT", pb.Frame, pb.HelloFrame)


class Wire(Generic[FrameT]):
    """Frames of one message type over a stream, whatever the rules say. Closes the stream at the end of its context."""

    def __init__(self, stream: P2PStream, kind: type[FrameT]) -> None:
        self.stream = stream
        self.received = b""
        """Every byte that came."""
        self._kind: type[FrameT] = kind
        self._cutter = FrameCutter()
        self._messages: list[bytes] = []

    async def send(self, *messages: FrameT) -> None:
        """Send frames, all in one write."""
        await self.send_raw(b"".join(frame(message.SerializeToString()) for message in messages))

    async def send_raw(self, data: bytes) -> None:
        """Send bytes."""
        await self.stream.send_all(data)

    async def receive(self) -> FrameT | None:
        """The next frame, None when the far side closed."""
        with trio.fail_after(ANSWER_S):
            while not self._messages:
                data = await self.stream.receive_some()
                if not data:
                    return None
                self.received += data
                self._messages = self._cutter.feed(data)
        message: FrameT = self._kind.FromString(self._messages.pop(0))
        return message

    async def receive_kind(self, kind: str) -> FrameT:
        """The next frame, which has to be of this kind."""
        message = await self.receive()
        assert message is not None, f"the stream ended where {kind} was due"
        assert message.WhichOneof("kind") == kind, message
        return message

    async def expect_end(self) -> None:
        """Wait until the far side closes; it may say nothing before."""
        with suppress(StreamClosedError):
            assert await self.receive() is None

    async def expect_silence(self) -> None:
        """The far side says nothing more, whether it closes or waits: it has a second, and needs milliseconds."""
        with trio.move_on_after(1):
            await self.expect_end()

    async def __aenter__(self) -> Wire[FrameT]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()


async def open_request_stream(daemon: Daemon, to: Node) -> tuple[Wire[pb.Frame], pb.Accept]:
    """A stream of the request protocol that the far sidecar has accepted."""
    wire = Wire(await daemon.open_stream(PeerId.parse(to.peer), PROTOCOL_REQUEST), pb.Frame)
    await wire.send(pb.Frame(open=pb.Open(version_major=1)))
    return wire, (await wire.receive_kind("accept")).accept

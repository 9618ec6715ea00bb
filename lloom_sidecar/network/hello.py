"""Saying hello: proving to each other that both belong to one network, over ``/lloom/hello/1.0.0``; and, on the same
stream, reading or serving a catalogue.

The frames and proofs are ``protocol/hello.py``; here are the streams, the deadlines, and the rule that a peer is
greeted once at a time.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import DaemonError, LloomError, PeerTimeoutError, PeerUnreachableError, RemoteProtocolError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.peers.peerbook import CataloguePage
from lloom_sidecar.protocol.hello import (
    CatalogueAsked,
    CatalogueEnd,
    CatalogueEntry,
    HelloAnswerer,
    HelloDone,
    HelloOpener,
    HelloRefused,
)
from lloom_sidecar.protocol.names import PROTOCOL_HELLO
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

HELLO_TIMEOUT_S: Final = 10.0
CATALOGUE_TIMEOUT_S: Final = 60.0
ENTRY_MARGIN_BYTES: Final = 32
"""What a catalogue entry adds to its two envelopes. Source: PROTOCOL.md, Catalogue."""
LINGER_S: Final = 30.0
"""How long the answerer keeps a finished hello open for a catalogue query."""
NONCE_BYTES: Final = 32

log = structlog.get_logger("lloom.hello")


class HelloRefusedError(PeerUnreachableError):
    """The peer does not deal with us: another network, another version, or a proof that does not hold."""

    code = "hello_refused"


@dataclass(frozen=True, slots=True)
class Greeted:
    """The outcome of a hello, from either side."""

    peer: PeerId
    addr: Multiaddr
    """Remote address of the connection."""
    is_member: bool
    network_id: bytes
    node: pb.NodeInfo
    rtt_s: float | None
    """Round trip of the first exchange of frames; None for the answerer."""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What a peer says it knows; nothing in it has been checked."""

    entries: list[CatalogueEntry]
    cursor: int
    """``since`` for the next time."""
    truncated: bool


class _UnderWay:
    """A hello that is being said, for those who wait for its outcome; without one it was cancelled."""

    __slots__ = ("done", "error", "greeted")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.greeted: Greeted | None = None
        self.error: LloomError | None = None


CatalogueSource = Callable[[str, int], CataloguePage]
"""(model filter or empty, since) -> page."""


class HelloService:
    """Opens hellos and answers them. ``on_greeted`` is called after every one that succeeded, on either side."""

    def __init__(
        self,
        *,
        me: PeerId,
        keys: Callable[[], Sequence[NetworkKey]],
        is_open: bool,
        node_info: Callable[[], pb.NodeInfo],
        get_daemon: Callable[[], Daemon],
        on_greeted: Callable[[Greeted], None],
        on_refused: Callable[[PeerId, str], None],
        catalogue: CatalogueSource | None,
        ban_of: Callable[[PeerId], str | None] = lambda peer: None,
    ) -> None:
        """``catalogue``: what to answer a query with; None = nothing. ``ban_of``: why a peer is banned, or None: it is
        neither greeted nor answered."""
        self._me = me
        self._keys = keys
        self._is_open = is_open
        self._node_info = node_info
        self._get_daemon = get_daemon
        self._on_greeted = on_greeted
        self._on_refused = on_refused
        self._catalogue = catalogue
        self._ban_of = ban_of
        self._under_way: dict[PeerId, _UnderWay] = {}

    async def greet(self, peer: PeerId) -> Greeted:
        """Say hello to a connected (or dialable) peer. One at a time per peer: whoever comes meanwhile gets the same
        outcome, and takes over when the first is cancelled.

        Raises:
            HelloRefusedError: the peer refused, or is of another network.
            PeerUnreachableError, PeerTimeoutError, RemoteProtocolError: no proper hello within 10 s.
            DaemonUnavailableError: p2pd does not answer.
        """
        while (first := self._under_way.get(peer)) is not None:
            await first.done.wait()
            if first.error is not None:
                raise first.error
            if first.greeted is not None:
                return first.greeted
        self._under_way[peer] = mine = _UnderWay()
        try:
            async with self._opened(peer) as (greeted, _, _):
                mine.greeted = greeted
                return greeted
        except LloomError as exc:
            mine.error = exc
            raise
        finally:
            self._under_way.pop(peer).done.set()

    async def read_catalogue(self, peer: PeerId, *, model: str = "", since: int = 0) -> Catalogue:
        """Say hello and read the peer's catalogue. Raises as ``greet`` does."""
        entries: list[CatalogueEntry] = []
        async with self._opened(peer) as (_, opener, stream):
            try:
                with trio.fail_after(CATALOGUE_TIMEOUT_S):
                    await stream.send_all(opener.catalogue_query(model, since))
                    while True:
                        data = await stream.receive_some()
                        if not data:
                            raise PeerUnreachableError(f"{peer.short()} closed its catalogue before the end")
                        for event in opener.receive(data)[1]:
                            if isinstance(event, CatalogueEntry):
                                entries.append(event)
                            elif isinstance(event, CatalogueEnd):
                                return Catalogue(entries, event.cursor, event.truncated)
            except trio.TooSlowError as exc:
                raise PeerTimeoutError(
                    f"{peer.short()} did not finish its catalogue in {CATALOGUE_TIMEOUT_S:.0f} s"
                ) from exc
            except DaemonError as exc:
                raise PeerUnreachableError(f"the stream to {peer.short()} closed: {exc}") from exc

    async def serve_stream(self, stream: P2PStream) -> None:
        """Answer one inbound hello, and a catalogue query behind it. Ends with the stream or after its deadline."""
        peer = stream.peer
        if self._ban_of(peer) is not None:
            return
        answerer = HelloAnswerer(
            me=self._me,
            peer=peer,
            keys=self._keys(),
            is_open=self._is_open,
            node=self._node_info(),
            nonce=os.urandom(NONCE_BYTES),
        )
        try:
            with trio.move_on_after(HELLO_TIMEOUT_S) as scope:
                while data := await stream.receive_some():
                    out, events = answerer.receive(data)
                    for event in events:
                        if isinstance(event, HelloDone):
                            scope.deadline = trio.current_time() + LINGER_S
                            self._on_greeted(
                                Greeted(peer, stream.addr, event.is_member, event.network_id, event.node, None)
                            )
                        elif isinstance(event, HelloRefused):
                            self._on_refused(peer, event.code)
                        elif isinstance(event, CatalogueAsked):
                            scope.deadline = trio.current_time() + CATALOGUE_TIMEOUT_S
                            await stream.send_all(out)
                            out = b""
                            await self._send_catalogue(answerer, stream, event)
                    if out:
                        await stream.send_all(out)
        except RemoteProtocolError as exc:
            self._on_refused(peer, exc.code)
            log.info("hello_failed", peer=str(peer), code=exc.code)
        except DaemonError:
            pass  # the opener left; what was greeted stays greeted

    async def _send_catalogue(self, answerer: HelloAnswerer, stream: P2PStream, asked: CatalogueAsked) -> None:
        page = self._catalogue(asked.model, asked.since) if self._catalogue is not None else None
        cursor, truncated = asked.since, False
        if page is not None:
            cursor, truncated, sent_cursor = page.cursor, page.truncated, asked.since
            for item in page.items:
                if len(item.full) + len(item.heartbeat) + ENTRY_MARGIN_BYTES > answerer.catalogue_bytes_left:
                    cursor, truncated = sent_cursor, True
                    break
                await stream.send_all(answerer.catalogue_entry(item.full, item.heartbeat, round(item.age_s * 1000)))
                sent_cursor = item.cursor
        await stream.send_all(answerer.catalogue_end(cursor, truncated))

    @asynccontextmanager
    async def _opened(self, peer: PeerId) -> AsyncIterator[tuple[Greeted, HelloOpener, P2PStream]]:
        ban = self._ban_of(peer)
        if ban is not None:
            raise PeerUnreachableError(f"{peer.short()} is banned ({ban})", code="kept_away")
        stream: P2PStream | None = None
        opener = HelloOpener(
            me=self._me,
            peer=peer,
            keys=self._keys(),
            is_open=self._is_open,
            node=self._node_info(),
            nonce=os.urandom(NONCE_BYTES),
        )
        try:
            try:
                with trio.fail_after(HELLO_TIMEOUT_S):
                    stream = await self._get_daemon().open_stream(peer, PROTOCOL_HELLO, timeout_s=HELLO_TIMEOUT_S)
                    greeted = await self._shake(peer, stream, opener)
            except trio.TooSlowError as exc:
                raise PeerTimeoutError(f"{peer.short()} did not answer hello within {HELLO_TIMEOUT_S:.0f} s") from exc
            except DaemonError as exc:
                if exc.code in ("daemon_unavailable", "daemon_timeout"):
                    raise
                raise PeerUnreachableError(f"no hello with {peer.short()}: {exc}") from exc
            except HelloRefusedError as exc:
                self._on_refused(peer, exc.code)
                raise
            self._on_greeted(greeted)
            yield greeted, opener, stream
        finally:
            if stream is not None:
                stream.close()

    async def _shake(self, peer: PeerId, stream: P2PStream, opener: HelloOpener) -> Greeted:
        began_at = trio.current_time()
        rtt_s: float | None = None
        await stream.send_all(opener.start())
        while data := await stream.receive_some():
            if rtt_s is None:
                rtt_s = trio.current_time() - began_at
            out, events = opener.receive(data)
            if out:
                await stream.send_all(out)
            for event in events:
                if isinstance(event, HelloRefused):
                    raise HelloRefusedError(
                        f"{peer.short()} refused hello: {event.message}", code=f"hello_{event.code}"[:40]
                    )
                if isinstance(event, HelloDone):
                    return Greeted(peer, stream.addr, event.is_member, event.network_id, event.node, rtt_s)
        raise PeerUnreachableError(f"{peer.short()} closed the stream in the middle of hello")

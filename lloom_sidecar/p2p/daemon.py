"""Typed calls to p2pd. Every call has one deadline; control connections are kept open between calls."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Generator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import trio

from lloom_sidecar.errors import DaemonRejectedError, DaemonUnavailableError, LocalProtocolError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p import messages as m
from lloom_sidecar.p2p.connector import ControlConnection
from lloom_sidecar.p2p.errors import DaemonProtocolError, DaemonTimeoutError, SubscriptionClosedError
from lloom_sidecar.p2p.stream import P2PStream, readable_multiaddr

MAX_IDLE_CONNECTIONS: Final = 8
"""Control connections kept open between calls; a call more just opens another."""
MAX_PUBLISH_BYTES: Final = 1024 * 1024 - 4096
"""Longest gossip message: over 1 MiB, with signature and names, it vanishes although PUBLISH answers OK."""
MAX_SUBSCRIPTION_FRAME_BYTES: Final = 1024 * 1024
"""Longest message that a subscription reads. Source: go-libp2p-pubsub's default maximum message size."""
_ANSWER_GRACE_S: Final = 1.0
"""p2pd is told the caller's timeout; its own words about it may take this much longer to arrive."""
_MAX_DHT_RESULTS: Final = 10_000
"""Most results read of one DHT request."""
_MAX_REASON_CHARS: Final = 500
"""p2pd's error texts list every address it tried; so much of one is kept."""

T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What IDENTIFY answers."""

    peer: PeerId
    """The daemon's own id."""
    addrs: tuple[Multiaddr, ...]
    """Addresses that it announces, without ``/p2p``; those of unknown kinds are left out."""


@dataclass(frozen=True)
class Connection:
    """A row of LIST_PEERS. One peer may have several."""

    peer: PeerId
    """Who is at the other end."""
    addr: Multiaddr
    """The far end's address as this node sees it."""


@dataclass(frozen=True)
class PeerAddrs:
    """A peer and where it may be reached, as the DHT tells."""

    peer: PeerId
    """The peer that was found."""
    addrs: tuple[Multiaddr, ...]
    """Its addresses; may be empty."""


@dataclass(frozen=True)
class TopicMessage:
    """One gossip message. The daemon has verified that ``sender`` signed it."""

    sender: PeerId
    """Who published it, which need not be who passed it on."""
    data: bytes
    """The payload."""
    seqno: int
    """The publisher's sequence number, big-endian on the wire; 0 when absent."""
    topics: tuple[str, ...]
    """Its topics; one in practice."""


class DhtResults(Generic[T]):
    """Results of a running DHT request, in the order they arrive: ``async for``.

    It ends when p2pd says so or at the deadline; what came until then counts. ``timed_out`` tells which it was.
    Raises while iterating: DaemonUnavailableError, DaemonProtocolError.
    """

    timed_out: bool
    """True when the deadline ended it before p2pd did."""

    def __init__(self, connection: ControlConnection, read: Callable[[m.DHTResponse], T], *, deadline: float) -> None:
        self.timed_out = False
        self._connection = connection
        self._read = read
        self._deadline = deadline
        self._left = _MAX_DHT_RESULTS
        self.is_complete = False

    def __aiter__(self) -> DhtResults[T]:
        return self

    async def __anext__(self) -> T:
        while not self.is_complete and not self.timed_out:
            with trio.move_on_at(self._deadline) as scope:
                message = m.parse(m.DHTResponse, await self._connection.receive())
            if scope.cancelled_caught:
                self.timed_out = True
                break
            if message.type == m.DHTResponse.END:
                self.is_complete = True
                break
            self._left -= 1
            if self._left < 0:
                self._connection.close()
                raise DaemonProtocolError(f"p2pd sent over {_MAX_DHT_RESULTS} results to one request")
            return self._read(message)
        raise StopAsyncIteration


class Subscription:
    """A joined topic. One task reads it and only drains: p2pd queues 32 messages and drops the rest."""

    topic: str
    """The topic's name."""
    malformed_total: int
    """Messages dropped because they named no sender."""

    def __init__(self, topic: str, connection: ControlConnection) -> None:
        self.topic = topic
        self.malformed_total = 0
        self._connection = connection

    async def receive(self) -> TopicMessage:
        """The next message, this node's own ones included. Waits for ever; ends when p2pd does.

        Cancelled: no message is lost.
        Raises: SubscriptionClosedError when p2pd ended it; FrameTooLargeError for a message over 1 MiB and
        DaemonProtocolError for garbage, which both end the subscription.
        """
        while True:
            try:
                body = await self._connection.receive_resumable()
            except DaemonUnavailableError as exc:
                raise SubscriptionClosedError(f"the subscription to {self.topic} ended: {exc}") from exc
            try:
                message = m.parse(m.PSMessage, body)
            except DaemonProtocolError:
                self._connection.close()
                raise
            try:
                sender = PeerId(getattr(message, "from"))
            except ValueError:
                self.malformed_total += 1
                continue
            return TopicMessage(sender, message.data, int.from_bytes(message.seqno, "big"), tuple(message.topicIDs))

    def close(self) -> None:
        """Leave the topic; idempotent. A waiting ``receive`` raises SubscriptionClosedError."""
        self._connection.close()


class Daemon:
    """One running p2pd, seen through its control socket. Any number of tasks may call at once.

    Every call raises DaemonUnavailableError when p2pd does not answer (DaemonTimeoutError, a kind of it, at the
    deadline), DaemonRejectedError with p2pd's text when it answers ERROR, DaemonProtocolError when the answer makes no
    sense. Cancelled, a call closes its control connection: p2pd may or may not have done what was asked.
    """

    control: Multiaddr
    """Where the control socket is."""

    def __init__(self, control: Multiaddr, *, call_timeout_s: float = 10.0) -> None:
        """Does no IO. ``call_timeout_s``: deadline of calls that p2pd answers by itself."""
        self.control = control
        self._call_timeout_s = call_timeout_s
        self._idle: list[ControlConnection] = []
        self._in_use: set[ControlConnection] = set()
        self._is_closed = False

    # -- the node itself ------------------------------------------------------------------------------------------

    async def identify(self, *, timeout_s: float | None = None) -> Identity:
        """The daemon's id and addresses."""
        response = await self._call(m.Request(type=m.Request.IDENTIFY), "IDENTIFY", timeout_s=timeout_s)
        return Identity(_peer_id(response.identify.id), _addresses(response.identify.addrs))

    async def missing_services(self) -> tuple[str, ...]:
        """Which of ``dht`` and ``pubsub`` this p2pd runs without. Asks without side effects.

        A p2pd that is just starting answers IDENTIFY some milliseconds before its pubsub is there.
        """
        missing = []
        probe = m.Request(type=m.Request.DHT, dht=m.DHTRequest(type=m.DHTRequest.GET_VALUE))
        if "not enabled" in await self._refusal(probe, "DHT"):
            missing.append("dht")
        probe = m.Request(type=m.Request.PUBSUB, pubsub=m.PSRequest(type=m.PSRequest.GET_TOPICS))
        if "not enabled" in await self._refusal(probe, "GET_TOPICS"):
            missing.append("pubsub")
        return tuple(missing)

    # -- connections ----------------------------------------------------------------------------------------------

    async def connect(self, peer: PeerId, addrs: Iterable[Multiaddr], *, timeout_s: float = 10.0) -> None:
        """Make sure of a connection to ``peer``; ``addrs`` may carry its ``/p2p``. Rejected when none can be had."""
        raw = [addr.without_peer().raw for addr in addrs]
        body = m.ConnectRequest(peer=peer.raw, addrs=raw, timeout=_whole_seconds(timeout_s))
        await self._call(m.Request(type=m.Request.CONNECT, connect=body), "CONNECT", timeout_s=_patience(timeout_s))

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to ``peer``; fine when there is none."""
        body = m.DisconnectRequest(peer=peer.raw)
        await self._call(m.Request(type=m.Request.DISCONNECT, disconnect=body), "DISCONNECT")

    async def list_peers(self) -> list[Connection]:
        """All open connections, one row each: a peer can come twice."""
        response = await self._call(m.Request(type=m.Request.LIST_PEERS), "LIST_PEERS")
        return [
            Connection(_peer_id(info.id), readable_multiaddr(info.addrs[0] if info.addrs else b""))
            for info in response.peers
        ]

    async def tag_peer(self, peer: PeerId, tag: str, weight: int) -> None:
        """Make ``trim`` and the connection manager spare the peer's connections the more, the higher ``weight`` is."""
        body = m.ConnManagerRequest(type=m.ConnManagerRequest.TAG_PEER, peer=peer.raw, tag=tag, weight=weight)
        await self._call(m.Request(type=m.Request.CONNMANAGER, connManager=body), "TAG_PEER")

    async def untag_peer(self, peer: PeerId, tag: str) -> None:
        """Take a tag away; fine when there is none."""
        body = m.ConnManagerRequest(type=m.ConnManagerRequest.UNTAG_PEER, peer=peer.raw, tag=tag)
        await self._call(m.Request(type=m.Request.CONNMANAGER, connManager=body), "UNTAG_PEER")

    async def trim(self) -> None:
        """Close connections down to the low water mark, those with live streams too."""
        body = m.ConnManagerRequest(type=m.ConnManagerRequest.TRIM)
        await self._call(m.Request(type=m.Request.CONNMANAGER, connManager=body), "TRIM")

    # -- streams --------------------------------------------------------------------------------------------------

    async def open_stream(self, peer: PeerId, protocol: str, *, timeout_s: float = 10.0) -> P2PStream:
        """A stream to ``peer``, dialled if need be.

        It proves nothing yet: p2pd answers OK for streams that the far side then refuses, so the far sidecar has to
        speak before the stream counts as open. Rejected when the peer cannot be dialled or does not know the protocol.
        """
        body = m.StreamOpenRequest(peer=peer.raw, proto=[protocol], timeout=_whole_seconds(timeout_s))
        request = m.Request(type=m.Request.STREAM_OPEN, streamOpen=body)
        with _deadline("STREAM_OPEN", _patience(timeout_s)):
            connection, response = await self._exchange(request, "STREAM_OPEN")
        self._in_use.discard(connection)
        info = response.streamInfo
        sock, surplus = connection.detach()
        try:
            return P2PStream(sock, _peer_id(info.peer), info.addr, info.proto, surplus)
        except BaseException:
            sock.close()
            raise

    async def register_handler(self, protocol: str, address: Multiaddr) -> None:
        """Send inbound streams of ``protocol`` to the listener at ``address``. The last registration wins; there is no
        way to take one back."""
        body = m.StreamHandlerRequest(addr=address.raw, proto=[protocol])
        await self._call(m.Request(type=m.Request.STREAM_HANDLER, streamHandler=body), "STREAM_HANDLER")

    # -- DHT ------------------------------------------------------------------------------------------------------

    async def find_peer(self, peer: PeerId, *, timeout_s: float = 60.0) -> PeerAddrs:
        """Where the DHT (or an open connection) says that ``peer`` is. Rejected when it is not found."""
        body = m.DHTRequest(type=m.DHTRequest.FIND_PEER, peer=peer.raw)
        info = (await self._dht_call(body, "FIND_PEER", timeout_s)).peer
        return PeerAddrs(_peer_id(info.id), _addresses(info.addrs))

    def find_providers(
        self, cid: bytes, *, count: int = 20, timeout_s: float = 60.0
    ) -> AbstractAsyncContextManager[DhtResults[PeerAddrs]]:
        """Peers that say they provide ``cid`` (CID bytes), at most ``count``, as they are found.

        Use: ``async with daemon.find_providers(cid) as found: async for peer in found: ...``; leaving early is fine.
        """
        body = m.DHTRequest(type=m.DHTRequest.FIND_PROVIDERS, cid=cid, count=count)
        return self._dht_results(body, "FIND_PROVIDERS", timeout_s, _read_peer)

    async def provide(self, cid: bytes, *, timeout_s: float = 60.0) -> None:
        """Put a provider record of this node at the peers closest to ``cid``. It lives 48 h and cannot be withdrawn.

        Rejected while the routing table is empty: connect first.
        """
        body = m.DHTRequest(type=m.DHTRequest.PROVIDE, cid=cid)
        await self._dht_call(body, "PROVIDE", timeout_s)

    async def get_closest_peers(self, key: bytes, *, timeout_s: float = 60.0) -> list[PeerId]:
        """The peers whose ids are nearest to ``key``, at most 20. Walking there also refreshes the routing table."""
        body = m.DHTRequest(type=m.DHTRequest.GET_CLOSEST_PEERS, key=key)
        async with self._dht_results(body, "GET_CLOSEST_PEERS", timeout_s, _read_peer_id) as found:
            return [peer async for peer in found]

    async def get_value(self, key: bytes, *, timeout_s: float = 60.0) -> bytes:
        """The best value under ``key`` (``/pk/...`` or ``/ipns/...``). Rejected when there is none."""
        body = m.DHTRequest(type=m.DHTRequest.GET_VALUE, key=key)
        return (await self._dht_call(body, "GET_VALUE", timeout_s)).value

    def search_value(self, key: bytes, *, timeout_s: float = 60.0) -> AbstractAsyncContextManager[DhtResults[bytes]]:
        """Ever better values under ``key``, as they are found. Use like ``find_providers``."""
        body = m.DHTRequest(type=m.DHTRequest.SEARCH_VALUE, key=key)
        return self._dht_results(body, "SEARCH_VALUE", timeout_s, _read_value)

    async def put_value(self, key: bytes, value: bytes, *, timeout_s: float = 60.0) -> None:
        """Store ``value`` under ``key``; the DHT's validators allow only ``/pk`` and ``/ipns`` records."""
        body = m.DHTRequest(type=m.DHTRequest.PUT_VALUE, key=key, value=value)
        await self._dht_call(body, "PUT_VALUE", timeout_s)

    async def get_public_key(self, peer: PeerId, *, timeout_s: float = 60.0) -> bytes:
        """The libp2p-marshalled public key of ``peer``."""
        body = m.DHTRequest(type=m.DHTRequest.GET_PUBLIC_KEY, peer=peer.raw)
        return (await self._dht_call(body, "GET_PUBLIC_KEY", timeout_s)).value

    # -- gossip ---------------------------------------------------------------------------------------------------

    async def topics(self) -> list[str]:
        """Topics that this node is subscribed to."""
        body = m.PSRequest(type=m.PSRequest.GET_TOPICS)
        response = await self._call(m.Request(type=m.Request.PUBSUB, pubsub=body), "GET_TOPICS")
        return list(response.pubsub.topics)

    async def topic_peers(self, topic: str) -> list[PeerId]:
        """Connected peers that are subscribed to ``topic``."""
        body = m.PSRequest(type=m.PSRequest.LIST_PEERS, topic=topic)
        response = await self._call(m.Request(type=m.Request.PUBSUB, pubsub=body), "PUBSUB LIST_PEERS")
        return [_peer_id(raw) for raw in response.pubsub.peerIDs]

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip ``data``, at most ``MAX_PUBLISH_BYTES``. Best effort: before the mesh has formed it reaches nobody.

        Raises also: LocalProtocolError when it is too long.
        """
        if len(data) > MAX_PUBLISH_BYTES:
            raise LocalProtocolError(f"a gossip message has at most {MAX_PUBLISH_BYTES} bytes, this one {len(data)}")
        body = m.PSRequest(type=m.PSRequest.PUBLISH, topic=topic, data=data)
        await self._call(m.Request(type=m.Request.PUBSUB, pubsub=body), "PUBLISH")

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncGenerator[Subscription, None]:
        """Join ``topic`` for as long as the context lasts."""
        body = m.PSRequest(type=m.PSRequest.SUBSCRIBE, topic=topic)
        request = m.Request(type=m.Request.PUBSUB, pubsub=body)
        with _deadline("SUBSCRIBE", self._call_timeout_s):
            connection, _ = await self._exchange(request, "SUBSCRIBE")
        connection.limit_frames(MAX_SUBSCRIPTION_FRAME_BYTES)
        try:
            yield Subscription(topic, connection)
        finally:
            self._drop(connection)

    # -- the facade itself ----------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """True after ``close``: every call raises DaemonUnavailableError."""
        return self._is_closed

    def close(self) -> None:
        """Close all control connections, also under running calls and subscriptions. Open streams stay; idempotent."""
        self._is_closed = True
        for connection in (*self._idle, *self._in_use):
            connection.close()
        self._idle.clear()
        self._in_use.clear()

    async def aclose(self) -> None:
        """``close`` for ``contextlib.aclosing`` and exit stacks."""
        self.close()
        await trio.lowlevel.checkpoint()

    async def _call(self, request: m.Request, what: str, *, timeout_s: float | None = None) -> m.Response:
        with _deadline(what, self._call_timeout_s if timeout_s is None else timeout_s):
            connection, response = await self._exchange(request, what)
        self._keep(connection)
        return response

    async def _refusal(self, request: m.Request, what: str) -> str:
        try:
            await self._call(request, what)
        except DaemonRejectedError as exc:
            return exc.message
        return ""

    async def _dht_call(self, body: m.DHTRequest, what: str, timeout_s: float) -> m.DHTResponse:
        body.timeout = _whole_seconds(timeout_s)
        request = m.Request(type=m.Request.DHT, dht=body)
        return (await self._call(request, what, timeout_s=_patience(timeout_s))).dht

    @asynccontextmanager
    async def _dht_results(
        self, body: m.DHTRequest, what: str, timeout_s: float, read: Callable[[m.DHTResponse], T]
    ) -> AsyncGenerator[DhtResults[T], None]:
        body.timeout = _whole_seconds(timeout_s)
        request = m.Request(type=m.Request.DHT, dht=body)
        deadline = trio.current_time() + _patience(timeout_s)
        with _deadline(what, _patience(timeout_s)):
            connection, _ = await self._exchange(request, what)
        results = DhtResults(connection, read, deadline=deadline)
        try:
            yield results
        finally:
            if results.is_complete:
                self._keep(connection)
            else:
                self._drop(connection)

    async def _exchange(self, request: m.Request, what: str) -> tuple[ControlConnection, m.Response]:
        """Send one request, read its answer. The connection returned is in ``_in_use``; on any error it is closed."""
        body = m.serialize(request)
        is_retry = False
        while True:
            connection, is_fresh = await self._take(fresh=is_retry)
            try:
                await connection.send(body)
                response = m.parse(m.Response, await connection.receive())
            except DaemonUnavailableError:
                self._drop(connection)
                if is_fresh:
                    raise
                # A kept connection died with the p2pd that it led to: ask the one that is there now, once.
                is_retry = True
            except BaseException:
                self._drop(connection)
                raise
            else:
                if response.type == m.Response.OK:
                    return connection, response
                self._keep(connection)
                reason = response.error.msg[:_MAX_REASON_CHARS]
                raise DaemonRejectedError(f"p2pd refused {what}: {reason}", details={"call": what, "reason": reason})

    async def _take(self, *, fresh: bool) -> tuple[ControlConnection, bool]:
        self._check_open()
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.is_quiet():
                self._in_use.add(connection)
                return connection, False
            connection.close()
        connection = await ControlConnection.open(self.control)
        self._in_use.add(connection)
        try:
            self._check_open()
        except DaemonUnavailableError:
            self._drop(connection)
            raise
        return connection, True

    def _check_open(self) -> None:
        if self._is_closed:
            raise DaemonUnavailableError("p2pd is not running")

    def _keep(self, connection: ControlConnection) -> None:
        self._in_use.discard(connection)
        if self._is_closed or len(self._idle) >= MAX_IDLE_CONNECTIONS:
            connection.close()
        elif not connection.closed:
            self._idle.append(connection)

    def _drop(self, connection: ControlConnection) -> None:
        self._in_use.discard(connection)
        connection.close()


@contextmanager
def _deadline(what: str, timeout_s: float) -> Generator[None, None, None]:
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise DaemonTimeoutError(f"p2pd did not answer {what} within {timeout_s:g} s")


def _whole_seconds(timeout_s: float) -> int:
    return max(1, math.ceil(timeout_s))


def _patience(timeout_s: float) -> float:
    """How long to wait for p2pd's own answer when p2pd was told ``timeout_s``."""
    return timeout_s + _ANSWER_GRACE_S if timeout_s >= 1 else timeout_s


def _peer_id(raw: bytes) -> PeerId:
    try:
        return PeerId(raw)
    except ValueError as exc:
        raise DaemonProtocolError(f"p2pd sent a peer id that is none: {exc}") from exc


def _addresses(many: Iterable[bytes]) -> tuple[Multiaddr, ...]:
    """Those that can be read: daemons know address kinds that Python's registry does not."""
    found = []
    for raw in many:
        try:
            found.append(Multiaddr.from_bytes(raw))
        except ValueError:
            continue
    return tuple(found)


def _read_peer(message: m.DHTResponse) -> PeerAddrs:
    return PeerAddrs(_peer_id(message.peer.id), _addresses(message.peer.addrs))


def _read_peer_id(message: m.DHTResponse) -> PeerId:
    return _peer_id(message.value)


def _read_value(message: m.DHTResponse) -> bytes:
    return message.value

"""An in-process p2pd: real sockets and the real control protocol, no libp2p. A FakeSwarm joins several.

    swarm = FakeSwarm()
    async with trio.open_nursery() as nursery:
        control = await nursery.start(FakeP2pd(swarm, control=tmp_path / "a.sock").run)
        daemon = Daemon(control)

It keeps the real daemon's traps: STREAM_OPEN answers OK and then a clean end when nobody listens at the handler's
address; there is no half-close; PUBLISH answers OK for messages that vanish; the last handler registration wins.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import trio

from lloom_sidecar.errors import LloomError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p import messages as m
from lloom_sidecar.p2p.connector import open_socket, unix_multiaddr
from lloom_sidecar.p2p.errors import DaemonProtocolError
from lloom_sidecar.p2p.framing import FrameReader, encode_frame

MAX_GOSSIP_BYTES: Final = 1024 * 1024
_SUBSCRIPTION_QUEUE: Final = 32
_counter = itertools.count(1)


class _RefusedError(Exception):
    """Becomes Response{ERROR}."""


class Link:
    """A connection between two nodes, with the streams that run over it."""

    def __init__(self, *, relay: PeerId | None) -> None:
        self.relay = relay
        """The relay's id when the connection goes through one."""
        self.streams: set[trio.CancelScope] = set()

    def cut(self) -> None:
        """End every stream on it."""
        for scope in tuple(self.streams):
            scope.cancel()


class FakeSwarm:
    """The network between fake daemons: who is there, who is connected to whom, and what the DHT holds."""

    def __init__(self, *, delay_s: float = 0.0, coalesce: bool = False) -> None:
        """``delay_s``: one-way latency of a stream's chunks. ``coalesce``: StreamInfo and a stream's first bytes come
        in one piece, as they sometimes do with the real daemon."""
        self.delay_s = delay_s
        self.coalesce = coalesce
        self.nodes: dict[PeerId, FakeP2pd] = {}
        self.links: dict[frozenset[PeerId], Link] = {}
        self.providers: defaultdict[bytes, list[PeerId]] = defaultdict(list)
        self.values: dict[bytes, bytes] = {}

    def link(self, a: PeerId, b: PeerId) -> Link | None:
        """The connection between two nodes, if there is one."""
        return self.links.get(frozenset((a, b)))

    def connect(self, a: PeerId, b: PeerId, *, relay: PeerId | None = None) -> Link:
        """Connect two nodes, through ``relay`` or directly; an existing connection stays as it is."""
        return self.links.setdefault(frozenset((a, b)), Link(relay=relay))

    def cut(self, a: PeerId, b: PeerId) -> None:
        """End the connection between two nodes, and the streams on it."""
        link = self.links.pop(frozenset((a, b)), None)
        if link is not None:
            link.cut()

    def neighbours(self, of: PeerId) -> list[PeerId]:
        """Who is connected to a node."""
        return [peer for pair in self.links if of in pair for peer in pair if peer != of]

    def reachable(self, start: PeerId, *, direct_only: bool = False) -> list[PeerId]:
        """Every node that a message from ``start`` could get to, itself first."""
        seen = [start]
        for peer in seen:
            for other in self.neighbours(peer):
                link = self.link(peer, other)
                if other not in seen and not (direct_only and link is not None and link.relay):
                    seen.append(other)
        return seen


class FakeP2pd:
    """One fake daemon. ``run`` it in a nursery; ``kill`` ends it as ``kill -9`` would."""

    def __init__(
        self,
        swarm: FakeSwarm,
        *,
        control: Path | None = None,
        peer: PeerId | None = None,
        pubsub: bool = True,
        dht: bool = True,
    ) -> None:
        """``control``: path of the control socket; None = a TCP port of its own."""
        number = next(_counter)
        self.swarm = swarm
        self.peer = peer or PeerId.from_ed25519(hashlib.sha256(b"fake p2pd %d" % number).digest())
        self.addr = Multiaddr.parse(f"/ip4/127.0.{number // 250 % 250}.{number % 250 + 1}/tcp/4001")
        """The address that it claims to listen at; nothing does."""
        self.handlers: dict[str, Multiaddr] = {}
        self.tags: dict[tuple[PeerId, str], int] = {}
        self.trims = 0
        self.known: set[PeerId] = set()
        self.subscriptions: defaultdict[str, list[trio.MemorySendChannel[m.PSMessage]]] = defaultdict(list)
        self.requests: Counter[str] = Counter()
        """How often each request came, by name, e.g. ``STREAM_OPEN``, ``DHT PROVIDE``."""
        self.hold: set[str] = set()
        """Requests that are never answered."""
        self.refuse: dict[str, str] = {}
        """Requests that are answered with ERROR and this text."""
        self.pubsub_enabled = pubsub
        self.dht_enabled = dht
        self._control = control
        self._scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._seqno = itertools.count(1)

    async def run(self, *, task_status: trio.TaskStatus[Multiaddr] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until killed or cancelled. Started with the control address."""
        listener, address = self._listen()
        self.handlers.clear()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery, self._scope = nursery, nursery.cancel_scope
                self.swarm.nodes[self.peer] = self
                task_status.started(address)
                await trio.serve_listeners(
                    self._serve,
                    [trio.SocketListener(trio.socket.from_stdlib_socket(listener))],
                    handler_nursery=nursery,
                )
        finally:
            self._nursery = self._scope = None
            listener.close()
            if self.swarm.nodes.get(self.peer) is self:
                del self.swarm.nodes[self.peer]
            for other in self.swarm.neighbours(self.peer):
                self.swarm.cut(self.peer, other)
            self.subscriptions.clear()

    def kill(self) -> None:
        """End it at once. Its socket file stays behind."""
        if self._scope is not None:
            self._scope.cancel()

    def _listen(self) -> tuple[socket.socket, Multiaddr]:
        if self._control is None:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            sock.bind(("127.0.0.1", 0))
            address = Multiaddr.parse(f"/ip4/127.0.0.1/tcp/{sock.getsockname()[1]}")
        else:
            self._control.unlink(missing_ok=True)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.bind(os.fspath(self._control))
            address = unix_multiaddr(self._control)
        sock.setblocking(False)
        sock.listen(128)
        return sock, address

    # -- the control socket ---------------------------------------------------------------------------------------

    async def _serve(self, sock: trio.SocketStream) -> None:
        reader = FrameReader()
        try:
            async with sock:
                async for data in sock:
                    reader.feed(bytes(data))
                    while (body := reader.next_frame()) is not None:
                        if not await self._answer(sock, m.parse(m.Request, body), reader):
                            return
        except (trio.BrokenResourceError, trio.ClosedResourceError, DaemonProtocolError):
            pass

    async def _answer(self, sock: trio.SocketStream, request: m.Request, reader: FrameReader) -> bool:
        """Answer one request; False when the connection is used up."""
        name = _name(request)
        self.requests[name] += 1
        if name in self.hold:
            await trio.sleep_forever()
        try:
            if name in self.refuse:
                raise _RefusedError(self.refuse[name])
            if request.type == m.Request.STREAM_OPEN:
                await self._open_stream(sock, request.streamOpen, reader)
                return False
            if request.type == m.Request.PUBSUB and request.pubsub.type == m.PSRequest.SUBSCRIBE:
                await self._subscribe(sock, request.pubsub)
                return False
            replies = list(self._reply(request))
        except _RefusedError as refused:
            error = m.ErrorResponse(msg=str(refused))
            replies = [m.Response(type=m.Response.ERROR, error=error)]
        for reply in replies:
            await _send(sock, reply)
        return True

    def _reply(self, request: m.Request) -> Iterator[m.Message]:
        ok = m.Response(type=m.Response.OK)
        if request.type == m.Request.IDENTIFY:
            ok.identify.CopyFrom(m.IdentifyResponse(id=self.peer.raw, addrs=[self.addr.raw]))
        elif request.type == m.Request.CONNECT:
            self._connect(_peer(request.connect.peer), has_addrs=bool(request.connect.addrs))
        elif request.type == m.Request.DISCONNECT:
            self.swarm.cut(self.peer, _peer(request.disconnect.peer))
        elif request.type == m.Request.LIST_PEERS:
            ok.peers.extend(
                m.PeerInfo(id=peer.raw, addrs=[self._remote_addr(peer).raw])
                for peer in self.swarm.neighbours(self.peer)
            )
        elif request.type == m.Request.STREAM_HANDLER:
            try:
                address = Multiaddr.from_bytes(request.streamHandler.addr)
            except ValueError as exc:
                raise _RefusedError(f"failed to parse multiaddr: {exc}") from None
            self.handlers.update(dict.fromkeys(request.streamHandler.proto, address))
        elif request.type == m.Request.CONNMANAGER:
            self._manage(request.connManager)
        elif request.type == m.Request.PUBSUB:
            ok.pubsub.CopyFrom(self._pubsub(request.pubsub))
        elif request.type == m.Request.DHT:
            yield from self._dht(request.dht)
            return
        else:
            raise _RefusedError("Unexpected request")
        yield ok

    # -- connections and streams ----------------------------------------------------------------------------------

    def _connect(self, peer: PeerId, *, has_addrs: bool) -> None:
        if peer == self.peer:
            raise _RefusedError("failed to dial: dial to self attempted")
        if self.swarm.link(self.peer, peer):
            return
        is_found = has_addrs or peer in self.known or peer in self.swarm.reachable(self.peer)
        if not is_found:
            raise _RefusedError("failed to find any peer in table")
        if peer not in self.swarm.nodes:
            raise _RefusedError(f"failed to dial: failed to dial {peer}: all dials failed")
        self.known.add(peer)
        self.swarm.connect(self.peer, peer)

    def _remote_addr(self, peer: PeerId) -> Multiaddr:
        link = self.swarm.link(self.peer, peer)
        if link is not None and link.relay is not None:
            return Multiaddr.parse(f"/ip4/127.0.0.1/tcp/4001/p2p/{link.relay}/p2p-circuit")
        return self.swarm.nodes[peer].addr

    async def _open_stream(self, sock: trio.SocketStream, request: m.StreamOpenRequest, reader: FrameReader) -> None:
        peer = _peer(request.peer)
        self._connect(peer, has_addrs=False)
        target, link = self.swarm.nodes[peer], self.swarm.link(self.peer, peer)
        protocol = next((name for name in request.proto if name in target.handlers), None)
        if protocol is None or link is None:
            raise _RefusedError(f"failed to negotiate protocol: protocols not supported: [{' '.join(request.proto)}]")
        response = m.Response(type=m.Response.OK)
        response.streamInfo.CopyFrom(m.StreamInfo(peer=peer.raw, addr=self._remote_addr(peer).raw, proto=protocol))
        await _send(sock, response)
        # The stream lives in the far daemon's nursery and on the link too: either's end ends it.
        done = trio.Event()
        with trio.CancelScope() as scope:
            link.streams.add(scope)
            try:
                if target._nursery is not None:
                    target._nursery.start_soon(_cancel_on_exit, scope, done)
                await target._accept_stream(sock, self.peer, protocol, reader.take_rest())
            finally:
                link.streams.discard(scope)
                done.set()

    async def _accept_stream(self, near: trio.SocketStream, opener: PeerId, protocol: str, first: bytes) -> None:
        try:
            raw = await open_socket(self.handlers[protocol])
        except LloomError:
            return
        info = m.StreamInfo(peer=opener.raw, addr=self._remote_addr(opener).raw, proto=protocol)
        far = trio.SocketStream(trio.socket.from_stdlib_socket(raw))
        async with far:
            if self.swarm.coalesce and not first:
                with trio.move_on_after(0.02):
                    first = bytes(await near.receive_some(65536))
            await far.send_all(encode_frame(m.serialize(info)) + first)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pipe, near, far, nursery.cancel_scope)
                nursery.start_soon(self._pipe, far, near, nursery.cancel_scope)

    async def _pipe(self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
        try:
            async for data in source:
                if self.swarm.delay_s:
                    await trio.sleep(self.swarm.delay_s)
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        # No half-close: one direction's end is both directions' end.
        scope.cancel()

    def _manage(self, request: m.ConnManagerRequest) -> None:
        if request.type == m.ConnManagerRequest.TAG_PEER:
            self.tags[_peer(request.peer), request.tag] = request.weight
        elif request.type == m.ConnManagerRequest.UNTAG_PEER:
            self.tags.pop((_peer(request.peer), request.tag), None)
        else:
            self.trims += 1

    # -- gossip ---------------------------------------------------------------------------------------------------

    def _pubsub(self, request: m.PSRequest) -> m.PSResponse:
        if not self.pubsub_enabled:
            raise _RefusedError("PubSub not enabled")
        if request.type == m.PSRequest.GET_TOPICS:
            return m.PSResponse(topics=[topic for topic, queues in self.subscriptions.items() if queues])
        if request.type == m.PSRequest.LIST_PEERS:
            return m.PSResponse(
                peerIDs=[
                    peer.raw
                    for peer in self.swarm.neighbours(self.peer)
                    if self.swarm.nodes[peer].subscriptions.get(request.topic)
                ]
            )
        message = m.PSMessage(
            data=request.data, seqno=next(self._seqno).to_bytes(8, "big"), topicIDs=[request.topic], signature=b"fake"
        )
        setattr(message, "from", self.peer.raw)
        for peer in self.swarm.reachable(self.peer, direct_only=True):
            if peer == self.peer or len(request.data) <= MAX_GOSSIP_BYTES:
                self.swarm.nodes[peer]._deliver(request.topic, message)
        return m.PSResponse()

    def _deliver(self, topic: str, message: m.PSMessage) -> None:
        for queue in self.subscriptions.get(topic, ()):
            try:
                queue.send_nowait(message)
            except trio.WouldBlock:
                # The real daemon drops for a slow subscriber, too.
                continue

    async def _subscribe(self, sock: trio.SocketStream, request: m.PSRequest) -> None:
        if not self.pubsub_enabled:
            raise _RefusedError("PubSub not enabled")
        send, receive = trio.open_memory_channel[m.PSMessage](_SUBSCRIPTION_QUEUE)
        self.subscriptions[request.topic].append(send)
        try:
            await _send(sock, m.Response(type=m.Response.OK))
            async with trio.open_nursery() as nursery:

                async def until_closed() -> None:
                    try:
                        async for _ in sock:
                            pass
                    except (trio.BrokenResourceError, trio.ClosedResourceError):
                        pass
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until_closed)
                try:
                    async for message in receive:
                        await _send(sock, message)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    nursery.cancel_scope.cancel()
        finally:
            send.close()
            receive.close()
            if send in self.subscriptions.get(request.topic, ()):
                self.subscriptions[request.topic].remove(send)

    # -- DHT ------------------------------------------------------------------------------------------------------

    def _dht(self, request: m.DHTRequest) -> Iterator[m.Message]:
        if not self.dht_enabled:
            raise _RefusedError("DHT not enabled")
        if request.type in (m.DHTRequest.FIND_PROVIDERS, m.DHTRequest.PROVIDE) and len(request.cid) not in (34, 36):
            raise _RefusedError("invalid cid: varints malformed, could not reach the end")
        if request.type == m.DHTRequest.FIND_PROVIDERS:
            yield _begin()
            is_alone = not self.swarm.neighbours(self.peer)
            found = [p for p in self.swarm.providers[request.cid] if not is_alone or p == self.peer]
            for peer in found[: request.count or 20]:
                yield m.DHTResponse(type=m.DHTResponse.VALUE, peer=self._info(peer))
            yield m.DHTResponse(type=m.DHTResponse.END)
        elif request.type == m.DHTRequest.GET_CLOSEST_PEERS:
            many = self._closest(request.key)
            yield _begin()
            for peer in many:
                yield m.DHTResponse(type=m.DHTResponse.VALUE, value=peer.raw)
            yield m.DHTResponse(type=m.DHTResponse.END)
        elif request.type == m.DHTRequest.SEARCH_VALUE:
            yield _begin()
            if request.key in self.swarm.values:
                yield m.DHTResponse(type=m.DHTResponse.VALUE, value=self.swarm.values[request.key])
            yield m.DHTResponse(type=m.DHTResponse.END)
        else:
            yield self._dht_single(request)

    def _dht_single(self, request: m.DHTRequest) -> m.Response:
        ok = m.Response(type=m.Response.OK)
        if request.type == m.DHTRequest.FIND_PEER:
            peer = _peer(request.peer)
            if peer not in self.swarm.reachable(self.peer) or peer == self.peer:
                raise _RefusedError("routing: not found")
            ok.dht.CopyFrom(m.DHTResponse(type=m.DHTResponse.VALUE, peer=self._info(peer)))
        elif request.type == m.DHTRequest.PROVIDE:
            if not self.swarm.neighbours(self.peer):
                raise _RefusedError("failed to find any peer in table")
            if self.peer not in self.swarm.providers[request.cid]:
                self.swarm.providers[request.cid].append(self.peer)
        elif request.type == m.DHTRequest.PUT_VALUE:
            if not request.key.startswith((b"/pk/", b"/ipns/")):
                raise _RefusedError("invalid record keytype")
            self.swarm.values[request.key] = request.value
        elif request.type == m.DHTRequest.GET_VALUE:
            if not request.HasField("key"):
                raise _RefusedError("Malformed request; missing key parameter")
            if request.key not in self.swarm.values:
                raise _RefusedError("routing: not found")
            ok.dht.CopyFrom(m.DHTResponse(type=m.DHTResponse.VALUE, value=self.swarm.values[request.key]))
        elif request.type == m.DHTRequest.GET_PUBLIC_KEY:
            key = _peer(request.peer).ed25519_public_key
            if key is None:
                raise _RefusedError("routing: not found")
            ok.dht.CopyFrom(m.DHTResponse(type=m.DHTResponse.VALUE, value=b"\x08\x01\x12\x20" + key))
        else:
            raise _RefusedError("not supported")
        return ok

    def _closest(self, key: bytes) -> list[PeerId]:
        target = int.from_bytes(hashlib.sha256(key).digest(), "big")
        others = self.swarm.reachable(self.peer)[1:]
        if not others:
            raise _RefusedError("failed to find any peer in table")
        return sorted(others, key=lambda p: int.from_bytes(hashlib.sha256(p.raw).digest(), "big") ^ target)[:20]

    def _info(self, peer: PeerId) -> m.PeerInfo:
        node = self.swarm.nodes.get(peer)
        return m.PeerInfo(id=peer.raw, addrs=[] if node is None else [node.addr.raw])


async def _cancel_on_exit(scope: trio.CancelScope, done: trio.Event) -> None:
    try:
        await done.wait()
    finally:
        scope.cancel()


async def _send(sock: trio.SocketStream, message: m.Message) -> None:
    await sock.send_all(encode_frame(m.serialize(message)))


def _begin() -> m.Response:
    return m.Response(type=m.Response.OK, dht=m.DHTResponse(type=m.DHTResponse.BEGIN))


def _peer(raw: bytes) -> PeerId:
    try:
        return PeerId(raw)
    except ValueError:
        raise _RefusedError("length greater than remaining number of bytes in buffer") from None


def _name(request: m.Request) -> str:
    name = m.Request.Type.Name(request.type)
    if request.type == m.Request.DHT:
        return f"DHT {m.DHTRequest.Type.Name(request.dht.type)}"
    if request.type == m.Request.PUBSUB:
        return f"PUBSUB {m.PSRequest.Type.Name(request.pubsub.type)}"
    if request.type == m.Request.CONNMANAGER:
        return m.ConnManagerRequest.Type.Name(request.connManager.type)
    return name

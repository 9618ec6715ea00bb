"""What Lloom relies on in a p2pd. Every kind of daemon passes all of it, the fake first of all."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
import trio

from lloom_sidecar.errors import DaemonRejectedError, DaemonUnavailableError, LocalProtocolError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p import messages as m
from lloom_sidecar.p2p.connector import ControlConnection, open_socket, unix_multiaddr
from lloom_sidecar.p2p.daemon import MAX_PUBLISH_BYTES, Subscription, TopicMessage
from lloom_sidecar.p2p.errors import FrameTooLargeError, StreamClosedError
from lloom_sidecar.p2p.inbound import Handler
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.names import service_cid
from tests.contract.conftest import Net, Node

STRANGER = PeerId.from_ed25519(hashlib.sha256(b"nobody").digest())


async def echo(stream: P2PStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


async def read_exactly(stream: P2PStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await stream.receive_some()
        assert piece, f"the stream ended after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask a daemon again and again: it has no event for what is waited for here."""
    with trio.fail_after(10):
        while not await condition():
            await trio.sleep(0.02)


async def gossip(sender: Node, topic: str, data: bytes, *subscriptions: Subscription) -> list[TopicMessage]:
    """Publish until every subscription has it: before the mesh has formed a message reaches nobody, for ever."""
    received: list[TopicMessage] = []

    async def read(subscription: Subscription) -> None:
        received.append(await subscription.receive())

    async def publish() -> None:
        while True:
            await sender.daemon.publish(topic, data)
            await trio.sleep(0.3)

    with trio.fail_after(15):
        async with trio.open_nursery() as publishing:
            publishing.start_soon(publish)
            async with trio.open_nursery() as reading:
                for subscription in subscriptions:
                    reading.start_soon(read, subscription)
            publishing.cancel_scope.cancel()
    return received


class TestNode:
    async def test_identify_answers_id_and_addresses(self, net: Net) -> None:
        for node in net.nodes:
            identity = await node.daemon.identify()
            assert identity.peer == node.peer
            assert identity.addrs
            assert all(addr.ip is not None and addr.ip.is_loopback for addr in identity.addrs)

    async def test_dht_and_pubsub_are_there(self, net: Net) -> None:
        assert await net.nodes[0].daemon.missing_services() == ()

    async def test_one_connection_serves_many_calls_and_many_calls_run_at_once(self, net: Net) -> None:
        daemon = net.nodes[0].daemon
        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(daemon.list_peers)
        for _ in range(30):
            assert (await daemon.identify()).peer == net.nodes[0].peer


class TestConnections:
    async def test_connected_peers_are_listed_at_both_ends(self, net: Net) -> None:
        a, b, _ = net.nodes
        assert b.peer in {row.peer for row in await a.daemon.list_peers()}
        assert a.peer in {row.peer for row in await b.daemon.list_peers()}
        assert all(not row.addr.is_relayed for row in await a.daemon.list_peers())

    async def test_disconnect_is_seen_at_both_ends_and_connect_mends_it(self, net: Net) -> None:
        a, b, _ = net.nodes
        await a.daemon.disconnect(b.peer)

        async def is_noticed() -> bool:
            return a.peer not in {row.peer for row in await b.daemon.list_peers()}

        await until(is_noticed)
        await a.daemon.connect(b.peer, [addr.with_peer(b.peer) for addr in b.addrs])
        assert b.peer in {row.peer for row in await a.daemon.list_peers()}

    async def test_disconnect_of_a_stranger_is_fine(self, net: Net) -> None:
        await net.nodes[0].daemon.disconnect(STRANGER)

    async def test_connect_twice_is_fine(self, net: Net) -> None:
        a, b, _ = net.nodes
        await a.daemon.connect(b.peer, b.addrs)
        await a.daemon.connect(b.peer, [])

    async def test_a_peer_that_is_not_there_is_refused_with_words(self, net: Net) -> None:
        dead = Multiaddr.parse("/ip4/127.0.0.1/tcp/1")
        with pytest.raises(DaemonRejectedError, match=r"p2pd refused CONNECT: .*dial") as caught:
            await net.nodes[0].daemon.connect(STRANGER, [dead], timeout_s=5)
        assert caught.value.details["call"] == "CONNECT"

    async def test_another_identity_at_the_address_is_refused(self, net: Net) -> None:
        with pytest.raises(DaemonRejectedError):
            await net.nodes[0].daemon.connect(STRANGER, net.nodes[1].addrs, timeout_s=5)

    async def test_disconnect_ends_the_streams(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("disconnect")
        await net.serve(b, protocol, echo)
        stream = await a.daemon.open_stream(b.peer, protocol)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
        await a.daemon.disconnect(b.peer)
        with trio.fail_after(10):
            assert await stream.receive_some() == b""
        stream.close()

    async def test_tag_untag_and_trim(self, net: Net) -> None:
        a, b, _ = net.nodes
        await a.daemon.tag_peer(b.peer, "in-use", 100)
        await a.daemon.trim()
        assert b.peer in {row.peer for row in await a.daemon.list_peers()}
        await a.daemon.untag_peer(b.peer, "in-use")
        await a.daemon.untag_peer(STRANGER, "never")


class TestStreams:
    async def test_echo_and_both_ends_know_who_is_there(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("echo")
        seen: list[tuple[PeerId, str, bool]] = []

        async def handler(stream: P2PStream) -> None:
            seen.append((stream.peer, stream.protocol, stream.is_relayed))
            await echo(stream)

        await net.serve(b, protocol, handler)
        stream = await a.daemon.open_stream(b.peer, protocol)
        assert (stream.peer, stream.protocol, stream.is_relayed) == (b.peer, protocol, False)
        assert stream.addr.ip is not None
        for size in (1, 1000, 70_000):
            await stream.send_all(bytes(size))
            assert await read_exactly(stream, size) == bytes(size)
        stream.close()
        assert seen == [(a.peer, protocol, False)]

    async def test_the_answering_side_may_speak_first(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("first")

        async def handler(stream: P2PStream) -> None:
            await stream.send_all(b"welcome")
            await echo(stream)

        await net.serve(b, protocol, handler)
        stream = await a.daemon.open_stream(b.peer, protocol)
        assert await read_exactly(stream, 7) == b"welcome"
        stream.close()

    async def test_first_bytes_are_never_lost(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("surplus")
        await net.serve(b, protocol, echo)
        for index in range(20):
            stream = await a.daemon.open_stream(b.peer, protocol)
            message = bytes([index]) * (100 + index)
            await stream.send_all(message)
            assert await read_exactly(stream, len(message)) == message
            stream.close()

    async def test_five_megabytes_each_way_at_once(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("big")
        payload = hashlib.shake_128(net.kind.encode()).digest(5_000_000)
        await net.serve(b, protocol, echo)
        stream = await a.daemon.open_stream(b.peer, protocol)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, payload)
            assert await read_exactly(stream, len(payload)) == payload
        stream.close()

    async def test_unknown_protocol_is_refused(self, net: Net) -> None:
        a, b, _ = net.nodes
        with pytest.raises(DaemonRejectedError, match=r"STREAM_OPEN: .*protocols not supported"):
            await a.daemon.open_stream(b.peer, net.unique("nobody-serves-this"))

    async def test_stream_to_a_stranger_is_refused(self, net: Net) -> None:
        with pytest.raises(DaemonRejectedError):
            await net.nodes[0].daemon.open_stream(STRANGER, "/test/1", timeout_s=3)

    async def test_dead_handler_looks_like_ok_and_then_the_end(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("dead")
        await net.serve(b, protocol, echo)
        # Once the opener knows that the far side speaks the protocol, it does not wait for the far side's word.
        stream = await a.daemon.open_stream(b.peer, protocol)
        stream.close()
        await b.daemon.register_handler(protocol, unix_multiaddr(net.directory / "nobody.sock"))
        try:
            stream = await a.daemon.open_stream(b.peer, protocol)
        except DaemonRejectedError as exc:
            # It did wait, because identify had not told it yet: the reset comes before OK.
            assert "reset" in exc.message
        else:
            with trio.fail_after(10):
                assert await stream.receive_some() == b""
            stream.close()

    async def test_closing_is_seen_at_the_far_side(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("close")
        ended = trio.Event()

        async def handler(stream: P2PStream) -> None:
            assert await stream.receive_some() == b"ping"
            await stream.send_all(b"pong")
            assert await stream.receive_some() == b""
            ended.set()

        await net.serve(b, protocol, handler)
        stream = await a.daemon.open_stream(b.peer, protocol)
        await stream.send_all(b"ping")
        assert await read_exactly(stream, 4) == b"pong"
        stream.close()
        with trio.fail_after(10):
            await ended.wait()

    async def test_the_answering_side_closes_and_a_writer_learns_it(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("gone")

        async def handler(stream: P2PStream) -> None:
            assert await stream.receive_some()

        await net.serve(b, protocol, handler)
        stream = await a.daemon.open_stream(b.peer, protocol)
        await stream.send_all(b"x")

        async def write_on() -> None:
            while True:
                await stream.send_all(bytes(1000))
                await trio.sleep(0.01)

        with trio.fail_after(10):
            assert await stream.receive_some() == b""
            with pytest.raises(StreamClosedError):
                await write_on()
        assert stream.closed

    async def test_the_last_registration_wins(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("twice")

        def answering(text: bytes) -> Handler:
            async def handler(stream: P2PStream) -> None:
                await stream.send_all(text)
                await stream.receive_some()

            return handler

        for text in (b"first", b"second"):
            await net.serve(b, protocol, answering(text))
            stream = await a.daemon.open_stream(b.peer, protocol)
            assert await read_exactly(stream, len(text)) == text
            stream.close()

    async def test_forty_eight_streams_at_once(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("many")
        await net.serve(b, protocol, echo)
        streams: list[P2PStream] = []

        async def use(index: int) -> None:
            stream = await a.daemon.open_stream(b.peer, protocol)
            streams.append(stream)
            message = b"%d" % index
            await stream.send_all(message)
            assert await read_exactly(stream, len(message)) == message

        async with trio.open_nursery() as nursery:
            for index in range(48):
                nursery.start_soon(use, index)
        assert len(streams) == 48
        for stream in streams:
            stream.close()

    async def test_streams_over_the_listeners_limit_end_without_a_word(self, net: Net) -> None:
        a, b, _ = net.nodes
        protocol = net.unique("limit")
        reasons: list[Exception] = []
        address = await net.listen({protocol: echo}, max_streams=1, on_error=lambda exc, stream: reasons.append(exc))
        await b.daemon.register_handler(protocol, address)
        first = await a.daemon.open_stream(b.peer, protocol)
        await first.send_all(b"x")
        assert await first.receive_some() == b"x"
        second = await a.daemon.open_stream(b.peer, protocol)
        with trio.fail_after(10):
            assert await second.receive_some() == b""
        assert [getattr(reason, "reason", None) for reason in reasons] == ["limit"]
        await first.send_all(b"y")
        assert await first.receive_some() == b"y"
        first.close()
        second.close()


class TestDht:
    async def test_provide_and_find(self, net: Net) -> None:
        a, _, c = net.nodes
        cid = service_cid(net.unique("service"))
        await a.daemon.provide(cid, timeout_s=20)
        async with c.daemon.find_providers(cid, timeout_s=20) as found:
            peers = [record async for record in found]
        assert [record.peer for record in peers] == [a.peer]
        assert not found.timed_out

    async def test_first_result_can_be_used_before_the_rest_and_leaving_early_is_fine(self, net: Net) -> None:
        a, b, c = net.nodes
        cid = service_cid(net.unique("several"))
        await a.daemon.provide(cid, timeout_s=20)
        await b.daemon.provide(cid, timeout_s=20)
        async with c.daemon.find_providers(cid, timeout_s=20) as found:
            async for record in found:
                assert record.peer in (a.peer, b.peer)
                break
        assert (await c.daemon.identify()).peer == c.peer

    async def test_nobody_provides(self, net: Net) -> None:
        async with net.nodes[0].daemon.find_providers(service_cid(net.unique("none")), timeout_s=20) as found:
            assert [record async for record in found] == []

    async def test_count_limits_the_results(self, net: Net) -> None:
        a, b, c = net.nodes
        cid = service_cid(net.unique("count"))
        await a.daemon.provide(cid, timeout_s=20)
        await b.daemon.provide(cid, timeout_s=20)
        async with c.daemon.find_providers(cid, count=1, timeout_s=20) as found:
            assert len([record async for record in found]) == 1

    async def test_garbage_instead_of_a_cid_is_refused(self, net: Net) -> None:
        with pytest.raises(DaemonRejectedError, match="PROVIDE"):
            await net.nodes[0].daemon.provide(b"\x01\x02")

    async def test_find_peer(self, net: Net) -> None:
        a, b, _ = net.nodes
        found = await a.daemon.find_peer(b.peer, timeout_s=20)
        assert found.peer == b.peer
        assert set(found.addrs) & set(b.addrs)

    async def test_find_peer_that_nobody_knows(self, net: Net) -> None:
        with pytest.raises(DaemonRejectedError, match="not found"):
            await net.nodes[0].daemon.find_peer(STRANGER, timeout_s=20)

    async def test_closest_peers(self, net: Net) -> None:
        a, b, c = net.nodes
        assert set(await a.daemon.get_closest_peers(b"any key", timeout_s=20)) == {b.peer, c.peer}

    async def test_values(self, net: Net) -> None:
        a, _, c = net.nodes
        key = b"/pk/" + a.peer.raw
        value = await c.daemon.get_public_key(a.peer, timeout_s=20)
        assert value == b"\x08\x01\x12\x20" + (a.peer.ed25519_public_key or b"")
        await a.daemon.put_value(key, value, timeout_s=20)
        assert await c.daemon.get_value(key, timeout_s=20) == value
        async with c.daemon.search_value(key, timeout_s=20) as found:
            assert value in [better async for better in found]

    async def test_values_of_another_kind_are_refused(self, net: Net) -> None:
        with pytest.raises(DaemonRejectedError, match=r"PUT_VALUE: .*invalid record keytype"):
            await net.nodes[0].daemon.put_value(b"/lloom/x", b"y", timeout_s=20)

    async def test_peers_connected_to_peer_is_not_supported(self, net: Net) -> None:
        body = m.DHTRequest(type=m.DHTRequest.FIND_PEERS_CONNECTED_TO_PEER, peer=net.nodes[1].peer.raw)
        with pytest.raises(DaemonRejectedError, match="not supported"):
            await net.nodes[0].daemon._dht_call(body, "FIND_PEERS_CONNECTED_TO_PEER", 5)


class TestGossip:
    async def test_messages_reach_the_others_and_oneself_with_their_author(self, net: Net) -> None:
        a, b, _ = net.nodes
        topic = net.unique("topic")
        async with a.daemon.subscribe(topic) as at_a, b.daemon.subscribe(topic) as at_b:
            assert topic in await a.daemon.topics()
            for message in await gossip(a, topic, b"hello", at_a, at_b):
                assert (message.sender, message.data, message.topics) == (a.peer, b"hello", (topic,))
                assert message.seqno > 0

    async def test_leaving_is_noticed(self, net: Net) -> None:
        a, b, _ = net.nodes
        topic = net.unique("leave")

        async def is_there() -> bool:
            return b.peer in await a.daemon.topic_peers(topic)

        async def has_left() -> bool:
            return not await is_there() and topic not in await b.daemon.topics()

        async with b.daemon.subscribe(topic):
            await until(is_there)
        await until(has_left)

    async def test_half_a_megabyte_passes_and_too_much_is_refused_here(self, net: Net) -> None:
        a, b, _ = net.nodes
        topic = net.unique("large")
        async with a.daemon.subscribe(topic), b.daemon.subscribe(topic) as at_b:
            with pytest.raises(LocalProtocolError):
                await a.daemon.publish(topic, bytes(MAX_PUBLISH_BYTES + 1))
            (message,) = await gossip(a, topic, bytes(500_000), at_b)
            assert len(message.data) == 500_000

    async def test_the_longest_message_passes(self, net: Net) -> None:
        a, b, _ = net.nodes
        topic = net.unique("longest")
        async with a.daemon.subscribe(topic), b.daemon.subscribe(topic) as at_b:
            (message,) = await gossip(a, topic, bytes(MAX_PUBLISH_BYTES), at_b)
            assert len(message.data) == MAX_PUBLISH_BYTES

    async def test_a_message_over_the_cap_ends_the_subscription_with_its_own_error(self, net: Net) -> None:
        a = net.nodes[0]
        topic = net.unique("over")
        async with a.daemon.subscribe(topic) as subscription:
            body = m.PSRequest(type=m.PSRequest.PUBLISH, topic=topic, data=bytes(1_500_000))
            await a.daemon._call(m.Request(type=m.Request.PUBSUB, pubsub=body), "PUBLISH")
            with trio.fail_after(10), pytest.raises(FrameTooLargeError):
                await subscription.receive()
        assert (await a.daemon.identify()).peer == a.peer


class TestControlSocket:
    @pytest.mark.parametrize("garbage", [b"\xff" * 20, b"\x05hello", b"\x00", b"\x80\x80\x80\x08" + bytes(100)])
    async def test_garbage_closes_that_connection_only(self, net: Net, garbage: bytes) -> None:
        daemon = net.nodes[0].daemon
        sock = await open_socket(daemon.control)
        other = await ControlConnection.open(daemon.control)
        with sock, trio.fail_after(10):
            sock.send(garbage)
            await trio.lowlevel.wait_readable(sock.fileno())
            with suppress(ConnectionResetError):
                assert sock.recv(100) == b""
        await other.send(m.serialize(m.Request(type=m.Request.IDENTIFY)))
        assert m.parse(m.Response, await other.receive()).type == m.Response.OK
        other.close()

    async def test_frames_may_come_in_any_pieces(self, net: Net) -> None:
        daemon = net.nodes[0].daemon
        sock = await open_socket(daemon.control)
        for byte in b"\x02\x08\x00\x02\x08\x00":
            sock.send(bytes([byte]))
            await trio.sleep(0.001)
        connection = ControlConnection(sock)
        with trio.fail_after(10):
            for _ in range(2):
                assert m.parse(m.Response, await connection.receive()).identify.id == net.nodes[0].peer.raw
        connection.close()

    async def test_closed_facade_refuses(self, net: Net) -> None:
        daemon = net.nodes[0].daemon
        await daemon.identify()
        await daemon.aclose()
        with pytest.raises(DaemonUnavailableError):
            await daemon.identify()

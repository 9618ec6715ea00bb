"""The facade's own promises, on the fake daemon and on servers that break the rules."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lloom_sidecar.errors import ConfigError, DaemonRejectedError, DaemonUnavailableError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p import messages as m
from lloom_sidecar.p2p.connector import open_socket, unix_multiaddr
from lloom_sidecar.p2p.daemon import MAX_IDLE_CONNECTIONS, Daemon
from lloom_sidecar.p2p.errors import (
    DaemonProtocolError,
    DaemonTimeoutError,
    FrameTooLargeError,
    SubscriptionClosedError,
)
from lloom_sidecar.p2p.framing import encode_frame
from tests.fakes.fake_p2pd import FakeP2pd, FakeSwarm

PEER = PeerId.from_ed25519(bytes(32))
CID = b"\x01\x55\x12\x20" + bytes(32)

Call = Callable[[Daemon], Awaitable[object]]


async def find(daemon: Daemon) -> list[object]:
    async with daemon.find_providers(CID) as found:
        return [record async for record in found]


async def subscribe(daemon: Daemon) -> None:
    async with daemon.subscribe("t"):
        pass


CALLS: dict[str, Call] = {
    "IDENTIFY": lambda d: d.identify(),
    "CONNECT": lambda d: d.connect(PEER, []),
    "DISCONNECT": lambda d: d.disconnect(PEER),
    "LIST_PEERS": lambda d: d.list_peers(),
    "TAG_PEER": lambda d: d.tag_peer(PEER, "t", 1),
    "UNTAG_PEER": lambda d: d.untag_peer(PEER, "t"),
    "TRIM": lambda d: d.trim(),
    "STREAM_OPEN": lambda d: d.open_stream(PEER, "/x"),
    "STREAM_HANDLER": lambda d: d.register_handler("/x", unix_multiaddr(Path("/nowhere"))),
    "DHT FIND_PEER": lambda d: d.find_peer(PEER),
    "DHT FIND_PROVIDERS": find,
    "DHT PROVIDE": lambda d: d.provide(CID),
    "DHT GET_CLOSEST_PEERS": lambda d: d.get_closest_peers(b"k"),
    "DHT GET_VALUE": lambda d: d.get_value(b"k"),
    "DHT PUT_VALUE": lambda d: d.put_value(b"k", b"v"),
    "DHT GET_PUBLIC_KEY": lambda d: d.get_public_key(PEER),
    "PUBSUB GET_TOPICS": lambda d: d.topics(),
    "PUBSUB LIST_PEERS": lambda d: d.topic_peers("t"),
    "PUBSUB PUBLISH": lambda d: d.publish("t", b"x"),
    "PUBSUB SUBSCRIBE": subscribe,
}
each_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lloom-") as name:
        yield Path(name)


@pytest.fixture
def hurried_clock() -> MockClock:
    """Virtual time; the threshold lets real sockets deliver first."""
    return MockClock(autojump_threshold=0.02)


@pytest.fixture
async def fake(nursery: trio.Nursery, directory: Path) -> FakeP2pd:
    node = FakeP2pd(FakeSwarm(), control=directory / "p2pd.sock")
    await nursery.start(node.run)
    return node


@pytest.fixture
def control(directory: Path) -> Multiaddr:
    return unix_multiaddr(directory / "p2pd.sock")


async def rogue(directory: Path, nursery: trio.Nursery, *answers: bytes, then_close: bool = False) -> Daemon:
    """A server that answers every connection's first bytes with ``answers`` and then says nothing."""

    async def serve(sock: trio.SocketStream) -> None:
        await sock.receive_some()
        for answer in answers:
            await sock.send_all(answer)
        if not then_close:
            await sock.receive_some()
        await sock.aclose()

    path = directory / "rogue.sock"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen()
    nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
    return Daemon(unix_multiaddr(path))


def ok(**fields: object) -> bytes:
    return encode_frame(m.serialize(m.Response(type=m.Response.OK, **fields)))  # type: ignore[arg-type]


class TestDeadlines:
    @each_call
    async def test_a_daemon_that_says_nothing(
        self, name: str, fake: FakeP2pd, control: Multiaddr, hurried_clock: MockClock
    ) -> None:
        fake.hold.add(name)
        daemon = Daemon(control)
        with pytest.raises(DaemonTimeoutError, match=f"did not answer {name.removeprefix('DHT ').split()[-1]}|PUBSUB"):
            await CALLS[name](daemon)
        assert not daemon._idle
        assert not daemon._in_use
        daemon.close()

    async def test_partial_results_count_at_the_deadline(
        self, directory: Path, nursery: trio.Nursery, hurried_clock: MockClock
    ) -> None:
        value = m.DHTResponse(type=m.DHTResponse.VALUE, peer=m.PeerInfo(id=PEER.raw))
        begin = ok(dht=m.DHTResponse(type=m.DHTResponse.BEGIN))
        daemon = await rogue(directory, nursery, begin + encode_frame(m.serialize(value)))
        started = trio.current_time()
        async with daemon.find_providers(CID, timeout_s=30) as found:
            assert [record.peer async for record in found] == [PEER]
            assert [record.peer async for record in found] == []
        assert found.timed_out
        assert 30 <= trio.current_time() - started < 35
        assert not daemon._idle
        daemon.close()

    async def test_nobody_there(self, control: Multiaddr) -> None:
        with pytest.raises(DaemonUnavailableError, match="cannot be reached at /unix/"):
            await Daemon(control).identify()

    async def test_nobody_there_on_tcp(self) -> None:
        with pytest.raises(DaemonUnavailableError, match="refused"):
            await Daemon(Multiaddr.parse("/ip4/127.0.0.1/tcp/1")).identify()

    async def test_no_control_address(self) -> None:
        with pytest.raises(ConfigError, match="no control address"):
            await Daemon(Multiaddr.parse("/ip4/127.0.0.1/udp/1")).identify()

    async def test_a_full_queue_is_waited_for(self, directory: Path, hurried_clock: MockClock) -> None:
        path = directory / "full.sock"
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(path))
        listener.listen(0)
        first = await open_socket(unix_multiaddr(path))
        with trio.move_on_after(0.05) as scope:
            await open_socket(unix_multiaddr(path))
        assert scope.cancelled_caught
        first.close()
        listener.close()


class TestCancellation:
    @each_call
    async def test_a_cancelled_call_leaves_no_dirty_connection(
        self, name: str, fake: FakeP2pd, control: Multiaddr
    ) -> None:
        fake.hold.add(name)
        daemon = Daemon(control)
        await daemon.identify() if name != "IDENTIFY" else None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(CALLS[name], daemon)
            await wait_all_tasks_blocked(0.01)
            assert fake.requests[name] == 1
            nursery.cancel_scope.cancel()
        assert not daemon._idle
        assert not daemon._in_use
        fake.hold.clear()
        assert (await daemon.identify()).peer == fake.peer
        daemon.close()

    async def test_a_cancelled_receive_loses_no_message(self, fake: FakeP2pd, control: Multiaddr) -> None:
        daemon = Daemon(control)
        async with daemon.subscribe("t") as subscription:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(subscription.receive)
                await wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            await daemon.publish("t", b"kept")
            assert (await subscription.receive()).data == b"kept"
        daemon.close()


class TestPool:
    async def test_calls_one_after_another_share_a_connection(self, fake: FakeP2pd, control: Multiaddr) -> None:
        daemon = Daemon(control)
        for _ in range(5):
            await daemon.identify()
        assert len(daemon._idle) == 1
        daemon.close()
        assert not daemon._idle

    async def test_the_idle_ones_are_bounded(self, fake: FakeP2pd, control: Multiaddr) -> None:
        daemon = Daemon(control)
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_IDLE_CONNECTIONS * 3):
                nursery.start_soon(daemon.identify)
        assert 1 <= len(daemon._idle) <= MAX_IDLE_CONNECTIONS
        daemon.close()

    async def test_connections_to_a_daemon_that_was_replaced(
        self, fake: FakeP2pd, control: Multiaddr, nursery: trio.Nursery
    ) -> None:
        daemon = Daemon(control)
        await daemon.identify()
        fake.kill()
        await wait_all_tasks_blocked()
        await nursery.start(fake.run)
        assert (await daemon.identify()).peer == fake.peer
        daemon.close()

    async def test_a_kept_connection_that_dies_under_a_call_is_retried_once(
        self, directory: Path, nursery: trio.Nursery
    ) -> None:
        served = []

        async def serve(sock: trio.SocketStream) -> None:
            """Answers the first request of each connection, and hangs up on the second."""
            served.append(sock)
            async with sock:
                await sock.receive_some()
                await sock.send_all(ok(identify=m.IdentifyResponse(id=PEER.raw)))
                await sock.receive_some()

        path = directory / "flaky.sock"
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(path))
        listener.listen()
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        daemon = Daemon(unix_multiaddr(path))
        for _ in range(3):
            assert (await daemon.identify()).peer == PEER
        assert len(served) == 3
        daemon.close()

    async def test_a_fresh_connection_that_dies_is_not_retried(self, directory: Path, nursery: trio.Nursery) -> None:
        daemon = await rogue(directory, nursery, then_close=True)
        with pytest.raises(DaemonUnavailableError, match="closed the control connection"):
            await daemon.identify()

    async def test_an_answer_of_error_keeps_the_connection(self, fake: FakeP2pd, control: Multiaddr) -> None:
        fake.refuse["IDENTIFY"] = "no " + "x" * 5000
        daemon = Daemon(control)
        with pytest.raises(DaemonRejectedError, match="p2pd refused IDENTIFY: no xxx") as caught:
            await daemon.identify()
        assert len(caught.value.message) < 600
        assert len(daemon._idle) == 1
        daemon.close()

    async def test_bytes_that_came_unasked_spoil_a_connection(self, directory: Path, nursery: trio.Nursery) -> None:
        answer = ok(identify=m.IdentifyResponse(id=PEER.raw))
        daemon = await rogue(directory, nursery, answer + answer)
        await daemon.identify()
        (kept,) = daemon._idle
        await daemon.identify()
        assert kept.closed
        daemon.close()

    async def test_close_ends_running_calls(self, fake: FakeP2pd, control: Multiaddr) -> None:
        fake.hold.add("IDENTIFY")
        daemon = Daemon(control)
        async with trio.open_nursery() as nursery:

            async def call() -> None:
                with pytest.raises(DaemonUnavailableError):
                    await daemon.identify()

            nursery.start_soon(call)
            await wait_all_tasks_blocked(0.01)
            daemon.close()
        assert daemon.closed


class TestWrongAnswers:
    @pytest.mark.parametrize(
        "answer",
        [
            encode_frame(b"\xff\xff\xff"),
            encode_frame(b""),
            ok(),
            ok(identify=m.IdentifyResponse(id=b"short")),
            b"\x80\x80\x80\x80\x80",
        ],
    )
    async def test_garbage(self, directory: Path, nursery: trio.Nursery, answer: bytes) -> None:
        daemon = await rogue(directory, nursery, answer)
        with pytest.raises(DaemonProtocolError):
            await daemon.identify()
        daemon.close()

    async def test_oversize_is_refused_from_its_prefix(self, directory: Path, nursery: trio.Nursery) -> None:
        daemon = await rogue(directory, nursery, b"\x81\x80\x80\x02")
        with pytest.raises(FrameTooLargeError):
            await daemon.identify()
        assert not daemon._idle

    async def test_a_stream_to_nobody(self, directory: Path, nursery: trio.Nursery) -> None:
        info = m.StreamInfo(peer=b"x", addr=b"", proto="/x")
        daemon = await rogue(directory, nursery, ok(streamInfo=info))
        with pytest.raises(DaemonProtocolError):
            await daemon.open_stream(PEER, "/x")

    async def test_a_flood_of_results(self, directory: Path, nursery: trio.Nursery) -> None:
        value = encode_frame(m.serialize(m.DHTResponse(type=m.DHTResponse.VALUE, value=b"v")))
        daemon = await rogue(directory, nursery, ok(dht=m.DHTResponse(type=m.DHTResponse.BEGIN)), value * 10_001)
        async with daemon.search_value(b"k") as found:
            for _ in range(10_000):
                assert await anext(found) == b"v"
            with pytest.raises(DaemonProtocolError, match="over 10000 results"):
                await anext(found)

    async def test_the_stream_keeps_bytes_that_came_with_its_info(self, directory: Path, nursery: trio.Nursery) -> None:
        info = m.StreamInfo(peer=PEER.raw, addr=Multiaddr.parse("/ip4/10.0.0.1/tcp/1").raw, proto="/x")
        daemon = await rogue(directory, nursery, ok(streamInfo=info) + b"first words")
        stream = await daemon.open_stream(PEER, "/x")
        assert await stream.receive_some() == b"first words"
        stream.close()


class TestSubscription:
    async def test_ends_with_the_daemon(self, fake: FakeP2pd, control: Multiaddr) -> None:
        daemon = Daemon(control)
        async with daemon.subscribe("t") as subscription:
            fake.kill()
            with pytest.raises(SubscriptionClosedError, match="the subscription to t ended"):
                await subscription.receive()
            with pytest.raises(SubscriptionClosedError):
                await subscription.receive()

    async def test_ends_with_the_facade(self, fake: FakeP2pd, control: Multiaddr) -> None:
        daemon = Daemon(control)
        async with daemon.subscribe("t") as subscription:
            daemon.close()
            with pytest.raises(SubscriptionClosedError):
                await subscription.receive()

    async def test_can_be_closed_by_another_task(self, fake: FakeP2pd, control: Multiaddr) -> None:
        daemon = Daemon(control)
        async with daemon.subscribe("t") as subscription, trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(SubscriptionClosedError):
                    await subscription.receive()

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            subscription.close()
        daemon.close()

    async def test_messages_without_a_sender_are_counted_and_skipped(
        self, directory: Path, nursery: trio.Nursery
    ) -> None:
        good = m.PSMessage(data=b"good", topicIDs=["t"])
        setattr(good, "from", PEER.raw)
        anonymous = m.PSMessage(data=b"bad", topicIDs=["t"])
        frames = b"".join(encode_frame(m.serialize(each)) for each in (anonymous, good))
        daemon = await rogue(directory, nursery, ok() + frames)
        async with daemon.subscribe("t") as subscription:
            message = await subscription.receive()
            assert (message.sender, message.data, message.seqno) == (PEER, b"good", 0)
            assert subscription.malformed_total == 1

    async def test_garbage_ends_it(self, directory: Path, nursery: trio.Nursery) -> None:
        daemon = await rogue(directory, nursery, ok() + encode_frame(b"\xff"))
        async with daemon.subscribe("t") as subscription:
            with pytest.raises(DaemonProtocolError):
                await subscription.receive()
            with pytest.raises(SubscriptionClosedError):
                await subscription.receive()


class TestServices:
    @pytest.mark.parametrize(
        ("dht", "pubsub", "missing"),
        [(True, True, ()), (False, True, ("dht",)), (True, False, ("pubsub",)), (False, False, ("dht", "pubsub"))],
    )
    async def test_missing_services_are_named(
        self, directory: Path, nursery: trio.Nursery, dht: bool, pubsub: bool, missing: tuple[str, ...]
    ) -> None:
        node = FakeP2pd(FakeSwarm(), control=directory / "p2pd.sock", dht=dht, pubsub=pubsub)
        daemon = Daemon(await nursery.start(node.run))
        assert await daemon.missing_services() == missing
        daemon.close()

    async def test_addresses_of_unknown_kinds_are_left_out(self, directory: Path, nursery: trio.Nursery) -> None:
        known = Multiaddr.parse("/ip4/10.0.0.1/tcp/1")
        answer = ok(identify=m.IdentifyResponse(id=PEER.raw, addrs=[b"\xff\xff\x01", known.raw]))
        daemon = await rogue(directory, nursery, answer)
        assert (await daemon.identify()).addrs == (known,)
        daemon.close()

    async def test_a_row_without_an_address_is_still_a_row(self, directory: Path, nursery: trio.Nursery) -> None:
        daemon = await rogue(directory, nursery, ok(peers=[m.PeerInfo(id=PEER.raw)]))
        (row,) = await daemon.list_peers()
        assert row.peer == PEER
        daemon.close()

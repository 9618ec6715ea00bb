"""Intake, gossip, look-ups, validators and probes, on fake daemons and virtual time."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lloom_sidecar.errors import DaemonUnavailableError, LloomError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.network.bootstrap import MAX_BACKOFF_S, VALIDATOR_TAG, Bootstrap, Validator, group_by_peer
from lloom_sidecar.network.connections import Connections
from lloom_sidecar.network.discovery import Discovery
from lloom_sidecar.network.gossip import (
    ANCHOR_AFTER_S,
    FIRST_AFTER_S,
    MAX_MESSAGE_BYTES,
    NEIGHBOUR_POLL_S,
    run_gossip,
)
from lloom_sidecar.network.hello import Greeted, HelloService
from lloom_sidecar.network.intake import Intake
from lloom_sidecar.network.prober import MAX_UNDER_WAY, run_prober
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.peers.executors import LeaseState
from lloom_sidecar.peers.peerbook import Change, PeerBook
from lloom_sidecar.peers.rate import RateLimiter
from lloom_sidecar.protocol.announcement import seal_announcement
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.names import PROTOCOL_HELLO, TOPIC_EXECUTORS, service_cid, service_model
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Kind, Load, ModelOffer
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.fakes.fake_nodes import FakeNode, fake_nodes

KEY = NetworkKey(b"k" * 32)
NOW_MS = 1_790_000_000_000


def announcement(
    signer: Signer,
    sequence: int = 1,
    *,
    kind: int = Kind.INITIAL,
    key: NetworkKey = KEY,
    ttl_s: float = 30.0,
    issued_at_ms: int = NOW_MS,
    full_digest: bytes = b"",
) -> bytes:
    is_full = kind in (Kind.INITIAL, Kind.UPDATE)
    return seal_announcement(
        signer=signer,
        key=key,
        sequence=sequence,
        issued_at_ms=issued_at_ms,
        ttl_s=ttl_s,
        kind=kind,
        addrs=(),
        models=(ModelOffer("m"),) if is_full else (),
        load=Load(),
        software="",
        full_digest=full_digest,
    )


class Sidecar:
    """The control plane of one node, and all that it told its observers."""

    def __init__(self, node: FakeNode, *, validators: Sequence[Validator] = ()) -> None:
        self.node = node
        self.daemon: Daemon | None = node.daemon
        self.dropped: list[str] = []
        self.changes: list[tuple[PeerId, Change, str]] = []
        self.joined: list[tuple[PeerId, int]] = []
        self.failures: list[float] = []
        self.complete: list[int] = []
        self.joined_after: list[PeerId] = []
        self.lost: list[PeerId] = []
        self.found_s: list[float] = []
        self.mine = b""
        self.book = PeerBook(
            me=node.peer, is_open=False, allow_list=frozenset(), validators=frozenset(v.peer for v in validators)
        )
        self.intake = Intake(
            me=node.peer,
            book=self.book,
            keys=lambda: [KEY],
            observer=self,
            now_ms=lambda: NOW_MS,
        )
        self.hello = HelloService(
            me=node.peer,
            keys=lambda: [KEY],
            is_open=False,
            node_info=lambda: pb.NodeInfo(announcement=self.mine),
            get_daemon=self.get_daemon,
            on_greeted=self.on_greeted,
            on_refused=lambda peer, code: None,
            catalogue=lambda model, since: self.book.entries_since(since, now=trio.current_time(), model=model or None),
        )
        self.connections = Connections(get_daemon=self.get_daemon, addrs_of=lambda peer: (), observer=self)
        self.bootstrap = Bootstrap(
            me=node.peer,
            validators=validators,
            get_daemon=self.get_daemon,
            connections=self.connections,
            hello=self.hello,
            intake=self.intake,
            observer=self,
            after_join=self.after_join,
            rng=random.Random(1),
        )
        self.discovery = Discovery(
            me=node.peer,
            service_keys=lambda: ["/x"],
            get_daemon=self.get_daemon,
            connections=self.connections,
            hello=self.hello,
            book=self.book,
            on_found=self.found_s.append,
        )

    def get_daemon(self) -> Daemon:
        if self.daemon is None:
            raise DaemonUnavailableError("away")
        return self.daemon

    async def listen(self) -> None:
        await self.node.serve(PROTOCOL_HELLO, self.hello.serve_stream)

    def on_greeted(self, greeted: Greeted) -> None:
        self.book.on_hello(
            greeted.peer,
            roles=frozenset(),
            features=frozenset(),
            max_streams=1,
            is_member=greeted.is_member,
            now=trio.current_time(),
        )
        if greeted.node.announcement:
            self.intake.take(
                greeted.node.announcement,
                found_by="hello",
                source=greeted.peer,
                direct=True,
                expected_signer=greeted.peer,
            )

    async def after_join(self, peer: PeerId) -> None:
        self.joined_after.append(peer)

    def announcement_dropped(self, reason: str) -> None:
        self.dropped.append(reason)

    def executor_changed(self, peer: PeerId, change: Change, found_by: str) -> None:
        self.changes.append((peer, change, found_by))

    def connected(self, peer: PeerId, addr: Multiaddr) -> None:
        pass

    def disconnected(self, peer: PeerId) -> None:
        pass

    def polled(self, peers: int) -> None:
        pass

    def validator_joined(self, peer: PeerId, entries: int) -> None:
        self.joined.append((peer, entries))

    def validator_failed(self, peer: PeerId, error: LloomError, attempt: int) -> None:
        self.failures.append(trio.current_time())
        assert attempt == len(self.failures) or self.joined

    def bootstrap_complete(self, validators: int, seconds: float) -> None:
        self.complete.append(validators)


@asynccontextmanager
async def sidecars(count: int, *, connected: bool = True) -> AsyncIterator[list[Sidecar]]:
    async with fake_nodes(count, connected=connected) as nodes:
        yield [Sidecar(node) for node in nodes]


class TestIntake:
    SIGNER = Signer(b"e" * 32)

    @asynccontextmanager
    async def one(self) -> AsyncIterator[Sidecar]:
        async with sidecars(1) as (side,):
            yield side

    async def test_new_refreshed_removed(self) -> None:
        async with self.one() as side:
            full = announcement(self.SIGNER, 1)
            who = self.SIGNER.peer
            assert side.intake.take(full, found_by="gossip", source=None) is Change.NEW
            assert side.intake.found_by == {who: "gossip"}
            assert side.intake.take(full, found_by="hello", source=who) is Change.DUPLICATE
            assert side.intake.found_by == {who: "gossip"}
            removal = announcement(self.SIGNER, 2, kind=Kind.REMOVAL)
            assert side.intake.take(removal, found_by="gossip", source=None) is Change.REMOVED
            assert side.intake.found_by == {}
            assert [change for _, change, _ in side.changes] == [Change.NEW, Change.DUPLICATE, Change.REMOVED]

    async def test_a_heartbeat_of_something_unknown_wants_it(self) -> None:
        async with self.one() as side:
            heartbeat = announcement(self.SIGNER, 5, kind=Kind.HEARTBEAT, full_digest=b"d" * 32)
            assert side.intake.take(heartbeat, found_by="gossip", source=None) is Change.WANTS_FULL
            assert side.book.due_fetches(trio.current_time()) == [self.SIGNER.peer]

    async def test_ones_own_is_ignored(self) -> None:
        async with self.one() as side:
            assert side.intake.take(announcement(side.node.signer), found_by="gossip", source=None) is None
            assert side.changes == []
            assert side.dropped == []

    @pytest.mark.parametrize(
        ("make", "reason"),
        [
            (lambda s: b"garbage", "envelope"),
            (lambda s: b"x" * 20_000, "size"),
            (lambda s: announcement(s, issued_at_ms=NOW_MS - 16 * 60_000), "clock"),
            (lambda s: announcement(s, key=NetworkKey(b"o" * 32)), "tag"),
            (lambda s: announcement(Signer(b"z" * 32)), "publisher"),
        ],
    )
    async def test_what_is_wrong_is_counted_and_dropped(self, make: Callable[[Signer], bytes], reason: str) -> None:
        async with self.one() as side:
            raw = make(self.SIGNER)
            taken = side.intake.take(raw, found_by="gossip", source=None, expected_signer=self.SIGNER.peer)
            assert taken is None
            assert side.dropped == [reason]
            assert len(side.book) == 0

    LONG_AGO_MS = NOW_MS - 16 * 60_000

    def beat(self, full: bytes, *, signer: Signer = SIGNER, issued_at_ms: int = NOW_MS) -> bytes:
        digest = hashlib.sha256(full).digest()
        return announcement(signer, 2, kind=Kind.HEARTBEAT, full_digest=digest, issued_at_ms=issued_at_ms)

    def old_entry(self, side: Sidecar, make_beat: Callable[[bytes], bytes]) -> list[str]:
        """A catalogue's entry with a full announcement of long ago; returns the reasons for which something fell."""
        old = announcement(self.SIGNER, issued_at_ms=self.LONG_AGO_MS)
        side.intake.take_entry(old, make_beat(old), source=PeerId.from_ed25519(b"v" * 32), age_s=1.0)
        return side.dropped

    async def test_a_heartbeat_speaks_for_a_full_one_that_is_older_than_clocks_are_compared(self) -> None:
        async with self.one() as side:
            assert self.old_entry(side, self.beat) == []
            assert len(side.book) == 1

    async def test_the_newer_of_a_catalogues_two_needs_a_right_clock(self) -> None:
        async with self.one() as side:
            dropped = self.old_entry(side, lambda old: self.beat(old, issued_at_ms=self.LONG_AGO_MS))
            assert dropped == ["clock", "clock"]
            assert len(side.book) == 0

    async def test_a_heartbeat_for_something_else_speaks_for_nothing(self) -> None:
        async with self.one() as side:
            dropped = self.old_entry(side, lambda old: self.beat(b"another"))
            dropped = self.old_entry(side, lambda old: self.beat(old, signer=Signer(b"z" * 32)))
            dropped = self.old_entry(side, lambda old: b"garbage")
            dropped = self.old_entry(side, lambda old: b"")
            assert dropped == ["clock", "clock", "envelope", "clock", "clock"]
            assert len(side.book) == 0


class TestGossip:
    async def start(
        self, nursery: trio.Nursery, side: Sidecar, rates: RateLimiter[PeerId] | None = None, **more: Any
    ) -> list[str]:
        seen: list[str] = []
        if rates is None:
            rates = RateLimiter(rate_per_s=100, burst=100, max_keys=10)
        await nursery.start(
            lambda task_status: run_gossip(
                me=side.node.peer,
                get_daemon=side.get_daemon,
                intake=side.intake,
                rates=rates,
                on_message=lambda: seen.append("message"),
                on_dropped=seen.append,
                task_status=task_status,
                **more,
            )
        )
        return seen

    async def subscribed_after(self, nursery: trio.Nursery, side: Sidecar, timeout_s: float, **more: Any) -> float:
        began_at = trio.current_time()
        with trio.move_on_after(timeout_s):
            await self.start(nursery, side, **more)
            return trio.current_time() - began_at
        return float("inf")

    async def test_it_subscribes_as_soon_as_there_is_a_neighbour(self, autojump_clock: MockClock) -> None:
        async with sidecars(3) as (here, there, late), trio.open_nursery() as nursery:
            told: list[float] = []
            is_connected = False

            async def neighbour() -> None:
                nonlocal is_connected
                await trio.sleep(30)
                assert here.node.p2pd.requests["PUBSUB LIST_PEERS"] == 0
                async with there.node.daemon.subscribe(TOPIC_EXECUTORS):
                    is_connected = True
                    await trio.sleep_forever()

            nursery.start_soon(neighbour)
            after_s = await self.subscribed_after(
                nursery,
                here,
                60,
                is_connected=lambda: is_connected,
                on_neighbours=lambda: told.append(trio.current_time()),
            )
            assert 30 <= after_s <= 30 + 2 * NEIGHBOUR_POLL_S
            assert len(told) == 1
            # Who comes later is in the topic at once, and nobody is introduced to it again.
            assert await self.subscribed_after(nursery, late, 60, is_connected=lambda: True) == 0
            await trio.sleep(20)
            assert len(told) == 1
            nursery.cancel_scope.cancel()

    @pytest.mark.parametrize(
        ("connected", "is_anchor", "after_s"),
        [(True, False, FIRST_AFTER_S), (False, True, ANCHOR_AFTER_S), (False, False, float("inf"))],
    )
    async def test_who_is_the_first_one_there(
        self, autojump_clock: MockClock, connected: bool, is_anchor: bool, after_s: float
    ) -> None:
        async with sidecars(2) as (here, _), trio.open_nursery() as nursery:
            told: list[str] = []
            found_s = await self.subscribed_after(
                nursery,
                here,
                100,
                is_connected=lambda: connected,
                is_anchor=is_anchor,
                on_neighbours=lambda: told.append("told"),
            )
            assert found_s == pytest.approx(after_s, abs=NEIGHBOUR_POLL_S)
            assert told == []
            nursery.cancel_scope.cancel()

    async def test_messages_are_taken_in_and_ones_own_are_not(self) -> None:
        async with sidecars(2) as (here, there), trio.open_nursery() as nursery:
            seen = await self.start(nursery, here)
            await here.node.daemon.publish(TOPIC_EXECUTORS, announcement(here.node.signer))
            await there.node.daemon.publish(TOPIC_EXECUTORS, announcement(there.node.signer))
            await wait_all_tasks_blocked()
            assert here.changes == [(there.node.peer, Change.NEW, "gossip")]
            assert seen == ["message"]
            nursery.cancel_scope.cancel()

    async def test_nobody_speaks_for_somebody_else(self) -> None:
        async with sidecars(2) as (here, there), trio.open_nursery() as nursery:
            await self.start(nursery, here)
            await there.node.daemon.publish(TOPIC_EXECUTORS, announcement(Signer(b"z" * 32)))
            await wait_all_tasks_blocked()
            assert here.dropped == ["publisher"]
            nursery.cancel_scope.cancel()

    async def test_size_and_rate_are_bounded_before_anything_is_parsed(self, autojump_clock: MockClock) -> None:
        async with sidecars(2) as (here, there), trio.open_nursery() as nursery:
            seen = await self.start(nursery, here, RateLimiter(rate_per_s=1, burst=2, max_keys=10))
            await there.node.daemon.publish(TOPIC_EXECUTORS, b"x" * (MAX_MESSAGE_BYTES + 1))
            for sequence in range(1, 5):
                await there.node.daemon.publish(TOPIC_EXECUTORS, announcement(there.node.signer, sequence))
            await wait_all_tasks_blocked()
            assert [word for word in seen if word != "message"] == ["size", "rate", "rate"]
            assert len(here.changes) == 2
            await trio.sleep(2)
            await there.node.daemon.publish(TOPIC_EXECUTORS, announcement(there.node.signer, 9))
            await wait_all_tasks_blocked()
            assert len(here.changes) == 3
            nursery.cancel_scope.cancel()

    async def test_more_than_the_queue_of_the_daemon_holds_is_drained(self) -> None:
        async with sidecars(2) as (here, there), trio.open_nursery() as nursery:
            seen = await self.start(nursery, here, RateLimiter(rate_per_s=1000, burst=1000, max_keys=10))
            for sequence in range(1, 101):
                await there.node.daemon.publish(TOPIC_EXECUTORS, announcement(there.node.signer, sequence))
            await wait_all_tasks_blocked()
            assert len(seen) == 100
            nursery.cancel_scope.cancel()

    async def test_it_subscribes_again_when_the_daemon_is_back(self, autojump_clock: MockClock) -> None:
        async with sidecars(2) as (here, there), trio.open_nursery() as nursery:
            await self.start(nursery, here)
            node = here.node
            node.p2pd.kill()
            await trio.sleep(3)
            await node.nursery.start(node.p2pd.run)
            node.p2pd.swarm.connect(node.peer, there.node.peer)
            await trio.sleep(3)
            await there.node.daemon.publish(TOPIC_EXECUTORS, announcement(there.node.signer))
            await wait_all_tasks_blocked()
            assert len(here.changes) == 1
            nursery.cancel_scope.cancel()


class TestLookUp:
    async def provide(self, side: Sidecar, model: str = "m") -> None:
        side.mine = announcement(side.node.signer)
        await side.listen()
        await side.node.daemon.provide(service_cid(service_model(model)))

    async def test_a_provider_is_greeted_and_its_own_word_counts(self) -> None:
        async with sidecars(2) as (here, there):
            await self.provide(there)
            await here.discovery.look_up("m")
            assert [view.peer for view in here.book.executors_of("m", trio.current_time())] == [there.node.peer]
            assert here.changes[-1] == (there.node.peer, Change.NEW, "hello")
            assert len(here.found_s) == 1

    async def test_a_record_alone_counts_for_nothing(self) -> None:
        async with sidecars(2) as (here, there):
            await there.listen()
            await there.node.daemon.provide(service_cid(service_model("m")))
            await here.discovery.look_up("m")
            assert len(here.book) == 0
            assert here.found_s == []

    async def test_it_returns_at_the_first_hit(self, autojump_clock: MockClock) -> None:
        async def mute(stream: P2PStream) -> None:
            await trio.sleep(1000)

        async with sidecars(3) as (here, slow, quick):
            await slow.node.serve(PROTOCOL_HELLO, mute)
            await slow.node.daemon.provide(service_cid(service_model("m")))
            await self.provide(quick)
            began_at = trio.current_time()
            await here.discovery.look_up("m")
            assert trio.current_time() - began_at < 0.1
            assert len(here.book) == 1

    async def test_and_at_the_deadline(self, autojump_clock: MockClock) -> None:
        async with sidecars(2) as (here, there):
            there.node.p2pd.hold.add("CONNECT")
            here.node.p2pd.hold.add("DHT FIND_PROVIDERS")
            began_at = trio.current_time()
            await here.discovery.look_up("m", timeout_s=2.0)
            assert trio.current_time() - began_at == pytest.approx(2.0)

    async def test_a_daemon_that_refuses_or_is_away_finds_nothing(self) -> None:
        async with sidecars(2) as (here, _):
            here.node.p2pd.refuse["DHT FIND_PROVIDERS"] = "no"
            await here.discovery.look_up("m")
            here.daemon = None
            await here.discovery.look_up("m")
            assert here.found_s == []

    async def test_records_are_put_until_it_succeeds_and_again_after_a_restart(self, autojump_clock: MockClock) -> None:
        async with sidecars(2) as (here, _), trio.open_nursery() as nursery:
            here.node.p2pd.refuse["DHT PROVIDE"] = "failed to find any peer in table"
            await nursery.start(lambda task_status: here.discovery.run(searches=False, task_status=task_status))
            await trio.sleep(10)
            assert 2 <= here.node.p2pd.requests["DHT PROVIDE"] <= 6
            here.node.p2pd.refuse.clear()
            await trio.sleep(60)
            count = here.node.p2pd.requests["DHT PROVIDE"]
            assert here.node.p2pd.swarm.providers[service_cid("/x")] == [here.node.peer]
            await trio.sleep(3600)
            assert here.node.p2pd.requests["DHT PROVIDE"] == count
            here.discovery.forget_provided()
            await trio.sleep(1)
            assert here.node.p2pd.requests["DHT PROVIDE"] == count + 1
            nursery.cancel_scope.cancel()


def test_validators_by_their_addresses() -> None:
    a, b = (Signer(bytes([n]) * 32).peer for n in (1, 2))
    addrs = [Multiaddr.parse(f"/ip4/10.0.0.{n}/tcp/1/p2p/{who}") for n, who in ((1, a), (2, b), (3, a))]
    grouped = group_by_peer([*addrs, Multiaddr.parse("/ip4/10.0.0.9/tcp/1")])
    assert [(v.peer, v.addrs) for v in grouped] == [(a, (addrs[0], addrs[2])), (b, (addrs[1],))]


class TestBootstrap:
    @asynccontextmanager
    async def pair(self) -> AsyncIterator[tuple[Sidecar, Sidecar, trio.Nursery]]:
        """A node and its validator, which are not connected."""
        async with fake_nodes(2, connected=False) as (near, far), trio.open_nursery() as nursery:
            validator = Validator(far.peer, (far.p2pd.addr.with_peer(far.peer),))
            here, there = Sidecar(near, validators=[validator]), Sidecar(far)
            await there.listen()
            yield here, there, nursery
            nursery.cancel_scope.cancel()

    async def test_joined_once_its_catalogue_read_and_itself_tagged(self, autojump_clock: MockClock) -> None:
        async with self.pair() as (here, there, nursery):
            executor = Signer(b"e" * 32)
            there.intake.take(announcement(executor), found_by="gossip", source=None)
            await nursery.start(here.bootstrap.run)
            await trio.sleep(5)
            assert here.joined == [(there.node.peer, 1)]
            assert here.joined_after == [there.node.peer]
            assert here.complete == [1]
            assert here.bootstrap.is_complete
            assert here.changes == [(executor.peer, Change.NEW, "catalogue")]
            assert (there.node.peer, VALIDATOR_TAG) in here.node.p2pd.tags

    async def test_it_is_dialled_with_growing_pauses_until_it_is_there(self, autojump_clock: MockClock) -> None:
        async with self.pair() as (here, _there, nursery):
            here.node.p2pd.refuse["CONNECT"] = "nobody there"
            await nursery.start(here.bootstrap.run)
            await trio.sleep(300)
            pauses = [b - a for a, b in zip(here.failures, here.failures[1:], strict=False)]
            assert pauses[0] < 1
            assert max(pauses) <= 1.5 * MAX_BACKOFF_S
            assert pauses[-1] >= 0.5 * MAX_BACKOFF_S
            assert 10 <= len(here.failures) <= 30
            assert not here.bootstrap.is_complete
            assert "nobody there" in here.bootstrap.validators[0].last_error
            here.node.p2pd.refuse.clear()
            await trio.sleep(60)
            assert len(here.joined) == 1
            assert here.bootstrap.validators[0].failures == 0
            assert here.bootstrap.validators[0].last_error == ""

    async def test_joined_again_after_a_loss_but_complete_only_once(self, autojump_clock: MockClock) -> None:
        async with self.pair() as (here, there, nursery):
            await nursery.start(here.connections.run)
            await nursery.start(here.bootstrap.run)
            await trio.sleep(5)
            here.node.p2pd.swarm.cut(here.node.peer, there.node.peer)
            await trio.sleep(5)
            assert len(here.joined) == 2
            assert here.complete == [1]

    async def test_the_catalogue_is_looked_into_now_and_then(self, autojump_clock: MockClock) -> None:
        async with self.pair() as (here, there, nursery):
            await nursery.start(here.connections.run)
            await nursery.start(here.bootstrap.run)
            await trio.sleep(5)
            there.intake.take(announcement(Signer(b"e" * 32), ttl_s=900), found_by="gossip", source=None)
            await trio.sleep(70)
            assert len(here.book) == 1
            assert len(here.joined) == 1

    async def test_one_of_another_network_keeps_failing(self, autojump_clock: MockClock) -> None:
        async with self.pair() as (here, there, nursery):
            there.hello._keys = lambda: [NetworkKey(b"o" * 32)]
            await nursery.start(here.bootstrap.run)
            await trio.sleep(20)
            assert here.joined == []
            assert "refused" in here.bootstrap.validators[0].last_error

    async def test_without_validators_it_is_complete(self) -> None:
        async with sidecars(1) as (side,):
            assert side.bootstrap.is_complete
            me = Validator(side.node.peer, ())
            assert Sidecar(side.node, validators=[me]).bootstrap.is_complete


class TestProber:
    async def start(self, nursery: trio.Nursery, side: Sidecar, **more: Any) -> None:
        await nursery.start(
            lambda task_status: run_prober(
                book=side.book,
                connections=side.connections,
                hello=side.hello,
                on_lost=side.lost.append,
                task_status=task_status,
                **more,
            )
        )

    def state(self, side: Sidecar) -> list[LeaseState]:
        now = trio.current_time()
        return [view.state(now) for view in side.book.executors_of("m", now)]

    async def test_a_suspect_that_answers_is_kept(self, autojump_clock: MockClock) -> None:
        async with sidecars(2) as (here, there), trio.open_nursery() as nursery:
            there.mine = announcement(there.node.signer)
            await there.listen()
            here.intake.take(there.mine, found_by="gossip", source=None)
            await self.start(nursery, here)
            await trio.sleep(200)
            assert self.state(here) == [LeaseState.FRESH]
            assert here.lost == []
            assert there.node.p2pd.requests["STREAM_OPEN"] == 0
            nursery.cancel_scope.cancel()

    async def test_one_that_does_not_is_lost_with_its_lease(self, autojump_clock: MockClock) -> None:
        async with sidecars(2) as (here, there), trio.open_nursery() as nursery:
            here.intake.take(announcement(there.node.signer), found_by="gossip", source=None)
            await self.start(nursery, here)
            await trio.sleep(25)
            assert self.state(here) == [LeaseState.SUSPECT]
            await trio.sleep(10)
            assert here.lost == [there.node.peer]
            assert len(here.book) == 0
            nursery.cancel_scope.cancel()

    async def test_a_full_announcement_that_is_wanted_is_fetched(self, autojump_clock: MockClock) -> None:
        async with sidecars(2) as (here, there), trio.open_nursery() as nursery:
            there.mine = announcement(there.node.signer)
            await there.listen()
            heartbeat = announcement(there.node.signer, 2, kind=Kind.HEARTBEAT, full_digest=b"d" * 32)
            here.intake.take(heartbeat, found_by="gossip", source=None)
            await self.start(nursery, here)
            await trio.sleep(2)
            assert self.state(here) == [LeaseState.FRESH]
            nursery.cancel_scope.cancel()

    async def test_what_it_has_no_room_for_waits(self, autojump_clock: MockClock) -> None:
        others = [Signer(bytes([number]) * 32) for number in range(100, 110 + MAX_UNDER_WAY)]
        async with sidecars(1) as (here,), trio.open_nursery() as nursery:
            asked: list[PeerId] = []

            async def ensure(peer: PeerId, *, timeout_s: float) -> None:
                asked.append(peer)
                await trio.sleep(timeout_s - 0.1)

            here.connections.ensure = ensure  # type: ignore[method-assign, assignment]
            for other in others:
                heartbeat = announcement(other, 2, kind=Kind.HEARTBEAT, full_digest=b"d" * 32)
                here.intake.take(heartbeat, found_by="gossip", source=None)
            await self.start(nursery, here)
            await trio.sleep(1)
            assert len(asked) == MAX_UNDER_WAY
            await trio.sleep(10)
            assert set(asked) == {other.peer for other in others}
            nursery.cancel_scope.cancel()

    async def test_one_that_hangs_is_probed_once_at_a_time(self, autojump_clock: MockClock) -> None:
        async def mute(stream: P2PStream) -> None:
            await trio.sleep(1000)

        async with sidecars(2) as (here, there), trio.open_nursery() as nursery:
            await there.node.serve(PROTOCOL_HELLO, mute)
            here.intake.take(announcement(there.node.signer), found_by="gossip", source=None)
            await self.start(nursery, here)
            await trio.sleep(29)
            assert here.node.p2pd.requests["STREAM_OPEN"] <= 3
            nursery.cancel_scope.cancel()

"""Greeting new connections, keeping offenders away, tags, and finding the network again; on virtual time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock

from lloom_sidecar.errors import DaemonRejectedError, DaemonUnavailableError, LloomError, PeerUnreachableError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.network.bootstrap import Validator
from lloom_sidecar.network.greeter import FIRST_RETRY_S, GREETED_S, Greeter
from lloom_sidecar.network.hello import Catalogue
from lloom_sidecar.network.known_peers import REMEMBER_AGAIN_S, KnownPeers, Rejoined
from lloom_sidecar.network.tags import IN_USE_TAG, RETAG_S, Tags
from lloom_sidecar.network.upkeep import CATALOGUE_EVERY_S, Round, Upkeep
from lloom_sidecar.p2p.daemon import PeerAddrs
from lloom_sidecar.peers.standing import KEEP_AWAY_S, Standing

PEERS = sorted((PeerId.from_ed25519(bytes([number]) * 32) for number in range(1, 100)), key=lambda peer: peer.raw)
ME, A, B, C = PEERS[50], PEERS[60], PEERS[70], PEERS[40]
"""C's id is smaller than ours, A's and B's are larger."""
DIRECT = Multiaddr.parse("/ip4/127.0.0.1/tcp/4001")
RELAYED = Multiaddr.parse(f"/ip4/127.0.0.1/tcp/4001/p2p/{C}/p2p-circuit")


@dataclass
class World:
    """Connections, hello and p2pd of one node, as its services see them."""

    connected: dict[PeerId, Multiaddr] = field(default_factory=dict)
    greets: list[tuple[float, PeerId]] = field(default_factory=list)
    disconnects: list[tuple[float, PeerId, str]] = field(default_factory=list)
    dials: list[PeerId] = field(default_factory=list)
    alive: set[PeerId] = field(default_factory=set)
    """Those that answer a dial."""
    members: dict[PeerId, frozenset[str]] = field(default_factory=dict)
    catalogues: list[PeerId] = field(default_factory=list)
    tags: set[PeerId] = field(default_factory=set)
    tag_calls: int = 0
    walks: list[bytes] = field(default_factory=list)
    is_up: bool = True
    answer: Callable[[PeerId], Awaitable[None]] | None = None
    looks: int = 0

    # connections
    def __contains__(self, peer: object) -> bool:
        return peer in self.connected

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(list(self.connected))

    def __len__(self) -> int:
        return len(self.connected)

    def addr_of(self, peer: PeerId) -> Multiaddr | None:
        return self.connected.get(peer)

    async def look(self) -> None:
        self.looks += 1

    async def ensure(self, peer: PeerId, *, timeout_s: float, addrs: Sequence[Multiaddr]) -> None:
        self.dials.append(peer)
        await trio.sleep(1)
        if peer not in self.alive:
            raise PeerUnreachableError("nobody there")
        self.connected[peer] = addrs[0]

    # hello
    async def greet(self, peer: PeerId) -> None:
        self.greets.append((trio.current_time(), peer))
        if self.answer is not None:
            await self.answer(peer)

    async def read_catalogue(self, peer: PeerId) -> Catalogue:
        self.catalogues.append(peer)
        return Catalogue([], 0, False)

    # p2pd
    def daemon(self) -> World:
        if not self.is_up:
            raise DaemonUnavailableError("away")
        return self

    async def disconnect(self, peer: PeerId, cause: str) -> None:
        self.disconnects.append((trio.current_time(), peer, cause))
        self.connected.pop(peer, None)

    async def tag_peer(self, peer: PeerId, tag: str, weight: int) -> None:
        assert tag == IN_USE_TAG
        self.tag_calls += 1
        self.tags.add(peer)

    async def untag_peer(self, peer: PeerId, tag: str) -> None:
        self.tags.discard(peer)

    async def find_peer(self, peer: PeerId, *, timeout_s: float) -> PeerAddrs:
        if peer == B:
            raise DaemonRejectedError("not found")
        return PeerAddrs(peer, (RELAYED, DIRECT, DIRECT))

    async def get_closest_peers(self, key: bytes, *, timeout_s: float) -> list[PeerId]:
        self.walks.append(key)
        return [A, B]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def standing() -> Standing:
    return Standing()


@pytest.fixture
def greeter(world: World, standing: Standing) -> Greeter:
    return Greeter(
        me=ME,
        connections=world,  # type: ignore[arg-type]
        hello=world,  # type: ignore[arg-type]
        standing=standing,
        is_needed=lambda peer: peer == B,
        disconnect=world.disconnect,
        rng=random.Random(1),
    )


# ---------------------------------------------------------------- greeting
class TestGreeter:
    async def test_the_smaller_id_greets_soon_and_the_larger_one_late(
        self, world: World, greeter: Greeter, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        world.connected = {A: DIRECT, C: DIRECT}
        nursery.start_soon(greeter.run)
        await trio.sleep(20)
        times = {peer: at for at, peer in world.greets}
        assert 0.5 <= times[A] <= 2
        assert 5 <= times[C] <= 7

    async def test_whoever_was_greeted_is_not_greeted_again_before_its_membership_ends(
        self, world: World, greeter: Greeter, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        async def greeted(peer: PeerId) -> None:
            greeter.greeted(peer)

        world.answer = greeted
        world.connected = {A: DIRECT, C: DIRECT}
        greeter.greeted(C)  # it greeted us
        nursery.start_soon(greeter.run)
        await trio.sleep(GREETED_S - 5)
        assert [peer for _, peer in world.greets] == [A]
        await trio.sleep(20)
        assert sorted(peer for _, peer in world.greets) == sorted([A, A, C])

    async def test_a_new_connection_is_greeted_anew(
        self, world: World, greeter: Greeter, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        world.connected = {A: DIRECT}
        greeter.greeted(A)
        nursery.start_soon(greeter.run)
        await trio.sleep(5)
        assert world.greets == []
        greeter.forget(A)
        await trio.sleep(5)
        assert len(world.greets) == 1

    async def test_a_relayed_connection_is_left_alone(
        self, world: World, greeter: Greeter, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        world.connected = {A: RELAYED}
        nursery.start_soon(greeter.run)
        await trio.sleep(60)
        assert world.greets == []
        world.connected = {A: DIRECT}
        await trio.sleep(2)
        assert len(world.greets) == 1

    async def test_one_that_speaks_no_hello_is_asked_ever_more_seldom(
        self, world: World, greeter: Greeter, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        async def silent(peer: PeerId) -> None:
            if len(world.greets) > 1:
                await trio.sleep_forever()
            raise PeerUnreachableError("protocols not supported")

        world.answer = silent
        world.connected = {A: DIRECT}
        nursery.start_soon(greeter.run)
        await trio.sleep(3600)
        times = [at for at, _ in world.greets]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert FIRST_RETRY_S <= gaps[0] <= FIRST_RETRY_S + 2
        assert gaps == sorted(gaps)
        assert 4 <= len(times) <= 12

    async def test_the_refused_are_disconnected_after_a_grace_unless_needed(
        self, world: World, standing: Standing, greeter: Greeter, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        async def refuse(peer: PeerId) -> None:
            standing.refuse(peer, "not_member", trio.current_time())
            raise PeerUnreachableError("refused")

        world.answer = refuse
        world.connected = {A: DIRECT, B: DIRECT}
        nursery.start_soon(greeter.run)
        await trio.sleep(10)
        ((at, peer, cause),) = world.disconnects
        assert (peer, cause) == (A, "not_member")
        assert 3 <= at <= 5
        assert B in world.connected
        # Back again: it is not greeted by us, and may greet; then it goes once more.
        greeter.forget(A)
        world.connected[A] = DIRECT
        await trio.sleep(10)
        assert len(world.disconnects) == 2
        assert sorted(peer for _, peer in world.greets) == sorted([A, B])

    async def test_a_refused_one_that_proves_itself_stays(
        self, world: World, standing: Standing, greeter: Greeter, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        standing.refuse(A, "not_member", trio.current_time())
        world.connected = {A: DIRECT}
        nursery.start_soon(greeter.run)
        await trio.sleep(1.5)
        standing.accept(A)
        greeter.greeted(A)
        await trio.sleep(30)
        assert world.disconnects == []

    async def test_a_failed_hello_is_said_again_soon_unless_the_peer_greeted_us_meanwhile(
        self, world: World, greeter: Greeter, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        async def fail(peer: PeerId) -> None:
            await trio.sleep(2)
            if peer == B:
                greeter.greeted(B)
            raise PeerUnreachableError("not listening yet")

        world.answer = fail
        world.connected = {A: DIRECT, B: DIRECT}
        nursery.start_soon(greeter.run)
        await trio.sleep(12)
        greeted = [peer for _, peer in world.greets]
        assert greeted.count(A) == 2
        assert greeted.count(B) == 1

    async def test_a_disconnect_that_hangs_holds_nobody_up(
        self, world: World, standing: Standing, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        closed: list[PeerId] = []

        async def hang(peer: PeerId, cause: str) -> None:
            closed.append(peer)
            await trio.sleep_forever()

        greeter = Greeter(
            me=ME,
            connections=world,  # type: ignore[arg-type]
            hello=world,  # type: ignore[arg-type]
            standing=standing,
            is_needed=lambda peer: False,
            disconnect=hang,
            rng=random.Random(1),
        )
        standing.refuse(A, "not_member", trio.current_time())
        world.connected = {A: DIRECT, B: DIRECT}
        nursery.start_soon(greeter.run)
        await trio.sleep(10)
        assert closed == [A]
        assert [peer for _, peer in world.greets] == [B]

    async def test_a_hello_whose_connection_was_never_seen_is_forgotten(
        self, world: World, greeter: Greeter, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        greeter.greeted(A)
        nursery.start_soon(greeter.run)
        await trio.sleep(70)
        world.connected = {A: DIRECT}
        await trio.sleep(5)
        assert [peer for _, peer in world.greets] == [A]

    async def test_the_banned_are_disconnected_at_once_and_may_come_back_later(
        self, world: World, standing: Standing, greeter: Greeter, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        nursery.start_soon(greeter.run)
        await trio.sleep(10.1)
        world.connected = {B: DIRECT}
        while not standing.offend(B, "size", trio.current_time()):
            pass
        greeter.look_now()
        await trio.sleep(0.1)
        assert world.disconnects[0][1:] == (B, "banned")
        assert world.looks == 1
        await trio.sleep(KEEP_AWAY_S)
        greeter.forget(B)
        world.connected = {B: DIRECT}
        await trio.sleep(10)
        assert len(world.disconnects) == 1
        assert [peer for _, peer in world.greets] == [B]


# ---------------------------------------------------------------- tags
class TestTags:
    async def test_a_peer_is_tagged_from_its_first_use_to_its_last(
        self, world: World, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        tags = Tags(world.daemon)  # type: ignore[arg-type]
        nursery.start_soon(tags.run)
        with tags.using(A):
            tags.hold(A)
            await trio.sleep(0.1)
            assert A in tags
            assert world.tags == {A}
        await trio.sleep(0.1)
        assert world.tags == {A}
        tags.release(A)
        await trio.sleep(0.1)
        assert world.tags == set()
        assert A not in tags

    async def test_a_p2pd_that_was_away_is_told_again(
        self, world: World, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        tags = Tags(world.daemon)  # type: ignore[arg-type]
        nursery.start_soon(tags.run)
        world.is_up = False
        tags.hold(A)
        await trio.sleep(0.1)
        assert world.tags == set()
        world.is_up = True
        tags.forget()
        await trio.sleep(0.1)
        assert world.tags == {A}
        before = world.tag_calls
        await trio.sleep(RETAG_S + 1)
        assert world.tag_calls == before + 1


# ---------------------------------------------------------------- peers of earlier
@dataclass
class Known:
    peer: PeerId
    addrs: tuple[Multiaddr, ...] = (DIRECT,)
    roles: frozenset[str] = frozenset()


class Store:
    def __init__(self) -> None:
        self.kept: list[Known] = []
        self.saved: list[tuple[PeerId, tuple[Multiaddr, ...], frozenset[str]]] = []
        self.is_broken = False

    async def load(self) -> list[Known]:
        if self.is_broken:
            raise LloomError("the disk is gone")
        return self.kept

    async def save(self, peer: PeerId, addrs: tuple[Multiaddr, ...], roles: frozenset[str]) -> None:
        if self.is_broken:
            raise LloomError("the disk is gone")
        self.saved.append((peer, addrs, roles))


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def known(world: World, store: Store) -> KnownPeers:
    return KnownPeers(
        me=ME,
        store=store,
        get_daemon=world.daemon,  # type: ignore[arg-type]
        connections=world,  # type: ignore[arg-type]
        hello=world,  # type: ignore[arg-type]
        intake=None,  # type: ignore[arg-type]  # the catalogues here are empty
        roles_of=world.members.get,
        dialable=tuple,
    )


class TestKnownPeers:
    async def test_members_are_remembered_with_what_identify_said_direct_addresses_first(
        self, world: World, store: Store, known: KnownPeers
    ) -> None:
        world.connected = {A: DIRECT, B: DIRECT, C: DIRECT}
        world.members |= {A: frozenset({"client"}), B: frozenset({"validator"})}
        await known.remember()
        assert store.saved == [
            (B, (DIRECT,), frozenset({"validator"})),
            (A, (DIRECT, RELAYED), frozenset({"client"})),
        ]

    async def test_each_once_an_hour_or_when_its_roles_change_or_after_it_was_away(
        self, world: World, store: Store, known: KnownPeers, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        world.connected = {A: DIRECT}
        world.members[A] = frozenset()
        nursery.start_soon(known.run)
        await trio.sleep(REMEMBER_AGAIN_S / 2)
        assert len(store.saved) == 1
        world.members[A] = frozenset({"executor"})
        await trio.sleep(10)
        assert len(store.saved) == 2
        world.connected = {}
        await trio.sleep(10)
        world.connected = {A: DIRECT}
        await trio.sleep(10)
        assert len(store.saved) == 3
        await trio.sleep(REMEMBER_AGAIN_S + 10)
        assert len(store.saved) == 4

    async def test_a_broken_store_does_not_end_it(
        self, world: World, store: Store, known: KnownPeers, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        world.connected = {A: DIRECT}
        world.members[A] = frozenset()
        store.is_broken = True
        nursery.start_soon(known.run)
        await trio.sleep(20)
        store.is_broken = False
        await trio.sleep(10)
        assert len(store.saved) == 1

    async def test_a_rejoin_dials_validators_first_and_stops_when_enough_were_greeted(
        self, world: World, store: Store, known: KnownPeers, autojump_clock: MockClock
    ) -> None:
        store.kept = [Known(ME), *(Known(peer) for peer in PEERS[:30]), Known(C, roles=frozenset({"validator"}))]
        world.alive = {C, *PEERS[10:30]}
        world.members |= dict.fromkeys(world.alive, frozenset())
        found = await known.rejoin(wanted=3)
        assert world.dials[0] == C
        assert found.joined[0] == C
        assert len(found.joined) >= 3
        assert found.tried < 31
        assert ME not in world.dials
        assert world.catalogues[0] == C

    async def test_one_of_another_network_does_not_count(
        self, world: World, store: Store, known: KnownPeers, autojump_clock: MockClock
    ) -> None:
        store.kept = [Known(A), Known(B)]
        world.alive = {A}
        assert await known.rejoin() == Rejoined(2, ())


# ---------------------------------------------------------------- rounds
class Validators:
    """What the upkeep needs of Bootstrap."""

    def __init__(self) -> None:
        self.validators = [Validator(A, (DIRECT,), last_error="nobody there")]
        self.joined: list[PeerId] = []
        self.retries: list[float] = []
        self.is_complete = False

    def complete(self) -> None:
        self.is_complete = True

    async def retry_all(self, *, timeout_s: float) -> None:
        self.retries.append(trio.current_time())

    async def first_tried(self, *, timeout_s: float) -> None:
        await trio.sleep(0.5)


@dataclass
class Told:
    """What the upkeep told."""

    rounds: list[Round] = field(default_factory=list)
    warnings: list[tuple[int, int, str]] = field(default_factory=list)
    joined: list[PeerId] = field(default_factory=list)

    def round_ended(self, found: Round) -> None:
        self.rounds.append(found)

    def few_peers(self, peers: int, wanted: int, tried: str) -> None:
        self.warnings.append((peers, wanted, tried))

    async def after_join(self, peer: PeerId) -> None:
        self.joined.append(peer)


@pytest.fixture
def validators() -> Validators:
    return Validators()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def upkeep(world: World, known: KnownPeers, validators: Validators, told: Told) -> Upkeep:
    return Upkeep(
        me=ME,
        bootstrap=validators,  # type: ignore[arg-type]
        known=known,
        connections=world,  # type: ignore[arg-type]
        members=lambda: [peer for peer in world.connected if peer in world.members],
        get_daemon=world.daemon,  # type: ignore[arg-type]
        observer=told,
        after_join=told.after_join,
        min_peers=2,
        round_every_s=300,
        refresh_every_s=600,
        rng=random.Random(1),
    )


class TestUpkeep:
    async def test_in_order_there_are_only_periodic_rounds_and_refreshes(
        self,
        world: World,
        validators: Validators,
        told: Told,
        upkeep: Upkeep,
        nursery: trio.Nursery,
        autojump_clock: MockClock,
    ) -> None:
        world.connected = {A: DIRECT, B: DIRECT}
        validators.joined = [A]
        nursery.start_soon(upkeep.run)
        await trio.sleep(3600)
        assert 11 <= len(validators.retries) <= 14
        assert told.warnings == []
        assert world.dials == []
        assert world.catalogues == []
        # Each refresh walks to the own id and to a random key.
        assert 5 <= world.walks.count(ME.raw) <= 7
        assert len(world.walks) == 2 * world.walks.count(ME.raw)
        assert len(set(world.walks)) == world.walks.count(ME.raw) + 1
        assert upkeep.table_peers == 2

    async def test_alone_it_tries_at_once_and_ever_more_seldom_and_says_what(
        self,
        world: World,
        store: Store,
        validators: Validators,
        told: Told,
        upkeep: Upkeep,
        nursery: trio.Nursery,
        autojump_clock: MockClock,
    ) -> None:
        store.kept = [Known(B)]
        nursery.start_soon(upkeep.run)
        await trio.sleep(250)
        assert validators.retries[0] <= 1
        gaps = [b - a for a, b in itertools.pairwise(validators.retries)]
        assert gaps[0] < 10
        assert max(gaps) <= 65
        assert world.walks
        ((peers, wanted, tried),) = told.warnings
        assert (peers, wanted) == (0, 2)
        assert tried == (
            "0 of 1 validators answer, nobody there, 0 of 1 peers of earlier answered, 2 peers found in the DHT"
        )
        await trio.sleep(100)
        assert len(told.warnings) == 2  # the periodic round says it again

    async def test_peers_of_earlier_are_enough(
        self,
        world: World,
        store: Store,
        validators: Validators,
        told: Told,
        upkeep: Upkeep,
        nursery: trio.Nursery,
        autojump_clock: MockClock,
    ) -> None:
        store.kept = [Known(B), Known(C)]
        world.alive = {B, C}
        world.members |= {B: frozenset(), C: frozenset()}
        nursery.start_soon(upkeep.run)
        await trio.sleep(5)
        assert validators.is_complete
        assert sorted(told.joined) == sorted([B, C])
        assert told.rounds[0].known_joined == 2
        assert told.warnings == []
        # With no validator some member's catalogue is read now and then.
        before = len(world.catalogues)
        await trio.sleep(3 * CATALOGUE_EVERY_S)
        assert len(world.catalogues) >= before + 2

    async def test_a_broken_store_and_a_p2pd_that_is_away_end_nothing(
        self,
        world: World,
        store: Store,
        told: Told,
        upkeep: Upkeep,
        nursery: trio.Nursery,
        autojump_clock: MockClock,
    ) -> None:
        store.is_broken = True
        world.is_up = False
        nursery.start_soon(upkeep.run)
        await trio.sleep(60)
        assert upkeep.table_peers == 0
        assert told.warnings[0][2].endswith("0 peers found in the DHT")
        assert len(told.rounds) > 2

    async def test_a_warning_comes_again_after_it_was_well(
        self, world: World, told: Told, upkeep: Upkeep, nursery: trio.Nursery, autojump_clock: MockClock
    ) -> None:
        nursery.start_soon(upkeep.run)
        await trio.sleep(20)
        assert len(told.warnings) == 1
        world.connected = {A: DIRECT, B: DIRECT}
        world.members |= {A: frozenset()}
        await trio.sleep(20)
        world.connected = {A: DIRECT}
        await trio.sleep(5)
        assert len(told.warnings) == 2

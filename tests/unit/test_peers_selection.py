"""Choosing an executor: filters, affinity, two choices, policies, and a replay of a network with bad executors."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest

from lloom_sidecar.errors import NoExecutorError, PriceError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.peers.executors import ExecutorView, ModelIndex
from lloom_sidecar.peers.health import HealthBook, Outcome
from lloom_sidecar.peers.hedging import Hedge
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import Choice, Filtered, Policy, Rule, Wanted, choose
from lloom_sidecar.protocol.offers import Announcement, Kind, Load, ModelOffer, Price

DIRECT = (Multiaddr.parse("/ip4/127.0.0.1/tcp/4001"),)
RELAYED = (
    Multiaddr.parse("/ip4/127.0.0.1/tcp/1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp/p2p-circuit"),
)
NOW = 1000.0


def peer(number: int) -> PeerId:
    return PeerId.from_ed25519(number.to_bytes(32, "big"))


@dataclass
class Network:
    """A peer book, its health book, and choices made on both."""

    seed: int = 1
    now: float = NOW
    health: HealthBook = field(default_factory=HealthBook)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.book = PeerBook(me=peer(0), is_open=True, allow_list=frozenset())

    def add(
        self,
        number: int,
        offer: ModelOffer | None = None,
        *,
        addrs: tuple[Multiaddr, ...] = DIRECT,
        load: Load | None = None,
        is_member: bool = True,
        ttl_s: float = 900.0,
    ) -> PeerId:
        digest = hashlib.sha256(number.to_bytes(4, "big")).digest()
        self.book.apply(
            Announcement(
                peer(number),
                1,
                0,
                ttl_s,
                Kind.INITIAL,
                b"",
                is_member,
                addrs,
                (offer or ModelOffer("m"),),
                load or Load(),
                "",
                b"",
                digest,
                digest,
            ),
            now=self.now,
            direct=True,
            source=None,
        )
        return peer(number)

    def measured(self, who: PeerId, ttft_s: float, outcome: Outcome = Outcome.OK) -> None:
        for _ in range(3):
            self.health.end(self.health.begin(who, "m", self.now - ttft_s), outcome, self.now)

    def choose(self, policy: Policy = Policy.ADAPTIVE, *, explain: bool = False, **wanted: object) -> Choice:
        return choose(
            self.book.index_of("m"),
            request=Wanted("m", **wanted),  # type: ignore[arg-type]
            policy=policy,
            health=self.health,
            now=self.now,
            rng=self.rng,
            explain=explain,
        )

    def spread(self, times: int, **kwargs: object) -> Counter[PeerId]:
        """Whom ``times`` choices pick."""
        picked: Counter[PeerId] = Counter()
        for _ in range(times):
            pick = self.choose(**kwargs).pick  # type: ignore[arg-type]
            assert pick is not None
            picked[pick.peer] += 1
        return picked


# ---------------------------------------------------------------- invented executors
def test_after_a_failure_those_that_have_proven_to_exist_come_first() -> None:
    net = Network()
    real = net.add(1)
    for number in range(2, 1002):
        net.add(number, ModelOffer("m", slots=1000))
    drawn = net.choose().pick
    assert drawn is not None
    assert not drawn.is_proven
    # A failure, and it is still one among a thousand.
    failed = frozenset({drawn.peer})
    assert len(net.spread(20, excluded=failed)) > 5
    net.book.on_hello(real, is_member=True, roles=frozenset(), features=frozenset(), max_streams=1, now=net.now)
    assert net.spread(20, excluded=failed) == {real: 20}
    assert len(net.spread(20)) > 5  # a first attempt goes to anybody
    for policy in Policy:
        assert net.spread(3, policy=policy, excluded=failed) == {real: 3}
    # Not when it failed itself.
    assert real not in net.spread(20, excluded=failed | {real})


def test_one_that_has_served_has_proven_to_exist() -> None:
    net = Network()
    real, _ = net.add(1), net.add(2)
    net.book.mark_served(real)
    (view,) = [view for view in net.book.index_of("m") if view.peer == real]
    assert view.is_proven
    assert net.spread(10, excluded=frozenset({peer(3)})) == {real: 10}


# ---------------------------------------------------------------- filters
EUR = Price(10, 20, "EUR")


@pytest.mark.parametrize(
    ("offer", "wanted", "reason"),
    [
        (ModelOffer("m"), {"excluded": frozenset({peer(1)})}, Filtered.EXCLUDED),
        (ModelOffer("m"), {"pinned": frozenset({peer(2)})}, Filtered.NOT_PINNED),
        (ModelOffer("m"), {"members_only": True}, Filtered.NETWORK),
        (ModelOffer("m", context_length=100), {"context_needed": 101}, Filtered.CONTEXT),
        (ModelOffer("m", context_length=100), {"context_needed": 100}, None),
        (ModelOffer("m"), {"context_needed": 10**6}, None),
        (ModelOffer("m", features=frozenset({"chat"})), {"features": frozenset({"tools"})}, Filtered.FEATURES),
        (ModelOffer("m", features=frozenset({"chat"})), {"features": frozenset({"chat"})}, None),
        (ModelOffer("m"), {"features": frozenset({"tools"})}, None),
        (ModelOffer("m"), {"features": frozenset({"resume"})}, Filtered.FEATURES),
        (ModelOffer("m", features=frozenset({"resume"})), {"features": frozenset({"resume", "tools"})}, None),
        (
            ModelOffer("m", features=frozenset({"resume", "chat"})),
            {"features": frozenset({"tools"})},
            Filtered.FEATURES,
        ),
        (ModelOffer("m", features=frozenset({"chat"})), {"features": frozenset({"resume"})}, Filtered.FEATURES),
        (ModelOffer("m", digest=b"d" * 32), {"digest": b"d" * 32}, None),
        (ModelOffer("m", digest=b"d" * 32), {"digest": b"e" * 32}, Filtered.DIGEST),
        (ModelOffer("m", digest=b"d" * 32), {}, None),
        (ModelOffer("m"), {"digest": b"d" * 32}, Filtered.DIGEST),
        (ModelOffer("m", price=EUR), {"max_price": Price(9, 20, "EUR")}, Filtered.PRICE),
        (ModelOffer("m", price=EUR), {"max_price": Price(10, 19, "EUR")}, Filtered.PRICE),
        (ModelOffer("m", price=EUR), {"max_price": Price(99, 99, "USD")}, Filtered.PRICE),
        (ModelOffer("m", price=EUR), {"max_price": EUR}, None),
        (ModelOffer("m", price=EUR), {}, None),
        (ModelOffer("m"), {"max_price": Price()}, None),
    ],
)
def test_each_filter(offer: ModelOffer, wanted: dict[str, object], reason: Filtered | None) -> None:
    net = Network()
    net.add(1, offer, is_member=False)
    choice = net.choose(**wanted)  # type: ignore[arg-type]
    assert [one.filtered for one in choice.considered] == [reason]
    assert (choice.pick is None) is (reason is not None)
    assert choice.rule is (Rule.ONLY if reason is None else Rule.NONE)
    assert choice.is_complete


def test_views_of_another_model_are_filtered() -> None:
    net = Network()
    net.add(1)
    choice = choose(net.book.index_of("m"), request=Wanted("n"), health=net.health, now=net.now, rng=net.rng)
    assert choice.filtered == {Filtered.MODEL: 1}


def test_nobody_there_is_an_empty_choice() -> None:
    choice = Network().choose()
    assert (choice.pick, choice.considered, choice.retry_after_s) == (None, (), None)
    assert "nobody offers it" in str(choice.error("m"))


def test_the_dead_are_never_chosen_and_suspects_only_when_nobody_else_is_there() -> None:
    net = Network()
    a, b, c = net.add(1), net.add(2), net.add(3, ttl_s=10)
    net.book.mark_failed(a, net.now)
    net.now += 10
    assert set(net.spread(50)) == {b}
    assert net.choose().filtered == {Filtered.DEAD: 1}
    net.book.mark_failed(b, net.now)
    assert set(net.spread(50)) == {a, b}
    assert net.choose(excluded=frozenset({a, b})).pick is None
    assert net.choose(pinned=frozenset({c})).pick is None


def test_circuit_and_pause_filter_and_say_for_how_long() -> None:
    net = Network()
    a, b = net.add(1), net.add(2)
    for _ in range(5):
        net.health.end(net.health.begin(a, "m", net.now), Outcome.FAILED, net.now)
    net.health.end(net.health.begin(b, "m", net.now), Outcome.REFUSED, net.now, retry_after_s=4)
    choice = net.choose()
    assert choice.filtered == {Filtered.CIRCUIT_OPEN: 1, Filtered.NOT_BEFORE: 1}
    assert choice.retry_after_s == 1.0
    error = choice.error("m")
    assert isinstance(error, NoExecutorError)
    assert error.retry_after_s == 1.0
    assert "1 circuit_open, 1 not_before" in str(error)
    net.now += 1
    probe = net.health.begin(a, "m", net.now)
    assert probe.is_probe
    assert net.choose().filtered == {Filtered.PROBING: 1, Filtered.NOT_BEFORE: 1}


def test_a_price_that_alone_is_in_the_way_is_told() -> None:
    net = Network()
    net.add(1, ModelOffer("m", price=EUR))
    assert isinstance(net.choose(max_price=Price(1, 1, "EUR")).error("m"), PriceError)
    b = net.add(2)
    net.health.end(net.health.begin(b, "m", net.now), Outcome.REFUSED, net.now, retry_after_s=4)
    error = net.choose(max_price=Price(1, 1, "EUR")).error("m")
    assert isinstance(error, NoExecutorError)
    assert error.retry_after_s == 4


# ---------------------------------------------------------------- two choices
def test_the_faster_of_two_is_taken() -> None:
    net = Network()
    a, b = net.add(1), net.add(2)
    net.measured(a, 0.1)
    net.measured(b, 0.4)
    assert set(net.spread(100)) == {a}
    assert net.choose().rule is Rule.TWO_CHOICES


def test_load_and_slots_weigh() -> None:
    net = Network()
    a, b = net.add(1, ModelOffer("m", slots=2)), net.add(2, ModelOffer("m", slots=8))
    net.measured(a, 0.1)
    net.measured(b, 0.1)
    assert set(net.spread(50)) == {b}
    for _ in range(4):
        net.health.begin(b, "m", net.now)
    assert set(net.spread(50)) == {a}
    busy = Network()
    busy.add(1, load=Load(in_flight=3, queued=2))
    idle = busy.add(2)
    assert set(busy.spread(50)) == {idle}


def test_direct_wins_between_equals_but_not_against_the_clearly_faster() -> None:
    net = Network()
    relayed, direct = net.add(1, addrs=RELAYED), net.add(2)
    net.measured(relayed, 0.2)
    net.measured(direct, 0.2)
    assert set(net.spread(50)) == {direct}
    quick = Network()
    relayed, direct = quick.add(1, addrs=RELAYED), quick.add(2)
    quick.measured(relayed, 0.1)
    quick.measured(direct, 0.4)
    assert set(quick.spread(50)) == {relayed}


def test_who_refuses_fast_does_not_attract_traffic() -> None:
    net = Network()
    a, b = net.add(1), net.add(2)
    net.measured(a, 0.3)
    net.measured(b, 0.01)
    assert set(net.spread(50)) == {b}
    net.measured(b, 0.001, Outcome.REFUSED)
    assert set(net.spread(50)) == {a}
    net.now += 2  # its pause is over: one request finds out
    choice = net.choose()
    assert (choice.pick and choice.pick.peer, choice.rule) == (b, Rule.PROBE)
    probe = net.health.begin(b, "m", net.now)
    assert set(net.spread(50)) == {a}
    net.health.end(probe, Outcome.REFUSED, net.now)
    net.now += 0.9  # the pause has doubled with each refusal
    assert set(net.spread(50)) == {a}


@pytest.mark.parametrize("policy", [Policy.ADAPTIVE, Policy.FASTEST])
def test_one_that_comes_back_is_used_again_after_one_probe(policy: Policy) -> None:
    net = Network()
    a, b = net.add(1), net.add(2)
    net.measured(a, 0.3)
    net.measured(b, 0.005)
    net.health.end(net.health.begin(b, "m", net.now), Outcome.FAILED, net.now)
    assert set(net.spread(50, policy=policy)) == {a}
    net.now += 1.0
    assert net.choose(policy, excluded=frozenset({peer(9)})).pick.peer == a  # type: ignore[union-attr]
    probe = net.health.begin(net.choose(policy).pick.peer, "m", net.now)  # type: ignore[union-attr]
    net.now += 0.006
    net.health.end(probe, Outcome.OK, net.now)
    assert (probe.peer, set(net.spread(50, policy=policy))) == (b, {b})


def test_equals_share_the_work() -> None:
    net = Network()
    for number in range(1, 5):
        net.add(number)
    assert min(net.spread(400).values()) > 60


def test_many_candidates_are_drawn_not_scanned() -> None:
    net = Network()
    for number in range(1, 201):
        net.add(number)
    choice = net.choose()
    assert len(choice.considered) == 2
    assert not choice.is_complete
    everybody = net.choose(explain=True)
    assert len(everybody.considered) == 200
    assert everybody.is_complete
    assert len(net.spread(2000)) > 190


def test_draws_that_find_nobody_end_in_a_scan() -> None:
    net = Network()
    everybody = frozenset(net.add(number) for number in range(1, 101))
    choice = net.choose(excluded=everybody - {peer(7)})
    assert choice.pick is not None
    assert choice.pick.peer == peer(7)
    assert net.choose(excluded=everybody).filtered == {Filtered.EXCLUDED: 100}
    pinned = net.choose(pinned=frozenset({peer(9)}))
    assert pinned.pick is not None
    assert pinned.pick.peer == peer(9)
    as_list = choose(list(net.book.index_of("m")), request=Wanted("m"), health=net.health, now=net.now, rng=net.rng)
    assert as_list.is_complete


# ---------------------------------------------------------------- affinity
def test_the_same_beginning_prefers_the_same_executor() -> None:
    net = Network()
    for number in range(1, 9):
        net.add(number)
    keys = [bytes([number]) * 8 for number in range(64)]
    first = [net.choose(affinity_key=key).pick for key in keys]
    assert [net.choose(affinity_key=key).pick for key in keys] == first
    assert net.choose(affinity_key=keys[0]).rule is Rule.AFFINITY
    assert len(set(first)) == 8


def test_one_that_leaves_moves_only_its_own_keys() -> None:
    for count in (8, 100):
        net = Network()
        for number in range(1, count + 1):
            net.add(number)
        keys = [number.to_bytes(8, "big") for number in range(200)]
        before = {key: net.choose(affinity_key=key).pick for key in keys}
        gone = before[keys[0]]
        assert gone is not None
        moved = [
            key for key in keys if net.choose(affinity_key=key, excluded=frozenset({gone.peer})).pick is not before[key]
        ]
        assert moved == [key for key in keys if before[key] is gone]


def test_affinity_gives_way_to_load_and_to_slowness() -> None:
    net = Network()
    for number in range(1, 4):
        net.measured(net.add(number), 0.1)
    key = b"conversation"
    favourite = net.choose(affinity_key=key).pick
    assert favourite is not None
    tickets = [net.health.begin(favourite.peer, "m", net.now) for _ in range(2)]
    second = net.choose(affinity_key=key).pick
    assert second is not None
    assert second is not favourite
    for ticket in tickets:
        net.health.end(ticket, Outcome.CANCELLED, net.now)
    assert net.choose(affinity_key=key).pick is favourite
    for view in net.book.index_of("m"):
        if view in (favourite, second):
            net.measured(view.peer, 3.0)
    choices = [net.choose(affinity_key=key) for _ in range(60)]
    assert {choice.rule for choice in choices} == {Rule.TWO_CHOICES}
    assert sum(choice.pick not in (favourite, second) for choice in choices) > 30


@pytest.mark.parametrize("executors", [5, 200])
def test_who_served_the_conversation_before_is_preferred_within_the_same_bounds(executors: int) -> None:
    net = Network()
    for number in range(1, executors + 1):
        net.add(number, ModelOffer("m", slots=4))
    key = b"conversation"
    cold = net.choose(affinity_key=key).pick
    warm = peer(3) if cold is None or cold.peer != peer(3) else peer(4)
    assert set(net.spread(20, affinity_key=key, warm=warm)) == {warm}
    assert set(net.spread(20, affinity_key=key, warm=peer(9999))) == {cold and cold.peer}
    held = [net.health.begin(warm, "m", net.now) for _ in range(4)]
    assert warm not in net.spread(20, affinity_key=key, warm=warm)
    for ticket in held:
        net.health.end(ticket, Outcome.CANCELLED, net.now)
    assert set(net.spread(20, affinity_key=key, warm=warm)) == {warm}


def test_affinity_among_many_suspects_falls_back() -> None:
    net = Network()
    for number in range(1, 101):
        net.book.mark_failed(net.add(number), net.now)
    choice = net.choose(affinity_key=b"k")
    assert choice.pick is not None
    assert choice.rule is Rule.TWO_CHOICES


# ---------------------------------------------------------------- policies
def priced() -> Network:
    net = Network()
    net.measured(net.add(1, ModelOffer("m", price=Price(1, 1, "EUR"))), 0.5)
    net.measured(net.add(2, ModelOffer("m", price=Price(1, 1, "EUR"))), 0.2)
    net.measured(net.add(3, ModelOffer("m", price=Price(9, 9, "EUR"))), 0.1)
    return net


def test_cheapest_then_fastest_of_the_cheap() -> None:
    assert set(priced().spread(20, policy=Policy.CHEAPEST)) == {peer(2)}


def test_fastest() -> None:
    net = priced()
    assert set(net.spread(20, policy=Policy.FASTEST)) == {peer(3)}
    assert net.choose(Policy.FASTEST).rule is Rule.POLICY


def test_round_robin_takes_turns() -> None:
    net = Network()
    for number in range(1, 4):
        net.add(number)
    order = []
    for _ in range(9):
        pick = net.choose(Policy.ROUND_ROBIN).pick
        assert pick is not None
        net.health.end(net.health.begin(pick.peer, "m", net.now), Outcome.OK, net.now)
        order.append(pick.peer)
    assert len(set(order[:3])) == 3
    assert order[:3] == order[3:6] == order[6:]


def test_race_takes_so_many_best_first() -> None:
    net = priced()
    assert [view.peer for view in net.choose(Policy.RACE, race=2, hedge=Hedge.ON).picks] == [peer(3), peer(2)]
    assert len(net.choose(Policy.RACE, race=0, hedge=Hedge.ON).picks) == 1
    assert len(net.choose(Policy.RACE, race=10, hedge=Hedge.ON).picks) == 3
    for hedge in (Hedge.OFF, Hedge.FREE):  # who charges for it races only when that is allowed
        assert len(net.choose(Policy.RACE, hedge=hedge).picks) == 1
    free = Network()
    for number in range(1, 4):
        free.add(number)
    free.add(4, ModelOffer("m", price=EUR))
    for hedge in (Hedge.OFF, Hedge.FREE):
        assert {view.peer for view in free.choose(Policy.RACE, race=9, hedge=hedge).picks} <= {
            peer(n) for n in range(1, 5)
        }
        assert len(free.choose(Policy.RACE, race=9, hedge=hedge).picks) in (1, 3)
    assert len(free.choose(Policy.RACE, race=9, hedge=Hedge.ON).picks) == 4


def test_the_same_seed_makes_the_same_choices() -> None:
    def run() -> list[PeerId]:
        net = Network(seed=7)
        for number in range(1, 60):
            net.add(number)
        return [pick.peer for _ in range(50) if (pick := net.choose().pick)]

    assert run() == run()


# ---------------------------------------------------------------- the index
def test_the_index_keeps_views_with_the_same_point_apart() -> None:
    net = Network()
    for number in range(1, 4):
        net.add(number)
    views = list(net.book.index_of("m"))
    for view in views:
        view.point = 5
    index = ModelIndex()
    for view in views:
        index.add(view)
    index.discard(views[0])
    assert set(index) == set(views[1:])
    assert index[0] in views
    assert len(index[0:2]) == 2
    assert set(index.near(6, 2)) == set(views[1:])
    assert len(index.near(0, 99)) == 2
    assert len(ModelIndex().near(0, 3)) == 0


def test_a_choice_among_many_costs_no_scan() -> None:
    """Guards the order of magnitude only: a scan of 4,000 takes milliseconds."""
    net = Network()
    for number in range(1, 4001):
        net.add(number)
    index: ModelIndex = net.book.index_of("m")
    views: list[ExecutorView] = list(index)
    assert len(views) == 4000
    started = time.perf_counter()
    for number in range(500):
        net.choose(affinity_key=number.to_bytes(8, "big"))
    assert (time.perf_counter() - started) / 500 < 0.001


class TestTrust:
    def test_a_doubted_one_costs_more_and_gets_less(self) -> None:
        net = Network()
        doubted, other = net.add(1), net.add(2)
        net.health.trust.doubt(doubted, "evidence", 1.0, NOW)
        picks = Counter(net.choose().pick.peer for _ in range(50))  # type: ignore[union-attr]
        assert picks == {other: 50}
        costs = {one.view.peer: one.cost for one in net.choose().considered}
        assert costs[doubted] == pytest.approx(8 * costs[other])

    def test_it_is_still_used_where_there_is_nobody_else(self) -> None:
        net = Network()
        doubted = net.add(1)
        net.health.trust.doubt(doubted, "evidence", 1.0, NOW)
        assert net.choose().pick is not None

    def test_below_the_wanted_trust_it_gets_nothing(self) -> None:
        net = Network()
        doubted, other = net.add(1), net.add(2)
        net.health.trust.doubt(doubted, "evidence", 0.5, NOW)
        choice = net.choose(min_trust=0.75)
        assert choice.pick is not None
        assert choice.pick.peer == other
        assert choice.filtered == {Filtered.DOUBTED: 1}
        assert net.choose(min_trust=0.5).filtered == {}
        alone = net.choose(min_trust=0.75, pinned=frozenset({doubted}))
        assert alone.pick is None
        assert "1 doubted" in str(alone.error("m"))

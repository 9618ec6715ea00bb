"""Which executor gets a request. Pure: reads the candidates and their health, changes nothing, draws from a given rng.

Filter, then a probe if one is due, then prefix affinity, then the power of two choices on peak EWMA x (in flight + 1) /
slots. With many candidates only those drawn are looked at: a choice costs the same among 20 and among 10,000.

Source: Mitzenmacher, The Power of Two Choices in Randomized Load Balancing (2001); Thaler and Ravishankar, Using
Name-Based Mappings to Increase Hit Rates (1998); Mirrokni et al., Consistent Hashing with Bounded Loads (2018).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import Final, NamedTuple

from lloom_sidecar.errors import NoExecutorError, PriceError, RoutingError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.offers import PROVEN_FEATURES, ModelOffer, Price

from .executors import ExecutorView, LeaseState, ModelIndex, ring_point
from .health import MIN_PRIOR_S, HealthBook, Verdict
from .hedging import Hedge

SCAN_AT_MOST: Final = 16
"""Up to so many candidates all are looked at, above it a draw is cheaper."""
MAX_DRAWS: Final = 16
"""Draws before everything is scanned after all: with one usable in four, 99 % of choices need no scan."""
AFFINITY_WINDOW: Final = 8
"""Candidates next to a key on the ring that rendezvous hashing decides between."""
BOUNDED_LOAD: Final = 1.25
"""A preferred executor is passed over above so many times the mean load. Source: Mirrokni et al., c = 1 + 1/4."""
AFFINITY_PATIENCE: Final = 4.0
"""A preferred executor is passed over when it costs so many times what the best one does: a warm cache saves less.
The best one counts as at least ``MIN_PRIOR_S``: below, the difference is noise."""
RELAYED_COST: Final = 1.25
"""Cost factor of a relayed path: direct wins between equals, a clearly faster relayed one still wins."""
DEFAULT_RACE: Final = 3


class Policy(Enum):
    """How to choose between those that may be used."""

    ADAPTIVE = "adaptive"
    CHEAPEST = "cheapest"
    """Lowest sum of both prices (which is compared within one currency: set a price ceiling), then lowest cost."""
    FASTEST = "fastest"
    """Lowest cost of all, not of two. Many clients doing so meet at one executor."""
    ROUND_ROBIN = "round_robin"
    """The one that this node used longest ago."""
    RACE = "race"
    """The ``race`` best at once; the first answer wins. Priced ones only when the request allows hedging."""


class Filtered(Enum):
    """Why a candidate cannot have the request."""

    EXCLUDED = "excluded"
    """Tried already, or ruled out by the request."""
    NOT_PINNED = "not_pinned"
    MODEL = "model"
    NETWORK = "network"
    DEAD = "dead"
    CONTEXT = "context"
    FEATURES = "features"
    DIGEST = "digest"
    """Other weights than those that the request began with, or it does not say which."""
    PRICE = "price"
    DOUBTED = "doubted"
    """Trusted less than the request wants."""
    NOT_BEFORE = "not_before"
    CIRCUIT_OPEN = "circuit_open"
    PROBING = "probing"


_FILTERED_BY_VERDICT: Final = {verdict: Filtered(verdict.value) for verdict in Verdict}


class Rule(Enum):
    """What decided."""

    NONE = "none"
    """Nobody can have the request."""
    PROBE = "probe"
    """It failed before and its pause is over: this request finds out whether it is back."""
    ONLY = "only"
    """One was left, or found by the draws."""
    AFFINITY = "affinity"
    TWO_CHOICES = "two_choices"
    POLICY = "policy"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request needs of its executor."""

    model: str
    features: frozenset[str] = frozenset()
    digest: bytes = b""
    """SHA-256 of the weights that it has to serve, as announced; empty = any."""
    context_needed: int = 0
    """Tokens, prompt and answer; 0 = unknown."""
    max_price: Price | None = None
    """Ceiling for both prices, in its currency; None = none."""
    pinned: frozenset[PeerId] = frozenset()
    """When not empty, only these."""
    excluded: frozenset[PeerId] = frozenset()
    affinity_key: bytes | None = None
    """Digest of the conversation's beginning: the same key prefers the same executor. Never leaves this node."""
    warm: PeerId | None = None
    """Served this conversation before: preferred before what the key says, within the same bounds."""
    min_trust: float = 0.0
    """Only executors that this node trusts so far (``TrustBook``), 0 to 1."""
    members_only: bool = False
    """Only executors of our network, though the book holds others."""
    race: int = DEFAULT_RACE
    panics: bool = False
    """Nobody else is left: an open circuit rules nobody out. Source: Envoy's panic threshold."""
    hedge: Hedge = Hedge.OFF
    """Whether several may be asked. A race is a wish of its own: it runs among the free ones also when this is off."""


class Considered(NamedTuple):
    """One candidate that was looked at."""

    view: ExecutorView
    filtered: Filtered | None
    """None = may be used."""
    is_suspect: bool
    estimate_s: float
    in_flight: int
    cost: float
    """What two choices compare; lower wins. 0 when filtered by the request itself."""
    turn: int
    wait_s: float
    """When filtered by its health: seconds until that ends."""
    is_due: bool = False
    """It failed before, and this request may be its probe."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome, with what led to it."""

    picks: tuple[ExecutorView, ...]
    """The chosen one; with the policy ``race`` up to ``Wanted.race``, best first; empty when there is none."""
    rule: Rule
    considered: tuple[Considered, ...]
    """Those looked at, in no order."""
    is_complete: bool
    """Every candidate is among ``considered``. Always so when there is no pick."""

    @property
    def pick(self) -> ExecutorView | None:
        """The first of ``picks``, or None."""
        return self.picks[0] if self.picks else None

    @property
    def filtered(self) -> Counter[Filtered]:
        """How many were filtered for which reason."""
        return Counter(one.filtered for one in self.considered if one.filtered is not None)

    @property
    def retry_after_s(self) -> float | None:
        """Seconds until the first of those that only their health rules out may be used, or None."""
        waits = [one.wait_s for one in self.considered if one.filtered in _HEALTH_REASONS]
        return min(waits, default=None)

    def error(self, model: str) -> RoutingError:
        """The error of a request for which there is no pick: price_ceiling when the price alone is in the way."""
        reasons = self.filtered
        retry_after_s = self.retry_after_s
        if reasons[Filtered.PRICE] and retry_after_s is None:
            return PriceError(f"nobody offers {model} under the price ceiling of this request")
        told = ", ".join(sorted(f"{count} {reason.value}" for reason, count in reasons.items()))
        return NoExecutorError(
            f"no executor can take a request for {model} now ({told or 'nobody offers it'})",
            retry_after_s=retry_after_s,
        )


_HEALTH_REASONS: Final = frozenset(_FILTERED_BY_VERDICT.values())


def choose(
    candidates: Sequence[ExecutorView],
    *,
    request: Wanted,
    policy: Policy = Policy.ADAPTIVE,
    health: HealthBook,
    now: float,
    rng: Random,
    explain: bool = False,
) -> Choice:
    """Choose an executor for ``request``.

    Suspects are chosen only when nobody fresh may be used, dead ones never; after a failure those that have proven to
    exist come before those that only announced themselves.

    Args:
        candidates: ``PeerBook.index_of(model)``, or any sequence of views; only of an index are few looked at.
        health: read only; the caller opens a ticket for what it uses.
        now: monotonic seconds.
        rng: decides between equals and which are drawn.
        explain: look at every candidate, however many there are.

    Returns:
        A choice, empty when nobody can have the request: then ``Choice.error`` says why.
    """
    room = _Room(request, health, now)
    is_large = len(candidates) > SCAN_AT_MOST and isinstance(candidates, ModelIndex)
    is_drawn = is_large and policy is Policy.ADAPTIVE and not request.pinned and not explain
    usable: list[Considered] = []
    if is_drawn:
        usable = room.draw(candidates, rng)
    is_complete = not usable
    if is_complete:
        usable = room.scan(candidates)
    if not usable:
        return Choice((), Rule.NONE, room.looked_at, True)
    if request.excluded:
        usable = room.proven(candidates) or usable
    if policy in (Policy.ADAPTIVE, Policy.FASTEST) and not request.excluded:  # a failover probes nobody
        due = next((one for one in usable if one.is_due), None)
        if due is not None:
            return Choice((due.view,), Rule.PROBE, room.looked_at, is_complete)
    if policy is Policy.ADAPTIVE:
        best = _best(usable, rng) if is_complete else min(usable, key=_cost)
        rule = Rule.TWO_CHOICES if len(usable) > 1 else Rule.ONLY
        preferred = room.prefer(candidates, usable)
        if preferred is not None:
            best, rule = preferred, Rule.AFFINITY
        return Choice((best.view,), rule, room.looked_at, is_complete)
    rng.shuffle(usable)  # decides between equals
    if policy is Policy.CHEAPEST:
        picks = [min(usable, key=lambda one: (_total(one.view.offer), one.cost))]
    elif policy is Policy.FASTEST:
        picks = [min(usable, key=_cost)]
    elif policy is Policy.ROUND_ROBIN:
        picks = [min(usable, key=lambda one: one.turn)]
    else:
        ranked = sorted(usable, key=_cost)
        picks = [ranked[0], *(one for one in ranked[1:] if may_double(ranked[0].view, one.view, request.hedge))]
        picks = picks[: max(1, request.race)]
    return Choice(tuple(one.view for one in picks), Rule.POLICY, room.looked_at, is_complete)


def may_double(first: ExecutorView, second: ExecutorView, hedge: Hedge) -> bool:
    """Whether a request that ``first`` has may be asked of ``second`` too."""
    return hedge is Hedge.ON or (first.offer.price.is_free and second.offer.price.is_free)


def _cost(one: Considered) -> float:
    return one.cost


def _total(offer: ModelOffer) -> int:
    return offer.price.prompt_per_million + offer.price.completion_per_million


def _best(usable: list[Considered], rng: Random) -> Considered:
    """The cheaper of two different ones drawn at random."""
    if len(usable) == 1:
        return usable[0]
    first, second = rng.sample(usable, 2)
    return second if second.cost < first.cost else first


class _Room:
    """One choice while it is made: looks at each candidate at most once."""

    def __init__(self, request: Wanted, health: HealthBook, now: float) -> None:
        self._request = request
        self._health = health
        self._now = now
        self._seen: dict[PeerId, Considered] = {}

    @property
    def looked_at(self) -> tuple[Considered, ...]:
        return tuple(self._seen.values())

    def look(self, view: ExecutorView) -> Considered:
        found = self._seen.get(view.peer)
        if found is None:
            found = self._seen[view.peer] = self._consider(view)
        return found

    def scan(self, candidates: Sequence[ExecutorView]) -> list[Considered]:
        """All that may be used: the fresh ones, or when there are none the suspects."""
        all_usable = [one for one in map(self.look, candidates) if one.filtered is None]
        return [one for one in all_usable if not one.is_suspect] or all_usable

    def draw(self, candidates: Sequence[ExecutorView], rng: Random) -> list[Considered]:
        """Up to two different fresh ones that may be used, after at most 16 draws."""
        found: list[Considered] = []
        for _ in range(MAX_DRAWS):
            one = self.look(candidates[int(rng.random() * len(candidates))])
            if one.filtered is None and not one.is_suspect and not any(one is other for other in found):
                found.append(one)
                if len(found) == 2:
                    break
        return found

    def proven(self, candidates: Sequence[ExecutorView]) -> list[Considered]:
        """The fresh ones that may be used and have proven to exist.

        Somebody failed at this request already: among thousands of invented executors every next one drawn would fail
        too. Only then, so that newcomers get their share; it costs a look at each, 1 ms for 20,000.
        """
        found = [self.look(view) for view in candidates if view.is_proven]
        return [one for one in found if one.filtered is None and not one.is_suspect]

    def prefer(self, candidates: Sequence[ExecutorView], usable: list[Considered]) -> Considered | None:
        """Whom the affinity key prefers, unless it is overloaded or much slower than the best of ``usable``."""
        key, warm = self._request.affinity_key, self._request.warm
        if key is None:
            return None
        window = usable
        if len(candidates) > SCAN_AT_MOST and isinstance(candidates, ModelIndex):
            near = candidates.near(ring_point(key), AFFINITY_WINDOW)
            if warm is not None:
                near += candidates.of_peer(warm)
            window = [one for one in map(self.look, near) if one.filtered is None and not one.is_suspect]
        ranked = sorted(window, key=lambda one: ring_point(key + one.view.peer.raw), reverse=True)
        mean = (sum(one.in_flight for one in window) + 1) / max(1, len(window))
        limit = AFFINITY_PATIENCE * max(MIN_PRIOR_S, min(one.cost for one in usable))
        for one in [*(one for one in window if one.view.peer == warm), *ranked[:2]]:
            has_room = one.in_flight < max(one.view.offer.slots, BOUNDED_LOAD * mean)
            if has_room and one.cost <= limit:
                return one
        return None

    def _consider(self, view: ExecutorView) -> Considered:
        request = self._request
        offer = view.offer
        state = view.state(self._now)
        filtered: Filtered | None = None
        if view.peer in request.excluded:
            filtered = Filtered.EXCLUDED
        elif request.pinned and view.peer not in request.pinned:
            filtered = Filtered.NOT_PINNED
        elif offer.id != request.model:
            filtered = Filtered.MODEL
        elif request.members_only and not view.is_member:
            filtered = Filtered.NETWORK
        elif state is LeaseState.DEAD:
            filtered = Filtered.DEAD
        elif request.context_needed > offer.context_length > 0:
            filtered = Filtered.CONTEXT
        elif request.features and _lacks(request.features, offer.features):
            filtered = Filtered.FEATURES
        elif request.digest and request.digest != offer.digest:
            filtered = Filtered.DIGEST
        elif request.max_price is not None and is_over(offer.price, request.max_price):
            filtered = Filtered.PRICE
        elif self._health.trust.trust(view.peer, self._now) < request.min_trust:
            filtered = Filtered.DOUBTED
        is_suspect = state is LeaseState.SUSPECT
        if filtered is not None:
            return Considered(view, filtered, is_suspect, 0.0, 0, 0.0, 0, 0.0)
        load = view.load
        prior_s = self._health.prior(load.ttft_s)
        judged = self._health.judge(view.peer, offer.id, self._now, prior_s=prior_s)
        if judged.verdict is not None and not (request.panics and judged.verdict is Verdict.CIRCUIT_OPEN):
            filtered = _FILTERED_BY_VERDICT[judged.verdict]
        # Ours is exact, the announced one counts everybody but is up to an interval old.
        in_flight = max(judged.in_flight, load.in_flight + load.queued)
        cost = judged.estimate_s * (in_flight + 1) / max(1, offer.slots)
        if view.is_relayed:
            cost *= RELAYED_COST
        cost *= self._health.trust.cost_factor(view.peer, self._now)
        return Considered(
            view, filtered, is_suspect, judged.estimate_s, in_flight, cost, judged.turn, judged.wait_s, judged.is_due
        )


def _lacks(wanted: frozenset[str], offered: frozenset[str]) -> bool:
    """Whether an executor cannot do what is wanted. One that says nothing of its features is tried, except for those
    that an executor has to have proved."""
    if not (wanted & PROVEN_FEATURES) <= offered:
        return True
    described = offered - PROVEN_FEATURES
    return bool(described) and not wanted - PROVEN_FEATURES <= described


def is_over(price: Price, ceiling: Price) -> bool:
    """Whether ``price`` is over ``ceiling``, or in another currency."""
    if price.is_free:
        return False
    return (
        price.currency != ceiling.currency
        or price.prompt_per_million > ceiling.prompt_per_million
        or price.completion_per_million > ceiling.completion_per_million
    )

"""The same requests against eleven executors under several ways to choose: seeded, on virtual time, no network.

Eight executors are good, one is slow, one refuses at once, one wedges: it accepts requests and falls silent, for ever,
after a third of the run. One of the good ones ends in the middle of the run and is back two seconds later. What is
measured is the time to the first byte. ``python -m tests.replay`` prints the table of docs/routing.md.

The choices are those of ``peers``; the events stand for the router: one attempt after the other within the first-byte
budget, nobody twice, and a prober that finds out within a second that a suspect lives.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Final

from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.executors import ExecutorView
from lloom_sidecar.peers.health import HealthBook, Outcome
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import Choice, Considered, Policy, Wanted, choose
from lloom_sidecar.protocol.offers import Announcement, Kind, Load, ModelOffer

RESTARTS, SLOW, REFUSES, WEDGES = 8, 9, 10, 11
GOOD: Final = range(1, 9)
TARGET_S: Final = 1.0
SLOW_S: Final = 2.5
REFUSAL_S: Final = 0.002
DIAL_FAILS_S: Final = 0.005
AWAY_S: Final = 2.0
ANSWER_S: Final = 0.2
"""The rest of an answer, behind its first byte: the place is taken for so long."""
PATIENCE_S: Final = 15.0
START: Final = 1000.0


def peer(number: int) -> PeerId:
    """Executor ``number``."""
    return PeerId.from_ed25519(number.to_bytes(32, "big"))


@dataclass
class Result:
    """What came of one run."""

    first_s: list[float] = field(default_factory=list)
    """Of each request, in the order in which they ended; infinite when nobody answered."""
    attempts: Counter[int] = field(default_factory=Counter)
    """By executor, since the one has wedged."""
    back_after_s: float = math.inf
    """From the moment when the one that ended was up again to its next first byte."""

    @property
    def within(self) -> float:
        """Share of the requests that had their first byte within a second."""
        return sum(first_s <= TARGET_S for first_s in self.first_s) / len(self.first_s)

    def percentile(self, share: float) -> float:
        """Time to the first byte that ``share`` of the requests were within."""
        return sorted(self.first_s)[math.ceil(share * len(self.first_s)) - 1]


@dataclass(frozen=True)
class Way:
    """A way to choose."""

    choose: Callable[[Replay, frozenset[PeerId]], ExecutorView | None]
    has_budget: bool = True
    """The first byte is awaited within the budget that the model's own times give; else for 15 s."""


class Replay:
    """One run."""

    def __init__(self, way: Way, *, seed: int, requests: int = 5_000, rate_per_s: float = 40.0) -> None:
        self.now = START
        self.rng = Random(seed)
        self.health = HealthBook()
        self.book = PeerBook(me=peer(0), is_open=True, allow_list=frozenset())
        self.result = Result()
        self._way = way
        self._requests = requests
        self._rate_per_s = rate_per_s
        length_s = requests / rate_per_s
        self._wedged_at = START + length_s / 3
        self._away_at = START + length_s / 2
        self._latency = Random(seed + 1)
        for number in range(1, 12):
            digest = hashlib.sha256(number.to_bytes(4, "big")).digest()
            offers = (ModelOffer("m", slots=4),)
            announced = Announcement(
                peer(number), 1, 0, 900, Kind.INITIAL, b"", True, (), offers, Load(), "", b"", digest, digest
            )
            self.book.apply(announced, now=self.now, direct=True, source=None)
        self._number_of = {peer(number): number for number in range(1, 12)}

    def choice(self, policy: Policy, excluded: frozenset[PeerId]) -> Choice:
        """A choice of the code under test."""
        wanted = Wanted("m", excluded=excluded)
        candidates = self.book.index_of("m")
        return choose(candidates, request=wanted, policy=policy, health=self.health, now=self.now, rng=self.rng)

    def run(self) -> Result:
        """Play all requests to their ends."""
        tie = itertools.count()
        events: list[tuple[float, int, Iterator[float]]] = [(self.now, next(tie), self._heartbeats())]
        at = self.now
        for _ in range(self._requests):
            at += self.rng.expovariate(self._rate_per_s)
            heapq.heappush(events, (at, next(tie), self._request(at)))
        while len(self.result.first_s) < self._requests:
            self.now, _, process = heapq.heappop(events)
            wait_s = next(process, None)
            if wait_s is not None:
                heapq.heappush(events, (self.now + wait_s, next(tie), process))
        return self.result

    def _heartbeats(self) -> Iterator[float]:
        while True:
            for number in range(1, 12):
                if self._is_up(number):
                    self.book.mark_alive(peer(number), self.now)
            yield 1.0

    def _is_up(self, number: int) -> bool:
        return number != RESTARTS or not self._away_at <= self.now < self._away_at + AWAY_S

    def _request(self, arrived_at: float) -> Iterator[float]:
        excluded: frozenset[PeerId] = frozenset()
        while self.now - arrived_at < PATIENCE_S:
            pick = self._way.choose(self, excluded)
            if pick is None:
                break
            number = self._number_of[pick.peer]
            if self.now >= self._wedged_at:
                self.result.attempts[number] += 1
            excluded |= {pick.peer}
            budget_s = PATIENCE_S
            if self._way.has_budget:
                budget_s = self.health.first_byte_budget_s("m", attempt=len(excluded))
            ticket = self.health.begin(pick.peer, "m", self.now)
            takes_s, outcome = self._answer(number)
            yield min(takes_s, budget_s)
            if takes_s > budget_s:
                outcome = Outcome.TIMEOUT
            if outcome is not Outcome.OK:
                self.health.end(ticket, outcome, self.now)
                if outcome is not Outcome.REFUSED:
                    self.book.mark_failed(pick.peer, self.now)
                continue
            self.health.first_byte(ticket, self.now)
            self.result.first_s.append(self.now - arrived_at)
            back_at = self._away_at + AWAY_S
            if number == RESTARTS and self.now >= back_at:
                self.result.back_after_s = min(self.result.back_after_s, self.now - back_at)
            yield ANSWER_S
            self.health.end(ticket, Outcome.OK, self.now)
            return
        self.result.first_s.append(math.inf)

    def _answer(self, number: int) -> tuple[float, Outcome]:
        """(seconds to the first byte or the failure, what it is)."""
        usual_s = self._latency.lognormvariate(-2.5, 0.4)  # median 82 ms, as of a small model on a busy machine
        if number == SLOW:
            return SLOW_S, Outcome.OK
        if number == REFUSES:
            return REFUSAL_S, Outcome.REFUSED
        if number == WEDGES and self.now >= self._wedged_at:
            return math.inf, Outcome.OK
        if not self._is_up(number):
            return DIAL_FAILS_S, Outcome.FAILED
        return usual_s, Outcome.OK


def _usable(replay: Replay, excluded: frozenset[PeerId]) -> list[Considered]:
    """Those that their health does not rule out; suspects only when there is nobody else."""
    usable = [one for one in replay.choice(Policy.ADAPTIVE, excluded).considered if one.filtered is None]
    return [one for one in usable if not one.is_suspect] or usable


def _everybody(replay: Replay, excluded: frozenset[PeerId]) -> list[Considered]:
    """All that were not tried: health is not looked at."""
    return [one for one in replay.choice(Policy.ADAPTIVE, excluded).considered if one.view.peer not in excluded]


def _in_turn(replay: Replay, among: list[Considered]) -> ExecutorView | None:
    return min(among, key=lambda one: one.turn).view if among else None


def _least_loaded(replay: Replay, among: list[Considered]) -> ExecutorView | None:
    """One with the fewest requests of this node under way."""
    fewest = min((one.in_flight for one in among), default=0)
    return replay.rng.choice([one for one in among if one.in_flight == fewest]).view if among else None


WAYS: Final = {
    "plain round-robin": Way(lambda r, tried: _in_turn(r, _everybody(r, tried)), has_budget=False),
    "plain least-loaded": Way(lambda r, tried: _least_loaded(r, _everybody(r, tried)), has_budget=False),
    "round-robin": Way(lambda r, tried: r.choice(Policy.ROUND_ROBIN, tried).pick),
    "least-loaded": Way(lambda r, tried: _least_loaded(r, _usable(r, tried))),
    "adaptive": Way(lambda r, tried: r.choice(Policy.ADAPTIVE, tried).pick),
}
"""The plain ones do what many a gateway does: they fail over, and know nothing of circuits, pauses and budgets. The
others differ in nothing but the choice."""

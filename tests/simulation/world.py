"""The model itself: a clock, a queue of events, executors that come and go, and a few observers with real books.

Time starts at ``START_S`` in a network that has run for long: every observer knows every executor. One generator of
random numbers, so that a seed gives the same run on every machine.
"""

from __future__ import annotations

import heapq
import itertools
import random
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Final

from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.executors import LeaseState
from lloom_sidecar.peers.peerbook import CataloguePage
from lloom_sidecar.protocol.announcement import announcement_interval_s, announcement_ttl_s
from lloom_sidecar.protocol.offers import Announcement

from .executor import SimulatedExecutor, peer_of
from .figures import KIND_NAMES, Tally, summarise
from .gossip import Mesh
from .observer import Observer
from .parameters import FULL_EVERY_S, MIN_REPEAT_S, POLL_S, TOPIC_POLL_S, Death, Parameters
from .sizes import real_sizes

START_S: Final = 100_000.0
_LOOK_EVERY_S: Final = 20.0
"""Between two looks at every entry of every observer's book."""
_SETTLED_S: Final = 15.0
"""An executor that is up for less is not missed yet."""
_NEWCOMER_STAYS_S: Final = 75.0
"""Over one catalogue refresh."""
_ENTRY_OVERHEAD_BYTES: Final = 12
_OBSERVERS_FROM: Final = 1 << 40
"""Numbers of nodes that are no executors."""


class World:
    """One run; ``run`` gives its figures."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.rng = random.Random(parameters.seed)
        self.now = START_S
        self.tally = Tally()
        self.is_counting = False
        self.by_peer: dict[PeerId, SimulatedExecutor] = {}
        self.executors: list[SimulatedExecutor] = []
        """The living ones, by place."""
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._numbers = itertools.count(1)
        self._newcomers = itertools.count(_OBSERVERS_FROM + 1000)
        self._awaited: dict[tuple[PeerId, int], float] = {}
        self._ages = itertools.count()
        self._is_kill_next = False
        count = parameters.executors
        self.mesh = Mesh(count + parameters.observers + 2, self.rng)
        weights = [1.0 / (rank + 1) for rank in range(parameters.model_count)]
        self._model_weights = list(itertools.accumulate(weights))
        self.validator_peer = peer_of(_OBSERVERS_FROM)
        self.validator = Observer(self, self.validator_peer, count, is_validator=True)
        self.observers = [
            Observer(self, peer_of(_OBSERVERS_FROM + 1 + index), count + 1 + index)
            for index in range(parameters.observers)
        ]
        self._newcomer_place = count + parameters.observers + 1
        self._listeners = [self.validator, *self.observers]
        self.interval_s = parameters.interval_s or announcement_interval_s(count, 0.0)
        self.ttl_s = announcement_ttl_s(self.interval_s)
        warm_up_s = parameters.warm_up_s
        self._window_from = START_S + (max(60.0, self.ttl_s) if warm_up_s is None else warm_up_s)
        self._window_until = self._window_from + parameters.window_s
        self._until = self._window_until + (self.ttl_s + 10.0 if parameters.tail_s is None else parameters.tail_s)
        self._settle()
        self._plan()

    # ------------------------------------------------------------ the clock
    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Call ``action`` in ``delay_s``."""
        heapq.heappush(self._events, (self.now + delay_s, next(self._order), action))

    def run(self) -> dict[str, Any]:
        """Run to the end; the figures."""
        while self._events and self._events[0][0] <= self._until:
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.tally.hops = [float(hops) for one in self.observers for hops in one.hops[: self.parameters.executors]]
        return summarise(self.parameters, self.tally, self.interval_s, self.ttl_s)

    # ------------------------------------------------------------ the beginning
    def _settle(self) -> None:
        """Everybody knows everybody, at a random point of each one's interval."""
        for place in range(self.parameters.executors):
            executor = self._new_executor(place, ready_after_s=0.0)
            began_at, age_s = self.now, self.rng.random()
            executor.next_interval_s(self.parameters.executors, self.rng, self.parameters.interval_s)
            age_s *= executor.interval_s
            self.now = began_at - age_s
            full = executor.announce(self.now)
            executor.full_at = self.now - self.rng.random() * FULL_EVERY_S
            executor.started_at = executor.full_at
            self.now = began_at
            for listener in self._listeners:
                listener.book.apply(full, now=self.now, age_s=age_s, direct=False, source=None)
            self._set_timer(executor, executor.interval_s - age_s)
        for listener in self._listeners:
            listener.cursor = self.validator.book.entries_since(0, now=self.now, limit=1 << 30).cursor
            listener.start()

    def _plan(self) -> None:
        parameters = self.parameters
        self.after(self._window_from - self.now, self._open_window)
        self.after(self._window_until - self.now, self._close_window)
        if parameters.lifetime_s:
            self.after(self._next_end_s(), self._churn)
        if parameters.aimed_every_s:
            self.after(parameters.aimed_every_s * self.rng.random(), self._aim)
        if parameters.newcomer_every_s:
            self.after(parameters.newcomer_every_s * self.rng.random(), self._newcomer)

    def _open_window(self) -> None:
        self.is_counting = True
        self._look()

    def _close_window(self) -> None:
        self.is_counting = False

    def _next_end_s(self) -> float:
        return self.rng.expovariate(self.parameters.executors / self.parameters.lifetime_s)

    # ------------------------------------------------------------ executors
    def _new_executor(self, place: int, ready_after_s: float) -> SimulatedExecutor:
        number = next(self._numbers)
        # Whoever takes a place offers what was offered there: no model may die out.
        model = f"model-{place % self.parameters.model_count}"
        executor = SimulatedExecutor(number, place, model, self.now, self.now + ready_after_s)
        self.by_peer[executor.peer] = executor
        if place < len(self.executors):
            self.executors[place] = executor
        else:
            self.executors.append(executor)
        return executor

    def _seen_by(self, executor: SimulatedExecutor) -> int:
        """What its own book would hold: it has none, an observer's stands for it."""
        return len(self.observers[executor.number % len(self.observers)].book)

    def _announce(self, executor: SimulatedExecutor, reason: str = "age") -> None:
        interval_s = executor.next_interval_s(self._seen_by(executor), self.rng, self.parameters.interval_s)
        announcement = executor.announce(self.now)
        if announcement.is_full and self.is_counting:
            self.tally.reasons[reason] += 1
        self._publish(executor, announcement)
        self._set_timer(executor, interval_s)

    def _set_timer(self, executor: SimulatedExecutor, delay_s: float) -> None:
        turn = executor.turn

        def fire() -> None:
            if executor.is_alive and executor.turn == turn:
                self._announce(executor)

        self.after(delay_s, fire)

    def _publish(self, executor: SimulatedExecutor, announcement: Announcement) -> None:
        if self.is_counting:
            self.tally.published[KIND_NAMES[announcement.kind]] += 1
        if self.now < executor.mesh_ready_at:
            if self.is_counting:
                self.tally.unheard += 1
            return
        rng, hop, loss = self.rng, self.parameters.hop, self.parameters.loss
        for listener in self._listeners:
            hops = listener.hops[executor.place]
            if self.now < listener.hears_from:
                continue
            if (loss or hop.loss) and rng.random() >= (1.0 - loss) * hop.passes(hops):
                if self.is_counting and not listener.is_validator:
                    self.tally.missed += 1
                continue
            self.after(hop.delay_s(hops, rng), lambda listener=listener: listener.deliver(announcement))  # type: ignore[misc]

    def connected(self, executor: SimulatedExecutor, cause: str) -> None:
        """An observer got a connection to ``executor``, and so did, elsewhere, the clients that it stands for."""
        if self.is_counting:
            self.tally.dials[cause] += 1
        if not self.parameters.reannounces:
            return
        self._topic_peer_appeared(executor)
        if cause == "wanted_full":
            return  # all of them dial the same one
        others = self.parameters.clients_per_observer - 1
        count = int(others) + (self.rng.random() < others % 1)
        for _ in range(count):
            self._topic_peer_appeared(self.executors[int(self.rng.random() * len(self.executors))])

    def _topic_peer_appeared(self, executor: SimulatedExecutor) -> None:
        if executor.is_due or not executor.is_alive:
            return
        executor.is_due = True
        self.after(TOPIC_POLL_S * self.rng.random(), lambda: self._look_at_topic(executor))

    def _look_at_topic(self, executor: SimulatedExecutor) -> None:
        if not executor.is_alive:
            return
        if self.now - executor.full_at < MIN_REPEAT_S:
            self.after(TOPIC_POLL_S, lambda: self._look_at_topic(executor))
            return
        executor.is_due = False
        executor.full_at = float("-inf")
        self._announce(executor, "topic_peer")

    # ------------------------------------------------------------ churn
    def _churn(self) -> None:
        executor = self.executors[int(self.rng.random() * len(self.executors))]
        if self.rng.random() < self.parameters.kill_share:
            self.kill(executor)
        else:
            self.leave(executor)
        self._join(executor.place)
        self.after(self._next_end_s(), self._churn)

    def _aim(self) -> None:
        self.after(self.parameters.aimed_every_s, self._aim)
        victim = self.executors[int(self.rng.random() * len(self.executors))]
        self._is_kill_next = not self._is_kill_next
        if self._is_kill_next:
            observer = self.observers[int(self.rng.random() * len(self.observers))]
            used = [executor for peer in observer.connected if (executor := self.by_peer[peer]).is_alive]
            if used:
                victim = used[int(self.rng.random() * len(used))]
            self.kill(victim)
        else:
            self.leave(victim)
        self._join(victim.place)

    def kill(self, executor: SimulatedExecutor) -> None:
        """It ends without a word."""
        executor.is_alive = False
        executor.ended_at = self.now
        if self.is_counting:
            self.tally.deaths += 1
        for listener in self._listeners:
            listener.watch(executor)
            listener.died(executor)
        if self.parameters.hints_every_s:
            silence_s = 0.0 if self.parameters.death is Death.PROCESS else self.rng.uniform(10.0, 40.0)
            seen_s = silence_s + POLL_S * self.rng.random()
            self.after(seen_s + self.parameters.hints_every_s * self.rng.random(), lambda: self._hint(executor))
        self._forget_later(executor)

    def _hint(self, executor: SimulatedExecutor) -> None:
        for observer in self.observers:
            hops = observer.hops[self.validator.place]
            if self.rng.random() < (1.0 - self.parameters.loss) * self.parameters.hop.passes(hops):
                delay_s = self.parameters.hop.delay_s(hops, self.rng)
                self.after(
                    delay_s,
                    lambda observer=observer: observer.book.mark_failed(executor.peer, self.now),  # type: ignore[misc]
                )

    def leave(self, executor: SimulatedExecutor) -> None:
        """It says goodbye and ends."""
        executor.has_left = True
        executor.ended_at = self.now
        if self.is_counting:
            self.tally.leaves += 1
        for listener in self._listeners:
            listener.watch(executor)
        self._publish(executor, executor.withdraw(self.now))
        executor.is_alive = False
        for listener in self._listeners:
            # It lingers so that p2pd hands the removal on; then its connections end.
            self.after(0.2 + self.parameters.hop.link_s, lambda one=listener: one.lose_connection(executor.peer))  # type: ignore[misc]
        self._forget_later(executor)

    def _forget_later(self, executor: SimulatedExecutor) -> None:
        def forget() -> None:
            del self.by_peer[executor.peer]

        self.after(1000.0, forget)  # until then a catalogue or a probe may ask for it

    def _join(self, place: int) -> None:
        ready_s = self.rng.uniform(*self.parameters.mesh_forms_s)
        executor = self._new_executor(place, ready_s)
        if self.is_counting:
            self.tally.joins += 1
            for observer in self.observers:
                self._awaited[executor.peer, observer.place] = self.now
        self._announce(executor, "start")
        if self.parameters.introduces and ready_s:
            self.after(ready_s, lambda: self._introduce(executor))
        # Its hello gives the validator its announcement, and its first neighbours are topic peers that appear.
        self.after(5 * self.parameters.rtt_s, lambda: self._greeted_validator(executor))

    def _greeted_validator(self, executor: SimulatedExecutor) -> None:
        if executor.is_alive and executor.full is not None:
            self.validator.take(executor.full, direct=True, source=executor.peer)
            if self.parameters.reannounces:
                self._topic_peer_appeared(executor)

    def _introduce(self, executor: SimulatedExecutor) -> None:
        if executor.is_alive:
            executor.full_at = float("-inf")
            self._announce(executor, "introduction")

    def _newcomer(self) -> None:
        """A client that knows nobody joins: dial, hello, catalogue."""
        self.after(self.parameters.newcomer_every_s, self._newcomer)
        if not self.is_counting or len(self._listeners) > 1 + len(self.observers):
            return
        parameters, began_at = self.parameters, self.now
        observer = Observer(self, peer_of(next(self._newcomers)), self._newcomer_place)
        observer.hears_from = self.now + self.rng.uniform(*parameters.mesh_forms_s)
        expected = [one for one in self.executors if one.started_at < self.now - _SETTLED_S]
        self._listeners.append(observer)
        page = self.validator.book.entries_since(0, now=self.now)
        size = page_bytes(page)
        entries = sum(2 if item.heartbeat else 1 for item in page.items)
        takes_s = 5 * parameters.rtt_s + size / parameters.bandwidth_bytes_s + entries * parameters.open_announcement_s
        reads = {"first": True}

        def read(page: CataloguePage) -> None:
            observer.cursor = page.cursor
            observer.refreshed_at = self.now
            observer.take_page(page)
            if page.truncated:
                more = self.validator.book.entries_since(page.cursor, now=self.now)
                self.after(parameters.rtt_s + page_bytes(more) / parameters.bandwidth_bytes_s, lambda: read(more))
                return
            check()

        def check() -> None:
            living = [one for one in expected if one.is_alive]
            held = sum(observer.book.known(one.peer, self.now) is not None for one in living)
            if reads.pop("first", False):
                self.tally.newcomer_first_read_s.append(self.now - began_at)
                self.tally.newcomer_first_read_share.append(held / max(1, len(living)))
                observer.after_start()
            if held == len(living):
                self.tally.newcomer_s.append(self.now - began_at)
                leave()
            elif self.now - began_at > _NEWCOMER_STAYS_S:
                self.tally.newcomers_incomplete += 1
                leave()
            else:
                self.after(1.0, check)

        def leave() -> None:
            observer.is_gone = True
            self._listeners.remove(observer)

        self.after(takes_s, lambda: read(page))

    def draw_model(self) -> str:
        """A model that somebody asks for: popularity falls with its rank."""
        at = bisect_left(self._model_weights, self.rng.random() * self._model_weights[-1])
        return f"model-{min(at, self.parameters.model_count - 1)}"

    # ------------------------------------------------------------ counting
    def _look(self) -> None:
        """How old is what is held, who is missing, who is suspected."""
        if not self.is_counting:
            return
        for observer in self.observers:
            looked = 0
            for item in observer.book.entries_since(0, now=self.now, limit=1 << 30).items:
                executor = self.by_peer.get(item.peer)
                if executor is None or not executor.is_alive:
                    continue
                looked += 1
                if next(self._ages) % max(1, self.parameters.executors // 500) == 0:
                    self.tally.ages_s.append(item.age_s)
                    known = observer.book.known(item.peer, self.now)
                    self.tally.looks += 1
                    self.tally.false_suspects += known is not None and known.state is LeaseState.SUSPECT
            settled = sum(executor.started_at < self.now - _SETTLED_S for executor in self.executors)
            self.tally.settled += settled
            self.tally.missing += max(0, settled - looked)
        self.after(_LOOK_EVERY_S, self._look)

    def count_received(self, kind: str) -> None:
        if self.is_counting:
            self.tally.received[kind] += 1

    def count_dropped(self, reason: str) -> None:
        if self.is_counting:
            self.tally.dropped[reason] += 1

    def count_probe(self, cause: str, is_alive: bool) -> None:
        if self.is_counting:
            self.tally.probes[f"{cause}_{'alive' if is_alive else 'dead'}"] += 1

    def count_catalogue(self, page: CataloguePage) -> None:
        if self.is_counting:
            self.tally.catalogue_entries += len(page.items)
            self.tally.catalogue_bytes += page_bytes(page)

    def count_request(self) -> None:
        if self.is_counting:
            self.tally.requests += 1

    def count_failover(self) -> None:
        if self.is_counting:
            self.tally.failovers += 1

    def count_request_failed(self) -> None:
        if self.is_counting:
            self.tally.requests_failed += 1

    def count_asked_after_failure(self) -> None:
        if self.is_counting:
            self.tally.asked_after_failure += 1

    def note_new(self, observer: Observer, peer: PeerId) -> None:
        """An executor entered an observer's book."""
        began_at = self._awaited.pop((peer, observer.place), None)
        if began_at is not None:
            self.tally.known_s.append(self.now - began_at)

    def note_dropped(self, observer: Observer, peer: PeerId) -> None:
        """A book let go of one whose lease ended."""
        executor = self.by_peer.get(peer)
        if executor is not None and executor.is_alive and self.is_counting and not observer.is_validator:
            self.tally.false_deaths += 1
        observer.dropped(peer)


def page_bytes(page: CataloguePage) -> int:
    """What a catalogue's page has on the wire, with sealed announcements in the place of the model's."""
    sizes = real_sizes()
    return sum(sizes.full + (sizes.heartbeat if item.heartbeat else 0) + _ENTRY_OVERHEAD_BYTES for item in page.items)


def simulate(parameters: Parameters) -> dict[str, Any]:
    """One run's figures."""
    return World(parameters).run()

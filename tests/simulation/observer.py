"""A client (or the validator) of the model: a real peer book and health book, and what the services do with them.

The methods follow the rooms that they stand for: ``deliver`` is network/gossip and intake, ``_tick`` network/prober and
connections, ``_refresh`` network/bootstrap, ``_request`` client/router. Only the IO between them is modelled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lloom_sidecar.client.router import MAX_ATTEMPTS
from lloom_sidecar.errors import AnnouncementError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.executors import ExecutorView, LeaseState, ring_point
from lloom_sidecar.peers.health import HealthBook, Outcome, Ticket
from lloom_sidecar.peers.peerbook import CataloguePage, Change, PeerBook, PeerBookLimits
from lloom_sidecar.peers.selection import Wanted, choose
from lloom_sidecar.protocol.offers import Announcement, Kind

from .executor import SimulatedExecutor
from .figures import KIND_NAMES
from .parameters import MAX_PROBES, MAX_UNDER_WAY, POLL_S, PROBE_TIMEOUT_S, TICK_S, Death

if TYPE_CHECKING:
    from .world import World

_HOST_SILENCE_S = (10.0, 40.0)
"""Until a connection to a host that vanished ends. Source: go-yamux, keep-alive 30 s and write time-out 10 s."""
_STREAM_SILENCE_S = (10.0, 13.0)
"""Until an exchange with one ends. Source: PROTOCOL.md, PING after 3 s, dead after max(10 s, 8 x round trip)."""


@dataclass
class Watch:
    """One death as this observer comes to know of it."""

    executor: SimulatedExecutor
    view: ExecutorView | None
    is_user: bool
    is_counted: bool
    is_suspect_told: bool = False


@dataclass
class _Run:
    """One request on its way through the router."""

    model: str
    key: bytes
    excluded: frozenset[PeerId] = frozenset()
    attempts: int = 0


@dataclass
class _Attempt:
    run: _Run
    executor: SimulatedExecutor
    ticket: Ticket
    has_others: bool
    is_over: bool = False


@dataclass
class Observer:
    """One node with a book."""

    world: World
    peer: PeerId
    place: int
    is_validator: bool = False
    hears_from: float = float("-inf")
    """Its mesh has formed: what was published before never came."""
    book: PeerBook = field(init=False)
    health: HealthBook = field(default_factory=HealthBook)
    connected: dict[PeerId, float] = field(default_factory=dict)
    """When each connection was last used."""
    ended: dict[PeerId, None] = field(default_factory=dict)
    """Connections that ended since the last look."""
    failed: dict[PeerId, float] = field(default_factory=dict)
    """First failure with each executor that died."""
    probing: dict[PeerId, None] = field(default_factory=dict)
    watches: list[Watch] = field(default_factory=list)
    attempts: dict[PeerId, list[_Attempt]] = field(default_factory=dict)
    cursor: int = 0
    refreshed_at: float = float("-inf")
    is_gone: bool = False
    conversation: tuple[str, bytes, int] = ("", b"", 0)

    def __post_init__(self) -> None:
        world = self.world
        self.hops = world.mesh.hops_from(self.place)
        validators = frozenset({world.validator_peer})
        limits = PeerBookLimits(max_executors=world.parameters.max_executors)
        self.book = PeerBook(me=self.peer, is_open=False, allow_list=frozenset(), limits=limits, validators=validators)
        self.refreshed_at = world.now - world.rng.random() * world.parameters.refresh_catalogue_s

    def start(self) -> None:
        """Begin its ticks and, for a client, its requests."""
        rng = self.world.rng
        self.world.after(rng.random() * TICK_S, self._tick)
        if not self.is_validator:
            self.world.after(rng.expovariate(1 / self.world.parameters.request_every_s), self._next_request)

    def after_start(self) -> None:
        """A newcomer has read its first catalogue: from now on it ticks as everybody does."""
        self.world.after(self.world.rng.random() * TICK_S, self._tick)

    # ------------------------------------------------------------ gossip
    def deliver(self, announcement: Announcement) -> None:
        """A message arrived."""
        if self.is_gone:
            return
        if not self.is_validator:
            self.world.count_received(KIND_NAMES[announcement.kind])
        self.take(announcement, direct=False, source=None)

    def take(
        self, announcement: Announcement, *, direct: bool, source: PeerId | None, age_s: float = 0.0
    ) -> Change | None:
        """Apply as the intake does."""
        world = self.world
        try:
            change = self.book.apply(announcement, now=world.now, age_s=age_s, direct=direct, source=source)
        except AnnouncementError as exc:
            if not self.is_validator:
                world.count_dropped(exc.reason)
            return None
        if change is Change.NEW and not self.is_validator:
            world.note_new(self, announcement.peer)
        elif change is Change.REMOVED and announcement.kind == Kind.REMOVAL:
            self._end_watch(announcement.peer)
        return change

    # ------------------------------------------------------------ each second
    def _tick(self) -> None:
        if self.is_gone:
            return
        world, now = self.world, self.world.now
        self._look_at_connections(now)
        for peer in self.book.expire(now):
            world.note_dropped(self, peer)
        room = MAX_UNDER_WAY - len(self.probing)
        due = dict.fromkeys(self.book.due_probes(now, min(MAX_PROBES, room)), "suspect")
        due.update(dict.fromkeys(self.book.due_fetches(now, room - len(due)), "wanted_full"))
        for peer, cause in due.items():
            if peer not in self.probing:
                self.probing[peer] = None
                self._probe(peer, cause)
        refresh_s = world.parameters.refresh_catalogue_s
        if refresh_s and not self.is_validator and now - self.refreshed_at > refresh_s:
            self._refresh()
        self._look_at_watches(now)
        world.after(TICK_S, self._tick)

    def _look_at_connections(self, now: float) -> None:
        idle_s = self.world.parameters.idle_peer_s
        for peer in [peer for peer, used_at in self.connected.items() if idle_s and now - used_at > idle_s]:
            del self.connected[peer]
            self.ended[peer] = None
        for peer in self.ended:
            self.book.on_disconnected(peer)
            self.book.mark_failed(peer, now)
            self.note_failure(peer)
        self.ended.clear()

    def lose_connection(self, peer: PeerId) -> None:
        """p2pd saw the connection end; the next look tells."""
        if self.connected.pop(peer, None) is not None:
            self.ended[peer] = None

    def _probe(self, peer: PeerId, cause: str) -> None:
        world = self.world
        executor = world.by_peer.get(peer)
        is_new = peer not in self.connected
        rtt_s = world.parameters.rtt_s
        # A dial takes about three round trips (TCP, Noise, muxer), a stream and its hello two more.
        takes_s = (5 if is_new else 2) * rtt_s
        is_alive = executor is not None and executor.is_alive
        if not is_alive:
            takes_s = rtt_s if world.parameters.death is Death.PROCESS else PROBE_TIMEOUT_S
        if not self.is_validator:
            world.count_probe(cause, is_alive)
        world.after(takes_s, lambda: self._probed(peer, cause, is_new))

    def _probed(self, peer: PeerId, cause: str, is_new: bool) -> None:
        self.probing.pop(peer, None)
        if self.is_gone:
            return
        world = self.world
        executor = world.by_peer.get(peer)
        if executor is None or not executor.is_alive or executor.full is None:
            self.book.mark_failed(peer, world.now)
            self.note_failure(peer)
            return
        if is_new:
            self.connect(executor, cause)
        self._hello(executor)
        self.book.mark_alive(peer, world.now)

    def _hello(self, executor: SimulatedExecutor) -> None:
        world = self.world
        assert executor.full is not None
        self.take(executor.full, direct=True, source=executor.peer)
        self.book.on_hello(
            executor.peer,
            is_member=True,
            roles=frozenset({"executor"}),
            features=frozenset(),
            max_streams=256,
            now=world.now,
        )
        self.book.note_path(executor.peer, is_relayed=False)

    def connect(self, executor: SimulatedExecutor, cause: str) -> None:
        """A new connection: the executor sees a topic peer appear."""
        is_new = executor.peer not in self.connected
        self.connected[executor.peer] = self.world.now
        if is_new and not self.is_validator:
            self.world.connected(executor, cause)

    # ------------------------------------------------------------ the validator's catalogue
    def _refresh(self) -> None:
        self.refreshed_at = self.world.now
        page = self.world.validator.book.entries_since(self.cursor, now=self.world.now)
        self.world.count_catalogue(page)
        self.cursor = page.cursor
        self.take_page(page)

    def take_page(self, page: CataloguePage) -> None:
        """Apply a catalogue's entries, as bootstrap does."""
        world = self.world
        for item in page.items:
            executor = world.by_peer.get(item.peer)
            if executor is None:
                continue
            for raw in (item.full, item.heartbeat):
                announcement = executor.find(raw) if raw else None
                if announcement is not None:
                    self.take(announcement, direct=False, source=world.validator_peer, age_s=item.age_s)

    # ------------------------------------------------------------ deaths
    def watch(self, executor: SimulatedExecutor) -> None:
        """It died, or said that it leaves: see when this node knows."""
        found = self.book.index_of(executor.models[0].id).near(ring_point(executor.peer.raw), 1)
        view = found[0] if found and found[0].peer == executor.peer else None
        is_user = executor.peer in self.connected
        if view is not None:
            self.watches.append(Watch(executor, view, is_user, self.world.is_counting))

    def died(self, executor: SimulatedExecutor) -> None:
        """``executor`` was killed: what is open between it and this node ends in its time."""
        peer, world = executor.peer, self.world
        is_process = world.parameters.death is Death.PROCESS
        if peer in self.connected:
            after_s = world.parameters.hop.link_s if is_process else world.rng.uniform(*_HOST_SILENCE_S)
            world.after(after_s, lambda: self.lose_connection(peer))
        for attempt in self.attempts.get(peer, ()):
            after_s = world.parameters.hop.link_s if is_process else world.rng.uniform(*_STREAM_SILENCE_S)
            world.after(after_s, lambda attempt=attempt: self._failed(attempt, Outcome.LOST))  # type: ignore[misc]

    def note_failure(self, peer: PeerId) -> None:
        """The book was told of a failure: users of a dead one know now."""
        for watch in self.watches:
            if watch.executor.peer == peer and watch.is_user and not watch.is_suspect_told:
                watch.is_suspect_told = True
                if watch.is_counted and not watch.executor.has_left and not self.is_validator:
                    self.world.tally.user_known_s.append(self.world.now - watch.executor.ended_at)

    def _look_at_watches(self, now: float) -> None:
        for watch in self.watches:
            if watch.view is None or watch.is_suspect_told:
                continue
            if watch.view.state(now) is not LeaseState.FRESH:
                watch.is_suspect_told = True
                if watch.is_counted and not self.is_validator and not watch.executor.has_left:
                    tally = self.world.tally
                    known_s = tally.user_known_s if watch.is_user else tally.other_suspect_s
                    known_s.append(now - watch.executor.ended_at)

    def _end_watch(self, peer: PeerId) -> None:
        """It is out of the book."""
        world = self.world
        for watch in [watch for watch in self.watches if watch.executor.peer == peer]:
            self.watches.remove(watch)
            if not watch.is_counted or self.is_validator:
                continue
            passed_s = world.now - watch.executor.ended_at
            if watch.executor.has_left:
                world.tally.removed_s.append(passed_s)
            elif not watch.is_user:
                world.tally.other_dead_s.append(passed_s)

    def dropped(self, peer: PeerId) -> None:
        """The book let go of one without a goodbye."""
        self._end_watch(peer)

    # ------------------------------------------------------------ requests
    def _next_request(self) -> None:
        if self.is_gone:
            return
        world = self.world
        world.after(world.rng.expovariate(1 / world.parameters.request_every_s), self._next_request)
        model, key, left = self.conversation
        if not left:
            model = world.draw_model()
            key = world.rng.randbytes(16)
            left = world.parameters.requests_per_conversation
        self.conversation = (model, key, left - 1)
        world.count_request()
        self._attempt(_Run(model, key))

    def _attempt(self, run: _Run) -> None:
        world, now = self.world, self.world.now
        choice = choose(
            self.book.index_of(run.model),
            request=Wanted(model=run.model, excluded=run.excluded, affinity_key=run.key),
            health=self.health,
            now=now,
            rng=world.rng,
        )
        view = choice.pick
        if view is None or run.attempts >= MAX_ATTEMPTS:
            world.count_request_failed()
            return
        executor = world.by_peer.get(view.peer)
        assert executor is not None
        others = [one for one in choice.considered if one.filtered is None and one.view is not view]
        if not executor.is_alive and view.peer in self.failed and any(not one.is_suspect for one in others):
            world.count_asked_after_failure()
        ticket = self.health.begin(view.peer, run.model, now, prior_s=self.health.prior(view.load.ttft_s))
        run.attempts += 1
        attempt = _Attempt(run, executor, ticket, bool(others))
        self.attempts.setdefault(view.peer, []).append(attempt)
        is_connected = view.peer in self.connected
        rtt_s = world.parameters.rtt_s
        if executor.is_alive:
            first_s = (1 if is_connected else 5) * rtt_s + executor.ttft_s * world.rng.uniform(0.7, 1.5)
            world.after(first_s, lambda: self._answered(attempt))
            return
        budget_s = self.health.first_byte_budget_s(run.model, attempt=run.attempts) if others else 60.0
        if world.parameters.death is Death.PROCESS:
            world.after(rtt_s, lambda: self._failed(attempt, Outcome.FAILED))
        else:
            silence_s = world.rng.uniform(*_STREAM_SILENCE_S) if is_connected else 10.0
            outcome = Outcome.TIMEOUT if budget_s < silence_s else Outcome.FAILED
            world.after(min(budget_s, silence_s), lambda: self._failed(attempt, outcome))

    def _answered(self, attempt: _Attempt) -> None:
        executor = attempt.executor
        if attempt.is_over or not executor.is_alive:
            if not attempt.is_over and executor.has_left:
                self._failed(attempt, Outcome.FAILED)
            return  # else ``died`` has said when it fails
        self._close(attempt)
        if executor.peer not in self.connected:
            self.connect(executor, "request")
            self._hello(executor)
        self.connected[executor.peer] = self.world.now
        self.health.end(attempt.ticket, Outcome.OK, self.world.now)
        self.book.mark_served(executor.peer)

    def _failed(self, attempt: _Attempt, outcome: Outcome) -> None:
        if attempt.is_over or self.is_gone:
            return
        self._close(attempt)
        now, peer = self.world.now, attempt.executor.peer
        self.health.end(attempt.ticket, outcome, now)
        self.book.mark_failed(peer, now)
        self.failed.setdefault(peer, now)
        self.note_failure(peer)
        self.world.count_failover()
        attempt.run.excluded |= {peer}
        self._attempt(attempt.run)

    def _close(self, attempt: _Attempt) -> None:
        attempt.is_over = True
        under_way = self.attempts[attempt.executor.peer]
        under_way.remove(attempt)
        if not under_way:
            del self.attempts[attempt.executor.peer]


assert POLL_S == TICK_S, "the model looks at connections in the prober's tick"

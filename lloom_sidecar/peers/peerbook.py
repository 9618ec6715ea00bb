"""The peer book: who offers which model, until when, and how far that is believed. Pure state, time is an argument.

An announcement is a lease: it holds for its ttl on this node's monotonic clock. ``apply`` is the only way in,
``expire`` and a signed removal the only ways out, apart from a higher rank taking a lower one's place in a full book.

    fresh --(2/3 ttl of silence, or mark_failed)--> suspect --(ttl of silence)--> dead, dropped by expire
    suspect --(newer heartbeat, or mark_alive)--> fresh

``mark_alive`` ends the suspicion but does not lengthen the lease: only the executor's own word does, so a prober that
wants to keep a silent executor fetches its announcement and gives it to ``apply`` with ``direct=True``.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from lloom_sidecar.errors import AnnouncementError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.protocol.offers import Announcement, Kind, ModelOffer

from .addresses import Group, groups_of
from .executors import MAX_TTL_S, SUSPECT_SHARE, Executor, ExecutorView, LeaseState, ModelIndex, Rank

MEMBERSHIP_S: Final = 3600.0
"""Longest that a hello holds. Source: PROTOCOL.md, Hello."""
MODEL_MEMORY_S: Final = 24 * 3600.0
"""A model that nobody has offered for so long is unknown (404), before that it is absent (503)."""
PROBE_INTERVAL_S: Final = 5.0
"""Between two probes of one suspect: two fit into the last third of the shortest ttl (3 x 10 s)."""
PURGE_INTERVAL_S: Final = 1.0
"""Between two scans for dead entries that a full book makes on its own: a flood must not buy a scan a message."""


class Change(Enum):
    """What an announcement did to the book. None of these is an offence of its sender."""

    NEW = "new"
    UPDATED = "updated"
    REFRESHED = "refreshed"
    """The lease runs anew; the offer is the same."""
    DUPLICATE = "duplicate"
    REMOVED = "removed"
    WANTS_FULL = "wants_full"
    """A heartbeat for a full announcement that is not here: ``due_fetches`` names it, and once it was fetched the
    heartbeat counts too."""


@dataclass(frozen=True, slots=True)
class PeerBookLimits:
    """Bounds of every table of a peer book."""

    max_executors: int = 20_000
    """Twice what a network is meant to have: the dead keep their places until their leases end. Source:
    docs/simulation.md, where a book of 10,000 lacked 4 % of 10,000 executors that live an hour each."""
    max_per_source: int = 256
    """Executors without a completed hello that one source may have told of (configured validators: no limit)."""
    max_per_subnet: int = 256
    """Executors without a completed hello in one /24 (IPv4) or /48 (IPv6)."""
    max_per_relay: int = 1024
    """Executors without a completed hello behind the relays of one subnet, and of those known by name only."""
    max_models_per_peer: int = 256
    max_models_remembered: int = 10_000
    """Model ids that are gone but still known."""
    max_tombstones: int = 10_000
    """Remembered sequences of those gone, for members and for strangers each."""
    max_pending: int = 1_000
    """Heartbeats that wait for their full announcement."""
    max_hellos: int = 10_000


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One model over all its executors."""

    id: str
    executors: int
    """Whose lease holds."""
    fresh: int
    """Of these, not suspect."""
    offers: tuple[ModelOffer, ...]
    """The different offers, each once, in the order of their price."""


@dataclass(frozen=True, slots=True)
class CatalogueItem:
    """One executor as a catalogue hands it on."""

    cursor: int
    peer: PeerId
    full: bytes
    """Envelope of its newest full announcement."""
    heartbeat: bytes
    """Envelope of the newest heartbeat after that, or empty."""
    age_s: float
    """Since the newer of the two was heard, with the age that it had then."""


@dataclass(frozen=True, slots=True)
class CataloguePage:
    """Answer to ``entries_since``, oldest change first."""

    items: tuple[CatalogueItem, ...]
    cursor: int
    """What to ask for next."""
    truncated: bool
    """The limit cut the answer: ask again with ``cursor``."""


@dataclass(frozen=True, slots=True)
class PeerView:
    """What an operator may see of one peer."""

    peer: PeerId
    roles: frozenset[str]
    features: frozenset[str]
    """As hello told; empty before."""
    max_streams: int
    """Streams that it accepts from us at once, 0 = unknown."""
    is_member: bool
    """By a hello that still holds."""
    addrs: tuple[Multiaddr, ...]
    models: tuple[str, ...]
    state: LeaseState | None
    """None: it has announced nothing."""
    lease_left_s: float
    source: PeerId | None
    """Who told of it first; None = gossip, or it said hello only."""
    is_direct: bool
    has_served: bool
    software: str


@dataclass(frozen=True, slots=True)
class _Hello:
    roles: frozenset[str]
    features: frozenset[str]
    max_streams: int
    is_member: bool
    until: float


@dataclass(frozen=True, slots=True)
class _Tombstone:
    """Last sequence of one that is gone, so that nobody brings it back with what it said before."""

    sequence: int
    full_sequence: int
    is_removal: bool
    digest: bytes
    until: float


@dataclass(slots=True)
class _Pending:
    heartbeat: Announcement
    heard_at: float
    fetches: int = 0
    fetch_at: float = float("-inf")
    """When it is to be fetched next."""

    def is_over(self, now: float) -> bool:
        """The lease that the heartbeat states is over."""
        return self.heard_at + min(self.heartbeat.ttl_s, MAX_TTL_S) <= now


class PeerBook:
    """Executors by peer and by model, hellos, and the memory of those gone.

    Args:
        me: this node; its own announcements come back by gossip and are ignored.
        is_open: executors of any network may enter.
        allow_list: executors that may enter without our network's tag.
        limits: bounds of every table.
        validators: the configured ones, looked at each time; a catalogue of theirs is not held to the quota per source.
        first_cursor: where the change cursor starts. A node that restarts passes Unix milliseconds, so that cursors
            given out before stay in the past.
    """

    def __init__(
        self,
        *,
        me: PeerId,
        is_open: bool,
        allow_list: frozenset[PeerId],
        limits: PeerBookLimits | None = None,
        validators: Collection[PeerId] = frozenset(),
        first_cursor: int = 0,
    ) -> None:
        self._me = me
        self._is_open = is_open
        self._allow_list = allow_list
        self._limits = limits or PeerBookLimits()
        self._validators = validators
        self._cursor = first_cursor
        self._executors: dict[PeerId, Executor] = {}
        self._by_model: dict[str, ModelIndex] = {}
        self._by_rank: dict[Rank, dict[PeerId, Executor]] = {rank: {} for rank in Rank}
        self._by_change: OrderedDict[PeerId, Executor] = OrderedDict()
        self._quota: Counter[Group] = Counter()
        self._models_gone: OrderedDict[str, float] = OrderedDict()
        self._tombstones: dict[bool, OrderedDict[PeerId, _Tombstone]] = {True: OrderedDict(), False: OrderedDict()}
        self._pending: OrderedDict[PeerId, _Pending] = OrderedDict()
        self._hellos: OrderedDict[PeerId, _Hello] = OrderedDict()
        self._gone: dict[PeerId, None] = {}
        self._purged_at = float("-inf")

    def __len__(self) -> int:
        """Executors in the book, dead ones that were not expired yet included."""
        return len(self._executors)

    # ------------------------------------------------------------ announcements
    def apply(
        self,
        announcement: Announcement,
        *,
        now: float,
        age_s: float = 0.0,
        direct: bool,
        source: PeerId | None,
    ) -> Change:
        """Take in a checked announcement (envelope, signer, clock and limits hold).

        Args:
            now: monotonic seconds.
            age_s: how long ago the one that told us had heard it; 0 for gossip and hello.
            direct: its signer handed it over on a connection to this node, just now. Never for gossip: a signed
                message can be sent again by anyone. A direct duplicate runs the lease anew.
            source: whose catalogue it came from, the signer itself, or None for gossip.

        Returns:
            What it changed.

        Raises:
            AnnouncementError: ``sequence`` (older than what is known, or other bytes under the same number), ``tag``
                (neither our network's, nor open, nor allowed), ``clock`` (its lease is over already), ``quota``. The
                book is then as before.
        """
        if announcement.peer == self._me:
            return Change.DUPLICATE
        executor = self._executors.get(announcement.peer)
        past = self._tombstone(announcement.peer, now)
        if announcement.kind == Kind.REMOVAL:
            return self._remove(announcement, executor, past, now)
        if not (announcement.is_member or self._may_enter(announcement.peer, now)):
            raise AnnouncementError("tag", "an announcement without the tag of our network")
        if min(announcement.ttl_s, MAX_TTL_S) <= age_s:
            raise AnnouncementError("clock", "an announcement whose lease is over")
        heard_at = now - max(0.0, age_s)
        if not announcement.is_full:
            return self._beat(announcement, executor, past, heard_at)
        if executor is not None:
            return self._update(executor, announcement, heard_at=heard_at, now=now, direct=direct)
        self._check_not_replayed(announcement, past, direct=direct)
        self._insert(announcement, past, heard_at=heard_at, now=now, direct=direct, source=source)
        return Change.NEW

    def _may_enter(self, peer: PeerId, now: float) -> bool:
        # A member by hello may announce under a key that this node does not have: one that was rotated elsewhere.
        return self._is_open or peer in self._allow_list or self.is_member(peer, now)

    def _remove(self, removal: Announcement, executor: Executor | None, past: _Tombstone | None, now: float) -> Change:
        known = executor.sequence if executor is not None else past.sequence if past is not None else -1
        if past is not None and past.is_removal and past.digest == removal.digest:
            return Change.DUPLICATE
        if removal.sequence <= known:
            raise AnnouncementError("sequence", "a removal that is older than what it removes")
        # The signer may always take back its own offer. Of one that is not here only those that may enter leave a mark.
        if executor is None and not (removal.is_member or self._may_enter(removal.peer, now)):
            raise AnnouncementError("tag", "a removal without the tag of our network")
        pending = self._pending.get(removal.peer)
        if pending is not None and pending.heartbeat.sequence <= removal.sequence:
            del self._pending[removal.peer]
        is_trusted = removal.is_member or removal.peer in self._allow_list
        if executor is not None:
            is_trusted = is_trusted or executor.rank is not Rank.STRANGER
            self._take_out(executor, now)
        tombstone = _Tombstone(removal.sequence, removal.sequence, True, removal.digest, now + MAX_TTL_S)
        self._bury(removal.peer, tombstone, is_trusted)
        return Change.REMOVED

    def _beat(
        self, heartbeat: Announcement, executor: Executor | None, past: _Tombstone | None, heard_at: float
    ) -> Change:
        peer = heartbeat.peer
        if executor is not None:
            last = executor.heartbeat
            if last is not None and last.digest == heartbeat.digest:
                return Change.DUPLICATE
            known = executor.sequence
        else:
            known = past.sequence if past is not None else -1
        if heartbeat.sequence <= known:
            raise AnnouncementError("sequence", "a heartbeat that is older than what is known")
        if executor is not None and heartbeat.full_digest == executor.full.digest:
            self._refresh(executor, heartbeat, heard_at)
            return Change.REFRESHED
        pending = self._pending.get(peer)
        if pending is not None:
            if pending.heartbeat.digest == heartbeat.digest:
                return Change.DUPLICATE
            if heartbeat.sequence <= pending.heartbeat.sequence:
                raise AnnouncementError("sequence", "a heartbeat that is older than the one that waits")
        elif len(self._pending) >= self._limits.max_pending:
            self._pending.popitem(last=False)
        self._pending[peer] = _Pending(heartbeat, heard_at)
        self._pending.move_to_end(peer)
        return Change.WANTS_FULL

    def _refresh(self, executor: Executor, heartbeat: Announcement, heard_at: float) -> None:
        executor.heartbeat = heartbeat
        executor.sequence = heartbeat.sequence
        executor.load = heartbeat.load
        executor.run_lease(heard_at, min(heartbeat.ttl_s, MAX_TTL_S))

    def _update(self, executor: Executor, full: Announcement, *, heard_at: float, now: float, direct: bool) -> Change:
        if full.digest == executor.full.digest:
            if not direct:
                return Change.DUPLICATE
            executor.is_direct = True
            executor.run_lease(now, executor.ttl_s)
            return Change.REFRESHED
        if full.sequence <= executor.sequence:
            raise AnnouncementError("sequence", "an announcement that is older than what is known")
        self._check_models(full)
        groups: frozenset[Group] = frozenset()
        if not executor.is_proven:
            groups = groups_of(full.addrs) | {group for group in executor.groups if group[0] == "source"}
            self._check_quota(groups - executor.groups)
        self._charge(executor, groups)
        executor.is_direct = direct or (executor.is_direct and full.addrs == executor.full.addrs)
        self._unindex(executor, now)
        self._unrank(executor)
        executor.full = full
        executor.heartbeat = None
        executor.sequence = full.sequence
        executor.load = full.load
        executor.run_lease(heard_at, min(full.ttl_s, MAX_TTL_S))
        self._rank(executor)
        self._index(executor)
        self._touch(executor)
        self._apply_pending(executor, now)
        return Change.UPDATED

    def _check_not_replayed(self, full: Announcement, past: _Tombstone | None, *, direct: bool) -> None:
        if past is None or full.sequence > past.sequence:
            return
        if not past.is_removal:
            # It went silent with this offer in force: a newer heartbeat of it, or its own hand, shows that it is back.
            pending = self._pending.get(full.peer)
            if pending is not None and pending.heartbeat.full_digest == full.digest:
                return
            if direct and full.sequence >= past.full_sequence:
                return
        raise AnnouncementError("sequence", "an announcement of one that has left since")

    def _insert(
        self,
        full: Announcement,
        past: _Tombstone | None,
        *,
        heard_at: float,
        now: float,
        direct: bool,
        source: PeerId | None,
    ) -> None:
        self._check_models(full)
        executor = Executor(full, source=source, heard_at=heard_at, ttl_s=min(full.ttl_s, MAX_TTL_S))
        executor.is_direct = direct
        executor.is_listed = full.peer in self._allow_list
        executor.is_proven = self.is_member(full.peer, now)
        if past is not None:
            executor.sequence = max(executor.sequence, past.sequence)
        groups: frozenset[Group] = frozenset()
        if not executor.is_proven:
            groups = groups_of(full.addrs)
            if source is not None and source not in self._validators:
                groups |= {("source", str(source))}
            self._check_quota(groups)
        self._make_room(executor.rank, now)
        self._charge(executor, groups)
        self._executors[executor.peer] = executor
        self._gone.pop(executor.peer, None)
        for tombstones in self._tombstones.values():
            tombstones.pop(executor.peer, None)
        self._rank(executor)
        self._index(executor)
        self._touch(executor)
        self._apply_pending(executor, now)

    def _apply_pending(self, executor: Executor, now: float) -> None:
        pending = self._pending.pop(executor.peer, None)
        if pending is None or pending.heartbeat.full_digest != executor.full.digest:
            return
        if pending.heartbeat.sequence > executor.sequence and not pending.is_over(now):
            self._refresh(executor, pending.heartbeat, pending.heard_at)

    # ------------------------------------------------------------ limits
    def _check_models(self, full: Announcement) -> None:
        if len(full.models) > self._limits.max_models_per_peer:
            raise AnnouncementError("quota", "an announcement with too many models")

    def _check_quota(self, groups: Iterable[Group]) -> None:
        limits = {
            "source": self._limits.max_per_source,
            "subnet": self._limits.max_per_subnet,
            "indirect": self._limits.max_per_relay,
        }
        for group in groups:
            if self._quota[group] >= limits[group[0]]:
                raise AnnouncementError("quota", f"too many executors of one {group[0]} that never said hello")

    def _charge(self, executor: Executor, groups: frozenset[Group]) -> None:
        for group in executor.groups - groups:
            self._quota[group] -= 1
            if not self._quota[group]:
                del self._quota[group]
        self._quota.update(groups - executor.groups)
        executor.groups = groups

    def _make_room(self, rank: Rank, now: float) -> None:
        """Make one free place for a newcomer of ``rank``, at the cost of the oldest of the lowest rank below it."""
        if len(self._executors) < self._limits.max_executors:
            return
        if now >= self._purged_at + PURGE_INTERVAL_S:
            self._purged_at = now
            self._purge(now)
            if len(self._executors) < self._limits.max_executors:
                return
        occupied = (lower for lower in Rank if lower.value < rank.value and self._by_rank[lower])
        lowest = next(occupied, None)
        if lowest is None:
            raise AnnouncementError("quota", "the peer book is full")
        self._drop(next(iter(self._by_rank[lowest].values())), now)

    # ------------------------------------------------------------ tables
    def _rank(self, executor: Executor) -> None:
        self._by_rank[executor.rank][executor.peer] = executor

    def _unrank(self, executor: Executor) -> None:
        del self._by_rank[executor.rank][executor.peer]

    def _index(self, executor: Executor) -> None:
        offers = {offer.id: offer for offer in executor.full.models}
        executor.views = tuple(ExecutorView(executor, offer) for offer in offers.values())
        for view in executor.views:
            index = self._by_model.get(view.offer.id)
            if index is None:
                index = self._by_model[view.offer.id] = ModelIndex()
                self._models_gone.pop(view.offer.id, None)
            index.add(view)

    def _unindex(self, executor: Executor, now: float) -> None:
        for view in executor.views:
            index = self._by_model[view.offer.id]
            index.discard(view)
            if not index:
                del self._by_model[view.offer.id]
                if len(self._models_gone) >= self._limits.max_models_remembered:
                    self._models_gone.popitem(last=False)
                self._models_gone[view.offer.id] = min(now, executor.lease_until)
        executor.views = ()

    def _touch(self, executor: Executor) -> None:
        self._cursor += 1
        executor.cursor = self._cursor
        self._by_change[executor.peer] = executor
        self._by_change.move_to_end(executor.peer)

    def _take_out(self, executor: Executor, now: float) -> None:
        self._unindex(executor, now)
        self._unrank(executor)
        self._charge(executor, frozenset())
        del self._executors[executor.peer]
        del self._by_change[executor.peer]
        # Whoever still holds a view of it must not choose it.
        executor.lease_until = min(executor.lease_until, now)

    def _drop(self, executor: Executor, now: float) -> None:
        """Take out one that did not say goodbye; ``expire`` will tell of it."""
        self._take_out(executor, now)
        self._gone[executor.peer] = None
        tombstone = _Tombstone(executor.sequence, executor.full.sequence, False, b"", now + MAX_TTL_S)
        self._bury(executor.peer, tombstone, executor.rank is not Rank.STRANGER)

    def _bury(self, peer: PeerId, tombstone: _Tombstone, is_trusted: bool) -> None:
        # Apart from each other: strangers that come and go must not make the book forget who left our network.
        self._tombstones[not is_trusted].pop(peer, None)
        tombstones = self._tombstones[is_trusted]
        tombstones[peer] = tombstone
        tombstones.move_to_end(peer)
        if len(tombstones) > self._limits.max_tombstones:
            tombstones.popitem(last=False)

    def _tombstone(self, peer: PeerId, now: float) -> _Tombstone | None:
        for tombstones in self._tombstones.values():
            found = tombstones.get(peer)
            if found is not None:
                if found.until > now:
                    return found
                del tombstones[peer]
        return None

    def _purge(self, now: float) -> None:
        for executor in [one for one in self._executors.values() if now >= one.lease_until]:
            self._drop(executor, now)

    # ------------------------------------------------------------ leases
    def expire(self, now: float) -> list[PeerId]:
        """Drop every dead executor and what else is out of date.

        Returns:
            Those gone without a goodbye since the last call, including the ones that had to make room.
        """
        self._purged_at = now
        self._purge(now)
        for tombstones in self._tombstones.values():
            while tombstones and (first := next(iter(tombstones.items())))[1].until <= now:
                del tombstones[first[0]]
        while self._models_gone and next(iter(self._models_gone.values())) + MODEL_MEMORY_S <= now:
            self._models_gone.popitem(last=False)
        for peer in [peer for peer, one in self._pending.items() if one.is_over(now)]:
            del self._pending[peer]
        for peer in [peer for peer, hello in self._hellos.items() if hello.until <= now]:
            del self._hellos[peer]
        gone = list(self._gone)
        self._gone.clear()
        return gone

    def due_probes(self, now: float, limit: int = 16) -> list[PeerId]:
        """Suspects to probe now, the longest unprobed first; each is due again after 5 s.

        The probe's outcome belongs into ``mark_alive`` or ``mark_failed``.
        """
        due = [
            executor
            for executor in self._executors.values()
            if now >= executor.probed_at + PROBE_INTERVAL_S and executor.state(now) is LeaseState.SUSPECT
        ]
        due.sort(key=lambda executor: (executor.probed_at, executor.lease_until))
        for executor in due[:limit]:
            executor.probed_at = now
        return [executor.peer for executor in due[:limit]]

    def due_fetches(self, now: float, limit: int = 16) -> list[PeerId]:
        """Whose full announcement a heartbeat referred to and is not here; each is due again after 5, 10, 20 s, and
        at once when another heartbeat comes."""
        due = [peer for peer, one in self._pending.items() if now >= one.fetch_at][:limit]
        for peer in due:
            pending = self._pending[peer]
            pending.fetch_at = now + PROBE_INTERVAL_S * 2**pending.fetches
            pending.fetches += 1
        return due

    def mark_failed(self, peer: PeerId, now: float) -> None:
        """A stream to it failed or its connection is gone: suspect until a newer heartbeat or ``mark_alive``."""
        executor = self._executors.get(peer)
        if executor is not None:
            executor.failed_at = now

    def mark_alive(self, peer: PeerId, now: float) -> None:
        """It answered: no longer suspect. The lease ends when it would have ended."""
        executor = self._executors.get(peer)
        if executor is not None:
            executor.failed_at = None
            executor.alive_at = max(executor.alive_at, now)
            executor.suspect_at = max(executor.suspect_at, now + executor.ttl_s * SUSPECT_SHARE)

    def mark_served(self, peer: PeerId) -> None:
        """It has served this node: strangers can no longer take its place."""
        executor = self._executors.get(peer)
        if executor is not None:
            self._unrank(executor)
            executor.has_served = True
            self._rank(executor)

    def note_path(self, peer: PeerId, *, is_relayed: bool | None) -> None:
        """Say how the connection to it runs, as StreamInfo tells; None = there is none."""
        executor = self._executors.get(peer)
        if executor is not None:
            executor.is_relayed_path = is_relayed

    # ------------------------------------------------------------ hello
    def on_hello(
        self,
        peer: PeerId,
        *,
        is_member: bool,
        roles: frozenset[str],
        features: frozenset[str],
        max_streams: int,
        now: float,
    ) -> None:
        """A hello was completed. Membership then holds for an hour, or until ``on_disconnected``."""
        self._hellos[peer] = _Hello(roles, features, max_streams, is_member, now + MEMBERSHIP_S)
        self._hellos.move_to_end(peer)
        if len(self._hellos) > self._limits.max_hellos:
            self._hellos.popitem(last=False)
        executor = self._executors.get(peer)
        if executor is not None and is_member:
            self._unrank(executor)
            executor.is_proven = True
            self._rank(executor)
            self._charge(executor, frozenset())

    def on_disconnected(self, peer: PeerId) -> None:
        """Its last connection ended, and with it what hello had established."""
        self._hellos.pop(peer, None)
        self.note_path(peer, is_relayed=None)

    def is_member(self, peer: PeerId, now: float) -> bool:
        """It proved by hello that it has a key of ours, and that still holds."""
        hello = self._hellos.get(peer)
        return hello is not None and hello.is_member and now < hello.until

    def has_feature(self, peer: PeerId, feature: str) -> bool:
        """It stated that in its last hello on the connection that there is."""
        hello = self._hellos.get(peer)
        return hello is not None and feature in hello.features

    # ------------------------------------------------------------ questions
    def index_of(self, model: str) -> ModelIndex:
        """Executors of ``model`` without a copy, for ``choose``: live, dead ones included. Empty when there is none."""
        return self._by_model.get(model) or ModelIndex()

    def executors_of(self, model: str, now: float) -> list[ExecutorView]:
        """Executors of ``model`` whose lease holds, suspects included. Costs a scan of that model's executors."""
        return [view for view in self.index_of(model) if view.state(now) is not LeaseState.DEAD]

    def models(self, now: float) -> list[ModelSummary]:
        """Every model that somebody offers now, by id."""
        summaries = []
        for model in sorted(self._by_model):
            views = self.executors_of(model, now)
            if not views:
                continue
            fresh = sum(view.state(now) is LeaseState.FRESH for view in views)
            offers = sorted(
                {view.offer for view in views},
                key=lambda offer: (offer.price.prompt_per_million + offer.price.completion_per_million, repr(offer)),
            )
            summaries.append(ModelSummary(model, len(views), fresh, tuple(offers)))
        return summaries

    def seen_model(self, model: str, now: float) -> bool:
        """Somebody offers it or has within 24 h."""
        gone_at = self._models_gone.get(model)
        return model in self._by_model or (gone_at is not None and now < gone_at + MODEL_MEMORY_S)

    def known(self, peer: PeerId, now: float) -> PeerView | None:
        """What is known of ``peer``, or None."""
        executor = self._executors.get(peer)
        hello = self._hellos.get(peer)
        if hello is not None and hello.until <= now:
            hello = None
        if executor is None and hello is None:
            return None
        roles = hello.roles if hello is not None else frozenset()
        return PeerView(
            peer=peer,
            roles=roles | {"executor"} if executor is not None else roles,
            features=hello.features if hello is not None else frozenset(),
            max_streams=hello.max_streams if hello is not None else 0,
            is_member=hello is not None and hello.is_member,
            addrs=executor.full.addrs if executor is not None else (),
            models=tuple(view.offer.id for view in executor.views) if executor is not None else (),
            state=executor.state(now) if executor is not None else None,
            lease_left_s=max(0.0, executor.lease_until - now) if executor is not None else 0.0,
            source=executor.source if executor is not None else None,
            is_direct=executor.is_direct if executor is not None else True,
            has_served=executor is not None and executor.has_served,
            software=executor.full.software if executor is not None else "",
        )

    def snapshot(self, now: float) -> list[PeerView]:
        """Every peer that is known, by id: executors and those that said hello."""
        views = (self.known(peer, now) for peer in sorted({*self._executors, *self._hellos}))
        return [view for view in views if view is not None]

    def entries_since(self, cursor: int, *, now: float, model: str | None = None, limit: int = 10_000) -> CataloguePage:
        """Executors that are new or announced something else after ``cursor``, whose lease holds, for a catalogue. 0 =
        all. A cursor of the future (of an earlier run) counts as 0.

        Heartbeats do not move an entry: each reader would get nearly the whole book at each look. Who missed some has
        a suspect, and asks that one itself; each executor announces in full every ten minutes besides.
        """
        if cursor > self._cursor:
            cursor = 0
        changed: list[Executor] = []
        for executor in reversed(self._by_change.values()):
            if executor.cursor <= cursor:
                break
            changed.append(executor)
        items: list[CatalogueItem] = []
        for executor in reversed(changed):
            if now >= executor.lease_until:
                continue
            if model is not None and all(view.offer.id != model for view in executor.views):
                continue
            if len(items) == limit:
                return CataloguePage(tuple(items), items[-1].cursor if items else cursor, True)
            beat = executor.heartbeat.raw if executor.heartbeat is not None else b""
            items.append(
                CatalogueItem(executor.cursor, executor.peer, executor.full.raw, beat, now - executor.heard_at)
            )
        return CataloguePage(tuple(items), self._cursor, False)

"""One executor's state as the peer book keeps it, the view that others get of it, and the index by model. Pure."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import islice
from typing import Final, overload

from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.protocol.offers import Announcement, Load, ModelOffer

MAX_TTL_S: Final = 15 * 60.0
"""Longest lease, whatever the announcement states. Source: PROTOCOL.md, Announcement."""
SUSPECT_SHARE: Final = 2 / 3
"""Share of the ttl after which silence is suspicious: of 3 intervals one heartbeat is missing, the second due."""


class LeaseState(Enum):
    """How far an executor's announcement still holds."""

    FRESH = "fresh"
    SUSPECT = "suspect"
    """Silent for too long, or a stream to it failed: probed, and chosen only when nobody else is there."""
    DEAD = "dead"
    """The lease is over: never chosen."""


class Rank(Enum):
    """How much a place in the book is deserved; a newcomer takes the place of a lower rank only."""

    STRANGER = 0
    TAGGED = 1
    """Announces with our network's tag, or is on the allow list."""
    PROVEN = 2
    """Completed a hello in our network."""
    SERVED = 3
    """Has served this node."""


def ring_point(data: bytes) -> int:
    """Where ``data`` lies on the ring of 2**64 points: the first 8 bytes of its BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


class Executor:
    """What is known of one executor. Written by the peer book only; others see it through ``ExecutorView``."""

    __slots__ = (
        "alive_at",
        "cursor",
        "failed_at",
        "full",
        "groups",
        "has_served",
        "heard_at",
        "heartbeat",
        "is_direct",
        "is_listed",
        "is_proven",
        "is_relayed_path",
        "lease_until",
        "load",
        "peer",
        "point",
        "probed_at",
        "sequence",
        "source",
        "suspect_at",
        "ttl_s",
        "views",
    )

    def __init__(self, full: Announcement, *, source: PeerId | None, heard_at: float, ttl_s: float) -> None:
        self.peer = full.peer
        self.point = ring_point(full.peer.raw)
        self.full = full
        self.heartbeat: Announcement | None = None
        self.sequence = full.sequence
        self.load = full.load
        self.source = source
        self.is_direct = False
        self.is_listed = False
        self.is_proven = False
        self.has_served = False
        self.is_relayed_path: bool | None = None
        self.failed_at: float | None = None
        self.probed_at = float("-inf")
        self.alive_at = float("-inf")
        self.cursor = 0
        self.groups: frozenset[tuple[str, str]] = frozenset()
        self.views: tuple[ExecutorView, ...] = ()
        self.heard_at = heard_at
        self.ttl_s = ttl_s
        self.lease_until = 0.0
        self.suspect_at = 0.0
        self.run_lease(heard_at, ttl_s)

    def run_lease(self, heard_at: float, ttl_s: float) -> None:
        """Run the lease from ``heard_at``, never from before what is known: a lying catalogue must not end it."""
        self.heard_at = max(self.heard_at, heard_at)
        self.ttl_s = ttl_s
        self.lease_until = self.heard_at + ttl_s
        self.suspect_at = max(self.heard_at, self.alive_at) + ttl_s * SUSPECT_SHARE
        if self.failed_at is not None and self.heard_at > self.failed_at:
            self.failed_at = None

    def state(self, now: float) -> LeaseState:
        """State of the lease at ``now``."""
        if now >= self.lease_until:
            return LeaseState.DEAD
        if self.failed_at is not None or now > self.suspect_at:
            return LeaseState.SUSPECT
        return LeaseState.FRESH

    @property
    def rank(self) -> Rank:
        """What its place in the book rests on."""
        if self.has_served:
            return Rank.SERVED
        if self.is_proven:
            return Rank.PROVEN
        return Rank.TAGGED if self.full.is_member or self.is_listed else Rank.STRANGER


class ExecutorView:
    """One model at one executor, read-only and live: it shows later heartbeats too.

    Equal only to itself. It outlives its executor: then ``state`` is dead, or will be when its lease ends.
    """

    __slots__ = ("_executor", "offer", "peer", "point")

    def __init__(self, executor: Executor, offer: ModelOffer) -> None:
        self._executor = executor
        self.peer: PeerId = executor.peer
        self.offer: ModelOffer = offer
        self.point: int = executor.point

    @property
    def addrs(self) -> tuple[Multiaddr, ...]:
        """As announced; see ``dialable`` for which may be used."""
        return self._executor.full.addrs

    @property
    def load(self) -> Load:
        """As last announced."""
        return self._executor.load

    @property
    def is_member(self) -> bool:
        """Announced with the tag of one of our networks, or proved membership by hello."""
        return self._executor.full.is_member or self._executor.is_proven

    @property
    def is_proven(self) -> bool:
        """It answered us: a hello in our network was completed, or it has served; or it is on the allow list. Of the
        others there is an announcement only, which anybody with the key can make for a node that does not exist."""
        executor = self._executor
        return executor.is_proven or executor.has_served or executor.is_listed

    @property
    def is_direct(self) -> bool:
        """The announcement came from the executor itself."""
        return self._executor.is_direct

    @property
    def is_relayed(self) -> bool:
        """The path in use is relayed; before there is one: every announced address is."""
        path = self._executor.is_relayed_path
        if path is not None:
            return path
        addrs = self._executor.full.addrs
        return bool(addrs) and all(addr.is_relayed for addr in addrs)

    @property
    def software(self) -> str:
        """What the executor says it runs."""
        return self._executor.full.software

    def state(self, now: float) -> LeaseState:
        """State of the lease at ``now`` (monotonic seconds)."""
        return self._executor.state(now)

    def __repr__(self) -> str:
        return f"ExecutorView({self.peer.short()}, {self.offer.id})"


class ModelIndex(Sequence[ExecutorView]):
    """Every executor of one model, ordered by its point on the ring: indexing and ``near`` cost no scan.

    With 10,000 executors insertion and removal move 80 KB of pointers (about 5 µs), a draw by index costs nothing.
    Dead ones stay until the book expires them: ask ``view.state(now)``.
    """

    __slots__ = ("_points", "_views")

    def __init__(self) -> None:
        self._points: list[int] = []
        self._views: list[ExecutorView] = []

    def add(self, view: ExecutorView) -> None:
        """Put in a view. An executor is in once; the peer book sees to that."""
        at = bisect_left(self._points, view.point)
        self._points.insert(at, view.point)
        self._views.insert(at, view)

    def discard(self, view: ExecutorView) -> None:
        """Take out a view that is in."""
        at = bisect_left(self._points, view.point)
        while self._views[at] is not view:
            at += 1
        del self._points[at], self._views[at]

    def near(self, point: int, count: int) -> list[ExecutorView]:
        """The ``count`` views that follow ``point`` on the ring; a view more or less moves one place only."""
        at = bisect_left(self._points, point)
        found = self._views[at : at + count]
        found += self._views[: min(at, count - len(found))]
        return found

    def of_peer(self, peer: PeerId) -> list[ExecutorView]:
        """The view of ``peer``, if it is in."""
        at = bisect_left(self._points, ring_point(peer.raw))
        return [view for view in self._views[at : at + 4] if view.peer == peer]  # some, should points collide

    def __len__(self) -> int:
        return len(self._views)

    @overload
    def __getitem__(self, index: int) -> ExecutorView: ...
    @overload
    def __getitem__(self, index: slice) -> list[ExecutorView]: ...
    def __getitem__(self, index: int | slice) -> ExecutorView | list[ExecutorView]:
        return self._views[index]

    def __iter__(self) -> Iterator[ExecutorView]:
        return islice(self._views, None)

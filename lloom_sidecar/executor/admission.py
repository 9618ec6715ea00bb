"""Who may work now, who waits, who is refused. Pure: ``now`` is an argument, in monotonic seconds.

A slot is one request that the backend works on. A request takes a place when its REQUEST was checked, is ready for a
slot when its body is complete, and leaves whatever became of it:

    ARRIVING --ready--> WAITING --> WORKING --leave--> GONE
        +------------------+------> PUSHED_OUT

- **Fairness.** A free slot goes to the waiting peer that holds the fewest; between equals to the one whose turn was
  longest ago, and who comes new takes its turn behind those who wait (start-time fair queueing, with a slot as the
  unit). The queue is shared: when it is full, a peer with fewer places in it pushes out the last request of the peer
  with the most. So one peer may use all that nobody else wants, and no more once somebody does.
- **Priority** orders the requests of one peer only; a step counts like ``PRIORITY_STEP_S`` of waiting, so that every
  request's turn comes (ageing) though others of higher priority keep coming.
- **Priority peers**, the operator's list, go before others, in a queue of their own. A slot is never taken back, so
  while they ask some slots are kept for them; and at most ``PRIORITY_IN_A_ROW`` of them go before one of the others.
- **Deadlines.** What would have to wait so long that it cannot end in time is refused at once.

Source: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996; McKenney, "Stochastic Fairness Queueing", INFOCOM
1990 (a full buffer takes from the longest queue).
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from lloom_sidecar.errors import PeerBusyError
from lloom_sidecar.ids import PeerId

MIN_RETRY_AFTER_S: Final = 0.1
MAX_RETRY_AFTER_S: Final = 30.0
PRIORITY_STEP_S: Final = 10.0
"""Waiting that one step of priority is worth."""
MAX_PRIORITY: Final = 10
"""Steps that count, either way: at most 200 s between the first and the last of one peer."""
PRIORITY_IN_A_ROW: Final = 3
"""Priority peers' requests that go before one of the others that may go."""
KEEP_S: Final = 300.0
"""How long after a priority peer's last request slots are kept for the next."""
_SMOOTHING: Final = 0.1
_UNKNOWN_SERVICE_S: Final = 1.0
"""Taken for the service time until one request has ended."""


class Place(Enum):
    """Where a request is."""

    ARRIVING = "arriving"
    """Its body is not complete: it holds a place in the queue, no slot."""
    WAITING = "waiting"
    WORKING = "working"
    PUSHED_OUT = "pushed_out"
    """It has lost its place to a peer with fewer."""
    GONE = "gone"


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place."""

    peer: PeerId
    number: int
    """Grows with every request: decides between equals."""
    due_at: float
    """Orders the requests of one peer: when it entered, put off or forward by its priority."""
    place: Place = Place.ARRIVING
    ready_at: float = 0.0
    began_at: float = 0.0
    """When it got its slot."""

    def __lt__(self, other: Ticket) -> bool:
        return (self.due_at, self.number) < (other.due_at, other.number)


@dataclass(slots=True)
class _Share:
    """What one peer holds."""

    turn: int
    """Number of its own last slot; before it had one, of the slot before the last one that was given when it came. The
    lowest goes first."""
    since: int
    """Number of the request with which it came: decides between equals."""
    arriving: list[Ticket] = field(default_factory=list)
    waiting: list[Ticket] = field(default_factory=list)
    """In the order in which they go."""
    working: int = 0

    @property
    def places(self) -> int:
        return len(self.arriving) + len(self.waiting)


class _Lane:
    """The queue and the slots of one class of peers."""

    def __init__(self) -> None:
        self.shares: dict[PeerId, _Share] = {}
        self.places = 0
        self.waiting = 0
        self.working = 0

    def first(self) -> _Share:
        """The peer whose turn it is; some peer waits."""
        waiting = (share for share in self.shares.values() if share.waiting)
        return min(waiting, key=lambda share: (share.working, share.turn, share.since))

    def largest(self) -> _Share | None:
        """The peer with the most places."""
        return max(self.shares.values(), key=lambda share: share.places, default=None)


class Admission:
    """The state of one executor's capacity."""

    def __init__(
        self,
        *,
        slots: int,
        queue_limit: int,
        max_per_peer: int | None = None,
        priority_peers: frozenset[PeerId] = frozenset(),
        priority_slots: int = 1,
    ) -> None:
        """``slots``: requests that work at once. ``queue_limit``: requests that wait (of priority peers as many more).
        ``max_per_peer``: requests of one peer, in slots and queue; None = only what others leave.
        ``priority_slots``: kept for priority peers while they ask; one slot is always left to others.
        """
        self.slots = slots
        self.queue_limit = queue_limit
        self.max_per_peer = max_per_peer
        self.priority_peers = priority_peers
        self.priority_slots = priority_slots
        self._lane = _Lane()
        self._priority_lane = _Lane()
        self._priority_at = float("-inf")
        """When a priority peer asked last."""
        self._in_a_row = 0
        self._entered = 0
        self._turn = 0
        self._service_s: float | None = None

    @property
    def working(self) -> int:
        """Requests that hold a slot."""
        return self._lane.working + self._priority_lane.working

    @property
    def queued(self) -> int:
        """Requests that wait for a slot, or for their body."""
        return self._lane.places + self._priority_lane.places

    @property
    def service_s(self) -> float:
        """Smoothed time that a request holds its slot."""
        return _UNKNOWN_SERVICE_S if self._service_s is None else self._service_s

    @property
    def retry_after_s(self) -> float:
        """When somebody who found the queue full should ask again: once half of it is gone, since it must not run
        empty before they are back."""
        return _bounded(self.service_s * (self._lane.places / 2 + 1) / self.slots)

    def kept(self, now: float) -> int:
        """Slots that only priority peers get now."""
        if now - self._priority_at > KEEP_S:
            return 0
        return max(0, min(self.priority_slots, self.slots - 1))

    # ------------------------------------------------------------ coming
    def enter(
        self, peer: PeerId, now: float, *, priority: int = 0, deadline_at: float = float("inf")
    ) -> tuple[Ticket, Ticket | None]:
        """A place for a request of ``peer`` that must have ended at ``deadline_at``.

        Returns its ticket, and that of the request that was pushed out for it, if one was.

        Raises:
            PeerBusyError: the peer has too many requests here (code peer_limit), the deadline cannot be met
            (deadline_too_short) or the queue is full (busy), with the seconds after which trying again makes sense.
        """
        is_priority = peer in self.priority_peers
        lane = self._priority_lane if is_priority else self._lane
        if is_priority:
            self._priority_at = now
        share = lane.shares.get(peer)
        if share is None:
            share = _Share(self._turn - 1, self._entered + 1)
        if self.max_per_peer is not None and share.places + share.working >= self.max_per_peer:
            raise PeerBusyError(
                f"this peer has {self.max_per_peer} requests here already",
                code="peer_limit",
                http_status=429,
                retry_after_s=_bounded(self.service_s / max(1, share.working)),
            )
        self._entered += 1
        due_at = now - PRIORITY_STEP_S * max(-MAX_PRIORITY, min(MAX_PRIORITY, priority))
        ticket = Ticket(peer, self._entered, due_at)
        pushed_out = None
        must_wait = lane.places - self._free(lane, now)
        if must_wait >= 0:
            self._check_deadline(lane, share, ticket, deadline_at, now)
            if must_wait >= self.queue_limit:
                pushed_out = self._push_out(lane, share)
        lane.shares[peer] = share
        share.arriving.append(ticket)
        lane.places += 1
        return ticket, pushed_out

    def ready(self, ticket: Ticket, now: float) -> list[Ticket]:
        """The request's body is complete. Returns the tickets that got a slot now; nothing for one that is no more."""
        if ticket.place is not Place.ARRIVING:
            return []
        lane, share = self._of(ticket)
        share.arriving.remove(ticket)
        insort(share.waiting, ticket)
        lane.waiting += 1
        ticket.place = Place.WAITING
        ticket.ready_at = now
        return self._fill(now)

    # ------------------------------------------------------------ going
    def leave(self, ticket: Ticket, now: float) -> list[Ticket]:
        """Give a place back, whatever it was; again does nothing. Returns the tickets that got a slot now."""
        place = ticket.place
        if place is Place.GONE or place is Place.PUSHED_OUT:
            ticket.place = Place.GONE
            return []
        if place is Place.WORKING:
            lane, share = self._of(ticket)
            lane.working -= 1
            share.working -= 1
            held_s = max(0.0, now - ticket.began_at)
            before_s = self._service_s
            self._service_s = held_s if before_s is None else before_s + _SMOOTHING * (held_s - before_s)
        else:
            self._take_out(ticket)
        ticket.place = Place.GONE
        self._forget(ticket.peer)
        return self._fill(now)

    def resize(self, slots: int, now: float) -> list[Ticket]:
        """The backend's parallelism changed. Returns the tickets that got a slot now."""
        self.slots = max(1, slots)
        return self._fill(now)

    # ------------------------------------------------------------ inside
    def _of(self, ticket: Ticket) -> tuple[_Lane, _Share]:
        lane = self._priority_lane if ticket.peer in self.priority_peers else self._lane
        return lane, lane.shares[ticket.peer]

    def _free(self, lane: _Lane, now: float) -> int:
        """Slots that requests of this lane could get now."""
        free = self.slots - self.working
        if lane is self._lane:
            free = min(free, self.slots - self.kept(now) - lane.working)
        return max(0, free)

    def _fill(self, now: float) -> list[Ticket]:
        admitted = []
        while (lane := self._next_lane(now)) is not None:
            share = lane.first()
            ticket = share.waiting.pop(0)
            self._turn += 1
            share.turn = self._turn
            share.working += 1
            lane.waiting -= 1
            lane.places -= 1
            lane.working += 1
            ticket.place = Place.WORKING
            ticket.began_at = now
            admitted.append(ticket)
        return admitted

    def _next_lane(self, now: float) -> _Lane | None:
        """Whose turn the next free slot is, None when there is none or nobody waits for it."""
        if self.working >= self.slots:
            return None
        may_others = self._lane.waiting > 0 and self._free(self._lane, now) > 0
        if self._priority_lane.waiting and not (may_others and self._in_a_row >= PRIORITY_IN_A_ROW):
            self._in_a_row += may_others
            return self._priority_lane
        if not may_others:
            return None
        self._in_a_row = 0
        return self._lane

    def _check_deadline(self, lane: _Lane, share: _Share, ticket: Ticket, deadline_at: float, now: float) -> None:
        left_s = deadline_at - now
        late_s = self._wait_s(lane, share, ticket, now) + self.service_s - left_s
        if late_s > 0:
            raise PeerBusyError(
                f"the request's {max(0.0, left_s):.1f} s are over before its turn would come and it be answered",
                code="deadline_too_short",
                retry_after_s=_bounded(late_s),
            )

    def _wait_s(self, lane: _Lane, share: _Share, ticket: Ticket, now: float) -> float:
        """How long ``ticket`` would wait if it came now, taken that every request holds its slot equally long."""
        own = sum(one < ticket for one in share.waiting) + sum(one < ticket for one in share.arriving)
        # In turn: of every other peer as many go before it as it has itself before it, and one.
        others = sum(min(other.places, own + 1) for other in lane.shares.values() if other is not share)
        ahead = max(0, own + others - self._free(lane, now))
        slots = self.slots
        if lane is self._lane:
            ahead += self._priority_lane.places
            slots -= self.kept(now)
        return self.service_s * (ahead + 1) / slots

    def _push_out(self, lane: _Lane, share: _Share) -> Ticket:
        """Make room for one more of ``share``. Raises PeerBusyError when nobody has two places more than it."""
        largest = lane.largest()
        if largest is None or largest.places < share.places + 2:
            raise PeerBusyError(
                "every slot is taken and the queue is full", code="busy", retry_after_s=self.retry_after_s
            )
        ticket = (largest.waiting or largest.arriving)[-1]
        self._take_out(ticket)
        ticket.place = Place.PUSHED_OUT
        return ticket

    def _take_out(self, ticket: Ticket) -> None:
        lane, share = self._of(ticket)
        lane.places -= 1
        if ticket.place is Place.WAITING:
            share.waiting.remove(ticket)
            lane.waiting -= 1
        else:
            share.arriving.remove(ticket)

    def _forget(self, peer: PeerId) -> None:
        """Drop the share of a peer that holds nothing any more."""
        shares = (self._priority_lane if peer in self.priority_peers else self._lane).shares
        share = shares[peer]
        if not (share.working or share.arriving or share.waiting):
            del shares[peer]


def _bounded(seconds: float) -> float:
    return min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, seconds))

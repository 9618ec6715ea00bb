"""Who may work now, who waits, who is refused: slots with a bounded queue, and token buckets. Pure.

A slot is one request that the backend works on; the queue is as long as the setting says and no longer, since a
request that waits longer than its deadline is work for nobody.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from lloom_sidecar.errors import PeerBusyError
from lloom_sidecar.ids import PeerId

MAX_RETRY_AFTER_S: Final = 30.0
_SMOOTHING: Final = 0.2


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's place. ``is_admitted`` turns True when it may work."""

    peer: PeerId
    priority: int
    is_admitted: bool = False
    is_done: bool = False


@dataclass(slots=True)
class Admission:
    """The state of one executor's capacity."""

    slots: int
    """Requests that work at once."""
    queue_limit: int
    """Requests that wait."""
    max_per_peer: int
    """Requests of one peer, working and waiting."""
    working: int = 0
    _queue: deque[Ticket] = field(default_factory=deque)
    _by_peer: dict[PeerId, int] = field(default_factory=dict)
    _service_s: float = 1.0
    """Smoothed time that a request holds its slot."""

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    def enter(self, peer: PeerId, *, priority: int = 0) -> Ticket:
        """A place for a request of ``peer``.

        Raises:
            PeerBusyError: the queue is full (code busy) or the peer has too many requests here (code peer_limit), with
            the seconds after which trying again makes sense.
        """
        if self._by_peer.get(peer, 0) >= self.max_per_peer:
            raise PeerBusyError(
                f"this peer has {self.max_per_peer} requests here already",
                code="peer_limit",
                http_status=429,
                retry_after_s=self._estimate(),
            )
        ticket = Ticket(peer, priority)
        if self.working < self.slots and not self._queue:
            ticket.is_admitted = True
            self.working += 1
        elif len(self._queue) < self.queue_limit:
            self._queue.append(ticket)
        else:
            raise PeerBusyError(
                "every slot is taken and the queue is full", code="busy", retry_after_s=self._estimate()
            )
        self._by_peer[peer] = self._by_peer.get(peer, 0) + 1
        return ticket

    def leave(self, ticket: Ticket, *, held_s: float | None = None) -> Ticket | None:
        """Give a place back, whether it worked or waited. Returns the ticket that may work now, if one was waiting."""
        if ticket.is_done:
            return None
        ticket.is_done = True
        left = self._by_peer[ticket.peer] - 1
        if left:
            self._by_peer[ticket.peer] = left
        else:
            del self._by_peer[ticket.peer]
        if not ticket.is_admitted:
            self._queue.remove(ticket)
            return None
        self.working -= 1
        if held_s is not None:
            self._service_s += _SMOOTHING * (held_s - self._service_s)
        return self._admit_next()

    def resize(self, slots: int) -> list[Ticket]:
        """The backend's parallelism changed. Returns the tickets that may work now."""
        self.slots = max(1, slots)
        admitted = []
        while (ticket := self._admit_next()) is not None:
            admitted.append(ticket)
        return admitted

    def _admit_next(self) -> Ticket | None:
        if self.working >= self.slots or not self._queue:
            return None
        # Priority only orders requests of the same peer: nobody gets ahead of others by asking.
        first = self._queue[0]
        chosen = max((t for t in self._queue if t.peer == first.peer), key=lambda t: t.priority)
        if chosen.priority == first.priority:
            chosen = first
        self._queue.remove(chosen)
        chosen.is_admitted = True
        self.working += 1
        return chosen

    def _estimate(self) -> float:
        waves = 1 + len(self._queue) / max(1, self.slots)
        return min(MAX_RETRY_AFTER_S, max(0.1, self._service_s * waves))

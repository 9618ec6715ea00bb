"""Clients that take answers and never countersign: how many priced ones each has left open. Pure.

Without the countersignature the executor can show that it was asked and what it says it answered, not that the answer
arrived. One that is missing means little (its stream broke); many of one client mean a client that means to dispute.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Final

from lloom_sidecar.ids import PeerId

GRACE_S: Final = 10.0
"""An ACK is due within 5 s. Source: PROTOCOL.md, Exchange."""
FORGET_S: Final = 3600.0
"""After so long a missing ACK counts no more: a client that was unlucky is not locked out for ever."""
MAX_PEERS: Final = 4096


class UnackedBook:
    """Counts per client; ``now`` is in seconds of any clock that only goes forward."""

    def __init__(self, limit: int) -> None:
        """``limit``: missing ACKs from which on a client is refused, 0 = never."""
        self._limit = limit
        self._ended_at: OrderedDict[PeerId, deque[float]] = OrderedDict()

    def ended(self, peer: PeerId, now: float) -> None:
        """A priced exchange of ``peer`` has ended with END; its ACK is due."""
        if not self._limit:
            return
        # One more than the limit would change nothing, and those within the grace are to be remembered too.
        times = self._ended_at.setdefault(peer, deque(maxlen=2 * self._limit + 1024))
        times.append(now)
        self._ended_at.move_to_end(peer)
        if len(self._ended_at) > MAX_PEERS:
            self._ended_at.popitem(last=False)

    def acked(self, peer: PeerId) -> None:
        """One of its ACKs came; it stands for the latest that was missing."""
        times = self._ended_at.get(peer)
        if times:
            times.pop()

    def missing(self, peer: PeerId, now: float) -> int:
        """ACKs that are overdue."""
        times = self._ended_at.get(peer)
        if times is None:
            return 0
        while times and times[0] < now - FORGET_S:
            times.popleft()
        if not times:
            del self._ended_at[peer]
            return 0
        return sum(at <= now - GRACE_S for at in times)

    def is_over(self, peer: PeerId, now: float) -> bool:
        """True when ``peer`` is to be refused."""
        return bool(self._limit) and self.missing(peer, now) >= self._limit

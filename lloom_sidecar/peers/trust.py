"""How far executors are doubted, for which reasons, and how that fades. Pure state: ``now`` is monotonic seconds.

Doubt is between 0 and 1 and has sources, which do not know each other: a validator's evidence, numbers in receipts
that do not fit. What one source says adds up to at most 1 and halves every quarter of an hour; an executor's doubt is
the sum over its sources, at most 1. Trust is what is left. Nothing here proves anything: it makes an executor cost more
in a choice, or rules it out where a setting says so.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from lloom_sidecar.ids import PeerId

HALF_LIFE_S: Final = 900.0
"""As long as a validator's evidence may count after it was last said."""
FORGET_BELOW: Final = 0.02
"""A doubt that has faded so far is dropped: after some six half-lives."""
MAX_REASONS: Final = 8
"""Of one executor; the weakest goes first."""
MAX_PEERS: Final = 10_000
DOUBTED_COST: Final = 7.0
"""At full doubt an executor costs 1 + 7 times what it would: more than a warm cache makes up for."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """One reason to doubt an executor, as it stands now."""

    reason: str
    weight: float
    """Over 0, at most 1."""
    said_s: float
    """Seconds since it was last said."""


@dataclass(slots=True)
class _Entry:
    weight: float
    at: float

    def now(self, now: float) -> float:
        return self.weight * math.exp2(-max(0.0, now - self.at) / HALF_LIFE_S)


class TrustBook:
    """Doubts of one node about executors. Bounded: who was doubted longest ago makes room."""

    def __init__(self, *, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._doubts: OrderedDict[PeerId, dict[str, _Entry]] = OrderedDict()

    def doubt(self, peer: PeerId, reason: str, weight: float, now: float) -> None:
        """There is a reason to doubt ``peer``; said again, it grows up to 1.

        Args:
            reason: a few words that name the source; the same source uses the same ones.
            weight: over 0, at most 1; 1 = for all that is known, it does not serve what it says.
        """
        entry = self._doubts.get(peer, {}).get(reason)
        self.set_doubt(peer, reason, min(1.0, weight + (0.0 if entry is None else entry.now(now))), now)

    def set_doubt(self, peer: PeerId, reason: str, weight: float, now: float) -> None:
        """As ``doubt``, for a source that says the same again and again: it counts ``weight`` however often."""
        entries = self._doubts.setdefault(peer, {})
        self._doubts.move_to_end(peer)
        entries[reason] = _Entry(weight, now)
        if len(entries) > MAX_REASONS:
            del entries[min(entries, key=lambda one: (one == reason, entries[one].now(now)))]
        if len(self._doubts) > self._max_peers:
            self._doubts.popitem(last=False)

    def trust(self, peer: PeerId, now: float) -> float:
        """1 = nothing is held against it, 0 = fully doubted."""
        entries = self._doubts.get(peer)
        if entries is None:
            return 1.0
        return max(0.0, 1.0 - sum(entry.now(now) for entry in entries.values()))

    def cost_factor(self, peer: PeerId, now: float) -> float:
        """What its cost in a choice is multiplied with, 1 to 8."""
        if peer not in self._doubts:
            return 1.0
        return 1.0 + DOUBTED_COST * (1.0 - self.trust(peer, now))

    def doubts_of(self, peer: PeerId, now: float) -> tuple[Doubt, ...]:
        """Why it is doubted, the strongest reason first."""
        found = [Doubt(reason, entry.now(now), now - entry.at) for reason, entry in self._doubts.get(peer, {}).items()]
        return tuple(sorted(found, key=lambda one: (-one.weight, one.reason)))

    def doubted(self, now: float) -> list[PeerId]:
        """Everybody that is doubted, by id; what has faded is forgotten here."""
        for peer, entries in list(self._doubts.items()):
            for reason in [reason for reason, entry in entries.items() if entry.now(now) < FORGET_BELOW]:
                del entries[reason]
            if not entries:
                del self._doubts[peer]
        return sorted(self._doubts)

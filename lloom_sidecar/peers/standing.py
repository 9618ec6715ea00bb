"""Which peers are kept away, and until when: offenders on the topics, and those that hello refused. Pure state, time is
an argument.

    offence, offence, ... --(more than the allowance)--> banned --(10 min)--> forgotten
    refused at hello --(10 min, or a hello that succeeds)--> forgotten
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from lloom_sidecar.ids import PeerId

from .rate import RateLimiter

KEEP_AWAY_S: Final = 600.0
"""How long an offender is banned, and a refusal remembered."""
FORGED_BURST: Final = 5
"""Forged or oversized messages that are let pass at once: a node with a bad disk or an odd version is no attacker."""
FORGED_PER_S: Final = 1 / 30
FLOOD_BURST: Final = 40
"""Messages over an author's rate that are let pass at once."""
FLOOD_PER_S: Final = 0.5
MAX_PEERS: Final = 4096
"""Entries of each table; the oldest makes room."""
FLOOD: Final = "rate"
"""The reason that counts as a flood; every other one as forged."""


@dataclass(frozen=True, slots=True)
class _Entry:
    reason: str
    until: float


class Standing:
    """Bans and refusals. Every table is bounded: a peer that invents names only makes the oldest ones forgotten."""

    def __init__(self, *, max_peers: int = MAX_PEERS) -> None:
        self._max_peers = max_peers
        self._forged: RateLimiter[PeerId] = RateLimiter(rate_per_s=FORGED_PER_S, burst=FORGED_BURST, max_keys=max_peers)
        self._floods: RateLimiter[PeerId] = RateLimiter(rate_per_s=FLOOD_PER_S, burst=FLOOD_BURST, max_keys=max_peers)
        self._banned: OrderedDict[PeerId, _Entry] = OrderedDict()
        self._refused: OrderedDict[PeerId, _Entry] = OrderedDict()

    def offend(self, peer: PeerId, reason: str, now: float) -> bool:
        """``peer`` published something that no honest node publishes. True when that was once too often: it is banned
        from now on. False also for one that is banned already."""
        if self.ban_of(peer, now) is not None:
            return False
        if (self._floods if reason == FLOOD else self._forged).take(peer, now):
            return False
        self._put(self._banned, peer, reason, now)
        return True

    def ban_of(self, peer: PeerId, now: float) -> str | None:
        """Why ``peer`` is banned now, None = it is not."""
        return self._get(self._banned, peer, now)

    def refuse(self, peer: PeerId, code: str, now: float) -> bool:
        """A hello with ``peer`` ended in REFUSE. True when that was not known."""
        is_new = self._get(self._refused, peer, now) is None
        self._put(self._refused, peer, code, now)
        return is_new

    def accept(self, peer: PeerId) -> None:
        """A hello with ``peer`` succeeded."""
        self._refused.pop(peer, None)

    def refusal_of(self, peer: PeerId, now: float) -> str | None:
        """The code with which a hello with ``peer`` was refused lately, None = none was."""
        return self._get(self._refused, peer, now)

    def keeps_away(self, peer: PeerId, now: float) -> str | None:
        """Why ``peer`` should be neither dialled nor greeted now, None = nothing speaks against it."""
        return self.ban_of(peer, now) or self.refusal_of(peer, now)

    def refused(self, code: str, now: float) -> list[PeerId]:
        """Those that were refused with ``code`` lately."""
        return [peer for peer, entry in self._refused.items() if entry.reason == code and now < entry.until]

    def banned(self, now: float) -> list[PeerId]:
        """Those that are banned now."""
        return [peer for peer, entry in self._banned.items() if now < entry.until]

    def _put(self, table: OrderedDict[PeerId, _Entry], peer: PeerId, reason: str, now: float) -> None:
        table[peer] = _Entry(reason, now + KEEP_AWAY_S)
        table.move_to_end(peer)
        if len(table) > self._max_peers:
            table.popitem(last=False)

    def _get(self, table: OrderedDict[PeerId, _Entry], peer: PeerId, now: float) -> str | None:
        entry = table.get(peer)
        if entry is None:
            return None
        if entry.until <= now:
            del table[peer]
            return None
        return entry.reason

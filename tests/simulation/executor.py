"""An executor of the model: what it announces and when, by the announcer's rules. It has no peer book of its own."""

from __future__ import annotations

import hashlib
from collections import deque
from random import Random

from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.announcement import MAX_TTL_S, announcement_interval_s, announcement_ttl_s
from lloom_sidecar.protocol.offers import Announcement, Kind, Load, ModelOffer

from .parameters import FULL_EVERY_S

_KEPT: int = 8
"""Announcements that are kept by sequence, for catalogues on their way."""


def peer_of(number: int) -> PeerId:
    """The id of node ``number``: any 32 bytes do, nothing is signed."""
    return PeerId.from_ed25519(hashlib.sha256(number.to_bytes(8, "big")).digest())


class SimulatedExecutor:
    """One life of one executor."""

    def __init__(self, number: int, place: int, model: str, started_at: float, mesh_ready_at: float) -> None:
        """``place`` in the mesh; ``mesh_ready_at``: what it says before that reaches nobody."""
        self.number = number
        self.peer = peer_of(number)
        self.place = place
        self.started_at = started_at
        self.mesh_ready_at = mesh_ready_at
        self.models = (ModelOffer(id=model, slots=4),)
        self.ttft_s = 0.1 + 0.8 * (number * 0.618034 % 1.0)
        self.is_alive = True
        self.has_left = False
        """It said goodbye."""
        self.ended_at = float("inf")
        self.full: Announcement | None = None
        self.full_at = float("-inf")
        self.interval_s = 0.0
        self.turn = 0
        """Counts announcements: a timer that was set before the last one is void."""
        self.is_due = False
        """A topic peer appeared; a full announcement waits for the next look at the topic."""
        self.sequence = 0
        self.made: deque[Announcement] = deque(maxlen=_KEPT)

    def next_interval_s(self, executors_seen: int, rng: Random, fixed_s: float = 0.0) -> float:
        """Draw the time until the next announcement by the real policy (or ``fixed_s`` with the same jitter)."""
        self.interval_s = announcement_interval_s(executors_seen, rng.random())
        if fixed_s:
            self.interval_s = fixed_s * (1 - 0.1 * rng.random())
        return self.interval_s

    def announce(self, now: float) -> Announcement:
        """The announcement that is due: full when the last is old, else a heartbeat."""
        self.turn += 1
        if self.full is not None and now - self.full_at < FULL_EVERY_S:
            return self._make(Kind.HEARTBEAT, now)
        kind = Kind.INITIAL if self.full is None else Kind.UPDATE
        self.full = self._make(kind, now)
        self.full_at = now
        return self.full

    def withdraw(self, now: float) -> Announcement:
        """Its removal."""
        self.turn += 1
        return self._make(Kind.REMOVAL, now)

    def find(self, raw: bytes) -> Announcement | None:
        """One of its last announcements by its bytes, as a catalogue hands it on."""
        if self.full is not None and self.full.raw == raw:
            return self.full
        return next((one for one in self.made if one.raw == raw), None)

    def _make(self, kind: int, now: float) -> Announcement:
        self.sequence = max(self.sequence + 1, round(now * 1000))
        is_full = kind in (Kind.INITIAL, Kind.UPDATE)
        raw = b"%d:%d:%d" % (self.number, self.sequence, kind)
        full_digest = self.full.digest if kind == Kind.HEARTBEAT and self.full is not None else b""
        made = Announcement(
            peer=self.peer,
            sequence=self.sequence,
            issued_at_ms=round(now * 1000),
            ttl_s=MAX_TTL_S if kind == Kind.REMOVAL else announcement_ttl_s(self.interval_s),
            kind=kind,
            network_id=b"",
            is_member=True,
            addrs=(),  # nobody is dialled, and what the quotas by subnet do is not the question here
            models=self.models if is_full else (),
            load=Load(ttft_s=self.ttft_s),
            software="",
            full_digest=full_digest,
            raw=raw,
            digest=hashlib.blake2b(raw, digest_size=32).digest(),
        )
        self.made.append(made)
        return made

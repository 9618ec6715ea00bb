"""What the ledger keeps, as values."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final, Literal

from lloom_sidecar.ids import Multiaddr, PeerId

Role = Literal["client", "executor"]
UsageKey = Literal["model", "peer", "day"]
MAX_INTEGER: Final = 2**63 - 1
"""SQLite's largest."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """One exchange, as its client or its executor keeps it: with a receipt, with a checkpoint only, or with neither."""

    role: Role
    """What this node was in it."""
    peer: PeerId
    """The other side."""
    request_id: bytes
    """The same for every attempt at one request."""
    exchange: int
    """Number of the exchange on its stream."""
    request: bytes = field(repr=False)
    """Envelope of the REQUEST. With ``role`` it is the key: no two requests have the same bytes."""
    receipt: bytes | None = field(default=None, repr=False)
    """END's envelope; None when none came."""
    checkpoint: bytes | None = field(default=None, repr=False)
    """The last CHECKPOINT's envelope: what is owed when no receipt came."""
    ack: bytes | None = field(default=None, repr=False)
    """The client's countersignature."""
    is_owed: bool = False
    reason: str = ""
    """Why it is not owed, or not to the end: lost, hedged, refused, cancelled, ..."""
    doubts: str = ""
    """What the client, counting itself, found wrong with the executor's numbers; empty = nothing."""
    salt: bytes = field(default=b"", repr=False)
    """Opens the digests of body and answer to a guess: leaves this node only when exported on purpose."""
    idempotency_key: bytes = b""
    """At most one exchange of a client is owed per key; empty = no key."""
    created_at_ms: int = 0
    """Unix milliseconds."""

    def __post_init__(self) -> None:
        if not 0 <= self.exchange <= MAX_INTEGER or not 0 <= self.created_at_ms <= MAX_INTEGER:
            raise ValueError("a receipt's numbers lie between 0 and 2^63 - 1")

    @property
    def request_digest(self) -> bytes:
        """SHA-256 of the REQUEST's envelope: what ``record_ack`` and ``settle`` ask for."""
        return hashlib.sha256(self.request).digest()


@dataclass(frozen=True, slots=True)
class Stated:
    """What the statements of an exchange say, in columns: of the receipt, else of the last checkpoint, else of the
    request alone."""

    model: str = ""
    outcome: Literal["", "complete", "stopped", "partial"] = ""
    """Empty when there is neither receipt nor checkpoint."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0
    """Minor units of ``currency``."""
    currency: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """An exchange as it stands in the ledger."""

    id: int
    """Grows with time: a place to go on listing from."""
    receipt: Receipt
    stated: Stated


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums over the exchanges of one model, peer or day, in one role and currency."""

    role: Role
    key: str | PeerId
    """Model id, peer, or day (``2026-11-25``, UTC)."""
    currency: str
    """Empty: free, or nothing stated."""
    exchanges: int
    """All of them."""
    owed: int
    """Those that are owed; the sums below are over these."""
    prompt_tokens: int
    completion_tokens: int
    cost: int
    """Minor units of ``currency``."""


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """A peer worth dialling at the next start."""

    peer: PeerId
    addrs: tuple[Multiaddr, ...]
    roles: frozenset[str]
    last_seen_ms: int
    """Unix milliseconds."""

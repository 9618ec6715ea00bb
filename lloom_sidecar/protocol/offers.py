"""What an executor offers, as values that every room may hold: models, prices, load. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from lloom_sidecar.ids import Multiaddr, PeerId

RESUME: Final = "resume"
"""The feature of a model whose backend goes on with an answer that it is given the beginning of."""
PROVEN_FEATURES: Final = frozenset({RESUME})
"""Features that are announced only when the executor saw its backend do it: never assumed of one that names none."""


@dataclass(frozen=True, slots=True)
class Price:
    """Integer minor units of ``currency`` per million tokens; all zero = free."""

    prompt_per_million: int = 0
    completion_per_million: int = 0
    currency: str = ""
    """ISO 4217 code or a network's own word, at most 8 characters; empty when free."""

    @classmethod
    def parse(cls, text: str) -> Price:
        """From ``PROMPT/COMPLETION CURRENCY``, e.g. ``15/60 EUR``, or ``free``. Raises ValueError with a sentence."""
        if text.strip() == "free":
            return cls()
        found = re.fullmatch(r"\s*(\d{1,12})/(\d{1,12})\s+([A-Za-z0-9]{1,8})\s*", text, re.ASCII)
        if found is None:
            raise ValueError(
                f"{text[:60]!r} is not a price such as 15/60 EUR (prompt/completion per million tokens), or free"
            )
        return cls(int(found[1]), int(found[2]), found[3])

    def __str__(self) -> str:
        return "free" if self.is_free else f"{self.prompt_per_million}/{self.completion_per_million} {self.currency}"

    @property
    def is_free(self) -> bool:
        """True when neither kind of token costs anything."""
        return self.prompt_per_million == 0 and self.completion_per_million == 0


@dataclass(frozen=True, slots=True)
class ModelOffer:
    """One model at one executor."""

    id: str
    family: str = ""
    context_length: int = 0
    """Tokens that one request may use at this backend, 0 = unknown."""
    quantisation: str = ""
    features: frozenset[str] = frozenset()
    """Of: chat, completions, embeddings, tools, vision, json_schema, logprobs; none of these = unknown, all are tried.
    And those of ``PROVEN_FEATURES``."""
    price: Price = Price()
    slots: int = 1
    """Requests that the backend works on at once."""
    digest: bytes = b""
    """SHA-256 of the weights, empty = unknown."""


@dataclass(frozen=True, slots=True)
class Load:
    """What an executor said of its load when it announced."""

    in_flight: int = 0
    queued: int = 0
    tokens_per_s: float = 0.0
    """Of one stream, smoothed."""
    ttft_s: float = 0.0
    """Time to the first token, smoothed."""


class Kind:
    """Kinds of announcement, numbered as in lloom.proto."""

    INITIAL = 1
    UPDATE = 2
    HEARTBEAT = 3
    REMOVAL = 4


@dataclass(frozen=True, slots=True)
class Announcement:
    """A signed announcement whose envelope, signer and limits were checked."""

    peer: PeerId
    sequence: int
    issued_at_ms: int
    ttl_s: float
    kind: int
    network_id: bytes
    is_member: bool
    """True when its tag was made with a key of one of our networks."""
    addrs: tuple[Multiaddr, ...]
    models: tuple[ModelOffer, ...]
    load: Load
    software: str
    full_digest: bytes
    """Heartbeat: digest of the full announcement that still holds. Otherwise empty."""
    raw: bytes = field(repr=False)
    """The envelope as it was signed: what a catalogue hands on."""
    digest: bytes = field(repr=False)
    """SHA-256 of ``raw``."""

    @property
    def is_full(self) -> bool:
        """True when it states models and addresses itself (initial, update)."""
        return self.kind in (Kind.INITIAL, Kind.UPDATE)

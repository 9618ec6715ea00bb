"""How many requests may be asked of a second executor, and when. Pure: no clock.

Source: Dean and Barroso, The Tail at Scale (2013): a second copy sent after the 95th percentile costs a few per cent
and cuts the tail; gRPC's retry throttling (A6) for the bucket.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from .health import HealthBook

EXTRA_SHARE: Final = 0.02
"""Extra requests, as a share of all."""
MAX_SAVED: Final = 10.0
"""Hedges that a quiet time saves up: a stall of one executor is met by so many at once."""
MIN_AFTER_S: Final = 0.02
"""A second executor is never asked sooner: below, the network's own jitter would spend the budget."""


class Hedge(Enum):
    """Whether one request may be asked of several executors, each of which sees its prompt and may want to be paid."""

    OFF = "off"
    FREE = "free"
    """Of executors that charge nothing for it."""
    ON = "on"
    """Of priced ones too. Only the answer that was used is owed."""


class HedgeBudget:
    """Each request earns a fiftieth of a hedge, each hedge spends a whole one."""

    def __init__(self) -> None:
        self._saved = 1.0
        self.requests = 0
        self.hedges = 0

    def note_request(self) -> None:
        """A request that might be hedged begins."""
        self.requests += 1
        self._saved = min(MAX_SAVED, self._saved + EXTRA_SHARE)

    def take(self) -> bool:
        """Whether one more may be hedged now; if so it is counted."""
        if self._saved < 1.0:
            return False
        self._saved -= 1.0
        self.hedges += 1
        return True


def hedge_after_s(health: HealthBook, model: str, size: int = 0) -> float | None:
    """How long to wait for the first byte before a second executor is asked; None while too little is known.

    ``size``: bytes of the request's body; one that is longer than usual takes longer.
    """
    p95_s = health.p95_ttft_s(model)
    return None if p95_s is None else max(MIN_AFTER_S, p95_s * health.scale(model, size))

"""How fast an executor's backend answers, as it is announced. Pure."""

from __future__ import annotations

from typing import Final

_SMOOTHING: Final = 0.1


class LoadMeter:
    """Smoothed over the answers that were streamed by the backend; 0.0 = none yet.

    Source: PROTOCOL.md, Announcement, ``load``.
    """

    def __init__(self) -> None:
        self.ttft_s = 0.0
        """From the slot to the first byte of the answer: waiting for a slot is not in it, ``queued`` tells that."""
        self.tokens_per_s = 0.0
        """Of one stream, after its first token."""
        self.tokens_total = 0
        """Of all streamed answers."""

    def first_token(self, seconds: float) -> None:
        """A streamed answer began ``seconds`` after it got its slot."""
        self.ttft_s = _smoothed(self.ttft_s, max(seconds, 1e-6))

    def streamed(self, tokens: int, seconds: float) -> None:
        """It gave ``tokens`` in all, the last of them ``seconds`` after the first."""
        self.tokens_total += tokens
        if tokens > 1 and seconds > 0:
            self.tokens_per_s = _smoothed(self.tokens_per_s, (tokens - 1) / seconds)


def _smoothed(before: float, now: float) -> float:
    return before + _SMOOTHING * (now - before) if before else now

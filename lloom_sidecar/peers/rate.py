"""Token buckets: how often one author may speak. Pure, time is an argument."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT", bound=Hashable)


class TokenBucket:
    """Allows ``burst`` at once and ``rate_per_s`` in the long run.

    Starts full. Source: the token bucket of RFC 2697, section 3, with one rate.
    """

    __slots__ = ("_at", "_burst", "_rate_per_s", "_tokens")

    def __init__(self, *, rate_per_s: float, burst: float, now: float) -> None:
        """Args: ``rate_per_s`` over 0, ``burst`` at least 1, ``now`` in monotonic seconds. Raises ValueError."""
        if rate_per_s <= 0 or burst < 1:
            raise ValueError("a token bucket needs a rate over 0 and a burst of at least 1")
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._tokens = burst
        self._at = now

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate_per_s)
            self._at = now

    def take(self, now: float, tokens: float = 1.0) -> bool:
        """Take ``tokens`` if they are there. False leaves the bucket as it was."""
        self._refill(now)
        if self._tokens < tokens:
            return False
        self._tokens -= tokens
        return True

    def wait_s(self, now: float, tokens: float = 1.0) -> float:
        """Seconds until ``take`` would succeed, 0 = now. Infinite for more than the burst."""
        self._refill(now)
        if tokens > self._burst:
            return float("inf")
        return max(0.0, (tokens - self._tokens) / self._rate_per_s)


class RateLimiter(Generic[KeyT]):
    """One token bucket per key, for at most ``max_keys`` keys; the one that spoke longest ago makes room.

    A forgotten key starts with a full bucket again, so ``max_keys`` must be well above the number of honest keys.
    """

    def __init__(self, *, rate_per_s: float, burst: float, max_keys: int) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._max_keys = max_keys
        self._buckets: OrderedDict[KeyT, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, key: KeyT, now: float) -> bool:
        """Take one token of ``key``. False = too fast."""
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self._max_keys:
                self._buckets.popitem(last=False)
            bucket = self._buckets[key] = TokenBucket(rate_per_s=self._rate_per_s, burst=self._burst, now=now)
        self._buckets.move_to_end(key)
        return bucket.take(now)

    def wait_s(self, key: KeyT, now: float) -> float:
        """Seconds until ``take`` of ``key`` would succeed, 0 = now."""
        bucket = self._buckets.get(key)
        return 0.0 if bucket is None else bucket.wait_s(now)

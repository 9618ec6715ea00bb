"""Token buckets."""

from __future__ import annotations

import pytest

from lloom_sidecar.peers.rate import RateLimiter, TokenBucket


def test_a_bucket_allows_its_burst_and_then_its_rate() -> None:
    bucket = TokenBucket(rate_per_s=2, burst=3, now=10.0)
    assert [bucket.take(10.0) for _ in range(4)] == [True, True, True, False]
    assert bucket.wait_s(10.0) == pytest.approx(0.5)
    assert not bucket.take(10.4)
    assert bucket.take(10.5)
    assert bucket.wait_s(100.0) == 0.0
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]


def test_a_clock_that_stands_or_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(rate_per_s=1, burst=1, now=10.0)
    assert bucket.take(10.0)
    assert not bucket.take(5.0)
    assert bucket.take(11.0)


def test_more_than_the_burst_is_never_there() -> None:
    bucket = TokenBucket(rate_per_s=1, burst=2, now=0.0)
    assert bucket.wait_s(1e9, tokens=3) == float("inf")
    assert not bucket.take(1e9, tokens=3)
    assert bucket.take(1e9, tokens=2)


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0.5)])
def test_a_bucket_that_never_allows_is_refused(rate: float, burst: float) -> None:
    with pytest.raises(ValueError):
        TokenBucket(rate_per_s=rate, burst=burst, now=0.0)


def test_the_limiter_keeps_a_bucket_a_key_and_so_many_keys() -> None:
    limiter: RateLimiter[str] = RateLimiter(rate_per_s=1, burst=1, max_keys=2)
    assert limiter.take("a", 0.0)
    assert limiter.take("b", 0.0)
    assert not limiter.take("a", 0.0)
    assert limiter.take("c", 0.0)  # b spoke longest ago
    assert len(limiter) == 2
    assert not limiter.take("a", 0.0)
    assert limiter.take("b", 0.0)


def test_the_limiter_tells_when_a_key_may_speak_again() -> None:
    limiter: RateLimiter[str] = RateLimiter(rate_per_s=2.0, burst=1.0, max_keys=2)
    assert limiter.wait_s("a", 0.0) == 0.0
    assert limiter.take("a", 0.0)
    assert limiter.wait_s("a", 0.0) == 0.5
    assert limiter.wait_s("a", 1.0) == 0.0

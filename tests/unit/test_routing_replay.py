"""Eleven executors, three of them bad, one that restarts: what each way to choose makes of the same requests."""

from __future__ import annotations

import pytest

from tests.replay import GOOD, REFUSES, SLOW, WAYS, WEDGES, Replay


@pytest.mark.parametrize("seed", [1, 2])
def test_adaptive_keeps_999_of_1000_within_a_second_beside_bad_executors(seed: int) -> None:
    result = Replay(WAYS["adaptive"], seed=seed).run()
    assert len(result.first_s) == 5_000
    assert result.within >= 0.999
    bad = sum(result.attempts[number] for number in (SLOW, REFUSES, WEDGES))
    assert bad / result.attempts.total() < 0.02
    good = [result.attempts[number] for number in GOOD]
    assert min(good) > 0.5 * max(good)
    # Being back costs one probe, not the fading of a penalty.
    assert result.back_after_s < 5.0


def test_what_the_health_book_is_worth() -> None:
    plain = Replay(WAYS["plain round-robin"], seed=1, requests=2_000).run()
    with_health = Replay(WAYS["round-robin"], seed=1, requests=2_000).run()
    assert plain.within < 0.95
    assert with_health.within > 0.99


def test_who_refuses_fast_attracts_traffic_only_where_refusals_count_for_nothing() -> None:
    plain = Replay(WAYS["plain least-loaded"], seed=1, requests=2_000).run()
    adaptive = Replay(WAYS["adaptive"], seed=1, requests=2_000).run()
    assert plain.attempts[REFUSES] > 0.2 * plain.attempts.total()
    assert adaptive.attempts[REFUSES] < 0.01 * adaptive.attempts.total()


def test_the_replay_is_deterministic() -> None:
    assert Replay(WAYS["adaptive"], seed=5, requests=500).run() == Replay(WAYS["adaptive"], seed=5, requests=500).run()

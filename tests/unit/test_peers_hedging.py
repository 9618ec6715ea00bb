"""The budget of hedges, and the time after which one is sent."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.health import MIN_FOR_P95, HealthBook, Outcome
from lloom_sidecar.peers.hedging import EXTRA_SHARE, MAX_SAVED, MIN_AFTER_S, HedgeBudget, hedge_after_s

A = PeerId.from_ed25519(bytes(32))


@given(st.lists(st.booleans(), max_size=3000))
def test_never_more_than_two_per_cent_and_what_was_saved(wishes: list[bool]) -> None:
    budget = HedgeBudget()
    for is_wished in wishes:
        budget.note_request()
        if is_wished:
            budget.take()
    assert budget.hedges <= 1 + EXTRA_SHARE * budget.requests + 1e-6
    assert budget.requests == len(wishes)


def test_a_quiet_time_saves_up_to_ten() -> None:
    budget = HedgeBudget()
    for _ in range(100_000):
        budget.note_request()
    assert sum(budget.take() for _ in range(100)) == MAX_SAVED


def test_a_second_executor_is_asked_after_the_p95() -> None:
    health = HealthBook()
    for ttft_s, expected in ((0.4, 0.4), (0.001, MIN_AFTER_S)):
        for number in range(300):
            if ttft_s == 0.4:
                assert hedge_after_s(health, "m") == (None if number < MIN_FOR_P95 else 0.4)
            ticket = health.begin(A, "m", 0.0)
            health.end(ticket, Outcome.OK, ttft_s)
        assert hedge_after_s(health, "m") == expected

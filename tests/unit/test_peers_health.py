"""Latency, circuit and pauses of one executor, told as a dialogue."""

from __future__ import annotations

import math

import pytest

from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.health import (
    BACKOFF_S,
    FAILURES_TO_OPEN,
    MAX_BACKOFF_S,
    MAX_PENALTY_S,
    PENALTY_S,
    Circuit,
    HealthBook,
    HealthLimits,
    Outcome,
    Ticket,
    Verdict,
)

A, B, C = (PeerId.from_ed25519(bytes([number]) * 32) for number in (1, 2, 3))


class Dialogue:
    def __init__(self, limits: HealthLimits | None = None) -> None:
        self.health = HealthBook(limits)
        self.now = 1000.0

    def begin(self, peer: PeerId = A) -> Ticket:
        return self.health.begin(peer, "m", self.now)

    def attempt(
        self, outcome: Outcome, *, takes_s: float = 0.0, peer: PeerId = A, retry_after_s: float | None = None
    ) -> None:
        ticket = self.begin(peer)
        self.now += takes_s
        self.health.end(ticket, outcome, self.now, retry_after_s=retry_after_s)

    def fail(self, times: int) -> None:
        for _ in range(times):
            self.attempt(Outcome.FAILED)

    @property
    def circuit(self) -> Circuit:
        return self.health.circuit(A, "m", self.now)

    @property
    def verdict(self) -> Verdict | None:
        return self.health.judge(A, "m", self.now).verdict

    @property
    def is_due(self) -> bool:
        return self.health.judge(A, "m", self.now).is_due

    @property
    def estimate_s(self) -> float:
        return self.health.judge(A, "m", self.now).estimate_s


# ---------------------------------------------------------------- latency
def test_unknown_executors_are_believed_their_prior() -> None:
    health = HealthBook()
    judged = health.judge(A, "m", 0.0, prior_s=0.3)
    assert (judged.verdict, judged.estimate_s, judged.in_flight, judged.turn, judged.wait_s) == (None, 0.3, 0, 0, 0.0)
    assert health.circuit(A, "m", 0.0) is Circuit.CLOSED
    assert [HealthBook.prior(announced) for announced in (0.0, 0.001, 0.4, 99.0)] == [1.0, 0.05, 0.4, 5.0]


def test_the_first_sample_replaces_the_guess() -> None:
    d = Dialogue()
    d.begin()
    assert d.estimate_s == 1.0
    d.attempt(Outcome.OK, takes_s=0.2)
    assert d.estimate_s == pytest.approx(0.2)


def test_a_peak_counts_at_once_and_fades_with_finagles_time_constant() -> None:
    d = Dialogue()
    for _ in range(20):
        d.attempt(Outcome.OK, takes_s=0.1)
    d.attempt(Outcome.OK, takes_s=2.0)
    assert d.estimate_s == pytest.approx(2.0)
    usual = 0.1 + 0.2 * 1.9
    d.now += 10
    assert d.estimate_s == pytest.approx(usual + (2.0 - usual) / math.e, rel=0.05)
    d.attempt(Outcome.OK, takes_s=0.1)
    assert 0.1 < d.estimate_s < 2.0


def test_a_cold_start_is_no_habit() -> None:
    d = Dialogue()
    d.attempt(Outcome.OK, takes_s=20.0)
    assert d.estimate_s == pytest.approx(20.0)
    d.now += 60
    assert d.estimate_s < 5.0
    for _ in range(5):
        d.attempt(Outcome.OK, takes_s=0.2)
        d.now += 10
    assert d.estimate_s < 0.6


def test_an_idle_executor_returns_to_its_prior() -> None:
    d = Dialogue()
    for _ in range(30):
        d.attempt(Outcome.OK, takes_s=8.0)
    assert d.estimate_s > 7
    d.now += 3600
    assert d.estimate_s == pytest.approx(1.0, abs=0.05)


def test_failures_and_refusals_count_as_slow_and_slower_each_time() -> None:
    for outcome in (Outcome.FAILED, Outcome.TIMEOUT, Outcome.LOST, Outcome.REFUSED):
        d = Dialogue()
        d.attempt(Outcome.OK, takes_s=0.1)
        d.attempt(outcome)
        assert d.estimate_s == PENALTY_S
        d.attempt(outcome)
        assert d.estimate_s == 2 * PENALTY_S
        for _ in range(9):
            d.attempt(outcome)
        assert d.estimate_s == MAX_PENALTY_S


def test_one_that_never_answered_fades_to_its_prior() -> None:
    d = Dialogue()
    d.attempt(Outcome.FAILED)
    d.now += 100
    assert d.estimate_s == pytest.approx(1.0, abs=0.01)
    d.attempt(Outcome.OK, takes_s=0.1)
    assert d.estimate_s < 1.0


def test_a_cancelled_attempt_says_nothing() -> None:
    d = Dialogue()
    d.attempt(Outcome.OK, takes_s=0.1)
    before = d.estimate_s
    d.attempt(Outcome.CANCELLED)
    assert (d.estimate_s, d.verdict) == (before, None)


def test_a_word_on_the_request_proves_that_it_works_and_not_how_fast() -> None:
    d = Dialogue()
    d.attempt(Outcome.OK, takes_s=0.1)
    before = d.estimate_s
    d.attempt(Outcome.ANSWERED, takes_s=0.001)
    assert d.estimate_s == pytest.approx(before)
    assert d.verdict is None
    for _ in range(FAILURES_TO_OPEN):
        d.attempt(Outcome.FAILED)
        d.attempt(Outcome.ANSWERED)
    assert d.health.circuit(A, "m", d.now) is Circuit.CLOSED
    for _ in range(FAILURES_TO_OPEN):
        d.attempt(Outcome.FAILED)
    assert d.health.circuit(A, "m", d.now) is Circuit.OPEN
    late = d.begin()
    assert late.is_probe, "passed before its time: nobody else is left"
    d.health.end(late, Outcome.ANSWERED, d.now)
    assert d.health.circuit(A, "m", d.now) is Circuit.CLOSED


def test_in_flight_counts_tickets_and_each_ends_once() -> None:
    d = Dialogue()
    first, second = d.begin(), d.begin()
    assert d.health.judge(A, "m", d.now).in_flight == 2
    d.health.end(first, Outcome.OK, d.now)
    d.health.end(first, Outcome.FAILED, d.now)
    d.health.first_byte(first, d.now)
    assert d.health.judge(A, "m", d.now).in_flight == 1
    d.health.end(second, Outcome.OK, d.now)
    assert d.health.judge(A, "m", d.now).in_flight == 0
    assert d.health.judge(A, "m", d.now).turn == 2


# ---------------------------------------------------------------- strikes and probes
def test_one_failure_is_forgiven_by_the_first_byte_of_a_probe() -> None:
    d = Dialogue()
    d.attempt(Outcome.OK, takes_s=0.005)
    d.attempt(Outcome.FAILED)
    assert (d.estimate_s, d.is_due, d.verdict) == (PENALTY_S, False, None)
    d.now += BACKOFF_S
    assert d.is_due
    probe = d.begin()
    assert (probe.is_probe, d.is_due, d.begin().is_probe) == (True, False, False)
    d.now += 0.005
    d.health.first_byte(probe, d.now)
    assert d.estimate_s == pytest.approx(0.005)
    assert not d.is_due
    d.health.end(probe, Outcome.LOST, d.now)  # not so good after all
    assert d.estimate_s == PENALTY_S
    d.now += BACKOFF_S
    assert not d.is_due
    d.now += BACKOFF_S
    assert d.is_due


def test_the_pause_doubles_until_an_attempt_ends_well() -> None:
    d = Dialogue()
    for _ in range(2):
        waits = []
        for _ in range(3):
            d.attempt(Outcome.TIMEOUT)
            struck_at = d.now
            while not d.is_due:
                d.now += 0.25
            waits.append(d.now - struck_at)
        assert waits == [1, 2, 4]
        d.attempt(Outcome.OK)


def test_those_that_are_lost_together_are_one_strike() -> None:
    d = Dialogue()
    tickets = [d.begin() for _ in range(4)]
    d.now += 1
    for ticket in tickets:
        d.health.end(ticket, Outcome.LOST, d.now)
        d.now += 0.001
    d.now += BACKOFF_S
    assert d.is_due


def test_a_good_attempt_that_began_before_the_strike_forgives_nothing() -> None:
    d = Dialogue()
    early = d.begin()
    d.now += 1
    d.attempt(Outcome.FAILED)
    d.health.first_byte(early, d.now)
    assert d.estimate_s >= PENALTY_S
    late = d.begin()
    d.health.first_byte(late, d.now)
    assert d.estimate_s == 0.0


def test_a_refused_one_is_due_when_its_pause_is_over() -> None:
    d = Dialogue()
    d.attempt(Outcome.REFUSED, retry_after_s=3)
    d.now += 2.9
    assert (d.is_due, d.verdict) == (False, Verdict.NOT_BEFORE)
    d.now += 0.1
    assert (d.is_due, d.verdict) == (True, None)


def test_a_probe_that_began_before_the_circuit_opened_decides_nothing() -> None:
    d = Dialogue()
    d.fail(1)
    d.now += BACKOFF_S
    probe = d.begin()
    d.fail(FAILURES_TO_OPEN)
    assert (probe.is_probe, d.circuit) == (False, Circuit.OPEN)
    d.health.first_byte(probe, d.now)
    assert d.circuit is Circuit.OPEN


def test_one_that_was_outrun_counts_as_at_least_so_slow() -> None:
    d = Dialogue()
    d.attempt(Outcome.OK, takes_s=0.2)
    d.attempt(Outcome.OUTRUN, takes_s=0.1)  # might have been as quick as ever
    assert d.estimate_s == pytest.approx(0.2, abs=0.001)
    d.attempt(Outcome.OUTRUN, takes_s=0.9)
    assert d.estimate_s == pytest.approx(0.9)
    assert (d.is_due, d.verdict) == (False, None)
    begun = d.begin()
    d.health.first_byte(begun, d.now)
    d.now += 50
    before = d.estimate_s
    d.health.end(begun, Outcome.OUTRUN, d.now)
    assert d.estimate_s == before


# ---------------------------------------------------------------- circuit
def test_five_failures_in_a_row_open_and_one_probe_closes() -> None:
    d = Dialogue()
    d.fail(FAILURES_TO_OPEN - 1)
    assert d.circuit is Circuit.CLOSED
    d.fail(1)
    assert (d.circuit, d.verdict) == (Circuit.OPEN, Verdict.CIRCUIT_OPEN)
    assert d.health.judge(A, "m", d.now).wait_s == BACKOFF_S
    d.now += BACKOFF_S
    assert (d.circuit, d.verdict) == (Circuit.HALF_OPEN, None)
    probe = d.begin()
    assert probe.is_probe
    assert d.verdict is Verdict.PROBING
    assert d.health.judge(A, "m", d.now).wait_s == BACKOFF_S
    assert not d.begin().is_probe
    d.health.end(probe, Outcome.OK, d.now)
    assert d.circuit is Circuit.CLOSED
    d.fail(FAILURES_TO_OPEN - 1)
    assert d.circuit is Circuit.CLOSED


def test_failed_probes_open_for_longer_each_time() -> None:
    d = Dialogue()
    d.fail(FAILURES_TO_OPEN)
    waits = []
    for _ in range(8):
        waits.append(d.health.judge(A, "m", d.now).wait_s)
        d.now += waits[-1]
        d.fail(1)
    assert waits == [1, 2, 4, 8, 16, MAX_BACKOFF_S, MAX_BACKOFF_S, MAX_BACKOFF_S]


def test_a_probe_whose_stream_is_lost_after_its_first_byte_opens_again() -> None:
    d = Dialogue()
    d.fail(FAILURES_TO_OPEN)
    d.now += BACKOFF_S
    probe = d.begin()
    d.health.first_byte(probe, d.now)
    d.health.first_byte(probe, d.now)
    assert d.circuit is Circuit.CLOSED
    d.health.end(probe, Outcome.LOST, d.now)
    assert d.verdict is Verdict.CIRCUIT_OPEN
    assert d.health.judge(A, "m", d.now).wait_s == 2 * BACKOFF_S


def test_a_cancelled_probe_lets_another_one_go() -> None:
    d = Dialogue()
    d.fail(FAILURES_TO_OPEN)
    d.now += BACKOFF_S
    d.attempt(Outcome.CANCELLED)
    assert d.circuit is Circuit.HALF_OPEN
    assert d.begin().is_probe


def test_a_refused_probe_closes_but_the_pause_holds() -> None:
    d = Dialogue()
    d.fail(FAILURES_TO_OPEN)
    d.now += BACKOFF_S
    d.attempt(Outcome.REFUSED, retry_after_s=7)
    assert (d.circuit, d.verdict) == (Circuit.CLOSED, Verdict.NOT_BEFORE)


def test_half_of_the_last_attempts_failing_opens() -> None:
    d = Dialogue()
    for _ in range(5):
        d.attempt(Outcome.OK)
        d.attempt(Outcome.LOST)
    assert d.circuit is Circuit.OPEN


def test_attempts_from_before_the_circuit_opened_decide_nothing() -> None:
    d = Dialogue()
    good, bad = d.begin(), d.begin()
    d.fail(FAILURES_TO_OPEN)
    d.health.end(bad, Outcome.LOST, d.now)
    d.health.end(good, Outcome.OK, d.now)
    assert d.circuit is Circuit.OPEN
    assert d.health.judge(A, "m", d.now).wait_s == BACKOFF_S


# ---------------------------------------------------------------- pauses
def test_retry_after_is_honoured_up_to_five_minutes() -> None:
    d = Dialogue()
    d.attempt(Outcome.REFUSED, retry_after_s=20)
    assert d.verdict is Verdict.NOT_BEFORE
    assert d.health.judge(A, "m", d.now).wait_s == 20
    d.attempt(Outcome.FAILED, retry_after_s=-3)
    assert d.health.judge(A, "m", d.now).wait_s == 20
    d.now += 20
    assert d.verdict is None
    d.attempt(Outcome.REFUSED, retry_after_s=1e9)
    assert d.health.judge(A, "m", d.now).wait_s == 300


def test_refusals_without_a_time_pause_longer_each_time() -> None:
    d = Dialogue()
    waits = []
    for _ in range(9):
        d.attempt(Outcome.REFUSED)
        waits.append(d.health.judge(A, "m", d.now).wait_s)
        d.now += waits[-1]
    assert waits == [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30]
    d.attempt(Outcome.OK)
    d.attempt(Outcome.REFUSED)
    assert d.health.judge(A, "m", d.now).wait_s == 0.25


# ---------------------------------------------------------------- budget
def test_the_budget_follows_the_p95_within_its_range() -> None:
    d = Dialogue(HealthLimits(budget_floor_s=0.5, budget_ceiling_s=20, budget_initial_s=4))
    assert d.health.first_byte_budget_s("m") == 4
    assert d.health.first_byte_budget_s("m", attempt=2) == 8
    for _ in range(19):
        d.attempt(Outcome.OK, takes_s=1.0)
    assert d.health.p95_ttft_s("m") is None
    d.attempt(Outcome.OK, takes_s=1.0)
    assert d.health.p95_ttft_s("m") == pytest.approx(1.0)
    assert d.health.first_byte_budget_s("m") == pytest.approx(3.0)
    assert d.health.first_byte_budget_s("m", attempt=9) == 20
    for _ in range(300):
        d.attempt(Outcome.OK, takes_s=0.01)
    assert d.health.first_byte_budget_s("m") == 0.5
    assert d.health.p95_ttft_s("unknown") is None


def test_a_long_prompt_has_a_longer_budget() -> None:
    d = Dialogue()
    for number in range(30):
        assert (d.health.scale("m", 10**6) == 1.0) is (number < 20)
        ticket = d.health.begin(A, "m", d.now, size=1000)
        d.now += 1.0
        d.health.end(ticket, Outcome.OK, d.now)
    assert d.health.scale("m", 500) == d.health.scale("m", 1000) == 1.0
    assert d.health.scale("m", 4000) == 4.0
    assert d.health.first_byte_budget_s("m", size=4000) == pytest.approx(12.0)
    assert d.health.first_byte_budget_s("m", size=10**9) == 60.0
    # What it takes then is usual for one of that size, and changes nothing for the others.
    for _ in range(30):
        ticket = d.health.begin(A, "m", d.now, size=10_000)
        assert ticket.scale == 10.0
        d.now += 10.0
        d.health.end(ticket, Outcome.OK, d.now)
        d.health._windows["m"][1].add(1000)
        d.health._windows["m"][1].add(1000)
    assert d.health.p95_ttft_s("m") == pytest.approx(1.0)
    assert d.health.scale("n", 99) == 1.0


def test_timeouts_let_the_budget_grow() -> None:
    d = Dialogue()
    for _ in range(20):
        d.attempt(Outcome.OK, takes_s=0.2)
    before = d.health.first_byte_budget_s("m")
    for _ in range(10):
        d.attempt(Outcome.TIMEOUT, takes_s=before)
    assert d.health.first_byte_budget_s("m") > 2 * before


# ---------------------------------------------------------------- bounds
def test_idle_records_make_room_busy_ones_stay() -> None:
    d = Dialogue(HealthLimits(max_records=2, max_models=1))
    busy = d.begin(A)
    d.attempt(Outcome.OK, peer=B)
    d.attempt(Outcome.OK, peer=C)
    assert len(d.health) == 3
    d.health.end(busy, Outcome.OK, d.now)
    assert [view.peer for view in d.health.snapshot(d.now)] == [C, A]
    ticket = d.health.begin(B, "n", d.now)
    d.health.end(ticket, Outcome.OK, d.now)
    assert len(d.health) == 2
    assert d.health.p95_ttft_s("m") is None
    view = d.health.snapshot(d.now)[-1]
    assert (view.peer, view.model, view.circuit, view.in_flight, view.failures_in_a_row) == (
        B,
        "n",
        Circuit.CLOSED,
        0,
        0,
    )


def test_the_window_of_a_model_is_bounded() -> None:
    d = Dialogue()
    for _ in range(600):
        d.attempt(Outcome.OK, takes_s=0.5)
    for window in d.health._windows["m"]:
        assert len(window.recent) == len(window.ordered) == 256

"""How well each executor has served this node, by model: latency, load, circuit, and when it asked to be left alone.

Pure state: ``now`` is monotonic seconds. Every attempt is one ticket: ``begin``, ``first_byte`` when it came, ``end``.

    closed --(5 failures in a row, or half of the last 20)--> open --(backoff over)--> half-open, one probe
    half-open --(first byte)--> closed, one failure from open | --(failure)--> open for twice as long

A single failure or refusal is a strike: it counts as slow, so that others are preferred, and when its pause is over the
next request is its probe, however slow it counts. The first byte of a probe forgives: what came back is used again at
once, what did not costs one request a pause, and the pause doubles.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Final, NamedTuple

from lloom_sidecar.ids import PeerId

from .trust import TrustBook

PEAK_DECAY_S: Final = 10.0
"""Time constant with which a peak fades. Source: the default decayTime of Finagle's PeakEwma (Balancers.p2cPeakEwma),
which linkerd2-proxy and Envoy's peak_ewma took over."""
MEMORY_S: Final = 600.0
"""Time constant with which an executor that is not used returns to its prior: one that was slow while it loaded its
model must be tried again, and one request a minute must still tell the fast from the slow. Source: our choice."""
WEIGHT_UP: Final = 0.2
WEIGHT_DOWN: Final = 0.5
"""Weights of a sample above and below the usual time, towards which the peak fades. A cold start is a spike, which the
peak is for; it must not pass for what the executor usually takes. Source: our choice."""
DEFAULT_TTFT_S: Final = 1.0
"""Believed of an executor that was never used and announced nothing. Source: the default RTT of tower's PeakEwma."""
MIN_PRIOR_S: Final = 0.05
MAX_PRIOR_S: Final = 5.0
"""An announced figure is believed between these: whoever claims to be faster gains nothing by it."""
PENALTY_S: Final = 5.0
"""A failure or refusal counts as at least so slow, and as twice as slow as the one before, until a probe forgives."""
MAX_PENALTY_S: Final = 60.0
REFUSAL_PAUSE_S: Final = 0.25
"""Pause after a refusal that names no time; doubles with each in a row."""
MAX_PAUSE_S: Final = 30.0
MAX_RETRY_AFTER_S: Final = 300.0
"""Longest pause that an executor may ask for."""
FAILURES_TO_OPEN: Final = 5
"""Source: the default consecutive_5xx of Envoy's outlier detection."""
RATE_WINDOW: Final = 20
MIN_FOR_RATE: Final = 10
RATE_TO_OPEN: Final = 0.5
BACKOFF_S: Final = 1.0
MAX_BACKOFF_S: Final = 30.0
TTFT_WINDOW: Final = 256
"""Samples of one model that its p95 is taken from."""
MIN_FOR_P95: Final = 20
"""Fewer samples have no 95th percentile."""
BUDGET_FACTOR: Final = 3.0
"""A first byte is awaited for so many times the model's p95."""


class Outcome(Enum):
    """How an attempt ended."""

    OK = "ok"
    REFUSED = "refused"
    """It answered that it has no capacity: counts as slow, not as broken."""
    FAILED = "failed"
    """An error that is the executor's fault, before or after the first byte."""
    TIMEOUT = "timeout"
    """No first byte within the budget."""
    LOST = "lost"
    """The stream ended before END."""
    OUTRUN = "outrun"
    """Another executor that was asked the same answered first: without a first byte it counts as at least so slow."""
    ANSWERED = "answered"
    """It found the request at fault: it works, but a quick word is no quick answer."""
    CANCELLED = "cancelled"
    """This node gave up for its own reasons (the app left): says nothing."""


class Circuit(Enum):
    """Whether an executor is used for a model."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Verdict(Enum):
    """Why an executor is not to be used now."""

    NOT_BEFORE = "not_before"
    """It said when to return, and it is not yet time."""
    CIRCUIT_OPEN = "circuit_open"
    PROBING = "probing"
    """Half-open, and the one probe is under way."""


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """Bounds and the budget's range."""

    max_records: int = 20_000
    """Idle pairs of executor and model; the ones used longest ago go first. Busy ones are bounded by their streams."""
    max_models: int = 1_000
    budget_floor_s: float = 0.5
    budget_ceiling_s: float = 60.0
    budget_initial_s: float = 10.0
    """Until a model has 20 samples."""


class Judgement(NamedTuple):
    """What selection needs of one executor, in one look."""

    verdict: Verdict | None
    """None = may be used."""
    estimate_s: float
    """Expected time to the first token: peak EWMA."""
    in_flight: int
    """Attempts of this node under way."""
    turn: int
    """When it was last used, counted in attempts of this node; 0 = never."""
    wait_s: float
    """With a verdict: seconds until it may be used; for a probe under way, a guess."""
    is_due: bool = False
    """It failed, its pause is over, and nobody has tried since: the next attempt is its probe."""


@dataclass(frozen=True, slots=True)
class HealthView:
    """What an operator may see of one pair."""

    peer: PeerId
    model: str
    circuit: Circuit
    estimate_s: float
    in_flight: int
    failures_in_a_row: int
    wait_s: float


class _Record:
    __slots__ = (
        "at",
        "failures",
        "in_flight",
        "is_open",
        "mean_s",
        "not_before",
        "open_until",
        "opened",
        "peak_s",
        "prior_s",
        "probe",
        "probe_at",
        "refusals",
        "results",
        "strikes",
        "struck_at",
        "turn",
    )

    def __init__(self, now: float) -> None:
        self.at = now
        self.peak_s: float | None = None
        self.mean_s: float | None = None
        self.prior_s = DEFAULT_TTFT_S
        self.in_flight = 0
        self.failures = 0
        self.refusals = 0
        self.results: deque[bool] = deque(maxlen=RATE_WINDOW)
        self.is_open = False
        self.opened = 0
        self.probe: Ticket | None = None
        """The attempt that decides whether it is used again."""
        self.probe_at: float | None = None
        """When such an attempt is due; None = it is in use as usual."""
        self.strikes = 0
        self.struck_at = float("-inf")
        self.open_until = 0.0
        self.not_before = float("-inf")
        self.turn = 0

    def estimate(self, now: float, prior_s: float) -> float:
        return self.faded(now, self.usual(now, prior_s))

    def usual(self, now: float, prior_s: float) -> float:
        """The mean, on its way back to the prior."""
        if self.mean_s is None:
            return prior_s
        return prior_s + (self.mean_s - prior_s) * math.exp(-max(0.0, now - self.at) / MEMORY_S)

    def faded(self, now: float, usual_s: float) -> float:
        """The peak, on its way back to the usual."""
        if self.peak_s is None:
            return usual_s
        return usual_s + (self.peak_s - usual_s) * math.exp(-max(0.0, now - self.at) / PEAK_DECAY_S)

    def observe(self, sample_s: float, now: float) -> None:
        """A measured time to first token: up at once, down with the decay."""
        usual_s = self.usual(now, self.prior_s)
        if sample_s >= usual_s:
            self.mean_s = usual_s + WEIGHT_UP * (sample_s - usual_s)
        elif self.mean_s is None:
            self.mean_s = sample_s  # the first sample replaces the guess
        else:
            self.mean_s = usual_s + WEIGHT_DOWN * (sample_s - usual_s)
        self.peak_s = sample_s if self.peak_s is None else max(sample_s, self.faded(now, self.mean_s))
        self.at = now

    def penalise(self, elapsed_s: float, now: float) -> None:
        estimate_s = self.estimate(now, self.prior_s)
        if self.mean_s is not None:
            self.mean_s = self.usual(now, self.prior_s)
        penalty_s = min(MAX_PENALTY_S, max(PENALTY_S, elapsed_s, 2 * estimate_s))
        self.peak_s = max(estimate_s, penalty_s)
        self.at = now

    def strike(self, pause_s: float, now: float) -> None:
        self.strikes += 1
        self.struck_at = now
        self.probe_at = now + pause_s

    def forgive(self, sample_s: float) -> None:
        self.peak_s = sample_s
        self.probe_at = None

    def is_due(self, now: float) -> bool:
        return self.probe is None and self.probe_at is not None and now >= self.probe_at

    def circuit(self, now: float) -> Circuit:
        if not self.is_open:
            return Circuit.CLOSED
        return Circuit.OPEN if now < self.open_until else Circuit.HALF_OPEN

    def verdict(self, now: float) -> Verdict | None:
        if now < self.not_before:
            return Verdict.NOT_BEFORE
        if self.is_open:
            if now < self.open_until:
                return Verdict.CIRCUIT_OPEN
            if self.probe is not None:
                return Verdict.PROBING
        return None

    def wait_s(self, now: float) -> float:
        wait = max(0.0, self.not_before - now)
        if self.is_open:
            wait = max(wait, self.open_until - now, BACKOFF_S if self.probe is not None else 0.0)
        return wait

    def open(self, now: float) -> None:
        self.open_until = self.probe_at = now + _backoff_s(BACKOFF_S, self.opened)
        self.opened += 1
        self.is_open = True
        self.probe = None  # one that began before tells nothing new
        self.results.clear()


def _backoff_s(first_s: float, times: int) -> float:
    """Doubled ``times`` times, at most 30 s."""
    return min(MAX_BACKOFF_S, first_s * 2.0 ** min(times, 16))


class _Window:
    """The last 256 figures of one model, kept sorted beside."""

    __slots__ = ("ordered", "recent")

    def __init__(self) -> None:
        self.recent: deque[float] = deque()
        self.ordered: list[float] = []

    def median(self) -> float | None:
        return None if len(self.ordered) < MIN_FOR_P95 else self.ordered[len(self.ordered) // 2]

    def add(self, sample_s: float) -> None:
        if len(self.recent) == TTFT_WINDOW:
            del self.ordered[bisect_left(self.ordered, self.recent.popleft())]
        self.recent.append(sample_s)
        insort(self.ordered, sample_s)

    def p95(self) -> float | None:
        if len(self.ordered) < MIN_FOR_P95:
            return None
        return self.ordered[math.ceil(0.95 * len(self.ordered)) - 1]


class Ticket:
    """One attempt at one executor, from ``HealthBook.begin`` to ``HealthBook.end``."""

    __slots__ = ("_record", "has_first_byte", "is_ended", "model", "peer", "scale", "size", "started_at")

    def __init__(
        self, peer: PeerId, model: str, record: _Record, *, started_at: float, size: int, scale: float
    ) -> None:
        self.peer = peer
        self.model = model
        self.started_at = started_at
        self.size = size
        self.scale = scale
        self.has_first_byte = False
        self.is_ended = False
        self._record = record

    @property
    def is_probe(self) -> bool:
        """This attempt decides whether an executor that failed is used again; it has not decided yet."""
        return self._record.probe is self


class HealthBook:
    """Latency, load and circuit of every (executor, model) that this node has used."""

    def __init__(self, limits: HealthLimits | None = None) -> None:
        self._limits = limits or HealthLimits()
        self.trust = TrustBook()
        """Doubts about them, which weigh in a choice."""
        self._records: OrderedDict[tuple[PeerId, str], _Record] = OrderedDict()
        self._windows: OrderedDict[str, tuple[_Window, _Window]] = OrderedDict()
        """By model: times to first token as if every body had the usual size, and sizes of bodies."""
        self._turns = 0
        self._busy = 0

    def __len__(self) -> int:
        return len(self._records)

    # ------------------------------------------------------------ attempts
    def begin(self, peer: PeerId, model: str, now: float, *, prior_s: float = DEFAULT_TTFT_S, size: int = 0) -> Ticket:
        """An attempt starts. It must be ended by ``end``, whatever happens.

        Args:
            prior_s: what to believe of an executor that was never used, see ``prior``.
            size: bytes of the request's body.
        """
        key = (peer, model)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record(now)
        if not record.in_flight:
            self._busy += 1
        record.prior_s = prior_s
        self._turns += 1
        record.turn = self._turns
        record.in_flight += 1
        ticket = Ticket(peer, model, record, started_at=now, size=size, scale=self.scale(model, size))
        if record.is_due(now) or (record.is_open and record.probe is None):
            # An open circuit is passed before its time only when there is nobody else.
            record.probe = ticket
        return ticket

    def _forget_idle(self) -> None:
        excess = len(self._records) - self._busy - self._limits.max_records
        if excess > 0:
            idle = (key for key, record in self._records.items() if not record.in_flight)
            for key in list(islice(idle, excess)):
                del self._records[key]

    def first_byte(self, ticket: Ticket, now: float) -> None:
        """Its first byte came. Counted once a ticket; forgives a strike, closes a half-open circuit on probation."""
        if ticket.has_first_byte or ticket.is_ended:
            return
        ticket.has_first_byte = True
        ttft_s = max(0.0, now - ticket.started_at)
        record = ticket._record
        record.observe(ttft_s, now)
        record.refusals = 0
        self._sample(ticket, ttft_s)
        is_probe = ticket.is_probe
        if is_probe or (not record.is_open and ticket.started_at >= record.struck_at):
            record.forgive(ttft_s)
        if is_probe:
            record.probe = None
        if is_probe and record.is_open:
            # A stream may last minutes: others need not wait for its end, but its loss opens the circuit again.
            record.is_open = False
            record.failures = FAILURES_TO_OPEN - 1

    def end(self, ticket: Ticket, outcome: Outcome, now: float, *, retry_after_s: float | None = None) -> None:
        """The attempt is over. A second call for the same ticket changes nothing.

        Args:
            retry_after_s: when the executor said to return; honoured up to 300 s, for any outcome.
        """
        if ticket.is_ended:
            return
        if outcome is Outcome.OK:
            self.first_byte(ticket, now)
        ticket.is_ended = True
        record = ticket._record
        record.in_flight -= 1
        if not record.in_flight:
            self._busy -= 1
            self._records.move_to_end((ticket.peer, ticket.model))
            self._forget_idle()
        is_probe = ticket.is_probe
        if is_probe:
            record.probe = None
        if retry_after_s is not None:
            record.not_before = max(record.not_before, now + min(MAX_RETRY_AFTER_S, max(0.0, retry_after_s)))
        if outcome is Outcome.CANCELLED:
            return
        elapsed_s = max(0.0, now - ticket.started_at)
        if outcome is Outcome.OUTRUN:
            if not ticket.has_first_byte and elapsed_s > record.estimate(now, record.prior_s):
                record.observe(elapsed_s, now)
                self._sample(ticket, elapsed_s)
            return
        if outcome is Outcome.ANSWERED and (is_probe or not record.is_open):
            record.probe_at = None
            record.is_open = False
        if outcome in (Outcome.OK, Outcome.ANSWERED):
            if not record.is_open:
                record.failures = 0
                record.opened = 0
                record.strikes = 0
                record.results.append(True)
            return
        record.penalise(0.0 if ticket.has_first_byte else elapsed_s, now)
        if outcome is Outcome.REFUSED:
            self._refused(record, now, retry_after_s)
            if is_probe:
                # It answers, so it is not broken; that it has no room is what not_before is for.
                record.is_open = False
                record.failures = 0
            return
        if outcome is Outcome.TIMEOUT:
            # Counts as at least so long: when everything gets slow the budget must grow.
            self._sample(ticket, elapsed_s)
        if record.is_open and not is_probe:
            return  # began before the circuit opened: tells nothing new
        if ticket.started_at >= record.struck_at:  # of those that were lost together only one strikes
            record.strike(_backoff_s(BACKOFF_S, record.strikes), now)
        record.failures += 1
        record.results.append(False)
        failed = record.results.count(False)
        is_rate_over = len(record.results) >= MIN_FOR_RATE and failed >= RATE_TO_OPEN * len(record.results)
        if (is_probe and record.is_open) or record.failures >= FAILURES_TO_OPEN or is_rate_over:
            record.open(now)

    @staticmethod
    def _refused(record: _Record, now: float, retry_after_s: float | None) -> None:
        record.refusals += 1
        if retry_after_s is None:
            pause_s = min(MAX_PAUSE_S, REFUSAL_PAUSE_S * 2.0 ** min(record.refusals - 1, 16))
            record.not_before = max(record.not_before, now + pause_s)
        if not record.is_open:
            record.struck_at = now
            record.probe_at = record.not_before

    def _sample(self, ticket: Ticket, ttft_s: float) -> None:
        windows = self._windows.get(ticket.model)
        if windows is None:
            if len(self._windows) >= self._limits.max_models:
                self._windows.popitem(last=False)
            windows = self._windows[ticket.model] = (_Window(), _Window())
        self._windows.move_to_end(ticket.model)
        windows[0].add(ttft_s / ticket.scale)
        windows[1].add(ticket.size)

    # ------------------------------------------------------------ questions
    @staticmethod
    def prior(announced_ttft_s: float) -> float:
        """What to believe of an executor that was never used: its own figure within bounds, or 1 s."""
        return min(MAX_PRIOR_S, max(MIN_PRIOR_S, announced_ttft_s)) if announced_ttft_s > 0 else DEFAULT_TTFT_S

    def judge(self, peer: PeerId, model: str, now: float, *, prior_s: float = DEFAULT_TTFT_S) -> Judgement:
        """May it be used, and how fast will it be?"""
        record = self._records.get((peer, model))
        if record is None:
            return Judgement(None, prior_s, 0, 0, 0.0)
        verdict = record.verdict(now)
        wait_s = 0.0 if verdict is None else record.wait_s(now)
        is_due = verdict is None and record.is_due(now)
        return Judgement(verdict, record.estimate(now, prior_s), record.in_flight, record.turn, wait_s, is_due)

    def circuit(self, peer: PeerId, model: str, now: float) -> Circuit:
        """State of its circuit; closed when it was never used."""
        record = self._records.get((peer, model))
        return Circuit.CLOSED if record is None else record.circuit(now)

    def p95_ttft_s(self, model: str) -> float | None:
        """95th percentile of the model's last 256 times to first token for a body of the usual size, timeouts included;
        None below 20.
        """
        windows = self._windows.get(model)
        return None if windows is None else windows[0].p95()

    def scale(self, model: str, size: int) -> float:
        """How many times the usual a body of ``size`` bytes has; 1 up to the usual, which is the median."""
        windows = self._windows.get(model)
        usual = None if windows is None else windows[1].median()
        return max(1.0, size / usual) if usual else 1.0

    def first_byte_budget_s(self, model: str, *, attempt: int = 1, size: int = 0) -> float:
        """How long to wait for a first byte before the next executor is tried: 3 x p95, doubled with each attempt.

        Between the floor and the ceiling of the limits; the initial budget while the p95 is unknown. More in proportion
        for a body of ``size`` bytes that is longer than usual: a long prompt takes every executor long to read, and
        must not be begun at one after the other.
        """
        p95_s = self.p95_ttft_s(model)
        base_s = self._limits.budget_initial_s if p95_s is None else BUDGET_FACTOR * p95_s
        base_s = max(self._limits.budget_floor_s, base_s) * self.scale(model, size)
        return min(self._limits.budget_ceiling_s, base_s * 2.0 ** min(16, max(0, attempt - 1)))

    def snapshot(self, now: float) -> list[HealthView]:
        """Every pair, the one used longest ago first."""
        return [
            HealthView(
                peer,
                model,
                record.circuit(now),
                record.estimate(now, record.prior_s),
                record.in_flight,
                record.failures,
                record.wait_s(now),
            )
            for (peer, model), record in self._records.items()
        ]

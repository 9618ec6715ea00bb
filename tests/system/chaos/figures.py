"""What a chaos run shows: counts and delays, as lines to print. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .record import Outcome, Record

VALIDATOR = frozenset({"validator"})
"""No request goes through it."""


def share(records: Iterable[Record]) -> tuple[int, int]:
    """How many are complete, of those whose application stayed."""
    stayed = [record for record in records if record.outcome is not Outcome.CANCELLED]
    return sum(record.outcome is Outcome.COMPLETE for record in stayed), len(stayed)


def quiet(records: Iterable[Record]) -> list[Record]:
    """Those that began while no executor was down."""
    return [record for record in records if not record.faults_at_begin - VALIDATOR]


def untouched(records: Iterable[Record]) -> list[Record]:
    """Those during which no executor was down, from beginning to end."""
    return [record for record in records if not record.faults - VALIDATOR]


def summary(records: Sequence[Record]) -> list[str]:
    """The figures of a run."""
    outcomes = Counter(record.outcome.value for record in records)
    errors = Counter(f"{record.status} {record.error}" for record in records if record.outcome is Outcome.ERROR)
    lines = [f"{len(records)} requests: " + ", ".join(f"{count} {name}" for name, count in outcomes.most_common())]
    for name, some in (
        ("all", records),
        ("begun while nothing was down", quiet(records)),
        ("nothing down from begin to end", untouched(records)),
    ):
        complete, count = share(some)
        lines.append(f"{name}: {complete} of {count} complete ({complete / max(1, count):.2%})")
    lines.append("errors: " + (", ".join(f"{count} x {code}" for code, count in errors.most_common()) or "none"))
    whole = [record for record in records if record.outcome is Outcome.COMPLETE]
    late = sorted(record.delay_s for record in whole)
    if late:
        median, p99 = late[len(late) // 2], late[len(late) * 99 // 100]
        again = sum(record.attempts > 1 for record in whole)
        pause = max(record.longest_gap_s for record in whole)
        lines.append(f"delay of the complete ones: median {median:.3f} s, p99 {p99:.3f} s, worst {late[-1]:.3f} s")
        lines.append(f"{again} of them took several attempts; longest pause inside a stream {pause:.3f} s")
    return lines

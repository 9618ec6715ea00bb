"""What a chaos run shows: counts and delays, as lines to print. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from .faults import Outage
from .record import Outcome, Record


def share(records: Iterable[Record]) -> tuple[int, int]:
    """How many are complete, of those whose application stayed."""
    stayed = [record for record in records if record.outcome is not Outcome.CANCELLED]
    return sum(record.outcome is Outcome.COMPLETE for record in stayed), len(stayed)


def quiet(records: Iterable[Record], outages: Iterable[Outage]) -> list[Record]:
    """Those that began while no executor was down."""
    times = _downtimes(outages)
    return [one for one in records if not any(begin <= one.began_at <= end for begin, end in times)]


def untouched(records: Iterable[Record], outages: Iterable[Outage]) -> list[Record]:
    """Those during which no executor was down, from beginning to end."""
    times = _downtimes(outages)
    return [
        one
        for one in records
        if one.ended_at is not None and not any(begin <= one.ended_at and one.began_at <= end for begin, end in times)
    ]


def _downtimes(outages: Iterable[Outage]) -> list[tuple[float, float]]:
    """When an executor was down: no request goes through the validator."""
    return [(one.began_at, one.ended_at) for one in outages if one.kill.executor is not None]


def deaths(outages: Sequence[Outage]) -> list[str]:
    """What died, and how long executors were away."""
    parts = Counter(one.kill.part for one in outages)
    lines = [f"{len(outages)} kills: " + ", ".join(f"{count} x {part}" for part, count in parts.most_common())]
    away = sorted(end - begin for begin, end in _downtimes(outages))
    if away:
        worst = max(outages, key=lambda one: (one.kill.executor is not None, one.ended_at - one.began_at))
        lines.append(
            f"an executor was away: median {away[len(away) // 2]:.2f} s, worst {away[-1]:.2f} s ({worst.kill.name})"
        )
    return lines


def summary(records: Sequence[Record], outages: Sequence[Outage]) -> list[str]:
    """The figures of a run."""
    outcomes = Counter(record.outcome.value for record in records)
    errors = Counter(f"{record.status} {record.error}" for record in records if record.outcome is Outcome.ERROR)
    lines = [f"{len(records)} requests: " + ", ".join(f"{count} {name}" for name, count in outcomes.most_common())]
    for name, some in (
        ("all", records),
        ("begun while nothing was down", quiet(records, outages)),
        ("nothing down from begin to end", untouched(records, outages)),
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
        resumed = sum(record.was_resumed for record in whole)
        lines.append(
            f"{again} of them took several attempts, {resumed} were resumed; longest pause in a stream {pause:.3f} s"
        )
    return lines

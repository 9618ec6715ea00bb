"""What must hold after any chaos. Pure: records, journals and ledgers in, sentences about violations out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from .ledgers import Entry, Work
from .record import Outcome, Record

STOP_S = 5.0
"""Longest that a backend may go on after its application left. The goal is 0.3 s; machines are busy."""


COMMIT_S = 2.0
"""Longest that a receipt waits in an executor for the disk: a group commit, on a machine that is busy."""


def outcomes(records: Iterable[Record]) -> list[str]:
    """Every request has exactly one outcome, and no cut answer looks finished."""
    return [
        f"request {record.ask.tag} is {record.outcome.value}: {record}"
        for record in records
        if record.outcome in (Outcome.LOST, Outcome.SILENT)
    ]


def texts(records: Iterable[Record]) -> list[str]:
    """A complete answer is the whole text, byte by byte; any other is a beginning of it. Nothing is another's."""
    found = []
    for record in records:
        whole = record.ask.text
        if record.unread:
            found.append(f"request {record.ask.tag} got something that is no JSON: {record.unread[:80]!r}")
        if record.outcome is Outcome.COMPLETE and record.text != whole:
            found.append(f"request {record.ask.tag} is complete with {record.text!r} instead of {whole!r}")
        elif not whole.startswith(record.text):
            found.append(f"request {record.ask.tag} got {record.text!r}, which is no beginning of {whole!r}")
    return found


def work(records: Iterable[Record], journals: Iterable[Work]) -> list[str]:
    """Every answer was sent by a backend, whole, and no backend goes on for an application that left or was told."""
    by_tag: dict[int, list[Work]] = defaultdict(list)
    for one in journals:
        by_tag[one.tag].append(one)
    found = []
    for record in records:
        done = by_tag[record.ask.tag]
        # What a killed backend had sent is not known; a resumed answer is the sum of its parts.
        is_known = all(one.ended_at is not None for one in done)
        if record.outcome is Outcome.COMPLETE and is_known and sum(one.sent for one in done) < record.ask.chunks:
            found.append(f"request {record.ask.tag} has more text than its backends sent: {done}")
        for one in done:
            if record.ended_at is None:
                continue
            # Without an end its backend was killed.
            if one.ended_at is not None and one.ended_at > record.ended_at + STOP_S:
                late_s = one.ended_at - record.ended_at
                found.append(
                    f"request {record.ask.tag} is {record.outcome.value}; its backend went on for {late_s:.1f} s"
                )
    return found


def receipts(
    records: Iterable[Record],
    client: Sequence[Entry],
    executors: Sequence[Entry],
    was_killed: Callable[[Record], bool] = lambda record: False,
) -> list[str]:
    """For each complete answer the client owes exactly one receipt, and its executor holds the very same.

    ``was_killed``: the sidecar of its executor was, within ``COMMIT_S`` of the answer's end. What it had queued for its
    ledger and not written is lost then, for itself alone: it has no proof of what the client owes.
    """
    owed: dict[str, list[Entry]] = defaultdict(list)
    for entry in client:
        if entry.is_owed:
            owed[entry.request_id].append(entry)
    held = {entry.request_digest: entry for entry in executors}
    known = {entry.request_digest: entry for entry in client}
    found = []
    for entry in client:
        if entry.is_owed and entry.receipt is None:
            found.append(f"owed without a receipt: {entry.request_digest.hex()}")
        if not entry.is_owed and not entry.reason:
            found.append(f"not owed without a reason: {entry.request_digest.hex()}")
    # What an executor might bill, its client has settled too: as owed with the same receipt, or as not owed.
    for entry in executors:
        mine_too = known.get(entry.request_digest)
        if entry.receipt is not None and mine_too is None:
            found.append(f"an executor holds a receipt that its client does not know: {entry.request_digest.hex()}")
        elif mine_too is not None and mine_too.is_owed and entry.receipt not in (None, mine_too.receipt):
            found.append(f"two receipts of one exchange: {entry.request_digest.hex()}")
    for record in records:
        mine = owed[record.request_id] if record.request_id else []
        if record.outcome is not Outcome.COMPLETE:
            continue
        if not mine:
            found.append(f"request {record.ask.tag} is complete, and the client's ledger has no receipt of it")
        if len(mine) > 1 and not record.was_resumed:
            found.append(f"request {record.ask.tag} is owed {len(mine)} times")
        for entry in mine:
            far = held.get(entry.request_digest)
            if far is None and was_killed(record):
                continue
            if far is None:
                found.append(f"request {record.ask.tag}: its executor {record.executor} has lost the receipt")
            elif far.receipt != entry.receipt:
                found.append(f"request {record.ask.tag}: the two ledgers hold different receipts")
    return found

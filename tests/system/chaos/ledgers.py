"""What the nodes' ledgers and the backends' journals say, read from their files."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path

LEDGER = "lloom.db"


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a ledger's receipts."""

    request_id: str
    request_digest: bytes
    receipt: bytes | None
    is_owed: bool
    reason: str
    has_ack: bool


def read_ledger(home: Path, role: str) -> list[Entry]:
    """The receipts that the node in ``home`` keeps in its role ``client`` or ``executor``."""
    database = sqlite3.connect(f"file:{home / LEDGER}?mode=ro", uri=True)
    try:
        rows = database.execute(
            "SELECT request_id, request_digest, receipt, is_owed, reason, ack IS NOT NULL FROM receipts WHERE role = ?",
            (role,),
        ).fetchall()
    finally:
        database.close()
    return [Entry(bytes(a).hex(), bytes(b), c, bool(d), e, bool(f)) for a, b, c, d, e, f in rows]


@dataclass(slots=True)
class Work:
    """One request at a backend. Instants: seconds of Unix time."""

    tag: int
    began_at: float
    ended_at: float | None = None
    outcome: str | None = None
    """None: the backend was killed before it ended."""
    sent: int = 0


def read_journal(path: Path) -> list[Work]:
    """What a scripted backend worked on, over all its starts."""
    found: dict[tuple[int, int], Work] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        work = Work(entry["script"].get("tag", 0), entry["began_at"])
        work.ended_at, work.outcome, work.sent = entry["ended_at"], entry["outcome"], entry["sent"]
        found[entry["pid"], entry["number"]] = work
    return list(found.values())

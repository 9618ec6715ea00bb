"""The table of receipts: functions on a connection, each run inside a transaction of the writer."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, replace
from typing import Final

from lloom_sidecar.ids import PeerId

from .errors import LedgerConflictError
from .records import Kept, Receipt, Role, Stated, UsageKey, UsageRow
from .stated import stated_of

MAX_PRUNED: Final = 10_000
"""Rows that one pruning deletes: it must not hold up the writer."""
DUPLICATE: Final = "duplicate"
"""Why a second complete answer under one idempotency key is not owed."""

_COLUMNS: Final = (
    "id, role, peer, request_id, exchange, request, receipt, checkpoint, ack, is_owed, reason, doubts, salt, "
    "idempotency_key, created_at_ms, model, outcome, prompt_tokens, completion_tokens, cost, currency"
)
_GROUPS: Final[dict[UsageKey, str]] = {
    "model": "model",
    "peer": "peer",
    "day": "strftime('%Y-%m-%d', created_at_ms / 1000, 'unixepoch')",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which exchanges are wanted; None = all."""

    role: Role | None = None
    request_id: bytes | None = None
    peer: PeerId | None = None
    model: str | None = None
    is_owed: bool | None = None
    is_doubtful: bool = False
    """Only those with doubts."""
    before_id: int | None = None
    """Older than this one."""


def record(connection: sqlite3.Connection, receipt: Receipt) -> None:
    """Keep ``receipt``; the same request again fills in what was missing, and takes over a newer checkpoint.

    Raises LedgerConflictError, sqlite3.Error.
    """
    digest = receipt.request_digest
    row = connection.execute(
        "SELECT id, receipt, ack FROM receipts WHERE role = ? AND request_digest = ?", (receipt.role, digest)
    ).fetchone()
    stated = stated_of(receipt.request, receipt.receipt or receipt.checkpoint)
    if row is None:
        connection.execute(
            "INSERT INTO receipts (role, peer, request_id, exchange, request_digest, request, receipt, checkpoint, "
            "ack, is_owed, reason, doubts, salt, idempotency_key, created_at_ms, model, outcome, prompt_tokens, "
            "completion_tokens, cost, currency) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                receipt.role,
                receipt.peer.raw,
                receipt.request_id,
                receipt.exchange,
                digest,
                receipt.request,
                receipt.receipt,
                receipt.checkpoint,
                receipt.ack,
                receipt.is_owed,
                receipt.reason,
                receipt.doubts,
                receipt.salt,
                receipt.idempotency_key or None,
                receipt.created_at_ms,
                stated.model,
                stated.outcome,
                stated.prompt_tokens,
                stated.completion_tokens,
                stated.cost,
                stated.currency,
            ),
        )
        return
    row_id, *kept = row
    for name, old, new in zip(("receipt", "ack"), kept, (receipt.receipt, receipt.ack), strict=True):
        if old is not None and new is not None and old != new:
            raise LedgerConflictError(f"another {name} is kept for the same request")
    connection.execute(
        "UPDATE receipts SET receipt = coalesce(receipt, ?), checkpoint = coalesce(?, checkpoint), "
        "ack = coalesce(ack, ?), is_owed = ?, reason = ?, doubts = CASE WHEN doubts = '' THEN ? ELSE doubts END, "
        "salt = CASE WHEN salt = x'' THEN ? ELSE salt END WHERE id = ?",
        (
            receipt.receipt,
            receipt.checkpoint,
            receipt.ack,
            receipt.is_owed,
            receipt.reason,
            receipt.doubts,
            receipt.salt,
            row_id,
        ),
    )
    if kept[0] is None and stated.outcome:
        connection.execute(
            "UPDATE receipts SET model = ?, outcome = ?, prompt_tokens = ?, completion_tokens = ?, cost = ?, "
            "currency = ? WHERE id = ?",
            (
                stated.model,
                stated.outcome,
                stated.prompt_tokens,
                stated.completion_tokens,
                stated.cost,
                stated.currency,
                row_id,
            ),
        )


def record_settled(connection: sqlite3.Connection, receipt: Receipt) -> None:
    """Like ``record`` for what is over: when another exchange is owed for the same key, this one is not.

    An application that uses a key twice gets two answers and owes the first. Raises LedgerConflictError, sqlite3.Error.
    """
    if receipt.role == "client" and receipt.is_owed and receipt.idempotency_key:
        other = connection.execute(
            "SELECT 1 FROM receipts WHERE role = 'client' AND is_owed = 1 AND idempotency_key = ? "
            "AND request_digest <> ?",
            (receipt.idempotency_key, receipt.request_digest),
        ).fetchone()
        if other is not None:
            receipt = replace(receipt, is_owed=False, reason=DUPLICATE)
    record(connection, receipt)


def acknowledge(connection: sqlite3.Connection, role: Role, request_digest: bytes, ack: bytes) -> bool:
    """Keep a countersignature; the first one stays. False when there is no such exchange."""
    cursor = connection.execute(
        "UPDATE receipts SET ack = coalesce(ack, ?) WHERE role = ? AND request_digest = ?", (ack, role, request_digest)
    )
    return cursor.rowcount > 0


def settle(connection: sqlite3.Connection, role: Role, request_digest: bytes, is_owed: bool, reason: str) -> bool:
    """Say whether an exchange is owed. False when there is no such exchange."""
    cursor = connection.execute(
        "UPDATE receipts SET is_owed = ?, reason = ? WHERE role = ? AND request_digest = ?",
        (is_owed, reason, role, request_digest),
    )
    return cursor.rowcount > 0


def find(connection: sqlite3.Connection, wanted: Wanted, limit: int) -> list[Kept]:
    """The newest first."""
    given = {
        "role": wanted.role,
        "request_id": wanted.request_id,
        "peer": None if wanted.peer is None else wanted.peer.raw,
        "model": wanted.model,
        "is_owed": wanted.is_owed,
    }
    # Only what is wanted, so that SQLite can use its indices.
    conditions = [f"{name} = :{name}" for name, value in given.items() if value is not None]
    if wanted.is_doubtful:
        conditions.append("doubts <> ''")
    if wanted.before_id is not None:
        conditions.append("id < :before_id")
    where = f"WHERE {' AND '.join(conditions)} " if conditions else ""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM receipts {where}ORDER BY id DESC LIMIT :limit",  # noqa: S608 - constants only
        given | {"before_id": wanted.before_id, "limit": max(0, limit)},
    )
    return [
        Kept(
            row[0],
            Receipt(
                role=row[1],
                peer=PeerId(row[2]),
                request_id=row[3],
                exchange=row[4],
                request=row[5],
                receipt=row[6],
                checkpoint=row[7],
                ack=row[8],
                is_owed=bool(row[9]),
                reason=row[10],
                doubts=row[11],
                salt=row[12],
                idempotency_key=row[13] or b"",
                created_at_ms=row[14],
            ),
            Stated(*row[15:21]),
        )
        for row in rows
    ]


def usage(
    connection: sqlite3.Connection, by: UsageKey, role: Role | None, since_ms: int, until_ms: int
) -> list[UsageRow]:
    """Sums of the exchanges begun from ``since_ms`` on and before ``until_ms``, Unix milliseconds."""
    # total() adds in floating point, exact below 2^53 and never an error: one absurd number must not hide the others.
    rows = connection.execute(
        f"SELECT role, {_GROUPS[by]} AS key, currency, count(*), total(is_owed), total(is_owed * prompt_tokens), "  # noqa: S608 - constants only
        "total(is_owed * completion_tokens), total(is_owed * cost) FROM receipts "
        "WHERE (?1 IS NULL OR role = ?1) AND created_at_ms >= ?2 AND created_at_ms < ?3 "
        "GROUP BY role, key, currency ORDER BY role, key, currency",
        (role, since_ms, until_ms),
    )
    return [
        UsageRow(row[0], PeerId(row[1]) if by == "peer" else row[1], row[2], row[3], *(int(sum_) for sum_ in row[4:8]))
        for row in rows
    ]


def prune(connection: sqlite3.Connection, *, oldest_ms: int, keep_bytes: int) -> int:
    """Delete what is older than ``oldest_ms``, and the oldest while the file's content is over ``keep_bytes``.

    At most 10,000 rows at once. Returns how many. The file itself does not shrink: its pages are used again.
    """
    deleted = connection.execute(
        "DELETE FROM receipts WHERE id IN (SELECT id FROM receipts WHERE created_at_ms < ? "
        "ORDER BY created_at_ms LIMIT ?)",
        (oldest_ms, MAX_PRUNED),
    ).rowcount
    pages, free, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    used = (pages - free) * page_bytes
    if used > keep_bytes:
        (rows,) = connection.execute("SELECT count(*) FROM receipts").fetchone()
        excess = min(MAX_PRUNED, rows * (used - keep_bytes) // used + rows // 100 + 1)
        deleted += connection.execute(
            "DELETE FROM receipts WHERE id IN (SELECT id FROM receipts ORDER BY id LIMIT ?)", (excess,)
        ).rowcount
    return deleted

"""The ledger's tables, as the steps that lead to them. A step that was released is never changed: add another."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Final

from .stated import fill_stated_columns

Step = str | Callable[[sqlite3.Connection], None]
"""A SQL statement, or what SQL cannot say."""

MIGRATIONS: Final[tuple[tuple[Step, ...], ...]] = (
    # 1
    (
        """
        CREATE TABLE settings (
            name TEXT PRIMARY KEY,
            value INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID
        """,
        """
        CREATE TABLE known_peers (
            peer BLOB PRIMARY KEY,
            addrs TEXT NOT NULL, -- one multiaddr a line
            roles TEXT NOT NULL, -- separated by spaces
            last_seen_ms INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID
        """,
        "CREATE INDEX known_peers_by_age ON known_peers (last_seen_ms)",
        """
        CREATE TABLE receipts (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            role TEXT NOT NULL CHECK (role IN ('client', 'executor')),
            peer BLOB NOT NULL,
            request_id BLOB NOT NULL,
            exchange INTEGER NOT NULL,
            request_digest BLOB NOT NULL,
            request BLOB NOT NULL,
            receipt BLOB,
            ack BLOB,
            is_owed INTEGER NOT NULL CHECK (is_owed IN (0, 1)),
            reason TEXT NOT NULL,
            salt BLOB NOT NULL,
            idempotency_key BLOB,
            created_at_ms INTEGER NOT NULL,
            UNIQUE (role, request_digest)
        ) STRICT
        """,
        "CREATE INDEX receipts_by_request ON receipts (request_id)",
        """
        CREATE UNIQUE INDEX receipts_owed_once ON receipts (idempotency_key)
        WHERE role = 'client' AND is_owed = 1 AND idempotency_key IS NOT NULL
        """,
    ),
    # 2: what the statements say, in columns of their own; checkpoints, doubts
    (
        "ALTER TABLE receipts ADD COLUMN checkpoint BLOB",
        "ALTER TABLE receipts ADD COLUMN doubts TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE receipts ADD COLUMN model TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE receipts ADD COLUMN outcome TEXT NOT NULL DEFAULT ''",
        "ALTER TABLE receipts ADD COLUMN prompt_tokens INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE receipts ADD COLUMN completion_tokens INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE receipts ADD COLUMN cost INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE receipts ADD COLUMN currency TEXT NOT NULL DEFAULT ''",
        "CREATE INDEX receipts_by_age ON receipts (created_at_ms)",
        fill_stated_columns,
    ),
)
"""The steps of each schema version; the first leads from an empty file to version 1."""

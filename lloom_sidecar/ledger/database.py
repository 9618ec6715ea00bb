"""Opening the ledger's file: its settings, its check, its migrations."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Final

from lloom_sidecar.errors import StartError

from .schema import MIGRATIONS

QUICK_CHECK_MAX_BYTES: Final = 64 * 1024 * 1024
"""Up to this size the whole file is checked at the start (under 0.3 s); above it damage shows when a page is read."""


def open_database(path: Path, max_bytes: int | None = None) -> sqlite3.Connection:
    """Open or make the file, with this version's schema. Blocks: call it in a thread.

    Raises:
        StartError: one sentence with the remedy.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # An existing file may have been copied with other rights; -wal and -shm take over those of the file.
        path.chmod(0o600)
    except OSError as exc:
        raise StartError(f"the ledger {path} cannot be opened: {exc.strerror}; check the folder and its owner") from exc
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA trusted_schema = OFF")
        if max_bytes is not None:
            page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {max(1, max_bytes // page_bytes)}")
        if path.stat().st_size <= QUICK_CHECK_MAX_BYTES:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        _migrate(connection, path)
    except sqlite3.Error as exc:
        connection.close()
        raise _start_error(exc, path) from exc
    except BaseException:
        connection.close()
        raise
    return connection


def _start_error(exc: sqlite3.Error, path: Path) -> StartError:
    primary = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if primary == sqlite3.SQLITE_FULL:
        return StartError(f"no room for the ledger {path}: free disk space, or raise the ledger's limit")
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StartError(
            f"the ledger {path} is damaged ({exc}): move it away (mv {path} {path}.damaged) and start again; a new one "
            f"is made, and `sqlite3 {path}.damaged .recover` shows what can still be read"
        )
    return StartError(f"the ledger {path} cannot be used: {exc}; is another node running in the same home?")


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    # All steps or none: what fails is undone when ``open_database`` closes the connection.
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, "
        "applied_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP) STRICT"
    )
    version = connection.execute("SELECT coalesce(max(version), 0) FROM migrations").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StartError(
            f"the ledger {path} was written by a newer lloom-sidecar (schema {version}, this one knows "
            f"{len(MIGRATIONS)}): upgrade, or use another --home"
        )
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        for statement in statements:
            if isinstance(statement, str):
                connection.execute(statement)
            else:
                statement(connection)
        connection.execute("INSERT INTO migrations (version) VALUES (?)", (number,))
    connection.execute("COMMIT")

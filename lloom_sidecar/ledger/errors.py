"""What can go wrong with the ledger, and the one place where SQLite's errors become ours."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from lloom_sidecar.errors import LloomError


class LedgerError(LloomError):
    """The ledger could not do what was asked."""

    code = "ledger"


class LedgerFullError(LedgerError):
    """No room: the disk is full, or the file has reached its limit. Nothing of the job was written."""

    code = "ledger_full"
    http_status = 503
    retryable = True


class LedgerBusyError(LedgerError):
    """The writer's queue is full, and the caller did not want to wait."""

    code = "ledger_busy"
    http_status = 503
    retryable = True


class LedgerClosedError(LedgerError):
    """The ledger is not open: its service has not started, or has ended."""

    code = "ledger_closed"
    http_status = 503


class LedgerConflictError(LedgerError):
    """The job contradicts what is kept: another receipt for the same request, or a second owed one for one key."""

    code = "ledger_conflict"


def translated(exc: BaseException, path: Path) -> LloomError:
    """``exc`` as one of ours."""
    if isinstance(exc, LloomError):
        return exc
    error: LedgerError
    if isinstance(exc, sqlite3.IntegrityError):
        error = LedgerConflictError(f"the ledger keeps another statement about the same request or key: {exc}")
    elif getattr(exc, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        error = LedgerFullError(f"no room in {path}: free disk space, or raise the ledger's limit")
    else:
        error = LedgerError(f"{path} could not be read or written: {exc}")
    error.__cause__ = exc
    return error

"""Receipts, known peers and the sequence counter, kept in SQLite."""

from __future__ import annotations

from .errors import LedgerBusyError, LedgerClosedError, LedgerConflictError, LedgerError, LedgerFullError
from .receipts import Wanted
from .records import Kept, KnownPeer, Receipt, Role, Stated, UsageKey, UsageRow
from .store import Ledger, Retention

__all__ = [
    "Kept",
    "KnownPeer",
    "Ledger",
    "LedgerBusyError",
    "LedgerClosedError",
    "LedgerConflictError",
    "LedgerError",
    "LedgerFullError",
    "Receipt",
    "Retention",
    "Role",
    "Stated",
    "UsageKey",
    "UsageRow",
    "Wanted",
]

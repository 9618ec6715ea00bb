"""Receipts, known peers and the sequence counter, kept in SQLite."""

from __future__ import annotations

from .store import (
    KnownPeer,
    Ledger,
    LedgerBusyError,
    LedgerClosedError,
    LedgerConflictError,
    LedgerError,
    LedgerFullError,
    Receipt,
)

__all__ = [
    "KnownPeer",
    "Ledger",
    "LedgerBusyError",
    "LedgerClosedError",
    "LedgerConflictError",
    "LedgerError",
    "LedgerFullError",
    "Receipt",
]

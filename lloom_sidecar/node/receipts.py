"""Handing receipts to the ledger without waiting for the disk."""

from __future__ import annotations

import hashlib
import time

import structlog

from lloom_sidecar.errors import LloomError
from lloom_sidecar.executor.serve import ServedReceipt
from lloom_sidecar.ledger.store import Ledger, Receipt

from .observer import ClientReceipt

log = structlog.get_logger("lloom.receipts")


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


class ReceiptKeeper:
    """Queues receipts of both roles. One that the queue cannot take is lost and logged; the answer is not held up."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def keep(self, kept: ClientReceipt | ServedReceipt) -> None:
        """Queue one; for a served one that was kept before, its countersignature."""
        try:
            if isinstance(kept, ClientReceipt):
                self._ledger.record_receipt_nowait(_received(kept))
            elif kept.ack is None:
                self._ledger.record_receipt_nowait(_served(kept))
            else:
                digest = hashlib.sha256(kept.request).digest()
                self._ledger.record_ack_nowait(role="executor", request_digest=digest, ack=kept.ack)
        except LloomError as exc:
            log.warning("receipt_not_kept", code=exc.code)


def _received(kept: ClientReceipt) -> Receipt:
    return Receipt(
        role="client",
        peer=kept.peer,
        request_id=kept.call.request_id,
        exchange=kept.receipt.exchange,
        request=kept.receipt.request,
        receipt=kept.receipt.envelope,
        ack=kept.receipt.ack,
        is_owed=True,
        salt=kept.receipt.salt,
        idempotency_key=kept.call.idempotency_key,
        created_at_ms=now_ms(),
    )


def _served(kept: ServedReceipt) -> Receipt:
    return Receipt(
        role="executor",
        peer=kept.client,
        request_id=kept.request_id,
        exchange=kept.exchange,
        request=kept.request,
        receipt=kept.receipt,
        is_owed=True,
        salt=kept.salt,
        created_at_ms=now_ms(),
    )

"""Handing what became of exchanges to the ledger, without waiting for the disk."""

from __future__ import annotations

import hashlib
import time

import structlog

from lloom_sidecar.client.settled import Settled
from lloom_sidecar.errors import LloomError
from lloom_sidecar.executor.serve import ServedReceipt
from lloom_sidecar.ledger import Ledger, Receipt

log = structlog.get_logger("lloom.receipts")


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


class ReceiptKeeper:
    """Queues exchanges of both roles. One that the queue cannot take is lost and logged; no answer is held up."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def keep(self, kept: Settled | ServedReceipt) -> None:
        """Queue one; for a served one that was kept before, what came since."""
        try:
            if isinstance(kept, Settled):
                self._ledger.record_receipt_nowait(asked(kept, now_ms()))
            elif kept.ack is None:
                self._ledger.record_receipt_nowait(served(kept, now_ms()))
            else:
                digest = hashlib.sha256(kept.request).digest()
                self._ledger.record_ack_nowait(role="executor", request_digest=digest, ack=kept.ack)
        except LloomError as exc:
            log.warning("receipt_not_kept", code=exc.code)


def asked(settled: Settled, at_ms: int) -> Receipt:
    """An exchange of this node's applications, as the ledger keeps it."""
    receipt, checkpoint = settled.receipt, settled.checkpoint
    return Receipt(
        role="client",
        peer=settled.peer,
        request_id=settled.call.request_id,
        exchange=settled.exchange,
        request=settled.request,
        receipt=None if receipt is None else receipt.envelope,
        checkpoint=None if checkpoint is None else checkpoint.envelope,
        ack=None if receipt is None else receipt.ack,
        is_owed=settled.is_owed,
        reason=settled.reason,
        doubts="" if receipt is None else "; ".join(receipt.doubts),
        salt=settled.salt,
        # Without a key of the application's the request is the unit: its retries are one.
        idempotency_key=settled.call.idempotency_key or settled.call.request_id,
        created_at_ms=at_ms,
    )


def served(kept: ServedReceipt, at_ms: int) -> Receipt:
    """An exchange with a peer that this node served, as the ledger keeps it."""
    return Receipt(
        role="executor",
        peer=kept.client,
        request_id=kept.request_id,
        exchange=kept.exchange,
        request=kept.request,
        receipt=kept.receipt,
        checkpoint=kept.checkpoint,
        is_owed=kept.receipt is not None or kept.checkpoint is not None,
        reason=kept.reason,
        salt=kept.salt,
        created_at_ms=at_ms,
    )

"""The ledger as the operator's side sees it: implements ``admin.books.Books``."""

from __future__ import annotations

from datetime import UTC, datetime

from lloom_sidecar.admin.books import ExchangeFilter, ExchangeInfo, Role, UsageBy, UsageInfo
from lloom_sidecar.ids import PeerId
from lloom_sidecar.ledger import Kept, Ledger, Wanted
from lloom_sidecar.protocol.receipt_file import ExportedReceipt

MAX_EXPORTED = 100
"""Exchanges of one request that are exported at once: more than it can have attempts."""


class NodeBooks:
    """The books of one node."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def exchanges(self, wanted: ExchangeFilter, limit: int) -> list[ExchangeInfo]:
        """The newest first. Raises LloomError, and ValueError for a peer that is none."""
        found = await self._ledger.find(
            Wanted(
                role=wanted.role,
                peer=None if wanted.peer is None else PeerId.parse(wanted.peer),
                model=wanted.model,
                request_id=wanted.request_id,
                is_owed=wanted.is_owed,
                is_doubtful=wanted.is_doubtful,
                before_id=wanted.before_id,
            ),
            limit,
        )
        return [_exchange(one) for one in found]

    async def export(self, request_id: bytes, role: Role | None, *, with_salt: bool) -> list[dict[str, str]]:
        """What was signed for a request, the oldest first. Raises LloomError."""
        found = await self._ledger.find(Wanted(role=role, request_id=request_id), MAX_EXPORTED)
        return [
            ExportedReceipt(
                request=one.receipt.request,
                receipt=one.receipt.receipt or b"",
                checkpoint=b"" if one.receipt.receipt else one.receipt.checkpoint or b"",
                ack=one.receipt.ack or b"",
                salt=one.receipt.salt if with_salt else b"",
            ).as_dict()
            for one in reversed(found)
            if one.receipt.receipt or one.receipt.checkpoint
        ]

    async def usage(self, by: UsageBy, role: Role | None, since_ms: int, until_ms: int) -> list[UsageInfo]:
        """Sums. Raises LloomError."""
        rows = await self._ledger.usage(by, role=role, since_ms=since_ms, until_ms=until_ms)
        return [
            UsageInfo(
                role=row.role,
                key=str(row.key),
                exchanges=row.exchanges,
                owed=row.owed,
                prompt_tokens=row.prompt_tokens,
                completion_tokens=row.completion_tokens,
                cost=row.cost,
                currency=row.currency,
            )
            for row in rows
        ]


def _exchange(kept: Kept) -> ExchangeInfo:
    receipt, stated = kept.receipt, kept.stated
    at = datetime.fromtimestamp(receipt.created_at_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return ExchangeInfo(
        id=kept.id,
        at=at.replace("+00:00", "Z"),
        role=receipt.role,
        peer=str(receipt.peer),
        request_id=receipt.request_id.hex(),
        request_digest=receipt.request_digest.hex(),
        model=stated.model,
        outcome=stated.outcome,
        owed=receipt.is_owed,
        reason=receipt.reason,
        doubts=receipt.doubts,
        acknowledged=receipt.ack is not None,
        prompt_tokens=stated.prompt_tokens,
        completion_tokens=stated.completion_tokens,
        cost=stated.cost,
        currency=stated.currency,
    )

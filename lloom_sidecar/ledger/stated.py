"""What kept envelopes say, read back into columns. Their signatures were checked before they came here."""

from __future__ import annotations

import sqlite3
from typing import Final, Literal, NamedTuple

from google.protobuf.message import DecodeError

from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .records import MAX_INTEGER, Stated

_OUTCOMES: Final[dict[int, Literal["complete", "stopped", "partial"]]] = {
    pb.OUTCOME_COMPLETE: "complete",
    pb.OUTCOME_STOPPED: "stopped",
    pb.OUTCOME_PARTIAL: "partial",
}


class _Row(NamedTuple):
    id: int
    request: bytes
    receipt: bytes | None


def stated_of(request: bytes, statement: bytes | None) -> Stated:
    """The columns of an exchange; ``statement``: its receipt's envelope, else its last checkpoint's.

    What cannot be read leaves its columns empty: nothing is lost, the envelopes are kept as they came.
    """
    try:
        if statement is None:
            return Stated(model=pb.RequestClaims.FromString(_payload(request)).model)
        claims = pb.ReceiptClaims.FromString(_payload(statement))
    except DecodeError:
        return Stated()
    return Stated(
        model=claims.model,
        outcome=_OUTCOMES.get(claims.outcome, ""),
        prompt_tokens=min(claims.usage.prompt_tokens, MAX_INTEGER),
        completion_tokens=min(claims.usage.completion_tokens, MAX_INTEGER),
        cost=min(claims.cost, MAX_INTEGER),
        currency=claims.price.currency,
    )


def _payload(envelope: bytes) -> bytes:
    return bytes(pb.Envelope.FromString(envelope).payload)


def fill_stated_columns(connection: sqlite3.Connection) -> None:
    """Migration: the columns of what was kept before there were any."""
    rows = (_Row(*row) for row in connection.execute("SELECT id, request, receipt FROM receipts").fetchall())
    found = ((row.id, stated_of(row.request, row.receipt)) for row in rows)
    connection.executemany(
        "UPDATE receipts SET model = ?, outcome = ?, prompt_tokens = ?, completion_tokens = ?, cost = ?, currency = ? "
        "WHERE id = ?",
        (
            (one.model, one.outcome, one.prompt_tokens, one.completion_tokens, one.cost, one.currency, row_id)
            for row_id, one in found
        ),
    )

"""What the ledger reads out of the statements that it keeps: columns, sums, the migration of what was kept before."""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_ledger_store import NOW_MS, opened

from lloom_sidecar.ids import PeerId
from lloom_sidecar.ledger import Ledger, LedgerConflictError, LedgerFullError, Receipt, Stated, UsageRow, Wanted, store
from lloom_sidecar.ledger.database import open_database
from lloom_sidecar.ledger.schema import MIGRATIONS
from lloom_sidecar.ledger.stated import stated_of
from lloom_sidecar.protocol.claims import seal_checkpoint, seal_receipt, seal_request
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

CLIENT, EXECUTOR = Signer(bytes(32)), Signer(bytes([1]) * 32)
DAY_MS = 24 * 3600 * 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lloom.db"


def claims(outcome: int = pb.OUTCOME_COMPLETE, **fields: Any) -> pb.ReceiptClaims:
    usage = pb.Usage(prompt_tokens=fields.pop("prompt", 10), completion_tokens=fields.pop("completion", 20))
    price = pb.Price(prompt_per_million=100_000, completion_per_million=100_000, currency=fields.pop("currency", "EUR"))
    fields = {"model": "m", "cost": 3, **fields}
    return pb.ReceiptClaims(usage=usage, price=price, outcome=outcome, **fields)  # type: ignore[arg-type]


def kept(number: int, statement: pb.ReceiptClaims | None = None, **fields: Any) -> Receipt:
    request = seal_request(pb.RequestClaims(request_id=number.to_bytes(16, "big"), model="m"), CLIENT)
    is_partial = statement is not None and statement.outcome == pb.OUTCOME_PARTIAL
    made = Receipt(
        role="client",
        peer=EXECUTOR.peer,
        request_id=number.to_bytes(16, "big"),
        exchange=number,
        request=request,
        receipt=seal_receipt(statement, EXECUTOR) if statement is not None and not is_partial else None,
        checkpoint=seal_checkpoint(statement, EXECUTOR) if statement is not None and is_partial else None,
        is_owed=statement is not None,
        idempotency_key=b"key %d" % number,
        created_at_ms=NOW_MS,
    )
    return replace(made, **fields)


# ---------------------------------------------------------------- columns
async def test_columns_come_from_the_receipt_else_the_checkpoint_else_the_request(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.record_receipt(kept(1, claims()))
        await ledger.record_receipt(kept(2, claims(pb.OUTCOME_PARTIAL, completion=7, cost=2)))
        await ledger.record_receipt(kept(3, reason="refused"))
        await ledger.record_receipt(kept(4, request=b"no envelope at all"))
        assert [one.stated for one in await ledger.find(Wanted())] == [
            Stated(),
            Stated(model="m"),
            Stated("m", "partial", 10, 7, 2, "EUR"),
            Stated("m", "complete", 10, 20, 3, "EUR"),
        ]


async def test_a_newer_checkpoint_replaces_the_older_and_the_receipt_stays(path: Path) -> None:
    partial = [kept(1, claims(pb.OUTCOME_PARTIAL, completion=n, cost=n)) for n in (5, 9)]
    async with opened(path) as ledger:
        for one in partial:
            ledger.record_receipt_nowait(one)
        (found,) = await ledger.find(Wanted())
        assert (found.stated.outcome, found.stated.cost) == ("partial", 9)
        assert found.receipt.checkpoint == partial[1].checkpoint
        await ledger.record_receipt(kept(1, claims(completion=12, cost=4)))
        await ledger.record_receipt(partial[0])  # late, and no news
        (found,) = await ledger.find(Wanted())
        assert (found.stated.outcome, found.stated.completion_tokens, found.stated.cost) == ("complete", 12, 4)


def test_absurd_numbers_are_cut_to_what_sqlite_holds() -> None:
    stated = stated_of(b"", seal_receipt(claims(completion=2**64 - 1, cost=2**64 - 1), EXECUTOR))
    assert (stated.completion_tokens, stated.cost) == (2**63 - 1, 2**63 - 1)


# ---------------------------------------------------------------- owed
async def test_of_two_complete_answers_under_one_key_the_first_is_owed(path: Path) -> None:
    first, second = (kept(number, claims(), idempotency_key=b"same") for number in (1, 2))
    async with opened(path) as ledger:
        ledger.record_receipt_nowait(first)
        ledger.record_receipt_nowait(second)
        ledger.record_receipt_nowait(first)
        await ledger.flush()
        found = {one.receipt.exchange: one.receipt for one in await ledger.find(Wanted())}
        assert (found[1].is_owed, found[1].reason) == (True, "")
        assert (found[2].is_owed, found[2].reason) == (False, "duplicate")
        assert ledger.failed_writes == 0
        assert [one.receipt.exchange for one in await ledger.find(Wanted(is_owed=True))] == [1]


def test_the_schema_itself_refuses_a_second_owed_one(path: Path) -> None:
    connection = open_database(path)
    insert = (
        "INSERT INTO receipts (role, peer, request_id, exchange, request_digest, request, is_owed, reason, salt, "
        "idempotency_key, created_at_ms) VALUES ('client', x'00', x'00', 1, ?, x'00', ?, '', x'', x'aa', 1)"
    )
    connection.execute(insert, (b"1", 1))
    connection.execute(insert, (b"2", 0))
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute(insert, (b"3", 1))
    connection.close()


# ---------------------------------------------------------------- finding
async def test_what_is_wanted_is_found(path: Path) -> None:
    other = PeerId.from_ed25519(bytes([9]) * 32)
    async with opened(path) as ledger:
        await ledger.record_receipt(kept(1, claims()))
        await ledger.record_receipt(kept(2, claims(model="n"), role="executor", peer=other))
        await ledger.record_receipt(kept(3, reason="lost"))

        async def exchanges(wanted: Wanted, limit: int = 100) -> list[int]:
            return [one.receipt.exchange for one in await ledger.find(wanted, limit)]

        assert await exchanges(Wanted()) == [3, 2, 1]
        assert await exchanges(Wanted(), limit=1) == [3]
        assert await exchanges(Wanted(role="executor")) == [2]
        assert await exchanges(Wanted(peer=other)) == [2]
        assert await exchanges(Wanted(model="m")) == [3, 1]
        assert await exchanges(Wanted(model="m", is_owed=False)) == [3]
        assert await exchanges(Wanted(request_id=(1).to_bytes(16, "big"))) == [1]
        (newest, *_) = await ledger.find(Wanted())
        assert await exchanges(Wanted(before_id=newest.id)) == [2, 1]


async def test_usage_sums_what_is_owed_by_model_peer_and_day(path: Path) -> None:
    other = PeerId.from_ed25519(bytes([9]) * 32)
    async with opened(path) as ledger:
        await ledger.record_receipt(kept(1, claims()))
        await ledger.record_receipt(kept(2, claims(), peer=other, created_at_ms=NOW_MS + DAY_MS))
        await ledger.record_receipt(kept(3, claims(), is_owed=False, reason="hedged"))
        await ledger.record_receipt(kept(4, claims(currency="USD", cost=2**63 - 1)))
        await ledger.record_receipt(kept(5, claims(currency="USD", cost=2**63 - 1), role="executor"))
        assert await ledger.usage("model", role="client") == [
            UsageRow("client", "m", "EUR", 3, 2, 20, 40, 6),
            UsageRow("client", "m", "USD", 1, 1, 10, 20, 2**63),
        ]
        by_day = await ledger.usage("day", role="client")
        assert [(one.key, one.currency, one.owed) for one in by_day] == [
            ("1970-01-01", "EUR", 1),
            ("1970-01-01", "USD", 1),
            ("1970-01-02", "EUR", 1),
        ]
        by_peer = await ledger.usage("peer", since_ms=NOW_MS + 1)
        assert [(one.key, one.exchanges) for one in by_peer] == [(other, 1)]
        assert len(await ledger.usage("peer", until_ms=NOW_MS + 1)) == 3


# ---------------------------------------------------------------- the file of the version before
def make_version_1(path: Path, rows: list[Receipt]) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(
        "CREATE TABLE migrations (version INTEGER PRIMARY KEY, "
        "applied_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP) STRICT"
    )
    for statement in MIGRATIONS[0]:
        assert isinstance(statement, str)
        connection.execute(statement)
    connection.execute("INSERT INTO migrations (version) VALUES (1)")
    connection.execute("INSERT INTO settings VALUES ('sequence', 77)")
    connection.executemany(
        "INSERT INTO receipts (role, peer, request_id, exchange, request_digest, request, receipt, ack, is_owed, "
        "reason, salt, idempotency_key, created_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                *(one.role, one.peer.raw, one.request_id, one.exchange, hashlib.sha256(one.request).digest()),
                *(one.request, one.receipt, one.ack, one.is_owed, one.reason, one.salt),
                *(one.idempotency_key or None, one.created_at_ms),
            )
            for one in rows
        ],
    )
    connection.close()


async def test_a_file_of_schema_1_is_taken_over_whole(path: Path) -> None:
    rows = [kept(1, claims(), ack=b"ack", salt=b"salt"), kept(2, reason="lost"), kept(3, request=b"no envelope")]
    make_version_1(path, rows)
    async with opened(path) as ledger:
        found = await ledger.find(Wanted())
        assert [one.receipt for one in found] == rows[::-1]
        assert [one.stated for one in found] == [
            Stated(),
            Stated(model="m"),
            Stated("m", "complete", 10, 20, 3, "EUR"),
        ]
        assert await ledger.next_sequence(1) == 78
        with pytest.raises(LedgerConflictError):
            await ledger.record_receipt(kept(9, claims(), idempotency_key=rows[0].idempotency_key))


# ---------------------------------------------------------------- trouble
async def test_a_full_file_is_trouble_until_a_write_succeeds(path: Path) -> None:
    async with opened(path, max_bytes=300_000) as ledger:
        assert ledger.trouble() is None
        with pytest.raises(LedgerFullError):
            await ledger.record_receipt(kept(1, receipt=bytes(400_000)))
        assert "no room" in (ledger.trouble() or "")
        await ledger.find(Wanted())  # a read says nothing of room
        assert ledger.trouble() is not None
        await ledger.probe()
        assert ledger.trouble() is None
        ledger.record_receipt_nowait(kept(1, receipt=bytes(400_000)))
        ledger.record_receipt_nowait(kept(2, claims()))
        ledger.record_receipt_nowait(replace(kept(2, claims()), ack=b"1"))
        with pytest.raises(LedgerFullError):
            await ledger.flush()
        assert ledger.trouble() is not None
        ledger.record_receipt_nowait(kept(2, claims()))
        await ledger.flush()
        assert ledger.trouble() is None


async def test_a_conflict_is_no_trouble_of_the_ledgers(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.record_receipt(kept(1, claims()))
        ledger.record_receipt_nowait(kept(1, claims(cost=4)))
        await ledger.flush()
        assert ledger.failed_writes == 1
        assert ledger.trouble() is None


async def test_a_disk_that_is_nearly_full_is_trouble(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(path)
    assert ledger.trouble() is None
    monkeypatch.setattr(store, "MIN_FREE_BYTES", 2**62)
    async with opened(path) as ledger:
        assert "are free where" in (ledger.trouble() or "")

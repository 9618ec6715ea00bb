"""The ledger on a real SQLite file: what is kept, what a crash, a cancellation, a full disk and damage leave behind."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from lloom_sidecar.errors import StartError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.ledger import (
    KnownPeer,
    Ledger,
    LedgerBusyError,
    LedgerClosedError,
    LedgerConflictError,
    LedgerError,
    LedgerFullError,
    Receipt,
    Retention,
    database,
    store,
)
from lloom_sidecar.ledger.schema import MIGRATIONS

NOW_MS = 1_000
"""Receipts of these tests are dated near it."""
A, B = (PeerId.from_ed25519(bytes([number]) * 32) for number in (1, 2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lloom.db"


@asynccontextmanager
async def opened(
    path: Path, *, max_bytes: int | None = None, retention: Retention | None = None, now_ms: int = NOW_MS
) -> AsyncIterator[Ledger]:
    ledger = Ledger(path, max_bytes=max_bytes, retention=retention, now_ms=lambda: now_ms)
    async with trio.open_nursery() as nursery:
        await nursery.start(ledger.run)
        yield ledger
        nursery.cancel_scope.cancel()


def receipt(number: int, **fields: object) -> Receipt:
    made = Receipt(
        role="client",
        peer=A,
        request_id=number.to_bytes(16, "big"),
        exchange=number,
        request=b"request %d" % number,
        created_at_ms=number,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def full_receipt(number: int) -> Receipt:
    return receipt(
        number, receipt=b"receipt", ack=b"ack", is_owed=True, salt=b"salt" * 4, idempotency_key=b"k%d" % number
    )


# ---------------------------------------------------------------- what is kept
async def test_receipts_come_back_as_given_newest_first(path: Path) -> None:
    kept = [full_receipt(1), receipt(2, role="executor", peer=B, reason="lost")]
    async with opened(path) as ledger:
        for one in kept:
            await ledger.record_receipt(one)
        assert await ledger.recent_receipts() == kept[::-1]
        assert await ledger.recent_receipts(1) == [kept[1]]
        assert await ledger.recent_receipts(-5) == []
        assert await ledger.recent_receipts(role="client") == [kept[0]]
        assert await ledger.recent_receipts(request_id=kept[1].request_id) == [kept[1]]
    async with opened(path) as ledger:
        assert await ledger.recent_receipts() == kept[::-1]


async def test_the_same_again_fills_in_what_was_missing(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.record_receipt(receipt(1, reason="open"))
        await ledger.record_receipt(receipt(1, receipt=b"r", is_owed=True, salt=b"s"))
        await ledger.record_receipt(receipt(1, is_owed=True))
        assert await ledger.recent_receipts() == [receipt(1, receipt=b"r", is_owed=True, salt=b"s")]


async def test_another_receipt_or_ack_for_the_same_request_is_a_conflict(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.record_receipt(full_receipt(1))
        for change in ({"receipt": b"other"}, {"ack": b"other"}):
            with pytest.raises(LedgerConflictError):
                await ledger.record_receipt(replace(full_receipt(1), **change))  # type: ignore[arg-type]
        assert await ledger.recent_receipts() == [full_receipt(1)]


async def test_one_exchange_a_key_is_owed(path: Path) -> None:
    first, second = (receipt(number, is_owed=True, idempotency_key=b"key") for number in (1, 2))
    lost = replace(second, is_owed=False, reason="hedged")
    async with opened(path) as ledger:
        await ledger.record_receipt(first)
        with pytest.raises(LedgerConflictError) as caught:
            await ledger.record_receipt(second)
        assert caught.value.code == "ledger_conflict"
        await ledger.record_receipt(lost)
        with pytest.raises(LedgerConflictError):
            await ledger.settle(role="client", request_digest=second.request_digest, is_owed=True)
        assert await ledger.settle(role="client", request_digest=first.request_digest, is_owed=False, reason="lost")
        assert await ledger.settle(role="client", request_digest=second.request_digest, is_owed=True)
        assert [(one.exchange, one.is_owed, one.reason) for one in await ledger.recent_receipts()] == [
            (2, True, ""),
            (1, False, "lost"),
        ]
        assert not await ledger.settle(role="executor", request_digest=first.request_digest, is_owed=True)
        # An executor may be owed for both: which one the app got only the client knows.
        for number in (3, 4):
            await ledger.record_receipt(receipt(number, role="executor", is_owed=True, idempotency_key=b"key"))


async def test_the_first_ack_stays(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.record_receipt(receipt(1))
        digest = receipt(1).request_digest
        assert await ledger.record_ack(role="client", request_digest=digest, ack=b"one")
        assert await ledger.record_ack(role="client", request_digest=digest, ack=b"two")
        assert not await ledger.record_ack(role="executor", request_digest=digest, ack=b"one")
        ledger.record_ack_nowait(role="client", request_digest=digest, ack=b"three")
        assert (await ledger.recent_receipts())[0].ack == b"one"


async def test_receipts_over_the_size_go_the_oldest_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PRUNE_EVERY", 10)
    async with opened(path, retention=Retention(max_bytes=200_000)) as ledger:
        for number in range(100):
            await ledger.record_receipt(receipt(number, receipt=bytes(10_000)))
        kept = [one.exchange for one in await ledger.recent_receipts()]
        assert kept == list(range(99, 99 - len(kept), -1))
        assert 10 <= len(kept) <= 30
    assert path.stat().st_size < 500_000


async def test_receipts_over_the_age_go(path: Path) -> None:
    day_ms = 24 * 3600 * 1000
    async with opened(path) as ledger:
        for number in range(5):
            await ledger.record_receipt(receipt(number, created_at_ms=number * day_ms))
    async with opened(path, retention=Retention(days=10), now_ms=13 * day_ms) as ledger:
        await ledger.next_sequence(1)  # the first write of a run looks
        assert [one.exchange for one in await ledger.recent_receipts()] == [4, 3]


async def test_a_job_that_fails_half_way_leaves_nothing(path: Path) -> None:
    def half(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO settings (name, value) VALUES ('half', 1)")
        raise LedgerError("on purpose")

    async with opened(path) as ledger:
        with pytest.raises(LedgerError, match="on purpose"):
            await ledger._call(half)
        rows = await ledger._call(lambda connection: connection.execute("SELECT name FROM settings").fetchall())
        assert rows == []


@pytest.mark.parametrize("fields", [{"exchange": 2**63}, {"exchange": -1}, {"created_at_ms": 2**63}])
def test_numbers_that_sqlite_cannot_hold_are_refused(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        receipt(1, **fields)


def test_a_receipt_shows_no_secret() -> None:
    assert "salt" not in repr(full_receipt(1))


async def test_known_peers_last_seen_first_and_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MAX_KNOWN_PEERS", 2)
    addrs = (Multiaddr.parse("/ip4/8.8.8.8/tcp/1"), Multiaddr.parse("/dns4/a.b/tcp/2"))
    first = KnownPeer(A, addrs, frozenset({"validator", "executor"}), 10)
    second = KnownPeer(B, (), frozenset(), 20)
    async with opened(path) as ledger:
        await ledger.remember_peer(first)
        await ledger.remember_peer(second)
        assert await ledger.known_peers() == [second, first]
        again = replace(first, last_seen_ms=30)
        await ledger.remember_peer(again)
        assert await ledger.known_peers() == [again, second]
        third = KnownPeer(PeerId.from_ed25519(bytes(32)), (), frozenset(), 40)
        await ledger.remember_peer(third)
        assert await ledger.known_peers() == [third, again]
        await ledger.forget_peer(A)
        await ledger.forget_peer(A)
        assert await ledger.known_peers() == [third]


async def test_sequences_only_grow_over_restarts_and_clocks_that_go_back(path: Path) -> None:
    async with opened(path) as ledger:
        assert await ledger.next_sequence(1000) == 1000
        assert await ledger.next_sequence(1000) == 1001
        assert await ledger.next_sequence(5) == 1002
    async with opened(path) as ledger:
        assert await ledger.next_sequence(5) == 1003
        assert await ledger.next_sequence(2000) == 2000


async def test_sequences_drawn_at_once_differ(path: Path) -> None:
    drawn: list[int] = []

    async with opened(path) as ledger:

        async def draw() -> None:
            drawn.append(await ledger.next_sequence(7))

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(draw)
    assert sorted(drawn) == list(range(7, 57))


# ---------------------------------------------------------------- batches
async def test_jobs_that_come_together_share_a_transaction(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    commit = Ledger._commit

    def counting(self: Ledger, connection: sqlite3.Connection, batch: list[store._Job[object]]) -> None:
        batches.append(len(batch))
        commit(self, connection, batch)

    monkeypatch.setattr(Ledger, "_commit", counting)
    async with opened(path) as ledger:
        for number in range(300):
            ledger.record_receipt_nowait(receipt(number))
        await ledger.flush()
        assert sum(batches) == 301
        assert len(batches) <= 4
        assert len(await ledger.recent_receipts(1000)) == 300


async def test_a_job_that_fails_undoes_itself_only(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.record_receipt(full_receipt(1))
        ledger.record_receipt_nowait(receipt(2))
        ledger.record_receipt_nowait(replace(full_receipt(1), receipt=b"other"))
        ledger.record_receipt_nowait(receipt(3))
        await ledger.flush()
        assert [one.exchange for one in await ledger.recent_receipts()] == [3, 2, 1]
        assert ledger.failed_writes == 1
        assert ledger.last_error is None  # a later one succeeded


async def test_a_transaction_that_cannot_end_is_undone(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.record_receipt(receipt(1))
        with pytest.raises(LedgerError, match="no such savepoint"):
            await ledger._call(lambda connection: connection.execute("ROLLBACK"))
        assert await ledger.recent_receipts() == [receipt(1)]


async def test_the_queue_is_bounded(path: Path) -> None:
    async with opened(path) as ledger:
        for number in range(store.MAX_QUEUE + 1):  # one goes to the writer at once
            ledger.record_receipt_nowait(receipt(number))
        with pytest.raises(LedgerBusyError) as caught:
            ledger.record_receipt_nowait(receipt(9999))
        assert caught.value.http_status == 503
        await ledger.flush()  # waits for room instead
        ledger.record_receipt_nowait(receipt(9999))


# ---------------------------------------------------------------- a full disk
async def test_no_room_is_its_own_error_and_the_store_goes_on(path: Path) -> None:
    big = b"x" * 200_000
    async with opened(path, max_bytes=300_000) as ledger:
        await ledger.record_receipt(receipt(1))
        await ledger.record_receipt(receipt(2, receipt=big))
        with pytest.raises(LedgerFullError) as caught:
            await ledger.record_receipt(receipt(3, receipt=big))
        assert (caught.value.code, caught.value.retryable) == ("ledger_full", True)
        assert str(path) in str(caught.value)
        ledger.record_receipt_nowait(receipt(4, receipt=big))
        with pytest.raises(LedgerFullError):  # one that is full takes its whole batch along, never a part of it
            await ledger.flush()
        assert ledger.failed_writes == 1
        assert ledger.last_error is not None
        await ledger.record_receipt(receipt(5))
        assert [one.exchange for one in await ledger.recent_receipts()] == [5, 2, 1]


async def test_a_file_without_room_for_its_tables_cannot_start(path: Path) -> None:
    with pytest.raises(StartError, match="free disk space"):
        database.open_database(path, max_bytes=4096)


# ---------------------------------------------------------------- cancellation
async def test_calls_before_and_after_the_service_say_so(path: Path) -> None:
    ledger = Ledger(path)
    with pytest.raises(LedgerClosedError):
        await ledger.flush()
    async with opened(path) as ledger:
        pass
    with pytest.raises(LedgerClosedError):
        await ledger.known_peers()
    with pytest.raises(LedgerClosedError):
        ledger.record_receipt_nowait(receipt(1))


async def test_what_is_in_the_queue_is_written_when_the_service_is_cancelled(path: Path) -> None:
    async with opened(path) as ledger:
        for number in range(store.MAX_QUEUE):
            ledger.record_receipt_nowait(receipt(number))
    async with opened(path) as ledger:
        assert len(await ledger.recent_receipts(10_000)) == store.MAX_QUEUE
    assert not path.with_name("lloom.db-wal").exists()


async def test_callers_that_wait_for_room_hear_that_the_service_ended(path: Path) -> None:
    ledger = Ledger(path, now_ms=lambda: NOW_MS)
    heard: list[str] = []

    async def call() -> None:
        try:
            await ledger.record_receipt(receipt(5000))
        except LedgerClosedError as exc:
            heard.append(exc.code)

    disk_answers = threading.Event()
    async with trio.open_nursery() as callers, trio.open_nursery() as nursery:
        await nursery.start(ledger.run)
        ledger._post(lambda connection: disk_answers.wait())
        await trio.testing.wait_all_tasks_blocked()
        for number in range(store.MAX_QUEUE):
            ledger.record_receipt_nowait(receipt(number))
        for _ in range(3):
            callers.start_soon(call)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        disk_answers.set()
    assert heard == ["ledger_closed"] * 3
    async with opened(path) as again:
        assert len(await again.recent_receipts(10_000)) == store.MAX_QUEUE


Call = Callable[[Ledger], Awaitable[object]]
CALLS: list[Call] = [
    lambda ledger: ledger.next_sequence(1),
    lambda ledger: ledger.record_receipt(receipt(1)),
    lambda ledger: ledger.record_ack(role="client", request_digest=b"", ack=b""),
    lambda ledger: ledger.settle(role="client", request_digest=b"", is_owed=False),
    lambda ledger: ledger.recent_receipts(),
    lambda ledger: ledger.remember_peer(KnownPeer(A, (), frozenset(), 1)),
    lambda ledger: ledger.forget_peer(A),
    lambda ledger: ledger.known_peers(),
    lambda ledger: ledger.flush(),
]


@pytest.mark.parametrize("call", CALLS)
async def test_a_cancelled_caller_leaves_the_store_usable(path: Path, call: Call) -> None:
    async with opened(path) as ledger:
        with trio.CancelScope() as scope:
            scope.cancel()
            await call(ledger)
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(call, ledger)
            await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        await call(ledger)
        assert (await ledger.next_sequence(50)) >= 50


async def test_a_start_that_is_cancelled_leaves_a_usable_file(path: Path) -> None:
    ledger = Ledger(path)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ledger.run)
        nursery.cancel_scope.cancel()
    async with opened(path) as again:
        await again.record_receipt(receipt(1))


# ---------------------------------------------------------------- the file
async def test_the_file_is_the_owners_only(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger.record_receipt(receipt(1))
        for name in ("lloom.db", "lloom.db-wal", "lloom.db-shm"):
            assert stat.S_IMODE(path.with_name(name).stat().st_mode) == 0o600
    path.chmod(0o644)
    async with opened(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_it_is_synchronous_and_in_wal_mode(path: Path) -> None:
    connection = database.open_database(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("SELECT version FROM migrations").fetchall() == [(n + 1,) for n in range(len(MIGRATIONS))]
    connection.close()


@pytest.mark.parametrize("damage", [b"this is no database, far from it" * 40, b"\x00" * 5000])
async def test_damage_is_one_sentence_with_the_remedy(path: Path, damage: bytes) -> None:
    path.write_bytes(damage)
    with pytest.raises(StartError) as caught:
        await Ledger(path).run()
    assert f"mv {path}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == damage


def test_a_damaged_page_is_found_at_the_start(path: Path) -> None:
    connection = database.open_database(path)
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO settings VALUES (?, ?)", ((f"{n:0100}", n) for n in range(2000)))
    connection.execute("COMMIT")
    connection.close()
    data = bytearray(path.read_bytes())
    data[20 * 4096 : 30 * 4096] = b"\xff" * (10 * 4096)
    path.write_bytes(data)
    with pytest.raises(StartError, match="is damaged"):
        database.open_database(path)


def test_a_large_file_is_not_read_through_at_the_start(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database.open_database(path).close()
    monkeypatch.setattr(database, "QUICK_CHECK_MAX_BYTES", 0)
    database.open_database(path).close()


async def test_damage_met_later_is_an_error_of_the_call(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger._call(lambda connection: connection.execute("DROP TABLE receipts"))
        with pytest.raises(LedgerError, match="no such table"):
            await ledger.recent_receipts()
        assert await ledger.known_peers() == []


async def test_a_transaction_that_cannot_begin_fails_its_jobs_only(path: Path) -> None:
    async with opened(path) as ledger:
        await ledger._call(lambda connection: connection.execute("PRAGMA busy_timeout = 1"))
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            await ledger.next_sequence(1)
        other.execute("COMMIT")
        other.close()
        assert await ledger.next_sequence(1) == 1


def test_a_newer_schema_is_refused_with_a_sentence(path: Path) -> None:
    connection = database.open_database(path)
    connection.execute("INSERT INTO migrations (version) VALUES (99)")
    connection.close()
    with pytest.raises(StartError, match=r"newer lloom-sidecar \(schema 99, this one knows \d\): upgrade"):
        database.open_database(path)


def test_migrations_go_on_from_where_the_file_is_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database.open_database(path).close()
    monkeypatch.setattr(database, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE more (a INTEGER)", "nonsense")))
    with pytest.raises(StartError, match="cannot be used"):
        database.open_database(path)
    monkeypatch.setattr(database, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE more (a INTEGER)",)))
    connection = database.open_database(path)
    assert connection.execute("SELECT max(version) FROM migrations").fetchone() == (len(MIGRATIONS) + 1,)
    connection.close()


def test_a_folder_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="cannot be opened"):
        database.open_database(tmp_path / "none" / "lloom.db")
    with pytest.raises(StartError, match="cannot be opened"):
        database.open_database(tmp_path)


# ---------------------------------------------------------------- kill -9
WRITER = """
import sys, trio
from pathlib import Path
from lloom_sidecar.ids import PeerId
from lloom_sidecar.ledger import Ledger, Receipt

async def main():
    ledger = Ledger(Path(sys.argv[1]))
    async with trio.open_nursery() as nursery:
        await nursery.start(ledger.run)
        async def write(lane):
            number = 0
            while True:
                number += 1
                sequence = await ledger.next_sequence(1)
                request = b"%d %d %s" % (lane, number, sys.argv[2].encode())
                await ledger.record_receipt(Receipt(
                    role="client", peer=PeerId.from_ed25519(bytes(32)), request_id=bytes(16), exchange=sequence,
                    request=request, receipt=bytes(1000)))
                print(sequence, request.decode(), sep=";", flush=True)
        for lane in range(8):
            nursery.start_soon(write, lane)

trio.run(main)
"""


def test_what_was_confirmed_survives_kill_9(path: Path) -> None:
    highest = 0
    for run in range(2):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(run)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(40)]
        child.send_signal(signal.SIGKILL)
        told += child.stdout.readlines()
        child.wait()
        child.stdout.close()
        confirmed = [line.strip().split(";") for line in told if line.endswith("\n")]
        assert len(confirmed) >= 40
        sequences = [int(sequence) for sequence, _ in confirmed]
        assert len(set(sequences)) == len(sequences)
        assert min(sequences) > highest
        connection = database.open_database(path)
        kept = {row[0].decode(): row[1] for row in connection.execute("SELECT request, exchange FROM receipts")}
        highest = connection.execute("SELECT value FROM settings WHERE name = 'sequence'").fetchone()[0]
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        connection.close()
        assert all(kept[request] == int(sequence) for sequence, request in confirmed)
        assert highest >= max(sequences)

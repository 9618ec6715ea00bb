"""The ledger: receipts, known peers and the sequence counter in one SQLite file.

One task owns the connection. Callers put jobs into a bounded queue; the task takes whatever waits, runs it in a worker
thread as ONE transaction and tells each caller when that is on disk: while one commit waits for the disk the next
batch gathers, so the cost of a sync is shared.

Source: https://www.sqlite.org/wal.html, https://www.sqlite.org/pragma.html#pragma_synchronous
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import structlog
import trio

from lloom_sidecar.ids import Multiaddr, PeerId

from . import receipts
from .database import open_database
from .errors import LedgerBusyError, LedgerClosedError, LedgerConflictError, LedgerFullError, translated
from .receipts import Wanted
from .records import Kept, KnownPeer, Receipt, Role, UsageKey, UsageRow

T = TypeVar("T")

MAX_QUEUE: Final = 1024
"""Jobs that wait for the writer before callers wait themselves."""
MAX_BATCH: Final = 256
"""Jobs of one transaction: bounds how long its first caller waits for the others."""
MAX_KNOWN_PEERS: Final = 1_000
"""Peers that are remembered for the next start, the last seen ones."""
PRUNE_EVERY: Final = 1_024
"""Writes between two prunings."""
MIN_FREE_BYTES: Final = 16 * 1024 * 1024
"""With less room on the disk nothing new is begun that has to be written down: what is under way can still be."""
DAY_MS: Final = 24 * 3600 * 1000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Retention:
    """How much is kept: the oldest receipts go first."""

    days: int = 400
    """A year's bills, and time to dispute them."""
    max_bytes: int = 2 * 1024 * 1024 * 1024
    """Content of the file; a receipt with its index entries takes about 1.5 KiB."""


class _Job(Generic[T]):
    __slots__ = ("done", "error", "is_awaited", "result", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], T], *, is_awaited: bool) -> None:
        self.work = work
        self.is_awaited = is_awaited
        self.done = trio.Event()
        self.result: T | None = None
        self.error: BaseException | None = None


class Ledger:
    """The store. ``run`` is its service, once in its life; every other method needs it to be running.

    Args:
        path: the file; its folder must exist. Made with mode 0600.
        max_bytes: limit of the file's size, None = the disk's; over it ``LedgerFullError``.
        retention: how much is kept.
        now_ms: the clock that receipts are dated by, Unix milliseconds.

    Cancelling a caller leaves the store usable: a job still waiting for room in the queue is not written, one in the
    queue is written all the same.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int | None = None,
        retention: Retention | None = None,
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._retention = retention or Retention()
        self._now_ms = now_ms
        self._free_bytes: int | None = None
        self._send, self._receive = trio.open_memory_channel[_Job[Any]](MAX_QUEUE)
        self._is_open = False
        self._writes = 0
        self._thread_limiter = trio.CapacityLimiter(1)
        self.failed_writes = 0
        """Jobs given to a ``_nowait`` method that were not written: they failed, or the queue was full."""
        self.last_error: str | None = None
        """Why the last write failed for want of room or for damage; None when a later one succeeded."""

    def trouble(self) -> str | None:
        """Why nothing new should begin that has to be written down, a sentence; None while all is well."""
        if self.last_error is not None:
            return self.last_error
        if self._free_bytes is not None and self._free_bytes < MIN_FREE_BYTES:
            return (
                f"{self._free_bytes // 1024} KiB are free where {self._path} is; "
                f"{MIN_FREE_BYTES // 1024 // 1024} MiB are the least"
            )
        return None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the file, say started, and write until cancelled; then write what is in the queue and close.

        Raises:
            StartError: the file cannot be used (damaged, of a newer version, no permission), with the remedy.
        """
        connection = await trio.to_thread.run_sync(
            open_database, self._path, self._max_bytes, limiter=self._thread_limiter
        )
        try:
            self._is_open = True
            self._look_at_disk()
            task_status.started()
            while True:
                batch = [await self._receive.receive()]
                self._gather(batch)
                await self._write(connection, batch)
        finally:
            self._is_open = False
            with trio.CancelScope(shield=True):
                await self._finish(connection)

    async def _finish(self, connection: sqlite3.Connection) -> None:
        self._send.close()
        while True:
            batch: list[_Job[Any]] = []
            self._gather(batch)
            if not batch:
                break
            await self._write(connection, batch)
        self._receive.close()
        await trio.to_thread.run_sync(connection.close, limiter=self._thread_limiter)

    async def _write(self, connection: sqlite3.Connection, batch: list[_Job[Any]]) -> None:
        # Shielded: whoever waits for a job that left the queue must hear of it.
        with trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(self._commit, connection, batch, limiter=self._thread_limiter)
            finally:
                self._tell(batch)

    def _gather(self, batch: list[_Job[Any]]) -> None:
        try:
            while len(batch) < MAX_BATCH:
                batch.append(self._receive.receive_nowait())
        except (trio.WouldBlock, trio.EndOfChannel):
            return

    def _tell(self, batch: Iterable[_Job[Any]]) -> None:
        for job in batch:
            job.done.set()
            if job.error is None:
                if not job.is_awaited:  # of the others some only read
                    self.last_error = None
                continue
            if isinstance(job.error, LedgerFullError) or not (job.is_awaited or _is_callers_fault(job.error)):
                self.last_error = str(job.error)
            if not job.is_awaited:
                self.failed_writes += 1
                _log.error("ledger_write_failed", code=getattr(job.error, "code", "internal"), reason=str(job.error))

    # ------------------------------------------------------------ in the worker thread
    def _commit(self, connection: sqlite3.Connection, batch: list[_Job[Any]]) -> None:
        """Run a batch as one transaction. A job that fails undoes itself only; every failure is handed to its job."""
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job in batch:
                self._run_one(connection, job)
            connection.execute("COMMIT")
        except Exception as exc:  # noqa: BLE001 - handed to everybody who waits for this batch
            for job in batch:
                job.error = job.error or translated(exc, self._path)
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        self._prune(connection, len(batch))
        self._look_at_disk()

    def _look_at_disk(self) -> None:
        try:
            found = os.statvfs(self._path)
        except OSError:
            return  # the next write says what is wrong
        self._free_bytes = found.f_bavail * found.f_frsize

    def _run_one(self, connection: sqlite3.Connection, job: _Job[Any]) -> None:
        connection.execute("SAVEPOINT job")
        try:
            job.result = job.work(connection)
        except Exception as exc:
            job.error = translated(exc, self._path)
            if not connection.in_transaction:
                # SQLite undoes the whole transaction when the disk is full: so did the jobs before this one.
                raise
            connection.execute("ROLLBACK TO job")
        connection.execute("RELEASE job")

    def _prune(self, connection: sqlite3.Connection, writes: int) -> None:
        is_due = self._writes % PRUNE_EVERY + writes >= PRUNE_EVERY or self._writes == 0
        self._writes += writes
        if is_due:
            oldest_ms = self._now_ms() - self._retention.days * DAY_MS
            try:
                receipts.prune(connection, oldest_ms=oldest_ms, keep_bytes=self._retention.max_bytes)
            except sqlite3.Error as exc:
                _log.error("ledger_not_pruned", reason=str(exc))

    # ------------------------------------------------------------ jobs
    async def _call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        self._check_open()
        job = _Job(work, is_awaited=True)
        try:
            await self._send.send(job)
        except (trio.ClosedResourceError, trio.BrokenResourceError):
            raise _closed() from None
        await job.done.wait()
        if job.error is not None:
            raise job.error
        result: T = job.result  # type: ignore[assignment]  # set by the writer before done
        return result

    def _post(self, work: Callable[[sqlite3.Connection], object]) -> None:
        self._check_open()
        try:
            self._send.send_nowait(_Job(work, is_awaited=False))
        except trio.WouldBlock:
            self.failed_writes += 1
            raise LedgerBusyError("the ledger's queue is full: the disk does not keep up") from None

    def _check_open(self) -> None:
        if not self._is_open:
            raise _closed()

    async def flush(self) -> None:
        """Return when everything given before is on disk. Raises LedgerFullError, LedgerClosedError, LedgerError."""
        await self._call(lambda connection: None)

    async def next_sequence(self, now_ms: int) -> int:
        """The next sequence number: max(the last + 1, ``now_ms``), on disk before it is returned.

        So no number is used twice, though the clock goes back or the node is killed.
        Raises LedgerFullError, LedgerClosedError, LedgerError.
        """

        def work(connection: sqlite3.Connection) -> int:
            row = connection.execute("SELECT value FROM settings WHERE name = 'sequence'").fetchone()
            sequence = max(now_ms, 0 if row is None else int(row[0]) + 1)
            connection.execute("INSERT OR REPLACE INTO settings (name, value) VALUES ('sequence', ?)", (sequence,))
            return sequence

        return await self._call(work)

    async def record_receipt(self, receipt: Receipt) -> None:
        """Keep ``receipt``; on disk at return. The same again fills in what was missing (receipt, ack, salt).

        Raises:
            LedgerConflictError: another receipt or ack is kept for the same request, or another exchange is owed for
                the same idempotency key. Nothing was written.
            LedgerFullError, LedgerClosedError, LedgerError.
        """
        await self._call(lambda connection: receipts.record(connection, receipt))

    def record_receipt_nowait(self, receipt: Receipt) -> None:
        """Like ``record_receipt`` for the hot path: queued, on disk soon. A failure is counted in ``failed_writes``.

        A second owed one of the client for a key is kept as not owed, ``duplicate``.
        Raises LedgerBusyError, LedgerClosedError.
        """
        self._post(lambda connection: receipts.record_settled(connection, receipt))

    async def record_ack(self, *, role: Role, request_digest: bytes, ack: bytes) -> bool:
        """Keep the countersignature; the first one stays. False when there is no such exchange.

        Raises LedgerFullError, LedgerClosedError, LedgerError.
        """
        return await self._call(lambda connection: receipts.acknowledge(connection, role, request_digest, ack))

    def record_ack_nowait(self, *, role: Role, request_digest: bytes, ack: bytes) -> None:
        """Like ``record_ack``, queued. Raises LedgerBusyError, LedgerClosedError."""
        self._post(lambda connection: receipts.acknowledge(connection, role, request_digest, ack))

    async def settle(self, *, role: Role, request_digest: bytes, is_owed: bool, reason: str = "") -> bool:
        """Say whether an exchange is owed, and why not. False when there is no such exchange.

        Raises:
            LedgerConflictError: another exchange is owed for the same idempotency key.
            LedgerFullError, LedgerClosedError, LedgerError.
        """
        return await self._call(lambda connection: receipts.settle(connection, role, request_digest, is_owed, reason))

    async def find(self, wanted: Wanted, limit: int = 100) -> list[Kept]:
        """Exchanges, the newest first. Raises LedgerClosedError, LedgerError."""
        return await self._call(lambda connection: receipts.find(connection, wanted, limit))

    async def recent_receipts(
        self, limit: int = 100, *, role: Role | None = None, request_id: bytes | None = None
    ) -> list[Receipt]:
        """The newest receipts first, of one role or request where given. Raises LedgerClosedError, LedgerError."""
        return [kept.receipt for kept in await self.find(Wanted(role=role, request_id=request_id), limit)]

    async def usage(
        self, by: UsageKey, *, role: Role | None = None, since_ms: int = 0, until_ms: int = 2**63 - 1
    ) -> list[UsageRow]:
        """Sums by model, peer or day (UTC). Raises LedgerClosedError, LedgerError."""
        return await self._call(lambda connection: receipts.usage(connection, by, role, since_ms, until_ms))

    async def probe(self) -> None:
        """Write something small, so that ``trouble`` tells of now. Raises LedgerFullError, LedgerClosedError,
        LedgerError."""

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO settings (name, value) VALUES ('probed_at_ms', ?)", (self._now_ms(),)
            )

        await self._call(work)
        self.last_error = None

    async def remember_peer(self, known: KnownPeer) -> None:
        """Keep a peer for the next start; of more than 1,000 the ones seen longest ago go.

        Raises LedgerFullError, LedgerClosedError, LedgerError.
        """

        def work(connection: sqlite3.Connection) -> None:
            addrs = "\n".join(str(addr) for addr in known.addrs)
            connection.execute(
                "INSERT OR REPLACE INTO known_peers (peer, addrs, roles, last_seen_ms) VALUES (?, ?, ?, ?)",
                (known.peer.raw, addrs, " ".join(sorted(known.roles)), known.last_seen_ms),
            )
            connection.execute(
                "DELETE FROM known_peers WHERE peer IN "
                "(SELECT peer FROM known_peers ORDER BY last_seen_ms DESC LIMIT -1 OFFSET ?)",
                (MAX_KNOWN_PEERS,),
            )

        await self._call(work)

    async def forget_peer(self, peer: PeerId) -> None:
        """Drop a peer, known or not. Raises LedgerFullError, LedgerClosedError, LedgerError."""
        await self._call(
            lambda connection: connection.execute("DELETE FROM known_peers WHERE peer = ?", (peer.raw,)).rowcount
        )

    async def known_peers(self) -> list[KnownPeer]:
        """Those remembered, the last seen first. Raises LedgerClosedError, LedgerError."""

        def work(connection: sqlite3.Connection) -> list[KnownPeer]:
            rows = connection.execute(
                "SELECT peer, addrs, roles, last_seen_ms FROM known_peers ORDER BY last_seen_ms DESC, peer"
            )
            return [
                KnownPeer(
                    PeerId(peer),
                    tuple(Multiaddr.parse(text) for text in addrs.split("\n") if text),
                    frozenset(roles.split()),
                    last_seen_ms,
                )
                for peer, addrs, roles, last_seen_ms in rows
            ]

        return await self._call(work)


def _closed() -> LedgerClosedError:
    return LedgerClosedError("the ledger is not open")


def _is_callers_fault(error: BaseException) -> bool:
    return isinstance(error, LedgerConflictError)

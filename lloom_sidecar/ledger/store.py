"""The ledger: receipts, known peers and the sequence counter in one SQLite file.

One task owns the connection. Callers put jobs into a bounded queue; the task takes whatever waits, runs it in a worker
thread as ONE transaction and tells each caller when that is on disk: while one commit waits for the disk the next
batch gathers, so the cost of a sync is shared.

Source: https://www.sqlite.org/wal.html, https://www.sqlite.org/pragma.html#pragma_synchronous
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar

import structlog
import trio

from lloom_sidecar.errors import LloomError, StartError
from lloom_sidecar.ids import Multiaddr, PeerId

from .schema import MIGRATIONS

T = TypeVar("T")
Role = Literal["client", "executor"]

MAX_QUEUE: Final = 1024
"""Jobs that wait for the writer before callers wait themselves."""
MAX_BATCH: Final = 256
"""Jobs of one transaction: bounds how long its first caller waits for the others."""
MAX_KNOWN_PEERS: Final = 1_000
"""Peers that are remembered for the next start, the last seen ones."""
MAX_RECEIPTS: Final = 1_000_000
"""Receipts that are kept, the newest ones; about 1 KiB each."""
PRUNE_EVERY: Final = 1_024
"""Writes between two prunings."""
QUICK_CHECK_MAX_BYTES: Final = 64 * 1024 * 1024
"""Up to this size the whole file is checked at the start (under 0.3 s); above it damage shows when a page is read."""
MAX_INTEGER: Final = 2**63 - 1
"""SQLite's largest."""

_log = structlog.get_logger(__name__)


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


@dataclass(frozen=True, slots=True)
class Receipt:
    """One exchange, as its client or its executor keeps it."""

    role: Role
    """What this node was in it."""
    peer: PeerId
    """The other side."""
    request_id: bytes
    """The same for every attempt at one request."""
    exchange: int
    """Number of the exchange on its stream."""
    request: bytes = field(repr=False)
    """Envelope of the REQUEST. With ``role`` it is the key: no two requests have the same bytes."""
    receipt: bytes | None = field(default=None, repr=False)
    """END's envelope, or a checkpoint's; None when none came."""
    ack: bytes | None = field(default=None, repr=False)
    """The client's countersignature."""
    is_owed: bool = False
    reason: str = ""
    """Why it is not owed: lost, hedged, refused, ..."""
    salt: bytes = field(default=b"", repr=False)
    """Opens the digests of body and answer to a guess: leaves this node only when exported on purpose."""
    idempotency_key: bytes = b""
    """At most one exchange of a client is owed per key; empty = no key."""
    created_at_ms: int = 0
    """Unix milliseconds."""

    def __post_init__(self) -> None:
        if not 0 <= self.exchange <= MAX_INTEGER or not 0 <= self.created_at_ms <= MAX_INTEGER:
            raise ValueError("a receipt's numbers lie between 0 and 2^63 - 1")

    @property
    def request_digest(self) -> bytes:
        """SHA-256 of the REQUEST's envelope: what ``record_ack`` and ``settle`` ask for."""
        return hashlib.sha256(self.request).digest()


@dataclass(frozen=True, slots=True)
class KnownPeer:
    """A peer worth dialling at the next start."""

    peer: PeerId
    addrs: tuple[Multiaddr, ...]
    roles: frozenset[str]
    last_seen_ms: int
    """Unix milliseconds."""


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
        max_receipts: the newest ones are kept.

    Cancelling a caller leaves the store usable: a job still waiting for room in the queue is not written, one in the
    queue is written all the same.
    """

    def __init__(self, path: Path, *, max_bytes: int | None = None, max_receipts: int = MAX_RECEIPTS) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._max_receipts = max_receipts
        self._send, self._receive = trio.open_memory_channel[_Job[Any]](MAX_QUEUE)
        self._is_open = False
        self._writes = 0
        self._thread_limiter = trio.CapacityLimiter(1)
        self.failed_writes = 0
        """Jobs given by a ``_nowait`` method that could not be written."""
        self.last_error: str | None = None
        """Sentence of the last of them, None when a later one succeeded: a health condition."""

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
            if job.is_awaited:
                continue
            if job.error is None:
                self.last_error = None
                continue
            self.failed_writes += 1
            self.last_error = str(job.error)
            _log.error("ledger_write_failed", code=getattr(job.error, "code", "internal"), reason=self.last_error)

    # ------------------------------------------------------------ in the worker thread
    def _commit(self, connection: sqlite3.Connection, batch: list[_Job[Any]]) -> None:
        """Run a batch as one transaction. A job that fails undoes itself only; every failure is handed to its job."""
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job in batch:
                self._run_one(connection, job)
            self._prune(connection, len(batch))
            connection.execute("COMMIT")
        except Exception as exc:  # noqa: BLE001 - handed to everybody who waits for this batch
            for job in batch:
                job.error = job.error or _translated(exc, self._path)
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _run_one(self, connection: sqlite3.Connection, job: _Job[Any]) -> None:
        connection.execute("SAVEPOINT job")
        try:
            job.result = job.work(connection)
        except Exception as exc:
            job.error = _translated(exc, self._path)
            if not connection.in_transaction:
                # SQLite undoes the whole transaction when the disk is full: so did the jobs before this one.
                raise
            connection.execute("ROLLBACK TO job")
        connection.execute("RELEASE job")

    def _prune(self, connection: sqlite3.Connection, writes: int) -> None:
        before = self._writes // PRUNE_EVERY
        self._writes += writes
        if self._writes // PRUNE_EVERY == before:
            return
        connection.execute("DELETE FROM receipts WHERE id <= (SELECT max(id) FROM receipts) - ?", (self._max_receipts,))

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
        await self._call(lambda connection: _record(connection, receipt))

    def record_receipt_nowait(self, receipt: Receipt) -> None:
        """Like ``record_receipt`` for the hot path: queued, on disk soon. A failure is counted in ``failed_writes``.

        Raises LedgerBusyError, LedgerClosedError.
        """
        self._post(lambda connection: _record(connection, receipt))

    async def record_ack(self, *, role: Role, request_digest: bytes, ack: bytes) -> bool:
        """Keep the countersignature; the first one stays. False when there is no such exchange.

        Raises LedgerFullError, LedgerClosedError, LedgerError.
        """
        return await self._call(lambda connection: _acknowledge(connection, role, request_digest, ack))

    def record_ack_nowait(self, *, role: Role, request_digest: bytes, ack: bytes) -> None:
        """Like ``record_ack``, queued. Raises LedgerBusyError, LedgerClosedError."""
        self._post(lambda connection: _acknowledge(connection, role, request_digest, ack))

    async def settle(self, *, role: Role, request_digest: bytes, is_owed: bool, reason: str = "") -> bool:
        """Say whether an exchange is owed, and why not. False when there is no such exchange.

        Raises:
            LedgerConflictError: another exchange is owed for the same idempotency key.
            LedgerFullError, LedgerClosedError, LedgerError.
        """

        def work(connection: sqlite3.Connection) -> bool:
            cursor = connection.execute(
                "UPDATE receipts SET is_owed = ?, reason = ? WHERE role = ? AND request_digest = ?",
                (is_owed, reason, role, request_digest),
            )
            return cursor.rowcount > 0

        return await self._call(work)

    async def recent_receipts(
        self, limit: int = 100, *, role: Role | None = None, request_id: bytes | None = None
    ) -> list[Receipt]:
        """The newest receipts first, of one role or request where given. Raises LedgerClosedError, LedgerError."""

        def work(connection: sqlite3.Connection) -> list[Receipt]:
            rows = connection.execute(
                "SELECT role, peer, request_id, exchange, request, receipt, ack, is_owed, reason, salt, "
                "idempotency_key, created_at_ms FROM receipts "
                "WHERE (?1 IS NULL OR role = ?1) AND (?2 IS NULL OR request_id = ?2) ORDER BY id DESC LIMIT ?3",
                (role, request_id, max(0, limit)),
            )
            return [
                Receipt(
                    role=row[0],
                    peer=PeerId(row[1]),
                    request_id=row[2],
                    exchange=row[3],
                    request=row[4],
                    receipt=row[5],
                    ack=row[6],
                    is_owed=bool(row[7]),
                    reason=row[8],
                    salt=row[9],
                    idempotency_key=row[10] or b"",
                    created_at_ms=row[11],
                )
                for row in rows
            ]

        return await self._call(work)

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


def _translated(exc: BaseException, path: Path) -> LloomError:
    """The one place where SQLite's errors become ours."""
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


def _record(connection: sqlite3.Connection, receipt: Receipt) -> None:
    digest = receipt.request_digest
    row = connection.execute(
        "SELECT id, receipt, ack FROM receipts WHERE role = ? AND request_digest = ?", (receipt.role, digest)
    ).fetchone()
    if row is None:
        connection.execute(
            "INSERT INTO receipts (role, peer, request_id, exchange, request_digest, request, receipt, ack, is_owed, "
            "reason, salt, idempotency_key, created_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                receipt.role,
                receipt.peer.raw,
                receipt.request_id,
                receipt.exchange,
                digest,
                receipt.request,
                receipt.receipt,
                receipt.ack,
                receipt.is_owed,
                receipt.reason,
                receipt.salt,
                receipt.idempotency_key or None,
                receipt.created_at_ms,
            ),
        )
        return
    row_id, *kept = row
    for name, old, new in zip(("receipt", "ack"), kept, (receipt.receipt, receipt.ack), strict=True):
        if old is not None and new is not None and old != new:
            raise LedgerConflictError(f"another {name} is kept for the same request")
    connection.execute(
        "UPDATE receipts SET receipt = coalesce(receipt, ?), ack = coalesce(ack, ?), is_owed = ?, reason = ?, "
        "salt = CASE WHEN salt = x'' THEN ? ELSE salt END WHERE id = ?",
        (receipt.receipt, receipt.ack, receipt.is_owed, receipt.reason, receipt.salt, row_id),
    )


def _acknowledge(connection: sqlite3.Connection, role: Role, request_digest: bytes, ack: bytes) -> bool:
    cursor = connection.execute(
        "UPDATE receipts SET ack = coalesce(ack, ?) WHERE role = ? AND request_digest = ?", (ack, role, request_digest)
    )
    return cursor.rowcount > 0


def open_database(path: Path, max_bytes: int | None = None) -> sqlite3.Connection:
    """Open or make the file, with this version's schema. Blocks: call it in a thread.

    Raises:
        StartError: one sentence with the remedy.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # An existing file may have been copied with other rights; -wal and -shm take over those of the file.
        path.chmod(0o600)
    except OSError as exc:
        raise StartError(f"the ledger {path} cannot be opened: {exc.strerror}; check the folder and its owner") from exc
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA trusted_schema = OFF")
        if max_bytes is not None:
            page_bytes = connection.execute("PRAGMA page_size").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count = {max(1, max_bytes // page_bytes)}")
        if path.stat().st_size <= QUICK_CHECK_MAX_BYTES:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
        _migrate(connection, path)
    except sqlite3.Error as exc:
        connection.close()
        raise _start_error(exc, path) from exc
    except BaseException:
        connection.close()
        raise
    return connection


def _start_error(exc: sqlite3.Error, path: Path) -> StartError:
    primary = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
    if primary == sqlite3.SQLITE_FULL:
        return StartError(f"no room for the ledger {path}: free disk space, or raise the ledger's limit")
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StartError(
            f"the ledger {path} is damaged ({exc}): move it away (mv {path} {path}.damaged) and start again; a new one "
            f"is made, and `sqlite3 {path}.damaged .recover` shows what can still be read"
        )
    return StartError(f"the ledger {path} cannot be used: {exc}; is another node running in the same home?")


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    # All steps or none: what fails is undone when ``open_database`` closes the connection.
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(
        "CREATE TABLE IF NOT EXISTS migrations (version INTEGER PRIMARY KEY, "
        "applied_at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP) STRICT"
    )
    version = connection.execute("SELECT coalesce(max(version), 0) FROM migrations").fetchone()[0]
    if version > len(MIGRATIONS):
        raise StartError(
            f"the ledger {path} was written by a newer lloom-sidecar (schema {version}, this one knows "
            f"{len(MIGRATIONS)}): upgrade, or use another --home"
        )
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        for statement in statements:
            connection.execute(statement)
        connection.execute("INSERT INTO migrations (version) VALUES (?)", (number,))
    connection.execute("COMMIT")

"""From what became of an exchange to a line in the ledger, a metric, an event, a health condition."""

from __future__ import annotations

import hashlib
from typing import cast

import pytest
import trio
from trio.testing import MockClock

from lloom_sidecar.admin.events import EventBus, NetworkError
from lloom_sidecar.admin.health import HealthConditions
from lloom_sidecar.admin.metrics import Metrics
from lloom_sidecar.client.settled import Settled
from lloom_sidecar.config import Config, DayCap
from lloom_sidecar.executor.serve import ServedReceipt
from lloom_sidecar.ledger import Ledger, LedgerBusyError, LedgerFullError, Receipt, UsageRow
from lloom_sidecar.link.exchange import Call
from lloom_sidecar.link.exchange import Receipt as Signed
from lloom_sidecar.node.bookkeeping import DOUBT_S, Bookkeeping
from lloom_sidecar.node.observer import Observer
from lloom_sidecar.node.receipts import asked, served
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.fakes.request_stream import CLIENT, EXECUTOR

PEER = EXECUTOR.peer
CALL = Call(request_id=b"r" * 16, operation=1, model="m", body=b"{}", deadline_ms=1)
CLAIMS = pb.ReceiptClaims(cost=7, price=pb.Price(currency="EUR"))


class FakeLedger:
    """Keeps what it is given in lists."""

    def __init__(self) -> None:
        self.receipts: list[Receipt] = []
        self.acks: list[tuple[str, bytes, bytes]] = []
        self.failed_writes = 0
        self.problem: str | None = None
        self.probes = 0
        self.is_busy = False

    def trouble(self) -> str | None:
        return self.problem

    def record_receipt_nowait(self, receipt: Receipt) -> None:
        if self.is_busy:
            raise LedgerBusyError("busy")
        self.receipts.append(receipt)

    def record_ack_nowait(self, *, role: str, request_digest: bytes, ack: bytes) -> None:
        self.acks.append((role, request_digest, ack))

    async def usage(self, by: str, *, role: str, since_ms: int) -> list[UsageRow]:
        await trio.lowlevel.checkpoint()
        assert (by, role) == ("day", "client")
        return [UsageRow("client", "today", "EUR", 2, 1, 3, 4, 30)]

    async def probe(self) -> None:
        await trio.lowlevel.checkpoint()
        self.probes += 1
        if self.problem is not None:
            raise LedgerFullError(self.problem)


class Bench:
    """The books of a node on a fake ledger, and the observer in front of them."""

    def __init__(self) -> None:
        self.ledger = FakeLedger()
        self.health = HealthConditions()
        self.events = EventBus()
        metrics = Metrics(version="1", with_process=False, health=self.health)
        config = Config(roles=("client",), max_cost_per_day=(DayCap(100, "EUR"),))
        self.books = Bookkeeping(config, cast("Ledger", self.ledger), health=self.health, metrics=metrics)
        self.metrics = metrics
        self.observer = Observer(
            metrics=metrics,
            events=self.events,
            models_of=lambda peer: (),
            roles_of=lambda peer: frozenset(),
            keep_receipt=self.books.keep,
        )


@pytest.fixture
def bench() -> Bench:
    return Bench()


def signed(*doubts: str, ack: bytes = b"ack") -> Signed:
    return Signed(CLAIMS, 3, b"envelope", b"request", b"salt", ack, doubts)


def settled(receipt: Signed | None = None, checkpoint: Signed | None = None, *, is_owed: bool = True) -> Settled:
    return Settled(
        peer=PEER,
        call=CALL,
        request=b"request",
        salt=b"salt",
        exchange=3,
        is_owed=is_owed,
        reason="" if is_owed else "hedged",
        receipt=receipt,
        checkpoint=checkpoint,
    )


def test_an_exchange_that_was_asked_for() -> None:
    kept = asked(settled(signed("too many", "too few"), signed(ack=b"")), 5)
    assert (kept.role, kept.peer, kept.receipt, kept.checkpoint, kept.ack) == (
        *("client", PEER, b"envelope"),
        *(b"envelope", b"ack"),
    )
    assert (kept.doubts, kept.is_owed, kept.created_at_ms) == ("too many; too few", True, 5)
    assert kept.idempotency_key == CALL.request_id, "without a key of the application's the request is the unit"
    lost = asked(settled(is_owed=False), 5)
    assert (lost.receipt, lost.checkpoint, lost.ack, lost.is_owed, lost.reason) == (None, None, None, False, "hedged")


def test_an_exchange_that_was_served() -> None:
    one = ServedReceipt(CLIENT.peer, b"r" * 16, 3, "m", b"request", b"salt", checkpoint=b"point", reason="cancelled")
    kept = served(one, 5)
    assert (kept.role, kept.checkpoint, kept.is_owed, kept.reason) == ("executor", b"point", True, "cancelled")
    assert not served(ServedReceipt(CLIENT.peer, b"r" * 16, 3, "m", b"request", b"salt"), 5).is_owed


def test_what_comes_is_kept_and_spent(bench: Bench) -> None:
    bench.observer.exchange_settled(settled(signed()))
    bench.observer.exchange_settled(settled(is_owed=False))
    assert [one.is_owed for one in bench.ledger.receipts] == [True, False]
    assert bench.books.spending.spent("EUR") == 7
    assert list(bench.observer.receipts) == [CALL.request_id.hex()]
    bench.observer.receipt_made(ServedReceipt(CLIENT.peer, b"r" * 16, 3, "m", b"request", b"s", receipt=b"e", ack=b"a"))
    assert bench.ledger.acks == [("executor", hashlib.sha256(b"request").digest(), b"a")]


def test_a_full_queue_holds_nobody_up(bench: Bench) -> None:
    bench.ledger.is_busy = True
    bench.observer.exchange_settled(settled(signed()))
    assert bench.ledger.receipts == []


async def test_a_restart_knows_what_was_spent_today(bench: Bench) -> None:
    await bench.books.load()
    assert bench.books.spending.left("EUR") == 70


async def test_numbers_that_cannot_be_are_shown_for_an_hour(bench: Bench, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.books.watch, bench.observer)
        bench.observer.exchange_settled(settled(signed("completion_tokens 9 of 1 bytes")))
        (event,) = [one.event for one in bench.events.recent()]
        assert isinstance(event, NetworkError)
        assert (event.code, event.peer) == ("numbers_doubtful", str(PEER))
        assert b"lloom_doubtful_receipts_total 1.0" in bench.metrics.render()
        await trio.sleep(2)
        assert "numbers_doubtful" in bench.health
        await trio.sleep(DOUBT_S)
        assert "numbers_doubtful" not in bench.health
        nursery.cancel_scope.cancel()


async def test_a_full_ledger_is_a_condition_until_a_probe_succeeds(bench: Bench, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.books.watch, bench.observer)
        await trio.sleep(3)
        assert (bench.ledger.probes, "ledger_full" in bench.health) == (0, False)
        bench.ledger.problem, bench.ledger.failed_writes = "no room", 4
        await trio.sleep(12)
        assert "ledger_full" in bench.health
        assert 2 <= bench.ledger.probes <= 4
        assert b"lloom_ledger_failed_writes 4.0" in bench.metrics.render()
        bench.ledger.problem = None
        await trio.sleep(2)
        assert "ledger_full" not in bench.health
        nursery.cancel_scope.cancel()

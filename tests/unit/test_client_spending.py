"""The day's account: caps before a request and in the middle of its answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from lloom_sidecar.client.settled import Settled
from lloom_sidecar.client.spending import DAY_MS, Spending
from lloom_sidecar.errors import RequestError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Exchange, Receipt, Sent
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.fakes.request_stream import CLIENT, EXECUTOR

EUR = Price(1, 1, "EUR")
NOON_MS = 1000 * DAY_MS + DAY_MS // 2


class FakeExchange:
    """As far as ``Spending`` looks at one."""

    def __init__(self) -> None:
        self.on_checkpoint: Callable[[pb.ReceiptClaims], None] = lambda claims: None

    def checkpoint(self, cost: int, currency: str = "EUR") -> None:
        self.on_checkpoint(pb.ReceiptClaims(cost=cost, price=pb.Price(currency=currency)))


class Desk:
    """A ``Spending`` whose exchanges are fakes."""

    def __init__(self, **caps: int) -> None:
        self.now_ms = NOON_MS
        self.trouble: str | None = None
        self.calls: list[Call] = []
        self.spending = Spending(
            caps, now_ms=lambda: self.now_ms, ledger_trouble=lambda: self.trouble, exchange_with=self._exchange
        )

    @asynccontextmanager
    async def _exchange(
        self, pool: StreamPool, signer: Signer, peer: PeerId, call: Call, on_sent: Callable[[Sent], None]
    ) -> AsyncGenerator[Exchange]:
        self.calls.append(call)
        yield cast("Exchange", FakeExchange())

    def open(self, price: Price = EUR, max_cost: int | None = None) -> Any:
        call = Call(
            request_id=bytes(16),
            operation=1,
            model="m",
            body=b"{}",
            deadline_ms=1,
            max_price=price,
            max_cost=max_cost,
        )
        pool = cast("StreamPool", None)
        return self.spending.exchange(pool, CLIENT, EXECUTOR.peer, call, lambda sent: None)

    async def max_cost_of(self, price: Price = EUR, max_cost: int | None = None) -> int | None:
        async with self.open(price, max_cost):
            return self.calls[-1].max_cost


def settled(cost: int, *, is_owed: bool = True, by: str = "receipt", currency: str = "EUR") -> Settled:
    claims = pb.ReceiptClaims(cost=cost, price=pb.Price(currency=currency))
    signed = Receipt(claims, 1, b"", b"", b"", b"")
    return Settled(
        peer=EXECUTOR.peer,
        call=Call(request_id=bytes(16), operation=1, model="m", body=b"", deadline_ms=1),
        request=b"",
        salt=b"",
        exchange=1,
        is_owed=is_owed,
        reason="",
        receipt=signed if by == "receipt" else None,
        checkpoint=signed if by == "checkpoint" else None,
    )


async def test_without_caps_nothing_is_changed() -> None:
    desk = Desk()
    assert await desk.max_cost_of() is None
    assert await desk.max_cost_of(max_cost=5) == 5
    async with desk.open() as exchange:
        exchange.checkpoint(10**12)


async def test_a_request_gets_what_is_left_of_the_day_as_its_max_cost() -> None:
    desk = Desk(EUR=100)
    assert await desk.max_cost_of() == 100
    assert await desk.max_cost_of(max_cost=7) == 7
    desk.spending.settled(settled(30))
    desk.spending.settled(settled(20, by="checkpoint"))
    desk.spending.settled(settled(40, is_owed=False))
    desk.spending.settled(settled(40, by="nothing"))
    desk.spending.settled(settled(40, currency="USD"))
    assert await desk.max_cost_of(max_cost=70) == 50
    assert desk.spending.left("EUR") == 50


async def test_over_the_cap_it_is_refused_before_it_is_sent_until_the_day_is_over() -> None:
    desk = Desk(EUR=100)
    desk.spending.add("EUR", 100)
    with pytest.raises(RequestError) as caught:
        await desk.max_cost_of()
    assert (caught.value.code, caught.value.http_status) == ("daily_cap", 402)
    assert desk.calls == []
    assert await desk.max_cost_of(Price()) is None
    desk.now_ms += DAY_MS // 2 - 1
    with pytest.raises(RequestError):
        await desk.max_cost_of()
    desk.now_ms += 1
    assert await desk.max_cost_of() == 100


async def test_a_currency_without_a_cap_is_not_paid_in_when_others_have_one() -> None:
    with pytest.raises(RequestError, match="no amount of USD is allowed"):
        await Desk(EUR=100).max_cost_of(Price(1, 1, "USD"))


async def test_answers_at_once_are_cut_when_their_checkpoints_pass_the_cap() -> None:
    desk = Desk(EUR=100)
    async with desk.open() as first:
        first.checkpoint(60)
        assert desk.spending.left("EUR") == 40
        async with desk.open() as second:
            assert desk.calls[-1].max_cost == 40
            second.checkpoint(40)
            with pytest.raises(RequestError, match="the day's 100 EUR are spent"):
                first.checkpoint(61)
    assert desk.spending.left("EUR") == 100  # until they are settled


async def test_nothing_is_bought_that_cannot_be_written_down() -> None:
    desk = Desk()
    desk.trouble = "no room"
    with pytest.raises(RequestError, match="no room") as caught:
        await desk.max_cost_of()
    assert (caught.value.code, caught.value.http_status, caught.value.retryable) == ("ledger_full", 503, True)
    assert await desk.max_cost_of(Price()) is None

"""What this node's applications may spend in a day, and the exchange that keeps to it.

Before a priced request goes out its max cost is set to what is left of the day, so that the executor stops itself
there; checkpoints show what several of them at once have come to. What was spent is what is owed in the ledger. Days
are UTC's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from lloom_sidecar.errors import RequestError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Exchange, Sent, open_exchange
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .attempt import ExchangeWith
from .settled import Settled

DAY_MS: Final = 24 * 3600 * 1000


def day_start_ms(now_ms: int) -> int:
    """The beginning of the day (UTC) that ``now_ms`` lies in."""
    return now_ms - now_ms % DAY_MS


@dataclass(slots=True, eq=False)
class _Running:
    currency: str
    cost: int = 0
    """By its last checkpoint."""


class Spending:
    """The day's account, per currency in minor units. Synchronous, but for the exchange that it watches over."""

    def __init__(
        self,
        caps: Mapping[str, int],
        *,
        now_ms: Callable[[], int],
        ledger_trouble: Callable[[], str | None],
        exchange_with: ExchangeWith = open_exchange,
    ) -> None:
        """``caps``: currency -> most that is spent in a day; empty = no limit. With any cap a currency that has none is
        not paid in. ``ledger_trouble``: why what is owed could not be written down now, None when it could.
        """
        self._caps = dict(caps)
        self._now_ms = now_ms
        self._ledger_trouble = ledger_trouble
        self._exchange_with = exchange_with
        self._day_ms = day_start_ms(now_ms())
        self._spent: dict[str, int] = {}
        self._running: set[_Running] = set()

    def spent(self, currency: str) -> int:
        """What is owed for today's exchanges that are over."""
        self._turn_day()
        return self._spent.get(currency, 0)

    def add(self, currency: str, cost: int) -> None:
        """Something is owed since the last look: at the start, what the ledger has of today."""
        self._turn_day()
        self._spent[currency] = self._spent.get(currency, 0) + cost

    def settled(self, settled: Settled) -> None:
        """An exchange is over."""
        owed = settled.receipt or settled.checkpoint
        if settled.is_owed and owed is not None and owed.claims.cost:
            self.add(owed.claims.price.currency, owed.claims.cost)

    def left(self, currency: str) -> int | None:
        """What may still be spent today, running exchanges taken off by their last checkpoints; None = any amount."""
        if not self._caps:
            return None
        running = sum(one.cost for one in self._running if one.currency == currency)
        return self._caps.get(currency, 0) - self.spent(currency) - running

    @asynccontextmanager
    async def exchange(
        self, pool: StreamPool, signer: Signer, peer: PeerId, call: Call, on_sent: Callable[[Sent], None]
    ) -> AsyncGenerator[Exchange]:
        """``open_exchange``, within the day's cap.

        Raises:
            RequestError: nothing was sent (``daily_cap``, ``ledger_full``), or the answer was cut by the cap
                (``daily_cap``).
            Else as ``open_exchange``.
        """
        if call.max_price.is_free:
            async with self._exchange_with(pool, signer, peer, call, on_sent) as exchange:
                yield exchange
            return
        trouble = self._ledger_trouble()
        if trouble is not None:
            raise RequestError(
                f"nothing is bought while it cannot be written down: {trouble}",
                code="ledger_full",
                http_status=503,
                retryable=True,
            )
        currency = call.max_price.currency
        left = self.left(currency)
        if left is not None:
            if left <= 0:
                raise self._over(currency)
            call = replace(call, max_cost=left if call.max_cost is None else min(left, call.max_cost))
        running = _Running(currency)

        def on_checkpoint(claims: pb.ReceiptClaims) -> None:
            running.cost = claims.cost
            left = self.left(currency)
            if left is not None and left < 0:
                raise self._over(currency)

        self._running.add(running)
        try:
            async with self._exchange_with(pool, signer, peer, call, on_sent) as exchange:
                exchange.on_checkpoint = on_checkpoint
                yield exchange
        finally:
            self._running.discard(running)

    def _over(self, currency: str) -> RequestError:
        cap = self._caps.get(currency)
        what = f"no amount of {currency} is allowed" if cap is None else f"the day's {cap} {currency} are spent"
        return RequestError(
            f"{what} (max_cost_per_day); executors that charge nothing can still be asked with x-lloom-max-price: free",
            code="daily_cap",
            http_status=402,
        )

    def _turn_day(self) -> None:
        day_ms = day_start_ms(self._now_ms())
        if day_ms != self._day_ms:
            self._day_ms = day_ms
            self._spent.clear()

"""What a node's exchanges come to: the ledger that keeps them, the day's spending, and what an operator should know."""

from __future__ import annotations

from contextlib import suppress
from typing import Final

import trio

from lloom_sidecar.admin.health import HealthConditions
from lloom_sidecar.admin.metrics import Metrics
from lloom_sidecar.client.settled import Settled
from lloom_sidecar.client.spending import Spending, day_start_ms
from lloom_sidecar.config import Config
from lloom_sidecar.errors import LloomError
from lloom_sidecar.executor.serve import ServedReceipt
from lloom_sidecar.ledger import Ledger, Retention

from .observer import Observer
from .receipts import ReceiptKeeper, now_ms

LOOK_S: Final = 1.0
PROBE_S: Final = 5.0
"""While the ledger has no room: how often it is tried again."""
DOUBT_S: Final = 3600.0
"""How long an executor whose numbers did not fit is shown as a health condition."""


def open_ledger(config: Config) -> Ledger:
    """The ledger of a home; nothing is read yet."""
    retention = Retention(days=config.receipts_days, max_bytes=config.receipts_max_mib << 20)
    return Ledger(config.database_file, retention=retention)


class Bookkeeping:
    """The ledger's side of one node."""

    def __init__(self, config: Config, ledger: Ledger, *, health: HealthConditions, metrics: Metrics) -> None:
        self.ledger = ledger
        caps = {cap.currency: cap.amount for cap in config.max_cost_per_day}
        self.spending = Spending(caps, now_ms=now_ms, ledger_trouble=ledger.trouble)
        self._keeper = ReceiptKeeper(ledger)
        self._health = health
        self._metrics = metrics

    def keep(self, kept: Settled | ServedReceipt) -> None:
        """An exchange got a statement, or is over."""
        if isinstance(kept, Settled):
            self.spending.settled(kept)
        self._keeper.keep(kept)

    async def load(self) -> None:
        """Take over what the ledger has of today. Raises LloomError."""
        for row in await self.ledger.usage("day", role="client", since_ms=day_start_ms(now_ms())):
            self.spending.add(row.currency, row.cost)

    async def watch(self, observer: Observer) -> None:
        """Keep the health conditions true until cancelled."""
        probe_at = trio.current_time()
        while True:
            await trio.sleep(LOOK_S)
            now = trio.current_time()
            trouble = self.ledger.trouble()
            self._metrics.set_ledger(self.ledger.failed_writes)
            self._health.update("ledger_full", trouble)
            for peer in [peer for peer, at in observer.doubtful.items() if now - at > DOUBT_S]:
                del observer.doubtful[peer]
            names = ", ".join(peer.short() for peer in list(observer.doubtful)[-3:])
            count = len(observer.doubtful)
            self._health.update("numbers_doubtful", f"{count} within the hour, lately {names}." if count else None)
            if trouble is not None and now >= probe_at:
                probe_at = now + PROBE_S
                with suppress(LloomError):  # it is told by ``trouble``
                    await self.ledger.probe()

"""Suspects are asked, the dead are dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.peerbook import PeerBook

from .connections import Connections
from .hello import HelloService

TICK_S: Final = 1.0
PROBE_TIMEOUT_S: Final = 5.0
MAX_PROBES: Final = 16
"""Suspects that one tick begins to probe."""
MAX_UNDER_WAY: Final = 2 * MAX_PROBES
"""Probes and fetches at once."""

log = structlog.get_logger("lloom.prober")


async def run_prober(
    *,
    book: PeerBook,
    connections: Connections,
    hello: HelloService,
    on_lost: Callable[[PeerId], None],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Probe suspects by hello, fetch announcements that heartbeats referred to, drop the dead; until cancelled."""
    task_status.started()
    under_way: set[PeerId] = set()
    async with trio.open_nursery() as nursery:

        async def probe(peer: PeerId) -> None:
            is_alive = False
            try:
                with trio.move_on_after(PROBE_TIMEOUT_S):
                    await connections.ensure(peer, timeout_s=PROBE_TIMEOUT_S)
                    await hello.greet(peer)
                    is_alive = True
            except LloomError as exc:
                log.debug("probe_failed", peer=str(peer), code=exc.code)
            finally:
                under_way.discard(peer)
            if is_alive:
                book.mark_alive(peer, trio.current_time())
            else:
                book.mark_failed(peer, trio.current_time())

        while True:
            now = trio.current_time()
            for peer in book.expire(now):
                on_lost(peer)
            # Only as many as there is room for: what is taken out here counts as tried.
            due = book.due_probes(now, min(MAX_PROBES, MAX_UNDER_WAY - len(under_way)))
            due += book.due_fetches(now, MAX_UNDER_WAY - len(under_way) - len(due))
            for peer in due:
                if peer not in under_way:
                    under_way.add(peer)
                    nursery.start_soon(probe, peer)
            await trio.sleep(TICK_S)

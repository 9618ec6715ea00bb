"""Telling p2pd's connection manager which peers are in use, so that a trim closes other connections first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import DaemonError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import Daemon

IN_USE_TAG: Final = "lloom-in-use"
IN_USE_WEIGHT: Final = 500
"""Below a validator's 1,000, above what the DHT (5) and gossipsub (20 at most) give. Source: go-libp2p-kad-dht,
baseConnMgrScore; go-libp2p-pubsub, GossipSubConnTagBumpMessageDelivery and its cap."""
RETAG_S: Final = 60.0
"""p2pd forgets tags with a peer's last connection, which may have come back between two looks."""

log = structlog.get_logger("lloom.tags")


class Tags:
    """Counts the uses of each peer; p2pd hears of the first and of the last one."""

    def __init__(self, get_daemon: Callable[[], Daemon]) -> None:
        self._get_daemon = get_daemon
        self._uses: Counter[PeerId] = Counter()
        self._tagged: set[PeerId] = set()
        self._wake = trio.Event()

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._uses

    def hold(self, peer: PeerId) -> None:
        """One use more."""
        self._uses[peer] += 1
        if self._uses[peer] == 1:
            self._wake.set()

    def release(self, peer: PeerId) -> None:
        """One use less."""
        self._uses[peer] -= 1
        if self._uses[peer] <= 0:
            del self._uses[peer]
            self._wake.set()

    @contextmanager
    def using(self, peer: PeerId) -> Iterator[None]:
        """``hold`` while the context lasts."""
        self.hold(peer)
        try:
            yield
        finally:
            self.release(peer)

    def forget(self) -> None:
        """p2pd was started anew and knows no tags."""
        self._tagged.clear()
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep p2pd informed until cancelled."""
        task_status.started()
        while True:
            with trio.move_on_after(RETAG_S) as scope:
                await self._wake.wait()
            self._wake = trio.Event()
            if scope.cancelled_caught:
                self._tagged.clear()
            try:
                await self._tell()
            except DaemonError as exc:
                log.info("tag_failed", code=exc.code)  # the next change, or the next minute, tries again

    async def _tell(self) -> None:
        daemon = self._get_daemon()
        for peer in [peer for peer in self._uses if peer not in self._tagged]:
            self._tagged.add(peer)
            await daemon.tag_peer(peer, IN_USE_TAG, IN_USE_WEIGHT)
        for peer in [peer for peer in self._tagged if peer not in self._uses]:
            self._tagged.discard(peer)
            await daemon.untag_peer(peer, IN_USE_TAG)

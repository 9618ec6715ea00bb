"""The DHT: telling it what this node is, and asking it who serves a model. A provider record is only a hint; it leads
to a hello, and the signed announcement that comes with it is what counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import DaemonError, LloomError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.daemon import Daemon, PeerAddrs
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.protocol.names import SERVICE_EXECUTOR, service_cid, service_model

from .connections import Connections
from .hello import HelloService

REPROVIDE_S: Final = 12 * 3600.0
"""Records live 48 h in the DHT. Source: kad-dht, ProvideValidity."""
PROVIDE_RETRY_S: Final = 2.0
MAX_PROVIDE_RETRY_S: Final = 60.0
PROVIDE_TIMEOUT_S: Final = 60.0
LOOK_UP_TIMEOUT_S: Final = 3.0
PROVIDERS: Final = 100
"""That one search asks for. Records of the dead live on for up to 48 h, and must not crowd out the living."""
MAX_PROVIDES: Final = 4
"""Records that are put at once: a slow one does not hold up the others."""
MAX_GREETS: Final = 16
"""Providers that are greeted at once."""
DIAL_TIMEOUT_S: Final = 3.0
"""A record outlives its executor by up to 48 h: the dead are not waited for."""
DEAD_S: Final = 60.0
"""How long a provider that did not answer is left alone."""
MAX_DEAD: Final = 1024
SEARCH_EVERY_S: Final = 60.0
SEARCH_TIMEOUT_S: Final = 20.0

log = structlog.get_logger("lloom.discovery")


class Discovery:
    """One node's use of the DHT."""

    def __init__(
        self,
        *,
        me: PeerId,
        service_keys: Callable[[], Iterable[str]],
        get_daemon: Callable[[], Daemon],
        connections: Connections,
        hello: HelloService,
        book: PeerBook,
        on_found: Callable[[float], None],
        keeps_away: Callable[[PeerId], str | None] = lambda peer: None,
        is_alone: Callable[[], bool] = lambda: False,
        dialable: Callable[[Sequence[Multiaddr]], Sequence[Multiaddr]] = lambda addrs: addrs,
    ) -> None:
        """``service_keys``: what this node is a provider of now; ``on_found``: seconds of a look-up to a hit.
        ``keeps_away``: why a peer is not dialled, or None; ``is_alone``: no validator's catalogue tells of executors,
        so that the DHT is asked now and then though some are known; ``dialable``: those of a record's addresses that
        this host may dial.
        """
        self._me = me
        self._service_keys = service_keys
        self._get_daemon = get_daemon
        self._connections = connections
        self._hello = hello
        self._book = book
        self._on_found = on_found
        self._keeps_away = keeps_away
        self._is_alone = is_alone
        self._dialable = dialable
        self._dead: OrderedDict[PeerId, float] = OrderedDict()
        self._changed = trio.Event()
        self._provided_at: dict[str, float] = {}

    def changed(self) -> None:
        """The service keys changed."""
        self._changed.set()

    def forget_provided(self) -> None:
        """p2pd restarted: provide everything again."""
        self._provided_at.clear()
        self.changed()

    async def run(self, *, searches: bool, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the provider records alive, and (``searches``) look for executors now and then, until cancelled."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_provided)
            if searches:
                nursery.start_soon(self._search_now_and_then)

    async def look_up(self, model: str, *, timeout_s: float = LOOK_UP_TIMEOUT_S) -> None:
        """Ask the DHT for executors of ``model``, greet them; returns at the first that offers it or at time-out."""
        began_at = trio.current_time()

        def is_found() -> bool:
            return bool(self._book.executors_of(model, trio.current_time()))

        await self._find(service_model(model), timeout_s, is_found)
        if is_found():
            self._on_found(trio.current_time() - began_at)

    async def _search_now_and_then(self) -> None:
        pause_s = PROVIDE_RETRY_S
        while True:
            if len(self._book) == 0 or self._is_alone():
                await self._find(SERVICE_EXECUTOR, SEARCH_TIMEOUT_S, lambda: False)
            # What the first search found may not be all: the routing table has only just begun to fill.
            pause_s = min(SEARCH_EVERY_S, 2 * pause_s) if len(self._book) else PROVIDE_RETRY_S
            await trio.sleep(pause_s)

    async def _find(self, key: str, timeout_s: float, is_enough: Callable[[], bool]) -> None:
        places = trio.CapacityLimiter(MAX_GREETS)
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:

                async def greet(provider: PeerAddrs) -> None:
                    try:
                        async with places:
                            await self._greet(provider)
                    except LloomError as exc:
                        log.debug("provider_not_greeted", peer=str(provider.peer), code=exc.code)
                    if is_enough():
                        nursery.cancel_scope.cancel()

                try:
                    async with self._get_daemon().find_providers(
                        service_cid(key), count=PROVIDERS, timeout_s=timeout_s
                    ) as found:
                        async for provider in found:
                            if self._is_worth_a_dial(provider.peer):
                                nursery.start_soon(greet, provider)
                except DaemonError as exc:
                    log.debug("look_up_failed", code=exc.code)

    def _is_worth_a_dial(self, peer: PeerId) -> bool:
        if peer == self._me or self._keeps_away(peer) is not None:
            return False
        return peer in self._connections or self._dead.get(peer, float("-inf")) + DEAD_S < trio.current_time()

    async def _greet(self, provider: PeerAddrs) -> None:
        peer = provider.peer
        try:
            await self._connections.ensure(peer, timeout_s=DIAL_TIMEOUT_S, addrs=self._dialable(provider.addrs))
            await self._hello.greet(peer)
        except LloomError:
            self._dead[peer] = trio.current_time()
            self._dead.move_to_end(peer)
            if len(self._dead) > MAX_DEAD:
                self._dead.popitem(last=False)
            raise
        self._dead.pop(peer, None)

    async def _keep_provided(self) -> None:
        async with trio.open_nursery() as nursery:
            places = trio.CapacityLimiter(MAX_PROVIDES)
            under_way: set[str] = set()

            async def provide(key: str) -> None:
                try:
                    await self._provide(key, places)
                finally:
                    under_way.discard(key)

            while True:
                self._changed = trio.Event()
                keys = set(self._service_keys())
                # What is not offered any more is provided anew when it comes back.
                for key in self._provided_at.keys() - keys:
                    del self._provided_at[key]
                now = trio.current_time()
                for key in keys - under_way:
                    if now - self._provided_at.get(key, float("-inf")) > REPROVIDE_S:
                        under_way.add(key)
                        nursery.start_soon(provide, key)
                with trio.move_on_after(REPROVIDE_S / 12):
                    await self._changed.wait()

    async def _provide(self, key: str, places: trio.CapacityLimiter) -> None:
        """Put one record; tries until it is there or not wanted any more."""
        retry_s = PROVIDE_RETRY_S
        while key in self._service_keys():
            changed = self._changed
            try:
                async with places:
                    await self._get_daemon().provide(service_cid(key), timeout_s=PROVIDE_TIMEOUT_S)
                self._provided_at[key] = trio.current_time()
                return
            except DaemonError as exc:
                # Usual at start: the routing table is empty until the first peer is there.
                log.debug("provide_failed", key=key, code=exc.code)
            with trio.move_on_after(retry_s):
                await changed.wait()
            retry_s = min(MAX_PROVIDE_RETRY_S, retry_s * 2)

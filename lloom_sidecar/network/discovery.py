"""The DHT: telling it what this node is, and asking it who serves a model. A provider record is only a hint; it leads
to a hello, and the signed announcement that comes with it is what counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import DaemonError, LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import Daemon
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
PROVIDERS: Final = 20
MAX_GREETS: Final = 8
"""Providers that are greeted at once."""
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
    ) -> None:
        """``service_keys``: what this node is a provider of now; ``on_found``: seconds of a look-up to a hit."""
        self._me = me
        self._service_keys = service_keys
        self._get_daemon = get_daemon
        self._connections = connections
        self._hello = hello
        self._book = book
        self._on_found = on_found
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
        while True:
            if len(self._book) == 0:
                await self._find(SERVICE_EXECUTOR, SEARCH_TIMEOUT_S, lambda: False)
            await trio.sleep(SEARCH_EVERY_S if len(self._book) else PROVIDE_RETRY_S)

    async def _find(self, key: str, timeout_s: float, is_enough: Callable[[], bool]) -> None:
        places = trio.CapacityLimiter(MAX_GREETS)
        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:

                async def greet(peer: PeerId) -> None:
                    try:
                        async with places:
                            await self._connections.ensure(peer)
                            await self._hello.greet(peer)
                    except LloomError as exc:
                        log.debug("provider_not_greeted", peer=str(peer), code=exc.code)
                    if is_enough():
                        nursery.cancel_scope.cancel()

                try:
                    async with self._get_daemon().find_providers(
                        service_cid(key), count=PROVIDERS, timeout_s=timeout_s
                    ) as found:
                        async for provider in found:
                            if provider.peer != self._me:
                                nursery.start_soon(greet, provider.peer)
                except DaemonError as exc:
                    log.debug("look_up_failed", code=exc.code)

    async def _keep_provided(self) -> None:
        retry_s = PROVIDE_RETRY_S
        while True:
            now = trio.current_time()
            keys = list(self._service_keys())
            due = [key for key in keys if now - self._provided_at.get(key, float("-inf")) > REPROVIDE_S]
            is_complete = True
            for key in due:
                try:
                    await self._get_daemon().provide(service_cid(key), timeout_s=PROVIDE_TIMEOUT_S)
                    self._provided_at[key] = trio.current_time()
                except DaemonError as exc:
                    # Usual at start: the routing table is empty until the first peer is there.
                    log.debug("provide_failed", key=key, code=exc.code)
                    is_complete = False
            retry_s = REPROVIDE_S / 12 if is_complete else min(MAX_PROVIDE_RETRY_S, retry_s * 2)
            with trio.move_on_after(retry_s if not is_complete else REPROVIDE_S / 12):
                await self._changed.wait()
                retry_s = PROVIDE_RETRY_S
            self._changed = trio.Event()
            if is_complete:
                retry_s = PROVIDE_RETRY_S

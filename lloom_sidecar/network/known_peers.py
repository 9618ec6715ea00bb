"""Peers of earlier: members are remembered with the addresses that worked, and dialled when no validator answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
import trio

from lloom_sidecar.errors import DaemonError, LloomError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.daemon import Daemon

from .bootstrap import take_catalogue
from .connections import Connections
from .hello import HelloService
from .intake import Intake

LOOK_S: Final = 5.0
REMEMBER_AGAIN_S: Final = 3600.0
"""How long what is remembered counts as current."""
MAX_A_LOOK: Final = 16
"""Peers that one look writes down."""
MAX_ADDRS: Final = 8
ADDRS_TIMEOUT_S: Final = 3.0
DIAL_TIMEOUT_S: Final = 4.0
MAX_DIALS: Final = 8
"""At once."""
MAX_TRIES: Final = 64
"""Of one rejoin: those seen last."""
WANTED: Final = 4
"""Members that are enough to find the rest."""

log = structlog.get_logger("lloom.known_peers")


class KnownPeer(Protocol):
    """A peer as the store gives it back."""

    @property
    def peer(self) -> PeerId:
        """Its id."""

    @property
    def addrs(self) -> tuple[Multiaddr, ...]:
        """Where it was reached."""

    @property
    def roles(self) -> frozenset[str]:
        """What it said it is."""


class PeerStore(Protocol):
    """What outlives the node. Both raise LloomError."""

    async def load(self) -> Sequence[KnownPeer]:
        """Those remembered, the last seen first."""

    async def save(self, peer: PeerId, addrs: tuple[Multiaddr, ...], roles: frozenset[str]) -> None:
        """Remember one, seen now."""


@dataclass(frozen=True, slots=True)
class Rejoined:
    """The outcome of a rejoin."""

    tried: int
    joined: tuple[PeerId, ...]
    """Connected, greeted as members, catalogue read."""


class KnownPeers:
    """Remembers members, and finds the network by them."""

    def __init__(
        self,
        *,
        me: PeerId,
        store: PeerStore,
        get_daemon: Callable[[], Daemon],
        connections: Connections,
        hello: HelloService,
        intake: Intake,
        roles_of: Callable[[PeerId], frozenset[str] | None],
        dialable: Callable[[Sequence[Multiaddr]], tuple[Multiaddr, ...]],
    ) -> None:
        """``roles_of``: a member's roles, None for a peer that is no member now; ``dialable``: those of addresses that
        this host may dial."""
        self._me = me
        self._store = store
        self._get_daemon = get_daemon
        self._connections = connections
        self._hello = hello
        self._intake = intake
        self._roles_of = roles_of
        self._dialable = dialable
        self._saved: dict[PeerId, tuple[float, frozenset[str]]] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Remember connected members until cancelled."""
        task_status.started()
        while True:
            await trio.sleep(LOOK_S)
            try:
                await self.remember()
            except LloomError as exc:
                log.info("peers_not_remembered", code=exc.code)

    async def remember(self) -> None:
        """Write down the connected members that are new, or were last written an hour ago. Raises LloomError."""
        now = trio.current_time()
        for peer in [peer for peer in self._saved if peer not in self._connections]:
            del self._saved[peer]
        due = []
        for peer in self._connections:
            roles = self._roles_of(peer)
            saved_at, saved_roles = self._saved.get(peer, (float("-inf"), frozenset()))
            if roles is not None and (now - saved_at > REMEMBER_AGAIN_S or roles != saved_roles):
                due.append((peer, roles))
        due.sort(key=lambda one: _order(one[1]))
        for peer, roles in due[:MAX_A_LOOK]:
            addrs = await self._addrs(peer)
            if addrs:
                await self._store.save(peer, addrs, roles)
            self._saved[peer] = (now, roles)

    async def _addrs(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        found: list[Multiaddr] = []
        try:
            # Of a connected peer p2pd tells at once what identify said.
            found += (await self._get_daemon().find_peer(peer, timeout_s=ADDRS_TIMEOUT_S)).addrs
        except DaemonError:
            addr = self._connections.addr_of(peer)
            if addr is not None:
                found.append(addr)
        usable = self._dialable([addr.without_peer() for addr in found])
        return tuple(sorted(dict.fromkeys(usable), key=lambda addr: addr.is_relayed)[:MAX_ADDRS])

    async def rejoin(self, wanted: int = WANTED) -> Rejoined:
        """Dial remembered peers, several at once, until ``wanted`` members were greeted and their catalogues read.

        Validators come before executors, those before others. Raises LloomError when the store cannot be read.
        """
        known = sorted(await self._store.load(), key=lambda one: _order(one.roles))
        todo = iter([one for one in known if one.peer != self._me and one.peer not in self._connections][:MAX_TRIES])
        joined: list[PeerId] = []
        tried = 0
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                nonlocal tried
                for one in todo:
                    tried += 1
                    if await self._join(one):
                        joined.append(one.peer)
                    if len(joined) >= wanted:
                        nursery.cancel_scope.cancel()

            for _ in range(MAX_DIALS):
                nursery.start_soon(work)
        return Rejoined(tried, tuple(joined))

    async def _join(self, known: KnownPeer) -> bool:
        try:
            await self._connections.ensure(known.peer, timeout_s=DIAL_TIMEOUT_S, addrs=self._dialable(known.addrs))
            return await self.read_catalogue(known.peer)
        except LloomError as exc:
            log.debug("known_peer_not_joined", peer=str(known.peer), code=exc.code)
            return False

    async def read_catalogue(self, peer: PeerId) -> bool:
        """Greet ``peer`` and take its catalogue; False when it is no member. Raises LloomError."""
        catalogue = await self._hello.read_catalogue(peer)
        take_catalogue(self._intake, catalogue, peer)
        return self._roles_of(peer) is not None


def _order(roles: frozenset[str]) -> int:
    return 0 if "validator" in roles else 1 if "executor" in roles else 2

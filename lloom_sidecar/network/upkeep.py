"""Keeping the node in touch with its network: bootstrap rounds, and the routing table.

A round dials the validators that are not joined, without waiting for their backoff, and, when none of them answers,
peers of earlier. There is one at the start, one at intervals, and, with too few peers or nobody of the network, one at
once and then ever more seldom.
"""

from __future__ import annotations

import os
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import structlog
import trio

from lloom_sidecar.errors import DaemonError, LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import Daemon

from .bootstrap import Bootstrap
from .connections import Connections
from .known_peers import KnownPeers, Rejoined

TICK_S: Final = 1.0
FIRST_ROUND_S: Final = 2.0
"""Longest wait for the validators' first answers at the start."""
ROUND_TIMEOUT_S: Final = 10.0
"""For the validators' answers, before peers of earlier are dialled."""
FIRST_URGENT_S: Final = 5.0
MAX_URGENT_S: Final = 60.0
"""Between two rounds while there are too few peers."""
REFRESH_TIMEOUT_S: Final = 20.0
CATALOGUE_EVERY_S: Final = 60.0
"""With no validator joined some member's catalogue is read so often."""
JITTER: Final = 0.1
RANDOM_KEY_BYTES: Final = 32

log = structlog.get_logger("lloom.upkeep")


@dataclass(frozen=True, slots=True)
class Round:
    """What one round tried and found."""

    validators_joined: int
    validators_tried: int
    known_joined: int
    known_tried: int
    seconds: float
    errors: tuple[str, ...] = ()
    """Why validators could not be joined, a few."""

    def describe(self) -> str:
        """A sentence of what was tried."""
        parts = [f"{self.validators_joined} of {self.validators_tried} validators answer"]
        if self.errors:
            parts.append("; ".join(self.errors))
        parts.append(f"{self.known_joined} of {self.known_tried} peers of earlier answered")
        return ", ".join(parts)


class UpkeepObserver(Protocol):
    """What the node wants to know."""

    def round_ended(self, found: Round) -> None:
        """A round of bootstrap ended."""

    def few_peers(self, peers: int, wanted: int, tried: str) -> None:
        """There are too few, and what was tried did not help."""


class Upkeep:
    """One node's rounds and refreshes."""

    def __init__(
        self,
        *,
        me: PeerId,
        bootstrap: Bootstrap,
        known: KnownPeers,
        connections: Connections,
        members: Callable[[], list[PeerId]],
        get_daemon: Callable[[], Daemon],
        observer: UpkeepObserver,
        after_join: Callable[[PeerId], Awaitable[None]],
        min_peers: int,
        round_every_s: float,
        refresh_every_s: float,
        rng: random.Random,
    ) -> None:
        """``members``: connected peers of our network; ``min_peers``: fewer are too few, 0 = never."""
        self._me = me
        self._bootstrap = bootstrap
        self._known = known
        self._connections = connections
        self._members = members
        self._get_daemon = get_daemon
        self._observer = observer
        self._after_join = after_join
        self._min_peers = min_peers
        self._round_every_s = round_every_s
        self._refresh_every_s = refresh_every_s
        self._rng = rng
        self._next_round = float("inf")
        self._next_urgent = float("-inf")
        self._backoff_s = FIRST_URGENT_S
        self._has_warned = False
        self.table_peers: int | None = None
        """Peers that the last walk of the routing table came to, None = there was none yet."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do what is due until cancelled."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._rounds)
            nursery.start_soon(self._refresh_at_intervals)
            nursery.start_soon(self._catalogues)

    @property
    def is_short(self) -> bool:
        """Fewer peers than wanted."""
        return len(self._connections) < self._min_peers

    @property
    def _is_urgent(self) -> bool:
        return self.is_short or not (self._bootstrap.joined or self._members())

    async def _rounds(self) -> None:
        await self._bootstrap.first_tried(timeout_s=FIRST_ROUND_S)
        self._next_round = trio.current_time() + self._jittered(self._round_every_s)
        while True:
            await self.look()
            await trio.sleep(TICK_S)

    async def look(self) -> None:
        """Do a round if one is due."""
        if self._is_urgent:
            with suppress(DaemonError):  # the supervisor reports that p2pd is away
                # What is known of connections may be a second old.
                await self._connections.look()
        now = trio.current_time()
        is_urgent, is_periodic = self._is_urgent, now >= self._next_round
        if not is_urgent:
            self._next_urgent, self._backoff_s = now, FIRST_URGENT_S
            self._has_warned = False
        if not is_periodic and not (is_urgent and now >= self._next_urgent):
            return
        tried = (await self.round()).describe()
        if self.is_short:
            tried += f", {await self.refresh()} peers found in the DHT"
        if self.is_short and (is_periodic or not self._has_warned):
            self._has_warned = True
            self._observer.few_peers(len(self._connections), self._min_peers, tried)
        now = trio.current_time()
        if is_periodic:
            self._next_round = now + self._jittered(self._round_every_s)
        self._next_urgent = now + self._jittered(self._backoff_s)
        self._backoff_s = min(MAX_URGENT_S, 2 * self._backoff_s)

    async def round(self) -> Round:
        """One round of bootstrap. Never raises LloomError."""
        began_at = trio.current_time()
        await self._bootstrap.retry_all(timeout_s=ROUND_TIMEOUT_S)
        rejoined = Rejoined(0, ())
        if not self._bootstrap.joined:
            try:
                rejoined = await self._known.rejoin()
            except LloomError as exc:
                log.warning("known_peers_not_read", code=exc.code)
        if rejoined.joined:
            self._bootstrap.complete()
        for peer in rejoined.joined:
            await self._after_join(peer)
        validators = self._bootstrap.validators
        found = Round(
            validators_joined=len(self._bootstrap.joined),
            validators_tried=len(validators),
            known_joined=len(rejoined.joined),
            known_tried=rejoined.tried,
            seconds=trio.current_time() - began_at,
            errors=tuple(v.last_error for v in validators if v.last_error)[:3],
        )
        log.info("bootstrap_round", **{name: getattr(found, name) for name in _LOGGED})
        self._observer.round_ended(found)
        return found

    async def refresh(self) -> int:
        """Walk to this node's own id and to a random key, which fills the routing table; returns the peers met."""
        found: set[PeerId] = set()
        for key in (self._me.raw, os.urandom(RANDOM_KEY_BYTES)):
            try:
                found.update(await self._get_daemon().get_closest_peers(key, timeout_s=REFRESH_TIMEOUT_S))
            except DaemonError as exc:
                log.debug("refresh_failed", code=exc.code)
        self.table_peers = len(found)
        return len(found)

    async def _refresh_at_intervals(self) -> None:
        while True:
            await trio.sleep(self._jittered(self._refresh_every_s))
            await self.refresh()

    async def _catalogues(self) -> None:
        while True:
            await trio.sleep(self._jittered(CATALOGUE_EVERY_S))
            members = self._members()
            if self._bootstrap.joined or not members:
                continue
            peer = self._rng.choice(members)
            try:
                await self._known.read_catalogue(peer)
            except LloomError as exc:
                log.debug("catalogue_not_read", peer=str(peer), code=exc.code)

    def _jittered(self, seconds: float) -> float:
        return seconds * (1 - JITTER * self._rng.random())


_LOGGED: Final = ("validators_joined", "validators_tried", "known_joined", "known_tried", "seconds")

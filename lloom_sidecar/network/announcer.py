"""Telling the network what this executor offers: at start, on each change, at intervals, and that it leaves."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import DaemonError, LloomError
from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.peers.rate import TokenBucket
from lloom_sidecar.protocol.announcement import (
    MAX_TTL_S,
    announcement_interval_s,
    announcement_ttl_s,
    seal_announcement,
)
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.names import TOPIC_EXECUTORS
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Kind, Load, ModelOffer

FULL_EVERY_S: Final = 600.0
"""A full announcement is made anew this often, so that the one that hello and catalogues hand on is never older than
the 15 min within which clocks are compared."""
TOPIC_POLL_S: Final = 1.0
MAX_PER_S: Final = 1.0
"""Announcements in the long run, and ``BURST`` at once: changes that come faster are told together. Well under what
receivers allow one author (node.control_plane.MAX_ANNOUNCEMENTS_PER_S), who ban for more."""
BURST: Final = 5.0
REMOVAL_TIMEOUT_S: Final = 1.0
REMOVAL_LINGER_S: Final = 0.2
"""p2pd hands a message to its neighbours after it answered OK."""

log = structlog.get_logger("lloom.announcer")


@dataclass(frozen=True, slots=True)
class Offer:
    """What there is to announce now; no models = nothing is offered."""

    models: tuple[ModelOffer, ...]
    load: Load


class Announcer:
    """Publishes this node's announcements. ``current`` is the newest full one, for hello."""

    def __init__(
        self,
        *,
        signer: Signer,
        key: Callable[[], NetworkKey | None],
        offer: Callable[[], Offer],
        addrs: Callable[[], tuple[Multiaddr, ...]],
        executors_seen: Callable[[], int],
        get_daemon: Callable[[], Daemon],
        next_sequence: Callable[[int], Awaitable[int]],
        now_ms: Callable[[], int],
        software: str,
        on_published: Callable[[], None],
        rng: random.Random,
        is_silent: bool = False,
    ) -> None:
        """``is_silent``: nothing is published; hello alone hands out ``current``."""
        self._signer = signer
        self._key = key
        self._offer = offer
        self._addrs = addrs
        self._executors_seen = executors_seen
        self._get_daemon = get_daemon
        self._next_sequence = next_sequence
        self._now_ms = now_ms
        self._software = software
        self._on_published = on_published
        self._rng = rng
        self._is_silent = is_silent
        self._changed = trio.Event()
        self._announced: tuple[tuple[ModelOffer, ...], tuple[Multiaddr, ...]] | None = None
        self._full: bytes = b""
        self._full_digest: bytes = b""
        self._full_at = float("-inf")
        self._has_neighbours = False
        self.is_draining = False

    @property
    def current(self) -> bytes:
        """The newest full announcement (an envelope), empty when nothing is offered."""
        return self._full if self._announced is not None else b""

    def changed(self) -> None:
        """The offer or the addresses changed: announce now."""
        self._changed.set()

    def introduce(self) -> None:
        """There are neighbours in the topic, and there were none before: announce everything now.

        Not for each later neighbour: hello gives it what is there, while a message goes to the whole network.
        """
        self._has_neighbours = True
        self._full_at = float("-inf")
        self.changed()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce until cancelled; then say that this executor leaves."""
        task_status.started()
        pace = TokenBucket(rate_per_s=MAX_PER_S, burst=BURST, now=trio.current_time())
        try:
            async with trio.open_nursery() as nursery:
                if not self._is_silent:
                    nursery.start_soon(self._watch_topic)
                while True:
                    await trio.sleep(pace.wait_s(trio.current_time()))
                    pace.take(trio.current_time())
                    interval_s = announcement_interval_s(self._executors_seen(), self._rng.random())
                    await self._announce(interval_s)
                    with trio.move_on_after(interval_s):
                        await self._changed.wait()
                    self._changed = trio.Event()
        finally:
            with trio.move_on_after(REMOVAL_TIMEOUT_S, shield=True):
                await self.withdraw()

    async def withdraw(self) -> None:
        """Tell the network that nothing is offered any more; silent when nothing was."""
        if self._announced is None:
            return
        self._announced = None
        self._full = b""
        if await self._publish(Kind.REMOVAL, (), (), Load(), MAX_TTL_S, b""):
            await trio.sleep(REMOVAL_LINGER_S)

    async def _announce(self, interval_s: float) -> None:
        offer = self._offer()
        ttl_s = announcement_ttl_s(interval_s)
        if self.is_draining or not offer.models:
            await self.withdraw()
            return
        addrs = self._addrs()
        now = trio.current_time()
        if self._announced == (offer.models, addrs) and now - self._full_at < FULL_EVERY_S:
            if not self._is_silent:
                await self._publish(Kind.HEARTBEAT, (), (), offer.load, ttl_s, self._full_digest)
            return
        kind = Kind.INITIAL if self._announced is None else Kind.UPDATE
        # What hello hands out must be true even while p2pd is away, so it is set before publishing.
        self._announced = (offer.models, addrs)
        self._full_at = now
        await self._publish(kind, offer.models, addrs, offer.load, ttl_s, b"")

    async def _publish(
        self,
        kind: int,
        models: tuple[ModelOffer, ...],
        addrs: tuple[Multiaddr, ...],
        load: Load,
        ttl_s: float,
        full_digest: bytes,
    ) -> bool:
        now_ms = self._now_ms()
        try:
            sealed = seal_announcement(
                signer=self._signer,
                key=self._key(),
                sequence=await self._next_sequence(now_ms),
                issued_at_ms=now_ms,
                ttl_s=ttl_s,
                kind=kind,
                addrs=addrs,
                models=models,
                load=load,
                software=self._software if models else "",
                full_digest=full_digest,
            )
            if models:
                self._full, self._full_digest = sealed, hashlib.sha256(sealed).digest()
            if self._is_silent:
                return False
            await self._get_daemon().publish(TOPIC_EXECUTORS, sealed)
        except DaemonError as exc:
            log.info("announcement_not_published", code=exc.code)
            return False
        except LloomError as exc:
            log.warning("announcement_not_made", code=exc.code, reason=str(exc))
            self._full_at = float("-inf")  # heartbeats would refer to one that does not exist
            return False
        self._on_published()
        return True

    async def _watch_topic(self) -> None:
        """What was published while nobody was there is lost: introduce this node when the first neighbour appears."""
        while True:
            await trio.sleep(TOPIC_POLL_S)
            try:
                peers = await self._get_daemon().topic_peers(TOPIC_EXECUTORS)
            except DaemonError:
                peers = []
            if peers and not self._has_neighbours:
                self.introduce()
            self._has_neighbours = bool(peers)

"""Network status: a validator tells what it sees of the network, and every node keeps what its own validators said."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import AnnouncementError, DaemonError, LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import Daemon, TopicMessage
from lloom_sidecar.peers.executors import ExecutorView
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.names import TOPIC_NETWORK
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.status import (
    MAX_MODELS,
    MAX_SOFTWARE,
    ModelStatus,
    NetworkStatus,
    check_status_clock,
    open_status,
    seal_status,
)

from .intake import OFFENCES

INTERVAL_S: Final = 30.0
INTERVAL_JITTER: Final = 0.1
TTL_INTERVALS: Final = 3
MIN_REPEAT_S: Final = 2.0
"""Shortest time between two statuses that newly seen topic peers cause."""
CHANGE_S: Final = 5.0
"""Shortest time between two statuses because the numbers changed: right after a start they all do."""
TOPIC_POLL_S: Final = 1.0
MAX_STATUSES_PER_S: Final = 0.5
"""Of one author; an honest one sends two a minute, and more when its numbers change or a peer joins the topic."""
STATUS_BURST: Final = 6.0

log = structlog.get_logger("lloom.status")


@dataclass(frozen=True, slots=True)
class Heard:
    """The latest status of one configured validator."""

    peer: PeerId
    sequence: int
    issued_at_ms: int
    ttl_s: float
    heard_at: float
    """Monotonic seconds."""
    status: NetworkStatus

    def is_current(self, now: float) -> bool:
        """Its ttl is not over."""
        return now < self.heard_at + self.ttl_s


class StatusBoard:
    """Checks statuses and keeps the latest of each configured validator. Synchronous."""

    def __init__(
        self,
        *,
        validators: Collection[PeerId],
        keys: Callable[[], Sequence[NetworkKey]],
        now_ms: Callable[[], int],
        on_dropped: Callable[[str], None],
        on_offence: Callable[[PeerId, str], None],
    ) -> None:
        """``validators``: whose are kept, looked at each time; ``on_dropped``: one was not believed, with the reason;
        ``on_offence``: no honest node publishes that."""
        self._validators = validators
        self._keys = keys
        self._now_ms = now_ms
        self._on_dropped = on_dropped
        self._on_offence = on_offence
        self._latest: dict[PeerId, Heard] = {}
        self.others = 0
        """Statuses of validators that are not configured: counted, not kept."""

    def latest(self) -> list[Heard]:
        """The newest of each validator, by peer id."""
        return [self._latest[peer] for peer in sorted(self._latest) if peer in self._validators]

    def take(self, message: TopicMessage) -> bool:
        """Check one message of the topic; True when it was kept."""
        try:
            return self._take(message.data, message.sender)
        except AnnouncementError as exc:
            self._on_dropped(exc.reason)
            if exc.reason in OFFENCES:
                self._on_offence(message.sender, exc.reason)
            return False

    def _take(self, raw: bytes, sender: PeerId) -> bool:
        found = open_status(raw, keys=self._keys(), expected_signer=sender)
        if not found.is_member:
            self._on_dropped("network")
            return False
        if found.peer not in self._validators:
            self.others += 1
            return False
        known = self._latest.get(found.peer)
        if known is not None and found.sequence <= known.sequence:
            if found.sequence < known.sequence:
                raise AnnouncementError("sequence", "a status that is older than what is known")
            return False
        check_status_clock(found, self._now_ms())
        self._latest[found.peer] = Heard(
            found.peer, found.sequence, found.issued_at_ms, found.ttl_s, trio.current_time(), found.status
        )
        return True


def summarise(
    book: PeerBook, members: Collection[PeerId], software_of: Callable[[PeerId], str], now: float
) -> NetworkStatus:
    """What a validator with this peer book says.

    Args:
        members: the validator itself and the connected members.
        software_of: what a member said in hello that it runs, empty = nothing.
    """
    models = []
    views: dict[PeerId, ExecutorView] = {}
    slots: dict[PeerId, int] = {}
    for summary in book.models(now):
        offering = book.executors_of(summary.id, now)
        for view in offering:
            views[view.peer] = view
            # An executor's models share its slots.
            slots[view.peer] = max(slots.get(view.peer, 0), view.offer.slots)
        price, priced = _median_price([view.offer.price for view in offering])
        models.append(ModelStatus(summary.id, len(offering), sum(view.offer.slots for view in offering), price, priced))
    models.sort(key=lambda model: (-model.executors, model.id))
    versions = Counter(view.software for view in views.values())
    versions.update(software_of(peer) for peer in members if peer not in views)
    del versions[""]
    return NetworkStatus(
        executors=len(views),
        members=len(members),
        models_total=len(models),
        models=tuple(models[:MAX_MODELS]),
        software=tuple(sorted(versions.items(), key=lambda one: (-one[1], one[0]))[:MAX_SOFTWARE]),
        in_flight=sum(view.load.in_flight for view in views.values()),
        queued=sum(view.load.queued for view in views.values()),
        slots=sum(slots.values()),
    )


async def run_publisher(
    *,
    signer: Signer,
    key: Callable[[], NetworkKey | None],
    summary: Callable[[], NetworkStatus],
    census: Callable[[], object],
    get_daemon: Callable[[], Daemon],
    next_sequence: Callable[[int], Awaitable[int]],
    now_ms: Callable[[], int],
    on_published: Callable[[bytes], None],
    rng: random.Random,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Publish a validator's status each 30 s, when a peer joins the topic and when the census changes, until cancelled.

    ``census``: asked each second; another value than before means that the last status is out of date. ``on_published``
    gets the envelope."""
    task_status.started()
    published: object = None
    topic_peers: frozenset[PeerId] = frozenset()
    published_at = float("-inf")
    next_at = trio.current_time()
    while True:
        now = trio.current_time()
        try:
            peers = frozenset(await get_daemon().topic_peers(TOPIC_NETWORK))
            if peers - topic_peers:
                # What was published before it joined is lost to it.
                next_at = min(next_at, max(now, published_at + MIN_REPEAT_S))
            topic_peers = peers
            if (counted := census()) != published:
                next_at = min(next_at, max(now, published_at + CHANGE_S))
            if now >= next_at:
                sealed = seal_status(
                    signer=signer,
                    key=key(),
                    sequence=await next_sequence(now_ms()),
                    issued_at_ms=now_ms(),
                    ttl_s=TTL_INTERVALS * INTERVAL_S,
                    status=summary(),
                )
                await get_daemon().publish(TOPIC_NETWORK, sealed)
                on_published(sealed)
                published_at, published = now, counted
                next_at = now + INTERVAL_S * (1 - INTERVAL_JITTER * rng.random())
        except DaemonError as exc:
            topic_peers = frozenset()
            log.debug("status_not_published", code=exc.code)
        except LloomError as exc:
            next_at = now + INTERVAL_S
            log.warning("status_not_made", code=exc.code, reason=str(exc))
        await trio.sleep(TOPIC_POLL_S)


def _median_price(prices: Sequence[Price]) -> tuple[Price, int]:
    """The lower median of each part in the currency that most use, and over how many it is."""
    currencies = Counter(price.currency for price in prices)
    currency = min(currencies, key=lambda one: (-currencies[one], one))
    own = [price for price in prices if price.currency == currency]
    middle = (len(own) - 1) // 2
    prompt = sorted(price.prompt_per_million for price in own)[middle]
    completion = sorted(price.completion_per_million for price in own)[middle]
    return Price(prompt, completion, currency), len(own)

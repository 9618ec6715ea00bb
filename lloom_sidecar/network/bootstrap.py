"""Staying connected to validators: dialled with backoff and jitter, greeted, their catalogue read; and dialled again
when they are lost. Any one of them is enough."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog
import trio

from lloom_sidecar.errors import DaemonError, LloomError, PeerUnreachableError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.daemon import Daemon

from .connections import Connections
from .hello import Catalogue, HelloService
from .intake import Intake

FIRST_BACKOFF_S: Final = 0.25
MAX_BACKOFF_S: Final = 30.0
DIAL_TIMEOUT_S: Final = 10.0
CHECK_S: Final = 1.0
REFRESH_CATALOGUE_S: Final = 60.0
"""Gossip is best effort: a look into the catalogue now and then repairs what it lost."""
DIAL_BACKOFF: Final = "dial backoff"
"""In p2pd's words when it did not even try, because a dial has just failed: the error before says why.
Source: go-libp2p, swarm.ErrDialBackoff."""
VALIDATOR_TAG: Final = "lloom-validator"
VALIDATOR_WEIGHT: Final = 1000

log = structlog.get_logger("lloom.bootstrap")


class BootstrapObserver(Protocol):
    """What the node wants to know of its validators."""

    def validator_joined(self, peer: PeerId, entries: int) -> None:
        """Connected, greeted, and its catalogue of ``entries`` read."""

    def validator_failed(self, peer: PeerId, error: LloomError, attempt: int) -> None:
        """It could not be joined; ``attempt`` counts from 1 since it was last joined."""

    def bootstrap_complete(self, validators: int, seconds: float) -> None:
        """The first validator was joined, ``seconds`` after the start."""


@dataclass(slots=True)
class Validator:
    """One configured validator and how it stands."""

    peer: PeerId
    addrs: tuple[Multiaddr, ...]
    is_joined: bool = False
    """Connected, greeted, catalogue read."""
    failures: int = 0
    last_error: str = ""
    attempts: int = 0
    """Ended ones, since the start."""
    cursor: int = 0
    refreshed_at: float = field(default=float("-inf"))
    keeping: trio.CancelScope = field(default_factory=trio.CancelScope, repr=False)
    """Cancelled when it is not one of ours any more."""


def group_by_peer(addrs: Sequence[Multiaddr]) -> list[Validator]:
    """Bootstrap addresses by the node that they lead to, in order."""
    grouped: dict[PeerId, list[Multiaddr]] = {}
    for addr in addrs:
        peer = addr.peer_id
        if peer is not None:
            grouped.setdefault(peer, []).append(addr)
    return [Validator(peer, tuple(found)) for peer, found in grouped.items()]


class Bootstrap:
    """Keeps the node connected to its validators."""

    def __init__(
        self,
        *,
        me: PeerId,
        validators: Sequence[Validator],
        get_daemon: Callable[[], Daemon],
        connections: Connections,
        hello: HelloService,
        intake: Intake,
        observer: BootstrapObserver,
        after_join: Callable[[PeerId], Awaitable[None]],
        rng: random.Random,
        keeps_away: Callable[[PeerId], str | None] = lambda peer: None,
    ) -> None:
        """``keeps_away``: why a validator must not be dialled now, or None."""
        self._me = me
        self.validators = [v for v in validators if v.peer != me]
        self._get_daemon = get_daemon
        self._connections = connections
        self._hello = hello
        self._intake = intake
        self._observer = observer
        self._after_join = after_join
        self._rng = rng
        self._keeps_away = keeps_away
        self._retry = trio.Event()
        self._settled = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._started_at = trio.current_time()
        self.is_complete = not self.validators
        """True once the first validator's catalogue was read, or there is none to ask."""

    @property
    def joined(self) -> list[PeerId]:
        """The validators that are joined now."""
        return [v.peer for v in self.validators if v.is_joined and v.peer in self._connections]

    def complete(self) -> None:
        """A member's catalogue was read: what is not in the book now is not there."""
        self.is_complete = True

    async def retry_all(self, *, timeout_s: float) -> None:
        """Dial those that are not joined without waiting for their backoff; returns when each was tried once more, or
        after ``timeout_s``."""
        missing = [(v, v.attempts) for v in self.validators if v.peer not in self.joined]
        self._retry.set()
        self._retry = trio.Event()
        await self._attempted(missing, timeout_s)

    async def first_tried(self, *, timeout_s: float) -> None:
        """Return when every validator was tried once since the start, or after ``timeout_s``."""
        await self._attempted([(v, 0) for v in self.validators], timeout_s)

    async def _attempted(self, before: Sequence[tuple[Validator, int]], timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            while any(v.attempts == attempts and not v.is_joined for v, attempts in before):
                await self._settled.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep every validator connected until cancelled."""
        task_status.started()
        async with trio.open_nursery() as self._nursery:
            for validator in self.validators:
                self._nursery.start_soon(self._keep_until_removed, validator)
            await trio.sleep_forever()  # more may be added, also to none

    def add(self, addr: Multiaddr) -> bool:
        """One more address, with /p2p, of a validator that is known or not; dialled at once. False when it is known."""
        peer = addr.peer_id
        if peer is None or peer == self._me:
            return False
        validator = next((one for one in self.validators if one.peer == peer), None)
        if validator is not None:
            if addr in validator.addrs:
                return False
            validator.addrs = (*validator.addrs, addr)
            self._retry.set()
            self._retry = trio.Event()
            return True
        validator = Validator(peer, (addr,))
        self.validators.append(validator)
        if self._nursery is not None:
            self._nursery.start_soon(self._keep_until_removed, validator)
        return True

    def remove(self, peer: PeerId, addrs: Collection[Multiaddr]) -> bool:
        """Take addresses away from a validator; without any left it is no validator any more. True when it had some.

        Its connection stays: who closes it is not asked here.
        """
        validator = next((one for one in self.validators if one.peer == peer), None)
        if validator is None or not set(addrs) & set(validator.addrs):
            return False
        validator.addrs = tuple(addr for addr in validator.addrs if addr not in addrs)
        if not validator.addrs:
            self.validators.remove(validator)
            validator.keeping.cancel()
        return True

    async def _keep_until_removed(self, validator: Validator) -> None:
        with validator.keeping:
            await self._keep(validator)

    async def _keep(self, validator: Validator) -> None:
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                if not validator.is_joined or validator.peer not in self._connections:
                    validator.is_joined = False
                    await self._join(validator)
                    backoff_s = FIRST_BACKOFF_S
                elif trio.current_time() - validator.refreshed_at > REFRESH_CATALOGUE_S:
                    await self._read(validator)
            except LloomError as exc:
                validator.failures += 1
                if not (validator.last_error and DIAL_BACKOFF in exc.message):
                    validator.last_error = exc.message
                self._observer.validator_failed(validator.peer, exc, validator.failures)
                self._tried(validator)
                with trio.move_on_after(backoff_s * (0.5 + self._rng.random())):
                    await self._retry.wait()
                backoff_s = min(MAX_BACKOFF_S, backoff_s * 2)
                continue
            await trio.sleep(CHECK_S)

    def _tried(self, validator: Validator) -> None:
        validator.attempts += 1
        self._settled.set()
        self._settled = trio.Event()

    async def _join(self, validator: Validator) -> None:
        reason = self._keeps_away(validator.peer)
        if reason is not None:
            raise PeerUnreachableError(f"{validator.peer.short()} is kept away ({reason})", code="kept_away")
        # As configured, each time: p2pd asks the name server again for a name among them.
        await self._get_daemon().connect(
            validator.peer, [addr.without_peer() for addr in validator.addrs], timeout_s=DIAL_TIMEOUT_S
        )
        await self._connections.look()  # the next check must know of it, whenever the next poll comes
        entries = await self._read(validator)
        validator.is_joined = True
        validator.failures = 0
        validator.last_error = ""
        self._tried(validator)
        self._observer.validator_joined(validator.peer, entries)
        if not self.is_complete:
            self.is_complete = True
            joined = sum(v.is_joined for v in self.validators)
            self._observer.bootstrap_complete(joined, trio.current_time() - self._started_at)
        await self._after_join(validator.peer)

    async def _read(self, validator: Validator) -> int:
        try:
            # Each time: p2pd forgets a tag with the peer's last connection, which may have come back unseen.
            await self._get_daemon().tag_peer(validator.peer, VALIDATOR_TAG, VALIDATOR_WEIGHT)
        except DaemonError as exc:
            log.info("tag_failed", peer=str(validator.peer), code=exc.code)
        total = 0
        while True:
            catalogue = await self._hello.read_catalogue(validator.peer, since=validator.cursor)
            take_catalogue(self._intake, catalogue, validator.peer)
            total += len(catalogue.entries)
            validator.cursor = catalogue.cursor
            validator.refreshed_at = trio.current_time()
            if not catalogue.truncated or not catalogue.entries:
                return total


def take_catalogue(intake: Intake, catalogue: Catalogue, source: PeerId) -> None:
    """Apply every entry. Each carries its executor's own signature: a catalogue can add, never invent or remove."""
    for entry in catalogue.entries:
        intake.take_entry(entry.announcement, entry.heartbeat, source=source, age_s=entry.age_ms / 1000)

"""New connections are greeted, and those that should not be there are closed.

p2pd makes connections on its own: mDNS finds a peer on the link, the DHT walks, a peer dials in. Whoever they are,
hello says whether they are of our network, and brings their announcement. Both sides see the connection; the one with
the smaller id greets first, the other one only if nothing came.

The look at the connections comes once a second, so does this one.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import DaemonError, LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.standing import Standing

from .connections import Connections
from .hello import HelloService

TICK_S: Final = 1.0
FIRST_AFTER_S: Final = 0.5
"""Whoever dialled on purpose says hello at once: time for that."""
SECOND_AFTER_S: Final = 5.0
"""For the side with the larger id."""
JITTER_S: Final = 0.5
REFUSED_GRACE_S: Final = 3.0
"""A peer that was refused may have been given the key since: time for a hello of its own."""
GREET_TIMEOUT_S: Final = 5.0
GREETED_S: Final = 50 * 60.0
"""Greeted again before a membership's hour is over."""
FIRST_RETRY_S: Final = 5.0
"""Both sides' first hellos may have failed: one was not listening yet, or busy. Soon enough that nobody notices."""
MAX_RETRY_S: Final = 600.0
"""A peer that does not speak hello (a stock libp2p node) is asked ever more seldom."""
MAX_GREETS: Final = 16
UNSEEN_S: Final = 60.0
"""How long a hello is remembered whose connection was never seen."""

log = structlog.get_logger("lloom.greeter")


class _Seen:
    """A connected peer, from its first connection to the end of its last."""

    __slots__ = ("due_at", "is_under_way", "retry_s", "since")

    def __init__(self, since: float, due_at: float) -> None:
        self.since = since
        self.due_at = due_at
        self.retry_s = FIRST_RETRY_S
        self.is_under_way = False


class Greeter:
    """Greets each directly connected peer once, and disconnects the banned and the refused."""

    def __init__(
        self,
        *,
        me: PeerId,
        connections: Connections,
        hello: HelloService,
        standing: Standing,
        is_needed: Callable[[PeerId], bool],
        disconnect: Callable[[PeerId, str], Awaitable[None]],
        rng: random.Random,
    ) -> None:
        """``is_needed``: a refused peer stays connected; ``disconnect``: close its connections, with the cause."""
        self._me = me
        self._connections = connections
        self._hello = hello
        self._standing = standing
        self._is_needed = is_needed
        self._disconnect = disconnect
        self._rng = rng
        self._seen: dict[PeerId, _Seen] = {}
        self._wake = trio.Event()

    def greeted(self, peer: PeerId) -> None:
        """A hello with ``peer`` succeeded, whoever began it."""
        seen = self._see(peer, trio.current_time())
        seen.due_at = trio.current_time() + GREETED_S
        seen.retry_s = FIRST_RETRY_S

    def forget(self, peer: PeerId) -> None:
        """Its last connection ended."""
        self._seen.pop(peer, None)

    def look_now(self) -> None:
        """Somebody was banned, or speaks though it is: look now, at p2pd too."""
        self._wake.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look at the connections each second until cancelled."""
        task_status.started()
        async with trio.open_nursery() as nursery:
            while True:
                now = trio.current_time()
                self._forget_unseen(now)
                for peer in [*self._connections]:
                    seen = self._see(peer, now)
                    if seen.is_under_way:
                        continue
                    cause = self._unwanted(peer, seen, now)
                    if cause is not None:
                        seen.is_under_way = True
                        nursery.start_soon(self._close, peer, seen, cause)
                    elif self._is_due(peer, seen, now) and len(nursery.child_tasks) < MAX_GREETS:
                        seen.is_under_way = True
                        nursery.start_soon(self._greet, peer, seen)
                with trio.move_on_after(TICK_S):
                    await self._wake.wait()
                    with suppress(DaemonError):  # the supervisor reports that p2pd is away
                        await self._connections.look()
                self._wake = trio.Event()

    def _forget_unseen(self, now: float) -> None:
        """A connection that came and went between two looks leaves what its hello noted."""
        for peer in [peer for peer, seen in self._seen.items() if now > seen.since + UNSEEN_S]:
            if peer not in self._connections:
                del self._seen[peer]

    def _see(self, peer: PeerId, now: float) -> _Seen:
        seen = self._seen.get(peer)
        if seen is None:
            after_s = FIRST_AFTER_S if self._me.raw < peer.raw else SECOND_AFTER_S
            seen = self._seen[peer] = _Seen(now, now + after_s + JITTER_S * self._rng.random())
        return seen

    def _unwanted(self, peer: PeerId, seen: _Seen, now: float) -> str | None:
        if self._standing.ban_of(peer, now) is not None:
            return "banned"
        code = self._standing.refusal_of(peer, now)
        if code is None or self._is_needed(peer) or now < seen.since + REFUSED_GRACE_S:
            return None
        return code

    def _is_due(self, peer: PeerId, seen: _Seen, now: float) -> bool:
        if now < seen.due_at:
            return False
        addr = self._connections.addr_of(peer)
        # Through a relay only what somebody asks for: a validator relays for many who never talk to each other.
        is_direct = addr is not None and not addr.is_relayed
        return is_direct and self._standing.keeps_away(peer, now) is None

    async def _close(self, peer: PeerId, seen: _Seen, cause: str) -> None:
        try:
            await self._disconnect(peer, cause)
        finally:
            seen.is_under_way = False

    async def _greet(self, peer: PeerId, seen: _Seen) -> None:
        code, due_at = "timeout", seen.due_at
        try:
            with trio.move_on_after(GREET_TIMEOUT_S):
                await self._hello.greet(peer)
                seen.due_at = trio.current_time() + GREETED_S
                return
        except LloomError as exc:
            code = exc.code
        finally:
            seen.is_under_way = False
        log.debug("connection_not_greeted", peer=str(peer), code=code)
        if seen.due_at != due_at:
            return  # meanwhile it greeted us
        seen.due_at = trio.current_time() + seen.retry_s
        seen.retry_s = min(MAX_RETRY_S, 2 * seen.retry_s)

"""Which peers are connected, by a look each second, and getting one connected when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Final, Protocol

import structlog
import trio

from lloom_sidecar.errors import DaemonError, LloomError, PeerUnreachableError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.daemon import Connection, Daemon

POLL_S: Final = 1.0
DIAL_TIMEOUT_S: Final = 10.0
LOOKUP_TIMEOUT_S: Final = 5.0
"""For the addresses of a peer that told none which may be dialled."""

log = structlog.get_logger("lloom.connections")


class ConnectionObserver(Protocol):
    """What the node wants to know of connections."""

    def connected(self, peer: PeerId, addr: Multiaddr) -> None:
        """A peer has a connection now."""

    def disconnected(self, peer: PeerId) -> None:
        """A peer's last connection ended."""

    def polled(self, peers: int) -> None:
        """p2pd was asked; ``peers`` are connected."""


class _Dial:
    """A dial under way, for those who wait for its outcome."""

    __slots__ = ("done", "error")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: LloomError | None = None
        """Why it failed; None when it succeeded or was cancelled."""


class Connections:
    """The peers that p2pd is connected to, as of the last look."""

    def __init__(
        self,
        *,
        get_daemon: Callable[[], Daemon],
        addrs_of: Callable[[PeerId], tuple[Multiaddr, ...]],
        observer: ConnectionObserver,
        keeps_away: Callable[[PeerId], str | None] = lambda peer: None,
    ) -> None:
        """``addrs_of``: addresses of a peer that may be dialled; ``keeps_away``: why one must not be, or None."""
        self._get_daemon = get_daemon
        self._addrs_of = addrs_of
        self._observer = observer
        self._keeps_away = keeps_away
        self._connected: dict[PeerId, Multiaddr] = {}
        self._dialling: dict[PeerId, _Dial] = {}
        self._looks = 0
        self._newest_look = 0

    def __contains__(self, peer: PeerId) -> bool:
        return peer in self._connected

    def __len__(self) -> int:
        return len(self._connected)

    def __iter__(self) -> Iterator[PeerId]:
        return iter(self._connected)

    def addr_of(self, peer: PeerId) -> Multiaddr | None:
        """Remote address of the connection to ``peer``, a direct one if there are several."""
        return self._connected.get(peer)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look each second until cancelled."""
        task_status.started()
        while True:
            with suppress(DaemonError):  # the supervisor reports that p2pd is away, and calls lost_all
                await self.look()
            await trio.sleep(POLL_S)

    async def look(self) -> None:
        """Ask p2pd now. Raises DaemonError."""
        self._looks += 1
        number = self._looks
        rows = await self._get_daemon().list_peers()
        if number > self._newest_look:  # else one that began later is known already
            self._newest_look = number
            self._update(rows)

    def lost_all(self) -> None:
        """p2pd is gone, and every connection with it."""
        self._newest_look = self._looks
        self._update([])

    def _update(self, rows: Sequence[Connection]) -> None:
        found: dict[PeerId, Multiaddr] = {}
        for row in rows:
            peer, addr = row.peer, row.addr
            if peer not in found or (found[peer].is_relayed and not addr.is_relayed):
                found[peer] = addr
        before, self._connected = self._connected, found
        for peer in found.keys() - before.keys():
            self._observer.connected(peer, found[peer])
        for peer in before.keys() - found.keys():
            self._observer.disconnected(peer)
        self._observer.polled(len(found))

    async def ensure(self, peer: PeerId, *, timeout_s: float = DIAL_TIMEOUT_S, addrs: Sequence[Multiaddr] = ()) -> None:
        """Return when ``peer`` is connected; dials it if it is not, one dial at a time.

        Args:
            timeout_s: of the dial.
            addrs: where to dial it besides the addresses that are known of it.

        Raises:
            PeerUnreachableError: nobody answers at any address that is known of it, or it is kept away.
            DaemonUnavailableError: p2pd does not answer.
        """
        while peer not in self._connected:
            under_way = self._dialling.get(peer)
            if under_way is None:
                reason = self._keeps_away(peer)
                if reason is not None:
                    raise PeerUnreachableError(f"{peer.short()} is kept away ({reason})", code="kept_away")
                await self._dial(peer, timeout_s, addrs)
                return
            await under_way.done.wait()
            if under_way.error is not None and not addrs:
                raise under_way.error  # everybody who waited would only fail again, one after the other

    async def _dial(self, peer: PeerId, timeout_s: float, more: Sequence[Multiaddr]) -> None:
        self._dialling[peer] = dial = _Dial()
        try:
            daemon = self._get_daemon()
            addrs = list(dict.fromkeys(addr.without_peer() for addr in (*self._addrs_of(peer), *more)))
            if not addrs:
                try:
                    addrs = list((await daemon.find_peer(peer, timeout_s=LOOKUP_TIMEOUT_S)).addrs)
                except DaemonError:
                    addrs = []  # p2pd may still know one itself
            await daemon.connect(peer, addrs, timeout_s=timeout_s)
            await self.look()
        except DaemonError as exc:
            if exc.code == "daemon_unavailable":
                dial.error = exc
                raise
            dial.error = PeerUnreachableError(f"{peer.short()} cannot be reached: {exc}")
            raise dial.error from exc
        finally:
            self._dialling.pop(peer).done.set()

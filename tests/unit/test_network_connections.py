"""Who is connected, and getting somebody connected."""

from __future__ import annotations

from typing import cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lloom_sidecar.errors import DaemonRejectedError, DaemonUnavailableError, LloomError, PeerUnreachableError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.network.connections import POLL_S, Connections
from lloom_sidecar.p2p.daemon import Connection, Daemon, PeerAddrs
from lloom_sidecar.p2p.errors import DaemonTimeoutError
from tests.fakes.fake_nodes import fake_nodes

A, B = (PeerId.from_ed25519(bytes([n]) * 32) for n in (1, 2))
DIRECT = Multiaddr.parse("/ip4/10.0.0.1/tcp/4001")
RELAYED = Multiaddr.parse(f"/ip4/10.0.0.2/tcp/4001/p2p/{B}/p2p-circuit")


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, PeerId]] = []
        self.polls: list[int] = []

    def connected(self, peer: PeerId, addr: Multiaddr) -> None:
        self.events.append(("+", peer))

    def disconnected(self, peer: PeerId) -> None:
        self.events.append(("-", peer))

    def polled(self, peers: int) -> None:
        self.polls.append(peers)


class Network:
    """The calls of a daemon that Connections makes, with answers that a test decides on."""

    def __init__(self) -> None:
        self.rows: list[Connection] = []
        self.dials: list[tuple[PeerId, list[Multiaddr]]] = []
        self.lookups = 0
        self.known: dict[PeerId, tuple[Multiaddr, ...]] = {}
        self.dial_error: Exception | None = None
        self.gate: trio.Event | None = None
        self.look_gates: list[trio.Event | None] = []
        self.is_down = False

    async def list_peers(self) -> list[Connection]:
        await trio.lowlevel.checkpoint()
        if self.is_down:
            raise DaemonUnavailableError("away")
        rows = list(self.rows)
        gate = self.look_gates.pop(0) if self.look_gates else None
        if gate is not None:
            await gate.wait()
        return rows

    async def connect(self, peer: PeerId, addrs: list[Multiaddr], *, timeout_s: float) -> None:
        self.dials.append((peer, list(addrs)))
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()
        if self.dial_error is not None:
            raise self.dial_error
        self.rows.append(Connection(peer, DIRECT))

    async def find_peer(self, peer: PeerId, *, timeout_s: float) -> PeerAddrs:
        self.lookups += 1
        await trio.lowlevel.checkpoint()
        if peer not in self.known:
            raise DaemonRejectedError("not found")
        return PeerAddrs(peer, self.known[peer])


def connections(network: Network, *addrs: Multiaddr) -> tuple[Connections, Seen]:
    seen = Seen()
    made = Connections(get_daemon=lambda: cast("Daemon", network), addrs_of=lambda peer: addrs, observer=seen)
    return made, seen


class TestLooking:
    async def test_the_difference_is_told(self) -> None:
        network = Network()
        c, seen = connections(network)
        network.rows = [Connection(A, DIRECT), Connection(B, DIRECT)]
        await c.look()
        network.rows = [Connection(B, RELAYED)]
        await c.look()
        await c.look()
        assert sorted(seen.events[:2], key=str) == sorted([("+", A), ("+", B)], key=str)
        assert seen.events[2:] == [("-", A)]
        assert seen.polls == [2, 1, 1]
        assert (list(c), len(c), A in c, B in c) == ([B], 1, False, True)
        assert c.addr_of(B) == RELAYED
        assert c.addr_of(A) is None

    async def test_of_several_connections_a_direct_one_is_kept(self) -> None:
        network = Network()
        c, _ = connections(network)
        for rows in ([RELAYED, DIRECT], [DIRECT, RELAYED]):
            network.rows = [Connection(A, addr) for addr in rows]
            await c.look()
            assert c.addr_of(A) == DIRECT

    async def test_each_second_also_over_a_daemon_that_was_away(self, autojump_clock: MockClock) -> None:
        network = Network()
        c, seen = connections(network)
        async with trio.open_nursery() as nursery:
            await nursery.start(c.run)
            await trio.sleep(0.5)
            network.is_down = True
            await trio.sleep(3)
            c.lost_all()
            network.is_down = False
            network.rows = [Connection(A, DIRECT)]
            await trio.sleep(POLL_S)
            assert A in c
            nursery.cancel_scope.cancel()
        assert seen.events == [("+", A)]

    async def test_lost_all(self) -> None:
        network = Network()
        c, seen = connections(network)
        network.rows = [Connection(A, DIRECT)]
        await c.look()
        c.lost_all()
        assert seen.events == [("+", A), ("-", A)]
        assert len(c) == 0

    async def test_a_look_that_comes_late_does_not_undo_a_newer_one(self) -> None:
        network = Network()
        c, seen = connections(network)
        late = trio.Event()
        network.look_gates = [late]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(c.look)
            await wait_all_tasks_blocked()
            await c.ensure(A)
            late.set()
        assert A in c
        assert seen.events == [("+", A)]


class TestEnsure:
    async def test_one_that_is_connected_is_not_dialled(self) -> None:
        network = Network()
        c, _ = connections(network, DIRECT)
        network.rows = [Connection(A, DIRECT)]
        await c.look()
        await c.ensure(A)
        assert network.dials == []

    async def test_known_addresses_are_dialled_without_the_peers_name(self) -> None:
        network = Network()
        c, seen = connections(network, DIRECT.with_peer(A))
        await c.ensure(A)
        assert network.dials == [(A, [DIRECT])]
        assert network.lookups == 0
        assert seen.events == [("+", A)]

    async def test_without_any_the_dht_is_asked(self) -> None:
        network = Network()
        c, _ = connections(network)
        network.known[A] = (DIRECT,)
        await c.ensure(A)
        await c.ensure(B)
        assert network.dials == [(A, [DIRECT]), (B, [])]

    async def test_many_at_once_share_one_dial(self) -> None:
        network = Network()
        network.gate = trio.Event()
        c, _ = connections(network, DIRECT)
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(c.ensure, A)
            await wait_all_tasks_blocked()
            network.gate.set()
        assert len(network.dials) == 1

    async def test_and_its_failure(self) -> None:
        network = Network()
        network.gate = trio.Event()
        network.dial_error = DaemonRejectedError("no route")
        c, _ = connections(network, DIRECT)
        failures: list[LloomError] = []

        async def ensure() -> None:
            try:
                await c.ensure(A)
            except PeerUnreachableError as exc:
                failures.append(exc)

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(ensure)
            await wait_all_tasks_blocked()
            network.gate.set()
        assert len(failures) == 10
        assert len(network.dials) == 1
        network.dial_error = None
        await c.ensure(A)

    async def test_a_dial_that_is_cancelled_is_taken_over(self) -> None:
        network = Network()
        network.gate = trio.Event()
        c, _ = connections(network, DIRECT)
        scope = trio.CancelScope()

        async def cancelled() -> None:
            with scope:
                await c.ensure(A)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancelled)
            await wait_all_tasks_blocked()
            nursery.start_soon(c.ensure, A)
            await wait_all_tasks_blocked()
            scope.cancel()
            await wait_all_tasks_blocked()
            network.gate.set()
        assert len(network.dials) == 2
        assert A in c

    @pytest.mark.parametrize(
        ("error", "raised"),
        [
            (DaemonRejectedError("no route"), PeerUnreachableError),
            (DaemonTimeoutError("the dial takes long"), PeerUnreachableError),
            (DaemonUnavailableError("away"), DaemonUnavailableError),
        ],
    )
    async def test_what_went_wrong(self, error: Exception, raised: type[LloomError]) -> None:
        network = Network()
        network.dial_error = error
        c, _ = connections(network, DIRECT)
        with pytest.raises(raised):
            await c.ensure(A)

    async def test_on_a_daemon(self) -> None:
        async with fake_nodes(2, connected=False) as (near, far):
            seen = Seen()
            c = Connections(get_daemon=lambda: near.daemon, addrs_of=lambda peer: (far.p2pd.addr,), observer=seen)
            await c.ensure(far.peer)
            assert c.addr_of(far.peer) == far.p2pd.addr
            near.p2pd.swarm.cut(near.peer, far.peer)
            await c.look()
            assert seen.events == [("+", far.peer), ("-", far.peer)]
            with pytest.raises(PeerUnreachableError):
                await c.ensure(A)

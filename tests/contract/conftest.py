"""The daemons under contract, three nodes of each kind, joined to each other."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.p2p.inbound import Handler, OnInboundError, serve_inbound
from tests.contract.binaries import RealNode, find_ours, find_upstream, free_port, short_dir
from tests.fakes.fake_p2pd import FakeP2pd, FakeSwarm

__all__ = ["short_dir"]

KINDS = ["fake", "fake_tcp", "ours", "ours_tcp", "upstream", "mixed"]
if os.environ.get("LLOOM_TEST_P2PD"):
    KINDS.append("named")

_numbers = itertools.count(1)


@dataclass
class Node:
    """One daemon and how tests reach it."""

    daemon: Daemon
    peer: PeerId
    addrs: tuple[Multiaddr, ...]


class Net:
    """Three nodes of one kind, connected to each other."""

    def __init__(self, kind: str, nodes: list[Node], nursery: trio.Nursery, directory: Path) -> None:
        self.kind = kind
        self.nodes = nodes
        self.directory = directory
        self._nursery = nursery

    @property
    def is_fake(self) -> bool:
        return self.kind.startswith("fake")

    def unique(self, name: str) -> str:
        """A name that no other test of the session uses: the real nodes are shared."""
        return f"/test/{name}/{next(_numbers)}"

    async def listen(
        self, handlers: Mapping[str, Handler], *, max_streams: int = 256, on_error: OnInboundError | None = None
    ) -> Multiaddr:
        """An inbound listener; over TCP for the kinds whose control socket is TCP."""
        where: Path | Multiaddr = self.directory / f"in{next(_numbers)}.sock"
        if self.kind.endswith("tcp"):
            where = Multiaddr.parse("/ip4/127.0.0.1/tcp/0")

        async def run(*, task_status: trio.TaskStatus[Multiaddr]) -> None:
            await serve_inbound(where, handlers, max_streams=max_streams, on_error=on_error, task_status=task_status)

        address: Multiaddr = await self._nursery.start(run)
        return address

    async def serve(self, node: Node, protocol: str, handler: Handler) -> None:
        """Make ``node`` answer ``protocol`` with ``handler``."""
        await node.daemon.register_handler(protocol, await self.listen({protocol: handler}))


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def real_nodes(kind: str) -> Iterator[list[RealNode]]:
    if kind.startswith("fake"):
        yield []
        return
    if kind == "mixed":
        binaries = [find_ours(), find_upstream(), find_ours()]
    elif kind == "named":
        binaries = [Path(os.environ["LLOOM_TEST_P2PD"])] * 3
    else:
        binaries = [find_upstream() if kind == "upstream" else find_ours()] * 3
    nodes: list[RealNode] = []
    try:
        for binary in binaries:
            control = f"/ip4/127.0.0.1/tcp/{free_port()}" if kind.endswith("tcp") else None
            nodes.append(RealNode(binary, control=control))
        yield nodes
    finally:
        for node in nodes:
            node.stop()


@pytest.fixture
async def net(
    kind: str, real_nodes: list[RealNode], short_dir: Path, nursery: trio.Nursery
) -> AsyncGenerator[Net, None]:
    nodes = []
    if kind.startswith("fake"):
        swarm = FakeSwarm()
        for index in range(3):
            fake = FakeP2pd(swarm, control=None if kind.endswith("tcp") else short_dir / f"p2pd{index}.sock")
            control: Multiaddr = await nursery.start(fake.run)
            nodes.append(Node(Daemon(control), fake.peer, (fake.addr,)))
    else:
        nodes = [Node(Daemon(real.control), real.peer, real.identity.addrs) for real in real_nodes]
    # Room for a loaded machine; no test comes near it.
    with trio.fail_after(60):
        for near, far in itertools.combinations(nodes, 2):
            await near.daemon.connect(far.peer, far.addrs)
        yield Net(kind, nodes, nursery, short_dir)
    for node in nodes:
        node.daemon.close()

"""Nodes on one fake swarm, each a FakeP2pd with the real facade in front of it, without a sidecar."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.p2p.inbound import serve_inbound
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.envelope import Signer
from tests.fakes.fake_p2pd import FakeP2pd, FakeSwarm


@dataclass(eq=False)
class FakeNode:
    """One daemon, and the key whose id it has."""

    signer: Signer
    p2pd: FakeP2pd
    daemon: Daemon
    nursery: trio.Nursery
    directory: Path
    served: int = 0

    @property
    def peer(self) -> PeerId:
        """Its id."""
        return self.signer.peer

    async def serve(self, protocol: str, handler: Callable[[P2PStream], Awaitable[None]]) -> None:
        """Answer inbound streams of a protocol."""
        self.served += 1
        where = self.directory / f"{self.peer.short()[-6:]}-{self.served}.sock"
        address = await self.nursery.start(
            lambda task_status: serve_inbound(where, {protocol: handler}, max_streams=64, task_status=task_status)
        )
        await self.daemon.register_handler(protocol, address)


@asynccontextmanager
async def fake_nodes(count: int, *, connected: bool = True) -> AsyncIterator[list[FakeNode]]:
    """``count`` nodes; ``connected`` = each to each other."""
    swarm = FakeSwarm()
    # pytest's own folders have paths too long for a unix socket.
    with tempfile.TemporaryDirectory(prefix="lloom") as folder:
        async with trio.open_nursery() as nursery:
            nodes = []
            for number in range(count):
                signer = Signer(bytes([number + 1]) * 32)
                p2pd = FakeP2pd(swarm, control=Path(folder, f"{number}.sock"), peer=signer.peer)
                control = await nursery.start(p2pd.run)
                nodes.append(FakeNode(signer, p2pd, Daemon(control), nursery, Path(folder)))
            if connected:
                for number, node in enumerate(nodes):
                    for other in nodes[number + 1 :]:
                        swarm.connect(node.peer, other.peer)
            try:
                yield nodes
            finally:
                for node in nodes:
                    node.daemon.close()
                nursery.cancel_scope.cancel()

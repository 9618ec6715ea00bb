"""The peers that a node remembers over its restarts, kept in the ledger."""

from __future__ import annotations

from collections.abc import Sequence

from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.ledger import KnownPeer, Ledger

from .receipts import now_ms


class RememberedPeers:
    """Implements ``network.known_peers.PeerStore``."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def load(self) -> Sequence[KnownPeer]:
        """Those remembered, the last seen first. Raises LloomError."""
        return await self._ledger.known_peers()

    async def save(self, peer: PeerId, addrs: tuple[Multiaddr, ...], roles: frozenset[str]) -> None:
        """Remember one, seen now. Raises LloomError."""
        await self._ledger.remember_peer(KnownPeer(peer, addrs, roles, now_ms()))

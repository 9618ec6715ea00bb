"""The network under measurement: started a few nodes at a time, and looked at by one connection to each node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lloom_sidecar.admin.client import NodeClient, NodeUnreachableError
from tests.harness import Network, Node
from tests.harness.waiting import pause

AT_ONCE = 6
"""Nodes that start together: each is a Python and a Go process, and two cores have to carry them."""
POLL_S = 0.02
MODEL = "scripted"


class Lab:
    """The nodes, and a standing connection to the admin socket of each."""

    def __init__(self, network: Network, executors: int, clients: int) -> None:
        self.network = network
        self._counts = (executors, clients)
        self._stack = ExitStack()
        self._views: dict[str, NodeClient] = {}
        self.last_start_at = 0.0
        """Instant at which the last process was started."""
        self.last_up_at = 0.0

    def start(self) -> None:
        """Start executors and clients, mixed, ``AT_ONCE`` at a time."""
        network = self.network
        executors, clients = self._counts
        nodes = [network.add("executor", start=False) for _ in range(executors)]
        network.executors += nodes
        network.clients += [network.add("client", start=False) for _ in range(clients)]
        # Clients among executors, the last one an executor: what all of them must learn of comes late.
        waiting = [*network.clients, *network.executors]
        for at in range(0, len(waiting), AT_ONCE):
            batch = waiting[at : at + AT_ONCE]
            for node in batch:
                self.last_start_at = time.monotonic()
                node.start(wait=False)
            for node in batch:
                node.wait_up()
        self.last_up_at = time.monotonic()

    def view(self, node: Node) -> NodeClient:
        """A connection to the node, kept open."""
        if node.name not in self._views:
            self._views[node.name] = self._stack.enter_context(node.admin())
        return self._views[node.name]

    def forget(self, node: Node) -> None:
        """Its process ended: the connection with it."""
        view = self._views.pop(node.name, None)
        if view is not None:
            view.close()

    def executors_of(self, node: Node) -> dict[str, dict[str, Any]]:
        """What the node knows of executors, by peer id."""
        return {one["peer"]: dict(one) for one in self.view(node).executors()}

    def offers_of(self, node: Node, peer: str) -> dict[str, Any]:
        """The executor's models as the node knows them, with their prices."""
        return {
            model["id"]: offer["price"]
            for model in self.view(node).models()
            for offer in model["executors"]
            if offer["peer"] == peer
        }

    def knows_all(self, node: Node, peers: set[str]) -> bool:
        """The node knows these executors, fresh."""
        return peers <= {peer for peer, one in self.executors_of(node).items() if one["state"] == "fresh"}

    def until(
        self,
        nodes: Sequence[Node],
        condition: Callable[[Node], bool],
        *,
        since: float,
        what: str,
        timeout_s: float = 60.0,
    ) -> dict[str, float]:
        """Seconds from ``since`` until the condition held at each node. Each look at all nodes takes 3 ms a node or
        more, by which the figures may be too large."""
        found: dict[str, float] = {}
        while len(found) < len(nodes):
            for node in nodes:
                if node.name not in found and condition(node):
                    found[node.name] = time.monotonic() - since
            if time.monotonic() - since > timeout_s:
                missing = [node.name for node in nodes if node.name not in found]
                raise AssertionError(f"waited {timeout_s:g} s for {what}: {', '.join(missing)}")
            pause(POLL_S)
        return found

    @contextmanager
    def extra(self, role: str, *flags: str, bootstrap: bool = True) -> Iterator[tuple[Node, float]]:
        """One more node for a while, with the instant at which its process was started. It may not be up yet."""
        node = self.network.add(role, *flags, start=False, bootstrap=bootstrap)
        began_at = time.monotonic()
        node.start(wait=False)
        try:
            yield node, began_at
        finally:
            self.forget(node)
            node.stop()

    def is_complete(self, peers: set[str]) -> Callable[[Node], bool]:
        """For ``until``: the node, which may still be starting, knows these."""

        def look(node: Node) -> bool:
            try:
                return self.knows_all(node, peers)
            except NodeUnreachableError:
                self.forget(node)
                return False

        return look

    def close(self) -> None:
        """Close the connections."""
        self._stack.close()

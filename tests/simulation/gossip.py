"""How a message travels in the model: a random mesh, hops counted on it, and what each hop takes. No state of its own.

The mesh is between places, not nodes: a node that leaves hands its place to the one that joins, so distances stay.
"""

from __future__ import annotations

import math
import random
from array import array
from dataclasses import dataclass
from typing import Final

MESH_DEGREE: Final = 6
"""Neighbours that gossipsub sends whole messages to. Source: go-libp2p-pubsub, GossipSubD."""
COPIES: Final = 6.3
"""Copies of a message that reach one node. Source: measure_gossip, the slope of bytes over payload among ten nodes."""
COPY_OVERHEAD_BYTES: Final = 230
"""Of one copy on the wire beside the announcement: pubsub's signature, author and topic, Noise, Yamux, TCP/IP and the
TCP acknowledgement. Source: measure_gossip."""


@dataclass(frozen=True, slots=True)
class Hop:
    """What one hop does to a message."""

    ends_s: float = 0.003
    """From the sidecar into p2pd and, at the other end, out of it. Source: measure_gossip, the first hop."""
    process_s: float = 0.0004
    """Median time in p2pd, from reading to the next node's reading. Source: measure_gossip, heartbeat 1 s and 10 s."""
    spread: float = 0.6
    """Sigma of the lognormal distribution of both parts."""
    link_s: float = 0.04
    """Median one-way latency of the network between two nodes; 0 on one machine."""
    loss: float = 0.0
    """Probability that a hop's copies all fail. Source: measure_gossip saw none while readers kept up."""

    def delay_s(self, hops: int, rng: random.Random) -> float:
        """A random time that ``hops`` hops take."""
        median_s = self.process_s + self.link_s
        return self.ends_s + sum(median_s * math.exp(rng.gauss(0.0, self.spread)) for _ in range(hops))

    def passes(self, hops: int) -> float:
        """Probability that a message survives ``hops`` hops."""
        return float((1.0 - self.loss) ** hops)


LOCAL: Final = Hop(link_s=0.0)
"""All nodes on one machine, as measured."""
WIDE: Final = Hop()
"""Nodes in one region of the world: the measured hop and 40 ms of network."""


class Mesh:
    """A random connected graph over ``places`` places in which each has about ``degree`` neighbours."""

    def __init__(self, places: int, rng: random.Random, degree: int = MESH_DEGREE) -> None:
        self.neighbours: list[list[int]] = [[] for _ in range(places)]
        order = list(range(places))
        # A union of random rings is connected, and every place gets two neighbours of each.
        for _ in range(max(1, degree // 2)):
            rng.shuffle(order)
            for here, there in zip(order, order[1:] + order[:1], strict=True):
                if here != there and there not in self.neighbours[here]:
                    self.neighbours[here].append(there)
                    self.neighbours[there].append(here)

    def hops_from(self, place: int) -> array[int]:
        """Hops between ``place`` and every place; 0 for itself."""
        hops = array("H", [0]) * len(self.neighbours)
        seen = bytearray(len(self.neighbours))
        seen[place] = 1
        edge = [place]
        distance = 0
        while edge:
            distance += 1
            following = []
            for here in edge:
                for there in self.neighbours[here]:
                    if not seen[there]:
                        seen[there] = 1
                        hops[there] = distance
                        following.append(there)
            edge = following
        return hops

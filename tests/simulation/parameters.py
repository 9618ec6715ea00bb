"""What a run of the model is given. Every number that is not the code's own is here, with its source."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from lloom_sidecar.network.announcer import FULL_EVERY_S, TOPIC_POLL_S
from lloom_sidecar.network.bootstrap import REFRESH_CATALOGUE_S
from lloom_sidecar.network.connections import POLL_S
from lloom_sidecar.network.prober import MAX_PROBES, MAX_UNDER_WAY, PROBE_TIMEOUT_S, TICK_S
from lloom_sidecar.peers.peerbook import PeerBookLimits

from .gossip import WIDE, Hop

__all__ = [
    "FULL_EVERY_S",
    "MAX_PROBES",
    "MAX_UNDER_WAY",
    "MIN_REPEAT_S",
    "POLL_S",
    "PROBE_TIMEOUT_S",
    "REFRESH_CATALOGUE_S",
    "TICK_S",
    "TOPIC_POLL_S",
    "Death",
    "Parameters",
]


MIN_REPEAT_S = 1.0
"""Between two full announcements that topic peers caused, when each of them did (``reannounces``)."""


class Death(Enum):
    """What happens to an executor that does not say goodbye."""

    PROCESS = "process"
    """``kill -9``: the kernel closes its sockets, a new dial is refused at once."""
    HOST = "host"
    """Power or cable: nothing answers, nothing closes."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """One run."""

    executors: int
    seed: int = 1
    warm_up_s: float | None = None
    """Before anything is counted; None = one lease, at least 60 s."""
    window_s: float = 300.0
    """Deaths, joins and traffic are counted in it."""
    tail_s: float | None = None
    """After it, for what began in it; None = until the last death must be known."""
    observers: int = 8
    """Clients with a full book. The other nodes are not simulated, only their share of the traffic."""
    clients_per_executor: float = 1.0
    """Clients in the network, by executors: what the observers do is scaled to so many."""
    lifetime_s: float = 3600.0
    """Mean life of an executor, exponential; one that ends is replaced at once."""
    kill_share: float = 0.5
    """Of those that end: without a removal."""
    aimed_every_s: float = 0.0
    """Beside churn: kill one that an observer is connected to, and next time let a random one leave. In large networks
    churn alone hits none that an observer uses. 0 = never."""
    newcomer_every_s: float = 0.0
    """A new client joins, reads the validator's catalogue, and leaves when it has everybody. 0 = never."""
    death: Death = Death.PROCESS
    hop: Hop = WIDE
    loss: float = 0.0
    """Probability that a message does not reach a node at all, beside ``hop.loss``."""
    mesh_forms_s: tuple[float, float] = (0.4, 0.6)
    """Range within which a newcomer's place in the mesh is ready; before that its messages reach nobody, nor it any.
    A dial and hello take 5 round trips; then it subscribes, having a neighbour, and is grafted at once.
    Source: network.gossip.NEIGHBOUR_POLL_S; measure_gossip, the newcomer that subscribed after it was connected."""
    introduces: bool = True
    """An executor announces everything as soon as its place in the mesh is ready, as the announcer does."""
    request_every_s: float = 5.0
    """Mean time between the requests of one client."""
    requests_per_conversation: int = 10
    """Requests with one affinity key."""
    models: int = 0
    """Different models, each executor offers one; 0 = a tenth of the executors, from 2 to 100."""
    idle_peer_s: float = 0.0
    """A connection that was not used for so long is closed; 0 = never, as long as the water marks are not reached."""
    bandwidth_bytes_s: float = 2.5e6
    """Of a newcomer's link, for the catalogue: 20 Mbit/s."""
    open_announcement_s: float = 200e-6
    """CPU to check one announcement. Source: open_announcement on the machine of the docs."""
    reannounces: bool = False
    """An executor announces in full for each topic peer that appears, as it once did, not for the first only."""
    refresh_catalogue_s: float = REFRESH_CATALOGUE_S
    """0 = never."""
    interval_s: float = 0.0
    """Heartbeat interval instead of the policy's, 0 = the policy."""
    max_executors: int = PeerBookLimits().max_executors
    """Places in a peer book."""
    hints_every_s: float = 0.0
    """Not built: a validator tells so often whom it lost the connection to, and receivers suspect those. 0 = off."""

    @property
    def rtt_s(self) -> float:
        """Round trip between two nodes."""
        return 2 * self.hop.link_s + 0.001

    @property
    def model_count(self) -> int:
        """Different models in the network."""
        return self.models or max(2, min(100, self.executors // 10))

    @property
    def clients(self) -> float:
        """Clients in the whole network, at least those that are simulated."""
        return max(float(self.observers), self.clients_per_executor * self.executors)

    @property
    def clients_per_observer(self) -> float:
        """How many clients one observer stands for."""
        return self.clients / self.observers

"""What the operator's side needs of a node, and the JSON shapes that it hands out.

The shapes are stable: fields are added, never renamed or removed. ``lloomctl --json`` prints them as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

from .events import EventBus

if TYPE_CHECKING:
    from .books import Books
    from .operations import Operations

PathKind = Literal["direct", "relayed", "none"]
"""How a peer is reached: ``none`` = not connected."""
LeaseState = Literal["fresh", "suspect", "dead", "none"]
"""Of an executor's lease: ``none`` = it announced nothing (a client, a validator)."""


class ConditionInfo(TypedDict):
    """A health condition that holds."""

    code: str
    """Stable identifier."""
    title: str
    """A few words."""
    severity: str
    """info, warning or error."""
    text: str
    """A sentence with the facts."""
    remedy: str
    """A sentence: what to do."""


class P2pdInfo(TypedDict):
    """The libp2p daemon behind the node."""

    mode: Literal["managed", "attached"]
    """Started by this node, or by somebody else."""
    path: str | None
    """The program (managed) or the control address (attached)."""
    version: str | None
    """As it says; None when it says none (stock p2pd)."""
    pid: int | None
    """None when attached or not running."""
    up: bool
    """True while it answers."""
    restarts: int
    """Since the node started."""
    features: list[str]
    """What it has beyond a stock one, for instance quic, mdns, relay."""


class NetworkInfo(TypedDict):
    """The network that the node belongs to."""

    id: str | None
    """Public network id, hex; None for an open node without a network."""
    open: bool
    """True when nodes of any network are dealt with."""
    previous_key_until: str | None
    """ISO 8601, UTC: until then the key before the last rotation is accepted."""


class ApiInfo(TypedDict):
    """The OpenAI API for applications."""

    address: str | None
    """URL such as http://127.0.0.1:4880; None when the node is no client."""
    ready: bool
    """True when it listens."""


class ValidatorInfo(TypedDict):
    """A validator that the node is configured to trust."""

    peer: str
    """Peer id."""
    connected: bool


class PriceInfo(TypedDict):
    """Integer minor units per million tokens."""

    prompt_per_million: int
    completion_per_million: int
    currency: str
    """Empty when free."""


class ModelStatusInfo(TypedDict):
    """One model, as a validator sees it."""

    id: str
    executors: int
    slots: int
    """Sum over them."""
    median_price: PriceInfo
    """Each part the lower median over those that charge in the currency that most of them use."""


class SoftwareInfo(TypedDict):
    """A version and how many nodes have it."""

    software: str
    nodes: int


class NetworkStatusInfo(TypedDict):
    """The latest signed status of one configured validator."""

    peer: str
    """The validator's peer id."""
    age_s: float
    """Since it was received."""
    current: bool
    """False when its time is over: the validator has fallen silent."""
    executors: int
    members: int
    models_total: int
    models: list[ModelStatusInfo]
    """Those with the most executors, at most 64."""
    software: list[SoftwareInfo]
    in_flight: int
    queued: int
    slots: int


class RequestCounts(TypedDict):
    """Requests of applications (client) and of peers (executor) since the node started."""

    in_flight: int
    """Under way now."""
    served: int
    """Ended well."""
    failed: int
    """Ended in an error."""
    cancelled: int
    """Ended because the other side went away."""
    queued: int
    """Waiting for a slot now."""


class TokenCounts(TypedDict):
    """Completion tokens since the node started."""

    received: int
    """Of answers to this node's applications, as their receipts say."""
    generated: int
    """By this node's backend, of answers that it streamed."""


class Status(TypedDict):
    """GET /v1/status."""

    peer: str
    """This node's peer id."""
    version: str
    """Of lloom-sidecar."""
    roles: list[str]
    """client, executor, validator."""
    uptime_s: float
    """Since the node was started."""
    draining: bool
    """True when new work is refused because the node is about to end."""
    home: str
    """Folder of its state."""
    p2pd: P2pdInfo
    network: NetworkInfo
    api: ApiInfo
    addrs: list[str]
    """Addresses where others reach it, each with /p2p/<peer>."""
    connections: int
    """Connected peers."""
    members: int
    """Connected peers that proved the network."""
    executors: int
    """Executors whose lease holds."""
    models: int
    """Different models that those offer."""
    validators: list[ValidatorInfo]
    network_status: list[NetworkStatusInfo]
    """What the configured validators (and this node, if it is one) say of the network."""
    requests: RequestCounts
    tokens: TokenCounts
    page: str | None
    """URL of the status page; None when it is off."""
    conditions: list[ConditionInfo]
    """The worst first."""


class PeerInfo(TypedDict):
    """An item of GET /v1/peers."""

    peer: str
    """Peer id."""
    roles: list[str]
    """As it said in hello or by its announcement; empty when unknown."""
    addrs: list[str]
    """Where it was seen."""
    connected: bool
    path: PathKind
    member: bool
    """True when it proved the network, or is allow-listed."""
    state: LeaseState
    lease_left_s: float | None
    """Seconds; None without a lease."""
    software: str
    """As it says."""
    rtt_ms: float | None
    """Smoothed; None when unmeasured."""
    source: str
    """How it was found: bootstrap, hello, gossip, catalogue, dht, mdns, inbound."""


class OfferInfo(TypedDict):
    """One model at one executor: inside a model, or inside an executor with ``id`` in place of ``peer``."""

    peer: str
    """The executor's peer id."""
    state: LeaseState
    context_length: int
    """Tokens; 0 = unknown."""
    slots: int
    in_flight: int
    """As it announced."""
    queued: int
    """As it announced."""
    price: PriceInfo
    features: list[str]
    """Empty = unknown."""
    digest: str
    """SHA-256 of the weights, hexadecimal; empty = unknown."""
    ttft_ms: float | None
    """Time to the first token: measured here, else as it announced; None = unknown."""
    tokens_per_s: float | None
    """Of one stream; None = unknown."""


class ModelInfo(TypedDict):
    """An item of GET /v1/models."""

    id: str
    """As requests name it."""
    family: str
    """Empty when unknown."""
    executors: list[OfferInfo]


class ExecutorInfo(TypedDict):
    """An item of GET /v1/executors."""

    peer: str
    """Peer id."""
    state: LeaseState
    lease_left_s: float | None
    connected: bool
    path: PathKind
    member: bool
    software: str
    circuit: str
    """closed, open or half_open: whether this node sends it requests."""
    in_flight: int
    """As it announced."""
    queued: int
    """As it announced."""
    models: list[str]
    """Ids."""
    trust: float
    """1 = nothing is held against it, 0 = fully doubted."""
    doubts: list[str]
    """Why it is doubted, the strongest reason first."""


class SettingInfo(TypedDict):
    """An item of GET /v1/config."""

    name: str
    value: Any
    """JSON; secrets are paths."""
    source: str
    """flag, env, file, joined or default."""
    env: str
    flag: str


class ReceiptClaimsInfo(TypedDict):
    """What a receipt states."""

    client: str
    """Peer id."""
    executor: str
    """Peer id."""
    model: str
    prompt_tokens: int
    completion_tokens: int
    usage_source: str
    """backend, chunks or unknown: who counted."""
    cost: int
    """Minor units."""
    currency: str
    answer_bytes: int
    answer_digest: str
    """Hex SHA-256 of salt and answer."""
    request_digest: str
    """Hex SHA-256 of the signed request's envelope."""
    accepted_at_ms: int
    """Unix milliseconds, the executor's clock."""
    ended_at_ms: int


class ReceiptInfo(TypedDict):
    """GET /v1/receipts/{request id}: the verified receipt of an answer that this node received."""

    request_id: str
    """Hex."""
    claims: ReceiptClaimsInfo
    envelope: str
    """Hex: the executor's signed receipt, verifiable by anybody."""
    request: str
    """Hex: this node's signed request."""
    ack: str
    """Hex: this node's countersignature."""


class Check(TypedDict):
    """One check behind a probe."""

    name: str
    """For instance ``api`` or ``p2pd``."""
    ok: bool
    text: str
    """Empty when ok, else what is wrong."""


class ProbeView(Protocol):
    """What the probes need of a node. Methods are synchronous snapshots."""

    def startup_checks(self) -> list[Check]:
        """Has the node finished starting: everything that ``readiness_checks`` names, once."""

    def readiness_checks(self) -> list[Check]:
        """Can it be sent work: its API listens, p2pd answers, it is not draining. Never whether it has peers."""

    def render_metrics(self) -> bytes:
        """Prometheus text of type ``metrics.CONTENT_TYPE``."""


class NodeView(ProbeView, Protocol):
    """What the admin API needs of a node: snapshots, its events, and two actions."""

    @property
    def events(self) -> EventBus:
        """The node's events."""

    @property
    def operations(self) -> Operations:
        """What an operator can do with it."""

    @property
    def books(self) -> Books:
        """Its ledger."""

    def status(self) -> Status:
        """The node at a glance."""

    def peers(self) -> list[PeerInfo]:
        """Every peer that the node knows, connected ones first."""

    def models(self) -> list[ModelInfo]:
        """Every model that an executor offers to this node."""

    def executors(self) -> list[ExecutorInfo]:
        """Every executor that the node knows."""

    def config_effective(self) -> list[SettingInfo]:
        """Every setting with its value and source: ``Config.effective()``."""

    def conditions(self) -> list[ConditionInfo]:
        """The health conditions, the worst first: ``HealthConditions.as_dicts()``."""

    def receipt(self, request_id: str) -> ReceiptInfo | None:
        """The verified receipt of a recent request of this node's applications, None when there is none."""

    async def connect(self, addr: str) -> PeerInfo:
        """Connect to the peer at a multiaddr with /p2p. Has its own deadline.

        Raises:
            LloomError: with its http_status, for instance PeerUnreachableError.
            ValueError: ``addr`` is no such multiaddr.
        """

    async def drain(self) -> None:
        """Begin to drain: removal announced, new work refused, running work finished. Returns at once; idempotent."""

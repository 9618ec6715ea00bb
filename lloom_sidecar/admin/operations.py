"""What an operator can do with a node and ask of it, beyond a snapshot: peers, validators, DHT, gossip, doctor.

JSON shapes as in ``view.py``: fields are added, never renamed or removed.
"""

from __future__ import annotations

from typing import Any, Final, Literal, Protocol, TypedDict

from .doctor import Finding
from .explaining import Explanation, RequestInfo
from .view import PathKind, PriceInfo

DEFAULT_DHT_TIMEOUT_S: Final = 60.0
"""For one DHT request. Source: p2pd's own deadline."""
MAX_DHT_TIMEOUT_S: Final = 600.0
DEFAULT_PROVIDERS: Final = 20
"""Source: FIND_PROVIDERS' own default."""
MAX_PROVIDERS: Final = 1000
MAX_RECORD_BYTES: Final = 32 * 1024
"""Largest value that is put into the DHT: a /pk record has 36 bytes, an /ipns record at most 10 KiB."""


class PingInfo(TypedDict):
    """One round trip to a peer."""

    peer: str
    rtt_ms: float
    """From our first frame of hello to the first of its answer."""
    path: PathKind
    addr: str
    """Remote address of the connection."""
    member: bool
    """True when it proved the network."""
    clock_ahead_ms: int
    """By how much its clock is ahead of ours, to within the round trip."""


class DisconnectInfo(TypedDict):
    """What became of a wish to be rid of a peer."""

    peer: str
    was_connected: bool
    is_validator: bool
    """Configured validators are dialled again at once."""


class ConfiguredValidator(TypedDict):
    """An item of GET /v1/bootstrap."""

    peer: str
    addrs: list[str]
    """As configured, without /p2p."""
    state: Literal["joined", "connected", "unreachable", "dialling"]
    """Joined = connected, hello said, catalogue read."""
    path: PathKind
    rtt_ms: float | None
    failures: int
    """Failed attempts since it was last joined."""
    last_error: str
    """Empty while it is joined."""
    in_file: bool
    """True when HOME/bootstrap names it."""


class BootstrapInfo(TypedDict):
    """GET /v1/bootstrap."""

    file: str
    source: str
    """Where the setting came from when the node started: flag, env, file, joined (HOME/bootstrap) or default."""
    validators: list[ConfiguredValidator]


class BootstrapChange(TypedDict):
    """What adding or removing a validator changed."""

    peer: str
    addrs: list[str]
    """Added or removed ones, without /p2p."""
    file_changed: bool
    node_changed: bool
    lasts: bool
    """False when the next start will not see it: flags, environment or config file go before HOME/bootstrap."""


class DhtPeer(TypedDict):
    """A peer as the DHT tells of it."""

    peer: str
    addrs: list[str]
    """May be empty."""
    is_self: bool
    connected: bool


class ProvidersInfo(TypedDict):
    """Who provides a key."""

    key: str
    """As asked: a service key, or a CID."""
    cid: str
    asked: str | None
    """The one peer that was asked; None = the DHT, own records included."""
    providers: list[DhtPeer]
    complete: bool
    """False when the time was over before the DHT was through."""


class ClosestInfo(TypedDict):
    """The peers nearest to a key."""

    key: str
    peers: list[DhtPeer]


class ProvidedInfo(TypedDict):
    """A provider record was put."""

    key: str
    cid: str


class RecordInfo(TypedDict):
    """A record in the DHT."""

    key: str
    """Such as /pk/12D3KooW..."""
    value: str
    """Base64."""


class TopicInfo(TypedDict):
    """A gossip topic that the node is subscribed to."""

    topic: str
    peers: list[str]
    """Connected peers that are subscribed too."""


class EffectiveInfo(TypedDict):
    """A value that p2pd works with: an item of ``p2pd`` in GET /v1/config."""

    name: str
    value: Any
    """JSON; None = not known, since another one starts p2pd."""
    source: str
    """Where it is decided: the name of a setting, or ``p2pd``, ``kad-dht``, ``lloom``."""
    text: str
    """What it means."""


class QueriedModels(TypedDict):
    """What an executor said when it was asked for its models."""

    peer: str
    models: list[dict[str, Any]]
    """Its own words: OpenAI's shape of a model, with a ``lloom`` object."""
    load: dict[str, Any]


class QuoteInfo(TypedDict):
    """A signed price; this node's requests use it while it holds."""

    peer: str
    model: str
    price: PriceInfo
    quote_id: str
    """Hex."""
    valid_s: float
    """For how long it still holds."""
    envelope: str
    """Hex: the executor's signed promise."""


class PriceChange(TypedDict):
    """What this executor asks for a model."""

    model: str
    price: PriceInfo
    """From now on."""
    before: PriceInfo


class ExecutorState(TypedDict):
    """Whether this executor takes work."""

    paused: bool
    """True when it takes none though its node goes on."""
    requests: int
    """That still work or wait here."""


class Operations(Protocol):
    """What the admin API needs of a node besides ``view.NodeView``.

    Texts come from an operator: a ValueError is a sentence for that person (400). LloomErrors keep their status. All
    that waits for others has a deadline of its own.
    """

    async def ping(self, peer: str) -> PingInfo:
        """One round trip of hello; dials the peer if need be."""

    async def disconnect(self, peer: str) -> DisconnectInfo:
        """Close every connection to the peer."""

    def bootstrap(self) -> BootstrapInfo:
        """The configured validators and how they stand."""

    async def bootstrap_add(self, addr: str) -> BootstrapChange:
        """Trust one more validator, in HOME/bootstrap and at once."""

    async def bootstrap_remove(self, which: str) -> BootstrapChange:
        """Trust a validator no more: ``which`` is its peer id, or one of its addresses."""

    async def find_providers(self, key: str, *, count: int, timeout_s: float, at: str | None) -> ProvidersInfo:
        """Who provides a service key or CID; ``at`` asks only that peer for the records that it holds itself."""

    async def provide(self, key: str, *, timeout_s: float) -> ProvidedInfo:
        """Put a provider record of this node."""

    async def closest(self, key: str, *, timeout_s: float) -> ClosestInfo:
        """The peers nearest to a key or peer id."""

    async def find_peer(self, peer: str, *, timeout_s: float) -> DhtPeer:
        """Where the DHT says that a peer is."""

    async def get_record(self, key: str, *, timeout_s: float) -> RecordInfo:
        """The best record under /pk/PEER or /ipns/NAME."""

    async def put_record(self, key: str | None, value: bytes, *, timeout_s: float) -> RecordInfo:
        """Put a record; ``key`` None = this node's own public key, and ``value`` is ignored."""

    async def topics(self) -> list[TopicInfo]:
        """The gossip topics that the node is subscribed to."""

    async def topic_peers(self, topic: str) -> TopicInfo:
        """Who else is subscribed to a topic: its name, or ``executors`` or ``network``."""

    def p2pd_effective(self) -> list[EffectiveInfo]:
        """What p2pd works with."""

    async def query_models(self, peer: str) -> QueriedModels:
        """Ask an executor what it offers now."""

    async def ask_quote(self, peer: str, model: str) -> QuoteInfo:
        """Ask an executor for a signed price."""

    def set_price(self, model: str, price: str) -> PriceChange:
        """Let this executor ask another price for a model, until it ends: ``PROMPT/COMPLETION CURRENCY`` or free."""

    def requests(self) -> list[RequestInfo]:
        """The last requests of applications, newest first."""

    def explain(self, what: str, policy: str | None) -> Explanation:
        """A request by its id, or what would be chosen for a model now."""

    def pause_executor(self) -> ExecutorState:
        """Let this executor take no further work while the node goes on; what runs may finish within the grace."""

    def executor_state(self) -> ExecutorState:
        """Whether this executor takes work, and how much is under way."""

    def resume_executor(self) -> ExecutorState:
        """Let this executor take work again. Raises RequestError when the node is about to end."""

    async def examine(self) -> list[Finding]:
        """Every check of ``doctor`` that a running node can make itself."""

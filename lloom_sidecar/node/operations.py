"""What an operator can do with a node: implements ``admin.operations.Operations``."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from lloom_sidecar.admin.doctor import Finding
from lloom_sidecar.admin.operations import (
    BootstrapChange,
    BootstrapInfo,
    ClosestInfo,
    ConfiguredValidator,
    DhtPeer,
    DisconnectInfo,
    EffectiveInfo,
    ExecutorState,
    PingInfo,
    PriceChange,
    ProvidedInfo,
    ProvidersInfo,
    QueriedModels,
    QuoteInfo,
    RecordInfo,
    TopicInfo,
)
from lloom_sidecar.admin.view import PriceInfo
from lloom_sidecar.config import BOOTSTRAP_FILE_NAME, parse_bootstrap, read_bootstrap_file
from lloom_sidecar.errors import ConfigError, DaemonError, PeerUnreachableError, RequestError
from lloom_sidecar.ids import Multiaddr, PeerId, check_model_id
from lloom_sidecar.network.bootstrap import Validator
from lloom_sidecar.network.dht_peer import ask_providers
from lloom_sidecar.network.discovery import REPROVIDE_S
from lloom_sidecar.p2p.daemon import PeerAddrs
from lloom_sidecar.protocol.names import TOPIC_EXECUTORS, TOPIC_NETWORK
from lloom_sidecar.protocol.offers import Price

from .bootstrap_file import add_line, remove_lines
from .daemon import is_stock, max_streams
from .dht_keys import EMPTY_TABLE, own_record, place_key, provider_key, record_key, record_key_text
from .doctor import Doctor
from .explaining import Explainer
from .receipts import now_ms

if TYPE_CHECKING:
    from .executor_side import ExecutorSide
    from .node import Node

DHT_K: Final = 20
"""Size of a bucket, and peers that a record is put at. Source: kad-dht, defaultBucketSize."""
DHT_DEADLINE_S: Final = 60.0
"""Of a DHT request that names none. Source: go-libp2p-daemon, its default timeout."""
PROVIDE_VALIDITY_S: Final = 48 * 3600.0
"""Source: kad-dht, ProvideValidity."""
CONN_GRACE_S: Final = 120.0
"""Source: p2p.launch.DaemonSettings.connmgr_grace_s."""
_TOPICS: Final = {"executors": TOPIC_EXECUTORS, "network": TOPIC_NETWORK}


class NodeOperations:
    """The operations of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._doctor = Doctor(node)
        explainer = Explainer(node)
        self.requests = explainer.requests
        self.explain = explainer.explain

    # ------------------------------------------------------------ peers
    async def ping(self, peer: str) -> PingInfo:
        """One round trip of hello; dials the peer if need be."""
        found = self._other_peer(peer)
        control = self._node.control
        await control.connections.ensure(found, addrs=self._configured(found))
        greeted = await control.hello.greet(found)
        rtt_s = greeted.rtt_s or 0.0
        return PingInfo(
            peer=str(found),
            rtt_ms=round(rtt_s * 1000, 3),
            path="relayed" if greeted.addr.is_relayed else "direct",
            addr=str(greeted.addr),
            member=greeted.is_member,
            clock_ahead_ms=greeted.node.now_ms - now_ms() + round(rtt_s * 500) if greeted.node.now_ms else 0,
        )

    async def disconnect(self, peer: str) -> DisconnectInfo:
        """Close every connection to the peer."""
        found = self._other_peer(peer)
        control = self._node.control
        was_connected = found in control.connections
        self._node.observer.will_close(found, "operator")
        await self._node.daemon().disconnect(found)
        await control.connections.look()
        is_validator = any(one.peer == found for one in control.bootstrap.validators)
        return DisconnectInfo(peer=str(found), was_connected=was_connected, is_validator=is_validator)

    # ------------------------------------------------------------ validators
    def bootstrap(self) -> BootstrapInfo:
        """The configured validators and how they stand."""
        config = self._node.config
        with_file = self._in_file()
        return BootstrapInfo(
            file=str(config.home / BOOTSTRAP_FILE_NAME),
            source=config.sources.get("bootstrap", "default"),
            validators=[self._validator(one, with_file) for one in self._node.control.bootstrap.validators],
        )

    def _validator(self, one: Validator, with_file: frozenset[PeerId]) -> ConfiguredValidator:
        node = self._node
        addr = node.control.connections.addr_of(one.peer)
        rtt_s = node.observer.rtt_s.get(one.peer)
        if addr is None:
            state = "unreachable" if one.failures else "dialling"
        else:
            state = "joined" if one.is_joined else "connected"
        return ConfiguredValidator(
            peer=str(one.peer),
            addrs=[str(a.without_peer()) for a in one.addrs],
            state=state,  # type: ignore[typeddict-item]
            path="none" if addr is None else "relayed" if addr.is_relayed else "direct",
            rtt_ms=None if rtt_s is None or addr is None else round(rtt_s * 1000, 3),
            failures=one.failures,
            last_error="" if state == "joined" else one.last_error,
            in_file=one.peer in with_file,
        )

    async def bootstrap_add(self, addr: str) -> BootstrapChange:
        """Trust one more validator, in HOME/bootstrap and at once."""
        parsed = parse_bootstrap(addr)
        peer = parsed.peer_id
        assert peer is not None  # parse_bootstrap wants it
        if peer == self._node.me:
            raise RequestError("that is this node's own address")
        path = self._node.config.home / BOOTSTRAP_FILE_NAME
        file_changed = await trio.to_thread.run_sync(add_line, path, parsed)
        node_changed = self._node.control.add_validator(parsed)
        return self._change(peer, [parsed], file_changed, node_changed)

    async def bootstrap_remove(self, which: str) -> BootstrapChange:
        """Trust a validator no more."""
        path = self._node.config.home / BOOTSTRAP_FILE_NAME
        wanted = parse_bootstrap(which) if which.startswith("/") else None
        peer = PeerId.parse(which) if wanted is None else wanted.peer_id
        assert peer is not None
        known = {*self._configured(peer), *(a for a in read_bootstrap_file(path) if a.peer_id == peer)}
        known = {addr.with_peer(peer) for addr in known}
        gone = known if wanted is None else known & {wanted}
        if not gone:
            raise RequestError(
                f"{which} is no configured validator: `lloomctl bootstrap list` shows them",
                code="not_found",
                http_status=404,
            )
        file_changed = await trio.to_thread.run_sync(remove_lines, path, gone)
        node_changed = await self._node.control.remove_validator(peer, gone)
        return self._change(peer, sorted(gone, key=str), file_changed, node_changed)

    def _change(self, peer: PeerId, addrs: Iterable[Multiaddr], in_file: bool, in_node: bool) -> BootstrapChange:
        return BootstrapChange(
            peer=str(peer),
            addrs=[str(addr.without_peer()) for addr in addrs],
            file_changed=in_file,
            node_changed=in_node,
            lasts=self._node.config.sources.get("bootstrap", "default") in ("joined", "default"),
        )

    def _in_file(self) -> frozenset[PeerId]:
        with suppress(ConfigError):
            found = read_bootstrap_file(self._node.config.home / BOOTSTRAP_FILE_NAME)
            return frozenset(addr.peer_id for addr in found if addr.peer_id is not None)
        return frozenset()

    def _configured(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        return next((one.addrs for one in self._node.control.bootstrap.validators if one.peer == peer), ())

    # ------------------------------------------------------------ DHT
    async def find_providers(self, key: str, *, count: int, timeout_s: float, at: str | None) -> ProvidersInfo:
        """Who provides a service key or CID; ``at`` asks only that peer for the records that it holds itself."""
        parsed = provider_key(key)
        daemon = self._node.daemon()
        is_complete = True
        if at is not None:
            asked = self._other_peer(at)
            answer = await ask_providers(daemon, asked, parsed.multihash, timeout_s=timeout_s)
            providers = [self._dht_peer(peer, addrs) for peer, addrs in answer[:count]]
        else:
            async with daemon.find_providers(parsed.cid, count=count, timeout_s=timeout_s) as found:
                providers = [self._dht_peer(one.peer, one.addrs) async for one in found]
            is_complete = not found.timed_out
        return ProvidersInfo(
            key=key, cid=parsed.cid_text, asked=at and str(asked), providers=_merged(providers), complete=is_complete
        )

    async def provide(self, key: str, *, timeout_s: float) -> ProvidedInfo:
        """Put a provider record of this node."""
        parsed = provider_key(key)
        try:
            await self._node.daemon().provide(parsed.cid, timeout_s=timeout_s)
        except DaemonError as exc:
            raise _explained(exc) from exc
        return ProvidedInfo(key=key, cid=parsed.cid_text)

    async def closest(self, key: str, *, timeout_s: float) -> ClosestInfo:
        """The peers nearest to a key or peer id."""
        try:
            found = await self._node.daemon().get_closest_peers(place_key(key), timeout_s=timeout_s)
        except DaemonError as exc:
            raise _explained(exc) from exc
        return ClosestInfo(key=key, peers=[self._dht_peer(peer, ()) for peer in found])

    async def find_peer(self, peer: str, *, timeout_s: float) -> DhtPeer:
        """Where the DHT says that a peer is."""
        found = self._other_peer(peer)
        try:
            answer: PeerAddrs = await self._node.daemon().find_peer(found, timeout_s=timeout_s)
        except DaemonError as exc:
            raise _explained(exc) from exc
        return self._dht_peer(answer.peer, answer.addrs)

    async def get_record(self, key: str, *, timeout_s: float) -> RecordInfo:
        """The best record under /pk/PEER or /ipns/NAME."""
        raw = record_key(key)
        try:
            value = await self._node.daemon().get_value(raw, timeout_s=timeout_s)
        except DaemonError as exc:
            raise _explained(exc) from exc
        return RecordInfo(key=record_key_text(raw), value=base64.b64encode(value).decode())

    async def put_record(self, key: str | None, value: bytes, *, timeout_s: float) -> RecordInfo:
        """Put a record; ``key`` None = this node's own public key."""
        raw, value = own_record(self._node.me) if key is None else (record_key(key), value)
        try:
            await self._node.daemon().put_value(raw, value, timeout_s=timeout_s)
        except DaemonError as exc:
            raise _explained(exc) from exc
        return RecordInfo(key=record_key_text(raw), value=base64.b64encode(value).decode())

    def _dht_peer(self, peer: PeerId, addrs: Iterable[Multiaddr]) -> DhtPeer:
        connection = self._node.control.connections.addr_of(peer)
        shown = list(addrs) or ([connection] if connection is not None else [])
        return DhtPeer(
            peer=str(peer),
            addrs=[str(addr) for addr in shown],
            is_self=peer == self._node.me,
            connected=connection is not None,
        )

    # ------------------------------------------------------------ gossip
    async def topics(self) -> list[TopicInfo]:
        """The gossip topics that the node is subscribed to."""
        return [await self.topic_peers(topic) for topic in sorted(await self._node.daemon().topics())]

    async def topic_peers(self, topic: str) -> TopicInfo:
        """Who else is subscribed to a topic."""
        name = _TOPICS.get(topic, topic)
        peers = await self._node.daemon().topic_peers(name)
        return TopicInfo(topic=name, peers=sorted(map(str, peers)))

    # ------------------------------------------------------------ settings
    def p2pd_effective(self) -> list[EffectiveInfo]:
        """What p2pd works with."""
        node, config = self._node, self._node.config
        is_ours = not config.is_attached

        def row(name: str, value: object, source: str, text: str) -> EffectiveInfo:
            return EffectiveInfo(name=name, value=value, source=source, text=text)

        def started(value: object) -> object:
            return value if is_ours else None

        mode = "server" if config.is_dht_server else "client"
        limits = "p2pd" if not is_stock(node.supervisor) else "stock p2pd"
        return [
            row("dht_mode", started(mode), "dht", "server: answers others' look-ups; client: only asks"),
            row("dht_prefix", "/ipfs", "kad-dht", "protocol /ipfs/kad/1.0.0; the public bootstrap list is never used"),
            row("dht_k", DHT_K, "kad-dht", "size of a bucket; peers that hold a record"),
            row("dht_deadline_s", DHT_DEADLINE_S, "p2pd", "longest DHT request, unless one names another time"),
            row("provider_record_s", PROVIDE_VALIDITY_S, "kad-dht", "how long a provider record lives"),
            row("reprovide_s", REPROVIDE_S, "lloom", "how often the node's own records are put again"),
            row("gossip_heartbeat_s", started(config.heartbeat_s), "heartbeat_s", "gossipsub's heartbeat"),
            row("gossip_signing", started("strict"), "lloom", "unsigned and forged messages are not passed on"),
            row("security", started("noise, tls (quic)"), "lloom", "plaintext is never offered"),
            row("connections", started([config.connections_low, config.connections_high]), "connections_low, _high",
                "water marks of the connection manager"),
            row("connection_grace_s", started(CONN_GRACE_S), "lloom", "younger connections are not closed by it"),
            row("streams_per_peer", max_streams(node.supervisor), limits, "streams of one peer that hello promises"),
            row("relay_service", started(config.is_validator), "roles", "relays for others"),
            row("mdns", started(config.mdns and "mdns" in node.supervisor.features), "mdns", "finds peers on the link"),
        ]  # fmt: skip

    # ------------------------------------------------------------ market
    async def query_models(self, peer: str) -> QueriedModels:
        """Ask an executor what it offers now."""
        found = self._other_peer(peer)
        await self._node.control.connections.ensure(found)
        document = await self._node.market.query_models(found)
        load = document.get("load")
        return QueriedModels(peer=str(found), models=document["data"], load=load if isinstance(load, dict) else {})

    async def ask_quote(self, peer: str, model: str) -> QuoteInfo:
        """Ask an executor for a signed price."""
        found = self._other_peer(peer)
        await self._node.control.connections.ensure(found)
        quote = await self._node.market.ask_quote(found, check_model_id(model))
        return QuoteInfo(
            peer=str(found),
            model=quote.model,
            price=price_info(quote.price),
            quote_id=quote.quote_id.hex(),
            valid_s=round((quote.valid_until_ms - now_ms()) / 1000, 1),
            envelope=quote.envelope.hex(),
        )

    def set_price(self, model: str, price: str) -> PriceChange:
        """Let this executor ask another price for a model, until it ends."""
        serving = self._executor("it has no prices")
        parsed = Price.parse(price)
        try:
            before = serving.set_price(check_model_id(model), parsed)
        except LookupError as exc:
            served = ", ".join(offer.id for offer in serving.executor.offers()) or "nothing now"
            raise RequestError(
                f"the backend does not serve {model}; it serves {served}", code="not_found", http_status=404
            ) from exc
        return PriceChange(model=model, price=price_info(parsed), before=price_info(before))

    def pause_executor(self) -> ExecutorState:
        """Let this executor take no further work while the node goes on."""
        self._executor("it has nothing to drain").pause()
        return self._state()

    def resume_executor(self) -> ExecutorState:
        """Let this executor take work again."""
        serving = self._executor("it has nothing to resume")
        if self._node.is_draining:
            raise RequestError("this node is about to end: start it again", code="draining", http_status=409)
        serving.resume()
        return self._state()

    def executor_state(self) -> ExecutorState:
        """Whether this executor takes work, and how much is under way."""
        serving = self._executor("it has no work")
        return ExecutorState(paused=serving.is_paused, requests=serving.executor.working)

    def _state(self) -> ExecutorState:
        state = self.executor_state()
        text = "An operator drained it; the node goes on." if state["paused"] else None
        self._node.health.update("executor_paused", text)
        return state

    def _executor(self, consequence: str) -> ExecutorSide:
        if self._node.serving is None:
            raise RequestError(f"this node is no executor: {consequence}")
        return self._node.serving

    # ------------------------------------------------------------ doctor
    async def examine(self) -> list[Finding]:
        """Every check that a running node can make itself."""
        return await self._doctor.examine()

    def _other_peer(self, text: str) -> PeerId:
        peer = PeerId.parse(text)
        if peer == self._node.me:
            raise ValueError("that is this node itself: name another peer")
        return peer


def price_info(price: Price) -> PriceInfo:
    """A price as the admin API shows it."""
    return PriceInfo(
        prompt_per_million=price.prompt_per_million,
        completion_per_million=price.completion_per_million,
        currency=price.currency,
    )


def _merged(peers: Iterable[DhtPeer]) -> list[DhtPeer]:
    """Each peer once, with all the addresses that were told of it."""
    found: dict[str, DhtPeer] = {}
    for one in peers:
        if one["peer"] in found:
            known = found[one["peer"]]["addrs"]
            known += [addr for addr in one["addrs"] if addr not in known]
        else:
            found[one["peer"]] = one
    return list(found.values())


def _explained(exc: DaemonError) -> Exception:
    """p2pd's words for people, where they are known."""
    text = exc.message.lower()
    if exc.code != "daemon_rejected":
        return exc
    if EMPTY_TABLE in text:
        return PeerUnreachableError("the DHT's routing table is empty: connect to a validator first", code="dht_alone")
    if "routing: not found" in text or "peer not found" in text:
        return RequestError("the DHT does not know it", code="not_found", http_status=404)
    return exc

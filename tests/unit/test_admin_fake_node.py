"""A node without a network, for the tests of the admin API, its client and lloomctl; and what it must satisfy."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import trio

from lloom_sidecar.admin.api import admin_app
from lloom_sidecar.admin.books import ExchangeFilter, ExchangeInfo, Role, UsageBy, UsageInfo
from lloom_sidecar.admin.doctor import Finding, finding
from lloom_sidecar.admin.events import EventBus, ExecutorDiscovered
from lloom_sidecar.admin.explaining import (
    AttemptInfo,
    CandidateInfo,
    ChoiceInfo,
    Explanation,
    ModelExplanation,
    RequestInfo,
)
from lloom_sidecar.admin.health import HealthConditions
from lloom_sidecar.admin.metrics import Metrics
from lloom_sidecar.admin.operations import (
    BootstrapChange,
    BootstrapInfo,
    ClosestInfo,
    DhtPeer,
    DisconnectInfo,
    EffectiveInfo,
    ExecutorState,
    Operations,
    PingInfo,
    PriceChange,
    ProvidedInfo,
    ProvidersInfo,
    QueriedModels,
    QuoteInfo,
    RecordInfo,
    TopicInfo,
)
from lloom_sidecar.admin.view import (
    Check,
    ConditionInfo,
    ExecutorInfo,
    ModelInfo,
    NetworkStatusInfo,
    NodeView,
    PeerInfo,
    ReceiptInfo,
    SettingInfo,
    Status,
)
from lloom_sidecar.errors import PeerUnreachableError, RequestError
from lloom_sidecar.http.asgi import asgi_handler
from lloom_sidecar.http.listeners import open_unix_listener
from lloom_sidecar.http.server import serve
from lloom_sidecar.protocol.offers import Price

PEER = "12D3KooWPzmtXC6iEAcbKV56WtQfWX2pcKhGDhxJQxG9aREpCEoU"
OTHER = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
ADDR = f"/ip4/192.0.2.7/tcp/4001/p2p/{PEER}"


class FakeOperations:
    """Fixed answers; ``asked`` records what was asked of it. A peer id that ends in ``bad`` does not answer."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.is_executor = True
        self.findings: list[Finding] = [finding("p2pd", "ok", "answers: lloom-p2pd 0.1.0")]
        self.lasts = True
        self.complete = True
        self.is_validator = False
        self.last_error = ""
        self.records = {f"/pk/{OTHER}": b"\x08\x01\x12\x20" + b"k" * 32}

    async def _note(self, *what: object) -> None:
        await trio.lowlevel.checkpoint()
        self.asked.append(what)

    async def ping(self, peer: str) -> PingInfo:
        await self._note("ping", peer)
        if peer.endswith("bad"):
            raise PeerUnreachableError("nobody answers")
        if peer == PEER:
            raise ValueError("that is this node itself: name another peer")
        return PingInfo(
            peer=peer, rtt_ms=1.5, path="relayed", addr="/ip4/192.0.2.9/tcp/4001", member=True, clock_ahead_ms=-2500
        )

    async def disconnect(self, peer: str) -> DisconnectInfo:
        await self._note("disconnect", peer)
        return DisconnectInfo(peer=peer, was_connected=peer == OTHER, is_validator=self.is_validator)

    def bootstrap(self) -> BootstrapInfo:
        return BootstrapInfo(
            file="/srv/lloom/bootstrap",
            source="joined",
            validators=[
                {
                    "peer": OTHER,
                    "addrs": ["/dns4/v.example.org/tcp/4001"],
                    "state": "unreachable" if self.last_error else "joined",
                    "path": "none" if self.last_error else "direct",
                    "rtt_ms": None if self.last_error else 12.3,
                    "failures": 3 if self.last_error else 0,
                    "last_error": self.last_error,
                    "in_file": True,
                }
            ],
        )

    async def bootstrap_add(self, addr: str) -> BootstrapChange:
        await self._note("add", addr)
        if not addr.startswith("/"):
            raise ValueError(f"not a multiaddr: {addr!r}")
        return self._change(addr == "/known")

    async def bootstrap_remove(self, which: str) -> BootstrapChange:
        await self._note("rm", which)
        return self._change(False)

    def _change(self, is_known: bool) -> BootstrapChange:
        return BootstrapChange(
            peer=OTHER,
            addrs=["/ip4/192.0.2.9/tcp/4001"],
            file_changed=not is_known,
            node_changed=not is_known,
            lasts=self.lasts,
        )

    async def find_providers(self, key: str, *, count: int, timeout_s: float, at: str | None) -> ProvidersInfo:
        await self._note("findprovs", key, count, timeout_s, at)
        providers = [] if "none" in key else [self._peer(OTHER), self._peer(PEER)]
        return ProvidersInfo(key=key, cid="bafkx", asked=at, providers=providers, complete=self.complete)

    def _peer(self, peer: str) -> DhtPeer:
        return DhtPeer(peer=peer, addrs=["/ip4/192.0.2.9/tcp/4001"], is_self=peer == PEER, connected=peer == OTHER)

    async def provide(self, key: str, *, timeout_s: float) -> ProvidedInfo:
        await self._note("provide", key, timeout_s)
        return ProvidedInfo(key=key, cid="bafkx")

    async def closest(self, key: str, *, timeout_s: float) -> ClosestInfo:
        await self._note("closest", key, timeout_s)
        return ClosestInfo(key=key, peers=[self._peer(OTHER)])

    async def find_peer(self, peer: str, *, timeout_s: float) -> DhtPeer:
        await self._note("findpeer", peer, timeout_s)
        if peer.endswith("bad"):
            raise RequestError("the DHT does not know it", code="not_found", http_status=404)
        found = self._peer(peer)
        return found if peer == OTHER else {**found, "addrs": []}

    async def get_record(self, key: str, *, timeout_s: float) -> RecordInfo:
        await self._note("get", key, timeout_s)
        if key not in self.records:
            raise RequestError("the DHT does not know it", code="not_found", http_status=404)
        return RecordInfo(key=key, value=base64.b64encode(self.records[key]).decode())

    async def put_record(self, key: str | None, value: bytes, *, timeout_s: float) -> RecordInfo:
        await self._note("put", key, value, timeout_s)
        return RecordInfo(key=key or f"/pk/{PEER}", value=base64.b64encode(value or b"own").decode())

    async def topics(self) -> list[TopicInfo]:
        await self._note("topics")
        return [TopicInfo(topic="/lloom/executors/1.0.0", peers=[OTHER])]

    async def topic_peers(self, topic: str) -> TopicInfo:
        await self._note("topic_peers", topic)
        stranger = PEER[:-4] + "none"
        return TopicInfo(topic=topic, peers=[] if topic == "network" else [OTHER, stranger])

    def p2pd_effective(self) -> list[EffectiveInfo]:
        return [
            EffectiveInfo(name="dht_k", value=20, source="kad-dht", text="size of a bucket"),
            EffectiveInfo(name="dht_deadline_s", value=60.0, source="p2pd", text="longest DHT request"),
            EffectiveInfo(name="gossip_heartbeat_s", value=None, source="heartbeat_s", text="gossipsub's heartbeat"),
        ]

    async def query_models(self, peer: str) -> QueriedModels:
        await self._note("query", peer)
        price = {"prompt_per_million": 10, "completion_per_million": 30, "currency": "EUR"}
        models = [
            {"id": "m1", "object": "model", "lloom": {"price": price, "slots": 4, "features": ["chat", "tools"]}},
            {
                "id": "m2",
                "owned_by": "x\x1b[2J",
                "lloom": {"price": {"prompt_per_million": 0, "completion_per_million": 0}},
            },
        ]
        return QueriedModels(peer=peer, models=models, load={"in_flight": 1, "busy": True, "more": {"a": 1}})

    async def ask_quote(self, peer: str, model: str) -> QuoteInfo:
        await self._note("quote", peer, model)
        return QuoteInfo(
            peer=peer,
            model=model,
            price={"prompt_per_million": 10, "completion_per_million": 30, "currency": "EUR"},
            quote_id="ab" * 16,
            valid_s=600.0,
            envelope="cd",
        )

    def requests(self) -> list[RequestInfo]:
        return [{**self.request(), "choices": []}]

    def request(self) -> RequestInfo:
        return RequestInfo(
            id="4f" * 16,
            model="m1",
            code="ok",
            executor=OTHER,
            policy="adaptive",
            started_at_ms=1_700_000_000_000,
            ms=1234.5,
            first_ms=80.25,
            asked=2,
            raced=0,
            hedged=True,
            attempts=[AttemptInfo(executor=PEER, stage="first_byte", reason="hedged", ms=70.0, message="")],
            choices=[self.choice()],
        )

    def choice(self) -> ChoiceInfo:
        candidate = CandidateInfo(
            peer=OTHER,
            filtered=None,
            state="fresh",
            path="direct",
            estimate_ms=80.0,
            in_flight=1,
            slots=4,
            score_ms=40.0,
            due=False,
            wait_s=0.0,
            context_length=2048,
            price={"prompt_per_million": 10, "completion_per_million": 30, "currency": "EUR"},
        )
        return ChoiceInfo(
            rule="two_choices",
            picks=[OTHER],
            candidates=[
                candidate,
                {**candidate, "peer": PEER, "due": True},
                {**candidate, "peer": OTHER[:-1] + "x", "filtered": "circuit_open", "wait_s": 4.25},
                {**candidate, "peer": OTHER[:-1] + "y", "filtered": "price", "estimate_ms": 0.0, "score_ms": 0.0},
            ],
            complete=False,
        )

    def explain(self, what: str, policy: str | None) -> Explanation:
        self.asked.append(("explain", what, policy))
        if what == "4f" * 16:
            return Explanation(request=self.request(), model=None)
        if policy == "best":
            raise ValueError("'best' is no policy; there are adaptive")
        found = ModelExplanation(
            model=what,
            policy=policy or "adaptive",
            choice=self.choice(),
            error="nobody" if what == "m2" else None,
            p95_first_ms=None if what == "m2" else 120.0,
            budget_ms=500.0,
            hedge="off",
        )
        return Explanation(request=None, model=found)

    def set_price(self, model: str, price: str) -> PriceChange:
        self.asked.append(("price", model, price))
        if model == "m9":
            raise RequestError("the backend does not serve m9; it serves m1", code="not_found", http_status=404)
        parsed = Price.parse(price)
        return PriceChange(
            model=model,
            price={
                "prompt_per_million": parsed.prompt_per_million,
                "completion_per_million": parsed.completion_per_million,
                "currency": parsed.currency,
            },
            before={"prompt_per_million": 10, "completion_per_million": 30, "currency": "EUR"},
        )

    def executor_state(self) -> ExecutorState:
        self.asked.append(("executor_state",))
        return ExecutorState(paused=True, requests=0)

    def pause_executor(self) -> ExecutorState:
        self.asked.append(("pause",))
        return ExecutorState(paused=True, requests=2)

    def resume_executor(self) -> ExecutorState:
        self.asked.append(("resume",))
        if not self.is_executor:
            raise RequestError("this node is no executor: it has nothing to resume")
        return ExecutorState(paused=False, requests=0)

    async def examine(self) -> list[Finding]:
        await self._note("examine")
        return self.findings


class FakeNode:
    """Fixed answers; ``drained`` and ``connected`` record what was asked of it."""

    def __init__(self) -> None:
        self.events = EventBus(wall_clock=lambda: 1_700_000_000.0)
        self.health = HealthConditions()
        self.metrics = Metrics(version="0.0.test", health=self.health, with_process=False)
        self.operations = FakeOperations()
        self.books = FakeBooks()
        self.checks = [Check(name="api", ok=True, text=""), Check(name="p2pd", ok=True, text="")]
        self.roles = ["client"]
        self.addrs = [ADDR]
        self.network_id: str | None = "ab" * 32
        self.software = "lloom/0.1.0"
        self.said: list[NetworkStatusInfo] = []
        self.drained = 0
        self.connected: list[str] = []

    def status(self) -> Status:
        return Status(
            peer=PEER,
            page=None,
            tokens={"received": 120, "generated": 0},
            version="0.1.0",
            roles=self.roles,
            uptime_s=3725.0,
            draining=False,
            home="/srv/lloom",
            p2pd={
                "mode": "managed",
                "path": "/usr/bin/p2pd",
                "version": "0.1.0",
                "pid": 42,
                "up": True,
                "restarts": 1,
                "features": ["quic"],
            },
            network={"id": self.network_id, "open": False, "previous_key_until": None},
            api={"address": "http://127.0.0.1:4880", "ready": True},
            addrs=self.addrs,
            connections=2,
            members=1,
            executors=1,
            models=1,
            validators=[{"peer": OTHER, "connected": True}],
            network_status=self.said,
            requests={"in_flight": 1, "served": 7, "failed": 2, "cancelled": 0, "queued": 0},
            conditions=self.conditions(),
        )

    def peers(self) -> list[PeerInfo]:
        return [
            PeerInfo(
                peer=OTHER,
                roles=["executor"],
                addrs=["/ip4/192.0.2.9/tcp/4001"],
                connected=True,
                path="direct",
                member=True,
                state="fresh",
                lease_left_s=25.4,
                software=self.software,
                rtt_ms=12.34,
                source="gossip",
            ),
            PeerInfo(
                peer=PEER,
                roles=[],
                addrs=[],
                connected=False,
                path="none",
                member=False,
                state="none",
                lease_left_s=None,
                software="",
                rtt_ms=None,
                source="dht",
            ),
        ]

    def models(self) -> list[ModelInfo]:
        return [
            ModelInfo(
                id="smollm2:135m",
                family="smollm2",
                executors=[
                    {
                        "peer": OTHER,
                        "state": "fresh",
                        "context_length": 2048,
                        "slots": 4,
                        "in_flight": 1,
                        "queued": 0,
                        "price": {"prompt_per_million": 10, "completion_per_million": 30, "currency": "EUR"},
                        "features": ["chat"],
                        "digest": "",
                        "ttft_ms": 80.0,
                        "tokens_per_s": 41.26,
                    }
                ],
            )
        ]

    def executors(self) -> list[ExecutorInfo]:
        return [
            ExecutorInfo(
                peer=OTHER,
                state="suspect",
                lease_left_s=2.0,
                connected=True,
                path="relayed",
                member=True,
                software=self.software,
                circuit="closed",
                in_flight=1,
                queued=0,
                models=["smollm2:135m"],
                trust=0.5,
                doubts=["audit of smollm2:135m by 9aREpCEo, 0.50, last said 3 s ago"],
            )
        ]

    def config_effective(self) -> list[SettingInfo]:
        return [
            SettingInfo(name="roles", value=["client"], source="flag", env="LLOOM_ROLES", flag="--role"),
            SettingInfo(name="open", value=False, source="default", env="LLOOM_OPEN", flag="--open"),
            SettingInfo(name="slots", value=None, source="default", env="LLOOM_SLOTS", flag="--slots"),
        ]

    def conditions(self) -> list[ConditionInfo]:
        return [ConditionInfo(**one) for one in self.health.as_dicts()]  # type: ignore[typeddict-item]

    def receipt(self, request_id: str) -> ReceiptInfo | None:
        if request_id != "0a":
            return None
        return ReceiptInfo(
            request_id=request_id,
            claims={
                "client": PEER,
                "executor": OTHER,
                "model": "smollm2:135m",
                "prompt_tokens": 3,
                "completion_tokens": 5,
                "usage_source": "backend",
                "cost": 0,
                "currency": "",
                "answer_bytes": 120,
                "answer_digest": "00" * 32,
                "request_digest": "11" * 32,
                "accepted_at_ms": 1,
                "ended_at_ms": 2,
            },
            envelope="aa",
            request="bb",
            ack="cc",
        )

    async def connect(self, addr: str) -> PeerInfo:
        await trio.lowlevel.checkpoint()
        if not addr.startswith("/"):
            raise ValueError(f"not a multiaddr: {addr!r}")
        if "192.0.2.66" in addr:
            raise PeerUnreachableError("the peer at 192.0.2.66 does not answer")
        self.connected.append(addr)
        return self.peers()[0]

    async def drain(self) -> None:
        await trio.lowlevel.checkpoint()
        self.drained += 1

    def startup_checks(self) -> list[Check]:
        return self.checks

    def readiness_checks(self) -> list[Check]:
        return self.checks

    def render_metrics(self) -> bytes:
        return self.metrics.render()


class FakeBooks:
    """A ledger of one exchange for each role; ``asked`` is what was wanted."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.rows = [
            ExchangeInfo(
                id=2 - number,
                at="2026-11-25T01:02:03.000Z",
                role=role,
                peer=OTHER,
                request_id="0a" * 16,
                request_digest="0b" * 32,
                model="smollm2:135m",
                outcome=outcome,
                owed=bool(outcome),
                reason=reason,
                doubts=doubts,
                acknowledged=role == "client",
                prompt_tokens=3 if outcome else 0,
                completion_tokens=5 if outcome else 0,
                cost=7 if outcome else 0,
                currency="EUR" if outcome else "",
            )
            for number, (role, outcome, reason, doubts) in enumerate(
                (("client", "partial", "lost", "too many"), ("executor", "", "refused", ""))
            )
        ]

    async def exchanges(self, wanted: ExchangeFilter, limit: int) -> list[ExchangeInfo]:
        await trio.lowlevel.checkpoint()
        self.asked.append((wanted, limit))
        if wanted.peer is not None and not wanted.peer.startswith("12D3"):
            raise ValueError(f"{wanted.peer!r} is no peer id")
        return [
            one
            for one in self.rows
            if wanted.role in (None, one["role"]) and wanted.request_id in (None, bytes([10]) * 16)
        ][:limit]

    async def export(self, request_id: bytes, role: Role | None, *, with_salt: bool) -> list[dict[str, str]]:
        await trio.lowlevel.checkpoint()
        self.asked.append((request_id, role, with_salt))
        return [dict(one) for one in EXPORTED] if request_id == bytes([10]) * 16 else []

    async def usage(self, by: UsageBy, role: Role | None, since_ms: int, until_ms: int) -> list[UsageInfo]:
        await trio.lowlevel.checkpoint()
        self.asked.append((by, role, since_ms, until_ms))
        row = UsageInfo(
            role="client",
            key="smollm2:135m",
            exchanges=3,
            owed=2,
            prompt_tokens=4,
            completion_tokens=5,
            cost=6,
            currency="EUR",
        )
        return [row] if role != "executor" else []


EXPORTED: list[dict[str, str]] = []
"""What the fake ledger has signed receipts of."""


class Served:
    """A FakeNode behind a real unix socket, in a loop of its own thread."""

    def __init__(self, node: FakeNode, home: Path) -> None:
        self.node = node
        self.home = home
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._shutdown: trio.Event | None = None
        self._thread = threading.Thread(target=trio.run, args=(self._serve,), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        """As a node does: streams of events end, then the server."""
        self.call(self._end)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def call(self, function: object) -> None:
        """Run a synchronous function in the node's loop."""
        assert self._token is not None
        assert callable(function)
        trio.from_thread.run_sync(function, trio_token=self._token)

    def _end(self) -> None:
        assert self._shutdown is not None
        self.node.events.close()
        self._shutdown.set()

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._shutdown = trio.Event()
        (self.home / "run").mkdir(parents=True, exist_ok=True)
        listener = open_unix_listener(str(self.home / "run" / "admin.sock"))
        async with trio.open_nursery() as nursery:
            handler = asgi_handler(admin_app(self.node))
            await nursery.start(partial(serve, [listener], handler, shutdown=self._shutdown, grace_s=5))
            self._ready.set()


@contextmanager
def served(home: Path, node: FakeNode | None = None) -> Iterator[Served]:
    """Serve a node's admin API in ``home`` while the block runs."""
    one = Served(node or FakeNode(), home)
    one.start()
    try:
        yield one
    finally:
        if one._thread.is_alive():
            one.stop()


def test_the_fake_shows_what_a_node_shows() -> None:
    node = FakeNode()
    view: NodeView = node
    operations: Operations = view.operations
    assert operations.bootstrap()["source"] == "joined"
    node.events.publish(ExecutorDiscovered(OTHER, ("smollm2:135m",), "gossip"))
    node.health.set("few_peers", "0 of 1 peers")
    assert view.status()["conditions"][0]["code"] == "few_peers"
    assert view.events.recent()[0].event.kind == "executor_discovered"

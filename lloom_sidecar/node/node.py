"""The composition of a node and its life: start, stay, end.

``run_node`` starts what others need first (listeners, so that a busy port is found before anything else runs; p2pd; then
the services on top of it) and ends it in the other order: new work is refused, what is under way may finish, then
everything is cancelled.
"""

from __future__ import annotations

import hashlib
import ipaddress
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import structlog
import trio

from lloom_sidecar import __version__
from lloom_sidecar.admin.api import admin_app
from lloom_sidecar.admin.events import EventBus
from lloom_sidecar.admin.health import HealthConditions
from lloom_sidecar.admin.metrics import Metrics
from lloom_sidecar.admin.probes import probe_app
from lloom_sidecar.client.api import ApiSettings, OpenAiApi
from lloom_sidecar.client.router import Router
from lloom_sidecar.config import BUILTIN_MODEL, Config, read_secret_lines
from lloom_sidecar.errors import DaemonUnavailableError, LloomError, StartError
from lloom_sidecar.executor.admission import Admission
from lloom_sidecar.executor.backend import Backend, BackendState
from lloom_sidecar.executor.body import BodyPolicy
from lloom_sidecar.executor.local_model import run_local_model
from lloom_sidecar.executor.model_fetch import ensure_builtin_model, terminal_progress
from lloom_sidecar.executor.serve import Executor, ExecutorLimits, ServedReceipt
from lloom_sidecar.http.asgi import asgi_handler
from lloom_sidecar.http.errors import ListenError
from lloom_sidecar.http.guard import OriginGuard
from lloom_sidecar.http.limits import HttpLimits
from lloom_sidecar.http.listeners import Listener, open_tcp_listeners, open_unix_listener
from lloom_sidecar.http.server import serve
from lloom_sidecar.identity import HomeLock, init_home, load_network_keys
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.ledger import store as ledger
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.network.announcer import Announcer, Offer
from lloom_sidecar.network.bootstrap import Bootstrap, group_by_peer
from lloom_sidecar.network.connections import Connections
from lloom_sidecar.network.discovery import Discovery
from lloom_sidecar.network.gossip import run_gossip
from lloom_sidecar.network.hello import Greeted, HelloService
from lloom_sidecar.network.intake import Intake
from lloom_sidecar.network.prober import run_prober
from lloom_sidecar.p2p.daemon import Daemon, Identity
from lloom_sidecar.p2p.inbound import serve_inbound
from lloom_sidecar.p2p.launch import STOCK_MAX_STREAMS, DaemonSettings
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.p2p.supervisor import AttachedDaemon, DaemonSupervisor
from lloom_sidecar.peers.addresses import dialable
from lloom_sidecar.peers.health import HealthBook
from lloom_sidecar.peers.peerbook import CataloguePage, PeerBook
from lloom_sidecar.peers.rate import RateLimiter
from lloom_sidecar.protocol.names import (
    IDENTIFY_PROTOCOL_VERSION,
    PROTOCOL_HELLO,
    PROTOCOL_REQUEST,
    SERVICE_EXECUTOR,
    SERVICE_VALIDATOR,
    agent_version,
    service_model,
)
from lloom_sidecar.protocol.network_key import NetworkKey, NetworkKeys
from lloom_sidecar.protocol.offers import Load
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .binary import find_p2pd
from .observer import ClientReceipt, Observer
from .view import View

BUILTIN_MODEL_ID: Final = "smollm2:135m"
MAX_STREAMS: Final = 1024
"""Streams of one peer that our p2pd's limits leave room for."""
MAX_INBOUND_STREAMS: Final = 8192
MAX_ANNOUNCEMENTS_PER_S: Final = 2.0
"""Of one author; an honest one sends one in ten seconds and a few when it changes."""
ANNOUNCEMENT_BURST: Final = 10.0
MAX_AUTHORS: Final = 20_000
MAX_WANTED_FULL: Final = 256
TICK_S: Final = 1.0
WITHDRAW_TIMEOUT_S: Final = 2.0
"""For the removal to go out before a node ends."""
IDENTIFY_EVERY_S: Final = 15.0
"""Addresses change when a NAT mapping or an interface does."""

_ROLES: Final = {"client": pb.ROLE_CLIENT, "executor": pb.ROLE_EXECUTOR, "validator": pb.ROLE_VALIDATOR}
_ROLE_NAMES: Final = {value: name for name, value in _ROLES.items()}

log = structlog.get_logger("lloom.node")


def now_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass(slots=True)
class _Listeners:
    api: list[Listener]
    probe: list[Listener]
    admin: list[Listener]


class Node:
    """Everything that one node holds. Made and run by ``run_node``."""

    def __init__(self, config: Config, store: ledger.Ledger, keys: NetworkKeys | None, *, rng: random.Random) -> None:
        self.config = config
        self.signer, _ = init_home(config.home)
        self.me = self.signer.peer
        self.started_at = trio.current_time()
        self.started_at_s = int(time.time())
        self.is_draining = False
        self.has_started = False
        self.keys_file = keys
        self.api_listeners: list[Listener] = []
        self.identity: Identity | None = None
        self.events = EventBus()
        self.health = HealthConditions()
        self.metrics = Metrics(version=__version__, health=self.health)
        self._rng = rng
        self._ledger = store
        self._shutdown = trio.Event()
        self._draining = trio.Event()
        self._withdrawn = trio.Event()
        self._wanted_full: dict[PeerId, None] = {}

        validators = group_by_peer(config.bootstrap)
        self.book = PeerBook(
            me=self.me,
            is_open=config.open,
            allow_list=frozenset(config.allow_peers),
            validators=frozenset(v.peer for v in validators),
            first_cursor=now_ms(),
        )
        self.health_book = HealthBook()
        self.observer = Observer(
            metrics=self.metrics,
            events=self.events,
            health=self.health,
            models_of=self._models_of,
            keep_receipt=self._keep_receipt,
        )
        self.supervisor = self._make_supervisor()
        self.hello = HelloService(
            me=self.me,
            keys=self.keys,
            is_open=config.open,
            node_info=self._node_info,
            get_daemon=self.daemon,
            on_greeted=self._on_greeted,
            on_refused=self.observer.hello_refused,
            catalogue=self._catalogue_page if config.is_validator else None,
        )
        self.pool = StreamPool(self.daemon, self._say_hello, now_ms=now_ms)
        self.intake = Intake(
            me=self.me,
            book=self.book,
            keys=self.keys,
            observer=self.observer,
            want_full=self._want_full,
            now_ms=now_ms,
        )
        self.connections = Connections(get_daemon=self.daemon, addrs_of=self._dialable, observer=self)
        self.bootstrap = Bootstrap(
            me=self.me,
            validators=validators,
            get_daemon=self.daemon,
            connections=self.connections,
            hello=self.hello,
            intake=self.intake,
            observer=self.observer,
            after_join=self._after_join,
            rng=rng,
        )
        self.discovery = Discovery(
            me=self.me,
            service_keys=self._service_keys,
            get_daemon=self.daemon,
            connections=self.connections,
            hello=self.hello,
            book=self.book,
            on_found=self.metrics.discovery_finished,
        )
        self.backend = self._make_backend() if config.is_executor else None
        self.executor = self._make_executor(self.backend) if self.backend is not None else None
        self.announcer = self._make_announcer() if self.executor is not None else None
        self.api = self._make_api() if config.is_client else None
        self.view = View(self)

    # ------------------------------------------------------------ making the parts
    def _make_supervisor(self) -> DaemonSupervisor | AttachedDaemon:
        config = self.config
        if config.p2pd_control is not None:
            return AttachedDaemon(config.p2pd_control, expected_peer=self.me, on_up=self._on_up, on_down=self._on_down)
        config.run_dir.mkdir(mode=0o700, exist_ok=True)
        self.binary = find_p2pd(config.p2pd)
        settings = DaemonSettings(
            binary=self.binary,
            run_dir=config.run_dir,
            identity_file=config.identity_file,
            listen=config.listen,
            announce=config.announce_addrs,
            dht_mode="server" if config.is_dht_server else "client",
            heartbeat_s=config.heartbeat_s,
            user_agent=agent_version(__version__),
            protocol_version=IDENTIFY_PROTOCOL_VERSION,
            relay_service=config.is_validator,
            static_relays=() if config.is_validator else config.bootstrap,
            autonat=config.is_validator,
        )
        return DaemonSupervisor(
            settings, expected_peer=self.me, on_up=self._on_up, on_down=self._on_down, rng=self._rng
        )

    def _make_backend(self) -> Backend:
        config = self.config
        if config.model is not None:
            socket_path = config.run_dir / "model.sock"
            return Backend(
                f"unix:{socket_path}",
                on_change=self._on_backend,
                slots=config.slots,
                features=frozenset({"chat", "completions", "embeddings"}),
            )
        assert config.backend is not None  # an executor has one of the two, config.py checked it
        key = read_secret_lines(config.backend_key_file)[0] if config.backend_key_file is not None else None
        return Backend(
            config.backend, on_change=self._on_backend, slots=config.slots, api_key=key, only_alias=config.model_alias
        )

    def _make_executor(self, backend: Backend) -> Executor:
        config = self.config
        slots = config.slots or backend.state.slots
        return Executor(
            signer=self.signer,
            backend=backend,
            admission=Admission(slots=slots, queue_limit=config.queue_limit, max_per_peer=slots + config.queue_limit),
            policy=BodyPolicy(
                max_tokens=config.max_tokens_limit,
                default_max_tokens=config.max_tokens_default,
                max_n=config.max_choices,
                allow_remote_media=config.allow_remote_media,
            ),
            limits=ExecutorLimits(max_body_bytes=config.max_body_bytes, max_streams_per_peer=self._max_streams()),
            price=config.price,
            may_ask=self._may_ask,
            observer=self.observer,
            now_ms=now_ms,
        )

    def _make_announcer(self) -> Announcer:
        return Announcer(
            signer=self.signer,
            key=self._current_key,
            offer=self._offer,
            addrs=self._announced_addrs,
            executors_seen=lambda: len(self.book),
            get_daemon=self.daemon,
            next_sequence=self._ledger.next_sequence,
            now_ms=now_ms,
            software=agent_version(__version__),
            on_published=lambda: self.metrics.message_sent("announcement"),
            rng=self._rng,
        )

    def _make_api(self) -> OpenAiApi:
        config = self.config
        router = Router(
            pool=self.pool,
            signer=self.signer,
            book=self.book,
            health=self.health_book,
            look_up=self.discovery.look_up,
            ensure_connected=self.connections.ensure,
            catalogue_is_complete=lambda: self.bootstrap.is_complete,
            observer=self.observer,
            rng=self._rng,
        )
        keys = read_secret_lines(config.api_key_file) if config.api_key_file is not None else ()
        return OpenAiApi(
            router=router,
            book=self.book,
            settings=ApiSettings(api_keys=keys),
            observer=self.observer,
            started_at_s=self.started_at_s,
        )

    # ------------------------------------------------------------ life
    async def run(self, listeners: _Listeners, *, task_status: trio.TaskStatus[Node]) -> None:
        """Run until ``drain`` has ended it, or until cancelled."""
        config = self.config
        self._set_static_conditions()
        handlers: dict[str, Callable[[P2PStream], Awaitable[None]]] = {PROTOCOL_HELLO: self.hello.serve_stream}
        if self.executor is not None:
            handlers[PROTOCOL_REQUEST] = self.executor.serve_stream
        async with trio.open_nursery() as nursery:
            await nursery.start(self._ledger.run)
            nursery.start_soon(self._serve_http, listeners.probe, asgi_handler(probe_app(self.view)), None)
            nursery.start_soon(self._serve_http, listeners.admin, asgi_handler(admin_app(self.view)), None)
            if config.model is not None:
                await self._start_local_model(nursery)
            if self.backend is not None:
                await nursery.start(self.backend.run)
            self._handler_address = await nursery.start(
                lambda task_status: serve_inbound(
                    config.handler_path,
                    handlers,
                    max_streams=MAX_INBOUND_STREAMS,
                    on_error=self._on_inbound_error,
                    task_status=task_status,
                )
            )
            self._handled = tuple(handlers)
            await nursery.start(self.supervisor.run)
            await nursery.start(self.pool.run)
            await nursery.start(self.connections.run)
            await nursery.start(
                lambda task_status: run_gossip(
                    me=self.me,
                    get_daemon=self.daemon,
                    intake=self.intake,
                    rates=RateLimiter(
                        rate_per_s=MAX_ANNOUNCEMENTS_PER_S, burst=ANNOUNCEMENT_BURST, max_keys=MAX_AUTHORS
                    ),
                    on_message=lambda: self.metrics.message_received("announcement"),
                    on_dropped=self.metrics.announcement_dropped,
                    task_status=task_status,
                )
            )
            await nursery.start(self.bootstrap.run)
            await nursery.start(
                lambda task_status: self.discovery.run(searches=config.is_client, task_status=task_status)
            )
            await nursery.start(
                lambda task_status: run_prober(
                    book=self.book,
                    connections=self.connections,
                    hello=self.hello,
                    on_lost=lambda peer: self.observer.executor_lost(peer, "lease"),
                    wanted_full=self._take_wanted_full,
                    task_status=task_status,
                )
            )
            announcing = trio.CancelScope()
            if self.announcer is not None:
                nursery.start_soon(self._announce, announcing)
            else:
                self._withdrawn.set()
            nursery.start_soon(self._tick)
            if self.api is not None:
                self.api_listeners = listeners.api
                guard = OriginGuard(
                    config.allowed_hosts, config.allowed_origins, check_host=config.api_key_file is None
                )
                nursery.start_soon(self._serve_http, listeners.api, self.api, guard)
            self.has_started = True
            log.info("node_started", peer=str(self.me), roles=list(config.roles), version=__version__)
            task_status.started(self)
            await self._draining.wait()
            # Out of the network first, so that no new work is sent here; then what is under way may finish.
            announcing.cancel()
            self._shutdown.set()
            with trio.move_on_after(WITHDRAW_TIMEOUT_S):
                await self._withdrawn.wait()
            with trio.move_on_after(config.grace_s):
                await self._wait_idle()
            log.info("node_ended", peer=str(self.me))
            self.events.close()
            nursery.cancel_scope.cancel()

    async def drain(self) -> None:
        """Begin to end: removal announced, new work refused, running work finished. Returns at once; idempotent."""
        if not self.is_draining:
            self.is_draining = True
            self.health.set("draining", "New work is refused; running requests may finish.")
            log.info("draining", peer=str(self.me))
            if self.executor is not None:
                self.executor.drain()
            self._draining.set()

    async def _wait_idle(self) -> None:
        while (self.executor is not None and self.executor.working) or self.observer.client.in_flight:
            await trio.sleep(0.02)

    async def _announce(self, scope: trio.CancelScope) -> None:
        assert self.announcer is not None
        try:
            with scope:
                await self.announcer.run()
        finally:
            self._withdrawn.set()

    async def _serve_http(
        self,
        listeners: list[Listener],
        handler: Callable[..., Awaitable[None]],
        guard: OriginGuard | None,
    ) -> None:
        if listeners:
            limits = HttpLimits(max_body_bytes=self.config.max_body_bytes)
            check = None if guard is None else self._counted(guard)
            await serve(
                listeners,
                handler,
                limits=limits,
                guard=check,
                shutdown=self._shutdown if guard is not None else None,
                grace_s=self.config.grace_s,
            )

    def _counted(self, guard: OriginGuard) -> Callable[..., object]:
        def check(request: object) -> object:
            refusal = guard.check(request)  # type: ignore[arg-type]
            if refusal is not None:
                self.metrics.http_refused(refusal.code)
            return refusal

        return check

    async def _start_local_model(self, nursery: trio.Nursery) -> None:
        config = self.config
        assert self.backend is not None and config.model is not None
        if config.model == BUILTIN_MODEL:
            with terminal_progress() as progress:
                path = await ensure_builtin_model(progress=progress)
            alias = config.model_alias or BUILTIN_MODEL_ID
        else:
            path = Path(config.model)
            alias = config.model_alias or path.stem
        backend = self.backend

        def on_state(is_up: bool, reason: str) -> None:
            if not is_up:
                log.warning("local_model_down", reason=reason)
            backend.suspect()

        await nursery.start(
            lambda task_status: run_local_model(
                path,
                alias=alias,
                socket_path=config.run_dir / "model.sock",
                parallel=config.slots or 4,
                on_state=on_state,
                task_status=task_status,
            )
        )

    # ------------------------------------------------------------ p2pd
    def daemon(self) -> Daemon:
        """The daemon of the moment. Raises DaemonUnavailableError."""
        found = self.supervisor.daemon
        if found is None:
            raise DaemonUnavailableError("p2pd is not up; it is being started again", retry_after_s=1.0)
        return found

    async def _on_up(self, daemon: Daemon, identity: Identity) -> None:
        self.identity = identity
        for protocol in self._handled:
            await daemon.register_handler(protocol, self._handler_address)
        self.metrics.p2pd_up(True)
        self.health.clear("p2pd_down")
        if self.has_started:
            self.metrics.p2pd_restarted()
            log.info("p2pd_back", peer=str(self.me))
        self.discovery.forget_provided()
        if self.announcer is not None:
            self.announcer.changed()

    def _on_down(self, reason: str) -> None:
        self.metrics.p2pd_up(False)
        self.health.set("p2pd_down", reason)
        self.connections.lost_all()
        self.pool.close_all()

    def _max_streams(self) -> int:
        return STOCK_MAX_STREAMS if getattr(self.supervisor, "is_stock", False) else MAX_STREAMS

    def _on_inbound_error(self, exc: Exception, stream: P2PStream | None) -> None:
        code = exc.code if isinstance(exc, LloomError) else "internal"
        self.metrics.refused(code)
        log.warning(
            "inbound_failed", code=code, peer=None if stream is None else str(stream.peer), error=type(exc).__name__
        )

    # ------------------------------------------------------------ network
    def keys(self) -> tuple[NetworkKey, ...]:
        """The network keys that count now, newest first."""
        return () if self.keys_file is None else self.keys_file.valid(now_ms())

    def _current_key(self) -> NetworkKey | None:
        return None if self.keys_file is None else self.keys_file.current

    def _may_ask(self, peer: PeerId) -> bool:
        return self.config.open or self.book.is_member(peer, trio.current_time()) or peer in self.config.allow_peers

    def _node_info(self) -> pb.NodeInfo:
        return pb.NodeInfo(
            roles=[_ROLES[role] for role in self.config.roles],
            max_streams=self._max_streams(),
            announcement=self.announcer.current if self.announcer is not None else b"",
            software=agent_version(__version__),
            now_ms=now_ms(),
        )

    async def _say_hello(self, peer: PeerId) -> None:
        await self.hello.greet(peer)

    def _on_greeted(self, greeted: Greeted) -> None:
        now = trio.current_time()
        node = greeted.node
        self.metrics.message_received("hello")
        if greeted.rtt_s is not None:
            self.observer.rtt_s[greeted.peer] = greeted.rtt_s
        if node.announcement:
            self.intake.take(
                node.announcement, found_by="hello", source=greeted.peer, direct=True, expected_signer=greeted.peer
            )
        self.book.on_hello(
            greeted.peer,
            is_member=greeted.is_member,
            roles=frozenset(_ROLE_NAMES[role] for role in node.roles),
            features=frozenset(node.features),
            max_streams=node.max_streams,
            now=now,
        )
        self.book.note_path(greeted.peer, is_relayed=greeted.addr.is_relayed)

    def _catalogue_page(self, model: str, since: int) -> CataloguePage:
        return self.book.entries_since(since, now=trio.current_time(), model=model or None)

    async def _after_join(self, peer: PeerId) -> None:
        self.discovery.changed()
        if self.announcer is not None:
            self.announcer.changed()

    def _want_full(self, peer: PeerId) -> None:
        if len(self._wanted_full) < MAX_WANTED_FULL:
            self._wanted_full[peer] = None

    def _take_wanted_full(self) -> list[PeerId]:
        wanted = list(self._wanted_full)
        self._wanted_full.clear()
        return wanted

    def _dialable(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        known = self.book.known(peer, trio.current_time())
        if known is None:
            return ()
        return dialable(known.addrs, own_networks=own_networks(), direct=known.is_direct)

    def _models_of(self, peer: PeerId) -> tuple[str, ...]:
        known = self.book.known(peer, trio.current_time())
        return () if known is None else known.models

    def connected(self, peer: PeerId, addr: Multiaddr) -> None:
        """A connection appeared (ConnectionObserver)."""
        self.observer.connected(peer, addr)
        self.book.note_path(peer, is_relayed=addr.is_relayed)

    def disconnected(self, peer: PeerId) -> None:
        """A peer's last connection ended (ConnectionObserver)."""
        self.observer.disconnected(peer)
        self.book.on_disconnected(peer)
        self.book.mark_failed(peer, trio.current_time())
        self.pool.drop_peer(peer)

    def polled(self, peers: int) -> None:
        """The connections were looked at (ConnectionObserver)."""
        now = trio.current_time()
        members = sum(self.book.is_member(peer, now) for peer in self.connections)
        self.metrics.set_peers(peers, members)

    # ------------------------------------------------------------ what this node offers
    def _service_keys(self) -> list[str]:
        keys = [SERVICE_VALIDATOR] if self.config.is_validator else []
        offers = self.executor.offers() if self.executor is not None else ()
        if offers:
            keys.append(SERVICE_EXECUTOR)
            keys.extend(service_model(offer.id) for offer in offers)
        return keys

    def _offer(self) -> Offer:
        executor = self.executor
        assert executor is not None
        return Offer(executor.offers(), Load(executor.admission.working, executor.admission.queued))

    def _announced_addrs(self) -> tuple[Multiaddr, ...]:
        if self.config.announce_addrs:
            return self.config.announce_addrs[:8]
        addrs = self.identity.addrs if self.identity is not None else ()
        public = [a for a in addrs if a.is_relayed or a.ip is None or a.ip.is_global]
        local = [a for a in addrs if a not in public]
        local.sort(key=lambda a: a.ip is not None and a.ip.is_loopback)
        has_direct = any(not a.is_relayed for a in public)
        return tuple((public if has_direct else [*local, *public])[:8])

    def _on_backend(self, state: BackendState) -> None:
        if state.is_up:
            self.health.clear("backend_down")
        else:
            self.health.set("backend_down", state.reason)
        if self.executor is not None and self.executor.admission.slots != state.slots:
            self.executor.resize(state.slots)
        if self.announcer is not None:
            self.announcer.changed()
        self.discovery.changed()

    # ------------------------------------------------------------ receipts
    def _keep_receipt(self, kept: ClientReceipt | ServedReceipt) -> None:
        """Queue a receipt for the ledger; a full queue or disk loses it, which the node's health then says."""
        try:
            if isinstance(kept, ClientReceipt):
                self._ledger.record_receipt_nowait(
                    ledger.Receipt(
                        role="client",
                        peer=kept.peer,
                        request_id=kept.call.request_id,
                        exchange=kept.receipt.exchange,
                        request=kept.receipt.request,
                        receipt=kept.receipt.envelope,
                        ack=kept.receipt.ack,
                        is_owed=True,
                        salt=kept.receipt.salt,
                        idempotency_key=kept.call.idempotency_key,
                        created_at_ms=now_ms(),
                    )
                )
            elif kept.ack is None:
                self._ledger.record_receipt_nowait(
                    ledger.Receipt(
                        role="executor",
                        peer=kept.client,
                        request_id=kept.request_id,
                        exchange=kept.exchange,
                        request=kept.request,
                        receipt=kept.receipt,
                        is_owed=True,
                        salt=kept.salt,
                        created_at_ms=now_ms(),
                    )
                )
            else:
                digest = hashlib.sha256(kept.request).digest()
                self._ledger.record_ack_nowait(role="executor", request_digest=digest, ack=kept.ack)
        except LloomError as exc:
            log.warning("receipt_not_kept", code=exc.code)

    # ------------------------------------------------------------ health
    def _set_static_conditions(self) -> None:
        config = self.config
        if config.open:
            self.health.set("open_network", "This node sends to, or serves, nodes of any network.")
        if config.is_client and config.api_open:
            self.health.set("api_open", f"Whoever reaches {config.api} can use this node's API without a key.")
        if not self.bootstrap.validators and not config.is_validator:
            self.health.set("no_bootstrap", "Only nodes that dial this one, or are on the same link, will be found.")
        for warning in config.warnings:
            log.warning("config_warning", reason=warning)
        if config.warnings:
            self.health.set("config_warning", "; ".join(config.warnings))

    async def _tick(self) -> None:
        """What has to be looked at now and then."""
        next_identify = trio.current_time() + IDENTIFY_EVERY_S
        while True:
            await trio.sleep(TICK_S)
            now = trio.current_time()
            executors = len(self.book)
            self.metrics.set_known(executors, len(self.book.models(now)))
            validators = self.bootstrap.validators
            lost = validators and not any(v.peer in self.connections for v in validators)
            reasons = "; ".join(f"{v.peer.short()}: {v.last_error or 'connecting'}" for v in validators[:3])
            self.health.update("no_validator", f"None of {len(validators)} answers ({reasons})." if lost else None)
            if self.config.is_client:
                self.health.update("no_executor", None if executors else "No model can be asked for.")
            if getattr(self.supervisor, "is_stock", False):
                self.health.set(
                    "p2pd_stock", "It is an unmodified p2pd: no NAT traversal, 64 streams a peer, TCP only."
                )
            if self.executor is not None:
                self.metrics.set_capacity(self.executor.admission.slots, self.executor.admission.queued)
            if now >= next_identify:
                next_identify = now + IDENTIFY_EVERY_S
                await self._refresh_identity()

    async def _refresh_identity(self) -> None:
        try:
            identity = await self.daemon().identify()
        except LloomError:
            return  # the supervisor notices on its own
        if self.identity is None or set(identity.addrs) != set(self.identity.addrs):
            self.identity = identity
            if self.announcer is not None:
                self.announcer.changed()


def own_networks() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The networks of this machine's interfaces."""
    found = []
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family.name in ("AF_INET", "AF_INET6") and address.netmask:
                host = address.address.partition("%")[0]
                try:
                    found.append(ipaddress.ip_network(f"{host}/{_prefix(address.netmask)}", strict=False))
                except ValueError:
                    continue
    return found


def _prefix(netmask: str) -> int:
    return bin(int(ipaddress.ip_address(netmask))).count("1")


async def _open_listeners(config: Config) -> _Listeners:
    opened: list[Listener] = []
    try:
        api = await open_tcp_listeners(config.api.host, config.api.port) if config.is_client else []
        opened += api
        probe = await open_tcp_listeners(config.probe.host, config.probe.port) if config.probe is not None else []
        opened += probe
        config.run_dir.mkdir(mode=0o700, exist_ok=True)
        admin = [open_unix_listener(str(config.admin_socket))]
    except ListenError as exc:
        for listener in opened:
            listener.close()
        raise StartError(f"{exc}: stop whoever listens there, or choose another with --api or --probe") from exc
    return _Listeners(api, probe, admin)


async def run_node(config: Config, *, task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED) -> None:
    """Run one node until it has drained or is cancelled. ``started`` gives the node once it serves.

    Raises:
        ConfigError: the identity or the network key cannot be used.
        StartError: a busy port, p2pd that does not start, another sidecar in the same home, a damaged database.
    """
    init_home(config.home)
    with HomeLock(config.home):
        keys = load_network_keys(config.network_key_file) if config.has_network_key else None
        node = Node(config, ledger.Ledger(config.database_file), keys, rng=random.Random())  # noqa: S311 - jitter and choice, nothing secret
        listeners = await _open_listeners(config)
        await node.run(listeners, task_status=task_status)

"""The composition of a node and its life: start, stay, end.

``run_node`` starts what others need first (listeners, so that a busy port is found before anything else runs; p2pd;
then the services on top of it) and ends it in the other order: new work is refused, what is under way may finish,
then everything is cancelled.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from lloom_sidecar import __version__
from lloom_sidecar.admin.api import admin_app
from lloom_sidecar.admin.events import EventBus
from lloom_sidecar.admin.health import HealthConditions
from lloom_sidecar.admin.metrics import Metrics
from lloom_sidecar.admin.probes import probe_app
from lloom_sidecar.admin.token import with_token
from lloom_sidecar.client.api import ApiSettings, OpenAiApi
from lloom_sidecar.client.market import Market, QuoteWallet
from lloom_sidecar.client.router import Router
from lloom_sidecar.config import Config, read_secret_lines
from lloom_sidecar.errors import DaemonUnavailableError, LloomError
from lloom_sidecar.executor.backend import BackendState
from lloom_sidecar.http.asgi import AsgiApp, asgi_handler
from lloom_sidecar.http.errors import CertificateError
from lloom_sidecar.http.listeners import Listener
from lloom_sidecar.http.tls import ServerCertificate
from lloom_sidecar.identity import HomeLock, init_home, load_network_keys
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.ledger.store import Ledger
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.p2p.daemon import Daemon, Identity
from lloom_sidecar.p2p.inbound import serve_inbound
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.page.app import chat_app, status_app
from lloom_sidecar.peers.health import HealthBook
from lloom_sidecar.peers.hedging import Hedge
from lloom_sidecar.peers.selection import Policy
from lloom_sidecar.protocol.names import PROTOCOL_HELLO, PROTOCOL_REQUEST, SERVICE_VALIDATOR
from lloom_sidecar.protocol.network_key import NetworkKeys

from .addresses import announced
from .audit_side import AuditSide
from .bookkeeping import Bookkeeping, open_ledger
from .control_plane import ControlPlane
from .daemon import is_stock, make_supervisor, max_streams
from .executor_side import IDLE_POLL_S, ExecutorSide
from .listening import Listeners, open_listeners, serve_admin, serve_admin_tcp, serve_api, serve_page
from .observer import Observer
from .receipts import now_ms
from .remembered import RememberedPeers
from .tracing import make_tracing
from .view import View

MAX_INBOUND_STREAMS: Final = 8192
TICK_S: Final = 1.0
CERTIFICATE_WARN_S: Final = 3 * 86400.0
"""cert-manager renews at two thirds of a certificate's life, and ACME's live 90 days or less: three days before its end
one has been left behind.
"""
IDENTIFY_EVERY_S: Final = 15.0
"""Addresses change when a NAT mapping or an interface does."""
MAX_CLOCK_SKEW_MS: Final = 5_000
"""Against a validator; announcements tolerate 15 min, requests 60 s."""
TRACES_GRACE_S: Final = 3.0
"""For the last spans to go out."""
MIN_TRUST: Final = 0.75
"""With avoid_doubted: evidence of one validator rules an executor out for two half-lives, or for one where no digest
says that the models were the same."""
RESTARTS_TO_WARN: Final = 3

log = structlog.get_logger("lloom.node")


class Node:
    """Everything that one node holds. Made and run by ``run_node``."""

    def __init__(self, config: Config, ledger: Ledger, keys: NetworkKeys | None, *, rng: random.Random) -> None:
        self.config = config
        self.signer, _ = init_home(config.home)
        self.me = self.signer.peer
        self.started_at = trio.current_time()
        self.is_draining = False
        self.has_started = False
        self.api_listeners: list[Listener] = []
        self.page_listeners: list[Listener] = []
        self.api_certificate: ServerCertificate | None = None
        self._certificate_fault: str | None = None
        """Why the certificate files are not those in use."""
        self.identity: Identity | None = None
        self.events = EventBus()
        self.health = HealthConditions()
        self.metrics = Metrics(version=__version__, health=self.health)
        self.health_book = HealthBook()
        self._ledger = ledger
        self._handlers: dict[str, Callable[[P2PStream], Awaitable[None]]] = {}
        self._handler_address: Multiaddr | None = None
        self._drained = trio.Event()

        config.run_dir.mkdir(mode=0o700, exist_ok=True)
        self.supervisor = make_supervisor(config, self.me, on_up=self._on_up, on_down=self._on_down, rng=rng)
        self.books = Bookkeeping(config, ledger, health=self.health, metrics=self.metrics)
        self.observer = Observer(
            metrics=self.metrics,
            events=self.events,
            models_of=lambda peer: self.control.models_of(peer),
            roles_of=lambda peer: self.control.roles_of(peer),
            keep_receipt=self.books.keep,
            trust=self.health_book.trust,
        )
        self.control = ControlPlane(
            config,
            self.signer,
            keys=keys,
            store=RememberedPeers(ledger),
            next_sequence=ledger.next_sequence,
            get_daemon=self.daemon,
            max_streams=lambda: max_streams(self.supervisor),
            announcement=lambda: self.serving.announcer.current if self.serving is not None else b"",
            service_keys=self.service_keys,
            on_peer_gone=lambda peer: self.pool.drop_peer(peer),
            on_neighbours=lambda: self.serving.announcer.introduce() if self.serving is not None else None,
            on_clock=self._on_clock,
            trust=self.health_book.trust,
            metrics=self.metrics,
            observer=self.observer,
            rng=rng,
        )
        self.quotes = QuoteWallet()
        self.tracing = make_tracing(config, self.me, version=__version__)
        self.pool = StreamPool(
            self.daemon,
            self.control.greet,
            now_ms=now_ms,
            on_use=self._on_stream_use,
            takes_compressed=self._takes_compressed,
        )
        self.market = Market(self.pool, self.signer, self.quotes)
        self.serving = self._make_executor_side(rng) if config.is_executor else None
        self.router = self._make_router(rng) if config.is_client or config.audits else None
        self.api = self._make_api(self.router) if config.is_client and self.router is not None else None
        self.auditing = self._make_audit_side(self.router, rng) if config.audits and self.router is not None else None
        self.view = View(self)

    def _make_executor_side(self, rng: random.Random) -> ExecutorSide:
        return ExecutorSide(
            self.config,
            self.signer,
            ledger_trouble=self._ledger.trouble,
            max_streams=lambda: max_streams(self.supervisor),
            may_ask=self.control.membership.may_ask,
            compresses_for=self._takes_compressed,
            is_member=self.control.membership.counts_as_member,
            tracing=self.tracing,
            key=self.control.membership.current_key,
            addrs=self._announced_addrs,
            executors_seen=lambda: len(self.control.book),
            get_daemon=self.daemon,
            next_sequence=self._ledger.next_sequence,
            on_backend=self._on_backend,
            on_published=lambda: self.metrics.message_sent("announcement"),
            observer=self.observer,
            rng=rng,
        )

    def _make_router(self, rng: random.Random) -> Router:
        control = self.control
        return Router(
            pool=self.pool,
            signer=self.signer,
            book=control.book,
            health=self.health_book,
            look_up=control.discovery.look_up,
            ensure_connected=control.connections.ensure,
            catalogue_is_complete=lambda: control.bootstrap.is_complete,
            observer=self.observer,
            quote_of=lambda peer, model: self.quotes.usable(peer, model, now_ms()),
            exchange_with=self.books.spending.exchange,
            rng=rng,
        )

    def _make_audit_side(self, router: Router, rng: random.Random) -> AuditSide:
        return AuditSide(
            signer=self.signer,
            router=router,
            book=self.control.book,
            key=self.control.membership.current_key,
            get_daemon=self.daemon,
            next_sequence=self._ledger.next_sequence,
            on_published=self.control.on_evidence_published,
            on_finding=self.observer.executor_found_wanting,
            max_price=self.config.max_price,
            interval_s=self.config.audit_interval_s,
            rng=rng,
        )

    def _make_api(self, router: Router) -> OpenAiApi:
        key_file = self.config.api_key_file
        return OpenAiApi(
            router=router,
            book=self.control.book,
            settings=ApiSettings(
                api_keys=read_secret_lines(key_file) if key_file is not None else (),
                policy=Policy(self.config.policy.replace("-", "_")),
                hedge=Hedge(self.config.hedge),
                max_price=self.config.max_price,
                max_body_bytes=self.config.max_body_bytes,
                resume=self.config.resume,
                min_trust=MIN_TRUST if self.config.avoid_doubted else 0.0,
            ),
            observer=self.observer,
            started_at_s=int(time.time()),
            tracing=self.tracing,
        )

    # ------------------------------------------------------------ life
    async def run(self, listeners: Listeners, *, task_status: trio.TaskStatus[Node]) -> None:
        """Run until ``drain`` has ended it, or until cancelled."""
        shutdown = trio.Event()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._ledger.run)
            await self.books.load()
            nursery.start_soon(self.books.watch, self.observer)
            nursery.start_soon(serve_admin, listeners.probe, asgi_handler(probe_app(self.view)))
            nursery.start_soon(serve_admin, listeners.admin, asgi_handler(admin_app(self.view)))
            token_file = self.config.admin_token_file
            if listeners.admin_tcp and token_file is not None:
                guarded = asgi_handler(with_token(admin_app(self.view), read_secret_lines(token_file)))
                nursery.start_soon(serve_admin_tcp, listeners.admin_tcp, guarded)
            self.page_listeners = listeners.page
            nursery.start_soon(serve_page, listeners.page, asgi_handler(self._status_page()), self.config)
            if self.serving is not None:
                await self.serving.start(nursery)
            await self._start_p2p(nursery)
            self._set_static_conditions()
            await nursery.start(self.pool.run)
            await nursery.start(self.control.run)
            if self.serving is not None:
                nursery.start_soon(self.serving.announce)
            if self.auditing is not None:
                nursery.start_soon(self.auditing.auditor.run)
            nursery.start_soon(self._tick)
            if self.api is not None:
                self.api_listeners = listeners.api
                chat = asgi_handler(chat_app(self._describe_for_chat))
                certificate = self.api_certificate = listeners.api_certificate
                refused = self.metrics.http_refused
                nursery.start_soon(
                    serve_api, listeners.api, self.api, chat, self.config, refused, shutdown, certificate
                )
            self.has_started = True
            log.info("node_started", peer=str(self.me), roles=list(self.config.roles), version=__version__)
            task_status.started(self)
            await self._drained.wait()
            # Out of the network first, so that no new work is sent here; then what is under way may finish.
            shutdown.set()
            if self.serving is not None:
                await self.serving.withdraw()
            with trio.move_on_after(self.config.grace_s):
                await self._wait_idle()
            with trio.move_on_after(TRACES_GRACE_S):
                await trio.to_thread.run_sync(self.tracing.close, abandon_on_cancel=True)
            log.info("node_ended", peer=str(self.me))
            self.events.close()
            nursery.cancel_scope.cancel()

    def _status_page(self) -> AsgiApp:
        page, key_file = self.config.page, self.config.api_key_file
        # On loopback it is for whoever sits at this machine; the API has its keys for what costs something.
        keys = () if page is None or page.is_loopback or key_file is None else read_secret_lines(key_file)
        return status_app(self.view, keys=tuple(keys))

    def _describe_for_chat(self) -> dict[str, int | None]:
        return {"page_port": self.page_listeners[0].port if self.page_listeners else None}

    async def drain(self) -> None:
        """Begin to end: removal announced, new work refused, running work finished. Returns at once; idempotent."""
        if not self.is_draining:
            self.is_draining = True
            self.health.set("draining", "New work is refused; running requests may finish.")
            log.info("draining", peer=str(self.me))
            self._drained.set()

    async def _wait_idle(self) -> None:
        # Polled: both counts change on the hot path, which an event would cost at every request for this one moment.
        while (self.serving is not None and self.serving.executor.working) or self.observer.client.in_flight:  # noqa: ASYNC110
            await trio.sleep(IDLE_POLL_S)

    # ------------------------------------------------------------ p2pd
    async def _start_p2p(self, nursery: trio.Nursery) -> None:
        self._handlers[PROTOCOL_HELLO] = self.control.hello.serve_stream
        if self.serving is not None:
            self._handlers[PROTOCOL_REQUEST] = self._serve_requests
        self._handler_address = await nursery.start(
            lambda task_status: serve_inbound(
                self.config.handler_path,
                self._handlers,
                max_streams=MAX_INBOUND_STREAMS,
                on_error=self._on_inbound_error,
                task_status=task_status,
            )
        )
        await nursery.start(self.supervisor.run)

    async def _serve_requests(self, stream: P2PStream) -> None:
        assert self.serving is not None  # registered only then
        with self.control.tags.using(stream.peer):
            await self.serving.executor.serve_stream(stream)

    def _on_stream_use(self, peer: PeerId, is_used: bool) -> None:
        (self.control.tags.hold if is_used else self.control.tags.release)(peer)

    def _takes_compressed(self, peer: PeerId) -> bool:
        return self.config.compression != "off" and self.control.book.has_feature(peer, "compression")

    def daemon(self) -> Daemon:
        """The daemon of the moment. Raises DaemonUnavailableError."""
        found = self.supervisor.daemon
        if found is None:
            raise DaemonUnavailableError("p2pd is not up; it is being started again", retry_after_s=1.0)
        return found

    async def _on_up(self, daemon: Daemon, identity: Identity) -> None:
        assert self._handler_address is not None  # the listener is opened before p2pd is started
        self.identity = identity
        # Before anything is dialled: libp2p limits how often it tells peers of further handlers.
        for protocol in self._handlers:
            await daemon.register_handler(protocol, self._handler_address)
        self.metrics.p2pd_up(True)
        self.health.clear("p2pd_down")
        if self.has_started:
            self.metrics.p2pd_restarted()
            log.info("p2pd_back", peer=str(self.me))
        self.control.p2pd_restarted()
        self._announce_again()

    def _on_down(self, reason: str) -> None:
        self.metrics.p2pd_up(False)
        self.health.set("p2pd_down", reason)
        for peer in self.control.connections:
            self.observer.will_close(peer, "p2pd_down")
        self.control.connections.lost_all()
        self.pool.close_all()

    def _on_inbound_error(self, exc: Exception, stream: P2PStream | None) -> None:
        code = exc.code if isinstance(exc, LloomError) else "internal"
        self.metrics.refused(code)
        peer = None if stream is None else str(stream.peer)
        log.warning("inbound_failed", code=code, peer=peer, error=type(exc).__name__)

    # ------------------------------------------------------------ what this node offers
    def _announce_again(self) -> None:
        if self.serving is not None:
            self.serving.announcer.changed()

    async def prove_writable(self) -> None:
        """Write to the database. Raises LloomError when that fails. Uses up a sequence number, which does no harm."""
        await self._ledger.next_sequence(now_ms())

    def service_keys(self) -> list[str]:
        """What this node is a provider of in the DHT now."""
        keys = [SERVICE_VALIDATOR] if self.config.is_validator else []
        return keys if self.serving is None else [*keys, *self.serving.service_keys()]

    def _announced_addrs(self) -> tuple[Multiaddr, ...]:
        listening = self.identity.addrs if self.identity is not None else ()
        return announced(listening, self.config.announce_addrs)

    def _on_backend(self, state: BackendState) -> None:
        self.health.update("backend_down", None if state.is_up else state.reason)
        self.control.discovery.changed()

    # ------------------------------------------------------------ health
    def _on_clock(self, validator: PeerId, ahead_ms: int) -> None:
        is_off = abs(ahead_ms) > MAX_CLOCK_SKEW_MS
        way = "ahead of" if ahead_ms > 0 else "behind"
        text = f"This node's clock is {abs(ahead_ms) / 1000:.1f} s {way} that of validator {validator.short()}."
        self.health.update("clock_skew", text if is_off else None)

    def _set_static_conditions(self) -> None:
        config = self.config
        if config.open:
            self.health.set("open_network", "This node sends to, or serves, nodes of any network.")
        if config.api_open:
            kept = [str(one) for one in (config.api if config.is_client else None, config.page) if one is not None]
            self.health.set("api_open", f"Whoever reaches {' or '.join(kept)} needs no key.")
        if not self.control.bootstrap.validators and not config.is_validator:
            self.health.set("no_bootstrap", "Only nodes that dial this one, or are on the same link, will be found.")
        warnings = list(config.warnings)
        if config.mdns and "mdns" not in self.supervisor.features:
            warnings.append("mdns has no effect: this p2pd does not have it, or is not started by this node")
        for warning in warnings:
            log.warning("config_warning", reason=warning)
        self.health.update("config_warning", "; ".join(warnings) or None)

    async def _watch_certificate(self, certificate: ServerCertificate) -> str | None:
        """Take a renewed certificate into use; what is wrong with the one in use or the new one."""
        try:
            if await trio.to_thread.run_sync(certificate.reload_if_changed):
                log.info("certificate_reloaded")
                self._certificate_fault = None
        except CertificateError as exc:
            log.warning("certificate_reload_failed", error=exc.message)
            self._certificate_fault = f"The one before is still in use; {exc.message}."
        left_s = certificate.ends_at_s - time.time()
        if self._certificate_fault is None and left_s < CERTIFICATE_WARN_S:
            return f"It ended {-left_s / 3600:.0f} h ago." if left_s < 0 else f"It ends in {left_s / 3600:.0f} h."
        return self._certificate_fault

    async def _tick(self) -> None:
        """What has to be looked at now and then."""
        next_identify = trio.current_time() + IDENTIFY_EVERY_S
        while True:
            await trio.sleep(TICK_S)
            now = trio.current_time()
            book = self.control.book
            self.metrics.set_known(len(book), len(book.models(now)))
            self.health.update("no_validator", self._validators_lost())
            self.health.update("executor_doubted", self._doubted(now))
            peers, wanted = len(self.control.connections), self.config.min_peers
            self.health.update(
                "few_peers", f"{peers} of {wanted} wanted." if peers < wanted and not self.config.is_validator else None
            )
            if self.config.is_client:
                self.health.update("no_executor", None if len(book) else "No model can be asked for.")
            restarts = self.supervisor.restarts_total
            keeps_ending = self.supervisor.daemon is None and restarts >= RESTARTS_TO_WARN
            self.health.update("p2pd_restarting", f"Started again {restarts} times." if keeps_ending else None)
            if not self.config.is_attached and is_stock(self.supervisor):
                self.health.set(
                    "p2pd_stock", "It is an unmodified p2pd: no NAT traversal, 64 streams a peer, TCP only."
                )
            self.health.update("previous_key", self._previous_key())
            if self.api_certificate is not None:
                self.health.update("certificate", await self._watch_certificate(self.api_certificate))
            others = self.control.membership.other_versions()
            self.health.update("other_version", f"{others} met within ten minutes." if others else None)
            tokens = self.view.tokens()
            self.metrics.set_tokens(received=tokens["received"], generated=tokens["generated"])
            if self.serving is not None:
                admission = self.serving.executor.admission
                self.metrics.set_capacity(admission.slots, admission.queued)
            if now >= next_identify:
                next_identify = now + IDENTIFY_EVERY_S
                await self._refresh_identity()

    def _validators_lost(self) -> str | None:
        validators = self.control.bootstrap.validators
        if not validators or any(v.peer in self.control.connections for v in validators):
            return None
        reasons = "; ".join(f"{v.peer.short()}: {v.last_error or 'connecting'}" for v in validators[:3])
        return f"None of {len(validators)} answers ({reasons})."

    def _doubted(self, now: float) -> str | None:
        doubted = self.health_book.trust.doubted(now)
        if not doubted:
            return None
        names = ", ".join(peer.short() for peer in doubted[:3])
        return f"{len(doubted)}: {names}{', ...' if len(doubted) > 3 else ''}."

    def _previous_key(self) -> str | None:
        keys = self.control.membership.key_file
        if keys is None or len(self.control.membership.keys()) < 2:
            return None
        return (
            f"Nodes with the key before the rotation are members for {(keys.previous_until_ms - now_ms()) // 1000} s."
        )

    async def _refresh_identity(self) -> None:
        try:
            identity = await self.daemon().identify()
        except LloomError:
            return  # the supervisor notices on its own
        if self.identity is None or set(identity.addrs) != set(self.identity.addrs):
            self.identity = identity
            self._announce_again()


async def run_node(config: Config, *, task_status: trio.TaskStatus[Node] = trio.TASK_STATUS_IGNORED) -> None:
    """Run one node until it has drained or is cancelled. ``started`` gives the node once it serves.

    Raises:
        ConfigError: the identity or the network key cannot be used.
        StartError: a busy port, p2pd that does not start, another sidecar in the same home, a damaged database.
    """
    init_home(config.home)
    with HomeLock(config.home):
        keys = load_network_keys(config.network_key_file) if config.has_network_key else None
        # Jitter and choice only: nothing secret comes from this generator.
        node = Node(config, open_ledger(config), keys, rng=random.Random())
        listeners = await open_listeners(config)
        try:
            await node.run(listeners, task_status=task_status)
        finally:
            listeners.close()

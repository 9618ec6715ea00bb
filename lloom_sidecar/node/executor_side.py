"""What an executor node has more than others: a backend, the service in front of it, and something to announce."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import structlog
import trio

from lloom_sidecar import __version__
from lloom_sidecar.config import BUILTIN_MODEL, Config, read_secret_lines
from lloom_sidecar.executor.admission import Admission
from lloom_sidecar.executor.backend import Backend, BackendState
from lloom_sidecar.executor.body import BodyPolicy
from lloom_sidecar.executor.local_model import digest_of_file, run_local_model
from lloom_sidecar.executor.model_fetch import BUILTIN_MODEL as BUILTIN_FILE
from lloom_sidecar.executor.model_fetch import ensure_builtin_model, terminal_progress
from lloom_sidecar.executor.rates import RequestRates
from lloom_sidecar.executor.serve import Executor, ExecutorLimits, ExecutorObserver
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.network.announcer import Announcer, Offer
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.names import SERVICE_EXECUTOR, agent_version, service_model
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.tracing import Tracing

from .receipts import now_ms

BUILTIN_MODEL_ID: Final = "smollm2:135m"
LOCAL_MODEL_SLOTS: Final = 4
"""Requests that the embedded model works on at once, unless configured."""
LOCAL_MODEL_FEATURES: Final = frozenset({"chat", "completions", "embeddings"})
IDLE_POLL_S: Final = 0.02
WITHDRAW_TIMEOUT_S: Final = 2.0
"""For the removal to go out before a node ends."""

log = structlog.get_logger("lloom.executor")


class ExecutorSide:
    """Backend, executor and announcer of one node."""

    def __init__(
        self,
        config: Config,
        signer: Signer,
        *,
        max_streams: Callable[[], int],
        may_ask: Callable[[PeerId], bool],
        compresses_for: Callable[[PeerId], bool],
        is_member: Callable[[PeerId], bool],
        tracing: Tracing,
        key: Callable[[], NetworkKey | None],
        addrs: Callable[[], tuple[Multiaddr, ...]],
        executors_seen: Callable[[], int],
        get_daemon: Callable[[], Daemon],
        next_sequence: Callable[[int], Awaitable[int]],
        on_backend: Callable[[BackendState], None],
        on_published: Callable[[], None],
        observer: ExecutorObserver,
        ledger_trouble: Callable[[], str | None],
        rng: random.Random,
    ) -> None:
        self._config = config
        self._on_backend = on_backend
        self._announcing = trio.CancelScope()
        self._withdrawn = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._pausing: trio.CancelScope | None = None
        """Of the task that cuts what still runs when a pause's grace is over; None when this executor is not paused."""
        self.backend = self._make_backend()
        slots = config.slots or self.backend.state.slots
        self.executor = Executor(
            signer=signer,
            backend=self.backend,
            admission=Admission(
                slots=slots,
                queue_limit=config.queue_limit,
                max_per_peer=config.peer_limit or None,
                priority_peers=frozenset(config.priority_peers),
                priority_slots=config.priority_slots,
            ),
            policy=BodyPolicy(
                max_tokens=config.max_tokens_limit,
                default_max_tokens=config.max_tokens_default,
                max_n=config.max_choices,
                allow_remote_media=config.allow_remote_media,
            ),
            limits=ExecutorLimits(max_body_bytes=config.max_body_bytes),
            rates=RequestRates(
                peer_per_s=config.peer_rate, subnet_per_s=config.subnet_rate, global_per_s=config.global_rate
            ),
            max_streams=max_streams,
            price=config.price,
            may_ask=may_ask,
            compresses_for=compresses_for,
            tracing=tracing,
            compresses_streams=config.compression == "all",
            is_member=is_member,
            observer=observer,
            now_ms=now_ms,
            ledger_trouble=ledger_trouble,
            max_unacked=config.max_unacked,
        )
        self.announcer = Announcer(
            signer=signer,
            key=key,
            offer=self._offer,
            addrs=addrs,
            executors_seen=executors_seen,
            get_daemon=get_daemon,
            next_sequence=next_sequence,
            now_ms=now_ms,
            software=agent_version(__version__),
            on_published=on_published,
            rng=rng,
            is_silent=not config.has_gossip,
        )

    def _make_backend(self) -> Backend:
        config = self._config
        if config.model is not None:
            return Backend(
                f"unix:{self._model_socket}",
                on_change=self._backend_changed,
                slots=config.slots,
                features=LOCAL_MODEL_FEATURES,
            )
        assert config.backend is not None  # an executor has one of the two: config.py checked it
        key = read_secret_lines(config.backend_key_file)[0] if config.backend_key_file is not None else None
        return Backend(
            config.backend,
            on_change=self._backend_changed,
            slots=config.slots,
            api_key=key,
            only_alias=config.model_alias,
            digests={
                model: bytes.fromhex(digest)
                for model, _, digest in (text.rpartition("=") for text in config.model_digests)
            },
        )

    @property
    def _model_socket(self) -> Path:
        return self._config.run_dir / "model.sock"

    async def start(self, nursery: trio.Nursery) -> None:
        """Start the embedded model if it is wanted, and watch the backend. Raises StartError."""
        self._nursery = nursery
        if self._config.model is not None:
            await self._start_local_model(nursery, self._config.model)
        await nursery.start(self.backend.run)

    async def announce(self) -> None:
        """Announce until ``withdraw`` or cancelled."""
        try:
            with self._announcing:
                await self.announcer.run()
        finally:
            self._withdrawn.set()

    async def withdraw(self) -> None:
        """Take no further request, and tell the network so; returns when it was told, or after 2 s."""
        self.executor.drain()
        self._announcing.cancel()
        with trio.move_on_after(WITHDRAW_TIMEOUT_S):
            await self._withdrawn.wait()

    @property
    def is_paused(self) -> bool:
        """Whether an operator lets it take no work while the node goes on."""
        return self._pausing is not None

    def pause(self) -> None:
        """Take no further request until ``resume``, and announce so; what runs is cut after the grace. Idempotent."""
        if self._pausing is None and self._nursery is not None:
            self._pausing = trio.CancelScope()
            self.executor.drain()
            self._offer_changed()
            self._nursery.start_soon(self._cut_after_grace, self._pausing)

    def resume(self) -> None:
        """End a pause: what still ran may go on, new requests are taken. Idempotent."""
        if self._pausing is not None:
            self._pausing.cancel()
            self._pausing = None
            self.executor.resume()
            self._offer_changed()

    async def _cut_after_grace(self, scope: trio.CancelScope) -> None:
        with scope:
            with trio.move_on_after(self._config.grace_s):
                while self.executor.working:  # noqa: ASYNC110 polled, as at the node's end: it changes on the hot path
                    await trio.sleep(IDLE_POLL_S)
            if self.executor.working:
                log.warning("executor_cut", requests=self.executor.working)
            self.executor.cut()

    def set_price(self, model: str, price: Price) -> Price:
        """Ask ``price`` for ``model`` and announce that; returns what it was before. Raises LookupError when the
        backend does not serve the model."""
        before = self.executor.price_of(model)
        self.executor.set_price(model, price)
        if price != before:
            self.announcer.changed()
        return before

    def service_keys(self) -> list[str]:
        """What this node is a provider of now: nothing while its backend is down."""
        offers = self.executor.offers()
        return [SERVICE_EXECUTOR, *(service_model(offer.id) for offer in offers)] if offers else []

    def _offer(self) -> Offer:
        return Offer(self.executor.offers(), self.executor.load)

    def _backend_changed(self, state: BackendState) -> None:
        if self.executor.admission.slots != state.slots:
            self.executor.resize(state.slots)
        self.announcer.changed()
        self._on_backend(state)

    def _offer_changed(self) -> None:
        self._backend_changed(self.backend.state)

    async def _start_local_model(self, nursery: trio.Nursery, model: str) -> None:
        if model == BUILTIN_MODEL:
            with terminal_progress() as progress:
                path = await ensure_builtin_model(progress=progress)
            alias = self._config.model_alias or BUILTIN_MODEL_ID
            self.backend.set_digest(alias, bytes.fromhex(BUILTIN_FILE.sha256))
        else:
            path = Path(model)
            alias = self._config.model_alias or path.stem
            nursery.start_soon(self._compute_digest, alias, path)

        def on_state(is_up: bool, reason: str) -> None:
            if not is_up:
                log.warning("local_model_down", reason=reason)
            self.backend.suspect()

        await nursery.start(
            lambda task_status: run_local_model(
                path,
                alias=alias,
                socket_path=self._model_socket,
                parallel=self._config.slots or LOCAL_MODEL_SLOTS,
                on_state=on_state,
                task_status=task_status,
            )
        )

    async def _compute_digest(self, model: str, path: Path) -> None:
        try:
            digest = await digest_of_file(path)
        except OSError as exc:
            log.warning("model_digest_unknown", path=str(path), error=str(exc))
            return
        if digest:
            self.backend.set_digest(model, digest)

"""The control plane of one node: who else is there, and which of them are of our network."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Final

import trio

from lloom_sidecar import __version__
from lloom_sidecar.admin.metrics import Metrics
from lloom_sidecar.config import Config
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.network.bootstrap import Bootstrap, group_by_peer
from lloom_sidecar.network.connections import Connections
from lloom_sidecar.network.discovery import Discovery
from lloom_sidecar.network.gossip import run_gossip
from lloom_sidecar.network.hello import Greeted, HelloService
from lloom_sidecar.network.intake import Intake
from lloom_sidecar.network.prober import run_prober
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.peers.addresses import dialable
from lloom_sidecar.peers.peerbook import CataloguePage, PeerBook
from lloom_sidecar.peers.rate import RateLimiter
from lloom_sidecar.protocol.names import agent_version
from lloom_sidecar.protocol.network_key import NetworkKey, NetworkKeys
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .addresses import own_networks
from .observer import Observer
from .receipts import now_ms

MAX_ANNOUNCEMENTS_PER_S: Final = 2.0
"""Of one author; an honest one sends one in ten seconds and a few when it changes."""
ANNOUNCEMENT_BURST: Final = 10.0
MAX_AUTHORS: Final = 20_000
MAX_WANTED_FULL: Final = 256

_ROLES: Final = {"client": pb.ROLE_CLIENT, "executor": pb.ROLE_EXECUTOR, "validator": pb.ROLE_VALIDATOR}
_ROLE_NAMES: Final = {value: name for name, value in _ROLES.items()}


class ControlPlane:
    """The peer book and the services that keep it true.

    ``on_peer_gone`` is told of a peer's last connection; ``on_joined`` of a validator that was reached; ``on_clock`` by
    how many milliseconds our clock is ahead of a validator's.
    """

    def __init__(
        self,
        config: Config,
        me: PeerId,
        *,
        keys: NetworkKeys | None,
        get_daemon: Callable[[], Daemon],
        max_streams: Callable[[], int],
        announcement: Callable[[], bytes],
        service_keys: Callable[[], Iterable[str]],
        on_peer_gone: Callable[[PeerId], None],
        on_joined: Callable[[], None],
        on_clock: Callable[[PeerId, int], None],
        metrics: Metrics,
        observer: Observer,
        rng: random.Random,
    ) -> None:
        self.config = config
        self.key_file = keys
        self._me = me
        self._get_daemon = get_daemon
        self._max_streams = max_streams
        self._announcement = announcement
        self._on_peer_gone = on_peer_gone
        self._on_joined = on_joined
        self._on_clock = on_clock
        self._metrics = metrics
        self._observer = observer
        self._wanted_full: dict[PeerId, None] = {}
        validators = group_by_peer(config.bootstrap)
        self.book = PeerBook(
            me=me,
            is_open=config.open,
            allow_list=frozenset(config.allow_peers),
            validators=frozenset(v.peer for v in validators),
            first_cursor=now_ms(),
        )
        self.hello = HelloService(
            me=me,
            keys=self.keys,
            is_open=config.open,
            node_info=self._node_info,
            get_daemon=get_daemon,
            on_greeted=self._on_greeted,
            on_refused=observer.hello_refused,
            catalogue=self._catalogue_page if config.is_validator else None,
        )
        self.intake = Intake(
            me=me, book=self.book, keys=self.keys, observer=observer, want_full=self._want_full, now_ms=now_ms
        )
        self.connections = Connections(get_daemon=get_daemon, addrs_of=self._dialable, observer=self)
        self.bootstrap = Bootstrap(
            me=me,
            validators=validators,
            get_daemon=get_daemon,
            connections=self.connections,
            hello=self.hello,
            intake=self.intake,
            observer=observer,
            after_join=self._after_join,
            rng=rng,
        )
        self.discovery = Discovery(
            me=me,
            service_keys=service_keys,
            get_daemon=get_daemon,
            connections=self.connections,
            hello=self.hello,
            book=self.book,
            on_found=metrics.discovery_finished,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run its services until cancelled."""
        rates: RateLimiter[PeerId] = RateLimiter(
            rate_per_s=MAX_ANNOUNCEMENTS_PER_S, burst=ANNOUNCEMENT_BURST, max_keys=MAX_AUTHORS
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(self.connections.run)
            nursery.start_soon(
                lambda: run_gossip(
                    me=self._me,
                    get_daemon=self._get_daemon,
                    intake=self.intake,
                    rates=rates,
                    on_message=lambda: self._metrics.message_received("announcement"),
                    on_dropped=self._metrics.announcement_dropped,
                )
            )
            await nursery.start(self.bootstrap.run)
            nursery.start_soon(lambda: self.discovery.run(searches=self.config.is_client))
            nursery.start_soon(
                lambda: run_prober(
                    book=self.book,
                    connections=self.connections,
                    hello=self.hello,
                    on_lost=lambda peer: self._observer.executor_lost(peer, "lease"),
                    wanted_full=self._take_wanted_full,
                )
            )
            task_status.started()

    # ------------------------------------------------------------ who belongs to us
    def keys(self) -> tuple[NetworkKey, ...]:
        """The network keys that count now, newest first."""
        return () if self.key_file is None else self.key_file.valid(now_ms())

    def current_key(self) -> NetworkKey | None:
        """The newest of them."""
        return None if self.key_file is None else self.key_file.current

    def may_ask(self, peer: PeerId) -> bool:
        """Whether this node serves ``peer``: a member by hello, an allowed one, or anybody when open."""
        return self.config.open or self.book.is_member(peer, trio.current_time()) or peer in self.config.allow_peers

    async def greet(self, peer: PeerId) -> None:
        """Say hello. Raises as ``HelloService.greet``."""
        await self.hello.greet(peer)

    def members(self) -> int:
        """Connected peers that proved our network."""
        now = trio.current_time()
        return sum(self.book.is_member(peer, now) for peer in self.connections)

    def models_of(self, peer: PeerId) -> tuple[str, ...]:
        """Ids of the models that an executor offers."""
        known = self.book.known(peer, trio.current_time())
        return () if known is None else known.models

    # ------------------------------------------------------------ what the services ask and tell
    def _node_info(self) -> pb.NodeInfo:
        return pb.NodeInfo(
            roles=[_ROLES[role] for role in self.config.roles],
            max_streams=self._max_streams(),
            announcement=self._announcement(),
            software=agent_version(__version__),
            now_ms=now_ms(),
        )

    def _on_greeted(self, greeted: Greeted) -> None:
        node = greeted.node
        self._metrics.message_received("hello")
        if greeted.rtt_s is not None:
            self._observer.rtt_s[greeted.peer] = greeted.rtt_s
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
            now=trio.current_time(),
        )
        self.book.note_path(greeted.peer, is_relayed=greeted.addr.is_relayed)
        if greeted.rtt_s is not None and any(v.peer == greeted.peer for v in self.bootstrap.validators):
            # Theirs was read about half a round trip ago.
            self._on_clock(greeted.peer, now_ms() - node.now_ms - round(greeted.rtt_s * 500))

    def _catalogue_page(self, model: str, since: int) -> CataloguePage:
        return self.book.entries_since(since, now=trio.current_time(), model=model or None)

    async def _after_join(self, peer: PeerId) -> None:
        self.discovery.changed()
        self._on_joined()

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

    def connected(self, peer: PeerId, addr: Multiaddr) -> None:
        """A connection appeared (ConnectionObserver)."""
        self._observer.connected(peer, addr)
        self.book.note_path(peer, is_relayed=addr.is_relayed)

    def disconnected(self, peer: PeerId) -> None:
        """A peer's last connection ended (ConnectionObserver)."""
        self._observer.disconnected(peer)
        self.book.on_disconnected(peer)
        self.book.mark_failed(peer, trio.current_time())
        self._on_peer_gone(peer)

    def polled(self, peers: int) -> None:
        """The connections were looked at (ConnectionObserver)."""
        self._metrics.set_peers(peers, self.members())

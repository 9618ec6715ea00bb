"""The control plane of one node: who else is there, and which of them are of our network."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from typing import Final

import structlog
import trio

from lloom_sidecar import __version__
from lloom_sidecar.admin.metrics import Metrics
from lloom_sidecar.config import Config
from lloom_sidecar.errors import DaemonError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.network.bootstrap import VALIDATOR_TAG, Bootstrap, group_by_peer
from lloom_sidecar.network.connections import Connections
from lloom_sidecar.network.discovery import Discovery
from lloom_sidecar.network.evidence import EvidenceBoard
from lloom_sidecar.network.gossip import run_gossip, run_topic
from lloom_sidecar.network.greeter import Greeter
from lloom_sidecar.network.hello import Greeted, HelloService
from lloom_sidecar.network.intake import Intake
from lloom_sidecar.network.known_peers import KnownPeers, PeerStore
from lloom_sidecar.network.prober import run_prober
from lloom_sidecar.network.status import MAX_STATUSES_PER_S, STATUS_BURST, StatusBoard, run_publisher, summarise
from lloom_sidecar.network.tags import Tags
from lloom_sidecar.network.upkeep import Upkeep
from lloom_sidecar.p2p.daemon import Daemon, TopicMessage
from lloom_sidecar.peers.addresses import dialable
from lloom_sidecar.peers.peerbook import CataloguePage, PeerBook
from lloom_sidecar.peers.rate import RateLimiter
from lloom_sidecar.peers.trust import TrustBook
from lloom_sidecar.protocol.envelope import Signer, says_kind
from lloom_sidecar.protocol.evidence import SignedEvidence
from lloom_sidecar.protocol.names import KIND_EVIDENCE, TOPIC_NETWORK, agent_version
from lloom_sidecar.protocol.network_key import NetworkKeys
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.status import NetworkStatus

from .addresses import own_networks
from .membership import Membership
from .observer import Observer
from .receipts import now_ms

MAX_ANNOUNCEMENTS_PER_S: Final = 2.0
"""Of one author; an honest one sends one in ten seconds and a few when it changes."""
ANNOUNCEMENT_BURST: Final = 10.0
MAX_AUTHORS: Final = 20_000
UNSURE_WEIGHT: Final = 0.5
"""Of evidence about executors that announce no digest of the model."""
MAX_PAGE_ENTRIES: Final = 1_000
"""Of one catalogue answer of a node that is no validator; the asker goes on from there."""
MAX_SOFTWARE_KNOWN: Final = 10_000
SOFTWARE: Final = agent_version(__version__)

OWN_CAUSES: Final = frozenset({"operator", "p2pd_down"})
"""Ends of connections that say nothing of the peer: this node closed them, or its own p2pd ended."""

log = structlog.get_logger("lloom.control_plane")

_ROLES: Final = {"client": pb.ROLE_CLIENT, "executor": pb.ROLE_EXECUTOR, "validator": pb.ROLE_VALIDATOR}
_ROLE_NAMES: Final = {value: name for name, value in _ROLES.items()}


class ControlPlane:
    """The peer book and the services that keep it true.

    ``store`` remembers peers over restarts; ``signer`` and ``next_sequence`` are for a validator's status.
    ``on_peer_gone`` is told of a peer's last connection; ``on_neighbours`` of neighbours in the topic of
    executors, where there were none; ``on_clock`` by how many milliseconds our clock is ahead of a validator's.
    """

    def __init__(
        self,
        config: Config,
        signer: Signer,
        *,
        keys: NetworkKeys | None,
        store: PeerStore,
        next_sequence: Callable[[int], Awaitable[int]],
        get_daemon: Callable[[], Daemon],
        max_streams: Callable[[], int],
        announcement: Callable[[], bytes],
        service_keys: Callable[[], Iterable[str]],
        on_peer_gone: Callable[[PeerId], None],
        on_neighbours: Callable[[], None],
        on_clock: Callable[[PeerId, int], None],
        trust: TrustBook,
        metrics: Metrics,
        observer: Observer,
        rng: random.Random,
    ) -> None:
        self.config = config
        self._signer = signer
        self._trust = trust
        self._features = [] if config.compression == "off" else ["compression"]
        self._me = me = signer.peer
        self._next_sequence = next_sequence
        self._get_daemon = get_daemon
        self._max_streams = max_streams
        self._announcement = announcement
        self._on_peer_gone = on_peer_gone
        self._on_neighbours = on_neighbours
        self._on_clock = on_clock
        self._metrics = metrics
        self._observer = observer
        self._rng = rng
        self._software: OrderedDict[PeerId, str] = OrderedDict()
        self.tags = Tags(get_daemon)
        validators = group_by_peer(config.bootstrap)
        self._validators = {v.peer for v in validators} | ({me} if config.is_validator else set())
        """Shared with the book, the membership and the board of statuses, which see what is added and removed."""
        self.book = PeerBook(
            me=me,
            is_open=config.open,
            allow_list=frozenset(config.allow_peers),
            validators=self._validators,
            first_cursor=now_ms(),
        )
        self.membership = membership = Membership(
            config,
            key_file=keys,
            book=self.book,
            validators=self._validators,
            in_use=self.tags.__contains__,
            look_now=lambda: self.greeter.look_now(),
            metrics=metrics,
            observer=observer,
        )
        self.hello = HelloService(
            me=me,
            keys=membership.keys,
            is_open=config.open,
            node_info=self._node_info,
            get_daemon=get_daemon,
            on_greeted=self._on_greeted,
            on_refused=membership.on_refused,
            catalogue=self._catalogue_page,
            ban_of=membership.ban_of,
        )
        self.intake = Intake(
            me=me,
            book=self.book,
            keys=membership.keys,
            observer=observer,
            now_ms=now_ms,
            on_offence=membership.on_offence,
        )
        self.connections = Connections(
            get_daemon=get_daemon, addrs_of=self._dialable, observer=self, keeps_away=membership.keeps_away
        )
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
            keeps_away=membership.ban_of,
        )
        self.greeter = Greeter(
            me=me,
            connections=self.connections,
            hello=self.hello,
            standing=membership.standing,
            is_needed=membership.is_needed,
            disconnect=self._disconnect,
            rng=rng,
        )
        self.known_peers = KnownPeers(
            me=me,
            store=store,
            get_daemon=get_daemon,
            connections=self.connections,
            hello=self.hello,
            intake=self.intake,
            roles_of=membership.member_roles,
            dialable=_dialable_once_connected,
        )
        self.upkeep = Upkeep(
            me=me,
            bootstrap=self.bootstrap,
            known=self.known_peers,
            connections=self.connections,
            members=self._members,
            get_daemon=get_daemon,
            observer=observer,
            after_join=self._after_join,
            # A network's first validator has nobody to look for.
            min_peers=0 if config.is_validator else config.min_peers,
            round_every_s=config.rebootstrap_s,
            refresh_every_s=config.refresh_s,
            rng=rng,
        )
        self.statuses = StatusBoard(
            validators=self._validators,
            keys=membership.keys,
            now_ms=now_ms,
            on_dropped=metrics.status_dropped,
            on_offence=membership.on_offence,
        )
        self.evidence = EvidenceBoard(
            validators=self._validators,
            keys=membership.keys,
            now_ms=now_ms,
            on_evidence=self._on_evidence,
            on_dropped=metrics.status_dropped,
            on_offence=membership.on_offence,
        )
        self.discovery = Discovery(
            me=me,
            service_keys=service_keys,
            get_daemon=get_daemon,
            connections=self.connections,
            hello=self.hello,
            book=self.book,
            on_found=metrics.discovery_finished,
            keeps_away=membership.keeps_away,
            is_alone=lambda: not self.bootstrap.joined,
            dialable=_dialable_here,
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run its services until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.connections.run)
            if self.config.has_gossip:
                nursery.start_soon(self._listen_for_announcements)
                nursery.start_soon(self._listen_for_statuses)
                if self.config.is_validator:
                    nursery.start_soon(self._publish_statuses)
            nursery.start_soon(self.greeter.run)
            nursery.start_soon(self.tags.run)
            await nursery.start(self.bootstrap.run)
            nursery.start_soon(self.known_peers.run)
            nursery.start_soon(self.upkeep.run)
            nursery.start_soon(lambda: self.discovery.run(searches=self.config.is_client))
            nursery.start_soon(
                lambda: run_prober(
                    book=self.book,
                    connections=self.connections,
                    hello=self.hello,
                    on_lost=lambda peer: self._observer.executor_lost(peer, "lease"),
                )
            )
            task_status.started()

    async def _listen_for_announcements(self) -> None:
        await run_gossip(
            me=self._me,
            get_daemon=self._get_daemon,
            intake=self.intake,
            rates=RateLimiter(rate_per_s=MAX_ANNOUNCEMENTS_PER_S, burst=ANNOUNCEMENT_BURST, max_keys=MAX_AUTHORS),
            on_message=lambda: self._metrics.message_received("announcement"),
            on_dropped=self._metrics.announcement_dropped,
            is_banned=self.membership.is_banned_author,
            on_offence=self.membership.on_offence,
            is_connected=self._is_connected,
            is_anchor=self.config.is_validator,
            on_neighbours=self._on_neighbours,
        )

    async def _listen_for_statuses(self) -> None:
        await run_topic(
            TOPIC_NETWORK,
            me=self._me,
            get_daemon=self._get_daemon,
            rates=RateLimiter(rate_per_s=MAX_STATUSES_PER_S, burst=STATUS_BURST, max_keys=MAX_AUTHORS),
            on_message=lambda: self._metrics.message_received("status"),
            on_dropped=self._metrics.status_dropped,
            handle=self._take_from_network,
            is_banned=self.membership.is_banned_author,
            on_offence=self.membership.on_offence,
            is_connected=self._is_connected,
            is_anchor=self.config.is_validator,
        )

    async def _publish_statuses(self) -> None:
        await run_publisher(
            signer=self._signer,
            key=self.membership.current_key,
            summary=self.summary,
            census=lambda: (len(self.book), self.members()),
            get_daemon=self._get_daemon,
            next_sequence=self._next_sequence,
            now_ms=now_ms,
            on_published=self._on_status_published,
            rng=self._rng,
        )

    def _on_status_published(self, sealed: bytes) -> None:
        self._metrics.message_sent("status")
        # Its own belongs on its board too; gossip brings it back, but is not listened to there.
        self.statuses.take(TopicMessage(self._me, sealed, 0, (TOPIC_NETWORK,)))

    def _take_from_network(self, message: TopicMessage) -> None:
        board = self.evidence if says_kind(message.data, KIND_EVIDENCE) else self.statuses
        board.take(message)

    def on_evidence_published(self, sealed: bytes) -> None:
        """This validator published evidence: it counts here too."""
        self._metrics.message_sent("evidence")
        self.evidence.take(TopicMessage(self._me, sealed, 0, (TOPIC_NETWORK,)))

    def _on_evidence(self, found: SignedEvidence) -> None:
        evidence = found.evidence
        # Without a digest the executors may honestly serve different weights under one name.
        weight = 1.0 if evidence.model_digest else UNSURE_WEIGHT
        now = trio.current_time()
        if self._trust.trust(evidence.subject, now) == 1.0:
            self._observer.executor_doubted(evidence.subject, evidence.model, found.peer)
        self._trust.set_doubt(evidence.subject, f"audit of {evidence.model} by {found.peer.short()}", weight, now)

    def _is_connected(self) -> bool:
        return len(self.connections) > 0

    def summary(self) -> NetworkStatus:
        """What this node sees of the network now."""
        now = trio.current_time()
        return summarise(self.book, {self._me, *self._members()}, self.software_of, now)

    def software_of(self, peer: PeerId) -> str:
        """What a connected peer said in hello that it runs; empty when nothing is known."""
        return SOFTWARE if peer == self._me else self._software.get(peer, "")

    def p2pd_restarted(self) -> None:
        """A p2pd came up, which knows nothing of before."""
        self.tags.forget()
        self.discovery.forget_provided()

    # ------------------------------------------------------------ validators
    def add_validator(self, addr: Multiaddr) -> bool:
        """Trust the validator at ``addr``, which has /p2p, from now on. False when it is known already."""
        is_new = self.bootstrap.add(addr)
        if addr.peer_id is not None:
            self._validators.add(addr.peer_id)
        return is_new

    async def remove_validator(self, peer: PeerId, addrs: Collection[Multiaddr]) -> bool:
        """Take addresses of a validator away; without any left it is trusted no more. False when none was known."""
        has_changed = self.bootstrap.remove(peer, addrs)
        if has_changed and all(one.peer != peer for one in self.bootstrap.validators):
            self._validators.discard(peer)
            with suppress(DaemonError):  # the tag ends with the connection at the latest
                await self._get_daemon().untag_peer(peer, VALIDATOR_TAG)
        return has_changed

    # ------------------------------------------------------------ who is connected
    async def _disconnect(self, peer: PeerId, cause: str) -> None:
        self._observer.will_close(peer, cause)
        try:
            await self._get_daemon().disconnect(peer)
            await self.connections.look()
        except DaemonError as exc:
            log.info("not_disconnected", peer=str(peer), code=exc.code)

    async def greet(self, peer: PeerId) -> None:
        """Say hello. Raises as ``HelloService.greet``."""
        await self.hello.greet(peer)

    def members(self) -> int:
        """Connected peers that proved our network."""
        return len(self._members())

    def _members(self) -> list[PeerId]:
        now = trio.current_time()
        return [peer for peer in self.connections if self.book.is_member(peer, now)]

    def models_of(self, peer: PeerId) -> tuple[str, ...]:
        """Ids of the models that an executor offers."""
        known = self.book.known(peer, trio.current_time())
        return () if known is None else known.models

    def roles_of(self, peer: PeerId) -> frozenset[str]:
        """What a peer said that it is."""
        known = self.book.known(peer, trio.current_time())
        return frozenset() if known is None else known.roles

    # ------------------------------------------------------------ what the services ask and tell
    def _node_info(self) -> pb.NodeInfo:
        return pb.NodeInfo(
            roles=[_ROLES[role] for role in self.config.roles],
            features=self._features,
            max_streams=self._max_streams(),
            announcement=self._announcement(),
            software=SOFTWARE,
            now_ms=now_ms(),
        )

    def _on_greeted(self, greeted: Greeted) -> None:
        node = greeted.node
        self._metrics.message_received("hello")
        if greeted.rtt_s is not None:
            self._observer.rtt_s[greeted.peer] = greeted.rtt_s
        roles = frozenset(_ROLE_NAMES[role] for role in node.roles if role in _ROLE_NAMES)
        is_news = greeted.peer not in self._validators and self.membership.member_roles(greeted.peer) is None
        if "validator" in roles and is_news:
            self._observer.validator_seen(greeted.peer)
        self.membership.standing.accept(greeted.peer)
        self.greeter.greeted(greeted.peer)
        self._software[greeted.peer] = node.software
        if len(self._software) > MAX_SOFTWARE_KNOWN:
            self._software.popitem(last=False)
        self.book.on_hello(
            greeted.peer,
            is_member=greeted.is_member,
            roles=roles,
            features=frozenset(node.features),
            max_streams=node.max_streams,
            now=trio.current_time(),
        )
        if node.announcement:  # after on_hello: a member's counts whatever key its tag was made with
            self.intake.take(
                node.announcement, found_by="hello", source=greeted.peer, direct=True, expected_signer=greeted.peer
            )
        self.book.note_path(greeted.peer, is_relayed=greeted.addr.is_relayed)
        if greeted.rtt_s is not None and any(v.peer == greeted.peer for v in self.bootstrap.validators):
            # Theirs was read about half a round trip ago.
            self._on_clock(greeted.peer, now_ms() - node.now_ms - round(greeted.rtt_s * 500))

    def _catalogue_page(self, model: str, since: int) -> CataloguePage:
        now = trio.current_time()
        if self.config.is_validator:
            return self.book.entries_since(since, now=now, model=model or None)
        return self.book.entries_since(since, now=now, model=model or None, limit=MAX_PAGE_ENTRIES)

    async def _after_join(self, peer: PeerId) -> None:
        self.discovery.changed()

    def _dialable(self, peer: PeerId) -> tuple[Multiaddr, ...]:
        known = self.book.known(peer, trio.current_time())
        if known is None:
            return ()
        return dialable(known.addrs, own_networks=own_networks(), direct=known.is_direct)

    def connected(self, peer: PeerId, addr: Multiaddr) -> None:
        """A connection appeared (ConnectionObserver)."""
        self._observer.connected(peer, addr)
        self.book.note_path(peer, is_relayed=addr.is_relayed)
        if self.membership.ban_of(peer) is not None:
            self.greeter.look_now()

    def disconnected(self, peer: PeerId) -> None:
        """A peer's last connection ended (ConnectionObserver)."""
        cause = self._observer.disconnected(peer)
        self.greeter.forget(peer)
        self._software.pop(peer, None)
        self.book.on_disconnected(peer)
        if cause not in OWN_CAUSES:
            self.book.mark_failed(peer, trio.current_time())
        self._on_peer_gone(peer)

    def polled(self, peers: int) -> None:
        """The connections were looked at (ConnectionObserver)."""
        self._metrics.set_peers(peers, self.members())


def _dialable_here(addrs: Sequence[Multiaddr]) -> tuple[Multiaddr, ...]:
    return dialable(addrs, own_networks=own_networks(), direct=False)


def _dialable_once_connected(addrs: Sequence[Multiaddr]) -> tuple[Multiaddr, ...]:
    return dialable(addrs, own_networks=own_networks(), direct=True)

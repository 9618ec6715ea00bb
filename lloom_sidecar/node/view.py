"""What the operator's side sees of a node: snapshots in the admin API's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

import trio

from lloom_sidecar import __version__
from lloom_sidecar.admin.events import EventBus
from lloom_sidecar.admin.view import (
    Check,
    ConditionInfo,
    ExecutorInfo,
    ModelInfo,
    NetworkStatusInfo,
    OfferInfo,
    PathKind,
    PeerInfo,
    ReceiptInfo,
    SettingInfo,
    Status,
    TokenCounts,
)
from lloom_sidecar.config import HostPort
from lloom_sidecar.http.listeners import Listener
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.network.status import Heard
from lloom_sidecar.p2p.launch import FEATURE_STDIN_EOF
from lloom_sidecar.peers.executors import ExecutorView, LeaseState
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .books import NodeBooks
from .daemon import find_p2pd
from .operations import NodeOperations, price_info

if TYPE_CHECKING:
    from .node import Node

CONNECT_TIMEOUT_S: Final = 10.0
_SHOWN_FEATURES: Final = {
    "mdns": "mdns",
    "holePunch": "hole_punching",
    "staticRelays": "auto_relay",
    "psk": "psk",
    "streamsPerProtocolPeer": "raised_limits",
    FEATURE_STDIN_EOF: "exit_with_parent",
}
"""Flag of the binary -> what an operator calls it."""


_USAGE_SOURCES: Final = {pb.USAGE_SOURCE_BACKEND: "backend", pb.USAGE_SOURCE_CHUNKS: "chunks"}


def _url(wanted: HostPort | None, listeners: Sequence[Listener], scheme: str = "http") -> str | None:
    """Where they listen; "every address" cannot be dialled, but what listens there answers on loopback too."""
    if wanted is None or not listeners:
        return None
    host = "127.0.0.1" if wanted.host in ("0.0.0.0", "::") else wanted.host
    return f"{scheme}://{HostPort(host, listeners[0].port)}"


class View:
    """Implements ``admin.view.NodeView``. Snapshots only; the two actions go to the node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.operations = NodeOperations(node)
        self.books = NodeBooks(node.books.ledger)

    @property
    def events(self) -> EventBus:
        """The node's events."""
        return self._node.events

    # ------------------------------------------------------------ probes
    def startup_checks(self) -> list[Check]:
        """Has the node finished starting."""
        started = self._node.has_started
        return [Check(name="started", ok=started, text="" if started else "the node is still starting")]

    def readiness_checks(self) -> list[Check]:
        """Can the node be sent work."""
        node = self._node
        checks = self.startup_checks()
        is_up = node.supervisor.daemon is not None
        checks.append(Check(name="p2pd", ok=is_up, text="" if is_up else "p2pd does not answer"))
        if node.config.is_client:
            listens = bool(node.api_listeners)
            checks.append(Check(name="api", ok=listens, text="" if listens else "the API does not listen yet"))
        checks.append(
            Check(name="accepting", ok=not node.is_draining, text="the node is draining" if node.is_draining else "")
        )
        return checks

    def render_metrics(self) -> bytes:
        """Prometheus text."""
        return self._node.metrics.render()

    # ------------------------------------------------------------ snapshots
    def status(self) -> Status:
        """The node at a glance."""
        node = self._node
        config = node.config
        now = trio.current_time()
        supervisor = node.supervisor
        keys = node.control.membership.key_file
        features = sorted(name for flag, name in _SHOWN_FEATURES.items() if flag in supervisor.features)
        until = None
        if keys is not None and keys.previous is not None and len(node.control.membership.keys()) > 1:
            until = datetime.fromtimestamp(keys.previous_until_ms / 1000, UTC).isoformat()
        client, executor = node.observer.client, node.observer.executor
        return Status(
            peer=str(node.me),
            version=__version__,
            roles=list(config.roles),
            uptime_s=now - node.started_at,
            draining=node.is_draining,
            home=str(config.home),
            p2pd={
                "mode": "attached" if config.is_attached else "managed",
                "path": str(config.p2pd_control or find_p2pd(config.p2pd)),
                "version": supervisor.version,
                "pid": supervisor.pid,
                "up": supervisor.daemon is not None,
                "restarts": supervisor.restarts_total,
                "features": features,
            },
            network={
                "id": None if keys is None else keys.current.network_id.hex(),
                "open": config.open,
                "previous_key_until": until,
            },
            api={
                "address": _url(config.api, node.api_listeners, "http" if node.api_certificate is None else "https"),
                "ready": bool(node.api_listeners) and not node.is_draining,
            },
            addrs=[str(addr.with_peer(node.me)) for addr in (node.identity.addrs if node.identity else ())],
            connections=len(node.control.connections),
            members=sum(node.control.book.is_member(peer, now) for peer in node.control.connections),
            executors=len(node.control.book),
            models=len(node.control.book.models(now)),
            validators=[
                {"peer": str(v.peer), "connected": v.peer in node.control.connections}
                for v in node.control.bootstrap.validators
            ],
            network_status=[network_status_info(heard, now) for heard in node.control.statuses.latest()],
            requests={
                "in_flight": client.in_flight + executor.in_flight,
                "served": client.served + executor.served,
                "failed": client.failed + executor.failed,
                "cancelled": client.cancelled + executor.cancelled,
                "queued": 0 if node.serving is None else node.serving.executor.admission.queued,
            },
            tokens=self.tokens(),
            page=_url(config.page, node.page_listeners),
            conditions=self.conditions(),
        )

    def tokens(self) -> TokenCounts:
        """Completion tokens since the node started."""
        serving = self._node.serving
        return TokenCounts(
            received=self._node.observer.tokens_received,
            generated=0 if serving is None else serving.executor.meter.tokens_total,
        )

    def peers(self) -> list[PeerInfo]:
        """Every peer that the node knows, connected ones first."""
        node = self._node
        now = trio.current_time()
        known = {view.peer for view in node.control.book.snapshot(now)}
        found = [self._peer(peer) for peer in known | set(node.control.connections)]
        return sorted(found, key=lambda one: (not one["connected"], one["peer"]))

    def _peer(self, peer: PeerId) -> PeerInfo:
        node = self._node
        now = trio.current_time()
        known = node.control.book.known(peer, now)
        addr = node.control.connections.addr_of(peer)
        addrs = [str(addr)] if addr is not None else []
        is_validator = any(v.peer == peer for v in node.control.bootstrap.validators)
        source = node.control.intake.found_by.get(peer) or (
            "bootstrap" if is_validator else "hello" if known else "inbound"
        )
        rtt_s = node.observer.rtt_s.get(peer)
        return PeerInfo(
            peer=str(peer),
            roles=sorted(known.roles) if known is not None else [],
            addrs=[*addrs, *(str(a) for a in (known.addrs if known is not None else ()) if a != addr)],
            connected=addr is not None,
            path=self._path(peer),
            member=node.control.membership.counts_as_member(peer),
            state="none" if known is None or known.state is None else _lease(known.state),
            lease_left_s=known.lease_left_s if known is not None and known.state is not None else None,
            software=(known.software if known is not None else "") or node.control.software_of(peer),
            rtt_ms=None if rtt_s is None else round(rtt_s * 1000, 3),
            source=source,
        )

    def _path(self, peer: PeerId) -> PathKind:
        addr = self._node.control.connections.addr_of(peer)
        if addr is None:
            return "none"
        return "relayed" if addr.is_relayed else "direct"

    def models(self) -> list[ModelInfo]:
        """Every model that an executor offers to this node."""
        node = self._node
        now = trio.current_time()
        found = []
        for summary in node.control.book.models(now):
            views = node.control.book.executors_of(summary.id, now)
            found.append(
                ModelInfo(
                    id=summary.id,
                    family=next((offer.family for offer in summary.offers if offer.family), ""),
                    executors=[self._offer(view, now) for view in views],
                )
            )
        return found

    def _offer(self, view: ExecutorView, now: float) -> OfferInfo:
        offer, load = view.offer, view.load
        judged = self._node.health_book.judge(view.peer, offer.id, now)
        ttft_s = judged.estimate_s if judged.turn else load.ttft_s
        return OfferInfo(
            peer=str(view.peer),
            state=_lease(view.state(now)),
            context_length=offer.context_length,
            slots=offer.slots,
            in_flight=load.in_flight,
            queued=load.queued,
            price=price_info(offer.price),
            features=sorted(offer.features),
            digest=offer.digest.hex(),
            ttft_ms=round(ttft_s * 1000, 1) if ttft_s else None,
            tokens_per_s=round(load.tokens_per_s, 1) or None,
        )

    def executors(self) -> list[ExecutorInfo]:
        """Every executor that the node knows."""
        node = self._node
        now = trio.current_time()
        found: dict[PeerId, ExecutorInfo] = {}
        for summary in node.control.book.models(now):
            for view in node.control.book.executors_of(summary.id, now):
                peer = view.peer
                known = node.control.book.known(peer, now)
                if peer not in found and known is not None:
                    found[peer] = ExecutorInfo(
                        peer=str(peer),
                        state=_lease(view.state(now)),
                        lease_left_s=known.lease_left_s,
                        connected=peer in node.control.connections,
                        path=self._path(peer),
                        member=view.is_member,
                        software=view.software,
                        circuit=node.health_book.circuit(peer, summary.id, now).value,
                        in_flight=view.load.in_flight,
                        queued=view.load.queued,
                        models=[],
                        trust=round(node.health_book.trust.trust(peer, now), 3),
                        doubts=[
                            f"{doubt.reason}, {doubt.weight:.2f}, last said {doubt.said_s:.0f} s ago"
                            for doubt in node.health_book.trust.doubts_of(peer, now)
                        ],
                    )
                if peer in found:
                    found[peer]["models"].append(summary.id)
        return sorted(found.values(), key=lambda one: one["peer"])

    def config_effective(self) -> list[SettingInfo]:
        """Every setting with its value and source."""
        rows: list[Any] = self._node.config.effective()
        return rows

    def conditions(self) -> list[ConditionInfo]:
        """The health conditions, the worst first."""
        rows: list[Any] = self._node.health.as_dicts()
        return rows

    def receipt(self, request_id: str) -> ReceiptInfo | None:
        """The verified receipt of a recent request."""
        kept = self._node.observer.receipts.get(request_id)
        if kept is None:
            return None
        claims = kept.receipt.claims
        return ReceiptInfo(
            request_id=request_id,
            claims={
                "client": str(PeerId(claims.client)),
                "executor": str(PeerId(claims.executor)),
                "model": claims.model,
                "prompt_tokens": claims.usage.prompt_tokens,
                "completion_tokens": claims.usage.completion_tokens,
                "usage_source": _USAGE_SOURCES.get(claims.usage_source, "unknown"),
                "cost": claims.cost,
                "currency": claims.price.currency,
                "answer_bytes": claims.answer_bytes,
                "answer_digest": claims.answer_digest.hex(),
                "request_digest": claims.request_digest.hex(),
                "accepted_at_ms": claims.accepted_at_ms,
                "ended_at_ms": claims.ended_at_ms,
            },
            envelope=kept.receipt.envelope.hex(),
            request=kept.receipt.request.hex(),
            ack=kept.receipt.ack.hex(),
        )

    # ------------------------------------------------------------ actions
    async def connect(self, addr: str) -> PeerInfo:
        """Connect to the peer at a multiaddr with /p2p and say hello. Raises LloomError, ValueError."""
        parsed = Multiaddr.parse(addr)
        peer = parsed.peer_id
        if peer is None:
            raise ValueError(f"{addr} does not name its node: add /p2p/<peer id> at its end")
        node = self._node
        await node.daemon().connect(peer, [parsed.without_peer()], timeout_s=CONNECT_TIMEOUT_S)
        await node.control.connections.look()
        await node.control.hello.greet(peer)
        return self._peer(peer)

    async def drain(self) -> None:
        """Begin to drain."""
        await self._node.drain()


def network_status_info(heard: Heard, now: float) -> NetworkStatusInfo:
    """A validator's status as the admin API shows it; ``now`` in monotonic seconds."""
    status = heard.status
    return NetworkStatusInfo(
        peer=str(heard.peer),
        age_s=round(now - heard.heard_at, 1),
        current=heard.is_current(now),
        executors=status.executors,
        members=status.members,
        models_total=status.models_total,
        models=[
            {
                "id": model.id,
                "executors": model.executors,
                "slots": model.slots,
                "median_price": price_info(model.median_price),
            }
            for model in status.models
        ],
        software=[{"software": name, "nodes": nodes} for name, nodes in status.software],
        in_flight=status.in_flight,
        queued=status.queued,
        slots=status.slots,
    )


def _lease(state: LeaseState) -> Literal["fresh", "suspect", "dead"]:
    if state is LeaseState.FRESH:
        return "fresh"
    return "suspect" if state is LeaseState.SUSPECT else "dead"

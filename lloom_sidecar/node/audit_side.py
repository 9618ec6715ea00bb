"""What a validator's audit needs of its node: whom to ask, how to ask as a client does, and how to publish."""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from lloom_sidecar.client.api import DEFAULT_DEADLINE_S
from lloom_sidecar.client.route import Route
from lloom_sidecar.client.router import Router
from lloom_sidecar.errors import PeerTimeoutError, ReceiptError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Exchange
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import Policy, Wanted
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.evidence import Evidence, seal_evidence
from lloom_sidecar.protocol.names import TOPIC_NETWORK
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.validator.audit import Answered, Auditor, Group
from lloom_sidecar.validator.canary import Canary

from .receipts import now_ms

ANSWER_TIMEOUT_S: Final = 120.0
"""For one canary. The request itself says what every client's says."""
MAX_ANSWER_BYTES: Final = 1 << 20
EVIDENCE_TTL_S: Final = 900.0
FREE: Final = Price()


class AuditSide:
    """The auditor of one validator, as its node's client."""

    def __init__(
        self,
        *,
        signer: Signer,
        router: Router,
        book: PeerBook,
        key: Callable[[], NetworkKey | None],
        get_daemon: Callable[[], Daemon],
        next_sequence: Callable[[int], Awaitable[int]],
        on_published: Callable[[bytes], None],
        on_finding: Callable[[Evidence], None],
        max_price: Price | None,
        interval_s: float,
        rng: random.Random,
    ) -> None:
        """``max_price``: of executors that are audited; None = only those that charge nothing."""
        self._signer = signer
        self._router = router
        self._book = book
        self._key = key
        self._get_daemon = get_daemon
        self._next_sequence = next_sequence
        self._on_published = on_published
        self._max_price = max_price or FREE
        self.auditor = Auditor(
            groups=self.groups,
            ask=self.ask,
            publish=self.publish,
            on_finding=on_finding,
            interval_s=interval_s,
            rng=rng,
        )

    def groups(self) -> list[Group]:
        """Members that offer the same model with the same digest, for a price that the audit pays."""
        now = trio.current_time()
        found: dict[tuple[str, bytes], list[PeerId]] = defaultdict(list)
        for summary in self._book.models(now):
            for view in self._book.executors_of(summary.id, now):
                features = view.offer.features
                if view.is_member and view.peer != self._signer.peer and (not features or "chat" in features):
                    found[(summary.id, view.offer.digest)].append(view.peer)
        return [Group(model, digest, tuple(sorted(peers))) for (model, digest), peers in sorted(found.items())]

    async def ask(self, peer: PeerId, canary: Canary) -> Answered:
        """Send a canary to one executor the way a client's request goes. Raises LloomError."""
        request_id = os.urandom(16)
        call = Call(
            request_id=request_id,
            operation=pb.OPERATION_CHAT,
            model=canary.model,
            body=canary.body,
            deadline_ms=round(DEFAULT_DEADLINE_S * 1000),
            idempotency_key=request_id,
        )
        wanted = Wanted(model=canary.model, pinned=frozenset({peer}), max_price=self._max_price, members_only=True)
        route = Route(trio.current_time())
        data = b""

        async def use(route: Route, exchange: Exchange) -> None:
            nonlocal data
            data = b""
            while (piece := await exchange.receive()) is not None:
                data += piece
                if len(data) > MAX_ANSWER_BYTES:
                    raise ReceiptError("an answer that is far longer than was asked for", code="answer_too_large")
            route.commit(exchange)

        with trio.move_on_after(ANSWER_TIMEOUT_S) as waiting:
            await self._router.run(call, wanted, Policy.ADAPTIVE, use, route)
        if waiting.cancelled_caught or route.winner is None or route.winner.receipt is None:
            raise PeerTimeoutError(f"{peer.short()} did not answer a canary within {ANSWER_TIMEOUT_S:.0f} s")
        return Answered(data, route.winner.receipt.envelope)

    async def publish(self, evidence: Evidence) -> None:
        """Sign and publish it, as of now. Raises LloomError."""
        sealed = seal_evidence(
            signer=self._signer,
            key=self._key(),
            sequence=await self._next_sequence(now_ms()),
            issued_at_ms=now_ms(),
            ttl_s=EVIDENCE_TTL_S,
            evidence=evidence,
        )
        self._on_published(sealed)
        await self._get_daemon().publish(TOPIC_NETWORK, sealed)

"""A router over a real peer book and a real health book, on exchanges that play scripts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import trio

from lloom_sidecar.client.route import Route
from lloom_sidecar.client.router import Router
from lloom_sidecar.client.settled import Settled
from lloom_sidecar.errors import LloomError, PeerBusyError, RefusedError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Exchange, Receipt, Sent
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.peers.health import MIN_FOR_P95, HealthBook, HealthLimits, Outcome
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import Policy, Wanted
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.offers import Announcement, Kind, Load, ModelOffer, Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

SIGNER = Signer(b"c" * 32)
CALL = Call(request_id=b"r" * 16, operation=pb.OPERATION_CHAT, model="m", body=b"{}", deadline_ms=1000)


def peer(number: int) -> PeerId:
    return PeerId.from_ed25519(number.to_bytes(32, "big"))


class FakeExchange:
    """Gives pieces; a None in between is a verified end, an exception is raised."""

    def __init__(self, sent: Sent, script: list[Any]) -> None:
        self.peer = sent.peer
        self.head = None
        self.sent = sent
        self.first_at = trio.current_time()
        self._script = script

    async def receive(self) -> bytes | None:
        await trio.lowlevel.checkpoint()
        while self._script:
            line = self._script.pop(0)
            if isinstance(line, float):
                await trio.sleep(line)
            elif isinstance(line, Exception):
                raise line
            else:
                return cast("bytes", line)
        self.sent.receipt = receipt_of(self.sent)
        return None


def receipt_of(sent: Sent) -> Receipt:
    return Receipt(pb.ReceiptClaims(), sent.exchange, b"end", sent.request, sent.salt, b"ack")


@dataclass
class Bench:
    """A router over a real peer book and a real health book."""

    ensure_errors: dict[PeerId, LloomError] = field(default_factory=dict)
    scripts: dict[PeerId, list[Any]] = field(default_factory=dict)
    """Per peer: what its exchanges do, one entry each: an exception (refused), or a list for FakeExchange, whose first
    float is the time to the first byte."""
    is_complete: bool = True
    budget_s: float = 2.0
    asked: list[PeerId] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)
    failed: list[tuple[PeerId, str, str]] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    on_look_up: Callable[[], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self.book = PeerBook(me=SIGNER.peer, is_open=True, allow_list=frozenset())
        limits = HealthLimits(budget_initial_s=self.budget_s)
        self.health = HealthBook(limits)
        self.router = self.make_router(self._exchange)

    def make_router(self, exchange_with: Any) -> Router:
        return Router(
            pool=cast("StreamPool", None),
            signer=SIGNER,
            book=self.book,
            health=self.health,
            look_up=self._look_up,
            ensure_connected=self._ensure,
            catalogue_is_complete=lambda: self.is_complete,
            observer=self,
            rng=random.Random(1),
            exchange_with=exchange_with,
        )

    def add(
        self, number: int, *exchanges: Any, price: Price | None = None, ttl_s: float = 900.0, context: int = 0
    ) -> PeerId:
        digest = hashlib.sha256(number.to_bytes(4, "big")).digest()
        offer = ModelOffer("m", price=price or Price(), context_length=context, slots=4)
        who = peer(number)
        self.book.apply(
            Announcement(who, 1, 0, ttl_s, Kind.INITIAL, b"", True, (), (offer,), Load(), "", b"", digest, digest),
            now=trio.current_time(),
            direct=True,
            source=None,
        )
        self.scripts[who] = list(exchanges)
        return who

    def attempt_failed(self, peer: PeerId, model: str, error: LloomError, stage: str) -> None:
        self.failed.append((peer, error.code, stage))

    def exchange_settled(self, settled: Settled) -> None:
        self.settled.append(settled)

    @property
    def answered(self) -> list[PeerId]:
        """Whose answers are owed. Whatever was sent must be settled once."""
        assert sorted(one.request for one in self.settled) == sorted(one.request for one in self.sent)
        return [one.peer for one in self.settled if one.is_owed]

    def reasons(self) -> list[tuple[PeerId, str]]:
        """(peer, reason) of what was settled."""
        return [(one.peer, one.reason) for one in self.settled]

    def measured(self, ttft_s: float, *peers: PeerId) -> None:
        """So many first tokens of each that the model has a p95."""
        now = trio.current_time()
        for who in peers:
            for _ in range(MIN_FOR_P95):
                self.health.end(self.health.begin(who, "m", now - ttft_s), Outcome.OK, now)

    async def _look_up(self, model: str) -> None:
        self.looked_up.append(model)
        if self.on_look_up is not None:
            await self.on_look_up()

    async def _ensure(self, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        if peer in self.ensure_errors:
            self.asked.append(peer)
            raise self.ensure_errors[peer]

    @asynccontextmanager
    async def _exchange(
        self, pool: StreamPool, signer: Signer, peer: PeerId, call: Call, on_sent: Callable[[Sent], None]
    ) -> AsyncIterator[Exchange]:
        self.asked.append(peer)
        self.calls.append(call)
        sent = Sent(peer, 1, b"request %d" % len(self.sent), b"s" * 16)
        self.sent.append(sent)
        on_sent(sent)
        script = self.scripts[peer]
        step = script.pop(0) if script else [b"hi"]
        if isinstance(step, Exception):
            raise step
        step = list(step)
        if step and isinstance(step[0], float):
            await trio.sleep(float(step.pop(0)))
        yield cast("Exchange", FakeExchange(sent, step))

    async def run(
        self,
        use: Any = None,
        *,
        commits: bool = False,
        policy: Policy = Policy.ROUND_ROBIN,
        call: Call = CALL,
        **wanted: Any,
    ) -> Route:
        """``commits``: as for a streamed answer, with its first bytes; else with its verified end."""
        route = Route(trio.current_time())

        async def read(route: Route, exchange: Exchange) -> None:
            while await exchange.receive() is not None:
                if commits:
                    route.commit(exchange)
            route.commit(exchange)

        self.route = route
        await self.router.run(call, Wanted("m", **wanted), policy, use or read, route)
        return route


BUSY = PeerBusyError("full")


def refused(status: int, code: str = "x", **kwargs: Any) -> RefusedError:
    kwargs.setdefault("retryable", True)
    return RefusedError("no", code=code, http_status=status, **kwargs)

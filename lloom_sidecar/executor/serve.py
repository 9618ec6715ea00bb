"""The executor's side of ``/lloom/request/1.0.0``: what its streams share. Each stream is a ``Session``; one bad
stream ends itself only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
import trio

from lloom_sidecar.errors import (
    LloomError,
    PeerBusyError,
)
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.offers import ModelOffer, Price

from .admission import Admission, Ticket
from .backend import Backend
from .body import BodyPolicy
from .observer import ExecutorObserver, ServedReceipt
from .quotes import QuoteBook
from .session import Session
from .unacked import UnackedBook

log = structlog.get_logger("lloom.executor")


@dataclass(frozen=True, slots=True)
class ExecutorLimits:
    """Bounds of one executor node."""

    max_body_bytes: int = 32 * 1024 * 1024
    buffered_bodies_bytes: int = 256 * 1024 * 1024
    """Bodies of all requests together that are read and not yet handed to the backend."""
    requests_per_s: float = 2000.0
    """Of all peers; beyond it requests are refused before their signature is checked."""


class Executor:
    """Serves the streams of one node's executor role."""

    def __init__(
        self,
        *,
        signer: Signer,
        backend: Backend,
        admission: Admission,
        policy: BodyPolicy,
        limits: ExecutorLimits,
        max_streams: Callable[[], int],
        price: Price,
        may_ask: Callable[[PeerId], bool],
        observer: ExecutorObserver,
        now_ms: Callable[[], int],
        compresses_for: Callable[[PeerId], bool] = lambda peer: False,
        compresses_streams: bool = False,
        ledger_trouble: Callable[[], str | None] = lambda: None,
        max_unacked: int = 0,
    ) -> None:
        """``max_streams``: said in ACCEPT, what this node's p2pd can hold of one peer. ``may_ask``: whether a peer is
        of our network (or this node is open); asked at OPEN and at every request. ``price``: of every model that
        ``set_price`` was not told of. ``compresses_for``: whether answers to a peer are compressed, documents always,
        streams only when ``compresses_streams``. ``ledger_trouble``: why a receipt could not be kept now, None when it
        could. ``max_unacked``: missing ACKs from which on a client gets no priced answer, 0 = any number.
        """
        self.signer = signer
        self.backend = backend
        self.admission = admission
        self.policy = policy
        self.limits = limits
        self.max_streams = max_streams
        self.price = price
        self.may_ask = may_ask
        self.observer = observer
        self.now_ms = now_ms
        self.compresses_for = compresses_for
        self._compresses_streams = compresses_streams
        self.ledger_trouble = ledger_trouble
        self.unacked = UnackedBook(max_unacked)
        self.buffered_bytes = 0
        self.is_draining = False
        self.quotes = QuoteBook()
        self._prices: dict[str, Price] = {}
        self._sessions: set[Session] = set()
        self._places: dict[Ticket, trio.Event] = {}
        self._allowance = limits.requests_per_s
        self._allowance_at = time.monotonic()

    async def serve_stream(self, stream: P2PStream) -> None:
        """Serve one inbound stream until it ends. Cancelled = the stream is closed, its work at the backend stopped."""
        session = Session(self, stream)
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            stream.close()

    def compresses_stream_for(self, peer: PeerId) -> bool:
        """Whether a streamed answer to ``peer`` is compressed."""
        return self._compresses_streams and self.compresses_for(peer)

    def drain(self) -> None:
        """Take no further exchange: idle streams are told GOAWAY and end, working ones after their exchange."""
        self.is_draining = True
        for session in list(self._sessions):
            session.go_away("this executor is shutting down")

    def offer(self, model: str) -> ModelOffer | None:
        """What is announced of one model, None when it is not served (now)."""
        found = self.backend.offer(model)
        return None if found is None else replace(found, price=self.price_of(model))

    def offers(self) -> tuple[ModelOffer, ...]:
        """Everything to announce; empty while the backend is down or this executor drains."""
        if self.is_draining or not self.backend.is_up:
            return ()
        return tuple(replace(offer, price=self.price_of(offer.id)) for offer in self.backend.state.offers)

    def price_of(self, model: str) -> Price:
        """What ``model`` costs here now: ``price``, unless the model has one of its own."""
        return self._prices.get(model, self.price)

    def set_price(self, model: str, price: Price) -> None:
        """Ask ``price`` for ``model`` from now on. Requests under way and quotes keep theirs. Raises LookupError for a
        model that the backend does not serve."""
        if self.backend.offer(model) is None:
            raise LookupError(model)
        self._prices[model] = price

    @property
    def working(self) -> int:
        """Exchanges under way, waiting ones included."""
        return self.admission.working + self.admission.queued

    def enter(self, peer: PeerId, priority: int) -> Ticket:
        """A place in the admission; ``wait_place`` waits for its turn. Raises PeerBusyError."""
        ticket = self.admission.enter(peer, priority=priority)
        if not ticket.is_admitted:
            self._places[ticket] = trio.Event()
        return ticket

    async def wait_place(self, ticket: Ticket) -> None:
        """Return when the ticket may work."""
        if not ticket.is_admitted:
            await self._places[ticket].wait()

    def leave(self, ticket: Ticket, held_s: float | None = None) -> None:
        """Give the place back and wake who is next. Idempotent."""
        self._places.pop(ticket, None)
        following = self.admission.leave(ticket, held_s=held_s)
        if following is not None:
            self._wake(following)

    def resize(self, slots: int) -> None:
        """The backend's parallelism changed."""
        for ticket in self.admission.resize(slots):
            self._wake(ticket)

    def take_allowance(self) -> None:
        """Global token bucket. Raises PeerBusyError when the node gets more requests than it may even look at."""
        now = time.monotonic()
        rate = self.limits.requests_per_s
        self._allowance = min(rate, self._allowance + (now - self._allowance_at) * rate)
        self._allowance_at = now
        if self._allowance < 1:
            raise PeerBusyError("this executor gets too many requests", code="rate_limit", retry_after_s=1.0)
        self._allowance -= 1

    def count_refused(self, peer: PeerId, error: LloomError) -> None:
        """A stream or a request of ``peer`` was refused, or failed."""
        self.observer.refused(error.code)
        log.info("refused", peer=str(peer), code=error.code)

    def _wake(self, ticket: Ticket) -> None:
        event = self._places.pop(ticket, None)
        if event is not None:
            event.set()


__all__ = ["Executor", "ExecutorLimits", "ExecutorObserver", "ServedReceipt"]

"""The executor's side of ``/lloom/request/1.0.0``: what its streams share. Each stream is a ``Session``; one bad
stream ends itself only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import structlog
import trio

from lloom_sidecar.errors import LloomError, PeerBusyError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.peers.addresses import groups_of
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.offers import Load, ModelOffer, Price
from lloom_sidecar.tracing import Tracing

from .admission import Admission, Place, Ticket
from .backend import Backend
from .body import BodyPolicy
from .load import LoadMeter
from .observer import ExecutorObserver, ServedReceipt
from .quotes import QuoteBook
from .rates import RequestRates
from .session import Session
from .unacked import UnackedBook

log = structlog.get_logger("lloom.executor")


@dataclass(frozen=True, slots=True)
class ExecutorLimits:
    """Bounds of one executor node."""

    max_body_bytes: int = 32 * 1024 * 1024
    buffered_bodies_bytes: int = 256 * 1024 * 1024
    """Bodies of all exchanges together, counted as they come in and until the exchange ends: the backend's connection
    may need them that long."""


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
        rates: RequestRates,
        max_streams: Callable[[], int],
        price: Price,
        may_ask: Callable[[PeerId], bool],
        is_member: Callable[[PeerId], bool],
        observer: ExecutorObserver,
        now_ms: Callable[[], int],
        compresses_for: Callable[[PeerId], bool] = lambda peer: False,
        compresses_streams: bool = False,
        ledger_trouble: Callable[[], str | None] = lambda: None,
        max_unacked: int = 0,
        tracing: Tracing | None = None,
    ) -> None:
        """``max_streams``: said in ACCEPT, what this node's p2pd can hold of one peer. ``may_ask``: whether a peer is
        of our network (or this node is open); asked at OPEN and at every request. ``is_member``: whether it counts as
        a member for ``rates``, or as a stranger. ``price``: of every model that ``set_price`` was not told of.
        ``compresses_for``: whether answers to a peer are compressed, documents always, streams only when
        ``compresses_streams``. ``ledger_trouble``: why a receipt could not be kept now, None when it could.
        ``max_unacked``: missing ACKs from which on a client gets no priced answer, 0 = any number.
        """
        self.signer = signer
        self.backend = backend
        self.admission = admission
        self.policy = policy
        self.limits = limits
        self.rates = rates
        self.max_streams = max_streams
        self.price = price
        self.may_ask = may_ask
        self.is_member = is_member
        self.observer = observer
        self.now_ms = now_ms
        self.compresses_for = compresses_for
        self._compresses_streams = compresses_streams
        self.ledger_trouble = ledger_trouble
        self.unacked = UnackedBook(max_unacked)
        self.tracing = tracing or Tracing()
        self.buffered_bytes = 0
        self.is_draining = False
        self.quotes = QuoteBook()
        self._prices: dict[str, Price] = {}
        self.meter = LoadMeter()
        self._sessions: set[Session] = set()
        self._turns: dict[Ticket, trio.Event] = {}

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
            session.go_away("this executor takes no more work")

    def resume(self) -> None:
        """Take exchanges again, on new streams; those that were told GOAWAY end all the same."""
        self.is_draining = False

    def cut(self) -> None:
        """End the streams that were told GOAWAY, and with them what is still under way."""
        for session in list(self._sessions):
            session.cut()

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

    @property
    def load(self) -> Load:
        """What is announced of how busy and how fast this executor is."""
        admission, meter = self.admission, self.meter
        return Load(admission.working, admission.queued, meter.tokens_per_s, meter.ttft_s)

    def check_rate(self, stream: P2PStream) -> None:
        """Count a request against the token buckets. Raises PeerBusyError when there are too many."""
        groups = None
        if not self.is_member(stream.peer):
            groups = groups_of([stream.addr]) if self.rates.limits_strangers else ()
        self.rates.take(stream.peer, groups, trio.current_time())

    def enter(self, peer: PeerId, priority: int, deadline_at: float) -> Ticket:
        """A place for a request, which the caller owes back with ``leave``. Raises PeerBusyError."""
        ticket, pushed_out = self.admission.enter(peer, trio.current_time(), priority=priority, deadline_at=deadline_at)
        if pushed_out is not None:
            self._wake([pushed_out])
        return ticket

    async def take_slot(self, ticket: Ticket) -> None:
        """The request is ready: return when it has its slot. Cancelled: it holds its place until ``leave``.

        Raises PeerBusyError when it lost its place to a peer that holds fewer.
        """
        self._wake(self.admission.ready(ticket, trio.current_time()))
        if ticket.place is Place.WAITING:
            turn = self._turns[ticket] = trio.Event()
            try:
                await turn.wait()
            finally:
                self._turns.pop(ticket, None)
        if ticket.place is not Place.WORKING:
            raise PeerBusyError(
                "the queue is full, and others have fewer requests in it than this peer",
                code="busy",
                retry_after_s=self.admission.retry_after_s,
            )
        self.observer.slot_given(ticket.began_at - ticket.ready_at)

    def leave(self, ticket: Ticket) -> None:
        """Give the place or slot back and wake who is next. Idempotent."""
        self._wake(self.admission.leave(ticket, trio.current_time()))

    def resize(self, slots: int) -> None:
        """The backend's parallelism changed."""
        self._wake(self.admission.resize(slots, trio.current_time()))

    def count_refused(self, peer: PeerId, error: LloomError) -> None:
        """A stream or a request of ``peer`` was refused, or failed."""
        self.observer.refused(error.code)
        log.info("refused", peer=str(peer), code=error.code)

    def _wake(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            turn = self._turns.get(ticket)
            if turn is not None:
                turn.set()


__all__ = ["Executor", "ExecutorLimits", "ExecutorObserver", "ServedReceipt"]

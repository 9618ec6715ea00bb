"""One executor asked with one request: its time, its failure, and the settlement of whatever was sent."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Final, Protocol

import trio

from lloom_sidecar.errors import (
    PASS_THROUGH_STATUSES,
    DaemonUnavailableError,
    LloomError,
    PeerBusyError,
    PeerTimeoutError,
    RefusedError,
    RequestError,
)
from lloom_sidecar.http.errors import HttpServerError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Exchange, Sent, open_exchange
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.peers.executors import ExecutorView
from lloom_sidecar.peers.health import HealthBook, Outcome
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import is_over
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.offers import Price

from .market import HeldQuote
from .openai import Attempt
from .route import OutrunError, Route
from .settled import Settled, reason_of, settle

Use = Callable[[Route, Exchange], Awaitable[None]]
"""Takes an answer to the application: calls ``Route.commit`` right before the first byte of it."""
ExchangeWith = Callable[
    [StreamPool, Signer, PeerId, Call, Callable[[Sent], None]], AbstractAsyncContextManager[Exchange]
]


_OF_THIS_REQUEST: Final = frozenset({"price_changed", "deadline_too_short"})
"""Refusals that hold for the request that met them: others may go to that executor at once."""


class RouterObserver(Protocol):
    """What the node wants to know of requests; every method is quick and raises nothing."""

    def attempt_failed(self, peer: PeerId, model: str, error: LloomError, stage: str) -> None:
        """One executor failed, in the stage open, first_byte or answer."""

    def exchange_settled(self, settled: Settled) -> None:
        """A REQUEST that went out is over, one way or another: exactly one call for each."""


class Asker:
    """Asks executors, one at a time a call; what comes of it goes to the health book, the peer book, the observer."""

    def __init__(
        self,
        *,
        pool: StreamPool,
        signer: Signer,
        book: PeerBook,
        health: HealthBook,
        ensure_connected: Callable[[PeerId], Awaitable[None]],
        observer: RouterObserver,
        quote_of: Callable[[PeerId, str], HeldQuote | None],
        exchange_with: ExchangeWith = open_exchange,
    ) -> None:
        self._pool = pool
        self._signer = signer
        self._book = book
        self._health = health
        self._ensure_connected = ensure_connected
        self._observer = observer
        self._quote_of = quote_of
        self._exchange_with = exchange_with

    async def ask(
        self,
        view: ExecutorView,
        call: Call,
        use: Use,
        route: Route,
        *,
        budget_s: float = math.inf,
        ceiling: Price | None = None,
        on_first: Callable[[], None] = lambda: None,
        lost_as: str = "hedged",
    ) -> LloomError | None:
        """Have ``view`` answer ``call``. Returns why it failed, None when it answered.

        What ``use`` raises counts as the executor's failure, but for an application that left or asked for what cannot
        be served. An executor whose price has changed is asked once more for the new one, if the request allows it.
        Cancelled: the stream is closed, what was sent is settled, the executor is not blamed.

        Args:
            budget_s: the longest wait for the first frame of the answer.
            ceiling: the highest price that the application pays; None = any.
            on_first: called when the first frame is there.
            lost_as: the reason in the settlement when another executor's answer was used.
        """
        priced = self._priced(call, view)
        error = await self._ask_once(view, priced, use, route, budget_s, on_first, lost_as)
        if error is not None and error.code == "price_changed":
            price = error.details.get("price")
            if isinstance(price, Price) and (ceiling is None or not is_over(price, ceiling)):
                priced = replace(call, max_price=price)
                error = await self._ask_once(view, priced, use, route, budget_s, on_first, lost_as)
        return error

    async def _ask_once(
        self,
        view: ExecutorView,
        call: Call,
        use: Use,
        route: Route,
        budget_s: float,
        on_first: Callable[[], None],
        lost_as: str,
    ) -> LloomError | None:
        peer = view.peer
        began_at = trio.current_time()
        stage = "open"
        route.asked += 1
        if not route.is_committed:
            route.executor = peer
        span = route.span.attempt(str(peer))
        if span.traceparent != call.traceparent:
            call = replace(call, traceparent=span.traceparent)
        prior_s = self._health.prior(view.load.ttft_s)
        ticket = self._health.begin(peer, call.model, began_at, prior_s=prior_s, size=len(call.body))
        sent: list[Sent] = []
        exchange: Exchange | None = None
        failure: LloomError | None = None
        is_over = False
        try:
            with trio.move_on_after(budget_s) as waiting:
                await self._ensure_connected(peer)
                stage = "first_byte"
                async with self._exchange_with(self._pool, self._signer, peer, call, sent.append) as exchange:
                    waiting.deadline = math.inf
                    stage = "answer"
                    self._health.first_byte(ticket, exchange.first_at)
                    span.first_byte()
                    on_first()
                    await use(route, exchange)
            if waiting.cancelled_caught:
                failure = PeerTimeoutError(
                    f"{peer.short()} gave no first byte within {budget_s:.1f} s", code="first_byte_timeout"
                )
            is_over = True
        except (DaemonUnavailableError, HttpServerError, RequestError, OutrunError):
            raise  # p2pd is away, the application left, or its request cannot be served: no executor's fault
        except LloomError as exc:
            failure = exc
            is_over = True
        finally:
            now = trio.current_time()
            is_winner = exchange is not None and route.winner is exchange
            if not is_over:
                is_outrun = route.is_committed and not is_winner
                reason = lost_as if is_outrun else "cancelled"
                self._health.end(ticket, Outcome.OUTRUN if is_outrun else Outcome.CANCELLED, now)
                if is_outrun:
                    route.attempts.append(Attempt(str(peer), stage, reason, (now - began_at) * 1000))
            else:
                reason = "" if failure is None else reason_of(failure)
            span.end(failure.code if failure is not None else reason or "ok")
            for one in sent:
                is_last = one is sent[-1]
                self._observer.exchange_settled(
                    settle(one, call, was_used=is_winner and is_last, reason=reason if is_last else "stale")
                )
        if failure is None:
            self._health.end(ticket, Outcome.OK, now)
            self._book.mark_served(peer)
            return None
        outcome = _outcome_of(failure)
        # One that shuts down leaves the network; when it is back, it need not be waited for.
        is_asking = outcome is not Outcome.ANSWERED and failure.code != "draining"
        returns_s = failure.retry_after_s if is_asking else None
        self._health.end(ticket, outcome, now, retry_after_s=returns_s)
        if not isinstance(failure, RefusedError):
            self._book.mark_failed(peer, now)
        route.attempts.append(Attempt(str(peer), stage, failure.code, (now - began_at) * 1000, failure.message))
        self._observer.attempt_failed(peer, call.model, failure, stage)
        return failure

    def _priced(self, call: Call, view: ExecutorView) -> Call:
        """The call with what this executor may charge: its promise if it gave one, else what it announced."""
        quote = self._quote_of(view.peer, call.model)
        if quote is None:
            return call if call.max_price == view.offer.price else replace(call, max_price=view.offer.price)
        return replace(call, max_price=quote.price, quote_id=quote.quote_id)


def _outcome_of(failure: LloomError) -> Outcome:
    if blames_request(failure) or failure.code in _OF_THIS_REQUEST:
        return Outcome.ANSWERED
    if isinstance(failure, PeerTimeoutError):
        return Outcome.TIMEOUT
    if isinstance(failure, PeerBusyError) or failure.http_status in (429, 503):
        return Outcome.REFUSED
    return Outcome.FAILED


def blames_request(failure: LloomError) -> bool:
    """The executor did its part; the request is at fault."""
    return isinstance(failure, RefusedError) and failure.http_status in PASS_THROUGH_STATUSES

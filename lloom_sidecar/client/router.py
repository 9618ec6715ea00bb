"""Finding an executor for each request, and another one when it fails before the answer began."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import structlog
import trio

from lloom_sidecar.errors import (
    PASS_THROUGH_STATUSES,
    DaemonUnavailableError,
    LloomError,
    NoExecutorError,
    PeerBusyError,
    PeerTimeoutError,
    RefusedError,
    RequestError,
    UnknownModelError,
)
from lloom_sidecar.http.errors import HttpServerError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Exchange, Receipt, open_exchange
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.peers.executors import ExecutorView
from lloom_sidecar.peers.health import HealthBook, Outcome
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import Choice, Filtered, Policy, Wanted, choose
from lloom_sidecar.protocol.envelope import Signer

from .market import HeldQuote
from .openai import Attempt

MAX_ATTEMPTS: Final = 8
"""Executors tried for one request."""
MAX_PAUSES: Final = 5
"""Times that a request waits for the only executor, or for one whose circuit closes soon."""
MAX_PAUSE_S: Final = 5.0
LOOK_UP_S: Final = 3.0
"""How long a request for a model that nobody offers waits for a look into the network."""

log = structlog.get_logger("lloom.router")


class RouterObserver(Protocol):
    """What the node wants to know of requests; every method is quick and raises nothing."""

    def attempt_failed(self, peer: PeerId, model: str, error: LloomError, stage: str) -> None:
        """One executor failed, in the stage open, first_byte or answer."""

    def answer_received(self, peer: PeerId, call: Call, receipt: Receipt, first_s: float, seconds: float) -> None:
        """An answer is complete and its receipt holds."""


@dataclass(slots=True)
class Route:
    """What happened to one request so far."""

    started_at: float
    attempts: list[Attempt] = field(default_factory=list)
    model: str = ""
    executor: PeerId | None = None
    """The one asked last."""
    is_committed: bool = False
    """True once the application got a byte: no other executor may take over."""
    first_at: float | None = None


class Router:
    """Serves calls; owns no task."""

    def __init__(
        self,
        *,
        pool: StreamPool,
        signer: Signer,
        book: PeerBook,
        health: HealthBook,
        look_up: Callable[[str], Awaitable[None]],
        ensure_connected: Callable[[PeerId], Awaitable[None]],
        catalogue_is_complete: Callable[[], bool],
        observer: RouterObserver,
        rng: random.Random,
        quote_of: Callable[[PeerId, str], HeldQuote | None] = lambda peer, model: None,
        exchange_with: Callable[
            [StreamPool, Signer, PeerId, Call], AbstractAsyncContextManager[Exchange]
        ] = open_exchange,
    ) -> None:
        """``look_up``: searches the network for a model within its own deadline. ``quote_of``: a promise that holds."""
        self._pool = pool
        self._signer = signer
        self._book = book
        self._health = health
        self._look_up = look_up
        self._ensure_connected = ensure_connected
        self._catalogue_is_complete = catalogue_is_complete
        self._observer = observer
        self._rng = rng
        self._quote_of = quote_of
        self._exchange_with = exchange_with

    async def run(
        self,
        call: Call,
        wanted: Wanted,
        policy: Policy,
        use: Callable[[Route, Exchange], Awaitable[None]],
        route: Route,
    ) -> None:
        """Have ``call`` answered: ``use`` consumes the answer of the executor that gave one.

        ``use`` sets ``route.is_committed`` before it gives the application its first byte; until then a failure moves
        on to another executor. The caller sets the deadline of the whole.

        Raises:
            UnknownModelError, NoExecutorError, PriceError: nobody to ask.
            RefusedError: the request itself was refused (400, 413, 422), or everybody refused it.
            LloomError: what the last executor failed with, when all failed.
        """
        error: LloomError | None = None
        excluded: frozenset[PeerId] = frozenset()
        pauses = 0
        while len(route.attempts) < MAX_ATTEMPTS:
            choice = self._choose(replace(wanted, excluded=excluded), policy)
            if choice.pick is None and error is None and not self._offered(wanted.model):
                choice = await self._look_further(wanted, policy)
            if choice.pick is None:
                pause_s = self._pause_s(choice, error, excluded)
                if pause_s is None or pauses >= MAX_PAUSES:
                    raise error or choice.error(wanted.model)
                pauses += 1
                if choice.retry_after_s is None:
                    excluded = frozenset()  # the only one there is, and it said when to return
                await trio.sleep(pause_s * (1 + 0.1 * self._rng.random()))
                continue
            view = choice.pick
            others = [one for one in choice.considered if one.filtered is None and one.view is not view]
            error = await self._attempt(view, call, use, route, has_others=bool(others))
            if error is None:
                return
            if route.is_committed or not _moves_on(error):
                raise error
            excluded |= {view.peer}
        assert error is not None
        raise error

    async def _attempt(
        self,
        view: ExecutorView,
        call: Call,
        use: Callable[[Route, Exchange], Awaitable[None]],
        route: Route,
        *,
        has_others: bool,
    ) -> LloomError | None:
        """One executor. Returns why it failed, None when it answered.

        What ``use`` raises counts as its failure, but for an application that left or asked for what cannot be served.
        """
        peer = view.peer
        began_at = trio.current_time()
        stage = "open"
        route.executor = peer
        ticket = self._health.begin(peer, call.model, began_at, prior_s=self._health.prior(view.load.ttft_s))
        budget_s = float("inf")
        if has_others:  # without an alternative, waiting on is better than giving up
            budget_s = self._health.first_byte_budget_s(call.model, attempt=len(route.attempts) + 1)
        failure: LloomError | None = None
        receipt: Receipt | None = None
        outcome = Outcome.CANCELLED  # the application left, or the request's deadline passed
        try:
            with trio.move_on_after(budget_s) as waiting:
                await self._ensure_connected(peer)
                stage = "first_byte"
                priced = self._priced(call, view)
                async with self._exchange_with(self._pool, self._signer, peer, priced) as exchange:
                    waiting.deadline = float("inf")
                    stage = "answer"
                    route.first_at = trio.current_time()
                    self._health.first_byte(ticket, route.first_at)
                    await use(route, exchange)
                    receipt = exchange.receipt
            if waiting.cancelled_caught:
                failure = PeerTimeoutError(
                    f"{peer.short()} gave no first byte within {budget_s:.1f} s", code="first_byte_timeout"
                )
            outcome = Outcome.OK
        except (DaemonUnavailableError, HttpServerError, RequestError):
            raise  # p2pd is away, the application left, or its request cannot be served: no executor's fault
        except LloomError as exc:
            failure = exc
            outcome = Outcome.OK
        finally:
            now = trio.current_time()
            if outcome is Outcome.CANCELLED:
                self._health.end(ticket, outcome, now)
        if failure is None:
            self._health.end(ticket, Outcome.OK, now)
            self._book.mark_served(peer)
            if receipt is not None:
                assert route.first_at is not None
                self._observer.answer_received(peer, call, receipt, route.first_at - began_at, now - began_at)
            return None
        self._health.end(ticket, _outcome_of(failure), now, retry_after_s=failure.retry_after_s)
        if not isinstance(failure, RefusedError):
            self._book.mark_failed(peer, now)
        route.attempts.append(Attempt(str(peer), stage, failure.code, (now - began_at) * 1000, failure.message))
        self._observer.attempt_failed(peer, call.model, failure, stage)
        return failure

    def _priced(self, call: Call, view: ExecutorView) -> Call:
        """The call with what this executor may charge: its promise if it gave one, else what it announced."""
        quote = self._quote_of(view.peer, call.model)
        if quote is None:
            return replace(call, max_price=view.offer.price)
        return replace(call, max_price=quote.price, quote_id=quote.quote_id)

    def _choose(self, wanted: Wanted, policy: Policy) -> Choice:
        return choose(
            self._book.index_of(wanted.model),
            request=wanted,
            policy=policy,
            health=self._health,
            now=trio.current_time(),
            rng=self._rng,
        )

    def _offered(self, model: str) -> bool:
        return bool(self._book.executors_of(model, trio.current_time()))

    async def _look_further(self, wanted: Wanted, policy: Policy) -> Choice:
        """Nobody that we know of offers the model: search the network, then say which kind of absence it is."""
        with trio.move_on_after(LOOK_UP_S):
            await self._look_up(wanted.model)
        if self._offered(wanted.model):
            return self._choose(wanted, policy)
        if self._book.seen_model(wanted.model, trio.current_time()):
            raise NoExecutorError(f"no executor of `{wanted.model}` is up now", retry_after_s=5.0)
        if self._catalogue_is_complete():
            raise UnknownModelError(
                f"The model `{wanted.model}` does not exist in this network; GET /v1/models lists those that do"
            )
        raise NoExecutorError(
            f"the catalogue is not complete yet, and nobody offers `{wanted.model}` so far", retry_after_s=2.0
        )

    def _pause_s(self, choice: Choice, error: LloomError | None, excluded: frozenset[PeerId]) -> float | None:
        """How long to wait before whoever is there is asked (again), or None when that makes no sense.

        Nobody is asked twice for one request, unless it is the only one and said when to return.
        """
        wait_s = choice.retry_after_s
        reasons = choice.filtered
        if error is not None and wait_s is None and reasons[Filtered.EXCLUDED] == 1 and len(excluded) == 1:
            wait_s = error.retry_after_s if error.retryable else None
        return wait_s if wait_s is not None and wait_s <= MAX_PAUSE_S else None


def _outcome_of(failure: LloomError) -> Outcome:
    if _blames_request(failure):
        return Outcome.OK  # the executor did its part
    if isinstance(failure, PeerTimeoutError):
        return Outcome.TIMEOUT
    if isinstance(failure, PeerBusyError) or failure.http_status in (429, 503):
        return Outcome.REFUSED
    return Outcome.FAILED


def _blames_request(failure: LloomError) -> bool:
    return isinstance(failure, RefusedError) and failure.http_status in PASS_THROUGH_STATUSES


def _moves_on(failure: LloomError) -> bool:
    """Whether another executor may do better."""
    return not _blames_request(failure)

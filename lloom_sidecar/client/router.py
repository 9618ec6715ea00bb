"""Finding an executor for each request, and another one when it fails before the answer began."""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

import trio

from lloom_sidecar.errors import LloomError, NoExecutorError, UnknownModelError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, open_exchange
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.peers.health import HealthBook
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import Choice, Filtered, Policy, Wanted, choose
from lloom_sidecar.protocol.envelope import Signer

from .attempt import Asker, ExchangeWith, RouterObserver, Use, blames_request
from .market import HeldQuote
from .route import Route

MAX_ATTEMPTS: Final = 8
"""Executors tried for one request."""
MAX_PAUSES: Final = 5
"""Times that a request waits for the only executor, or for one whose circuit closes soon."""
MAX_PAUSE_S: Final = 5.0
LOOK_UP_S: Final = 3.0
"""How long a request for a model that nobody offers waits for a look into the network."""


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
        exchange_with: ExchangeWith = open_exchange,
    ) -> None:
        """``look_up``: searches the network for a model within its own deadline. ``quote_of``: a promise that holds."""
        self._book = book
        self._health = health
        self._look_up = look_up
        self._catalogue_is_complete = catalogue_is_complete
        self._rng = rng
        self._asker = Asker(
            pool=pool,
            signer=signer,
            book=book,
            health=health,
            ensure_connected=ensure_connected,
            observer=observer,
            quote_of=quote_of,
            exchange_with=exchange_with,
        )

    async def run(
        self,
        call: Call,
        wanted: Wanted,
        policy: Policy,
        use: Use,
        route: Route,
    ) -> None:
        """Have ``call`` answered: ``use`` consumes the answer of the executor that gave one.

        ``use`` calls ``route.commit`` before it gives the application its first byte; until then a failure moves on to
        another executor. The caller sets the deadline of the whole.

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
            budget_s = math.inf
            if others:  # without an alternative, waiting on is better than giving up
                budget_s = self._health.first_byte_budget_s(call.model, attempt=len(route.attempts) + 1)
            error = await self._asker.ask(view, call, use, route, budget_s=budget_s)
            if error is None:
                return
            if route.is_committed or not _moves_on(error):
                raise error
            excluded |= {view.peer}
        assert error is not None
        raise error

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


def _moves_on(failure: LloomError) -> bool:
    """Whether another executor may do better."""
    return not blames_request(failure)

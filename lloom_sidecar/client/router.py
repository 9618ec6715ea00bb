"""Which executor is asked, which one next when it fails before the answer began, and when nobody is.

Failover is for the executor's faults. What blames the request (400, 413, 422) goes to the application, but for a prompt
that was too long: executors with a longer context are asked first. Nobody is asked twice for one request, unless there
is nobody else to wait for: one that said when to return, or that is away and may come back.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

import trio

from lloom_sidecar.errors import (
    DaemonUnavailableError,
    LloomError,
    NoExecutorError,
    RoutingError,
    UnknownModelError,
)
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, open_exchange
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.peers.executors import ExecutorView
from lloom_sidecar.peers.health import HealthBook
from lloom_sidecar.peers.hedging import Hedge, HedgeBudget, hedge_after_s
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import Choice, Filtered, Policy, Wanted, choose, may_double
from lloom_sidecar.protocol.envelope import Signer

from .affinity import Conversations, conversation_of
from .attempt import Asker, ExchangeWith, RouterObserver, Use, blames_request
from .contest import Contest, Failure
from .market import HeldQuote
from .openai import is_context_error
from .route import Route

MAX_ATTEMPTS: Final = 8
"""Executors tried for one request."""
SPREAD: Final = 0.5
"""Waits for one that said when to return are longer by up to this share, at random: all requests that it refused wait
for the same instant, and would come back at it together."""
AWAY_SPREAD: Final = 0.1
PATIENCE_S: Final = 15.0
"""How long a request waits in all for executors that are busy or away. A sidecar that restarts is back within 5 s, and
p2pd dials an address that refused it again only after 5 s (go-libp2p, swarm's BackoffBase)."""
MAX_PAUSE_S: Final = 5.0
"""Longest single wait for one that said when to return."""
AWAY_PAUSE_S: Final = 0.25
MAX_AWAY_PAUSE_S: Final = 1.0
"""Between two looks for one that is away; the first, doubling to the second."""
LOOK_UP_S: Final = 3.0
"""How long a request for a model that nobody offers waits for a look into the network."""

_AWAY: Final = frozenset({"peer_unreachable", "stream_lost", "draining", "backend_unavailable"})
"""Codes of an executor that may be restarting."""


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
        self._conversations = Conversations()
        self._hedges = HedgeBudget()
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

    async def run(self, call: Call, wanted: Wanted, policy: Policy, use: Use, route: Route) -> None:
        """Have ``call`` answered: ``use`` consumes the answer of the executor that gave one.

        ``use`` calls ``route.commit`` before it gives the application its first byte; until then a failure moves on to
        another executor. The caller sets the deadline of the whole. With the policy ``race``, or when hedged, several
        ``use`` may run at once: all but one end with a cancellation, or with what ``commit`` raises.

        Raises:
            UnknownModelError, NoExecutorError, PriceError: nobody to ask.
            RefusedError: the request itself was refused (400, 413, 422), or everybody refused it.
            LloomError: what the last executor failed with, when all failed.
        """
        route.policy = policy
        conversation = conversation_of(call)
        wanted = self._conversations.prefer(conversation, wanted)
        self._hedges.note_request()
        patience = _Patience(self._rng)
        error: LloomError | None = None
        tried: frozenset[PeerId] = frozenset()
        away: frozenset[PeerId] = frozenset()
        allowed = MAX_ATTEMPTS
        while True:
            choice = self._choose(replace(wanted, excluded=wanted.excluded | tried) if tried else wanted, policy)
            route.choices.append(choice)
            if choice.pick is None:
                if not self._offered(wanted.model):
                    await self._look_further(wanted.model, patience, error)
                    tried, away = tried - away, frozenset()
                    continue
                if choice.retry_after_s is not None:
                    is_worth_it = await patience.wait(choice.retry_after_s)
                elif away:
                    is_worth_it = await patience.wait_for_return()
                    allowed += len(away)
                    tried, away = tried - away, frozenset()
                else:
                    is_worth_it = await patience.wait(_when_the_only_one_returns(choice, error, tried))
                    tried = frozenset()
                if not is_worth_it:
                    if error is not None or wanted.panics or not choice.filtered[Filtered.CIRCUIT_OPEN]:
                        raise error or choice.error(wanted.model)
                    # What it fails with tells the application more than that it failed before.
                    wanted = replace(wanted, panics=True)
                continue
            try:
                failures = await self._ask(choice, call, wanted, use, route)
            except DaemonUnavailableError:
                if route.is_committed or not await patience.wait_for_return():
                    raise
                continue
            if not failures:
                assert route.executor is not None
                self._conversations.answered(conversation, route.executor)
                return
            for view, error in failures:
                tried |= {view.peer}
                if error.code in _AWAY:
                    away |= {view.peer}
                if is_context_error(error) and not route.is_committed:
                    tried |= self._not_longer(view)
                elif route.is_committed or blames_request(error):
                    raise error
            if len(route.attempts) >= allowed:
                assert error is not None
                raise error

    async def _ask(self, choice: Choice, call: Call, wanted: Wanted, use: Use, route: Route) -> list[Failure]:
        """Those that were chosen. Returns who failed before anybody answered; empty when the answer was used."""
        picks = choice.picks
        others = [one.view for one in choice.considered if one.filtered is None and one.view not in picks]
        size = len(call.body)
        budget_s = math.inf
        if others:  # without an alternative, waiting on is better than giving up
            budget_s = self._health.first_byte_budget_s(call.model, attempt=len(route.attempts) + 1, size=size)
        lost_as = "raced" if len(picks) > 1 else "hedged"

        async def ask(view: ExecutorView, on_first: Callable[[], None] = lambda: None) -> LloomError | None:
            wait_s = budget_s
            if view not in picks:  # a hedge: twice the time, as for any second attempt, unless it is the last there is
                wait_s = 2 * budget_s if len(others) > 1 else math.inf
            return await self._asker.ask(
                view, call, use, route, budget_s=wait_s, ceiling=wanted.max_price, on_first=on_first, lost_as=lost_as
            )

        if len(picks) > 1:
            route.raced = len(picks)
            return await Contest(ask, route).race(picks)
        view = picks[0]
        after_s = None
        if others and wanted.hedge is not Hedge.OFF:
            after_s = hedge_after_s(self._health, call.model, size)
        if after_s is not None and after_s < budget_s:
            return await Contest(ask, route).hedge(view, after_s, lambda: self._second(view, wanted, route))
        error = await ask(view)
        return [] if error is None else [(view, error)]

    def _second(self, first: ExecutorView, wanted: Wanted, route: Route) -> ExecutorView | None:
        """Who is asked beside ``first``, if anybody may be."""
        tried = {first.peer, *(PeerId.parse(attempt.executor) for attempt in route.attempts)}
        choice = self._choose(replace(wanted, excluded=wanted.excluded | tried), Policy.ADAPTIVE)
        second = choice.pick
        if second is None or not may_double(first, second, wanted.hedge) or not self._hedges.take():
            return None
        route.is_hedged = True
        return second

    def _choose(self, wanted: Wanted, policy: Policy) -> Choice:
        return choose(
            self._book.index_of(wanted.model),
            request=wanted,
            policy=policy,
            health=self._health,
            now=trio.current_time(),
            rng=self._rng,
        )

    def explain(self, wanted: Wanted, policy: Policy) -> Choice:
        """What would be chosen now, with every candidate looked at."""
        return choose(
            self._book.index_of(wanted.model),
            request=wanted,
            policy=policy,
            health=self._health,
            now=trio.current_time(),
            rng=random.Random(0),  # asking changes no choice
            explain=True,
        )

    def _offered(self, model: str) -> bool:
        return bool(self._book.executors_of(model, trio.current_time()))

    def _not_longer(self, view: ExecutorView) -> frozenset[PeerId]:
        """Who need not be asked what was too long for ``view``."""
        now = trio.current_time()
        return frozenset(
            one.peer
            for one in self._book.executors_of(view.offer.id, now)
            if one.offer.context_length <= view.offer.context_length
        )

    async def _look_further(self, model: str, patience: _Patience, error: LloomError | None) -> None:
        """Nobody that we know of offers the model: search the network, then wait for its return, or raise."""
        if not patience.has_looked and error is None:
            patience.has_looked = True
            with trio.move_on_after(LOOK_UP_S):
                await self._look_up(model)
            if self._offered(model):
                return
        was_here = self._book.seen_model(model, trio.current_time())
        if not was_here or not await patience.wait_for_return():
            raise error or self.absence(model)

    def absence(self, model: str) -> RoutingError:
        """Why nobody offers ``model``: 404 only when the catalogue is complete and it was not seen for 24 h."""
        if self._book.seen_model(model, trio.current_time()):
            return NoExecutorError(f"no executor of `{model}` is up now", retry_after_s=5.0)
        if self._catalogue_is_complete():
            return UnknownModelError(
                f"The model `{model}` does not exist in this network; GET /v1/models lists those that do"
            )
        return NoExecutorError(
            f"the catalogue is not complete yet, and nobody offers `{model}` so far", retry_after_s=2.0
        )


def _when_the_only_one_returns(choice: Choice, error: LloomError | None, tried: frozenset[PeerId]) -> float | None:
    """Seconds, when nobody but the one that was tried can be asked and it said so; else None."""
    is_only = choice.filtered[Filtered.EXCLUDED] == len(tried) == 1
    return error.retry_after_s if is_only and error is not None and error.retryable else None


class _Patience:
    """What is left of one request's willingness to wait. Its methods return False at once when that is too little."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._left_s = PATIENCE_S
        self._away_s = AWAY_PAUSE_S
        self.has_looked = False

    async def wait(self, pause_s: float | None) -> bool:
        """Wait until somebody may be asked (again); None = never."""
        return pause_s is not None and pause_s <= MAX_PAUSE_S and await self._sleep(pause_s, SPREAD)

    async def wait_for_return(self) -> bool:
        """Wait a moment for one that is away."""
        pause_s, self._away_s = self._away_s, min(MAX_AWAY_PAUSE_S, 2 * self._away_s)
        return await self._sleep(pause_s, AWAY_SPREAD)

    async def _sleep(self, pause_s: float, spread: float) -> bool:
        if pause_s > self._left_s:
            return False
        self._left_s -= pause_s
        await trio.sleep(pause_s * (1 + spread * self._rng.random()))
        return True

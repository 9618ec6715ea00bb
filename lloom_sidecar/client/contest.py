"""One request at several executors at once: a race from the start, or a hedge against a slow one.

The first that the application can have an answer of wins: of a streamed answer the first bytes, of any other the whole,
verified. The others are cancelled in the same moment, and settled as such.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from lloom_sidecar.errors import LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Exchange
from lloom_sidecar.peers.executors import ExecutorView

from .route import OutrunError, Route

Failure = tuple[ExecutorView, LloomError]
"""Who failed, and how."""


class Ask(Protocol):
    """``Asker.ask`` for one request."""

    def __call__(self, view: ExecutorView, on_first: Callable[[], None]) -> Awaitable[LloomError | None]:
        """Ask one executor."""


class Contest:
    """One contest. Of each executor one attempt at most."""

    def __init__(self, ask: Ask, route: Route) -> None:
        self._ask = ask
        self._route = route
        self._scopes: dict[PeerId, trio.CancelScope] = {}
        self._failures: list[Failure] = []
        self._raised: list[tuple[PeerId, LloomError]] = []
        self._answers = trio.Event()

    async def race(self, views: Sequence[ExecutorView]) -> list[Failure]:
        """All at once. Returns empty when an answer was given, else who failed. Raises what ``ask`` does."""
        with self._watching():
            async with trio.open_nursery() as nursery:
                for view in views:
                    self._start(nursery, view)
        return self._result()

    async def hedge(
        self, view: ExecutorView, after_s: float, second: Callable[[], ExecutorView | None]
    ) -> list[Failure]:
        """One, and if nothing came of it for ``after_s`` the one that ``second`` gives too. Else as ``race``."""
        with self._watching():
            async with trio.open_nursery() as nursery:
                self._start(nursery, view)
                with trio.move_on_after(after_s):
                    await self._answers.wait()
                if not self._answers.is_set():
                    other = second()
                    if other is not None:
                        self._start(nursery, other)
        return self._result()

    def _watching(self) -> _OnCommit:
        return _OnCommit(self._route, self._cancel_others)

    def _result(self) -> list[Failure]:
        winner = self._route.executor if self._route.is_committed else None
        for peer, error in self._raised:
            if winner in (None, peer):
                raise error
        return [failure for failure in self._failures if winner in (None, failure[0].peer)]

    def _start(self, nursery: trio.Nursery, view: ExecutorView) -> None:
        scope = self._scopes[view.peer] = trio.CancelScope()
        nursery.start_soon(self._attempt, view, scope)

    async def _attempt(self, view: ExecutorView, scope: trio.CancelScope) -> None:
        try:
            with scope:
                error = await self._ask(view, self._answers.set)
                if error is not None:
                    self._failures.append((view, error))
        except OutrunError:
            pass
        except LloomError as exc:  # this node's side: no p2pd, a cap that this executor's price is over, no application
            self._raised.append((view.peer, exc))
        finally:
            self._answers.set()

    def _cancel_others(self, winner: Exchange) -> None:
        for peer, scope in self._scopes.items():
            if peer != winner.peer:
                scope.cancel()


class _OnCommit:
    """Has ``do`` called when the route is committed, as long as the context lasts."""

    def __init__(self, route: Route, do: Callable[[Exchange], None]) -> None:
        self._route = route
        self._do = do

    def __enter__(self) -> None:
        self._before, self._route.on_commit = self._route.on_commit, self._do

    def __exit__(self, *exc: object) -> None:
        self._route.on_commit = self._before

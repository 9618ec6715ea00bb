"""One request's way through the network: who was asked, what came of it, and whose answer the application gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lloom_sidecar.errors import LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Exchange
from lloom_sidecar.peers.selection import Choice, Policy
from lloom_sidecar.tracing import NO_SPAN, Span

from .openai import Attempt


class OutrunError(LloomError):
    """Another executor was first. Never leaves the contest."""

    code = "outrun"


@dataclass(slots=True)
class Route:
    """What happened to one request so far."""

    started_at: float
    attempts: list[Attempt] = field(default_factory=list)
    """Those that did not give the answer, in the order in which they ended."""
    asked: int = 0
    """Executors that were asked, the one that answered and the losers of a contest included."""
    model: str = ""
    executor: PeerId | None = None
    """The one asked last; after ``commit`` the one whose answer it is."""
    winner: Exchange | None = None
    """Whose answer the application gets."""
    first_at: float | None = None
    """When the first frame of that answer was there."""
    span: Span = NO_SPAN
    on_commit: Callable[[Exchange], None] = lambda exchange: None
    policy: Policy | None = None
    """How an executor was chosen; None when it never came to that."""
    choices: list[Choice] = field(default_factory=list)
    """Every choice that was made for it, in order."""
    raced: int = 0
    """Executors that were asked at once; 0 = no race."""
    is_hedged: bool = False
    """A second executor was asked since the first was slow."""

    @property
    def is_committed(self) -> bool:
        """True once the application is about to get a byte: no other executor may take over."""
        return self.winner is not None

    def next_part(self) -> Route:
        """The way of the rest of an answer that was cut: a request of its own, in the same record."""
        return Route(self.started_at, attempts=self.attempts, model=self.model, span=self.span, choices=self.choices)

    def add_part(self, part: Route) -> None:
        """``part``, which ``next_part`` gave, is over."""
        self.asked += part.asked
        self.executor = part.executor or self.executor
        self.winner = part.winner or self.winner
        self.raced = max(self.raced, part.raced)
        self.is_hedged = self.is_hedged or part.is_hedged

    def commit(self, exchange: Exchange) -> None:
        """The application gets the answer of ``exchange`` and of no other. Called right before its first byte; again is
        harmless.

        Raises:
            OutrunError: it gets another one's.
        """
        if self.winner is exchange:
            return
        if self.winner is not None:
            raise OutrunError(f"{exchange.peer.short()} was slower than {self.winner.peer.short()}")
        self.winner = exchange
        self.executor = exchange.peer
        self.first_at = exchange.first_at
        self.on_commit(exchange)

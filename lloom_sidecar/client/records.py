"""The last requests of this node's applications: what was tried for each, and what else could have been. No texts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.selection import Choice, Policy

from .openai import Attempt
from .route import Route

MAX_RECORDS: Final = 500
MAX_CHOICES: Final = 4
"""Choices kept of one request: the first ones. A request that waits for somebody makes more of them, all alike."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request that is over."""

    request_id: str
    """Hex, as in the header x-request-id."""
    model: str
    """Empty when the body named none."""
    policy: Policy | None
    """None when it never came to a choice."""
    started_at_ms: int
    """Unix milliseconds."""
    seconds: float
    first_s: float | None
    """Until the first frame of the answer that was used."""
    code: str
    """``ok``, ``cancelled``, or an error's code."""
    executor: PeerId | None
    """Whose answer it got, or who was asked last."""
    asked: int
    raced: int
    is_hedged: bool
    attempts: tuple[Attempt, ...]
    choices: tuple[Choice, ...]


class RequestRecords:
    """A ring of the last 500."""

    def __init__(self, limit: int = MAX_RECORDS) -> None:
        self._limit = limit
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()

    def add(
        self,
        route: Route,
        *,
        request_id: str,
        started_at_ms: int,
        seconds: float,
        code: str,
    ) -> None:
        """A request ended with ``code``."""
        self._records[request_id] = RequestRecord(
            request_id=request_id,
            model=route.model,
            policy=route.policy,
            started_at_ms=started_at_ms,
            seconds=seconds,
            first_s=None if route.first_at is None else route.first_at - route.started_at,
            code=code,
            executor=route.executor,
            asked=route.asked,
            raced=route.raced,
            is_hedged=route.is_hedged,
            attempts=tuple(route.attempts),
            choices=tuple(route.choices[:MAX_CHOICES]),
        )
        if len(self._records) > self._limit:
            self._records.popitem(last=False)

    def __iter__(self) -> Iterator[RequestRecord]:
        """Oldest first."""
        return iter(list(self._records.values()))

    def get(self, request_id: str) -> RequestRecord | None:
        """The one with that id, if it is still there."""
        return self._records.get(request_id)

"""What the operator's side sees of a node's ledger: shapes, and the routes that hand them out.

| request | answer |
|---|---|
| GET /v1/receipts | ``{"receipts": [ExchangeInfo]}`` |
| GET /v1/receipts/{request id}/export | ``{"receipts": [object of PROTOCOL.md, Exported receipts]}`` |
| GET /v1/usage | ``{"by", "usage": [UsageInfo]}`` |

Queries, all optional: of the first role, peer, model, request, owed=0|1, doubtful=1, before=ID, limit; of the second
role, salt=1; of the third by=model|peer|day, role, since_ms, until_ms (Unix).

Shapes are stable: fields are added, never renamed or removed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypedDict, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lloom_sidecar.errors import RequestError

DEFAULT_LIMIT: Final = 100
MAX_LIMIT: Final = 1000
MAX_MS: Final = 2**63 - 1

Role = Literal["client", "executor"]
UsageBy = Literal["model", "peer", "day"]


class ExchangeInfo(TypedDict):
    """One exchange that the node took part in."""

    id: int
    """Grows with time; ``before`` goes on from it."""
    at: str
    """ISO 8601, UTC: when it was written down."""
    role: str
    """What this node was: client or executor."""
    peer: str
    """The other side."""
    request_id: str
    """Hex; the same for all attempts at one request."""
    request_digest: str
    """Hex SHA-256 of the signed request: names the exchange."""
    model: str
    outcome: str
    """complete, stopped (at its max cost), partial (a checkpoint), or empty: nothing was signed for it."""
    owed: bool
    reason: str
    """Why it is not owed, or was cut: lost, refused, hedged, cancelled, duplicate, an error's code, ..."""
    doubts: str
    """What of the executor's numbers cannot be; empty = nothing."""
    acknowledged: bool
    """The client countersigned."""
    prompt_tokens: int
    completion_tokens: int
    cost: int
    """Minor units."""
    currency: str
    """Empty when free."""


class UsageInfo(TypedDict):
    """Sums over the exchanges of one model, peer or day, in one role and currency."""

    role: str
    key: str
    """The model, the peer or the day (2026-11-25, UTC)."""
    exchanges: int
    owed: int
    """How many of them are owed; the sums are over these."""
    prompt_tokens: int
    completion_tokens: int
    cost: int
    """Minor units."""
    currency: str
    """Empty when free."""


@dataclass(frozen=True, slots=True)
class ExchangeFilter:
    """Which exchanges are wanted; None = all."""

    role: Role | None = None
    peer: str | None = None
    model: str | None = None
    request_id: bytes | None = None
    is_owed: bool | None = None
    is_doubtful: bool = False
    before_id: int | None = None


class Books(Protocol):
    """What the admin API needs of a ledger. Each method raises LloomError when it cannot be read."""

    async def exchanges(self, wanted: ExchangeFilter, limit: int) -> list[ExchangeInfo]:
        """The newest first. Raises ValueError when ``wanted.peer`` is no peer id."""

    async def export(self, request_id: bytes, role: Role | None, *, with_salt: bool) -> list[dict[str, str]]:
        """What was signed for a request, as PROTOCOL.md says; empty when there is nothing."""

    async def usage(self, by: UsageBy, role: Role | None, since_ms: int, until_ms: int) -> list[UsageInfo]:
        """Sums, Unix milliseconds."""


def book_routes(books: Books) -> list[Route]:
    """The routes of this module."""

    async def receipts(request: Request) -> Response:
        query = _Query(request)
        wanted = ExchangeFilter(
            role=query.role(),
            peer=query.text("peer"),
            model=query.text("model"),
            request_id=None if query.text("request") is None else request_id_of(query.text("request") or ""),
            is_owed=query.switch("owed"),
            is_doubtful=query.switch("doubtful") or False,
            before_id=query.number("before", None, MAX_MS),
        )
        limit = query.number("limit", DEFAULT_LIMIT, MAX_LIMIT) or 0
        try:
            return JSONResponse({"receipts": await books.exchanges(wanted, limit)})
        except ValueError as exc:
            raise RequestError(str(exc)) from exc

    async def export(request: Request) -> Response:
        query = _Query(request)
        which = request_id_of(request.path_params["request_id"])
        found = await books.export(which, query.role(), with_salt=query.switch("salt") or False)
        if not found:
            raise RequestError("nothing was signed for that request", code="not_found", http_status=404)
        return JSONResponse({"receipts": found})

    async def usage(request: Request) -> Response:
        query = _Query(request)
        by = query.text("by") or "model"
        if by not in ("model", "peer", "day"):
            raise RequestError(f'"by" is {by!r}, not model, peer or day')
        since_ms, until_ms = query.number("since_ms", 0, MAX_MS) or 0, query.number("until_ms", MAX_MS, MAX_MS) or 0
        rows = await books.usage(cast("UsageBy", by), query.role(), since_ms, until_ms)
        return JSONResponse({"by": by, "usage": rows})

    return [
        Route("/v1/receipts", receipts),
        Route("/v1/receipts/{request_id}/export", export),
        Route("/v1/usage", usage),
    ]


def request_id_of(text: str) -> bytes:
    """From 32 hex digits. Raises RequestError."""
    if re.fullmatch(r"[0-9a-f]{32}", text) is None:
        raise RequestError(f"{text[:40]!r} is no request id: 32 hex digits, as in an answer's header x-request-id")
    return bytes.fromhex(text)


class _Query:
    """The checked query of a request. Each method raises RequestError."""

    def __init__(self, request: Request) -> None:
        self._query: Any = request.query_params

    def text(self, name: str) -> str | None:
        return self._query.get(name) or None

    def role(self) -> Role | None:
        value = self.text("role")
        if value not in (None, "client", "executor"):
            raise RequestError(f'"role" is {value!r}, neither client nor executor')
        return cast("Role | None", value)

    def switch(self, name: str) -> bool | None:
        value = self.text(name)
        if value not in (None, "0", "1"):
            raise RequestError(f'"{name}" is {value!r}, neither 0 nor 1')
        return None if value is None else value == "1"

    def number(self, name: str, default: int | None, most: int) -> int | None:
        value = self.text(name)
        if value is None:
            return default
        if not (value.isascii() and value.isdigit() and len(value) <= 19 and int(value) <= most):
            raise RequestError(f'"{name}" is {value[:40]!r}, not a whole number from 0 to {most}')
        return int(value)

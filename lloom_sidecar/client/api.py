"""The OpenAI API that an application talks to: HTTP in, one routed call, the answer streamed back.

A streamed answer looks finished only when its receipt was verified; one that is cut ends with an error event and a
connection closed without HTTP's last chunk. An application that leaves cancels its call: the server cancels the
handler, the stream to the executor closes.
"""

from __future__ import annotations

import hmac
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Protocol

import msgspec
import structlog
import trio

from lloom_sidecar.errors import (
    PASS_THROUGH_STATUSES,
    LloomError,
    PeerTimeoutError,
    RefusedError,
    RequestError,
)
from lloom_sidecar.http.errors import ClientDisconnectedError, HttpServerError
from lloom_sidecar.http.server import Request, Response
from lloom_sidecar.ids import PeerId, check_model_id
from lloom_sidecar.link.exchange import Call, Exchange
from lloom_sidecar.peers.hedging import Hedge
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import Choice, Policy, Wanted
from lloom_sidecar.protocol.compression import decompress
from lloom_sidecar.protocol.exchange import MAX_BODY_BYTES
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.tracing import Tracing, check_traceparent

from .openai import (
    OPERATION_OF_PATH,
    STREAMED_OPERATIONS,
    TailHolder,
    error_document,
    error_event,
    model_object,
    read_body,
)
from .part import Part
from .records import RequestRecords
from .resume import ResumedAnswer
from .route import Route
from .router import Router
from .wishes import hedge, max_cost, max_price, pinned, policy, priority, resume, timeout_s

DEFAULT_DEADLINE_S: Final = 600.0
"""Longest time for one answer. OpenAI's own clients give up after as long."""
_APPLICATIONS_OWN: Final = PASS_THROUGH_STATUSES | {402, 429}
"""Statuses below 500 that an executor's refusal may have for the application. Others would mislead it: a backend's 401
is about its executor's key, not the application's, and its 404 is no word on the network's models."""
MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""Largest unstreamed answer that is held until its receipt was verified."""
_ENCODINGS: Final = {"zstd": pb.ENCODING_ZSTD, "gzip": pb.ENCODING_GZIP, "x-gzip": pb.ENCODING_GZIP}
"""Codings of a request's body. Source: RFC 9110, section 8.4.1; RFC 9659."""
_JSON: Final = (b"content-type", b"application/json")
_EVENTS: Final = (b"content-type", b"text/event-stream; charset=utf-8")
_NO_CACHE: Final = (b"cache-control", b"no-cache")

log = structlog.get_logger("lloom.api")


class ApiObserver(Protocol):
    """What the node wants to know of the API; every method is quick and raises nothing."""

    def http_started(self) -> None:
        """A call came in; exactly one ``http_ended`` follows."""

    def http_received(self, request_id: str, model: str) -> None:
        """Its body was read and names a model."""

    def http_ended(
        self,
        request_id: str,
        model: str,
        peer: PeerId | None,
        code: str,
        seconds: float,
        first_s: float | None,
        attempts: int,
    ) -> None:
        """It ended: ``ok``, ``cancelled`` or an error's code."""


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """How this node's API answers."""

    api_keys: tuple[str, ...] = ()
    """When not empty, ``Authorization: Bearer`` must be one of them."""
    deadline_s: float = DEFAULT_DEADLINE_S
    policy: Policy = Policy.ADAPTIVE
    min_trust: float = 0.0
    """Executors that are trusted less get nothing, 0 to 1."""
    max_body_bytes: int = MAX_BODY_BYTES
    """Of a body that came compressed; what comes as it is was bounded by the server."""
    hedge: Hedge = Hedge.OFF
    resume: bool = False
    """Whether a cut answer goes on elsewhere for a request that does not say."""
    max_price: Price | None = None
    """Ceiling for every request that brings none of its own; None = none."""


class OpenAiApi:
    """The handler of the API's HTTP server."""

    def __init__(
        self,
        *,
        router: Router,
        book: PeerBook,
        settings: ApiSettings,
        observer: ApiObserver,
        started_at_s: int,
        tracing: Tracing | None = None,
    ) -> None:
        self._router = router
        self._settings = settings
        self.records = RequestRecords()
        """The last requests, for ``lloomctl explain``."""
        self._book = book
        self._observer = observer
        self._started_at_s = started_at_s
        self._tracing = tracing or Tracing()

    async def __call__(self, request: Request, response: Response) -> None:
        """Serve one HTTP request. Raises ClientDisconnectedError only: the application left while it was written to."""
        path = request.path
        operation = OPERATION_OF_PATH.get(path)
        try:
            self._authorize(request)
            if operation is not None:
                if request.method != "POST":
                    await self._method_not_allowed(response, "POST")
                    return
                await self._call(request, response, operation)
            elif path == "/v1/models" or path.startswith("/v1/models/"):
                if request.method not in ("GET", "HEAD"):
                    await self._method_not_allowed(response, "GET, HEAD")
                    return
                await self._models(path, response)
            else:
                raise RequestError(
                    f"Unknown path {path}; this node serves {', '.join(OPERATION_OF_PATH)} and /v1/models",
                    code="not_found",
                    http_status=404,
                )
        except ClientDisconnectedError:
            raise  # the server closes the connection
        except LloomError as exc:
            await _send_error(response, exc)

    def explain(self, model: str, policy: Policy | None) -> tuple[Choice, Policy, Hedge]:
        """(what would be chosen now for a request without headers of its own, by which policy, with which hedging)."""
        settings = self._settings
        wanted = Wanted(model, max_price=settings.max_price, hedge=settings.hedge)
        return self._router.explain(wanted, policy or settings.policy), policy or settings.policy, settings.hedge

    def _authorize(self, request: Request) -> None:
        keys = self._settings.api_keys
        if not keys:
            return
        given = (request.header("authorization") or "").encode()
        if sum(hmac.compare_digest(given, f"Bearer {key}".encode()) for key in keys) == 0:
            raise RequestError(
                "this API needs its key: send `Authorization: Bearer <key>`", code="invalid_api_key", http_status=401
            )

    # ------------------------------------------------------------------ models
    async def _models(self, path: str, response: Response) -> None:
        wanted = path[len("/v1/models/") :] if path.startswith("/v1/models/") else ""
        now = trio.current_time()
        objects = [
            model_object(
                model.id,
                created=self._started_at_s,
                executors=model.executors,
                context_length=max((offer.context_length for offer in model.offers), default=0),
                features={feature for offer in model.offers for feature in offer.features},
            )
            for model in self._book.models(now=now)
        ]
        if not wanted:
            await response.send(200, [_JSON], msgspec.json.encode({"object": "list", "data": objects}))
            return
        for item in objects:
            if item["id"] == wanted:
                await response.send(200, [_JSON], msgspec.json.encode(item))
                return
        raise self._router.absence(wanted)

    # ------------------------------------------------------------------ calls
    async def _call(self, request: Request, response: Response, operation: int) -> None:
        route = Route(trio.current_time())
        request_id = os.urandom(16)
        started_at_ms = time.time_ns() // 1_000_000
        code = "cancelled"
        self._observer.http_started()
        try:
            await self._serve(request, response, operation, route, request_id)
            code = "ok"
        except ClientDisconnectedError:
            raise  # counted as cancelled
        except LloomError as exc:
            code = exc.code
            if isinstance(exc, RefusedError) and exc.http_status < 500 and exc.http_status not in _APPLICATIONS_OWN:
                exc.http_status = 502
            if response.started:
                # Too late for a status: say it where a client of the stream looks, then end without HTTP's last chunk.
                with suppress(HttpServerError):  # nobody reads it, or the deadline has cut a write already
                    await response.write(error_event(exc, route.attempts))
                response.abort()
            else:
                await _send_error(response, exc, route)
        finally:
            first_s = None if route.first_at is None else route.first_at - route.started_at
            seconds = trio.current_time() - route.started_at
            receipt = None if route.winner is None else route.winner.receipt
            usage = None if receipt is None else receipt.claims.usage
            route.span.end(
                code,
                input_tokens=None if usage is None else usage.prompt_tokens,
                output_tokens=None if usage is None else usage.completion_tokens,
            )
            self.records.add(
                route, request_id=request_id.hex(), started_at_ms=started_at_ms, seconds=seconds, code=code
            )
            self._observer.http_ended(
                request_id.hex(),
                route.model,
                route.executor,
                code,
                seconds,
                first_s,
                route.asked,
            )

    async def _serve(
        self, request: Request, response: Response, operation: int, route: Route, request_id: bytes
    ) -> None:
        body = _decompressed(request, await request.body(), self._settings.max_body_bytes)
        try:
            asked = read_body(body)
            check_model_id(asked.model)
        except ValueError as exc:
            raise RequestError(str(exc)) from exc
        route.model = asked.model
        route.span = self._tracing.request(
            operation, asked.model, check_traceparent(request.header("traceparent") or "")
        )
        self._observer.http_received(request_id.hex(), asked.model)
        settings = self._settings
        deadline_s = min(settings.deadline_s, timeout_s(request) or settings.deadline_s)
        call = Call(
            request_id=request_id,
            operation=operation,
            model=asked.model,
            body=body,
            deadline_ms=round(deadline_s * 1000),
            idempotency_key=(request.header("idempotency-key") or "").encode()[:128] or request_id,
            traceparent=route.span.traceparent,
            max_cost=max_cost(request),
            priority=priority(request),
        )
        wanted = Wanted(
            model=asked.model,
            pinned=pinned(request),
            max_price=max_price(request) or settings.max_price,
            hedge=hedge(request) or settings.hedge,
            min_trust=settings.min_trust,
        )
        streams = asked.stream and operation in STREAMED_OPERATIONS
        chosen_by = policy(request) or settings.policy
        asked_to_resume = resume(request)
        resumes = streams and (settings.resume if asked_to_resume is None else asked_to_resume)

        async def use(route: Route, exchange: Exchange) -> None:
            if streams:
                await self._relay(response, route, exchange, call, TailHolder(asked.n))
            else:
                await self._collect(response, route, exchange, call)

        with trio.move_on_after(deadline_s) as deadline:
            if resumes:
                await self._run_parts(response, call, wanted, chosen_by, route)
            else:
                await self._router.run(call, wanted, chosen_by, use, route)
        if deadline.cancelled_caught:
            raise PeerTimeoutError(f"no complete answer within {deadline_s:g} s", code="deadline")

    async def _run_parts(self, response: Response, call: Call, wanted: Wanted, chosen_by: Policy, route: Route) -> None:
        """As ``Router.run``, and on at another executor of the same weights where the answer is cut in the middle.

        Each part is an exchange of its own, under a key of its own: what was cut before it is settled for itself.
        Raises as ``Router.run``; a loss that could not be resumed says why in ``details["not_resumed"]``.
        """
        answer = ResumedAnswer(call, wanted)
        part_route = route

        async def use(route: Route, exchange: Exchange) -> None:
            part = answer.begin_part(exchange, self._digest_of(call.model, exchange.peer))
            await self._relay(response, route, exchange, call, part)

        while True:
            try:
                await self._router.run(answer.call, answer.wanted, chosen_by, use, part_route)
                return
            except LloomError as exc:
                seconds_left = trio.current_effective_deadline() - trio.current_time()
                ending = answer.lose(exc, part_route.winner, len(route.attempts), seconds_left)
            finally:
                if part_route is not route:
                    route.add_part(part_route)
            if ending:
                await response.finish(ending)
                return
            part_route = route.next_part()

    def _digest_of(self, model: str, peer: PeerId) -> bytes:
        """What an executor announced of its weights, b"" when nothing."""
        return next((view.offer.digest for view in self._book.index_of(model) if view.peer == peer), b"")

    async def _relay(
        self, response: Response, route: Route, exchange: Exchange, call: Call, tail: TailHolder | Part
    ) -> None:
        while not tail.is_whole and (data := await exchange.receive()) is not None:
            ready = tail.feed(data)
            if ready:
                if route.winner is not exchange:
                    await self._begin(response, route, exchange, call)
                await response.write(ready)
        if route.winner is not exchange:
            await self._begin(response, route, exchange, call)
        await response.finish(tail.release())

    async def _begin(self, response: Response, route: Route, exchange: Exchange, call: Call) -> None:
        """The first byte of an answer is there, or of its next part."""
        route.commit(exchange)
        if response.started:
            # Server-sent events that are comments: shown to whoever looks at the wire, and to no program.
            await response.write(f": lloom resumed at {exchange.peer}\n\n".encode())
        else:
            await response.start(200, [_EVENTS, _NO_CACHE, *_explain(route, exchange, call)])

    async def _collect(self, response: Response, route: Route, exchange: Exchange, call: Call) -> None:
        pieces: list[bytes] = []
        size = 0
        while (data := await exchange.receive()) is not None:
            pieces.append(data)
            size += len(data)
            if size > MAX_ANSWER_BYTES:
                raise RequestError(
                    "the answer is larger than 64 MiB: ask for it as a stream", code="answer_too_large", http_status=502
                )
        route.commit(exchange)
        await response.send(200, [_JSON, *_explain(route, exchange, call)], b"".join(pieces))

    async def _method_not_allowed(self, response: Response, allowed: str) -> None:
        error = RequestError(f"this path takes {allowed}", code="method_not_allowed", http_status=405)
        await response.send(405, [_JSON, (b"allow", allowed.encode())], error_document(error))


def _decompressed(request: Request, body: bytes, max_bytes: int) -> bytes:
    """The body without the coding that ``content-encoding`` names. Raises RequestError."""
    name = (request.header("content-encoding") or "identity").strip().lower()
    if name == "identity":
        return body
    encoding = _ENCODINGS.get(name)
    if encoding is None:
        raise RequestError(
            f"content-encoding {name[:40]!r} is not taken here; send the body with zstd, gzip or none",
            code="content_encoding",
            http_status=415,
        )
    return decompress(body, encoding, max_bytes)


def _explain(route: Route, exchange: Exchange, call: Call) -> list[tuple[bytes, bytes]]:
    """Who answered, after how many attempts, and what the network added to the backend's own time."""
    first_at = route.first_at or trio.current_time()
    backend_s = exchange.head.backend_us / 1e6 if exchange.head is not None else 0.0
    overhead_ms = max(0.0, (first_at - route.started_at - backend_s) * 1000)
    return [
        (b"x-request-id", call.request_id.hex().encode()),
        (b"x-lloom-executor", str(exchange.peer).encode()),
        (b"x-lloom-attempts", str(route.asked).encode()),
        (b"x-lloom-overhead-ms", f"{overhead_ms:.2f}".encode()),
        *([(b"x-lloom-hedged", b"1")] if route.is_hedged else []),
        *([(b"x-lloom-raced", str(route.raced).encode())] if route.raced else []),
    ]


async def _send_error(response: Response, error: LloomError, route: Route | None = None) -> None:
    attempts = route.attempts if route is not None else []
    headers = [_JSON, (b"x-lloom-attempts", str(route.asked if route is not None else 0).encode())]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
    elif error.http_status in (429, 503):
        headers.append((b"retry-after", b"2"))
    if attempts:
        headers.append((b"x-should-retry", b"false"))  # every executor was tried: the client's own retries add nothing
    await response.send(error.http_status, headers, error_document(error, attempts))

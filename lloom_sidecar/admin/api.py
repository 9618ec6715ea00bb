"""The admin API: HTTP and JSON on the unix socket ``HOME/run/admin.sock``.

Who can open the socket may do everything, and so may who holds a token of ``--admin`` (``token.py``).

| request | answer |
|---|---|
| GET /v1/status | ``view.Status`` |
| GET /v1/peers, /v1/models, /v1/executors | ``{"peers": [view.PeerInfo]}`` and so on |
| GET /v1/receipts/{request id} | ``view.ReceiptInfo`` |
| GET /v1/config | ``{"settings": [view.SettingInfo], "p2pd": [operations.EffectiveInfo]}`` |
| GET /v1/metrics | Prometheus text |
| GET /v1/events?follow=0|1&history=0|1&kind=K | a JSON object a line (``events.Stamped.as_dict``), or none |
| POST /v1/peers/connect ``{"addr": MULTIADDR}`` | ``view.PeerInfo`` |
| POST /v1/drain | 202 and ``{"draining": true}`` |

What asks other nodes or changes something is in ``operation_routes.py``, the ledger in ``books.py``.

Errors: ``{"error": {"code", "message"}}`` with the error's HTTP status.
"""

from __future__ import annotations

import json
from typing import Final

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from lloom_sidecar.errors import LloomError, RequestError

from .books import book_routes
from .events import EventReader, EventsDropped, Stamped
from .metrics import CONTENT_TYPE
from .operation_routes import MAX_BODY_BYTES, operation_routes, read_object
from .view import NodeView

KEEP_ALIVE_S: Final = 15.0
"""An idle stream of events sends an empty line this often, so that both sides notice that the other is gone."""


def admin_app(view: NodeView) -> Starlette:
    """The ASGI app of a node. It trusts its caller: serve it on a unix socket of mode 0600, or behind
    ``token.with_token`` on loopback.
    """

    async def status(request: Request) -> Response:
        return JSONResponse(view.status())

    async def peers(request: Request) -> Response:
        return JSONResponse({"peers": view.peers()})

    async def models(request: Request) -> Response:
        return JSONResponse({"models": view.models()})

    async def executors(request: Request) -> Response:
        return JSONResponse({"executors": view.executors()})

    async def config(request: Request) -> Response:
        return JSONResponse({"settings": view.config_effective(), "p2pd": view.operations.p2pd_effective()})

    async def metrics(request: Request) -> Response:
        return Response(view.render_metrics(), media_type=CONTENT_TYPE)

    async def events(request: Request) -> Response:
        query = request.query_params
        is_following = query.get("follow", "1") != "0"
        try:
            reader = view.events.subscribe(kinds=query.getlist("kind"), history=query.get("history", "0") != "0")
        except ValueError as exc:
            raise RequestError(str(exc)) from exc
        if not is_following:
            reader.close()
        return _EventStream(reader)

    async def connect(request: Request) -> Response:
        body = await read_object(request)
        addr = body.get("addr")
        if not isinstance(addr, str):
            raise RequestError('the body lacks "addr": a multiaddr with /p2p/<peer id>')
        try:
            return JSONResponse(await view.connect(addr))
        except ValueError as exc:
            raise RequestError(str(exc)) from exc

    async def receipt(request: Request) -> Response:
        found = view.receipt(request.path_params["request_id"])
        if found is None:
            raise RequestError("there is no receipt of that request", code="not_found", http_status=404)
        return JSONResponse(found)

    async def drain(request: Request) -> Response:
        await view.drain()
        return JSONResponse({"draining": True}, status_code=202)

    return Starlette(
        routes=[
            Route("/v1/status", status),
            Route("/v1/peers", peers),
            Route("/v1/peers/connect", connect, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/executors", executors),
            Route("/v1/receipts/{request_id}", receipt),
            Route("/v1/config", config),
            Route("/v1/metrics", metrics),
            Route("/v1/events", events),
            Route("/v1/drain", drain, methods=["POST"]),
            *operation_routes(view.operations),
            *book_routes(view.books),
        ],
        exception_handlers={LloomError: _answer_error, HTTPException: _answer_http_error},
    )


def _error(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message}}, status_code=status)


async def _answer_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, LloomError)
    return _error(exc.http_status, exc.code, exc.message)


async def _answer_http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, "http_error")
    answer = _error(exc.status_code, code, f"{request.method} {request.url.path}: {exc.detail.lower()}")
    answer.headers.update(exc.headers or {})
    return answer


class _EventStream(Response):
    """Events as NDJSON until the reader ends, the caller goes away, or the bus is closed."""

    media_type = "application/x-ndjson"

    def __init__(self, reader: EventReader) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._reader:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_at_disconnect, receive, nursery.cancel_scope)
                await self._relay(send)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                nursery.cancel_scope.cancel()

    async def _relay(self, send: Send) -> None:
        # What is buffered goes out as one body message: a burst of events costs one write.
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        while True:
            lines = b""
            with trio.move_on_after(KEEP_ALIVE_S):
                try:
                    lines = _line(await self._reader.receive())
                except trio.EndOfChannel:
                    return
            while len(lines) < MAX_BODY_BYTES:
                try:
                    lines += _line(self._reader.receive_nowait())
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
            await send({"type": "http.response.body", "body": lines or b"\n", "more_body": True})


async def _cancel_at_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _line(one: Stamped | EventsDropped) -> bytes:
    return json.dumps(one.as_dict(), separators=(",", ":")).encode() + b"\n"

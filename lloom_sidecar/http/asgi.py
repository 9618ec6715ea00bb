"""An ASGI application (Starlette) as a handler of this server: for routes where 50 us more do not matter.

Source: ASGI 3.0, HTTP connection scope 2.4 (``send`` raises OSError once the client has gone).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import trio

from lloom_sidecar.http.errors import ClientDisconnectedError, HttpUsageError
from lloom_sidecar.http.server import Handler, Request, Response

Message = MutableMapping[str, Any]
AsgiApp = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]
"""An ASGI 3 application for HTTP."""

_HOP_BY_HOP = frozenset({b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"upgrade", b"date"})


class _Exchange:
    """One request's ``receive`` and ``send``."""

    def __init__(self, request: Request, response: Response) -> None:
        self._request = request
        self._response = response
        self._body_given = False
        self._complete = trio.Event()
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._length: int | None = None

    async def receive(self) -> Message:
        if not self._body_given:
            body = await self._request.body()
            self._body_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        # A client that goes away cancels the whole handler; an application that waits here waits for the answer's end.
        await self._complete.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            if self._status:
                raise HttpUsageError("the application started its answer twice")
            self._status = int(message["status"])
            for name, value in message.get("headers", ()):
                name = bytes(name).lower()
                if name == b"content-length" and bytes(value).isdigit():
                    self._length = int(value)
                if name not in _HOP_BY_HOP:
                    self._headers.append((name, bytes(value)))
        elif kind == "http.response.body":
            if not self._status:
                raise HttpUsageError("the application sent a body before its answer's start")
            try:
                await self._send_body(bytes(message.get("body", b"")), bool(message.get("more_body", False)))
            except ClientDisconnectedError as exc:
                raise OSError("the client has gone") from exc
        else:
            raise HttpUsageError(f"the application sent {kind!r}, which is not served here")

    async def _send_body(self, body: bytes, has_more: bool) -> None:
        response = self._response
        if not response.started:
            is_head = self._request.method == "HEAD"
            if has_more or (is_head and self._length is not None):
                await response.start(self._status, self._headers, body, content_length=self._length)
                if not has_more:
                    await response.finish()
            else:
                await response.send(self._status, self._headers, body)
        elif has_more:
            await response.write(body)
        else:
            await response.finish(body)
        if not has_more:
            self._complete.set()


def asgi_handler(app: AsgiApp) -> Handler:
    """A handler that runs ``app``, on trio, without lifespan. Exceptions of the application pass to the server: 500.

    Cancelled (the client has gone): the application's task is, as every handler.
    """

    async def handler(request: Request, response: Response) -> None:
        exchange = _Exchange(request, response)
        host, _, port = (
            request.host.rpartition(":") if request.host.rpartition(":")[2].isdigit() else (request.host, "", "")
        )
        client = request.client
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1" if request.is_http11 else "1.0",
            "method": request.method,
            "scheme": request.scheme,
            "path": request.path,
            "raw_path": request.raw_path,
            "query_string": request.query,
            "root_path": "",
            "headers": request.headers,
            "client": None if client == "unix" else client,
            "server": (host, int(port) if port else (443 if request.scheme == "https" else 80)),
            "state": {},
        }
        try:
            await app(scope, exchange.receive, exchange.send)
        except OSError as exc:
            if isinstance(exc.__cause__, ClientDisconnectedError):
                raise exc.__cause__ from exc
            raise

    return handler

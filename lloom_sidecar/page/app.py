"""The status page's HTTP: files, a snapshot, and a live stream (SSE) of snapshots and events. Read-only.

| request | answer |
|---|---|
| GET / | the page |
| GET /NAME | a file of it |
| GET /snapshot.json | ``snapshot.Snapshot`` |
| GET /live | ``text/event-stream``: ``snapshot`` when something has changed, at most one a second; ``activity`` |

An ``activity`` is an event of the node (``events.Stamped.as_dict``); those before the page was opened come first.

Source of the stream's form: HTML standard, section 9.2 (server-sent events).
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

import trio

from lloom_sidecar.admin.events import EventReader
from lloom_sidecar.admin.view import NodeView

from .assets import SECURITY_HEADERS, load_assets
from .snapshot import take_snapshot

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_VIEWERS: Final = 16
"""Open live streams of one node; a browser has one for each tab."""
EVERY_S: Final = 1.0
KEEP_ALIVE_S: Final = 15.0
"""Without news a comment goes out this often, so that both sides notice that the other is gone."""
WRITE_S: Final = 10.0
"""A viewer that takes nothing for so long is let go; its browser comes back by itself."""


def status_app(view: NodeView, *, keys: tuple[str, ...] = ()) -> AsgiApp:
    """The status page's ASGI app. With ``keys`` whoever asks has to give one: as the password of HTTP's Basic scheme
    (browsers ask for it) or as a Bearer token.
    """
    return _StatusPage(view, keys)


def chat_app(describe: Callable[[], dict[str, Any]]) -> AsgiApp:
    """The chat page's ASGI app, for /chat and /chat/NAME on the API's listener. It has no secrets: the script asks the
    API itself, with the key that its user types. ``describe``: what /chat/node.json says.
    """
    assets = load_assets()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        name = scope["path"].removeprefix("/chat").lstrip("/") or "chat.html"
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, "text/plain", b"method not allowed\n", [(b"allow", b"GET, HEAD")])
        elif name == "node.json":
            await _answer(send, 200, "application/json", json.dumps(describe()).encode())
        elif name in assets and name.startswith(("chat.", "page.", "icon.")):
            await _answer(send, 200, *assets[name])
        else:
            await _answer(send, 404, "text/plain", b"not found\n")

    return app


class _StatusPage:
    def __init__(self, view: NodeView, keys: tuple[str, ...]) -> None:
        self._view = view
        self._keys = [key.encode() for key in keys]
        self._assets = load_assets()
        self._viewers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if self._keys and not self._is_known(dict(scope["headers"]).get(b"authorization", b"")):
            scheme = [(b"www-authenticate", b'Basic realm="lloom status page: any name, an API key as password"')]
            await _answer(send, 401, "text/plain", b"the status page needs an API key\n", scheme)
        elif scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, "text/plain", b"the status page is read-only\n", [(b"allow", b"GET, HEAD")])
        elif path == "/snapshot.json":
            await _answer(send, 200, "application/json", _json(take_snapshot(self._view)))
        elif path == "/live" and scope["method"] == "GET":
            await self._live(receive, send)
        else:
            name = path.lstrip("/") or "status.html"
            if name in self._assets:
                await _answer(send, 200, *self._assets[name])
            else:
                await _answer(send, 404, "text/plain", b"not found\n")

    def _is_known(self, header: bytes) -> bool:
        scheme, _, value = header.partition(b" ")
        given = value.strip()
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return sum(hmac.compare_digest(given, key) for key in self._keys) > 0

    async def _live(self, receive: Receive, send: Send) -> None:
        if self._viewers >= MAX_VIEWERS:
            text = f"{MAX_VIEWERS} pages are open already; close one\n".encode()
            await _answer(send, 503, "text/plain", text, [(b"retry-after", b"10")])
            return
        self._viewers += 1
        try:
            with self._view.events.subscribe(kinds=(), history=True) as reader:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_cancel_at_disconnect, receive, nursery.cancel_scope)
                    headers = [(b"content-type", b"text/event-stream"), *_security()]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await self._relay(reader, send)
                    nursery.cancel_scope.cancel()
        finally:
            self._viewers -= 1

    async def _relay(self, reader: EventReader, send: Send) -> None:
        """Until the node ends, or the viewer takes nothing for ``WRITE_S``."""
        last, quiet_since = b"", trio.current_time()
        while True:
            lines = b""
            now_json = _json(take_snapshot(self._view))
            # What always changes is no news: compared without it.
            if _without_clock(now_json) != last:
                last = _without_clock(now_json)
                lines = b"event: snapshot\ndata: " + now_json + b"\n\n"
            while True:
                try:
                    lines += b"event: activity\ndata: " + _json(reader.receive_nowait().as_dict()) + b"\n\n"
                except trio.WouldBlock:
                    break
                except trio.EndOfChannel:
                    return
            now = trio.current_time()
            if not lines and now - quiet_since >= KEEP_ALIVE_S:
                lines = b":\n\n"
            if lines:
                quiet_since = now
                with trio.move_on_after(WRITE_S) as deadline:
                    await send({"type": "http.response.body", "body": lines, "more_body": True})
                if deadline.cancelled_caught:
                    return
            await trio.sleep(EVERY_S)


def _without_clock(snapshot: bytes) -> bytes:
    """The snapshot without its seconds, which run whether anything happens or not. Leases are renewed all the time, so
    theirs count only by their state.
    """
    document = json.loads(snapshot)
    document["status"]["uptime_s"] = 0
    for one in (*document["peers"], *document["executors"]):
        one["lease_left_s"] = None
    for one in document["status"]["network_status"]:
        one["age_s"] = 0
    return _json(document)


async def _cancel_at_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _security() -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]


async def _answer(
    send: Send, status: int, kind: str, body: bytes, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    length = (b"content-length", str(len(body)).encode())
    all_headers = [(b"content-type", kind.encode()), length, *_security(), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body})

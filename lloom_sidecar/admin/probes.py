"""The probes: a small ASGI app with /startupz, /livez, /readyz and /metrics, safe to show on any address.

Ready means that the node can be sent work (its API listens, p2pd answers, it is not draining), never that it has peers:
a cluster that restarts nodes for want of peers would make an outage worse.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from .metrics import CONTENT_TYPE
from .view import Check, ProbeView

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

_TEXT: Final = "text/plain; charset=utf-8"


def probe_app(view: ProbeView) -> AsgiApp:
    """The app. A probe answers 200 or 503; its body has a line for each check and says which one fails."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del receive  # no request here has a body that matters
        if scope["type"] != "http":
            raise RuntimeError(f"probes speak HTTP only, not {scope['type']}")
        status, kind, body = _answer(view, scope["method"], scope["path"])
        headers = [
            (b"content-type", kind.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        if status == 405:
            headers.append((b"allow", b"GET, HEAD"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    return app


def _answer(view: ProbeView, method: str, path: str) -> tuple[int, str, bytes]:
    if path not in ("/startupz", "/livez", "/readyz", "/metrics"):
        return 404, _TEXT, b"not found: there are /startupz, /livez, /readyz and /metrics\n"
    if method not in ("GET", "HEAD"):
        return 405, _TEXT, b"method not allowed\n"
    if path == "/metrics":
        return 200, CONTENT_TYPE, view.render_metrics()
    if path == "/livez":
        return _judge([Check(name="loop", ok=True, text="")])  # that it answers is the check
    return _judge(view.startup_checks() if path == "/startupz" else view.readiness_checks())


def _judge(checks: list[Check]) -> tuple[int, str, bytes]:
    lines = [f"[+] {one['name']} ok" if one["ok"] else f"[-] {one['name']} failed: {one['text']}" for one in checks]
    is_good = all(one["ok"] for one in checks)
    lines.append("passed" if is_good else "failed")
    return (200 if is_good else 503), _TEXT, ("\n".join(lines) + "\n").encode()

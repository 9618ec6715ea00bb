"""The node's HTTP listeners: opened before anything else, so that a busy port is found at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from lloom_sidecar.config import Config
from lloom_sidecar.errors import StartError
from lloom_sidecar.http.errors import CertificateError, ListenError
from lloom_sidecar.http.guard import OriginGuard, Refusal
from lloom_sidecar.http.limits import HttpLimits
from lloom_sidecar.http.listeners import Listener, open_tcp_listeners, open_unix_listener
from lloom_sidecar.http.server import Request, Response, serve
from lloom_sidecar.http.tls import ServerCertificate
from lloom_sidecar.page.assets import is_navigation

Handler = Callable[[Request, Response], Awaitable[None]]


@dataclass(slots=True)
class Listeners:
    """What is open; an empty list = that service is not wanted."""

    api: list[Listener] = field(default_factory=list)
    probe: list[Listener] = field(default_factory=list)
    admin: list[Listener] = field(default_factory=list)
    page: list[Listener] = field(default_factory=list)
    admin_tcp: list[Listener] = field(default_factory=list)
    """The admin API on a loopback address, behind a token."""
    api_certificate: ServerCertificate | None = None
    """What the API is served with; None = by plain http."""

    def close(self) -> None:
        """Close them all."""
        for listener in (*self.api, *self.probe, *self.admin, *self.page, *self.admin_tcp):
            listener.close()


async def open_listeners(config: Config) -> Listeners:
    """Open what the configuration wants.

    Raises StartError, one sentence, when an address is busy or cannot be used; nothing stays open then.
    """
    opened = Listeners()
    cert_file, key_file = config.api_tls_cert_file, config.api_tls_key_file
    if config.is_client and cert_file is not None and key_file is not None:
        try:
            opened.api_certificate = await trio.to_thread.run_sync(ServerCertificate, cert_file, key_file)
        except CertificateError as exc:
            raise StartError(f"the API cannot be served by TLS: {exc.message}") from exc
    flag = "--api"
    try:
        if config.is_client:
            opened.api = await open_tcp_listeners(config.api.host, config.api.port)
        flag = "--probe"
        if config.probe is not None:
            opened.probe = await open_tcp_listeners(config.probe.host, config.probe.port)
        flag = "--page"
        if config.page is not None:
            opened.page = await open_tcp_listeners(config.page.host, config.page.port)
        flag = "--admin"
        if config.admin is not None:
            opened.admin_tcp = await open_tcp_listeners(config.admin.host, config.admin.port)
        flag = "--home"
        opened.admin = [open_unix_listener(str(config.admin_socket))]
    except BaseException as exc:
        opened.close()
        if isinstance(exc, ListenError):
            raise StartError(f"{exc}: end whoever listens there, or choose another with {flag}") from exc
        raise
    return opened


async def serve_admin(listeners: list[Listener], handler: Handler) -> None:
    """Serve the admin API or the probes until cancelled: they answer while the node drains."""
    if listeners:
        await serve(listeners, handler)


async def serve_admin_tcp(listeners: list[Listener], handler: Handler) -> None:
    """Serve the admin API on TCP until cancelled. ``handler`` checks the token; browsers' pages are refused."""
    if listeners:
        # A form's content type is let in, as wget sends it: no page can send the token.
        await serve(listeners, handler, guard=OriginGuard(require_json=False).check)


async def serve_page(listeners: list[Listener], handler: Handler, config: Config) -> None:
    """Serve the status page until cancelled: it shows how the node drains."""
    if listeners:
        # On loopback the page asks for no key, whatever the API does, so there the Host must be checked in any case.
        needs_key = config.api_key_file is not None and config.page is not None and not config.page.is_loopback
        guard = OriginGuard(config.allowed_hosts, check_host=not needs_key)
        await serve(listeners, handler, guard=lambda request: _but_for_links(guard, request))


def _but_for_links(guard: OriginGuard, request: Request) -> Refusal | None:
    """What ``guard`` says, but a link or a typed address may lead to a page from anywhere."""
    refusal = guard.check(request)
    if refusal is not None and refusal.code == "cross_site":
        mode, destination = request.header("sec-fetch-mode"), request.header("sec-fetch-dest")
        if is_navigation(request.method, mode, destination):
            return None
    return refusal


async def serve_api(
    listeners: list[Listener],
    handler: Handler,
    chat: Handler,
    config: Config,
    on_refused: Callable[[str], None],
    shutdown: trio.Event,
    certificate: ServerCertificate | None = None,
) -> None:
    """Serve the OpenAI API, and ``chat`` under /chat, until ``shutdown``; what is under way then has the grace time."""
    guard = OriginGuard(config.allowed_hosts, config.allowed_origins, check_host=config.api_key_file is None)

    def check(request: Request) -> Refusal | None:
        refusal = _but_for_links(guard, request) if _is_chat(request) else guard.check(request)
        if refusal is not None:
            on_refused(refusal.code)
        return refusal

    async def route(request: Request, response: Response) -> None:
        await (chat if _is_chat(request) else handler)(request, response)

    await serve(
        listeners,
        route,
        limits=HttpLimits(max_body_bytes=config.max_body_bytes),
        guard=check,
        shutdown=shutdown,
        grace_s=config.grace_s,
        ssl_context=None if certificate is None else certificate.context,
    )


def _is_chat(request: Request) -> bool:
    path = request.path
    return path == "/chat" or path.startswith("/chat/")

"""Pure: who may use a listener from a browser's point of view.

A page from anywhere can make a browser send requests to 127.0.0.1. It cannot forge Host, Origin or Sec-Fetch-Site,
and without a preflight (which is never granted: no CORS header is ever sent) it cannot send ``application/json``.
Source: Fetch standard, "CORS-safelisted request-header" and "Origin header"; Fetch Metadata Request Headers (W3C);
DNS rebinding as in Ollama's CVE-2024-28224.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

_HOST: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]+)(?::([0-9]*))?")
MAX_HOST_CHARS: Final = 300
"""Longest Host that is looked at. Source: RFC 1035 section 2.3.4, 255 octets for a name, with a port and brackets."""
_METHODS_WITH_CONTENT: Final = frozenset({"POST", "PUT", "PATCH"})


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served."""

    status: int
    """HTTP status of the answer."""
    code: str
    """Stable identifier in the answer's ``error.code``."""
    message: str
    """One sentence, with the remedy where there is one."""


class RequestLike(Protocol):
    """What the guard looks at."""

    method: str
    """In capitals, as it came."""
    host: str
    """Authority that the request is for."""

    @property
    def scheme(self) -> str:
        """``http`` or ``https``."""
        ...

    @property
    def has_body(self) -> bool:
        """Whether a body is announced."""
        ...

    def header(self, name: str) -> str | None:
        """A header's value, or None."""
        ...


@lru_cache(maxsize=64)
def is_loopback_name(name: str) -> bool:
    """Whether ``name`` (without port; IPv6 in brackets) is localhost, in 127.0.0.0/8, or [::1]."""
    if name.lower() == "localhost" or name == "[::1]":
        return True
    try:
        return ipaddress.IPv4Address(name).is_loopback
    except ValueError:
        return False


class OriginGuard:
    """Checks Host, Origin, Sec-Fetch-Site and Content-Type; has no state."""

    def __init__(
        self,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        *,
        check_host: bool = True,
        require_json: bool = True,
    ) -> None:
        """``allowed_hosts``: ``name`` (any port) or ``name:port``, besides the loopback names. ``allowed_origins``:
        exact origins (``https://chat.example``). Both without regard to case. ``check_host`` False: any Host will do,
        as when a key is required. ``require_json``: a POST, PUT or PATCH with a body must be ``application/json``.
        """
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._origins = frozenset(origin.lower().rstrip("/") for origin in allowed_origins)
        self._check_host = check_host
        self._require_json = require_json

    def check(self, request: RequestLike) -> Refusal | None:
        """Why the request must not be served, or None."""
        host = request.host.lower()
        if self._check_host and not self._is_allowed_host(host):
            return Refusal(
                403,
                "host_not_allowed",
                "This Host is not served here. Use a loopback address, or start the node with --allowed-host.",
            )
        origin = request.header("origin")
        is_allowed_origin = False
        if origin is not None:
            origin = origin.lower()
            is_allowed_origin = origin in self._origins
            if not is_allowed_origin and (not host or origin != f"{request.scheme}://{host}"):
                return Refusal(
                    403, "origin_not_allowed", "Requests from this Origin are refused; see --allowed-origin."
                )
        site = request.header("sec-fetch-site")
        if site is not None and not is_allowed_origin and site.lower() not in ("same-origin", "none"):
            return Refusal(403, "cross_site", "Requests from pages of other sites are refused; see --allowed-origin.")
        if self._require_json and request.has_body and request.method in _METHODS_WITH_CONTENT:
            content_type = request.header("content-type") or ""
            if content_type.partition(";")[0].strip().lower() != "application/json":
                return Refusal(415, "content_type", "The body must be sent as Content-Type: application/json.")
        return None

    def _is_allowed_host(self, host: str) -> bool:
        if len(host) > MAX_HOST_CHARS:
            return False
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1]
        return is_loopback_name(name) or name in self._hosts or host in self._hosts

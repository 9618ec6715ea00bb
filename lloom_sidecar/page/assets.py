"""The pages' own files, with the headers that keep anything else out of them.

There is nothing from elsewhere: no CDN, no inline script, no frame round them. What peers say is text in them, never
markup (the scripts use ``textContent`` only), and the policy below holds should one forget.
Source: Content Security Policy Level 3 (W3C); Fetch Metadata Request Headers (W3C).
"""

from __future__ import annotations

from importlib import resources
from typing import Final

SECURITY_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}
"""Of every answer that a page needs."""
_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def load_assets() -> dict[str, tuple[str, bytes]]:
    """File name -> (content type, content) of everything in ``static/``, read once at the start."""
    found = {}
    for file in resources.files(__package__).joinpath("static").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _TYPES:
            found[file.name] = (_TYPES[suffix], file.read_bytes())
    return found


def is_navigation(method: str, mode: str | None, destination: str | None) -> bool:
    """Whether a browser asks for a page because somebody followed a link or typed its address.

    That may come from another site: it reads nothing back, and the page cannot be framed. ``mode`` and ``destination``:
    the headers Sec-Fetch-Mode and Sec-Fetch-Dest.
    """
    return method in ("GET", "HEAD") and mode == "navigate" and destination == "document"

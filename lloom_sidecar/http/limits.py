"""Bounds of the HTTP room: every buffer, count and wait has one, and a source."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

READ_BYTES: Final = 65_536
"""Most bytes that one read takes from a socket. Source: the size of a frame of the exchange protocol (PROTOCOL.md:
frames at most 64 KiB), so that a whole read fits one frame."""


def _check(limits: HttpLimits | ClientLimits) -> None:
    for field in fields(limits):
        value = getattr(limits, field.name)
        if not value > 0:
            raise ValueError(f"{field.name} must be greater than 0, it is {value!r}")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds of one server. Raises ValueError when a value is not greater than 0."""

    max_head_bytes: int = 65_536
    """Request line and headers together, with the blank line; also the trailers of a chunked request. Over it: 431.
    Source: twice the largest of Apache (8 KiB a line), nginx (32 KiB in all) and Node (16 KiB), because long bearer
    tokens and proxies' headers add up."""
    max_headers: int = 128
    """Header lines of a request. Over it: 431. Source: Apache's LimitRequestFields is 100."""
    max_body_bytes: int = 32 * 1024 * 1024
    """Request body, counted after the chunked coding is removed. Over it: 413. Source: the exchange protocol's body
    bound; a prompt with several images in base64 stays below it."""
    head_timeout_s: float = 10.0
    """Seconds from a head's first byte to its end, and for a TLS handshake. Over it: 408. Source: Go's advice for
    ReadHeaderTimeout and Apache's mod_reqtimeout give 10 to 20 s."""
    body_timeout_s: float = 60.0
    """Seconds between two reads of a body. Over it: 408. Source: nginx client_body_timeout."""
    idle_timeout_s: float = 75.0
    """Seconds that a connection may wait for a request's first byte. Source: nginx keepalive_timeout; longer than
    the pools of the usual clients keep a connection."""
    write_timeout_s: float = 60.0
    """Seconds for which a write may make no progress. Source: nginx send_timeout."""
    max_connections: int = 20_000
    """Connections at once; the next one is answered 503 and closed. Source: a file-descriptor limit of 65,536, the
    usual one of container engines, leaves room for the streams behind the requests."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Bounds of one client. Raises ValueError when a value is not greater than 0."""

    max_connections: int = 1024
    """Connections at once, idle ones included; further requests wait. Source: a backend's own limit of sequences at
    once is far lower (vLLM: 256 to 1024), so its queue, not this pool, is what requests wait in."""
    idle_s: float = 30.0
    """Seconds that an unused connection is kept. A server that closes earlier (uvicorn: 5 s) is noticed before the
    connection is used again. Source: httpx keeps 5 s, Go's http.Transport 90 s."""
    pool_timeout_s: float = 60.0
    """Seconds that a request waits for a connection. Source: longer than a request's own deadline makes no sense."""
    connect_timeout_s: float = 5.0
    """Seconds for name resolution, TCP or unix connect and TLS. Source: httpx's default; a backend is near."""
    write_timeout_s: float = 60.0
    """Seconds for which a write may make no progress. Source: as the server's."""
    first_byte_timeout_s: float = 600.0
    """Seconds from the request's last byte to the answer's head. Source: the OpenAI client's default timeout."""
    between_bytes_timeout_s: float = 120.0
    """Seconds between two reads of the answer. Source: the slowest gap seen between two tokens of a queued, preempted
    sequence is tens of seconds."""
    max_head_bytes: int = 65_536
    """Status line and headers together. Source: as the server's."""
    max_headers: int = 256
    """Header lines of an answer. Source: curl allows far more; a backend sends about 10."""

    def __post_init__(self) -> None:
        _check(self)

"""Errors of the HTTP room: who erred, the client of our server, the server we are a client of, or our own code.

Foreign exceptions (``OSError``, ``ssl.SSLError``, trio's resource errors, httptools' errors) are translated into these
once, at the edge where they arise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lloom_sidecar.errors import LloomError


class HttpServerError(LloomError):
    """Something went wrong on a connection that our server accepted."""

    code = "http_server"


class HttpUsageError(HttpServerError):
    """Our own code broke the rules of this room (two responses, a header with a line break): a bug of this node."""

    code = "http_usage"


class RequestRefusedError(HttpServerError):
    """The client's request is answered with an error status, and its connection is closed afterwards.

    ``http_status`` is the answer's status, ``code`` the machine-readable reason.
    """

    code = "bad_request"
    http_status = 400

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message, code=code, http_status=status)


class ClientDisconnectedError(HttpServerError):
    """The client closed or reset its connection, or stopped reading for longer than the limit."""

    code = "client_disconnected"
    http_status = 499


class CertificateError(HttpServerError):
    """A certificate or key file that cannot be served; the message is a sentence with the remedy."""

    code = "certificate"


class ListenError(OSError):
    """A listener could not be opened; the text names the address and the reason.

    ``errno`` is the operating system's where there was one.
    """


class HttpClientError(LloomError):
    """A request to a backend failed below HTTP's own statuses."""

    code = "http_client"
    http_status = 502
    retryable = True


class HttpConnectError(HttpClientError):
    """No connection: refused, unknown host, no such socket, TLS not agreed."""

    code = "http_connect"


class HttpTimeoutError(HttpClientError):
    """A deadline passed. ``phase``: connect, pool, write, first_byte or between_bytes."""

    code = "http_timeout"
    http_status = 504

    def __init__(self, message: str, *, phase: str) -> None:
        super().__init__(message)
        self.phase = phase


class RemoteClosedError(HttpClientError):
    """The connection ended before the answer's head was complete."""

    code = "http_remote_closed"


class BadResponseError(HttpClientError):
    """The answer's head is no valid HTTP/1.1, or larger than the limit."""

    code = "http_bad_response"


class IncompleteBodyError(HttpClientError):
    """The answer's body was cut, or its framing is broken. What was read before is not the whole body."""

    code = "http_incomplete_body"


class BodyTooLargeError(HttpClientError):
    """The answer's body is larger than the caller allows."""

    code = "http_body_too_large"


class SseError(HttpClientError):
    """A server-sent event is larger than the limit. The cutter that raised it stays broken."""

    code = "sse_event_too_large"


def error_body(
    status: int,
    message: str,
    type: str | None = None,  # noqa: A002 - the OpenAI API's name
    code: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """An error answer's JSON body in the OpenAI API's shape, UTF-8.

    ``type`` defaults to ``invalid_request_error`` below status 500 and ``server_error`` from there on. ``extra`` holds
    further members that stand beside ``error``'s own (``{"lloom": {...}}``); they never replace those.
    Source: OpenAI API reference, error codes: ``{"error": {"message", "type", "param", "code"}}``.
    """
    kind = type or ("invalid_request_error" if status < 500 else "server_error")
    error: dict[str, Any] = dict(extra) if extra else {}
    error.update(message=message, type=kind, code=code, param=None)
    return json.dumps({"error": error}, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")

"""The taxonomy of errors: one code an error, the same on the wire, in HTTP answers and in metrics.

Foreign exceptions are translated into these once, at the edge where they arise (``raise ... from exc``); above that
edge nobody looks at text. ``LloomError.code`` is stable: dashboards and clients may match on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class LloomError(Exception):
    """Base of every error that Lloom raises on purpose.

    ``message`` is a whole sentence for a person: what happened and, where one exists, what to do.
    It never holds a prompt, an answer or a key.
    """

    code: str = "internal"
    """Stable identifier, ``[a-z_]{1,40}``."""
    http_status: int = 500
    """Status that the OpenAI API answers with when this error reaches an application."""
    retryable: bool = False
    """True when the same request may succeed at another executor or later."""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        http_status: int | None = None,
        retryable: bool | None = None,
        retry_after_s: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code
        if http_status is not None:
            self.http_status = http_status
        if retryable is not None:
            self.retryable = retryable
        self.retry_after_s = retry_after_s
        """Seconds after which a retry makes sense; None = unknown."""
        self.details = details or {}

    def __str__(self) -> str:
        return self.message


class ConfigError(LloomError):
    """The configuration cannot be used. Raised at start only; lists every fault at once. Exit code 2."""

    code = "config"
    http_status = 500

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        """One sentence a fault."""
        super().__init__("\n".join(self.faults))


class StartError(LloomError):
    """The node could not start for a reason outside its configuration (busy port, missing binary). Exit code 1."""

    code = "start"


class DaemonError(LloomError):
    """p2pd failed us."""

    code = "daemon"
    http_status = 503
    retryable = True


class DaemonUnavailableError(DaemonError):
    """p2pd's control socket does not answer."""

    code = "daemon_unavailable"


class DaemonRejectedError(DaemonError):
    """p2pd answered ERROR to a control call; ``message`` holds its text."""

    code = "daemon_rejected"


class ProtocolError(LloomError):
    """The wire's rules were broken."""

    code = "protocol"


class LocalProtocolError(ProtocolError):
    """We broke the wire's rules: a bug of this node."""

    code = "local_protocol"
    http_status = 500


class RemoteProtocolError(ProtocolError):
    """The peer broke the wire's rules; its stream is reset and stays broken."""

    code = "remote_protocol"
    http_status = 502
    retryable = True


class PeerError(LloomError):
    """A peer could not do its part."""

    code = "peer"
    http_status = 502
    retryable = True


class PeerUnreachableError(PeerError):
    """No stream to the peer could be opened, or it ended without a word."""

    code = "peer_unreachable"


class PeerTimeoutError(PeerError):
    """The peer did not answer within the deadline."""

    code = "peer_timeout"
    http_status = 504


class PeerBusyError(PeerError):
    """The peer refused because it has no capacity now."""

    code = "peer_busy"
    http_status = 503


class StreamLostError(PeerError):
    """The stream ended after the answer began and before its END: the answer is cut."""

    code = "stream_lost"


class ReceiptError(PeerError):
    """The receipt in END does not fit what was asked or what was received."""

    code = "bad_receipt"


class RefusedError(PeerError):
    """The executor answered ERROR. ``code`` is the wire's code, ``body`` the backend's own error body if it had one."""

    code = "refused"

    def __init__(self, message: str, *, body: bytes | None = None, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.body = body


class RoutingError(LloomError):
    """No executor can be given this request."""

    code = "routing"
    http_status = 503


class UnknownModelError(RoutingError):
    """No executor of this network has offered the model."""

    code = "model_not_found"
    http_status = 404


class NoExecutorError(RoutingError):
    """The model is known, nobody can serve it now."""

    code = "no_executor"
    http_status = 503
    retryable = True


class PriceError(RoutingError):
    """Nobody offers the model under the price ceiling."""

    code = "price_ceiling"
    http_status = 402


class RequestError(LloomError):
    """The application's (or the client node's) request cannot be served as it is."""

    code = "invalid_request"
    http_status = 400


class BackendError(LloomError):
    """The LLM server behind an executor failed."""

    code = "backend"
    http_status = 502
    retryable = True


class BackendUnavailableError(BackendError):
    """The backend cannot be reached, or closed without a complete answer."""

    code = "backend_unavailable"


class BackendTimeoutError(BackendError):
    """The backend did not answer in time."""

    code = "backend_timeout"
    http_status = 504


class BackendRejectedError(BackendError):
    """The backend answered with an error status. 400, 413 and 422 pass through to the app; the others fail over."""

    code = "backend_rejected"

    def __init__(self, message: str, *, status: int, body: bytes = b"", **kwargs: Any) -> None:
        kwargs.setdefault("http_status", status)
        kwargs.setdefault("retryable", status not in PASS_THROUGH_STATUSES)
        super().__init__(message, **kwargs)
        self.status = status
        self.body = body


class AnnouncementError(LloomError):
    """An announcement that must not enter the peer book. Counted and dropped where it arose, never raised further."""

    code = "announcement"

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(message or reason)
        self.reason = reason
        """Short label for the counter: size, publisher, rate, envelope, signature, tag, clock, sequence, schema."""


PASS_THROUGH_STATUSES = frozenset({400, 413, 422})
"""Backend statuses that blame the request, not the executor: the app gets them as they are."""

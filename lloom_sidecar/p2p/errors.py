"""Errors that only p2pd's room raises; all are DaemonErrors, so that callers above may catch the family."""

from __future__ import annotations

from lloom_sidecar.errors import DaemonError, DaemonUnavailableError


class DaemonTimeoutError(DaemonUnavailableError):
    """p2pd did not answer a control call before its deadline."""

    code = "daemon_timeout"


class DaemonProtocolError(DaemonError):
    """What came over the control socket is not p2pd's protocol; that connection was closed."""

    code = "daemon_protocol"


class FrameTooLargeError(DaemonProtocolError):
    """A message's length prefix is over the limit; nothing of its body was read."""

    code = "daemon_frame_too_large"


class StreamClosedError(DaemonError):
    """The stream cannot be written: this side closed it, the far side did, or p2pd ended."""

    code = "stream_closed"


class SubscriptionClosedError(DaemonUnavailableError):
    """The subscription ended: p2pd closed it, or this side did."""

    code = "subscription_closed"


class InboundRefusedError(DaemonError):
    """An inbound stream was closed before any handler saw it."""

    code = "inbound_refused"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        """Short label for a counter: ``limit``, ``stream_info``, ``protocol`` or ``accept``."""

"""Cutting a byte stream into frames: a varint length, then that many bytes. Sans-IO."""

from __future__ import annotations

from typing import Final

from lloom_sidecar.errors import RemoteProtocolError

from .varint import decode_varint, encode_varint

MAX_FRAME_BYTES: Final = 64 * 1024
"""Largest frame on the request protocol, without its prefix. Source: PROTOCOL.md, Limits."""


class FrameCutter:
    """Feed it whatever was read; it gives back whole messages. Broken once means broken for good.

    Holds at most one incomplete message, so at most ``max_bytes`` plus what the last ``feed`` brought.
    """

    __slots__ = ("_broken", "_buffer", "_max_bytes")

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._buffer = b""
        self._max_bytes = max_bytes
        self._broken: str | None = None

    @property
    def has_partial(self) -> bool:
        """True when bytes of an incomplete message are held: EOF now is a truncation."""
        return bool(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that ``data`` completes, in order.

        Raises:
            RemoteProtocolError: code ``oversize`` (from the prefix alone) or ``bad_frame``; again on every later call.
        """
        if self._broken is not None:
            raise RemoteProtocolError(self._broken, code="bad_frame")
        buffer = self._buffer + data if self._buffer else data
        messages: list[bytes] = []
        start, size = 0, len(buffer)
        try:
            while start < size:
                length = buffer[start]
                if length < 0x80:
                    if length > self._max_bytes:
                        raise ValueError(f"length {length} is over the limit of {self._max_bytes}")
                    body = start + 1
                else:
                    decoded = decode_varint(buffer, start, self._max_bytes)
                    if decoded is None:
                        break
                    length, body = decoded
                end = body + length
                if end > size:
                    break
                messages.append(buffer[body:end])
                start = end
        except ValueError as exc:
            self._broken = f"a frame that cannot be read: {exc}"
            self._buffer = b""
            code = "oversize" if "over the limit" in str(exc) else "bad_frame"
            raise RemoteProtocolError(self._broken, code=code) from exc
        self._buffer = buffer[start:] if start else buffer
        return messages


def frame(message: bytes) -> bytes:
    """``message`` behind its length."""
    return encode_varint(len(message)) + message

"""The control protocol's framing, without IO: one protobuf message behind an unsigned varint length."""

from __future__ import annotations

from typing import Final

from lloom_sidecar.p2p.errors import DaemonProtocolError, FrameTooLargeError

MAX_FRAME_BYTES: Final = 4 * 1024 * 1024
"""Longest message either side accepts. Source: go-libp2p's network.MessageSizeMax, which p2pd's reader uses."""
_MAX_PREFIX_BYTES: Final = 5
"""A length under 4 MiB needs 4 bytes; the fifth allows for a writer that does not use the shortest form."""


def encode_frame(body: bytes, *, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """``body`` behind its length, ready for one send.

    Raises: FrameTooLargeError when the body is over ``max_bytes``.
    """
    if len(body) > max_bytes:
        raise FrameTooLargeError(f"a control message has at most {max_bytes} bytes, this one {len(body)}")
    prefix = bytearray()
    rest = len(body)
    while rest >= 0x80:
        prefix.append(rest & 0x7F | 0x80)
        rest >>= 7
    prefix.append(rest)
    return bytes(prefix) + body


class FrameReader:
    """Cuts received bytes into frames. Any cutting of the same bytes gives the same frames.

    After it raised, it raises the same error for ever: the connection behind it has to be closed.
    """

    def __init__(self, *, max_bytes: int = MAX_FRAME_BYTES) -> None:
        """``max_bytes``: longest body accepted, checked from the prefix before any of the body is kept."""
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._need: int | None = None
        self._fault: DaemonProtocolError | None = None

    def set_limit(self, max_bytes: int) -> None:
        """Another limit for the frames whose prefix has not been read yet."""
        self._max_bytes = max_bytes

    def feed(self, data: bytes) -> None:
        """Append received bytes. The owner calls ``next_frame`` until None before it feeds more."""
        self._buffer += data

    def next_frame(self) -> bytes | None:
        """The next whole body, or None when more bytes are needed.

        Raises: FrameTooLargeError from the prefix alone; DaemonProtocolError when the prefix is no length.
        """
        if self._fault is not None:
            raise self._fault
        if self._need is None:
            self._need = self._read_prefix()
        need = self._need
        if need is None or len(self._buffer) < need:
            return None
        body = bytes(memoryview(self._buffer)[:need])
        del self._buffer[:need]
        self._need = None
        return body

    def take_rest(self) -> bytes:
        """The bytes behind the last frame, which are not this protocol's any more (a stream's first bytes)."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    @property
    def is_empty(self) -> bool:
        """True between two frames with nothing buffered."""
        return self._need is None and not self._buffer

    def _read_prefix(self) -> int | None:
        value = 0
        for index, byte in enumerate(self._buffer[:_MAX_PREFIX_BYTES]):
            value |= (byte & 0x7F) << (7 * index)
            if value > self._max_bytes:
                allowed = self._max_bytes
                self._fail(FrameTooLargeError(f"a message of at least {value} bytes came, {allowed} are allowed"))
            if byte < 0x80:
                del self._buffer[: index + 1]
                return value
        if len(self._buffer) >= _MAX_PREFIX_BYTES:
            self._fail(DaemonProtocolError("a message's length prefix does not end within 5 bytes"))
        return None

    def _fail(self, fault: DaemonProtocolError) -> None:
        self._fault = fault
        self._buffer.clear()
        raise fault

"""Sans-IO: the chunked transfer coding, both ways of reading it.

``RequestDechunker`` (our server) knows exactly where a body ends, because a pipelined request may follow, and is
strict. ``ResponseDechunker`` (our client) is llhttp: 0.1 us a chunk against 1 us, which counts for streams of tokens.
Source: RFC 9112 section 7.1.
"""

from __future__ import annotations

import re
from typing import Final

import httptools

from lloom_sidecar.http.errors import IncompleteBodyError, RequestRefusedError
from lloom_sidecar.http.heads import are_clean_fields

MAX_CHUNK_LINE_BYTES: Final = 256
"""Longest chunk-size line, its extensions and CRLF included: nobody in the field uses extensions."""
MAX_EXCESS_BYTES: Final = 16_384
"""Framing that a body may carry beyond 16 bytes a chunk and two bytes a byte of content, so that one-byte chunks with
long extensions are no amplifier. Source: Go's net/http, CVE-2023-39326."""

_CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]*+)?\r\n")
_PRIMING_HEAD: Final = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class RequestDechunker:
    """Removes the chunked coding from one request body.

    ``feed`` until ``done``; ``rest`` then holds what follows the body. Its decisions do not depend on how the bytes
    are cut. After an error it must not be fed again.
    """

    __slots__ = ("_buffer", "_excess", "_left", "_max_body_bytes", "_parts", "_size", "_trailer_left", "done")

    def __init__(self, max_body_bytes: int, max_trailer_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._trailer_left = max_trailer_bytes
        self._buffer = bytearray()
        self._parts: list[bytes] = []
        self._size = 0
        self._left = -1  # content bytes of the chunk; -1 = a size line is next, -2 = CRLF after content, -3 = trailers
        self._excess = 0
        self.done = False

    @property
    def body(self) -> bytes:
        """The content decoded so far."""
        return b"".join(self._parts)

    @property
    def rest(self) -> bytes:
        """Bytes that were fed and do not belong to the body; empty before ``done``."""
        return bytes(self._buffer) if self.done else b""

    def feed(self, data: bytes) -> None:
        """Take in what was read.

        Raises RequestRefusedError: 400 for broken framing, 413 when the content is larger than the limit (from the
        size line alone), 431 when the trailers are.
        """
        buffer = self._buffer
        buffer += data
        pos = 0
        try:
            while not self.done:
                if self._left > 0:
                    part = bytes(buffer[pos : pos + self._left])
                    if not part:
                        return
                    self._parts.append(part)
                    pos += len(part)
                    self._left -= len(part)
                    if self._left:
                        return
                    self._left = -2
                elif self._left == -2:
                    if buffer[pos : pos + 2] != b"\r\n":
                        if len(buffer) - pos >= 2 or (len(buffer) > pos and buffer[pos] != 0x0D):
                            raise RequestRefusedError(400, "bad_request", "A chunk of the body does not end with CRLF.")
                        return
                    pos += 2
                    self._left = -1
                elif self._left == -1:
                    end = buffer.find(b"\n", pos, pos + MAX_CHUNK_LINE_BYTES)
                    if end < 0:
                        if len(buffer) - pos >= MAX_CHUNK_LINE_BYTES:
                            raise RequestRefusedError(400, "bad_request", "A chunk-size line of the body is too long.")
                        return
                    self._take_size(bytes(buffer[pos : end + 1]))
                    pos = end + 1
                else:
                    end = buffer.find(b"\n", pos, pos + self._trailer_left)
                    if end < 0:
                        if len(buffer) - pos >= self._trailer_left:
                            raise RequestRefusedError(431, "head_too_large", "The body's trailers are too large.")
                        return
                    self._take_trailer(bytes(buffer[pos : end + 1]))
                    pos = end + 1
        finally:
            del buffer[:pos]

    def _take_size(self, line: bytes) -> None:
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise RequestRefusedError(400, "bad_request", "A chunk-size line of the body is invalid.")
        size = int(match[1], 16)
        self._size += size
        if self._size > self._max_body_bytes:
            raise RequestRefusedError(413, "body_too_large", f"The body is over {self._max_body_bytes} bytes.")
        self._excess = max(0, self._excess + len(line) - 16 - 2 * size)
        if self._excess > MAX_EXCESS_BYTES:
            raise RequestRefusedError(400, "bad_request", "The body's chunk extensions are too long.")
        self._left = size or -3

    def _take_trailer(self, line: bytes) -> None:
        self._trailer_left -= len(line)
        if line == b"\r\n":
            self.done = True
        elif not are_clean_fields(line):
            raise RequestRefusedError(400, "bad_request", "The body's trailers are invalid.")


class ResponseDechunker:
    """Removes the chunked coding from one response body.

    After an error it stays broken: every further ``feed`` raises.
    """

    __slots__ = ("_broken", "_last_part", "_parser", "_parts", "_silent_bytes", "has_surplus", "on_body")

    MAX_SILENT_BYTES: Final = 65_536
    """Framing (extensions, trailers) that may arrive without any content between."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._last_part = -1  # parts that belong to the body; -1 = its end was not seen
        self._silent_bytes = 0
        self._broken = False
        self.has_surplus = False
        """More bytes than the body came: the connection must not be used again."""
        # The parser calls list.append itself: no Python frame per chunk.
        self.on_body = self._parts.append
        """Called by the parser."""
        self._parser = httptools.HttpResponseParser(self)
        self._parser.feed_data(_PRIMING_HEAD)

    @property
    def done(self) -> bool:
        """Whether the last chunk and the trailers were read."""
        return self._last_part >= 0

    def on_message_complete(self) -> None:
        """Called by the parser; what follows may look like a further answer, and never becomes content."""
        if self._last_part < 0:
            self._last_part = len(self._parts)

    def on_message_begin(self) -> None:
        """Called by the parser; a second time when bytes follow the body."""
        if self._last_part >= 0:
            self.has_surplus = True

    def feed(self, data: bytes) -> bytes:
        """Take in what was read, return the content in it (may be empty).

        Raises IncompleteBodyError when the framing is broken; content before the fault is then lost, as a cut body
        is no body.
        """
        if self._broken:
            raise IncompleteBodyError("The answer's chunked body is broken.")
        if self._last_part >= 0:
            self.has_surplus = self.has_surplus or bool(data)
            return b""
        parts = self._parts
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            if self._last_part < 0:
                self._broken = True
                raise IncompleteBodyError("The answer's chunked body is broken.") from exc
            self.has_surplus = True
        except httptools.HttpParserUpgrade:
            self.has_surplus = True
        if self._last_part >= 0:
            del parts[self._last_part :]
        if not parts:
            self._silent_bytes += len(data)
            if self._silent_bytes > self.MAX_SILENT_BYTES and self._last_part < 0:
                self._broken = True
                raise IncompleteBodyError("The answer's chunked body has too much framing without content.")
            return b""
        self._silent_bytes = 0
        content = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        return content

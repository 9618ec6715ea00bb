"""Sans-IO: cutting a stream of server-sent events into whole events, bytes untouched.

An event ends with a blank line. Lines end with LF, CRLF or CR, mixed as they like.
Source: WHATWG HTML, section 9.2.6 "Interpreting an event stream".

One choice: CR CR ends an event at once, so that nothing waits for a byte that may never come; an LF right behind it is
then a blank line of its own in front of the next event, which changes nothing for a reader. LF CR, on the other hand,
waits for the LF that belongs to it. So the cutting does not depend on how the bytes arrive.
"""

from __future__ import annotations

import re
from typing import Final

from lloom_sidecar.http.errors import SseError

MAX_EVENT_BYTES: Final = 1024 * 1024
"""Default bound of one event. Source: a chunk with full logprobs has tens of KiB, an event with a base64 image, as the
responses API sends, hundreds."""

_END: Final = re.compile(rb"\n\n|\n\r\n|\r\r|\n\r(?=[^\n])")
_END_IN_BLOCK: Final = re.compile(rb"\n\n|\n\r\n|\r\r|\n\r(?!\n)")
_LINE: Final = re.compile(rb"\r\n|\n|\r")
_TAIL_BYTES: Final = 3
_BOM: Final = b"\xef\xbb\xbf"


def last_boundary(buffer: bytes) -> int:
    """Bytes of ``buffer`` up to the end of the last whole event in it; 0 when it holds none."""
    if b"\r" not in buffer:
        end = buffer.rfind(b"\n\n") + 2
        if end < 2:
            return 0
        # Terminators pair up from the left: of three LFs the last begins the next event.
        start = end - 2
        while start and buffer[start - 1] == 0x0A:
            start -= 1
        return end - (end - start) % 2
    end = 0
    at = buffer.rfind(b"\r\n\r\n")
    if at > 0 and buffer[at - 1] not in b"\r\n":
        end = at + 4
    for match in _END.finditer(buffer, end):
        end = match.end()
    return end


def split_events(block: bytes) -> list[bytes]:
    """The events in ``block``, each with its terminator. It holds whole events only, as ``feed_block`` returns them."""
    carriage_returns = block.count(b"\r")
    if not carriage_returns:
        parts = block.split(b"\n\n")
        parts.pop()
        return [part + b"\n\n" for part in parts]
    if carriage_returns == block.count(b"\n") == block.count(b"\r\n"):
        parts = block.split(b"\r\n\r\n")
        parts.pop()
        return [part + b"\r\n\r\n" for part in parts]
    events = []
    start = 0
    for match in _END_IN_BLOCK.finditer(block):
        events.append(block[start : match.end()])
        start = match.end()
    return events


def data_of(event: bytes) -> bytes:
    """The event's data: its ``data`` fields joined by LF, without the last LF; b"" when it has none (a comment)."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[6:-2]
    if event.startswith(_BOM):
        event = event[3:]
    values = []
    for line in _LINE.split(event):
        if line.startswith(b"data:"):
            values.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif line == b"data":
            values.append(b"")
    return b"\n".join(values)


class SseCutter:
    """Keeps what is not a whole event yet. Every byte that was fed comes out once, in order: events, then ``rest``."""

    __slots__ = ("_broken", "_held", "_held_bytes", "_max_event_bytes", "_tail")

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._tail = b""
        self._max_event_bytes = max_event_bytes
        self._broken = False

    def feed(self, data: bytes) -> list[bytes]:
        """The events that ``data`` completes, each with its terminator.

        Raises SseError once an event is over the limit, whether complete or not; events in front of it are returned
        first, by the call that found it. It stays broken.
        """
        block = self._take(data)
        events = split_events(block)
        if len(block) > self._max_event_bytes:
            for i, event in enumerate(events):
                if len(event) > self._max_event_bytes:
                    self._broken = True
                    if i == 0:
                        self._fail()
                    return events[:i]
        if self._broken and not events:
            self._fail()
        return events

    def feed_block(self, data: bytes) -> bytes:
        """As ``feed``, with the events as one piece: ``data`` itself, not a copy, when it holds whole events only.

        Raises SseError as ``feed`` does.
        """
        block = self._take(data)
        if len(block) > self._max_event_bytes:
            kept = 0
            for event in split_events(block):
                if len(event) > self._max_event_bytes:
                    self._broken = True
                    block = block[:kept]
                    break
                kept += len(event)
        if self._broken and not block:
            self._fail()
        return block

    def rest(self) -> bytes:
        """What is held: the beginning of an event that never ended, when called at the stream's end."""
        return b"".join(self._held)

    def _take(self, data: bytes) -> bytes:
        """The whole events of what is held and ``data``; the remainder is held."""
        if self._broken:
            self._fail()
        # What is held has no boundary in it, so only its last bytes can be part of one.
        tail_bytes = len(self._tail)
        end = last_boundary(self._tail + data if tail_bytes else data) - tail_bytes
        if end == len(data):
            block = data
            rest = b""
        else:
            block = data[: max(end, 0)]
            rest = data[max(end, 0) :]
        # LF CR is a boundary only once the byte behind it is known: then it lies in front of ``data``.
        has_boundary = end > -tail_bytes
        if has_boundary:
            if self._held:
                held = b"".join(self._held)
                if end < 0:
                    block, rest = held[:end], held[end:] + data
                else:
                    block = held + block
                self._held.clear()
            self._held_bytes = 0
            self._tail = b""
        if rest:
            self._held.append(rest)
            self._held_bytes += len(rest)
            self._tail = (self._tail + rest)[-_TAIL_BYTES:]
            if self._held_bytes > self._max_event_bytes:
                self._broken = True
        return block

    def _fail(self) -> None:
        raise SseError(f"A server-sent event is larger than {self._max_event_bytes} bytes.")

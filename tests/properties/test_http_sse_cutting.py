"""The cutter: every byte comes out once and in order, and the cutting of the input changes nothing."""

from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from lloom_sidecar.http.errors import SseError
from lloom_sidecar.http.sse import SseCutter, data_of, last_boundary, split_events

STREAMS = st.lists(
    st.sampled_from([b"data: a", b"event: b", b"\n", b"\r", b"\r\n", b"\n\n", b"\r\n\r\n", b":", b"\xff"]), max_size=24
).map(b"".join)
_END = re.compile(rb"\n\n|\n\r\n|\r\r|\n\r(?=[^\n])")


def reference(data: bytes) -> tuple[list[bytes], bytes]:
    """The module's rule, written down a second time over the whole input."""
    events = []
    start = 0
    for match in _END.finditer(data):
        events.append(data[start : match.end()])
        start = match.end()
    return events, data[start:]


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


@settings(max_examples=250, deadline=None)
@given(STREAMS, st.lists(st.integers(0, 80), max_size=8))
def test_any_cutting_gives_the_same_events(data: bytes, cuts: list[int]) -> None:
    events, rest = reference(data)
    cutter, blocks = SseCutter(), SseCutter()
    got: list[bytes] = []
    block = b""
    for piece in pieces(data, cuts):
        got += cutter.feed(piece)
        block += blocks.feed_block(piece)
    assert (got, cutter.rest()) == (events, rest)
    assert (block, blocks.rest()) == (b"".join(events), rest)
    assert last_boundary(data) == len(data) - len(rest)
    assert split_events(block) == events


@settings(max_examples=150, deadline=None)
@given(STREAMS, st.lists(st.integers(0, 80), max_size=8), st.integers(1, 20))
def test_the_limit_does_not_depend_on_the_cutting(data: bytes, cuts: list[int], limit: int) -> None:
    def outcome(parts: list[bytes]) -> tuple[list[bytes], bool]:
        cutter = SseCutter(limit)
        got: list[bytes] = []
        try:
            for part in parts:
                got += cutter.feed(part)
            cutter.feed(b"")
        except SseError:
            return got, True
        return got, False

    assert outcome(pieces(data, cuts)) == outcome([data])


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60))
def test_data_of_takes_anything(event: bytes) -> None:
    lines = re.split(rb"\r\n|\n|\r", event.removeprefix(b"\xef\xbb\xbf"))
    assert data_of(event).count(b"\n") <= len(lines)

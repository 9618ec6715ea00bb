"""Server-sent events are cut where they end, and no byte is changed."""

from __future__ import annotations

import pytest

from lloom_sidecar.http.errors import SseError
from lloom_sidecar.http.sse import SseCutter, data_of, last_boundary, split_events


def test_a_read_of_whole_events_is_not_copied() -> None:
    data = b"data: a\n\ndata: b\n\n"
    assert SseCutter().feed_block(data) is data


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n"])
def test_every_terminator(end: bytes) -> None:
    cutter = SseCutter()
    assert cutter.feed(b"data: a" + end + b"data: b" + end + b"rest") == [b"data: a" + end, b"data: b" + end]
    assert cutter.rest() == b"rest"


def test_lf_cr_waits_for_its_lf() -> None:
    cutter = SseCutter()
    assert cutter.feed(b"a\r\n\r") == []
    assert cutter.feed(b"\nb") == [b"a\r\n\r\n"]
    assert cutter.rest() == b"b"


def test_lf_cr_alone_ends_an_event_once_the_next_byte_is_known() -> None:
    cutter = SseCutter()
    assert cutter.feed(b"a\n\r") == []
    assert cutter.feed(b"b") == [b"a\n\r"]
    assert cutter.feed_block(b"\n\n") == b"b\n\n"
    assert cutter.rest() == b""


def test_cr_cr_does_not_wait() -> None:
    assert SseCutter().feed(b"a\r\r") == [b"a\r\r"]


@pytest.mark.parametrize(
    ("buffer", "boundary"),
    [(b"", 0), (b"a\n", 0), (b"a\n\n", 3), (b"a\n\nb", 3), (b"a\n\n\n", 3), (b"a\n\n\n\n", 5), (b"a\r\n\r\n\r\n", 5),
     (b"a\r\n\r\nb\r\n\r\nc", 10), (b"\n\n", 2)],
)  # fmt: skip
def test_last_boundary(buffer: bytes, boundary: int) -> None:
    assert last_boundary(buffer) == boundary


def test_split_events() -> None:
    assert split_events(b"a\n\nb\n\n") == [b"a\n\n", b"b\n\n"]
    assert split_events(b"a\r\n\r\nb\r\n\r\n") == [b"a\r\n\r\n", b"b\r\n\r\n"]


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: {}\n\n", b"{}"),
        (b"data:{}\r\n\r\n", b"{}"),
        (b"event: x\ndata: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\rdata:  b\r\r", b"a\n b"),
        (b"data\n\n", b""),
        (b": comment\n\n", b""),
        (b"database: x\n\n", b""),
        (b"\xef\xbb\xbfdata: a\n\n", b"a"),
    ],
)
def test_data_of(event: bytes, data: bytes) -> None:
    assert data_of(event) == data


def test_a_held_event_over_the_limit_breaks_the_cutter() -> None:
    cutter = SseCutter(max_event_bytes=8)
    assert cutter.feed(b"a\n\n12345678") == [b"a\n\n"]
    with pytest.raises(SseError):
        cutter.feed(b"9")
    with pytest.raises(SseError):
        cutter.feed(b"\n\n")


@pytest.mark.parametrize("method", ["feed", "feed_block"])
def test_a_whole_event_over_the_limit_breaks_the_cutter_behind_the_good_ones(method: str) -> None:
    cutter = SseCutter(max_event_bytes=8)
    out = getattr(cutter, method)(b"a\n\n1234567\n\n")
    assert out == ([b"a\n\n"] if method == "feed" else b"a\n\n")
    with pytest.raises(SseError):
        getattr(cutter, method)(b"a\n\n")
    with pytest.raises(SseError):
        getattr(SseCutter(8), method)(b"1234567\n\n")

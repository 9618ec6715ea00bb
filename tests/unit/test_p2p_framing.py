"""The control protocol's framing: any cutting, limits from the prefix, broken for good."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lloom_sidecar.p2p.errors import DaemonProtocolError, FrameTooLargeError
from lloom_sidecar.p2p.framing import MAX_FRAME_BYTES, FrameReader, encode_frame

BODIES = st.lists(st.binary(max_size=300), max_size=6)


def feed_cut(reader: FrameReader, data: bytes, cuts: list[int]) -> list[bytes]:
    frames = []
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in pairwise(edges):
        reader.feed(data[start:end])
        while (body := reader.next_frame()) is not None:
            frames.append(body)
    return frames


@given(bodies=BODIES, cuts=st.lists(st.integers(min_value=0), max_size=20))
def test_any_cutting_gives_the_same_frames(bodies: list[bytes], cuts: list[int]) -> None:
    reader = FrameReader()
    assert feed_cut(reader, b"".join(map(encode_frame, bodies)), cuts) == bodies
    assert reader.is_empty


@given(bodies=BODIES, rest=st.binary(max_size=50))
def test_byte_by_byte_and_what_follows_is_kept(bodies: list[bytes], rest: bytes) -> None:
    reader = FrameReader()
    frames = []
    for byte in b"".join(map(encode_frame, bodies)):
        reader.feed(bytes([byte]))
        if (body := reader.next_frame()) is not None:
            frames.append(body)
    reader.feed(rest)
    assert frames == bodies
    assert reader.take_rest() == rest


@given(limit=st.integers(0, 5000), over=st.integers(1, 2**34))
def test_oversize_is_refused_from_the_prefix_alone_and_for_ever(limit: int, over: int) -> None:
    reader = FrameReader(max_bytes=limit)
    size = limit + over
    prefix = bytearray()
    while size >= 0x80:
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    reader.feed(bytes([*prefix, size]))
    with pytest.raises(FrameTooLargeError):
        reader.next_frame()
    reader.feed(encode_frame(b""))
    with pytest.raises(FrameTooLargeError):
        reader.next_frame()


@given(st.binary(max_size=200))
def test_garbage_raises_only_the_protocol_error(data: bytes) -> None:
    reader = FrameReader(max_bytes=100)
    reader.feed(data)
    try:
        while reader.next_frame() is not None:
            pass
    except DaemonProtocolError as fault:
        with pytest.raises(type(fault)):
            reader.next_frame()


def test_a_prefix_without_an_end_is_refused() -> None:
    reader = FrameReader()
    reader.feed(b"\x80\x80\x80\x80")
    assert reader.next_frame() is None
    reader.feed(b"\x80")
    with pytest.raises(DaemonProtocolError, match="does not end"):
        reader.next_frame()


def test_a_prefix_longer_than_needed_is_understood() -> None:
    reader = FrameReader()
    reader.feed(b"\x81\x80\x00x")
    assert reader.next_frame() == b"x"


def test_the_limit_itself_passes_and_one_more_does_not() -> None:
    assert len(encode_frame(bytes(MAX_FRAME_BYTES))) == MAX_FRAME_BYTES + 4
    with pytest.raises(FrameTooLargeError):
        encode_frame(bytes(MAX_FRAME_BYTES + 1))


def test_a_new_limit_counts_for_the_next_prefix() -> None:
    reader = FrameReader(max_bytes=10)
    reader.feed(encode_frame(bytes(5)))
    assert reader.next_frame() == bytes(5)
    reader.set_limit(4)
    reader.feed(encode_frame(bytes(5)))
    with pytest.raises(FrameTooLargeError):
        reader.next_frame()

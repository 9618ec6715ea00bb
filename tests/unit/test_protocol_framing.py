"""Varints and frames."""

from __future__ import annotations

import pytest

from lloom_sidecar.errors import RemoteProtocolError
from lloom_sidecar.protocol.framing import MAX_FRAME_BYTES, FrameCutter, frame
from lloom_sidecar.protocol.varint import decode_varint, encode_varint


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (2**63 - 1, "ffffffffffffffff7f")],
)
def test_a_varint_is_that_of_the_specification(value: int, encoded: str) -> None:
    assert encode_varint(value).hex() == encoded
    assert decode_varint(bytes.fromhex("aa" + encoded), 1, 2**63) == (value, 1 + len(encoded) // 2)


@pytest.mark.parametrize("data", ["", "80", "ffff"])
def test_an_incomplete_varint_waits(data: str) -> None:
    assert decode_varint(bytes.fromhex(data), 0, 2**63) is None


@pytest.mark.parametrize(
    ("data", "limit", "message"),
    [
        ("8100", 1000, "not minimally encoded"),
        ("80" * 9, 1000, "longer than 9 bytes"),
        ("ff" * 9 + "01", 2**70, "longer than 9 bytes"),
        ("e907", 1000, "over the limit"),
        ("ff7f80", 1000, "over the limit"),
    ],
)
def test_a_varint_that_cannot_be_one_is_refused_at_once(data: str, limit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_varint(bytes.fromhex(data), 0, limit)


def test_frames_come_out_whole_however_they_came_in() -> None:
    cutter = FrameCutter()
    assert cutter.feed(frame(b"one") + frame(b"") + frame(b"three")[:2]) == [b"one", b""]
    assert cutter.has_partial
    assert cutter.feed(b"hr") == []
    assert cutter.feed(b"ee") == [b"three"]
    assert not cutter.has_partial


def test_a_length_prefix_may_be_cut() -> None:
    cutter = FrameCutter()
    data = frame(b"x" * 300)
    assert cutter.feed(data[:1]) == []
    assert cutter.feed(data[1:]) == [b"x" * 300]


@pytest.mark.parametrize("limit", [100, MAX_FRAME_BYTES])
def test_the_largest_frame_passes_and_one_more_byte_is_refused_from_the_prefix(limit: int) -> None:
    assert FrameCutter(limit).feed(frame(b"x" * limit)) == [b"x" * limit]
    cutter = FrameCutter(limit)
    with pytest.raises(RemoteProtocolError, match="over the limit") as caught:
        cutter.feed(encode_varint(limit + 1))
    assert caught.value.code == "oversize"
    assert not cutter.has_partial


def test_a_broken_cutter_stays_broken() -> None:
    cutter = FrameCutter()
    for data in (b"\x80\x00", b"", frame(b"fine")):
        with pytest.raises(RemoteProtocolError, match="not minimally encoded") as caught:
            cutter.feed(data)
        assert caught.value.code == "bad_frame"

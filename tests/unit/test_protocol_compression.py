"""Compressed bodies: what is not exactly one whole frame of the stated size is refused, and unpacked no further."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable

import pytest
from backports import zstd

from lloom_sidecar.errors import RemoteProtocolError, RequestError
from lloom_sidecar.protocol.compression import (
    MAX_WINDOW_LOG,
    Decoder,
    Encoder,
    SizedDecoder,
    compress,
    decompress,
)
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

TEXT = b"The quick brown fox. " * 400 + os.urandom(300)
PACK: dict[pb.Encoding, Callable[[bytes], bytes]] = {pb.ENCODING_ZSTD: zstd.compress, pb.ENCODING_GZIP: gzip.compress}
EACH = pytest.mark.parametrize("encoding", PACK)


@EACH
class TestWhole:
    def test_comes_back_within_its_limit(self, encoding: pb.Encoding) -> None:
        packed = PACK[encoding](TEXT)
        assert decompress(packed, encoding, len(TEXT)) == TEXT
        with pytest.raises(RequestError) as caught:
            decompress(packed, encoding, len(TEXT) - 1)
        assert (caught.value.code, caught.value.http_status) == ("body_too_large", 413)

    def test_a_bomb_is_refused_without_being_unpacked(self, encoding: pb.Encoding) -> None:
        bomb = PACK[encoding](bytes(1 << 28))
        with pytest.raises(RequestError, match="over 1000 bytes"):
            decompress(bomb, encoding, 1000)
        decoder = Decoder(encoding)
        assert [len(decoder.decode(data, 1000)) for data in (bomb, b"", b"")] == [1000] * 3

    @pytest.mark.parametrize(
        "change",
        [lambda p: p[:-1], lambda p: p[:10], lambda p: b"", lambda p: p + b"x", lambda p: p + p, lambda p: b"{}" + p],
    )
    def test_anything_else_is_refused(self, encoding: pb.Encoding, change: Callable[[bytes], bytes]) -> None:
        with pytest.raises(RequestError) as caught:
            decompress(change(PACK[encoding](TEXT)), encoding, 1 << 20)
        assert (caught.value.code, caught.value.http_status) == ("bad_encoding", 400)

    def test_bytes_behind_the_end_that_come_later(self, encoding: pb.Encoding) -> None:
        decoder = Decoder(encoding)
        assert decoder.decode(PACK[encoding](b"x"), 10) == b"x"
        decoder.finish()
        assert decoder.decode(b"", 10) == b""
        with pytest.raises(RemoteProtocolError, match="behind its end"):
            decoder.decode(b"x", 10)


@EACH
class TestSized:
    @pytest.mark.parametrize("step", [1, 100, 1 << 20])
    def test_comes_back_however_it_is_cut(self, encoding: pb.Encoding, step: int) -> None:
        packed = PACK[encoding](TEXT)
        decoder = SizedDecoder(encoding, len(TEXT))
        assert b"".join(decoder.feed(packed[i : i + step]) for i in range(0, len(packed), step)) == TEXT
        decoder.finish()

    def test_longer_than_was_said(self, encoding: pb.Encoding) -> None:
        with pytest.raises(RemoteProtocolError, match="longer") as caught:
            SizedDecoder(encoding, len(TEXT) - 1).feed(PACK[encoding](TEXT))
        assert caught.value.code == "bad_encoding"

    def test_shorter_than_was_said(self, encoding: pb.Encoding) -> None:
        decoder = SizedDecoder(encoding, len(TEXT) + 1)
        decoder.feed(PACK[encoding](TEXT))
        with pytest.raises(RemoteProtocolError, match="shorter"):
            decoder.finish()

    def test_cut(self, encoding: pb.Encoding) -> None:
        decoder = SizedDecoder(encoding, len(TEXT))
        decoder.feed(PACK[encoding](TEXT)[:-1])
        with pytest.raises(RemoteProtocolError, match="middle"):
            decoder.finish()


def test_an_unknown_encoding() -> None:
    for encoding in (pb.ENCODING_IDENTITY, 9):
        with pytest.raises(RemoteProtocolError, match="does not know"):
            Decoder(encoding)


def test_a_window_over_8_mib_is_refused() -> None:
    options = {int(zstd.CompressionParameter.window_log): MAX_WINDOW_LOG + 1}
    compressor = zstd.ZstdCompressor(options=options)
    packed = compressor.compress(os.urandom(100), zstd.ZstdCompressor.FLUSH_BLOCK)
    with pytest.raises(RemoteProtocolError, match="decompressed"):
        Decoder(pb.ENCODING_ZSTD).decode(packed, 1000)


def test_a_frame_that_is_skipped_is_no_content() -> None:
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    with pytest.raises(RequestError):
        decompress(skippable + compress(b"x"), pb.ENCODING_ZSTD, 10)


def test_what_we_send() -> None:
    assert zstd.decompress(compress(TEXT)) == TEXT
    assert zlib.decompress(PACK[pb.ENCODING_GZIP](TEXT), 31) == TEXT


def test_each_piece_of_a_stream_can_be_read_when_it_comes() -> None:
    encoder, decoder = Encoder(), Decoder(pb.ENCODING_ZSTD)
    event = b'data: {"choices":[{"delta":{"content":"word"}}]}\n\n'
    sizes = []
    for _ in range(100):
        packed = encoder.encode(event)
        sizes.append(len(packed))
        assert decoder.decode(packed, 1 << 20) == event
    assert decoder.decode(encoder.finish(), 1) == b""
    decoder.finish()
    assert sum(sizes) < 30 * len(sizes)

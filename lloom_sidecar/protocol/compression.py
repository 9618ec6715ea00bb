"""Compressed request bodies and answers: one zstd frame or one gzip member, decoded in bounded pieces. Sans-IO.

Whoever states the feature ``compression`` in hello takes both encodings; this node sends zstd. Measured on chat JSON
(one core of a busy x86 machine, CPU time, medians of 5), zstd at level 1::

    bytes      compressed   zstd -> µs   back µs   gzip -1 -> µs   back µs
    2,048      618          6            11        54              5
    65,536     25,636       139          57        567             102
    262,144    40,664       248          102       2,262           756

So zstd pays for whole bodies and documents from 1 KiB on wherever the path is slower than about a Gbit/s, and gzip is
for peers that have nothing else. One flushed zstd block for each server-sent event costs 1.1 µs and 0.3 back and makes
193 bytes 15; but each such stream keeps its windows, at full speed they cost it a tenth (64 KiB: 0.2 ms), and an
answer at reading speed is 10 KB/s without them: streams go compressed only by setting.
Source: RFC 8878 (zstd), RFC 1952 (gzip); PROTOCOL.md, Compression.
"""

from __future__ import annotations

import zlib
from typing import Final

from backports import zstd

from lloom_sidecar.errors import RemoteProtocolError, RequestError

from .pb import lloom_pb2 as pb

MIN_BYTES: Final = 1024
"""A body or document that is shorter goes as it is."""
LEVEL: Final = 1
STREAM_WINDOW_LOG: Final = 15
"""Window of a compressed stream, 32 KiB: two hundred events back is far enough, and a thousand streams stay cheap."""
MAX_WINDOW_LOG: Final = 23
"""Largest zstd window that is taken, 8 MiB. Source: RFC 8878, section 3.1.1.1.2, what every decoder should support."""
PIECE_BYTES: Final = 256 * 1024
"""Most that one piece of an answer has when it is decompressed."""
IN_THREAD_BYTES: Final = 256 * 1024
"""What is larger is compressed in a thread: at 1 µs per KiB it would hold up the others."""
_GZIP_WINDOW: Final = 31
"""zlib's ``wbits`` for a gzip member with the largest window."""


def compress(data: bytes) -> bytes:
    """``data`` as one zstd frame."""
    return zstd.compress(data, level=LEVEL)


class Encoder:
    """Compresses a streamed answer to one zstd frame, so that each piece can be read when it arrives."""

    def __init__(self) -> None:
        self._zstd = zstd.ZstdCompressor(
            options={
                zstd.CompressionParameter.compression_level: LEVEL,
                zstd.CompressionParameter.window_log: STREAM_WINDOW_LOG,
            }
        )

    def encode(self, data: bytes) -> bytes:
        """``data`` and all that was before it can be decompressed from what this returns."""
        return self._zstd.compress(data, zstd.ZstdCompressor.FLUSH_BLOCK)

    def finish(self) -> bytes:
        """The end of the frame."""
        return self._zstd.flush()


class Decoder:
    """Decompresses one zstd frame or gzip member as its bytes arrive, never more than it is asked for.

    Raises RemoteProtocolError ``bad_encoding``, here and in the methods, for an encoding that is not known, bytes that
    are not what it says, bytes behind its end, and (``finish``) an end that did not come.
    """

    def __init__(self, encoding: int) -> None:
        self._zstd: zstd.ZstdDecompressor | None = None
        if encoding == pb.ENCODING_ZSTD:
            self._zstd = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: MAX_WINDOW_LOG})
        elif encoding == pb.ENCODING_GZIP:
            self._zlib = zlib.decompressobj(_GZIP_WINDOW)
        else:
            raise _fault("is in an encoding that this version does not know")

    def decode(self, data: bytes, max_bytes: int) -> bytes:
        """Take ``data`` and return at most ``max_bytes`` (1 or more); call again with ``b""`` until nothing comes.

        What is not returned yet stays compressed.
        """
        try:
            if self._zstd is not None:
                return self._decode_zstd(self._zstd, data, max_bytes)
            return self._decode_gzip(data, max_bytes)
        except (zstd.ZstdError, zlib.error) as exc:
            raise _fault("cannot be decompressed") from exc

    def finish(self) -> None:
        """All bytes were given and all was taken out."""
        if not (self._zlib if self._zstd is None else self._zstd).eof:
            raise _fault("ends in the middle")

    def _decode_zstd(self, decoder: zstd.ZstdDecompressor, data: bytes, max_bytes: int) -> bytes:
        if decoder.eof:
            _refuse_rest(data)
            return b""
        out = decoder.decompress(data, max_bytes) if data or not decoder.needs_input else b""
        _refuse_rest(decoder.unused_data)
        return out

    def _decode_gzip(self, data: bytes, max_bytes: int) -> bytes:
        decoder = self._zlib
        if decoder.eof:
            _refuse_rest(data)
            return b""
        out = decoder.decompress(decoder.unconsumed_tail + data, max_bytes)
        _refuse_rest(decoder.unused_data)
        return out


class SizedDecoder:
    """A decoder for content whose size was stated before: not a byte more is decompressed.

    Args (of the constructor):
        size: bytes of the content, 1 or more.
    """

    def __init__(self, encoding: int, size: int) -> None:
        self._decoder = Decoder(encoding)
        self._left = size

    def feed(self, data: bytes) -> bytes:
        """What ``data`` brings. Raises RemoteProtocolError ``bad_encoding``, as ``Decoder`` and when it is too much."""
        out = self._decoder.decode(data, self._left + 1)
        self._left -= len(out)
        if self._left < 0:
            raise _fault("is longer than was said")
        return out

    def finish(self) -> None:
        """All bytes were given. Raises RemoteProtocolError ``bad_encoding`` when that is not all of the content."""
        self._decoder.finish()
        if self._left:
            raise _fault("is shorter than was said")


def decompress(data: bytes, encoding: int, max_bytes: int) -> bytes:
    """The whole of ``data``, if it is at most ``max_bytes``.

    Raises:
        RequestError: ``body_too_large``, 413, found without decompressing what is over it; ``bad_encoding``, 400.
    """
    try:
        decoder = Decoder(encoding)
        out = decoder.decode(data, max_bytes + 1)
        if len(out) > max_bytes:
            raise RequestError(
                f"the body has over {max_bytes} bytes when it is decompressed", code="body_too_large", http_status=413
            )
        decoder.finish()
    except RemoteProtocolError as exc:
        raise RequestError(exc.message, code=exc.code) from exc
    return out


def _refuse_rest(rest: bytes) -> None:
    if rest:
        raise _fault("goes on behind its end")


def _fault(what: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"what was sent compressed {what}", code="bad_encoding")

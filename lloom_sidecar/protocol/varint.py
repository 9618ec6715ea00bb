"""Unsigned varints, the length prefix of every frame. Source: https://github.com/multiformats/unsigned-varint"""

from __future__ import annotations

from typing import Final

MAX_VARINT_BYTES: Final = 9
"""Longest legal varint: 63 bits. Source: the multiformats unsigned-varint spec."""


def encode_varint(value: int) -> bytes:
    """``value`` (0 to 2**63 - 1) as 1 to 9 bytes."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode_varint(data: bytes | bytearray | memoryview, start: int, limit: int) -> tuple[int, int] | None:
    """Read one varint at ``start``: (value, index after it), or None when more bytes are needed.

    Raises ValueError as soon as the bytes read so far show a value over ``limit``, a varint over 9 bytes or a
    non-minimal one, so that an oversize message is refused from its prefix alone.
    """
    value = 0
    shift = 0
    for index in range(start, len(data)):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if value > limit:
            raise ValueError(f"length {value} is over the limit of {limit}")
        if byte < 0x80:
            if byte == 0 and shift:
                raise ValueError("length is not minimally encoded")
            return value, index + 1
        shift += 7
        if shift >= 7 * MAX_VARINT_BYTES:
            raise ValueError("length is longer than 9 bytes")
    return None

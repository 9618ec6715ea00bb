"""Asking a libp2p TCP listener which security protocols it would speak, without speaking one.

multistream-select: both sides say its name; each further line is a protocol, answered by the same line (it will be
spoken) or ``na``. Every line is ``<varint length><text>\\n``.
Source: https://github.com/multiformats/multistream-select
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio

from lloom_sidecar.errors import PeerUnreachableError, RemoteProtocolError
from lloom_sidecar.protocol.framing import FrameCutter, frame

MULTISTREAM: Final = b"/multistream/1.0.0\n"
NOT_AVAILABLE: Final = b"na\n"
MAX_LINE_BYTES: Final = 1024
DIALOGUE_TIMEOUT_S: Final = 5.0

PLAINTEXT: Final = ("/plaintext/2.0.0", "/plaintext/1.0.0")
NOISE: Final = "/noise"


async def accepted_security(
    host: str, port: int, protocols: Sequence[str] = (*PLAINTEXT, NOISE), *, timeout_s: float = DIALOGUE_TIMEOUT_S
) -> frozenset[str]:
    """Those of ``protocols`` that the listener would speak; each is asked on a connection of its own.

    Raises PeerUnreachableError (nobody listens, or says nothing) and RemoteProtocolError (it is no libp2p listener).
    """
    return frozenset([one for one in protocols if await _accepts(host, port, one, timeout_s)])


async def _accepts(host: str, port: int, protocol: str, timeout_s: float) -> bool:
    wanted = protocol.encode() + b"\n"
    lines: list[bytes] = []
    cutter = FrameCutter(MAX_LINE_BYTES)
    try:
        with trio.fail_after(timeout_s):
            async with await trio.open_tcp_stream(host, port) as stream:
                await stream.send_all(frame(MULTISTREAM) + frame(wanted))
                while len(lines) < 2:
                    data = await stream.receive_some(4096)
                    if not data:
                        raise PeerUnreachableError("it closed the connection without an answer")
                    lines += cutter.feed(data)
    except trio.TooSlowError as exc:
        raise PeerUnreachableError(f"no answer within {timeout_s:g} s") from exc
    except trio.BrokenResourceError as exc:
        raise PeerUnreachableError("the connection broke") from exc
    except OSError as exc:
        raise PeerUnreachableError("nobody listens there, or it cannot be reached") from exc
    if lines[0] != MULTISTREAM or lines[1] not in (wanted, NOT_AVAILABLE):
        raise RemoteProtocolError("it does not speak multistream-select")
    return lines[1] == wanted

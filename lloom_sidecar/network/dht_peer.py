"""Asking one peer which provider records it holds itself, over a stream of the Kademlia protocol."""

from __future__ import annotations

from typing import Final

import trio

from lloom_sidecar.errors import DaemonError, PeerTimeoutError, PeerUnreachableError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.protocol.framing import FrameCutter
from lloom_sidecar.protocol.kad import MAX_ANSWER_BYTES, Provider, providers_query, read_providers
from lloom_sidecar.protocol.names import PROTOCOL_KAD

ASK_TIMEOUT_S: Final = 10.0


async def ask_providers(
    daemon: Daemon, peer: PeerId, multihash: bytes, *, timeout_s: float = ASK_TIMEOUT_S
) -> list[Provider]:
    """The providers of a key that ``peer`` holds records of.

    Raises:
        PeerUnreachableError: it cannot be dialled, or takes no part in the DHT (a DHT client).
        PeerTimeoutError: no answer within ``timeout_s``.
        RemoteProtocolError: its answer cannot be read.
        DaemonUnavailableError: p2pd does not answer.
    """
    try:
        with trio.fail_after(timeout_s):
            stream = await daemon.open_stream(peer, PROTOCOL_KAD, timeout_s=timeout_s)
            try:
                await stream.send_all(providers_query(multihash))
                cutter = FrameCutter(MAX_ANSWER_BYTES)
                while data := await stream.receive_some():
                    for message in cutter.feed(data):
                        return read_providers(message)
            finally:
                stream.close()
    except trio.TooSlowError as exc:
        raise PeerTimeoutError(f"{peer.short()} did not answer about the DHT within {timeout_s:g} s") from exc
    except DaemonError as exc:
        if exc.code == "daemon_unavailable":
            raise
        raise PeerUnreachableError(f"{peer.short()} cannot be asked about the DHT: {exc}") from exc
    raise PeerUnreachableError(f"{peer.short()} closed without an answer: it takes no part in the DHT")

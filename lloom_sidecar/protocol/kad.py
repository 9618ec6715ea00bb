"""One question of the Kademlia protocol: which providers of a key does THIS peer hold. Sans-IO.

p2pd's FIND_PROVIDERS also answers from the node's own store and does not say who told it, so it cannot show that others
hold a record. Asking a peer over ``/ipfs/kad/1.0.0`` can.
Source: https://github.com/libp2p/specs/blob/master/kad-dht/README.md
"""

from __future__ import annotations

from typing import Final

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-not-found]

from lloom_sidecar.errors import RemoteProtocolError
from lloom_sidecar.ids import Multiaddr, PeerId

from .framing import frame
from .varint import encode_varint

MAX_ANSWER_BYTES: Final = 512 * 1024
"""20 closer peers and some hundred providers with their addresses; kad-dht itself allows 4 MiB."""
MAX_PROVIDERS: Final = 1000

_GET_PROVIDERS: Final = b"\x08\x03"
"""Message{type: GET_PROVIDERS = 3}."""
_KEY_TAG: Final = b"\x12"
_PROVIDER_PEERS: Final = 9
_PEER_ID: Final = 1
_PEER_ADDR: Final = 2
_LENGTH_DELIMITED: Final = 2

Provider = tuple[PeerId, tuple[Multiaddr, ...]]


def providers_query(multihash: bytes) -> bytes:
    """The framed question; ``multihash`` is that of the CID."""
    return frame(b"".join((_GET_PROVIDERS, _KEY_TAG, encode_varint(len(multihash)), multihash)))


def read_providers(message: bytes) -> list[Provider]:
    """The providers in an answer, without its frame; addresses of unknown kinds are left out.

    Raises RemoteProtocolError when it is no such answer.
    """
    found: list[Provider] = []
    for raw in _fields(message, _PROVIDER_PEERS)[:MAX_PROVIDERS]:
        ids = _fields(raw, _PEER_ID)
        try:
            peer = PeerId(ids[-1] if ids else b"")
        except ValueError as exc:
            raise RemoteProtocolError(f"a DHT answer names a peer that is none: {exc}", code="bad_frame") from exc
        addrs = []
        for addr in _fields(raw, _PEER_ADDR):
            try:
                addrs.append(Multiaddr.from_bytes(addr))
            except ValueError:
                continue
        found.append((peer, tuple(addrs)))
    return found


def _fields(message: bytes, number: int) -> list[bytes]:
    try:
        parsed = Empty.FromString(message)
    except DecodeError as exc:
        raise RemoteProtocolError("a DHT answer is no protobuf message", code="bad_frame") from exc
    return [
        one.data for one in UnknownFieldSet(parsed) if one.field_number == number and one.wire_type == _LENGTH_DELIMITED
    ]

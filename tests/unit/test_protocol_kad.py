"""One question of the Kademlia protocol: bytes as kad-dht has them, and answers that cannot be trusted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lloom_sidecar.errors import RemoteProtocolError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.protocol.kad import MAX_PROVIDERS, providers_query, read_providers

PEER = PeerId.from_ed25519(b"k" * 32)
ADDR = Multiaddr.parse("/ip4/192.0.2.1/tcp/4001")
MULTIHASH = b"\x12\x20" + b"h" * 32


def field(number: int, data: bytes) -> bytes:
    assert len(data) < 128 * 128
    size = bytes((len(data),)) if len(data) < 128 else bytes((len(data) & 127 | 128, len(data) >> 7))
    return bytes((number << 3 | 2,)) + size + data


def test_the_question() -> None:
    # Message{type: GET_PROVIDERS, key: multihash} behind its length
    assert providers_query(MULTIHASH) == b"\x26\x08\x03\x12\x22" + MULTIHASH


def test_an_answer() -> None:
    provider = field(1, PEER.raw) + field(2, ADDR.raw) + field(2, b"\xff\xff") + b"\x18\x01"
    closer = field(8, field(1, PeerId.from_ed25519(b"c" * 32).raw))
    message = b"\x08\x03" + field(2, MULTIHASH) + closer + field(9, provider) + field(9, field(1, PEER.raw))
    assert read_providers(message) == [(PEER, (ADDR,)), (PEER, ())]
    assert read_providers(b"") == []
    # field 9 of another wire type is no provider
    assert read_providers(b"\x48\x01") == []


def test_a_long_answer_is_cut() -> None:
    assert len(read_providers(field(9, field(1, PEER.raw)) * (MAX_PROVIDERS + 5))) == MAX_PROVIDERS


@pytest.mark.parametrize(
    "message", [b"\xff", b"\x4a\x05a", field(9, b""), field(9, field(1, b"no peer")), field(9, b"\xff")]
)
def test_what_is_no_answer(message: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        read_providers(message)
    assert caught.value.code == "bad_frame"


@given(st.binary(max_size=200))
def test_garbage_raises_the_remote_error_only(message: bytes) -> None:
    for data in (message, field(9, message)):
        try:
            read_providers(data)
        except RemoteProtocolError as exc:
            assert exc.code == "bad_frame"

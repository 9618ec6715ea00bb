"""Addresses and model ids that peers send: what reads differently in two places must not be read at all."""

from __future__ import annotations

import pytest

from lloom_sidecar.ids import Multiaddr, PeerId, check_model_id

PEER = PeerId.from_ed25519(bytes(range(32)))


@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}",
        "/ip6/fe80::1/udp/4001/quic-v1",
        f"/dns4/relay.example/tcp/443/tls/ws/p2p/{PEER}/p2p-circuit/p2p/{PEER}",
        "/unix/run/lloom/p2pd.sock",
        "/unix/" + "d/" * 100 + "p2pd.sock",
    ],
)
def test_an_address_comes_back_from_its_bytes(text: str) -> None:
    address = Multiaddr.from_bytes(Multiaddr.parse(text).raw)
    assert str(address) == text
    assert address == Multiaddr.parse(text)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x90\x03",
        b"\x90\x03\x05/a",
        b"\x90\x03\x02ab",
        b"\x90\x03\x02/\xff",
        b"x" * 1025,
        b"\x29" + bytes(14),
        b"\x36\x0fa/ip4/127.0.0.1",
        b"\x04\x7f\x00\x00\x01\xa5\x03\x26\x12\x24" + PEER.raw[2:],
    ],
    ids=["empty", "unix cut", "unix longer", "unix relative", "unix text", "long", "ip6 cut", "slash in dns", "peer"],
)
def test_bytes_that_are_no_address_raise_value_error_only(raw: bytes) -> None:
    with pytest.raises(ValueError, match="not a multiaddr"):
        Multiaddr.from_bytes(raw)


def test_a_unix_path_that_looks_like_parts_is_a_path() -> None:
    address = Multiaddr.parse("/unix/srv/p2p/ip4/p2pd.sock")
    assert (address.peer_id, address.ip, address.unix_path) == (None, None, "/srv/p2p/ip4/p2pd.sock")


@pytest.mark.parametrize("text", ["", "x" * 201, "ü" * 101, " a", "a\n", "a\x00b", "\ud800"])
def test_what_is_no_model_id(text: str) -> None:
    with pytest.raises(ValueError):
        check_model_id(text)


@pytest.mark.parametrize("text", ["m", "meta-llama/Llama-3.1-8B", "x" * 200, "a b", "qwen3:8b ü"])
def test_a_model_id_keeps_its_exact_text(text: str) -> None:
    assert check_model_id(text) == text

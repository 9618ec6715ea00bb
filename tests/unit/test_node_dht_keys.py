"""Keys of the DHT as an operator types them, and the bootstrap file."""

from __future__ import annotations

from pathlib import Path

import pytest

from lloom_sidecar.config import read_bootstrap_file
from lloom_sidecar.errors import ConfigError, LloomError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.node.bootstrap_file import add_line, remove_lines
from lloom_sidecar.node.dht_keys import own_record, place_key, provider_key, record_key, record_key_text
from lloom_sidecar.protocol.names import SERVICE_EXECUTOR, service_cid

PEER = PeerId.from_ed25519(b"k" * 32)
EXECUTOR_CID = "bafkreie553kd6bmejw4fmfd7itnxp5insfchuvo3tsfef7evfrxxzq7bae"
"""Of the executor's service key, by other tools. Source: PROTOCOL.md, Names."""
V0 = "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWKFtqR"


def test_a_service_key_and_its_cid_are_one_place() -> None:
    named, by_cid = provider_key(SERVICE_EXECUTOR), provider_key(EXECUTOR_CID)
    assert named.cid == by_cid.cid == service_cid(SERVICE_EXECUTOR)
    assert named.cid_text == EXECUTOR_CID
    assert named.multihash == named.cid[2:]
    assert place_key(SERVICE_EXECUTOR) == place_key(EXECUTOR_CID) == named.multihash


def test_other_forms_of_a_cid() -> None:
    zero = provider_key(V0)
    assert (zero.cid_text, zero.multihash) == (V0, zero.cid)
    import base58

    assert provider_key("z" + base58.b58encode(service_cid(SERVICE_EXECUTOR)).decode()).cid_text == EXECUTOR_CID


@pytest.mark.parametrize("text", ["", "x" * 600, "a\nb", "hello", "bafkre1", "b", "Qm", "QmYw", "z", "z2", "bafyreib"])
def test_what_is_no_key(text: str) -> None:
    for read in (provider_key, place_key):
        with pytest.raises(ValueError):
            read(text)


def test_the_place_of_a_peer_is_its_id() -> None:
    assert place_key(str(PEER)) == PEER.raw


@pytest.mark.parametrize(
    ("text", "raw"),
    [
        (f"/pk/{PEER}", b"/pk/" + PEER.raw),
        (str(PEER), b"/pk/" + PEER.raw),
        (f"/ipns/{PEER}", b"/ipns/" + PEER.raw),
        (f"/ipns/{V0}", b"/ipns/" + provider_key(V0).cid),
    ],
)
def test_a_records_key(text: str, raw: bytes) -> None:
    assert record_key(text) == raw
    assert record_key(record_key_text(raw)) == raw


@pytest.mark.parametrize("text", ["/lloom/x", "/pk/", "/pk/x y", "nobody", "/v/x", ""])
def test_what_is_no_records_key(text: str) -> None:
    with pytest.raises(ValueError):
        record_key(text)


def test_the_own_record_is_the_key_that_the_id_embeds() -> None:
    key, value = own_record(PEER)
    assert key == b"/pk/" + PEER.raw
    assert value == PEER.raw[2:]  # the identity multihash holds just these bytes
    with pytest.raises(ValueError, match="does not embed"):
        own_record(PeerId(b"\x12\x20" + bytes(32)))
    assert record_key_text(b"odd") == "b'odd'"


# --- the bootstrap file

ONE = Multiaddr.parse(f"/ip4/192.0.2.1/tcp/4001/p2p/{PEER}")
TWO = Multiaddr.parse(f"/dns4/v.example.org/tcp/4001/p2p/{PEER}")


def test_a_line_is_added_once_and_comments_stay(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap"
    assert add_line(path, ONE)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text(f"# mine\n{ONE}  # the first")  # no newline at its end
    assert not add_line(path, ONE)
    assert add_line(path, TWO)
    assert path.read_text() == f"# mine\n{ONE}  # the first\n{TWO}\n"
    assert read_bootstrap_file(path) == (ONE, TWO)


def test_lines_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap"
    assert not remove_lines(path, {ONE})
    path.write_text(f"# mine\n{ONE}  # the first\n\n{TWO}\n")
    assert remove_lines(path, {ONE})
    assert path.read_text() == f"# mine\n\n{TWO}\n"
    assert not remove_lines(path, {ONE})


def test_a_file_that_cannot_be_used_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "bootstrap"
    path.write_text("nonsense\n")
    with pytest.raises(ConfigError, match="line 1"):
        add_line(path, ONE)
    with pytest.raises(ConfigError, match="line 1"):
        remove_lines(path, {ONE})
    assert path.read_text() == "nonsense\n"
    with pytest.raises(LloomError, match="cannot be written"):
        add_line(tmp_path / "none" / "bootstrap", ONE)

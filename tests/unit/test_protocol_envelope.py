"""Keys and signed envelopes."""

from __future__ import annotations

import pytest

from lloom_sidecar.errors import ConfigError, RemoteProtocolError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.envelope import MAX_ENVELOPE_BYTES, Signer, open_envelope, seal
from lloom_sidecar.protocol.names import KIND_ACK, KIND_CHECKPOINT, KIND_RECEIPT, agent_version
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

SIGNER = Signer(bytes(range(32)))
OTHER = Signer(bytes(32))


def changed(**fields: object) -> bytes:
    envelope = pb.Envelope.FromString(seal(KIND_RECEIPT, b"payload", SIGNER))
    for name, value in fields.items():
        if name == "key_type":
            envelope.public_key.type = value  # type: ignore[assignment]
        elif name == "key":
            envelope.public_key.data = value  # type: ignore[assignment]
        else:
            setattr(envelope, name, value)
    return envelope.SerializeToString()


class TestSigner:
    def test_a_marshalled_key_comes_back(self) -> None:
        again = Signer.from_marshalled(SIGNER.marshalled())
        assert again.peer == SIGNER.peer
        assert again.sign(b"x") == SIGNER.sign(b"x")

    def test_the_old_form_with_the_public_half_twice_is_read(self) -> None:
        secret = SIGNER.marshalled()[4:]
        old = b"\x08\x01\x12\x60" + secret + secret[32:]
        assert Signer.from_marshalled(old).peer == SIGNER.peer

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            SIGNER.marshalled()[:-1],
            b"\x08\x00" + SIGNER.marshalled()[2:],
            b"\x08\x01\x12\x60" + SIGNER.marshalled()[4:],
        ],
        ids=["empty", "cut", "rsa", "wrong length"],
    )
    def test_what_is_no_key_is_refused(self, data: bytes) -> None:
        with pytest.raises(ConfigError, match="not a libp2p Ed25519 private key"):
            Signer.from_marshalled(data)

    def test_halves_that_do_not_belong_together_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="damaged"):
            Signer.from_marshalled(SIGNER.marshalled()[:-1] + b"\x00")

    def test_a_seed_has_32_bytes(self) -> None:
        with pytest.raises(ValueError, match="32 bytes"):
            Signer(b"short")

    def test_repr_shows_the_id_and_not_the_key(self) -> None:
        assert repr(SIGNER) == f"Signer({SIGNER.peer})"


class TestEnvelope:
    def test_it_opens_to_what_was_sealed(self) -> None:
        opened = open_envelope(seal(KIND_RECEIPT, b"payload", SIGNER), KIND_RECEIPT, expected_signer=SIGNER.peer)
        assert (opened.signer, opened.payload) == (SIGNER.peer, b"payload")

    @pytest.mark.parametrize(
        ("raw", "code"),
        [
            (b"x" * (MAX_ENVELOPE_BYTES + 1), "bad_envelope"),
            (b"\xff\xff", "bad_envelope"),
            (b"", "bad_envelope"),
            (changed(key_type=0), "bad_envelope"),
            (changed(key=b"short"), "bad_envelope"),
            (seal(KIND_ACK, b"payload", SIGNER), "bad_envelope"),
            (changed(key=OTHER.peer.ed25519_public_key), "wrong_signer"),
            (changed(signature=b""), "bad_signature"),
            (changed(signature=bytes(64)), "bad_signature"),
            (changed(payload=b"Payload"), "bad_signature"),
        ],
        ids=[
            "oversize",
            "garbage",
            "empty",
            "key type",
            "short key",
            "another kind",
            "another signer",
            "unsigned",
            "forged",
            "changed",
        ],
    )
    def test_what_is_not_the_signers_is_refused(self, raw: bytes, code: str) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            open_envelope(raw, KIND_RECEIPT, expected_signer=SIGNER.peer)
        assert caught.value.code == code

    def test_a_signature_counts_for_one_domain_only(self) -> None:
        # The same bytes under another payload type: what a confused verifier would have to accept.
        receipt = pb.Envelope.FromString(seal(KIND_RECEIPT, b"payload", SIGNER))
        receipt.payload_type = KIND_CHECKPOINT.payload_type
        with pytest.raises(RemoteProtocolError) as caught:
            open_envelope(receipt.SerializeToString(), KIND_CHECKPOINT)
        assert caught.value.code == "bad_signature"

    @pytest.mark.parametrize("extra", [b"\x32\x01x", b"\x1a\x07payload", b"\x12\x00"], ids=["unknown", "twice", "late"])
    def test_bytes_that_the_signature_does_not_cover_are_refused(self, extra: bytes) -> None:
        raw = seal(KIND_RECEIPT, b"payload", SIGNER)
        position = 0 if extra == b"\x12\x00" else len(raw)
        with pytest.raises(RemoteProtocolError, match="one encoding") as caught:
            open_envelope(raw[:position] + extra + raw[position:], KIND_RECEIPT)
        assert caught.value.code == "bad_envelope"

    def test_without_an_expected_signer_anyones_opens(self) -> None:
        assert open_envelope(seal(KIND_RECEIPT, b"p", OTHER), KIND_RECEIPT).signer == OTHER.peer

    def test_an_empty_payload_is_left_out_as_proto3_does(self) -> None:
        raw = seal(KIND_RECEIPT, b"", SIGNER)
        assert raw == pb.Envelope.FromString(raw).SerializeToString()
        assert open_envelope(raw, KIND_RECEIPT).payload == b""


def test_the_agent_names_the_version() -> None:
    assert agent_version("0.1.0") == "lloom/0.1.0"


def test_a_peer_id_of_a_signer_embeds_its_key() -> None:
    key = SIGNER.peer.ed25519_public_key
    assert key is not None
    assert PeerId.from_ed25519(key) == SIGNER.peer

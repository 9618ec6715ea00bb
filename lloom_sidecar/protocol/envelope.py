"""Signed envelopes and the keys that sign them: libp2p's, bit for bit, so that go-libp2p can verify them.

Source: libp2p RFC 0002 (signed envelopes); https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md (keys).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import nacl.bindings
import nacl.exceptions
from google.protobuf.message import DecodeError

from lloom_sidecar.errors import ConfigError, RemoteProtocolError
from lloom_sidecar.ids import PeerId

from .names import EnvelopeKind
from .pb import lloom_pb2 as pb
from .varint import encode_varint

KEY_TYPE_ED25519: Final = 1
"""Source: libp2p's crypto.proto, enum KeyType."""
SEED_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64
MAX_ENVELOPE_BYTES: Final = 32 * 1024
"""Larger than any kind that Lloom signs (a full announcement is under 16 KiB)."""

_KIND_AT: Final = 2 + 36 + 2
"""Where the payload type begins, behind the public key message of 36 bytes."""
_PRIVATE_KEY_HEADER: Final = bytes.fromhex("08011240")
"""PrivateKey{Type: Ed25519, Data: 64 bytes}: what libp2p marshals."""


class Signer:
    """A node's Ed25519 key. ``repr`` never shows it."""

    __slots__ = ("_public", "_secret", "peer")

    peer: PeerId

    def __init__(self, seed: bytes) -> None:
        """``seed``: the 32 bytes of RFC 8032. Raises ValueError on another length."""
        if len(seed) != SEED_BYTES:
            raise ValueError(f"an Ed25519 seed has {SEED_BYTES} bytes")
        self._public, self._secret = nacl.bindings.crypto_sign_seed_keypair(seed)
        self.peer = PeerId.from_ed25519(self._public)

    @classmethod
    def from_marshalled(cls, data: bytes) -> Signer:
        """From a libp2p-marshalled private key, as ``identity.key`` holds it and ``p2pd -id`` reads it.

        Raises ConfigError when it is not an Ed25519 key or its two halves do not belong together.
        """
        if len(data) not in (68, 100) or not data.startswith(b"\x08\x01\x12" + encode_varint(len(data) - 4)):
            raise ConfigError("it is not a libp2p Ed25519 private key (expected 68 bytes that begin 08 01 12)")
        body = data[4:]
        signer = cls(body[:SEED_BYTES])
        if any(body[i : i + 32] != signer._public for i in range(32, len(body), 32)):
            raise ConfigError("its public half does not belong to its private half: the file is damaged")
        return signer

    def marshalled(self) -> bytes:
        """The libp2p-marshalled private key, 68 bytes. Secret."""
        return _PRIVATE_KEY_HEADER + self._secret

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of ``message``."""
        return nacl.bindings.crypto_sign(message, self._secret)[:SIGNATURE_BYTES]

    def __repr__(self) -> str:
        return f"Signer({self.peer})"


@dataclass(frozen=True, slots=True)
class OpenedEnvelope:
    """An envelope whose signature was checked."""

    signer: PeerId
    payload: bytes


def _unsigned(domain: str, payload_type: bytes, payload: bytes) -> bytes:
    return b"".join((_domain_and_type(domain, payload_type), encode_varint(len(payload)), payload))


@lru_cache(maxsize=64)
def _domain_and_type(domain: str, payload_type: bytes) -> bytes:
    raw = domain.encode()
    return b"".join((encode_varint(len(raw)), raw, encode_varint(len(payload_type)), payload_type))


@lru_cache(maxsize=64)
def _envelope_head(public_key: bytes, payload_type: bytes) -> bytes:
    key = b"\x08\x01\x12\x20" + public_key
    return b"".join((b"\x0a", encode_varint(len(key)), key, b"\x12", encode_varint(len(payload_type)), payload_type))


def seal(kind: EnvelopeKind, payload: bytes, signer: Signer) -> bytes:
    """Sign ``payload`` as ``kind``; the bytes are those of go-libp2p's ``record.Seal``."""
    signature = signer.sign(_unsigned(kind.domain, kind.payload_type, payload))
    public_key = signer.peer.ed25519_public_key
    assert public_key is not None  # a Signer's id always embeds its key
    return _assembled(public_key, kind.payload_type, payload, signature)


def _assembled(public_key: bytes, payload_type: bytes, payload: bytes, signature: bytes) -> bytes:
    # proto3 leaves an empty payload out altogether.
    payload_field = b"".join((b"\x1a", encode_varint(len(payload)), payload)) if payload else b""
    return b"".join((_envelope_head(public_key, payload_type), payload_field, b"\x2a\x40", signature))


def says_kind(raw: bytes, kind: EnvelopeKind) -> bool:
    """Whether ``raw`` begins as an envelope of that kind does; nothing is checked. Says which check to apply."""
    end = _KIND_AT + len(kind.payload_type)
    return raw[_KIND_AT - 1 : end] == bytes((len(kind.payload_type),)) + kind.payload_type


def open_envelope(raw: bytes, kind: EnvelopeKind, *, expected_signer: PeerId | None = None) -> OpenedEnvelope:
    """Check the signature and the kind of ``raw``.

    Raises:
        RemoteProtocolError: code ``bad_envelope`` (not an envelope, another kind, over 32 KiB, not the bytes that
            ``seal`` makes), ``bad_signature`` (forged), or ``wrong_signer`` (signed by somebody else than
            ``expected_signer``).
    """
    if len(raw) > MAX_ENVELOPE_BYTES:
        raise RemoteProtocolError(f"an envelope of {len(raw)} bytes is over the limit", code="bad_envelope")
    try:
        message = pb.Envelope.FromString(raw)
    except DecodeError as exc:
        raise RemoteProtocolError("bytes that are no envelope", code="bad_envelope") from exc
    public_key = message.public_key.data
    if message.public_key.type != KEY_TYPE_ED25519 or len(public_key) != 32:
        raise RemoteProtocolError("an envelope that is not signed with an Ed25519 key", code="bad_envelope")
    if message.payload_type != kind.payload_type:
        raise RemoteProtocolError(f"an envelope of another kind than {kind.domain}", code="bad_envelope")
    signer = PeerId.from_ed25519(public_key)
    if expected_signer is not None and signer != expected_signer:
        raise RemoteProtocolError("an envelope signed by another peer than its sender", code="wrong_signer")
    if len(message.signature) != SIGNATURE_BYTES:
        raise RemoteProtocolError("an envelope without a signature", code="bad_signature")
    if _assembled(public_key, kind.payload_type, message.payload, message.signature) != raw:
        # One statement, one encoding: digests of envelopes name statements, and a relay could otherwise add unsigned
        # bytes that look like a second statement of the signer.
        raise RemoteProtocolError("an envelope that is not in its one encoding", code="bad_envelope")
    try:
        nacl.bindings.crypto_sign_open(
            message.signature + _unsigned(kind.domain, kind.payload_type, message.payload), public_key
        )
    except nacl.exceptions.BadSignatureError as exc:
        raise RemoteProtocolError("an envelope with a forged signature", code="bad_signature") from exc
    return OpenedEnvelope(signer, message.payload)

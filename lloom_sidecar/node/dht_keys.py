"""What an operator types for a key of the DHT, as bytes. Pure. Every function raises ValueError with a sentence."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Final

import base58

from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.names import service_cid

MAX_KEY_CHARS: Final = 512
RECORD_NAMESPACES: Final = ("/pk/", "/ipns/")
"""Those that the DHT has validators for. Source: kad-dht's default namespaced validator."""
EMPTY_TABLE: Final = "failed to find any peer in table"
"""In p2pd's words when it knows no other DHT server. Source: kad-dht, kb.ErrLookupFailure."""
_CID_V1_HEADS: Final = (b"\x01\x55", b"\x01\x70", b"\x01\x72")
"""Version 1; codec raw, dag-pb, libp2p-key. Source: multicodec table."""
_SHA2_256: Final = b"\x12\x20"
_IDENTITY: Final = 0x00


@dataclass(frozen=True, slots=True)
class ProviderKey:
    """Under what provider records are kept."""

    name: str
    """As it was typed."""
    cid: bytes

    @property
    def multihash(self) -> bytes:
        """What the DHT hashes to find the place."""
        return self.cid if self.cid.startswith(_SHA2_256) else self.cid[2:]

    @property
    def cid_text(self) -> str:
        """The CID as other tools take it: base32, or base58 for version 0."""
        return cid_text(self.cid)


def provider_key(text: str) -> ProviderKey:
    """From a service key, which begins with /, or a CID."""
    _check_size(text)
    if text.startswith("/"):
        return ProviderKey(text, service_cid(text))
    return ProviderKey(text, _parse_cid(text))


def place_key(text: str) -> bytes:
    """The bytes whose neighbourhood ``closest`` looks for: of a peer id, a CID or a service key."""
    _check_size(text)
    try:
        return PeerId.parse(text).raw
    except ValueError:
        return provider_key(text).multihash


def record_key(text: str) -> bytes:
    """From /pk/PEER, /ipns/PEER or /ipns/CID, or a peer id alone, which means its /pk record."""
    _check_size(text)
    for namespace in RECORD_NAMESPACES:
        if text.startswith(namespace):
            return namespace.encode() + _name_bytes(text.removeprefix(namespace))
    if not text.startswith("/"):
        return b"/pk/" + PeerId.parse(text).raw
    raise ValueError(f"{text!r} is no record's key: the DHT keeps /pk/PEER and /ipns/NAME only")


def record_key_text(key: bytes) -> str:
    """A record's key for people."""
    for namespace in RECORD_NAMESPACES:
        if key.startswith(namespace.encode()):
            return f"{namespace}{base58.b58encode(key[len(namespace) :]).decode()}"
    return repr(key)


def cid_text(cid: bytes) -> str:
    """The usual text of a CID."""
    if cid.startswith(_SHA2_256):
        return base58.b58encode(cid).decode()
    return "b" + base64.b32encode(cid).decode().lower().rstrip("=")


def own_record(peer: PeerId) -> tuple[bytes, bytes]:
    """(key, value) of the /pk record of an Ed25519 peer: the libp2p-marshalled public key, which its id embeds."""
    key = peer.ed25519_public_key
    if key is None:
        raise ValueError(f"the id of {peer.short()} does not embed its key")
    return b"/pk/" + peer.raw, b"\x08\x01\x12\x20" + key


def _name_bytes(text: str) -> bytes:
    try:
        return PeerId.parse(text).raw
    except ValueError:
        cid = _parse_cid(text)
        return cid if cid.startswith(_SHA2_256) else cid[2:]


def _parse_cid(text: str) -> bytes:
    try:
        if text.startswith("Qm"):
            cid = base58.b58decode(text)
        elif text.startswith("b"):
            body = text[1:].upper()
            cid = base64.b32decode(body + "=" * (-len(body) % 8))
        elif text.startswith("z"):
            cid = base58.b58decode(text[1:])
        else:
            raise ValueError("no CID")
    except (ValueError, binascii.Error) as exc:
        raise ValueError(f"{text!r} is neither a service key such as /lloom/executor/1.0.0 nor a CID") from exc
    digest = cid if cid.startswith(_SHA2_256) else cid[2:] if cid.startswith(_CID_V1_HEADS) else b""
    if not (len(digest) == 34 and digest.startswith(_SHA2_256)) and not _is_identity(digest):
        raise ValueError(f"{text!r} is no CID of a SHA-256 hash (version 0, or 1 with codec raw, dag-pb or libp2p-key)")
    return cid


def _is_identity(digest: bytes) -> bool:
    return len(digest) > 2 and digest[0] == _IDENTITY and digest[1] == len(digest) - 2


def _check_size(text: str) -> None:
    if not 0 < len(text) <= MAX_KEY_CHARS or not text.isprintable():
        raise ValueError(f"a key has 1 to {MAX_KEY_CHARS} printable characters")

"""Checked values: PeerId, Multiaddr and model ids. Made once at an edge, trusted everywhere behind it."""

from __future__ import annotations

import ipaddress
from functools import lru_cache
from typing import Final

import base58
import multiaddr as _multiaddr
from multiaddr.exceptions import Error as _MultiaddrError

MAX_MODEL_ID_BYTES: Final = 200
"""Longest model id on the wire, in UTF-8 bytes. Source: PROTOCOL.md, Names."""
MAX_MULTIADDR_BYTES: Final = 1024
"""Longest multiaddr that is read from a peer; a webtransport address with two certificate hashes has 110."""

_ED25519_PREFIX: Final = bytes.fromhex("0024") + bytes.fromhex("08011220")
"""Identity multihash of 36 bytes, then the libp2p PublicKey message of an Ed25519 key. Source: libp2p peer-ids spec."""
_ED25519_ID_BYTES: Final = 38
_SHA256_ID_BYTES: Final = 34

_CODE_UNIX: Final = 400
_UNIX_CODE_BYTES: Final = b"\x90\x03"
_RELAY_PART: Final = "/p2p-circuit"

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class PeerId:
    """The identity of a libp2p node: a multihash of its public key.

    Immutable, hashable, ordered by its bytes. ``str()`` gives the base58 form (``12D3KooW...``).
    Source: https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md
    """

    __slots__ = ("_text", "raw")

    raw: bytes
    """The multihash: 38 bytes for an Ed25519 key, 34 for a hashed one."""

    def __init__(self, raw: bytes) -> None:
        """Raises ValueError when ``raw`` is not a multihash as libp2p uses them."""
        is_inline = 2 < len(raw) <= 44 and raw[0] == 0x00 and raw[1] == len(raw) - 2
        is_hashed = len(raw) == _SHA256_ID_BYTES and raw[:2] == b"\x12\x20"
        if not (is_inline or is_hashed):
            raise ValueError(f"not a peer id: {len(raw)} bytes that are no multihash of a public key")
        self.raw = bytes(raw)
        self._text: str | None = None

    @classmethod
    def parse(cls, text: str) -> PeerId:
        """From base58 text. Raises ValueError with a sentence when it is none."""
        if len(text) > 128:
            raise ValueError("not a peer id: longer than 128 characters")
        try:
            return cls(base58.b58decode(text))
        except ValueError as exc:
            raise ValueError(f"not a peer id: {text!r} (expected base58 such as 12D3KooW...)") from exc

    @classmethod
    def from_ed25519(cls, public_key: bytes) -> PeerId:
        """From a raw 32-byte Ed25519 public key."""
        if len(public_key) != 32:
            raise ValueError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
        return cls(_ED25519_PREFIX + public_key)

    @property
    def ed25519_public_key(self) -> bytes | None:
        """The raw 32-byte key that the id embeds, or None for another kind of key."""
        if len(self.raw) == _ED25519_ID_BYTES and self.raw.startswith(_ED25519_PREFIX):
            return self.raw[len(_ED25519_PREFIX) :]
        return None

    def short(self) -> str:
        """The last 8 characters, enough for a person to tell nodes of one network apart."""
        return str(self)[-8:]

    def __str__(self) -> str:
        if self._text is None:
            self._text = base58.b58encode(self.raw).decode()
        return self._text

    def __repr__(self) -> str:
        return f"PeerId({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PeerId) and self.raw == other.raw

    def __lt__(self, other: PeerId) -> bool:
        return self.raw < other.raw

    def __hash__(self) -> int:
        return hash(self.raw)


class Multiaddr:
    """A checked multiaddr. Immutable, hashable; ``str()`` gives the text, ``raw`` the bytes.

    ``/unix`` addresses are encoded here: PyPI's multiaddr 0.2 drops the leading slash of the path, which go-multiaddr
    refuses.
    Source: https://github.com/multiformats/multiaddr
    """

    __slots__ = ("_text", "raw")

    raw: bytes

    def __init__(self, raw: bytes, text: str) -> None:
        self.raw = raw
        self._text = text

    @classmethod
    def parse(cls, text: str) -> Multiaddr:
        """From text such as ``/ip4/127.0.0.1/tcp/4001/p2p/12D3KooW...``. Raises ValueError with a sentence."""
        if text.startswith("/unix/"):
            path = text[len("/unix") :].encode()
            return cls(_UNIX_CODE_BYTES + _uvarint(len(path)) + path, text)
        try:
            if not text.startswith("/") or len(text) > MAX_MULTIADDR_BYTES:
                raise ValueError("a multiaddr starts with / and is short")
            parsed = _multiaddr.Multiaddr(text)
            address = cls(parsed.to_bytes(), str(parsed))
            _ = address.peer_id  # raises when its /p2p part is none that we can use
            return address
        except (_MultiaddrError, ValueError, TypeError, KeyError) as exc:
            raise ValueError(
                f"not a multiaddr: {text!r} (expected a form such as /ip4/127.0.0.1/tcp/4001 or /unix/run/p2pd.sock)"
            ) from exc

    @classmethod
    def from_bytes(cls, raw: bytes) -> Multiaddr:
        """From bytes that a peer or p2pd sent. Raises ValueError."""
        return _multiaddr_from_bytes(bytes(raw))

    @property
    def peer_id(self) -> PeerId | None:
        """The node that the address leads to: its LAST ``/p2p`` part (a relay's comes before it), or None."""
        _head, found, tail = self._text.rpartition("/p2p/")
        if not found or _RELAY_PART in "/" + tail or self.unix_path is not None:
            return None
        return PeerId.parse(tail.partition("/")[0])

    def with_peer(self, peer: PeerId) -> Multiaddr:
        """The same address with ``/p2p/<peer>`` at its end, unless it has one."""
        return self if self.peer_id is not None else Multiaddr.parse(f"{self._text}/p2p/{peer}")

    def without_peer(self) -> Multiaddr:
        """The same address without the ``/p2p`` part at its end, which p2pd's CONNECT wants apart."""
        if self.peer_id is None:
            return self
        return Multiaddr.parse(self._text.rpartition("/p2p/")[0] or "/")

    @property
    def is_relayed(self) -> bool:
        """True when the path leads through a circuit relay."""
        return _RELAY_PART in self._text

    @property
    def ip(self) -> IpAddress | None:
        """The first ip4 or ip6 part, or None (dns, unix)."""
        if self.unix_path is not None:
            return None
        parts = self._text.split("/")
        for name, value in zip(parts[1::2], parts[2::2], strict=False):
            if name in ("ip4", "ip6"):
                return ipaddress.ip_address(value)
        return None

    @property
    def unix_path(self) -> str | None:
        """The path of a ``/unix`` address, or None."""
        return self._text[len("/unix") :] if self._text.startswith("/unix/") else None

    @property
    def tcp_host_port(self) -> tuple[str, int] | None:
        """(host, port) of an address that begins /ip4|ip6|dns4|dns6|dns/<host>/tcp/<port>, or None."""
        parts = self._text.split("/")
        if len(parts) >= 5 and parts[1] in ("ip4", "ip6", "dns", "dns4", "dns6") and parts[3] == "tcp":
            return parts[2], int(parts[4])
        return None

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Multiaddr({self._text})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Multiaddr) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)


@lru_cache(maxsize=4096)
def _multiaddr_from_bytes(raw: bytes) -> Multiaddr:
    # Parsing costs tens of microseconds and p2pd sends the same few addresses with every stream.
    if not 0 < len(raw) <= MAX_MULTIADDR_BYTES:
        raise ValueError(f"not a multiaddr: {len(raw)} bytes (1 to {MAX_MULTIADDR_BYTES} allowed)")
    try:
        if raw.startswith(_UNIX_CODE_BYTES):
            address = Multiaddr.parse("/unix" + raw[3 if raw[2:3] < b"\x80" else 4 :].decode())
        else:
            address = Multiaddr.parse(str(_multiaddr.Multiaddr(raw)))
        # multiaddr 0.2 reads a cut ip6 part and a dns name with slashes in it: an address is only what comes back to
        # the same bytes.
        if address.raw != raw:
            raise ValueError("not the bytes of the address that they seem to be")
        return address
    except (_MultiaddrError, ValueError, TypeError, KeyError, IndexError) as exc:
        raise ValueError(f"not a multiaddr: {raw[:32].hex()}...") from exc


def _uvarint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def check_model_id(text: str) -> str:
    """Return ``text`` when it is a model id: 1 to 200 bytes, printable, no space at either end; ``/`` is allowed.

    Exact bytes count: no case folding, no normalisation. Raises ValueError with a sentence.
    """
    if not 0 < len(text.encode()) <= MAX_MODEL_ID_BYTES:
        raise ValueError(f"a model id has 1 to {MAX_MODEL_ID_BYTES} bytes")
    if not text.isprintable() or text != text.strip():
        raise ValueError("a model id has printable characters only and no space at its ends")
    return text

"""The network key and all that comes of it: derived keys, the key file, invites. Pure.

Whoever has the key is a member of the network. It is never used itself: HKDF makes one key for each purpose, so that
what is learnt about one says nothing about another.
Source: PROTOCOL.md, Network key; RFC 5869 (HKDF); RFC 4648 (base32).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from lloom_sidecar.errors import ConfigError
from lloom_sidecar.ids import Multiaddr, PeerId

from .names import HKDF_LABEL_ANNOUNCE, HKDF_LABEL_HELLO, HKDF_LABEL_NETWORK_ID, HKDF_LABEL_PSK
from .varint import decode_varint, encode_varint

KEY_BYTES: Final = 32
"""The network key, and everything derived from it."""
MAX_KEY_FILE_BYTES: Final = 8 * 1024
MAX_INVITE_VALIDATORS: Final = 16
MAX_INVITE_CHARACTERS: Final = 32 * 1024
INVITE_CHECKSUM_BYTES: Final = 4
FILE_CHECKSUM_BYTES: Final = 8

_FILE_FORMAT: Final = "lloom-network-key-1"
_FILE_FORMAT_ANY: Final = re.compile(r"lloom-network-key-\d+")
_FILE_TIME: Final = re.compile(r"[1-9][0-9]{0,17}")
_FILE_COMMENT: Final = "# Lloom network key. Whoever has it is a member of the network: keep it secret.\n"
_INVITE_PREFIX: Final = "lloom-invite-1:"
_INVITE_PREFIX_ANY: Final = re.compile(r"lloom-invite-\d+:")
_SHA256_BYTES: Final = 32


def hkdf_sha256(secret: bytes, *, info: bytes, length: int, salt: bytes = b"") -> bytes:
    """HKDF with SHA-256: extract, then expand to ``length`` bytes (at most 8160).

    Source: RFC 5869, sections 2.2 and 2.3; an empty salt stands for 32 zero bytes, as there.
    """
    pseudorandom_key = hmac.digest(salt or bytes(_SHA256_BYTES), secret, "sha256")
    out = block = b""
    for counter in range(1, -(-length // _SHA256_BYTES) + 1):
        block = hmac.digest(pseudorandom_key, block + info + bytes((counter,)), "sha256")
        out += block
    return out[:length]


class NetworkKey:
    """A network's key. Immutable, hashable; ``repr`` shows the public network id and never the key."""

    __slots__ = ("_raw", "k_announce", "k_hello", "k_psk", "network_id")

    k_hello: bytes
    """Proves membership in hello."""
    k_announce: bytes
    """Tags announcements."""
    k_psk: bytes
    """The transport's pre-shared key, for nodes that close it altogether (libp2p private networks, TCP only)."""
    network_id: bytes
    """Public: names the network in hello and in announcements."""

    def __init__(self, raw: bytes) -> None:
        """``raw``: 32 random bytes. Raises ValueError on another length."""
        if len(raw) != KEY_BYTES:
            raise ValueError(f"a network key has {KEY_BYTES} bytes, not {len(raw)}")
        self._raw = bytes(raw)
        self.k_hello = hkdf_sha256(raw, info=HKDF_LABEL_HELLO, length=KEY_BYTES)
        self.k_announce = hkdf_sha256(raw, info=HKDF_LABEL_ANNOUNCE, length=KEY_BYTES)
        self.k_psk = hkdf_sha256(raw, info=HKDF_LABEL_PSK, length=KEY_BYTES)
        self.network_id = hkdf_sha256(raw, info=HKDF_LABEL_NETWORK_ID, length=KEY_BYTES)

    def announce_tag(self, signer: PeerId, sequence: int) -> bytes:
        """32 bytes which show that ``signer`` held this key when it made announcement ``sequence`` (0 to 2**64 - 1)."""
        message = encode_varint(len(signer.raw)) + signer.raw + sequence.to_bytes(8, "big")
        return hmac.digest(self.k_announce, message, "sha256")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NetworkKey) and hmac.compare_digest(self._raw, other._raw)

    def __hash__(self) -> int:
        return hash(self.network_id)

    def __repr__(self) -> str:
        return f"NetworkKey(network {self.network_id.hex()[:16]})"


@dataclass(frozen=True, slots=True)
class NetworkKeys:
    """What ``network.key`` holds: the key and, for a while after a rotation, the one before it."""

    current: NetworkKey
    previous: NetworkKey | None = None
    previous_until_ms: int = 0
    """Unix milliseconds at which ``previous`` is no longer accepted; 0 without one."""

    def valid(self, now_ms: int) -> tuple[NetworkKey, ...]:
        """The keys that are accepted at ``now_ms``, newest first."""
        if self.previous is not None and now_ms < self.previous_until_ms:
            return (self.current, self.previous)
        return (self.current,)


def format_key_file(current: NetworkKey, previous: tuple[NetworkKey, int] | None = None) -> bytes:
    """The text of ``network.key``. ``previous``: the rotated key and the Unix milliseconds until it is accepted.

    Raises ValueError when both keys are the same or the time is not positive.
    """
    lines = [f"format: {_FILE_FORMAT}", f"current: {_base32(current._raw)}"]
    if previous is not None:
        key, until_ms = previous
        if key == current or not 0 < until_ms < 10**18:
            raise ValueError("the previous key must differ from the current one and end at a positive time")
        lines += [f"previous: {_base32(key._raw)}", f"previous-until-ms: {until_ms}"]
    return (_FILE_COMMENT + "\n".join([*lines, f"checksum: {_file_checksum(lines)}"]) + "\n").encode()


def parse_key_file(data: bytes) -> NetworkKeys:
    """Read ``network.key``.

    Raises:
        ConfigError: one sentence that says what is wrong (never a part of the key).
    """
    lines = _file_lines(data)
    fields: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or name in fields:
            raise ConfigError("the network key file is damaged: it has a line that is no `name: value`, or one twice")
        fields[name] = value.strip()
    kind = fields.get("format", "")
    if kind != _FILE_FORMAT:
        if _FILE_FORMAT_ANY.fullmatch(kind):
            raise ConfigError(f"the network key file has the format {kind}, of a newer Lloom: update this node")
        raise ConfigError("this is not a Lloom network key file (`lloomctl network create` or `join` writes one)")
    checksum = fields.pop("checksum", None)
    if checksum is None:
        raise ConfigError("the network key file is cut off: its checksum is missing")
    if set(fields) not in ({"format", "current"}, {"format", "current", "previous", "previous-until-ms"}):
        raise ConfigError("the network key file is damaged: a line is missing or unknown")
    if checksum != _file_checksum([f"{name}: {value}" for name, value in fields.items()]):
        raise ConfigError("the network key file is damaged: its checksum does not fit")
    current = _file_key(fields["current"])
    if "previous" not in fields:
        return NetworkKeys(current)
    previous, until = _file_key(fields["previous"]), fields["previous-until-ms"]
    if _FILE_TIME.fullmatch(until) is None or previous == current:
        raise ConfigError("the network key file is damaged: its previous key cannot be used")
    return NetworkKeys(current, previous, int(until))


def _file_lines(data: bytes) -> list[str]:
    if len(data) > MAX_KEY_FILE_BYTES:
        raise ConfigError(f"the network key file is over {MAX_KEY_FILE_BYTES} bytes: this is another file")
    try:
        text = data.decode()
    except UnicodeDecodeError as exc:
        raise ConfigError("this is not a Lloom network key file: it is not text") from exc
    stripped = [line.strip() for line in text.splitlines()]
    lines = [line for line in stripped if line and not line.startswith("#")]
    if not lines:
        raise ConfigError("the network key file is empty (`lloomctl network create` or `join` writes one)")
    if lines[0].startswith("lloom-invite-"):
        raise ConfigError("this is an invite, not a network key file: give it to `lloomctl network join`")
    return lines


def _file_key(text: str) -> NetworkKey:
    raw = _from_base32(text)
    if raw is None or len(raw) != KEY_BYTES:
        raise ConfigError("the network key file is damaged: a key in it has not 32 bytes")
    return NetworkKey(raw)


def _file_checksum(lines: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()[: 2 * FILE_CHECKSUM_BYTES]


@dataclass(frozen=True, slots=True)
class Invite:
    """All that a new node needs to join: where the validators are, and the key. As secret as the key."""

    validators: tuple[Multiaddr, ...]
    """0 to 16 addresses, each with its ``/p2p/<peer>``."""
    key: NetworkKey

    def __post_init__(self) -> None:
        """Raises ValueError when there are too many validators or one names no peer."""
        if len(self.validators) > MAX_INVITE_VALIDATORS:
            raise ValueError(f"an invite holds at most {MAX_INVITE_VALIDATORS} validators")
        for address in self.validators:
            if address.peer_id is None:
                raise ValueError(f"a validator's address ends with /p2p/<its peer id>, {address} does not")

    def encode(self) -> str:
        """One line of text, without a line end."""
        content = bytearray(self.key._raw)
        content += encode_varint(len(self.validators))
        for address in self.validators:
            content += encode_varint(len(address.raw)) + address.raw
        body = encode_varint(len(content)) + bytes(content)
        return _INVITE_PREFIX + _base32(body + _invite_checksum(body))

    @classmethod
    def decode(cls, text: str) -> Invite:
        """From text; white space in and around it and the case of its letters do not matter.

        Raises:
            ConfigError: one sentence that says what is wrong (never a part of the key).
        """
        if len(text) > MAX_INVITE_CHARACTERS:
            raise ConfigError(f"this is not a Lloom invite: it is over {MAX_INVITE_CHARACTERS} characters")
        compact = "".join(text.split()).lower()
        _refuse_other_kinds(compact)
        raw = _from_base32(compact[len(_INVITE_PREFIX) :])
        if raw is None:
            raise ConfigError("the invite is damaged: it has characters that no invite has, or was cut off")
        return cls._from_bytes(raw)

    @classmethod
    def _from_bytes(cls, raw: bytes) -> Invite:
        try:
            decoded = decode_varint(raw, 0, MAX_INVITE_CHARACTERS)
        except ValueError as exc:
            raise ConfigError("the invite is damaged: its length cannot be read") from exc
        length, start = decoded or (0, 0)
        end = start + length
        if decoded is None or len(raw) < end + INVITE_CHECKSUM_BYTES:
            raise ConfigError("the invite is cut off: copy all of it, to its last character")
        if len(raw) > end + INVITE_CHECKSUM_BYTES:
            raise ConfigError("the invite has something behind its end: copy it alone")
        if not hmac.compare_digest(_invite_checksum(raw[:end]), raw[end:]):
            raise ConfigError("the invite is damaged: its checksum does not fit, a character was changed")
        try:
            key = NetworkKey(raw[start : start + KEY_BYTES])
            count, position = _varint(raw[:end], start + KEY_BYTES, MAX_INVITE_VALIDATORS)
            validators = []
            for _ in range(count):
                size, position = _varint(raw[:end], position, end)
                validators.append(Multiaddr.from_bytes(raw[position : position + size]))
                position += size
            if position != end:
                raise ValueError("its parts do not add up")
            return cls(tuple(validators), key)
        except ValueError as exc:
            raise ConfigError(f"the invite cannot be used: {exc}") from exc

    def __repr__(self) -> str:
        return f"Invite({len(self.validators)} validators, {self.key!r})"


def _refuse_other_kinds(text: str) -> None:
    if text.startswith(_INVITE_PREFIX):
        return
    if not text:
        raise ConfigError("the invite is empty")
    if _INVITE_PREFIX_ANY.match(text):
        raise ConfigError("the invite was made by a newer Lloom: update this node")
    if "lloom-network-key-" in text:
        raise ConfigError("this is a network key file, not an invite: `lloomctl network invite` makes one")
    if text.startswith("/"):
        raise ConfigError("this is an address, not an invite: give addresses to --bootstrap")
    raise ConfigError(f"this is not a Lloom invite: it does not begin with {_INVITE_PREFIX}")


def _varint(data: bytes, start: int, limit: int) -> tuple[int, int]:
    decoded = decode_varint(data, start, limit)
    if decoded is None:
        raise ValueError("a length is missing")
    return decoded


def _invite_checksum(body: bytes) -> bytes:
    return hashlib.sha256(_INVITE_PREFIX.encode() + body).digest()[:INVITE_CHECKSUM_BYTES]


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode().rstrip("=").lower()


def _from_base32(text: str) -> bytes | None:
    """The bytes, or None; only the one text that ``_base32`` makes is taken."""
    try:
        raw = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    except ValueError:
        return None
    return raw if _base32(raw) == text else None

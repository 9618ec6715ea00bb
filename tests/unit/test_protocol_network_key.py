"""Key derivation, the key file, invites."""

from __future__ import annotations

import base64
import hashlib

import pytest

from lloom_sidecar.errors import ConfigError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.protocol.network_key import (
    Invite,
    NetworkKey,
    NetworkKeys,
    format_key_file,
    hkdf_sha256,
    parse_key_file,
)
from lloom_sidecar.protocol.varint import encode_varint

KEY = NetworkKey(b"\x4e" * 32)
OLD = NetworkKey(b"\x4f" * 32)
PEER = PeerId.from_ed25519(bytes(range(32)))
ADDRESS = Multiaddr.parse(f"/dns4/validator.example/tcp/4001/p2p/{PEER}")

# RFC 5869, appendix A, the three test cases with SHA-256.
RFC_5869 = {
    "A.1": (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    "A.2": (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    "A.3": (
        "0b" * 22,
        "",
        "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
}


@pytest.mark.parametrize("case", RFC_5869)
def test_hkdf_is_that_of_rfc_5869(case: str) -> None:
    secret, salt, info, expected = map(bytes.fromhex, RFC_5869[case])
    assert hkdf_sha256(secret, salt=salt, info=info, length=len(expected)) == expected


class TestNetworkKey:
    def test_no_two_derived_keys_are_alike_and_none_is_the_key(self) -> None:
        derived = {KEY.k_hello, KEY.k_announce, KEY.k_psk, KEY.network_id, b"\x4e" * 32}
        assert len(derived) == 5
        assert {len(key) for key in derived} == {32}

    def test_repr_and_str_hide_it(self) -> None:
        shown = repr(KEY) + str(KEY) + repr(NetworkKeys(KEY, OLD, 1)) + repr(Invite((ADDRESS,), KEY))
        for secret in (KEY._raw, KEY.k_hello, KEY.k_announce, KEY.k_psk):
            assert secret.hex() not in shown
            assert repr(secret) not in shown
        assert KEY.network_id.hex()[:16] in shown

    def test_equal_keys_are_equal(self) -> None:
        assert NetworkKey(b"\x4e" * 32) == KEY
        assert len({KEY, NetworkKey(b"\x4e" * 32), OLD}) == 2
        assert KEY != b"\x4e" * 32

    def test_it_has_32_bytes(self) -> None:
        with pytest.raises(ValueError, match="32 bytes, not 31"):
            NetworkKey(bytes(31))

    def test_a_tag_binds_signer_and_sequence(self) -> None:
        other = PeerId.from_ed25519(bytes(32))
        tags = {KEY.announce_tag(PEER, 1), KEY.announce_tag(PEER, 2), KEY.announce_tag(other, 1)}
        assert len(tags | {OLD.announce_tag(PEER, 1)}) == 4


class TestKeyFile:
    def test_one_key(self) -> None:
        assert parse_key_file(format_key_file(KEY)) == NetworkKeys(KEY)

    def test_after_a_rotation(self) -> None:
        keys = parse_key_file(format_key_file(KEY, (OLD, 1000)))
        assert keys == NetworkKeys(KEY, OLD, 1000)
        assert keys.valid(999) == (KEY, OLD)
        assert keys.valid(1000) == (KEY,)
        assert NetworkKeys(KEY).valid(0) == (KEY,)

    def test_blank_lines_comments_and_line_ends_do_not_matter(self) -> None:
        text = format_key_file(KEY).decode().replace("\n", "\r\n\n# mine\n  ")
        assert parse_key_file(text.encode()) == NetworkKeys(KEY)

    @pytest.mark.parametrize("previous", [(KEY, 1000), (OLD, 0), (OLD, 10**18)])
    def test_a_senseless_previous_key_is_not_written(self, previous: tuple[NetworkKey, int]) -> None:
        with pytest.raises(ValueError, match="previous key"):
            format_key_file(KEY, previous)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "empty"),
            (b"\n# only a comment\n", "empty"),
            (b"\xff\xfe", "not text"),
            (b"x" * 9000, "over 8192 bytes"),
            (b"hello there\n", "damaged"),
            (b"format: something-else\n", "not a Lloom network key file"),
            (b"format: lloom-network-key-2\n", "newer Lloom: update"),
            (Invite((), KEY).encode().encode(), "this is an invite"),
            (format_key_file(KEY).replace(b"current", b"curr\xc3\xa4nt"), "missing or unknown"),
            (format_key_file(KEY)[:-30], "cut off"),
            (format_key_file(KEY)[:-2] + b"\n", "checksum does not fit"),
            (format_key_file(KEY).replace(b": jz", b": jy"), "checksum does not fit"),
            (format_key_file(KEY, (OLD, 1000)).replace(b"1000", b"9000"), "checksum does not fit"),
            (format_key_file(KEY) + b"format: lloom-network-key-1\n", "one twice"),
        ],
    )
    def test_what_is_wrong_is_said(self, data: bytes, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            parse_key_file(data)

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["current: a"], "not 32 bytes"),
            (["current: aaaa!"], "not 32 bytes"),
            (["current: ae"], "not 32 bytes"),
            (["current: {key}", "previous: {key}", "previous-until-ms: 5"], "previous key cannot be used"),
            (["current: {key}", "previous: {old}", "previous-until-ms: 0"], "previous key cannot be used"),
            (["current: {key}", "previous: {old}", "previous-until-ms: 1e3"], "previous key cannot be used"),
        ],
    )
    def test_a_valid_checksum_is_not_enough(self, lines: list[str], message: str) -> None:
        key, old = (base64.b32encode(k._raw).decode().rstrip("=").lower() for k in (KEY, OLD))
        content = "\n".join(["format: lloom-network-key-1", *lines]).format(key=key, old=old) + "\n"
        checksum = hashlib.sha256(content.encode()).hexdigest()[:16]
        with pytest.raises(ConfigError, match=message):
            parse_key_file(f"{content}checksum: {checksum}\n".encode())


def invite_text(content: bytes, *, checksum: bytes | None = None) -> str:
    body = encode_varint(len(content)) + content
    right = hashlib.sha256(b"lloom-invite-1:" + body).digest()[:4]
    raw = body + (right if checksum is None else checksum)
    return "lloom-invite-1:" + base64.b32encode(raw).decode().rstrip("=").lower()


class TestInvite:
    @pytest.mark.parametrize("validators", [(), (ADDRESS,), (ADDRESS,) * 16])
    def test_it_comes_back(self, validators: tuple[Multiaddr, ...]) -> None:
        invite = Invite(validators, KEY)
        text = invite.encode()
        assert len(text.split()) == 1
        assert Invite.decode(text) == invite

    def test_letter_case_and_white_space_do_not_matter(self) -> None:
        text = Invite((ADDRESS,), KEY).encode()
        wrapped = "\n  ".join(text[i : i + 40] for i in range(0, len(text), 40))
        assert Invite.decode(f" {wrapped.upper()}\n") == Invite((ADDRESS,), KEY)

    def test_an_address_without_a_peer_is_not_invited_to(self) -> None:
        with pytest.raises(ValueError, match="ends with /p2p/"):
            Invite((Multiaddr.parse("/ip4/192.0.2.1/tcp/4001"),), KEY)

    def test_too_many_validators(self) -> None:
        with pytest.raises(ValueError, match="at most 16"):
            Invite((ADDRESS,) * 17, KEY)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "empty"),
            ("x" * 40_000, "over 32768 characters"),
            ("lloom-invite-2:aaaa", "newer Lloom: update"),
            (format_key_file(KEY).decode(), "network key file, not an invite"),
            (str(ADDRESS), "an address, not an invite"),
            ("lloom-ticket:aaaa", "does not begin with lloom-invite-1:"),
            ("lloom-invite-1:", "cut off"),
            (invite_text(KEY._raw + b"\x00")[:-8], "cut off"),
            (invite_text(KEY._raw + b"\x00")[:-1] + "1", "characters that no invite has"),
            (invite_text(KEY._raw + b"\x00", checksum=bytes(9)), "something behind its end"),
            (invite_text(KEY._raw + b"\x00", checksum=bytes(4)), "checksum does not fit"),
            ("lloom-invite-1:" + "77" * 8, "length cannot be read"),
            (invite_text(KEY._raw), "a length is missing"),
            (invite_text(b"short"), "32 bytes, not"),
            (invite_text(KEY._raw + b"\x11"), "over the limit"),
            (invite_text(KEY._raw + b"\x01\x20" + ADDRESS.raw), "not a multiaddr|do not add up"),
            (invite_text(KEY._raw + b"\x00" + b"more"), "do not add up"),
            (invite_text(KEY._raw + b"\x01\x02zz"), "not a multiaddr"),
        ],
    )
    def test_what_is_wrong_is_said(self, text: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message) as caught:
            Invite.decode(text)
        assert KEY._raw.hex() not in caught.value.message

    def test_one_changed_character_is_always_noticed(self) -> None:
        text = Invite((ADDRESS,), KEY).encode()
        for position in range(len("lloom-invite-1:"), len(text)):
            changed = text[:position] + ("a" if text[position] != "a" else "b") + text[position + 1 :]
            with pytest.raises(ConfigError):
                Invite.decode(changed)

"""Network status: what one may say, and what is not believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from lloom_sidecar.errors import AnnouncementError, LocalProtocolError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.announcement import MAX_PRICE
from lloom_sidecar.protocol.envelope import Signer, seal
from lloom_sidecar.protocol.names import KIND_ANNOUNCEMENT, KIND_STATUS
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.status import (
    MAX_MODELS,
    MAX_STATUS_BYTES,
    ModelStatus,
    NetworkStatus,
    check_status_clock,
    open_status,
    seal_status,
)

SIGNER = Signer(b"s" * 32)
OTHER = Signer(b"o" * 32)
KEY = NetworkKey(b"k" * 32)
OTHER_KEY = NetworkKey(b"l" * 32)
NOW_MS = 1_790_000_000_000
STATUS = NetworkStatus(
    executors=3,
    members=5,
    models_total=2,
    models=(ModelStatus("m", 3, 12, Price(1, 2, "EUR"), 2), ModelStatus("n", 1, 4)),
    software=(("lloom/0.1.0", 4), ("", 1)),
    in_flight=1,
    queued=2,
    slots=16,
)


def sealed(
    status: NetworkStatus = STATUS, *, key: NetworkKey | None = KEY, ttl_s: float = 90, sequence: int = 7
) -> bytes:
    return seal_status(signer=SIGNER, key=key, sequence=sequence, issued_at_ms=NOW_MS, ttl_s=ttl_s, status=status)


def reason_of(raw: bytes, *, keys: tuple[NetworkKey, ...] = (KEY,), signer: PeerId | None = SIGNER.peer) -> str:
    with pytest.raises(AnnouncementError) as caught:
        open_status(raw, keys=keys, expected_signer=signer)
    return caught.value.reason


def changed(change: Callable[[pb.NetworkStatusClaims], object]) -> bytes:
    """A status whose claims were changed before they were signed."""
    claims = pb.NetworkStatusClaims.FromString(pb.Envelope.FromString(sealed()).payload)
    change(claims)
    return seal(KIND_STATUS, claims.SerializeToString(), SIGNER)


def test_what_was_sealed_opens() -> None:
    signed = open_status(sealed(), keys=(OTHER_KEY, KEY), expected_signer=SIGNER.peer)
    assert signed.status == STATUS
    assert (signed.peer, signed.sequence, signed.issued_at_ms, signed.ttl_s) == (SIGNER.peer, 7, NOW_MS, 90)
    assert signed.is_member
    assert signed.raw == sealed()


@pytest.mark.parametrize("keys", [(), (OTHER_KEY,)])
def test_another_networks_status_opens_and_is_no_members(keys: tuple[NetworkKey, ...]) -> None:
    assert not open_status(sealed(), keys=keys, expected_signer=None).is_member


def test_without_a_network_there_is_no_tag() -> None:
    assert not open_status(sealed(key=None), keys=(KEY,), expected_signer=None).is_member


def test_models_without_room_are_left_out() -> None:
    price = Price(MAX_PRICE, MAX_PRICE, "8LETTERS")
    models = tuple(
        ModelStatus(f"{number:03}" + "m" * 197, 2**32 - 1, 2**32 - 1, price, 2**32 - 1)
        for number in range(MAX_MODELS + 9)
    )
    longest = replace(STATUS, models=models, software=tuple((f"{number:02}" + "s" * 62, 1) for number in range(16)))
    raw = sealed(longest)
    assert len(raw) <= MAX_STATUS_BYTES
    found = open_status(raw, keys=(KEY,), expected_signer=None).status.models
    assert found == models[: len(found)]
    assert found


def test_one_that_would_not_open_is_not_sealed() -> None:
    for status, ttl_s, sequence in (
        (STATUS, 0.5, 1),
        (STATUS, 90, 0),
        (replace(STATUS, executors=-1), 90, 1),
        (replace(STATUS, software=tuple((str(number), 1) for number in range(17))), 90, 1),
        (replace(STATUS, software=tuple(("x" * 2000 + str(number), 1) for number in range(16)), models=()), 90, 1),
    ):
        with pytest.raises(LocalProtocolError):
            sealed(status, ttl_s=ttl_s, sequence=sequence)


class TestNotBelieved:
    def test_too_long(self) -> None:
        assert reason_of(b"\x00" * (MAX_STATUS_BYTES + 1)) == "size"

    def test_no_envelope(self) -> None:
        assert reason_of(b"garbage") == "envelope"
        assert reason_of(seal(KIND_ANNOUNCEMENT, b"", SIGNER)) == "envelope"

    def test_published_by_somebody_else(self) -> None:
        assert reason_of(sealed(), signer=OTHER.peer) == "publisher"

    def test_forged(self) -> None:
        raw = bytearray(sealed())
        raw[-1] ^= 1
        assert reason_of(bytes(raw)) == "signature"

    def test_claims_that_cannot_be_read(self) -> None:
        assert reason_of(seal(KIND_STATUS, b"\xff\xff", SIGNER)) == "schema"

    def test_in_the_name_of_another_peer(self) -> None:
        assert reason_of(changed(lambda c: setattr(c, "peer", OTHER.peer.raw))) == "publisher"

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: setattr(c, "sequence", 0),
            lambda c: setattr(c, "sequence", 2**63),
            lambda c: setattr(c, "issued_at_ms", 0),
            lambda c: setattr(c, "ttl_ms", 999),
            lambda c: setattr(c, "ttl_ms", 900_001),
            lambda c: setattr(c, "network_id", b"short"),
            lambda c: setattr(c, "tag", b"short"),
            lambda c: setattr(c, "network_id", b""),
            lambda c: c.models.extend([pb.ModelStatus(id=str(number)) for number in range(MAX_MODELS)]),
            lambda c: c.models.add(id="m"),
            lambda c: c.models.add(id=" bad"),
            lambda c: c.models.add(id="x", median_price=pb.Price(prompt_per_million=MAX_PRICE + 1)),
            lambda c: c.models.add(id="x", median_price=pb.Price(currency="TOO-LONG-A-WORD")),
            lambda c: c.models.add(id="x", median_price=pb.Price(currency="\n")),
            lambda c: c.software.add(software="x" * 65),
            lambda c: c.software.add(software="\x1b[2J"),
            lambda c: c.software.extend([pb.SoftwareCount(software="x")] * 16),
        ],
    )
    def test_a_broken_rule(self, change: Callable[[pb.NetworkStatusClaims], object]) -> None:
        assert reason_of(changed(change)) == "schema"

    @pytest.mark.parametrize(
        "change",
        [lambda c: setattr(c, "tag", b""), lambda c: setattr(c, "tag", b"t" * 32), lambda c: setattr(c, "sequence", 8)],
    )
    def test_by_somebody_without_the_networks_key(self, change: Callable[[pb.NetworkStatusClaims], object]) -> None:
        assert reason_of(changed(change)) == "tag"


@pytest.mark.parametrize("off_ms", [900_000, -900_000])
def test_its_clock_may_be_a_quarter_of_an_hour_off(off_ms: int) -> None:
    signed = open_status(sealed(), keys=(KEY,), expected_signer=None)
    check_status_clock(signed, NOW_MS + off_ms)
    with pytest.raises(AnnouncementError) as caught:
        check_status_clock(signed, NOW_MS + off_ms + (1 if off_ms > 0 else -1))
    assert caught.value.reason == "clock"

"""Announcements: what is signed, what is believed, and why the rest is not."""

from __future__ import annotations

from typing import Any

import pytest

from lloom_sidecar.errors import AnnouncementError, LocalProtocolError
from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.protocol.announcement import (
    MAX_BRIEF_BYTES,
    MAX_FULL_BYTES,
    announcement_interval_s,
    announcement_ttl_s,
    check_clock,
    open_announcement,
    seal_announcement,
)
from lloom_sidecar.protocol.envelope import Signer, seal
from lloom_sidecar.protocol.names import KIND_ANNOUNCEMENT, KIND_REQUEST
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Announcement, Kind, Load, ModelOffer, Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

SIGNER = Signer(bytes(range(32)))
OTHER = Signer(bytes(32))
KEY = NetworkKey(b"k" * 32)
OLD = NetworkKey(b"o" * 32)
NOW_MS = 1_790_000_000_000
ADDRESS = Multiaddr.parse("/ip4/192.0.2.1/tcp/4001")
MODEL = ModelOffer(
    id="org/model:7b",
    family="llama",
    context_length=8192,
    quantisation="Q4_K_M",
    features=frozenset({"chat", "tools"}),
    price=Price(5, 7, "EUR"),
    slots=2,
    digest=b"w" * 32,
)


def sealed(key: NetworkKey | None = KEY, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "sequence": 7,
        "issued_at_ms": NOW_MS,
        "ttl_s": 30.0,
        "kind": Kind.UPDATE,
        "addrs": (ADDRESS, ADDRESS.with_peer(SIGNER.peer)),
        "models": (MODEL, ModelOffer("free")),
        "load": Load(1, 2, 12.5, 0.25),
        "software": "lloom/0.1.0",
    }
    return seal_announcement(signer=SIGNER, key=key, **(fields | changes))


def brief(kind: int, key: NetworkKey | None = KEY, **changes: Any) -> bytes:
    digest = b"f" * 32 if kind == Kind.HEARTBEAT else b""
    return sealed(key, **({"kind": kind, "addrs": (), "models": (), "full_digest": digest} | changes))


def opened(raw: bytes, *keys: NetworkKey) -> Announcement:
    return open_announcement(raw, keys=keys or (KEY,), expected_signer=SIGNER.peer)


def claims(kind: int = Kind.UPDATE) -> pb.AnnouncementClaims:
    """Valid claims, to be spoilt."""
    raw = sealed() if kind == Kind.UPDATE else brief(kind)
    return pb.AnnouncementClaims.FromString(pb.Envelope.FromString(raw).payload)


def signed(message: pb.AnnouncementClaims) -> bytes:
    return seal(KIND_ANNOUNCEMENT, message.SerializeToString(), SIGNER)


def refused(raw: bytes, *keys: NetworkKey) -> str:
    with pytest.raises(AnnouncementError) as caught:
        opened(raw, *keys)
    return caught.value.reason


class TestWhatIsBelieved:
    def test_a_full_one_says_all(self) -> None:
        announcement = opened(sealed())
        assert announcement.peer == SIGNER.peer
        assert (announcement.sequence, announcement.issued_at_ms, announcement.ttl_s) == (7, NOW_MS, 30.0)
        assert (announcement.kind, announcement.is_full, announcement.is_member) == (Kind.UPDATE, True, True)
        assert announcement.addrs == (ADDRESS, ADDRESS.with_peer(SIGNER.peer))
        assert announcement.models == (MODEL, ModelOffer("free"))
        assert announcement.load == Load(1, 2, 12.5, 0.25)
        assert (announcement.software, announcement.network_id) == ("lloom/0.1.0", KEY.network_id)
        assert announcement.raw == sealed()

    @pytest.mark.parametrize("kind", [Kind.HEARTBEAT, Kind.REMOVAL])
    def test_a_brief_one_is_under_512_bytes(self, kind: int) -> None:
        raw = brief(kind, load=Load(2**32 - 1, 2**32 - 1, 1e6, 1e6), software="s" * 64, sequence=2**63 - 1)
        assert len(raw) <= MAX_BRIEF_BYTES
        announcement = opened(raw)
        assert not announcement.is_full
        assert announcement.full_digest == (b"f" * 32 if kind == Kind.HEARTBEAT else b"")

    @pytest.mark.parametrize(
        ("made_with", "keys", "is_member"),
        [
            (KEY, (KEY, OLD), True),
            (OLD, (KEY, OLD), True),
            (OLD, (KEY,), False),
            (None, (KEY,), False),
            (KEY, (), False),
        ],
    )
    def test_membership_is_shown_by_the_tag(
        self, made_with: NetworkKey | None, keys: tuple[NetworkKey, ...], is_member: bool
    ) -> None:
        announcement = open_announcement(sealed(made_with), keys=keys, expected_signer=None)
        assert announcement.is_member is is_member
        assert announcement.network_id == (b"" if made_with is None else made_with.network_id)

    def test_the_largest_one(self) -> None:
        models = [ModelOffer(f"{number:0150d}", features=frozenset({"chat"})) for number in range(64)]
        addrs = [Multiaddr.parse(f"/ip4/192.0.2.{number}/tcp/4001") for number in range(8)]
        raw = sealed(models=models, addrs=addrs)
        assert 10_000 < len(raw) <= MAX_FULL_BYTES
        assert opened(raw).models == tuple(models)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("raw", "reason"),
        [
            (b"x" * (MAX_FULL_BYTES + 1), "size"),
            (b"", "envelope"),
            (b"\xff\xff", "envelope"),
            (seal(KIND_REQUEST, b"x", SIGNER), "envelope"),
            (seal(KIND_ANNOUNCEMENT, b"x", OTHER), "publisher"),
            (sealed()[:-1] + b"\x00", "signature"),
            (seal(KIND_ANNOUNCEMENT, b"\xff", SIGNER), "schema"),
        ],
        ids=["size", "empty", "garbage", "kind", "publisher", "forged", "claims"],
    )
    def test_before_its_claims_are_read(self, raw: bytes, reason: str) -> None:
        assert refused(raw) == reason

    @pytest.mark.parametrize("kind", [Kind.HEARTBEAT, Kind.REMOVAL])
    def test_a_brief_one_over_512_bytes(self, kind: int) -> None:
        message = claims(kind)
        message.software = "x" * 300
        assert refused(signed(message)) == "size"

    def test_one_about_another_peer(self) -> None:
        message = claims()
        message.peer = OTHER.peer.raw
        assert refused(signed(message)) == "publisher"

    @pytest.mark.parametrize(
        "tag", [b"", b"t" * 32, KEY.announce_tag(SIGNER.peer, 8), OLD.announce_tag(SIGNER.peer, 7)]
    )
    def test_a_wrong_or_missing_tag_for_our_network(self, tag: bytes) -> None:
        message = claims()
        message.tag = tag
        assert refused(signed(message)) == "tag"
        assert not opened(signed(message), OLD).is_member

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("sequence", 0),
            ("sequence", 2**63),
            ("issued_at_ms", 0),
            ("issued_at_ms", -1),
            ("ttl_ms", 999),
            ("ttl_ms", 900_001),
            ("kind", 0),
            ("kind", 5),
            ("network_id", b"short"),
            ("network_id", b""),
            ("tag", b"short"),
            ("software", "x" * 65),
            ("software", "a\nb"),
            ("full_digest", b"f" * 32),
        ],
    )
    def test_a_field_out_of_its_range(self, name: str, value: object) -> None:
        message = claims()
        setattr(message, name, value)
        assert refused(signed(message)) == ("size" if name == "kind" and len(signed(message)) > 511 else "schema")

    @pytest.mark.parametrize("kind", [Kind.HEARTBEAT, Kind.REMOVAL])
    def test_a_brief_one_with_what_only_full_ones_have(self, kind: int) -> None:
        for part in ("addrs", "models", "digest"):
            message = claims(kind)
            if part == "addrs":
                message.addrs.append(ADDRESS.raw)
            elif part == "models":
                message.models.add(id="m", slots=1)
            else:
                message.full_digest = b"" if kind == Kind.HEARTBEAT else b"f" * 32
            assert refused(signed(message)) == "schema"

    @pytest.mark.parametrize(
        "addrs",
        [
            [ADDRESS.raw] * 9,
            [b""],
            [b"\x90\x03"],
            [b"\xff\xff"],
            [Multiaddr.parse("/unix/run/p2pd.sock").raw],
            [ADDRESS.with_peer(OTHER.peer).raw],
        ],
        ids=["too many", "empty", "cut", "garbage", "unix", "another peer's"],
    )
    def test_addresses_that_lead_nowhere(self, addrs: list[bytes]) -> None:
        message = claims()
        del message.addrs[:]
        message.addrs.extend(addrs)
        assert refused(signed(message)) == "schema"

    @pytest.mark.parametrize(
        "model",
        [
            pb.Model(slots=1),
            pb.Model(id="x" * 201, slots=1),
            pb.Model(id="m\n", slots=1),
            pb.Model(id="free", slots=1),
            pb.Model(id="m"),
            pb.Model(id="m", slots=65_536),
            pb.Model(id="m", slots=1, family="x" * 65),
            pb.Model(id="m", slots=1, quantisation="x" * 33),
            pb.Model(id="m", slots=1, features=["f"] * 17),
            pb.Model(id="m", slots=1, features=["No!"]),
            pb.Model(id="m", slots=1, digest=b"short"),
            pb.Model(id="m", slots=1, price=pb.Price(prompt_per_million=10**15 + 1, currency="EUR")),
            pb.Model(id="m", slots=1, price=pb.Price(completion_per_million=1)),
            pb.Model(id="m", slots=1, price=pb.Price(completion_per_million=1, currency="E R")),
            pb.Model(id="m", slots=1, price=pb.Price(currency="x" * 9)),
        ],
    )
    def test_a_model_that_breaks_the_rules(self, model: pb.Model) -> None:
        message = claims()
        message.models.append(model)
        assert refused(signed(message)) == "schema"

    def test_too_many_models(self) -> None:
        message = claims()
        for number in range(63):
            message.models.add(id=str(number), slots=1)
        assert refused(signed(message)) == "schema"

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
    @pytest.mark.parametrize("name", ["tokens_per_s", "ttft_s"])
    def test_a_load_that_is_no_number(self, name: str, value: float) -> None:
        message = claims()
        setattr(message.load, name, value)
        assert refused(signed(message)) == "schema"


class TestSealing:
    @pytest.mark.parametrize(
        "changes",
        [
            {"kind": 9},
            {"sequence": -1},
            {"sequence": 0},
            {"sequence": 2**64},
            {"ttl_s": 0.5},
            {"ttl_s": float("nan")},
            {"ttl_s": float("inf")},
            {"ttl_s": 901},
            {"software": "\ud800"},
            {"models": [MODEL, MODEL]},
            {"models": [ModelOffer("m", price=Price(-1))]},
            {"models": [ModelOffer(f"{number:0200d}") for number in range(64)], "software": "x"},
            {"load": Load(tokens_per_s=1e300)},
            {"full_digest": b"f" * 32},
            {"addrs": [ADDRESS.with_peer(OTHER.peer)]},
        ],
    )
    def test_what_others_would_refuse_is_not_signed(self, changes: dict[str, Any]) -> None:
        if changes.get("software") == "x":  # 64 models with all they may have are over 16 KiB
            long = "x" * 64
            changes["models"] = [ModelOffer(model.id, family=long, digest=bytes(32)) for model in changes["models"]]
        with pytest.raises(LocalProtocolError, match="break the rules"):
            sealed(**changes)

    def test_without_a_key_there_is_no_tag(self) -> None:
        message = pb.AnnouncementClaims.FromString(pb.Envelope.FromString(sealed(None)).payload)
        assert (message.network_id, message.tag) == (b"", b"")


@pytest.mark.parametrize("difference_ms", [-900_000, 0, 900_000])
def test_a_clock_within_15_minutes_will_do(difference_ms: int) -> None:
    check_clock(opened(sealed()), NOW_MS + difference_ms)


@pytest.mark.parametrize("difference_ms", [-900_001, 900_001])
def test_a_clock_beyond_is_refused(difference_ms: int) -> None:
    with pytest.raises(AnnouncementError) as caught:
        check_clock(opened(sealed()), NOW_MS + difference_ms)
    assert caught.value.reason == "clock"


@pytest.mark.parametrize(
    ("executors", "jitter", "interval_s", "ttl_s"),
    [(0, 0, 10, 30), (500, 0, 10, 30), (1000, 0, 20, 60), (1000, 1, 18, 54), (6000, 0, 120, 360), (10**9, 0, 120, 360)],
)
def test_the_interval_keeps_the_networks_rate(executors: int, jitter: float, interval_s: float, ttl_s: float) -> None:
    assert announcement_interval_s(executors, jitter) == pytest.approx(interval_s)
    assert announcement_ttl_s(announcement_interval_s(executors, jitter)) == pytest.approx(ttl_s)


def test_a_ttl_is_at_most_15_minutes() -> None:
    assert announcement_ttl_s(1000) == 900

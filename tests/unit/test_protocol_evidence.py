"""Evidence: what a validator may say, and what is not believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from lloom_sidecar.errors import AnnouncementError, LocalProtocolError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.claims import seal_receipt
from lloom_sidecar.protocol.envelope import Signer, says_kind, seal
from lloom_sidecar.protocol.evidence import (
    MAX_ANSWERS,
    MAX_EVIDENCE_BYTES,
    MAX_ROUNDS,
    CanaryAnswer,
    CanaryRound,
    Evidence,
    check_evidence_clock,
    open_evidence,
    seal_evidence,
)
from lloom_sidecar.protocol.names import KIND_EVIDENCE, KIND_RECEIPT, KIND_STATUS
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

VALIDATOR = Signer(b"v" * 32)
OTHER = Signer(b"o" * 32)
EXECUTORS = [Signer(bytes([i]) * 32) for i in range(1, 9)]
SUBJECT = EXECUTORS[0].peer
KEY = NetworkKey(b"k" * 32)
OTHER_KEY = NetworkKey(b"l" * 32)
NOW_MS = 1_790_000_000_000


def receipt(signer: Signer, number: int, **changes: Any) -> bytes:
    claims: dict[str, Any] = {
        "client": VALIDATOR.peer.raw,
        "executor": signer.peer.raw,
        "model": "m",
        "ended_at_ms": NOW_MS + number,
    }
    return seal_receipt(pb.ReceiptClaims(**(claims | changes)), signer)


def round_of(number: int, executors: list[Signer], **changes: Any) -> CanaryRound:
    answers = [
        CanaryAnswer(one.peer, receipt(one, number, **changes), bytes([index]) * 32, one.peer != SUBJECT)
        for index, one in enumerate(executors)
    ]
    return CanaryRound(bytes([number]) * 32, tuple(answers))


def evidence_of(executors: int = 3, rounds: int = 2, **changes: Any) -> Evidence:
    return Evidence(
        SUBJECT, "m", b"d" * 32, tuple(round_of(n, EXECUTORS[:executors], **changes) for n in range(rounds))
    )


EVIDENCE = evidence_of()


def sealed(evidence: Evidence = EVIDENCE, *, key: NetworkKey | None = KEY, sequence: int = 7) -> bytes:
    return seal_evidence(
        signer=VALIDATOR, key=key, sequence=sequence, issued_at_ms=NOW_MS, ttl_s=900, evidence=evidence
    )


def reason_of(raw: bytes, *, keys: tuple[NetworkKey, ...] = (KEY,), signer: PeerId | None = VALIDATOR.peer) -> str:
    with pytest.raises(AnnouncementError) as caught:
        open_evidence(raw, keys=keys, expected_signer=signer)
    return caught.value.reason


def changed(change: Callable[[pb.EvidenceClaims], object]) -> bytes:
    """Evidence whose claims were changed before they were signed."""
    claims = pb.EvidenceClaims.FromString(pb.Envelope.FromString(sealed()).payload)
    change(claims)
    return seal(KIND_EVIDENCE, claims.SerializeToString(), VALIDATOR)


def test_it_comes_back() -> None:
    found = open_evidence(sealed(), keys=(OTHER_KEY, KEY), expected_signer=VALIDATOR.peer)
    assert (found.peer, found.sequence, found.issued_at_ms, found.ttl_s) == (VALIDATOR.peer, 7, NOW_MS, 900)
    assert found.is_member
    assert found.evidence == EVIDENCE
    assert says_kind(sealed(), KIND_EVIDENCE)
    assert not says_kind(sealed(), KIND_STATUS)


def test_the_largest_one_has_room() -> None:
    raw = sealed(evidence_of(executors=MAX_ANSWERS, rounds=MAX_ROUNDS))
    assert len(raw) <= MAX_EVIDENCE_BYTES
    assert len(open_evidence(raw, keys=(KEY,), expected_signer=None).evidence.rounds) == MAX_ROUNDS


def test_without_a_digest_and_of_another_network() -> None:
    found = open_evidence(sealed(replace(EVIDENCE, model_digest=b"")), keys=(KEY,), expected_signer=None)
    assert found.evidence.model_digest == b""
    assert not open_evidence(sealed(key=None), keys=(KEY,), expected_signer=None).is_member
    assert not open_evidence(sealed(key=OTHER_KEY), keys=(KEY,), expected_signer=None).is_member


def test_who_said_it() -> None:
    raw = sealed()
    assert reason_of(raw, signer=OTHER.peer) == "publisher"
    assert reason_of(changed(lambda c: setattr(c, "peer", OTHER.peer.raw))) == "publisher"
    assert reason_of(raw[:-1] + bytes([raw[-1] ^ 1])) == "signature"
    assert reason_of(b"garbage") == "envelope"
    assert reason_of(seal(KIND_STATUS, b"", VALIDATOR)) == "envelope"
    assert reason_of(bytes(MAX_EVIDENCE_BYTES + 1)) == "size"
    assert reason_of(changed(lambda c: setattr(c, "tag", b"t" * 32))) == "tag"
    assert reason_of(changed(lambda c: setattr(c, "tag", b""))) == "tag"
    assert reason_of(seal(KIND_EVIDENCE, b"\xff", VALIDATOR)) == "schema"


def swap(claims: pb.EvidenceClaims, round_: int, answer: int, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(claims.rounds[round_].answers[answer], name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c, "issued_at_ms", 0),
        lambda c: setattr(c, "ttl_ms", 999),
        lambda c: setattr(c, "ttl_ms", 900_001),
        lambda c: setattr(c, "model", ""),
        lambda c: setattr(c, "model", "another"),
        lambda c: setattr(c, "model_digest", b"short"),
        lambda c: setattr(c, "subject", b"x"),
        lambda c: setattr(c, "subject", OTHER.peer.raw),  # has no answer in it
        lambda c: setattr(c, "subject", EXECUTORS[1].peer.raw),  # agrees
        lambda c: c.rounds.pop(),
        lambda c: c.rounds.extend([c.rounds[0]] * 4),
        lambda c: setattr(c.rounds[1], "prompt_digest", c.rounds[0].prompt_digest),
        lambda c: setattr(c.rounds[1], "prompt_digest", b"x"),
        lambda c: c.rounds[0].answers.pop(),
        lambda c: c.rounds[0].answers.extend([c.rounds[0].answers[0]] * 7),
        lambda c: c.rounds[0].answers.append(c.rounds[0].answers[1]),  # one executor twice
        lambda c: swap(c, 0, 1, agrees=False),  # no majority
        lambda c: swap(c, 0, 1, text_digest=b"x"),
        lambda c: swap(c, 0, 1, receipt=b"x"),
        lambda c: swap(c, 0, 1, receipt=c.rounds[0].answers[1].receipt[:-1] + b"x"),
        lambda c: swap(c, 1, 1, receipt=c.rounds[0].answers[1].receipt),  # one receipt twice
        lambda c: swap(c, 0, 1, receipt=receipt(EXECUTORS[1], 0, client=OTHER.peer.raw)),
        lambda c: swap(c, 0, 1, receipt=receipt(EXECUTORS[1], 0, executor=OTHER.peer.raw)),
        lambda c: swap(c, 0, 1, receipt=receipt(EXECUTORS[1], 0, model="n")),
        lambda c: swap(c, 0, 1, receipt=seal(KIND_RECEIPT, b"\xff", EXECUTORS[1])),
    ],
)
def test_rules(change: Callable[[pb.EvidenceClaims], object]) -> None:
    assert reason_of(changed(change)) == "schema"


def test_the_sequence_and_the_network_have_rules_too() -> None:
    claims = pb.EvidenceClaims.FromString(pb.Envelope.FromString(sealed(key=None)).payload)
    for name, value in (("sequence", 0), ("tag", b"t" * 32), ("network_id", b"n")):
        other = pb.EvidenceClaims()
        other.CopyFrom(claims)
        setattr(other, name, value)
        assert reason_of(seal(KIND_EVIDENCE, other.SerializeToString(), VALIDATOR)) == "schema"


def test_what_breaks_the_rules_is_not_made() -> None:
    for evidence in (replace(EVIDENCE, rounds=()), replace(EVIDENCE, subject=OTHER.peer), replace(EVIDENCE, model="")):
        with pytest.raises(LocalProtocolError):
            sealed(evidence)


def test_the_clock() -> None:
    found = open_evidence(sealed(), keys=(KEY,), expected_signer=None)
    for offset_ms in (-900_000, 900_000):
        check_evidence_clock(found, NOW_MS + offset_ms)
    for offset_ms in (-900_001, 900_001):
        with pytest.raises(AnnouncementError) as caught:
            check_evidence_clock(found, NOW_MS + offset_ms)
        assert caught.value.reason == "clock"

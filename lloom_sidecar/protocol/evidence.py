"""Evidence: what a validator found when it asked several executors of one model the same. Making and checking. Pure.

It is evidence, not proof: the executors' own receipts in it prove that they answered the validator, each something of
its own, and the digests say which texts; that the questions were the same, and that the texts differ by more than the
hardware explains, is the validator's word.
Source: PROTOCOL.md, Evidence.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import DecodeError

from lloom_sidecar.errors import AnnouncementError, LocalProtocolError, RemoteProtocolError
from lloom_sidecar.ids import PeerId, check_model_id

from .announcement import MAX_CLOCK_DIFFERENCE_MS, MAX_SEQUENCE
from .envelope import Signer, open_envelope, seal
from .names import KIND_EVIDENCE, KIND_RECEIPT
from .network_key import NetworkKey
from .pb import lloom_pb2 as pb

MAX_EVIDENCE_BYTES: Final = 16 * 1024 - 1
"""Of the envelope."""
MIN_ROUNDS: Final = 2
MAX_ROUNDS: Final = 4
MIN_ANSWERS: Final = 3
MAX_ANSWERS: Final = 7
MIN_TTL_S: Final = 1.0
MAX_TTL_S: Final = 15 * 60.0
DIGEST_BYTES: Final = 32

_REASONS: Final = {"wrong_signer": "publisher", "bad_signature": "signature"}


@dataclass(frozen=True, slots=True)
class CanaryAnswer:
    """What one executor answered in one round."""

    executor: PeerId
    receipt: bytes = field(repr=False)
    """Its signed receipt, as END brought it."""
    text_digest: bytes = field(repr=False)
    """SHA-256 of the answer's text."""
    agrees: bool
    """With most of the others."""


@dataclass(frozen=True, slots=True)
class CanaryRound:
    """One question to several executors."""

    prompt_digest: bytes = field(repr=False)
    """SHA-256 of the body that all of them got."""
    answers: tuple[CanaryAnswer, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """In every round ``subject`` answered unlike most of the others."""

    subject: PeerId
    model: str
    model_digest: bytes
    """As all of them announced it; empty when they announce none."""
    rounds: tuple[CanaryRound, ...]


@dataclass(frozen=True, slots=True)
class SignedEvidence:
    """Evidence whose envelope, signer, receipts and limits were checked."""

    peer: PeerId
    sequence: int
    issued_at_ms: int
    ttl_s: float
    is_member: bool
    """True when its tag was made with a key of one of our networks."""
    evidence: Evidence


def seal_evidence(
    *,
    signer: Signer,
    key: NetworkKey | None,
    sequence: int,
    issued_at_ms: int,
    ttl_s: float,
    evidence: Evidence,
) -> bytes:
    """Sign what the validator whose key ``signer`` is found; returns the envelope. Arguments as ``seal_status``.

    Raises:
        LocalProtocolError: it breaks one of the rules that ``open_evidence`` checks.
    """
    try:
        claims = pb.EvidenceClaims(
            peer=signer.peer.raw,
            sequence=sequence,
            issued_at_ms=issued_at_ms,
            ttl_ms=round(ttl_s * 1000),
            network_id=b"" if key is None else key.network_id,
            tag=b"" if key is None else key.announce_tag(signer.peer, sequence),
            subject=evidence.subject.raw,
            model=evidence.model,
            model_digest=evidence.model_digest,
            rounds=[
                pb.CanaryRound(
                    prompt_digest=one.prompt_digest,
                    answers=[
                        pb.CanaryAnswer(receipt=a.receipt, text_digest=a.text_digest, agrees=a.agrees)
                        for a in one.answers
                    ],
                )
                for one in evidence.rounds
            ],
        )
        raw = seal(KIND_EVIDENCE, claims.SerializeToString(), signer)
        open_evidence(raw, keys=() if key is None else (key,), expected_signer=signer.peer)
    except (AnnouncementError, ValueError, OverflowError) as exc:
        raise LocalProtocolError(f"evidence that would break the rules: {exc}") from exc
    return raw


def open_evidence(raw: bytes, *, keys: Sequence[NetworkKey], expected_signer: PeerId | None) -> SignedEvidence:
    """Check all of it but its clock (``check_evidence_clock``) and whether its sequence is new. Arguments as
    ``open_status``.

    Raises:
        AnnouncementError: reasons, cheapest check first: size, envelope, publisher, signature, tag, schema (receipts
            that do not hold or do not fit included).
    """
    if len(raw) > MAX_EVIDENCE_BYTES:
        raise AnnouncementError("size", f"evidence of {len(raw)} bytes; {MAX_EVIDENCE_BYTES} are allowed")
    try:
        opened = open_envelope(raw, KIND_EVIDENCE, expected_signer=expected_signer)
    except RemoteProtocolError as exc:
        raise AnnouncementError(_REASONS.get(exc.code, "envelope"), exc.message) from exc
    try:
        claims = pb.EvidenceClaims.FromString(opened.payload)
    except DecodeError as exc:
        raise AnnouncementError("schema", "evidence whose claims cannot be read") from exc
    if claims.peer != opened.signer.raw:
        raise AnnouncementError("publisher", "evidence in the name of another peer than its signer")
    is_member = _is_member(claims, opened.signer, keys)
    try:
        evidence = _checked(claims, opened.signer)
    except (ValueError, RemoteProtocolError) as exc:
        raise AnnouncementError("schema", f"evidence that breaks the rules: {exc}") from exc
    return SignedEvidence(
        opened.signer, claims.sequence, claims.issued_at_ms, claims.ttl_ms / 1000, is_member, evidence
    )


def check_evidence_clock(found: SignedEvidence, now_ms: int) -> None:
    """Refuse evidence that was issued over 15 minutes from ``now_ms`` (Unix milliseconds), either way.

    Raises:
        AnnouncementError: reason ``clock``.
    """
    if abs(now_ms - found.issued_at_ms) > MAX_CLOCK_DIFFERENCE_MS:
        raise AnnouncementError("clock", "evidence that was issued over 15 minutes from this node's clock")


def _checked(claims: pb.EvidenceClaims, validator: PeerId) -> Evidence:
    rules = {
        "sequence": 0 < claims.sequence <= MAX_SEQUENCE,
        "issued_at": claims.issued_at_ms > 0,
        "ttl": MIN_TTL_S * 1000 <= claims.ttl_ms <= MAX_TTL_S * 1000,
        "network id": len(claims.network_id) in (0, DIGEST_BYTES),
        "tag": len(claims.tag) in ((0, DIGEST_BYTES) if claims.network_id else (0,)),
        "model digest": len(claims.model_digest) in (0, DIGEST_BYTES),
        "number of rounds": MIN_ROUNDS <= len(claims.rounds) <= MAX_ROUNDS,
        "prompts": len({one.prompt_digest for one in claims.rounds}) == len(claims.rounds)
        and all(len(one.prompt_digest) == DIGEST_BYTES for one in claims.rounds),
    }
    wrong = [name for name, holds in rules.items() if not holds]
    if wrong:
        raise ValueError(", ".join(wrong))
    model = check_model_id(claims.model)
    subject = PeerId(claims.subject)
    rounds = tuple(_round(one, subject, model, validator) for one in claims.rounds)
    receipts = [answer.receipt for one in rounds for answer in one.answers]
    if len(set(receipts)) != len(receipts):
        raise ValueError("one receipt twice")
    return Evidence(subject, model, claims.model_digest, rounds)


def _round(message: pb.CanaryRound, subject: PeerId, model: str, validator: PeerId) -> CanaryRound:
    if not MIN_ANSWERS <= len(message.answers) <= MAX_ANSWERS:
        raise ValueError("number of answers")
    answers = tuple(_answer(one, model, validator) for one in message.answers)
    agreeing = {answer.executor for answer in answers if answer.agrees}
    if len({answer.executor for answer in answers}) != len(answers):
        raise ValueError("one executor twice")
    if 2 * len(agreeing) <= len(answers):
        raise ValueError("no majority")
    if subject in agreeing or all(answer.executor != subject for answer in answers):
        raise ValueError("a round that says nothing against the subject")
    return CanaryRound(message.prompt_digest, answers)


def _answer(message: pb.CanaryAnswer, model: str, validator: PeerId) -> CanaryAnswer:
    opened = open_envelope(message.receipt, KIND_RECEIPT)
    try:
        receipt = pb.ReceiptClaims.FromString(opened.payload)
    except DecodeError as exc:
        raise ValueError("a receipt that cannot be read") from exc
    if receipt.executor != opened.signer.raw or receipt.client != validator.raw or receipt.model != model:
        raise ValueError("a receipt for another exchange")
    if len(message.text_digest) != DIGEST_BYTES:
        raise ValueError("a text's digest")
    return CanaryAnswer(opened.signer, message.receipt, message.text_digest, message.agrees)


def _is_member(claims: pb.EvidenceClaims, signer: PeerId, keys: Sequence[NetworkKey]) -> bool:
    for key in keys:
        if key.network_id == claims.network_id:
            if not hmac.compare_digest(key.announce_tag(signer, claims.sequence), claims.tag):
                raise AnnouncementError("tag", "evidence for this network by somebody without its key")
            return True
    return False

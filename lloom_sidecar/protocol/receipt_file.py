"""Exported receipts: the file that an operator hands to a third party, and what anybody can check in it. Pure.

Source: PROTOCOL.md, Exported receipts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError

from lloom_sidecar.errors import RemoteProtocolError
from lloom_sidecar.ids import PeerId

from .claims import check_ack, salted_digest, terms_kept
from .envelope import OpenedEnvelope, open_envelope
from .names import KIND_CHECKPOINT, KIND_RECEIPT, KIND_REQUEST, EnvelopeKind
from .pb import lloom_pb2 as pb

FORMAT: Final = "lloom-receipt-1"
MAX_FILE_BYTES: Final = 16 * 1024 * 1024
"""Largest file that is read: some 5,000 receipts."""
_HEX_FIELDS: Final = ("request", "receipt", "checkpoint", "ack", "salt")
_OUTCOMES: Final = {
    KIND_RECEIPT: (pb.OUTCOME_COMPLETE, pb.OUTCOME_STOPPED),
    KIND_CHECKPOINT: (pb.OUTCOME_PARTIAL,),
}


@dataclass(frozen=True, slots=True)
class ExportedReceipt:
    """What both sides signed of one exchange. Exactly one of ``receipt`` and ``checkpoint`` is not empty."""

    request: bytes
    """Envelope of the REQUEST."""
    receipt: bytes = b""
    checkpoint: bytes = b""
    ack: bytes = b""
    """Empty: the client did not countersign."""
    salt: bytes = b""
    """Empty: not handed out. With it, body and answer can be checked, and guesses of them too."""

    def as_dict(self) -> dict[str, str]:
        """Its JSON form."""
        fields = {name: getattr(self, name).hex() for name in _HEX_FIELDS if getattr(self, name)}
        return {"format": FORMAT, **fields}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    """request, receipt or checkpoint, client, executor, request_digest, model, price, cost, outcome, ack, body,
    answer."""
    holds: bool | None
    """None: it could not be looked at, for want of what ``text`` says."""
    text: str
    """Empty, or what is wrong or missing: a phrase."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one exported receipt."""

    checks: tuple[Check, ...]
    request: pb.RequestClaims | None
    """None when it cannot be believed."""
    claims: pb.ReceiptClaims | None
    """Of the receipt or checkpoint; None when it cannot be believed."""

    @property
    def holds(self) -> bool:
        """True when nothing that could be looked at is wrong."""
        return all(check.holds is not False for check in self.checks)


def parse_receipts(data: bytes) -> list[ExportedReceipt]:
    """The receipts in a file; nothing is verified yet. Raises ValueError with a phrase."""
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ValueError("it is not JSON") from exc
    items = document if isinstance(document, list) else [document]
    if not items:
        raise ValueError("it holds no receipt")
    return [_parsed(item) for item in items]


def _parsed(item: Any) -> ExportedReceipt:
    if not isinstance(item, dict) or item.get("format") != FORMAT:
        raise ValueError(f'it is no exported receipt: "format" is not "{FORMAT}"')
    fields: dict[str, bytes] = {}
    for name in _HEX_FIELDS:
        value = item.get(name, "")
        try:
            fields[name] = bytes.fromhex(value)
        except (TypeError, ValueError) as exc:
            raise ValueError(f'"{name}" is not hex') from exc
    if not fields["request"]:
        raise ValueError('it lacks "request"')
    if bool(fields["receipt"]) == bool(fields["checkpoint"]):
        raise ValueError('it needs either "receipt" or "checkpoint"')
    return ExportedReceipt(**fields)


def verify_receipt(exported: ExportedReceipt, *, body: bytes | None = None, answer: bytes | None = None) -> Verdict:
    """Check everything that the file shows. ``body`` and ``answer``: as the application sent and got them.

    Bytes that come from anybody raise nothing: what is wrong with them is in the verdict.
    """
    return Verdict(*_verified(exported, body, answer))


def _verified(
    exported: ExportedReceipt, body: bytes | None, answer: bytes | None
) -> tuple[tuple[Check, ...], pb.RequestClaims | None, pb.ReceiptClaims | None]:
    kind, name = (KIND_RECEIPT, "receipt") if exported.receipt else (KIND_CHECKPOINT, "checkpoint")
    request_check, asked = _opened("request", exported.request, KIND_REQUEST)
    statement = exported.receipt or exported.checkpoint
    statement_check, signed = _opened(name, statement, kind)
    checks = [request_check, statement_check]
    if asked is None or signed is None:
        return tuple(checks), None, None
    try:
        request = pb.RequestClaims.FromString(asked.payload)
        claims = pb.ReceiptClaims.FromString(signed.payload)
    except DecodeError:
        return (*checks, Check("claims", False, "signed bytes that are no claims")), None, None
    checks += _parties(request, claims, asked.signer, signed.signer)
    digest = hashlib.sha256(exported.request).digest()
    checks.append(_check("request_digest", claims.request_digest == digest, "it is for another request"))
    kept = terms_kept(claims, request)
    checks.append(_check("model", kept["model"], "another model than was asked for"))
    checks.append(_check("price", kept["price"], "over the price that the request allows"))
    checks.append(_check("cost", kept["cost"], "not what price, usage and max cost come to"))
    checks.append(_check("outcome", claims.outcome in _OUTCOMES[kind], f"not one of a {name}"))
    checks.append(_ack(exported, asked.signer))
    checks += _texts(exported.salt, request, claims, body, answer)
    return tuple(checks), request, claims


def _check(name: str, holds: bool, text: str) -> Check:
    return Check(name, holds, "" if holds else text)


def _opened(name: str, envelope: bytes, kind: EnvelopeKind) -> tuple[Check, OpenedEnvelope | None]:
    try:
        return Check(name, True, ""), open_envelope(envelope, kind)
    except RemoteProtocolError as exc:
        return Check(name, False, exc.message), None


def _parties(request: pb.RequestClaims, claims: pb.ReceiptClaims, client: PeerId, executor: PeerId) -> Iterator[Check]:
    yield _check("client", claims.client == client.raw, "the request is signed by another client")
    is_executor = claims.executor == request.executor == executor.raw
    yield _check("executor", is_executor, "it is not signed by the executor that was asked")


def _ack(exported: ExportedReceipt, client: PeerId) -> Check:
    if not exported.ack:
        text = "none: the executor cannot show that the answer arrived"
        return Check("ack", None, text if exported.receipt else "a checkpoint has none")
    if not exported.receipt:
        return Check("ack", False, "a checkpoint has none")
    try:
        check_ack(exported.ack, client=client, receipt=exported.receipt)
    except RemoteProtocolError as exc:
        return Check("ack", False, exc.message)
    return Check("ack", True, "")


def _texts(
    salt: bytes, request: pb.RequestClaims, claims: pb.ReceiptClaims, body: bytes | None, answer: bytes | None
) -> Iterator[Check]:
    for name, text, digest in (("body", body, request.body_digest), ("answer", answer, claims.answer_digest)):
        if text is None:
            yield Check(name, None, f"the {name} was not given")
        elif not salt:
            yield Check(name, None, "the file has no salt (`receipt export --with-salt`)")
        else:
            is_whole = name == "body" or len(text) == claims.answer_bytes
            yield _check(name, is_whole and salted_digest(salt, text) == digest, "not the one that was signed for")

"""The signed statements of an exchange: building them, and checking them against what was asked and received. Pure.

Source: PROTOCOL.md, Request and Receipt.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import DecodeError

from lloom_sidecar.errors import ReceiptError, RemoteProtocolError
from lloom_sidecar.ids import PeerId, check_model_id

from .envelope import Signer, open_envelope, seal
from .names import KIND_ACK, KIND_CHECKPOINT, KIND_QUOTE, KIND_RECEIPT, KIND_REQUEST, EnvelopeKind
from .offers import Price
from .pb import lloom_pb2 as pb

MAX_REQUEST_AGE_MS: Final = 60_000
"""A REQUEST is refused when its issued_at is further than this from the responder's clock. Source: PROTOCOL.md."""
MAX_DEADLINE_MS: Final = 24 * 3600 * 1000
REQUEST_ID_BYTES: Final = 16
MAX_KEY_BYTES: Final = 128
MAX_TRACEPARENT_BYTES: Final = 64
MAX_CURRENCY_CHARACTERS: Final = 8

OPERATIONS_SERVED: Final = frozenset(
    {
        pb.OPERATION_CHAT,
        pb.OPERATION_COMPLETIONS,
        pb.OPERATION_EMBEDDINGS,
        pb.OPERATION_MODELS,
        pb.OPERATION_QUOTE,
    }
)
ANY_MODEL: Final = "*"
"""The model of a query for everything that an executor offers."""
QUOTE_CONTENT_TYPE: Final = "application/vnd.lloom.quote"
"""HEAD's content type of an answer that is an envelope of kind quote."""


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request whose signature and claims hold; ``client`` is who signed it."""

    client: PeerId
    claims: pb.RequestClaims
    digest: bytes
    """SHA-256 of the envelope's bytes: what the receipt refers to."""


def salted_digest(salt: bytes, data: bytes) -> bytes:
    """SHA-256(salt, then data): commits to data that may be guessed, without revealing it."""
    return hashlib.sha256(salt + data).digest()


def check_request(
    envelope: bytes, *, sender: PeerId, executor: PeerId, challenge: bytes, exchange: int, now_ms: int
) -> CheckedRequest:
    """Check a REQUEST as its executor must before anything else is done with it.

    Args:
        sender: who p2pd says is at the other end of the stream.
        challenge, exchange: this stream's; both are signed, so a request is valid nowhere else and only once.
        now_ms: the executor's clock, Unix milliseconds, the same that ACCEPT stated.

    Raises:
        RemoteProtocolError: codes bad_envelope, bad_signature, wrong_signer, misaddressed, replayed, expired,
            bad_request.
    """
    opened = open_envelope(envelope, KIND_REQUEST, expected_signer=sender)
    try:
        claims = pb.RequestClaims.FromString(opened.payload)
    except DecodeError as exc:
        raise RemoteProtocolError("a request whose claims cannot be read", code="bad_request") from exc
    if claims.executor != executor.raw:
        raise RemoteProtocolError("a request that is addressed to another executor", code="misaddressed")
    if claims.challenge != challenge or claims.exchange != exchange:
        raise RemoteProtocolError("a request that was signed for another stream or exchange", code="replayed")
    if abs(now_ms - claims.issued_at_ms) > MAX_REQUEST_AGE_MS:
        raise RemoteProtocolError(
            "a request that was issued over 60 s ago, or in the future; is a clock wrong?",
            code="expired",
            http_status=408,
        )
    if len(claims.request_id) != REQUEST_ID_BYTES or len(claims.body_digest) != 32:
        raise RemoteProtocolError("a request without an id or a digest", code="bad_request")
    if not 0 < claims.deadline_ms <= MAX_DEADLINE_MS:
        raise RemoteProtocolError("a request without a usable deadline", code="bad_request")
    if (
        len(claims.idempotency_key) > MAX_KEY_BYTES
        or len(claims.quote_id) > MAX_KEY_BYTES
        or len(claims.max_price.currency) > MAX_CURRENCY_CHARACTERS
        or len(claims.traceparent) > MAX_TRACEPARENT_BYTES
    ):
        raise RemoteProtocolError("a request with a field over its limit", code="bad_request")
    if not (claims.traceparent.isascii() and claims.traceparent.isprintable()):  # it becomes a header
        raise RemoteProtocolError("a request whose traceparent is no header value", code="bad_request")
    try:
        check_model_id(claims.model)
    except ValueError as exc:
        raise RemoteProtocolError(f"a request whose model id cannot be used: {exc}", code="bad_request") from exc
    return CheckedRequest(opened.signer, claims, hashlib.sha256(envelope).digest())


def seal_request(claims: pb.RequestClaims, signer: Signer) -> bytes:
    """Sign a request."""
    return seal(KIND_REQUEST, claims.SerializeToString(), signer)


def seal_receipt(claims: pb.ReceiptClaims, signer: Signer) -> bytes:
    """Sign a receipt."""
    return seal(KIND_RECEIPT, claims.SerializeToString(), signer)


def seal_checkpoint(claims: pb.ReceiptClaims, signer: Signer) -> bytes:
    """Sign a checkpoint."""
    return seal(KIND_CHECKPOINT, claims.SerializeToString(), signer)


def seal_ack(receipt: bytes, signer: Signer) -> bytes:
    """Countersign a receipt: ``receipt`` is the bytes of END's envelope."""
    claims = pb.AckClaims(receipt_digest=hashlib.sha256(receipt).digest())
    return seal(KIND_ACK, claims.SerializeToString(), signer)


def check_ack(envelope: bytes, *, client: PeerId, receipt: bytes) -> None:
    """Check a countersignature. Raises RemoteProtocolError (bad_envelope, bad_signature, wrong_signer, bad_ack)."""
    opened = open_envelope(envelope, KIND_ACK, expected_signer=client)
    try:
        claims = pb.AckClaims.FromString(opened.payload)
    except DecodeError as exc:
        raise RemoteProtocolError("an ACK whose claims cannot be read", code="bad_ack") from exc
    if claims.receipt_digest != hashlib.sha256(receipt).digest():
        raise RemoteProtocolError("an ACK for another receipt", code="bad_ack")


def price_message(price: Price) -> pb.Price:
    """A price as the wire carries it."""
    return pb.Price(
        prompt_per_million=price.prompt_per_million,
        completion_per_million=price.completion_per_million,
        currency=price.currency,
    )


def is_under(price: Price, ceiling: pb.Price) -> bool:
    """True when ``price`` is free, or in the ceiling's currency and not over it in either part."""
    return price.is_free or (
        price.currency == ceiling.currency
        and price.prompt_per_million <= ceiling.prompt_per_million
        and price.completion_per_million <= ceiling.completion_per_million
    )


def seal_quote(claims: pb.QuoteClaims, signer: Signer) -> bytes:
    """Sign a promise of a price."""
    return seal(KIND_QUOTE, claims.SerializeToString(), signer)


def check_quote(envelope: bytes, *, client: PeerId, executor: PeerId, model: str) -> pb.QuoteClaims:
    """Check a quote of ``executor`` for ``client`` and ``model``. Whether it still holds is the executor's to say.

    Raises RemoteProtocolError (bad_envelope, bad_signature, wrong_signer, bad_quote).
    """
    opened = open_envelope(envelope, KIND_QUOTE, expected_signer=executor)
    try:
        claims = pb.QuoteClaims.FromString(opened.payload)
    except DecodeError as exc:
        raise RemoteProtocolError("a quote whose claims cannot be read", code="bad_quote") from exc
    if (
        claims.client != client.raw
        or claims.executor != executor.raw
        or claims.model != model
        or not 0 < len(claims.quote_id) <= MAX_KEY_BYTES
        or claims.valid_until_ms <= claims.issued_at_ms
    ):
        raise RemoteProtocolError("a quote for something else than was asked", code="bad_quote")
    return claims


def cost_of(price: pb.Price, usage: pb.Usage) -> int:
    """Cost in minor units, rounded up once over both parts."""
    micro = price.prompt_per_million * usage.prompt_tokens + price.completion_per_million * usage.completion_tokens
    return -(-micro // 1_000_000)


def owed_cost(price: pb.Price, usage: pb.Usage, request: pb.RequestClaims) -> int:
    """What a receipt states as cost: never over the request's max cost; what the executor did beyond it is its loss."""
    cost = cost_of(price, usage)
    return min(cost, request.max_cost) if request.max_cost_set else cost


def check_receipt(
    envelope: bytes,
    *,
    client: PeerId,
    executor: PeerId,
    request_digest: bytes,
    request: pb.RequestClaims,
    answer_digest: bytes,
    answer_bytes: int,
) -> pb.ReceiptClaims:
    """Check END's receipt against what this client asked and received.

    Raises:
        ReceiptError: it is unsigned, forged, about another request, or does not fit the bytes that came; the answer is
            then not complete, whatever it looks like.
    """
    claims = _opened(envelope, KIND_RECEIPT, executor)
    wrong = _wrong(claims, client, executor, request_digest, request, answer_digest, answer_bytes)
    if claims.outcome not in (pb.OUTCOME_COMPLETE, pb.OUTCOME_STOPPED):
        wrong.append("outcome")
    if wrong:
        raise ReceiptError(f"the executor's receipt does not fit this exchange: {', '.join(wrong)}")
    return claims


def check_checkpoint(
    envelope: bytes,
    *,
    client: PeerId,
    executor: PeerId,
    request_digest: bytes,
    request: pb.RequestClaims,
    answer_digest: bytes,
    answer_bytes: int,
    before: pb.ReceiptClaims | None,
) -> pb.ReceiptClaims:
    """Check a CHECKPOINT against what this client asked and received so far; ``before`` is the one before it.

    Raises ReceiptError: the answer has failed, as with a receipt that does not hold.
    """
    claims = _opened(envelope, KIND_CHECKPOINT, executor)
    wrong = _wrong(claims, client, executor, request_digest, request, answer_digest, answer_bytes)
    if claims.outcome != pb.OUTCOME_PARTIAL:
        wrong.append("outcome")
    if before is not None:
        if claims.price != before.price:
            wrong.append("price")
        if (
            claims.usage.prompt_tokens < before.usage.prompt_tokens
            or claims.usage.completion_tokens < before.usage.completion_tokens
        ):
            wrong.append("usage")
    if wrong:
        raise ReceiptError(f"the executor's checkpoint does not fit this exchange: {', '.join(wrong)}")
    return claims


def _opened(envelope: bytes, kind: EnvelopeKind, executor: PeerId) -> pb.ReceiptClaims:
    try:
        opened = open_envelope(envelope, kind, expected_signer=executor)
        return pb.ReceiptClaims.FromString(opened.payload)
    except (RemoteProtocolError, DecodeError) as exc:
        raise ReceiptError(f"the executor's {kind.domain[6:-2]} cannot be used: {exc}") from exc


def _wrong(
    claims: pb.ReceiptClaims,
    client: PeerId,
    executor: PeerId,
    request_digest: bytes,
    request: pb.RequestClaims,
    answer_digest: bytes,
    answer_bytes: int,
) -> list[str]:
    """What of a receipt or a checkpoint breaks PROTOCOL.md, section 12."""
    checks = {
        "client": claims.client == client.raw,
        "executor": claims.executor == executor.raw,
        "request": claims.request_digest == request_digest,
        "answer": claims.answer_digest == answer_digest and claims.answer_bytes == answer_bytes,
        **terms_kept(claims, request),
    }
    return [name for name, holds in checks.items() if not holds]


def terms_kept(claims: pb.ReceiptClaims, request: pb.RequestClaims) -> dict[str, bool]:
    """Whether a receipt or checkpoint keeps to what its request allows; anybody who has both can see it."""
    return {
        "model": claims.model == request.model,
        "price": claims.price.prompt_per_million <= request.max_price.prompt_per_million
        and claims.price.completion_per_million <= request.max_price.completion_per_million
        and (claims.price.currency == request.max_price.currency or is_free(claims.price)),
        "cost": claims.cost == owed_cost(claims.price, claims.usage, request),
    }


def is_free(price: pb.Price) -> bool:
    """True when neither kind of token costs anything."""
    return price.prompt_per_million == 0 and price.completion_per_million == 0

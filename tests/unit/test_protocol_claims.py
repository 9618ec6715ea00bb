"""What a request claims, what a receipt claims, and when each is believed."""

from __future__ import annotations

import hashlib
from typing import Any, ClassVar

import pytest

from lloom_sidecar.errors import ReceiptError, RemoteProtocolError
from lloom_sidecar.protocol import claims
from lloom_sidecar.protocol.envelope import Signer, seal
from lloom_sidecar.protocol.names import KIND_ACK, KIND_QUOTE, KIND_RECEIPT, KIND_REQUEST
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

CLIENT = Signer(bytes(range(32)))
EXECUTOR = Signer(bytes(32))
STRANGER = Signer(b"s" * 32)
NOW_MS = 1_790_000_000_000
CHALLENGE = b"c" * 16
PRICE = pb.Price(prompt_per_million=100, completion_per_million=200, currency="EUR")


def request_claims(**changes: Any) -> pb.RequestClaims:
    fields: dict[str, Any] = {
        "request_id": b"r" * 16,
        "executor": EXECUTOR.peer.raw,
        "issued_at_ms": NOW_MS,
        "challenge": CHALLENGE,
        "exchange": 3,
        "deadline_ms": 1000,
        "operation": pb.OPERATION_CHAT,
        "model": "m",
        "body_digest": b"d" * 32,
        "max_price": PRICE,
    }
    return pb.RequestClaims(**(fields | changes))


def check(envelope: bytes, *, now_ms: int = NOW_MS) -> claims.CheckedRequest:
    return claims.check_request(
        envelope, sender=CLIENT.peer, executor=EXECUTOR.peer, challenge=CHALLENGE, exchange=3, now_ms=now_ms
    )


class TestRequest:
    @pytest.mark.parametrize("age_ms", [-60_000, 0, 60_000])
    def test_a_request_for_here_and_now_is_believed(self, age_ms: int) -> None:
        envelope = claims.seal_request(request_claims(), CLIENT)
        checked = check(envelope, now_ms=NOW_MS + age_ms)
        assert checked.client == CLIENT.peer
        assert checked.claims == request_claims()
        assert checked.digest == hashlib.sha256(envelope).digest()

    @pytest.mark.parametrize(
        ("changes", "code"),
        [
            ({"executor": STRANGER.peer.raw}, "misaddressed"),
            ({"challenge": b"x" * 16}, "replayed"),
            ({"exchange": 2}, "replayed"),
            ({"issued_at_ms": NOW_MS - 60_001}, "expired"),
            ({"issued_at_ms": NOW_MS + 60_001}, "expired"),
            ({"request_id": b""}, "bad_request"),
            ({"body_digest": b""}, "bad_request"),
            ({"deadline_ms": 0}, "bad_request"),
            ({"deadline_ms": 24 * 3600 * 1000 + 1}, "bad_request"),
            ({"idempotency_key": bytes(129)}, "bad_request"),
            ({"quote_id": bytes(129)}, "bad_request"),
            ({"max_price": pb.Price(currency="x" * 9)}, "bad_request"),
            ({"traceparent": "x" * 65}, "bad_request"),
            ({"traceparent": "00-\r\nhost: x"}, "bad_request"),
            ({"traceparent": "\u00fc"}, "bad_request"),
            ({"model": ""}, "bad_request"),
            ({"model": "m\n"}, "bad_request"),
        ],
    )
    def test_any_other_is_refused(self, changes: dict[str, Any], code: str) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            check(claims.seal_request(request_claims(**changes), CLIENT))
        assert caught.value.code == code

    def test_another_signer_than_the_sender(self) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            check(claims.seal_request(request_claims(), STRANGER))
        assert caught.value.code == "wrong_signer"

    def test_claims_that_are_none(self) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            check(seal(KIND_REQUEST, b"\xff", CLIENT))
        assert caught.value.code == "bad_request"


class TestAck:
    RECEIPT = seal(KIND_RECEIPT, b"receipt", EXECUTOR)

    def test_it_is_for_these_bytes(self) -> None:
        claims.check_ack(claims.seal_ack(self.RECEIPT, CLIENT), client=CLIENT.peer, receipt=self.RECEIPT)

    @pytest.mark.parametrize(
        ("envelope", "code"),
        [
            (claims.seal_ack(b"another", CLIENT), "bad_ack"),
            (seal(KIND_ACK, b"\xff", CLIENT), "bad_ack"),
            (claims.seal_ack(RECEIPT, STRANGER), "wrong_signer"),
            (RECEIPT, "bad_envelope"),
        ],
    )
    def test_any_other_is_refused(self, envelope: bytes, code: str) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            claims.check_ack(envelope, client=CLIENT.peer, receipt=self.RECEIPT)
        assert caught.value.code == code


def receipt_claims(**changes: Any) -> pb.ReceiptClaims:
    fields: dict[str, Any] = {
        "client": CLIENT.peer.raw,
        "executor": EXECUTOR.peer.raw,
        "request_digest": b"q" * 32,
        "answer_digest": b"a" * 32,
        "answer_bytes": 7,
        "model": "m",
        "usage": pb.Usage(prompt_tokens=10, completion_tokens=20),
        "usage_source": pb.USAGE_SOURCE_BACKEND,
        "price": PRICE,
        "cost": 1,
        "outcome": pb.OUTCOME_COMPLETE,
    }
    return pb.ReceiptClaims(**(fields | changes))


def check_receipt(envelope: bytes, **request: Any) -> pb.ReceiptClaims:
    return claims.check_receipt(
        envelope,
        client=CLIENT.peer,
        executor=EXECUTOR.peer,
        request_digest=b"q" * 32,
        request=request_claims(**request),
        answer_digest=b"a" * 32,
        answer_bytes=7,
    )


class TestReceipt:
    @pytest.mark.parametrize(
        ("changes", "request_changes"),
        [
            ({}, {}),
            ({"outcome": pb.OUTCOME_STOPPED}, {"max_cost": 1, "max_cost_set": True}),
            ({"price": pb.Price(), "cost": 0}, {}),
            ({"price": pb.Price(), "cost": 0}, {"max_price": pb.Price(), "max_cost_set": True}),
        ],
    )
    def test_one_that_fits_is_believed(self, changes: dict[str, Any], request_changes: dict[str, Any]) -> None:
        expected = receipt_claims(**changes)
        assert check_receipt(claims.seal_receipt(expected, EXECUTOR), **request_changes) == expected

    @pytest.mark.parametrize(
        ("changes", "request_changes", "what"),
        [
            ({"client": STRANGER.peer.raw}, {}, "client"),
            ({"executor": STRANGER.peer.raw}, {}, "executor"),
            ({"request_digest": b""}, {}, "request"),
            ({"model": "n"}, {}, "model"),
            ({"answer_digest": b""}, {}, "answer"),
            ({"answer_bytes": 8}, {}, "answer"),
            ({"outcome": pb.OUTCOME_PARTIAL}, {}, "outcome"),
            ({"price": pb.Price(prompt_per_million=101, currency="EUR")}, {}, "price"),
            ({"price": pb.Price(completion_per_million=201, currency="EUR")}, {}, "price"),
            ({"price": pb.Price(prompt_per_million=100, currency="USD")}, {}, "price"),
            ({"cost": 2}, {}, "cost"),
            ({"cost": 0}, {}, "cost"),
            ({}, {"max_cost": 0, "max_cost_set": True}, "cost"),
        ],
    )
    def test_one_that_does_not_fit_says_where(
        self, changes: dict[str, Any], request_changes: dict[str, Any], what: str
    ) -> None:
        with pytest.raises(ReceiptError, match=f"does not fit this exchange: {what}$"):
            check_receipt(claims.seal_receipt(receipt_claims(**changes), EXECUTOR), **request_changes)

    @pytest.mark.parametrize(
        "envelope",
        [b"", claims.seal_receipt(receipt_claims(), STRANGER), seal(KIND_RECEIPT, b"\xff", EXECUTOR)],
        ids=["none", "another signer", "garbage"],
    )
    def test_what_is_no_receipt_of_this_executor(self, envelope: bytes) -> None:
        with pytest.raises(ReceiptError, match="cannot be used"):
            check_receipt(envelope)


class TestCheckpoint:
    def check(self, envelope: bytes, before: pb.ReceiptClaims | None = None, **request: Any) -> pb.ReceiptClaims:
        return claims.check_checkpoint(
            envelope,
            client=CLIENT.peer,
            executor=EXECUTOR.peer,
            request_digest=b"q" * 32,
            request=request_claims(**request),
            answer_digest=b"a" * 32,
            answer_bytes=7,
            before=before,
        )

    def make(self, **changes: Any) -> pb.ReceiptClaims:
        return receipt_claims(outcome=pb.OUTCOME_PARTIAL, **changes)

    @pytest.mark.parametrize("tokens", [None, 19, 20])
    def test_one_that_goes_on_from_the_one_before_is_believed(self, tokens: int | None) -> None:
        before = None
        if tokens is not None:
            before = self.make(usage=pb.Usage(prompt_tokens=10, completion_tokens=tokens))
        assert self.check(claims.seal_checkpoint(self.make(), EXECUTOR), before) == self.make()

    @pytest.mark.parametrize(
        ("before", "what"),
        [
            ({"price": pb.Price(prompt_per_million=1, currency="EUR")}, "price"),
            ({"usage": pb.Usage(prompt_tokens=10, completion_tokens=21)}, "usage"),
            ({"usage": pb.Usage(prompt_tokens=11, completion_tokens=20)}, "usage"),
        ],
    )
    def test_one_that_goes_back_says_where(self, before: dict[str, Any], what: str) -> None:
        with pytest.raises(ReceiptError, match=f"checkpoint does not fit this exchange: {what}$"):
            self.check(claims.seal_checkpoint(self.make(), EXECUTOR), self.make(**before))

    @pytest.mark.parametrize(
        ("made", "what"),
        [(receipt_claims(), "outcome"), (receipt_claims(outcome=pb.OUTCOME_PARTIAL, model="n"), "model")],
    )
    def test_one_that_does_not_fit_says_where(self, made: pb.ReceiptClaims, what: str) -> None:
        with pytest.raises(ReceiptError, match=f"checkpoint does not fit this exchange: {what}$"):
            self.check(claims.seal_checkpoint(made, EXECUTOR))

    def test_a_receipt_is_no_checkpoint(self) -> None:
        with pytest.raises(ReceiptError, match="cannot be used"):
            self.check(claims.seal_receipt(self.make(), EXECUTOR))


class TestQuote:
    FIELDS: ClassVar[dict[str, Any]] = {
        "quote_id": b"q",
        "client": CLIENT.peer.raw,
        "executor": EXECUTOR.peer.raw,
        "model": "m",
        "price": PRICE,
        "issued_at_ms": NOW_MS,
        "valid_until_ms": NOW_MS + 1,
    }

    def check(self, envelope: bytes) -> pb.QuoteClaims:
        return claims.check_quote(envelope, client=CLIENT.peer, executor=EXECUTOR.peer, model="m")

    def test_one_that_was_promised_is_believed(self) -> None:
        quote = pb.QuoteClaims(**self.FIELDS)
        assert self.check(claims.seal_quote(quote, EXECUTOR)) == quote

    @pytest.mark.parametrize(
        "changes",
        [
            {"client": STRANGER.peer.raw},
            {"executor": STRANGER.peer.raw},
            {"model": "n"},
            {"quote_id": b""},
            {"quote_id": b"q" * 129},
            {"valid_until_ms": NOW_MS},
        ],
    )
    def test_one_for_something_else_is_not(self, changes: dict[str, Any]) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            self.check(claims.seal_quote(pb.QuoteClaims(**(self.FIELDS | changes)), EXECUTOR))
        assert caught.value.code == "bad_quote"

    @pytest.mark.parametrize(
        ("envelope", "code"),
        [
            (seal(KIND_QUOTE, b"\xff", EXECUTOR), "bad_quote"),
            (claims.seal_quote(pb.QuoteClaims(**FIELDS), STRANGER), "wrong_signer"),
            (seal(KIND_RECEIPT, b"", EXECUTOR), "bad_envelope"),
        ],
    )
    def test_what_is_no_quote_of_this_executor(self, envelope: bytes, code: str) -> None:
        with pytest.raises(RemoteProtocolError) as caught:
            self.check(envelope)
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("prompt", "completion", "cost"), [(0, 0, 0), (1, 0, 1), (10_000, 0, 1), (5_000, 2_500, 1), (10_001, 0, 2)]
)
def test_cost_is_rounded_up_once(prompt: int, completion: int, cost: int) -> None:
    assert claims.cost_of(PRICE, pb.Usage(prompt_tokens=prompt, completion_tokens=completion)) == cost


@pytest.mark.parametrize(
    ("price", "holds"),
    [
        (Price(), True),
        (Price(100, 200, "EUR"), True),
        (Price(101, 200, "EUR"), False),
        (Price(100, 201, "EUR"), False),
        (Price(1, 1, "USD"), False),
    ],
)
def test_a_price_is_under_a_ceiling_in_both_parts_and_its_currency(price: Price, holds: bool) -> None:
    assert claims.is_under(price, PRICE) is holds


def test_a_salted_digest_is_that_of_both() -> None:
    assert claims.salted_digest(b"salt", b"data") == hashlib.sha256(b"saltdata").digest()

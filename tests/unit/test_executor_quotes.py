"""Promises of prices, and what a request's max cost pays for."""

from __future__ import annotations

import json

import pytest

from lloom_sidecar.errors import RequestError
from lloom_sidecar.executor.body import BodyPolicy, prepare_body
from lloom_sidecar.executor.quotes import QUOTE_VALID_S, QuoteBook, offers_document
from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.offers import ModelOffer, Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

ALICE, BOB = (PeerId.from_ed25519(bytes([n]) * 32) for n in (1, 2))
PRICE = Price(15, 60, "EUR")


def test_a_promise_holds_for_its_client_and_model_until_it_runs_out() -> None:
    book = QuoteBook()
    quote = book.promise(b"q" * 16, ALICE, "m", PRICE, 1_000)
    assert quote.valid_until_ms == 1_000 + QUOTE_VALID_S * 1000
    assert book.price_of(b"q" * 16, ALICE, "m", 2_000) == PRICE
    assert book.price_of(b"q" * 16, BOB, "m", 2_000) is None
    assert book.price_of(b"q" * 16, ALICE, "other", 2_000) is None
    assert book.price_of(b"x" * 16, ALICE, "m", 2_000) is None
    assert book.price_of(b"q" * 16, ALICE, "m", quote.valid_until_ms) is None
    assert len(book) == 0


def test_the_oldest_promise_makes_room() -> None:
    book = QuoteBook(max_quotes=2)
    for n in range(3):
        book.promise(bytes([n]) * 16, ALICE, "m", PRICE, 0)
    assert book.price_of(bytes(16), ALICE, "m", 1) is None
    assert book.price_of(bytes([2]) * 16, ALICE, "m", 1) == PRICE


def test_the_query_document_states_price_and_load() -> None:
    offer = ModelOffer("m", context_length=2048, features=frozenset({"chat"}), price=PRICE, slots=4)
    document = json.loads(offers_document((offer,), 3, 1))
    assert document["load"] == {"in_flight": 3, "queued": 1}
    assert document["data"][0]["price"] == {"prompt_per_million": 15, "completion_per_million": 60, "currency": "EUR"}


@pytest.mark.parametrize(
    ("fields", "affordable", "expected"),
    [
        ({}, 100, {"max_tokens": 100}),
        ({"max_tokens": 50}, 100, {"max_tokens": 50}),
        ({"max_tokens": 500}, 100, {"max_tokens": 100}),
        ({"max_completion_tokens": 500, "n": 4}, 100, {"max_completion_tokens": 25}),
        ({"max_tokens": 500}, None, {"max_tokens": 500}),
    ],
)
def test_the_tokens_are_limited_to_what_is_paid_for(
    fields: dict[str, int], affordable: int | None, expected: dict[str, int]
) -> None:
    body = json.dumps({"model": "m", "messages": [], **fields}).encode()
    call = prepare_body(
        body,
        operation=pb.OPERATION_CHAT,
        model="m",
        backend_model="m",
        policy=BodyPolicy(),
        affordable_tokens=affordable,
    )
    sent = json.loads(call.body)
    assert {name: sent[name] for name in expected} == expected


def test_not_one_token_for_each_choice_is_402() -> None:
    body = json.dumps({"model": "m", "messages": [], "n": 3}).encode()
    with pytest.raises(RequestError) as caught:
        prepare_body(
            body,
            operation=pb.OPERATION_CHAT,
            model="m",
            backend_model="m",
            policy=BodyPolicy(),
            affordable_tokens=2,
        )
    assert caught.value.http_status == 402


@pytest.mark.parametrize("text", ["", "15", "15/60", "15/60 EURO-CENTS", "-1/2 EUR", "1.5/2 EUR"])
def test_a_price_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a price"):
        Price.parse(text)


def test_a_price_reads_back_what_it_prints() -> None:
    assert Price.parse(str(PRICE)) == PRICE
    assert Price.parse("free") == Price()
    assert Price.parse(str(Price())) == Price()

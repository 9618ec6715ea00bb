"""Prices as people write them."""

from __future__ import annotations

import pytest

from lloom_sidecar.protocol.offers import Price


@pytest.mark.parametrize(
    ("text", "price"),
    [("15/60 EUR", Price(15, 60, "EUR")), (" 0/1   tok ", Price(0, 1, "tok")), ("free", Price()), (" free ", Price())],
)
def test_a_price_is_read_and_written(text: str, price: Price) -> None:
    assert Price.parse(text) == price
    assert Price.parse(str(price)) == price
    assert price.is_free is (text.strip() == "free")


@pytest.mark.parametrize(
    "text", ["", "15", "15/60", "15/60EUR", "-1/2 EUR", "1.5/2 EUR", "1/2 TOOLONGER", "\u0661/2 EUR"]
)
def test_what_is_no_price_says_what_one_is(text: str) -> None:
    with pytest.raises(ValueError, match="is not a price such as 15/60 EUR"):
        Price.parse(text)

"""What an executor answers itself: its offers, and prices that it promises and keeps until they run out. Pure.

Source: PROTOCOL.md, Queries and quotes.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import msgspec

from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.offers import ModelOffer, Price

QUOTE_VALID_S: Final = 600.0
"""How long a price is promised."""
MAX_QUOTES: Final = 10_000
"""Promises kept at once; the oldest go first, so a client that hoards them loses its own."""
QUOTE_ID_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Quote:
    """One promise."""

    client: PeerId
    model: str
    price: Price
    valid_until_ms: int
    """Unix milliseconds, this executor's clock."""


class QuoteBook:
    """The promises that hold."""

    def __init__(self, *, max_quotes: int = MAX_QUOTES) -> None:
        self._max_quotes = max_quotes
        self._quotes: OrderedDict[bytes, Quote] = OrderedDict()

    def __len__(self) -> int:
        return len(self._quotes)

    def promise(self, quote_id: bytes, client: PeerId, model: str, price: Price, now_ms: int) -> Quote:
        """Promise ``price`` to ``client`` for ``model``, for 10 minutes. ``quote_id``: 16 random bytes."""
        quote = Quote(client, model, price, now_ms + round(QUOTE_VALID_S * 1000))
        self._quotes[quote_id] = quote
        if len(self._quotes) > self._max_quotes:
            self._quotes.popitem(last=False)
        return quote

    def price_of(self, quote_id: bytes, client: PeerId, model: str, now_ms: int) -> Price | None:
        """The promised price, or None when there is no such promise to this client for this model any more."""
        quote = self._quotes.get(quote_id)
        if quote is None or quote.client != client or quote.model != model:
            return None
        if now_ms >= quote.valid_until_ms:
            del self._quotes[quote_id]
            return None
        return quote.price


def offers_document(offers: tuple[ModelOffer, ...], working: int, queued: int) -> bytes:
    """The answer to a model query. Source: PROTOCOL.md, Queries."""
    return msgspec.json.encode(
        {
            "object": "list",
            "data": [
                {
                    "id": offer.id,
                    "object": "model",
                    "family": offer.family,
                    "context_length": offer.context_length,
                    "quantisation": offer.quantisation,
                    "features": sorted(offer.features),
                    "slots": offer.slots,
                    "price": {
                        "prompt_per_million": offer.price.prompt_per_million,
                        "completion_per_million": offer.price.completion_per_million,
                        "currency": offer.price.currency,
                    },
                }
                for offer in offers
            ],
            "load": {"in_flight": working, "queued": queued},
        }
    )

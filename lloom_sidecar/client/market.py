"""Asking an executor what it offers and promises to charge; remembering its promises for the requests that follow.

Source: PROTOCOL.md, Queries and quotes.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import trio

from lloom_sidecar.errors import PeerTimeoutError, RemoteProtocolError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, open_exchange
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.protocol.claims import ANY_MODEL, check_quote
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

QUERY_TIMEOUT_S: Final = 10.0
MAX_ANSWER_BYTES: Final = 1024 * 1024
MAX_QUOTES: Final = 1000
CLOCK_MARGIN_MS: Final = 5_000
"""A promise is not used in its last seconds: the request has to arrive while it holds."""


@dataclass(frozen=True, slots=True)
class HeldQuote:
    """A promise of one executor to this node."""

    peer: PeerId
    model: str
    quote_id: bytes
    price: Price
    valid_until_ms: int
    """Unix milliseconds, this node's clock."""
    envelope: bytes
    """As the executor signed it: proof of the promise."""


class QuoteWallet:
    """Promises that this node holds, one for each executor and model: the newest."""

    def __init__(self) -> None:
        self._quotes: OrderedDict[tuple[PeerId, str], HeldQuote] = OrderedDict()

    def keep(self, quote: HeldQuote) -> None:
        """Remember a promise."""
        self._quotes[quote.peer, quote.model] = quote
        self._quotes.move_to_end((quote.peer, quote.model))
        if len(self._quotes) > MAX_QUOTES:
            self._quotes.popitem(last=False)

    def usable(self, peer: PeerId, model: str, now_ms: int) -> HeldQuote | None:
        """The promise that a request may still refer to, or None."""
        quote = self._quotes.get((peer, model))
        if quote is None:
            return None
        if now_ms >= quote.valid_until_ms - CLOCK_MARGIN_MS:
            del self._quotes[peer, model]
            return None
        return quote


class Market:
    """Queries to executors. Raises what ``link.open_exchange`` raises, and PeerTimeoutError after 10 s."""

    def __init__(self, pool: StreamPool, signer: Signer, wallet: QuoteWallet) -> None:
        self._pool = pool
        self._signer = signer
        self._wallet = wallet

    async def query_models(self, peer: PeerId) -> dict[str, Any]:
        """What ``peer`` says that it offers now: ``{"data": [...], "load": {...}}``, its own words but signed for."""
        answer, _ = await self._ask(peer, pb.OPERATION_MODELS, ANY_MODEL)
        try:
            document = msgspec.json.decode(answer)
        except msgspec.DecodeError as exc:
            raise RemoteProtocolError(f"{peer.short()} answered a query with something that is not JSON") from exc
        if not isinstance(document, dict) or not isinstance(document.get("data"), list):
            raise RemoteProtocolError(f"{peer.short()} answered a query with something else")
        return document

    async def ask_quote(self, peer: PeerId, model: str) -> HeldQuote:
        """A signed price of ``peer`` for ``model``; kept, and used by this node's requests while it holds."""
        envelope, ahead_ms = await self._ask(peer, pb.OPERATION_QUOTE, model)
        claims = check_quote(envelope, client=self._signer.peer, executor=peer, model=model)
        price = Price(claims.price.prompt_per_million, claims.price.completion_per_million, claims.price.currency)
        quote = HeldQuote(peer, model, claims.quote_id, price, claims.valid_until_ms - ahead_ms, envelope)
        self._wallet.keep(quote)
        return quote

    async def _ask(self, peer: PeerId, operation: int, model: str) -> tuple[bytes, int]:
        """(the verified answer, by how many milliseconds the peer's clock is ahead of ours)."""
        call = Call(
            request_id=os.urandom(16),
            operation=operation,
            model=model,
            body=msgspec.json.encode({"model": model}),
            deadline_ms=round(QUERY_TIMEOUT_S * 1000),
        )
        pieces: list[bytes] = []
        try:
            with trio.fail_after(QUERY_TIMEOUT_S):
                async with open_exchange(self._pool, self._signer, peer, call) as exchange:
                    while (data := await exchange.receive()) is not None:
                        pieces.append(data)
                        if sum(map(len, pieces)) > MAX_ANSWER_BYTES:
                            raise RemoteProtocolError(f"{peer.short()} answered a query with over 1 MiB")
                    return b"".join(pieces), exchange.link.clock_offset_ms
        except trio.TooSlowError as exc:
            raise PeerTimeoutError(f"{peer.short()} did not answer a query within {QUERY_TIMEOUT_S:.0f} s") from exc

"""What is checked of a REQUEST before its body is read: everything that can be refused is refused here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from lloom_sidecar.errors import (
    BackendUnavailableError,
    PeerBusyError,
    PriceError,
    RemoteProtocolError,
    RequestError,
    RoutingError,
)
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.claims import OPERATIONS_SERVED, CheckedRequest, check_request, is_under
from lloom_sidecar.protocol.compression import SizedDecoder
from lloom_sidecar.protocol.exchange import RequestReceived
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .admission import Ticket

if TYPE_CHECKING:
    from .serve import Executor

QUERIES: Final = frozenset({pb.OPERATION_MODELS, pb.OPERATION_QUOTE})
"""Operations that the executor answers itself, without a place at the backend."""

LEDGER_RETRY_S: Final = 30.0
"""A disk that is full stays so for a while."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A request that passed every check."""

    request: CheckedRequest
    price: Price
    """Fixed now."""
    ticket: Ticket | None
    """Its place at the backend; None for a query."""
    decoder: SizedDecoder | None
    """Of a compressed body."""
    deadline_at: float
    """When the whole answer is due, on trio's clock."""


def take_request(
    executor: Executor, stream: P2PStream, challenge: bytes, event: RequestReceived, *, is_leaving: bool
) -> Taken:
    """Check a REQUEST and give it a place, which the caller owes back. ``is_leaving``: its stream was told GOAWAY.

    Raises LloomError, with a code of PROTOCOL.md's list: nothing is held then.
    """
    peer = stream.peer
    executor.check_rate(stream)
    if executor.is_draining or is_leaving:
        raise PeerBusyError("this executor takes no more work", code="draining", retry_after_s=5.0)
    if not executor.may_ask(peer):
        raise RemoteProtocolError("say hello again: the membership has run out", code="hello_required")
    request = check_request(
        event.envelope,
        sender=peer,
        executor=executor.signer.peer,
        challenge=challenge,
        exchange=event.exchange,
        now_ms=executor.now_ms(),
    )
    claims = request.claims
    if claims.operation not in OPERATIONS_SERVED:
        raise RequestError("this executor does not serve that operation", code="unsupported_operation", http_status=501)
    if event.body_length == 0:
        raise RequestError("the request has no body", code="invalid_json")
    decoder, body_size = _decoder_of(executor, event)
    price = Price()
    if claims.operation != pb.OPERATION_MODELS:
        price = _price_of(executor, peer, claims)
    if not price.is_free:
        _check_chargeable(executor, peer)
    if executor.buffered_bytes + body_size > executor.limits.buffered_bodies_bytes:
        raise PeerBusyError("this executor holds too many bodies", code="busy", retry_after_s=1.0)
    deadline_at = trio.current_time() + claims.deadline_ms / 1000
    ticket = None
    if claims.operation not in QUERIES:
        ticket = executor.enter(peer, claims.priority, deadline_at)
    return Taken(request, price, ticket, decoder, deadline_at)


def _decoder_of(executor: Executor, event: RequestReceived) -> tuple[SizedDecoder | None, int]:
    """What decompresses the body that is coming, and its size after that."""
    if event.encoding == pb.ENCODING_IDENTITY:
        return None, event.body_length
    if event.body_size == 0:
        raise RemoteProtocolError("a compressed body whose size was not stated", code="bad_request")
    if event.body_size > executor.limits.max_body_bytes:
        raise RequestError(
            f"the body has {event.body_size} bytes; this executor takes {executor.limits.max_body_bytes}",
            code="body_too_large",
            http_status=413,
        )
    return SizedDecoder(event.encoding, event.body_size), event.body_size


def _check_chargeable(executor: Executor, peer: PeerId) -> None:
    """What is paid for has to be written down, and countersigned."""
    if executor.ledger_trouble() is not None:
        raise PeerBusyError(
            "this executor cannot keep receipts now: it does nothing that has to be paid",
            code="ledger_full",
            retry_after_s=LEDGER_RETRY_S,
        )
    if executor.unacked.is_over(peer, trio.current_time()):
        raise PriceError(
            "too many of this client's receipts lack its countersignature",
            code="unacked",
            http_status=429,
            retryable=True,
        )


def _price_of(executor: Executor, peer: PeerId, claims: pb.RequestClaims) -> Price:
    """The price of a request, fixed now: the promised one, else today's, if the request allows that."""
    if not executor.backend.is_up:
        raise BackendUnavailableError("the backend of this executor is down")
    offer = executor.offer(claims.model)
    if offer is None:
        raise RoutingError("this executor does not serve that model", code="model_not_served", retryable=True)
    if claims.operation == pb.OPERATION_QUOTE:
        return Price()
    price = offer.price
    if claims.quote_id:
        quoted = executor.quotes.price_of(claims.quote_id, peer, claims.model, executor.now_ms())
        if quoted is None:
            raise PriceError("that quote does not hold here (any more)", code="quote_expired", retryable=True)
        price = quoted
    if not is_under(price, claims.max_price):
        raise PriceError(
            "the price here is over the one that the request allows",
            code="price_changed",
            retryable=True,
            details={"price": price},
        )
    return price

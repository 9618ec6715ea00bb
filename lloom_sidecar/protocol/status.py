"""Network status: what a validator sees of its network, signed, for those that chose to trust it. Making and checking.
Pure.

Source: PROTOCOL.md, Network status.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import DecodeError

from lloom_sidecar.errors import AnnouncementError, LocalProtocolError, RemoteProtocolError
from lloom_sidecar.ids import PeerId, check_model_id

from .announcement import MAX_CLOCK_DIFFERENCE_MS, MAX_PRICE, MAX_SEQUENCE, MAX_SOFTWARE_CHARACTERS
from .envelope import Signer, open_envelope, seal
from .names import KIND_STATUS
from .network_key import NetworkKey
from .offers import Price
from .pb import lloom_pb2 as pb

MAX_STATUS_BYTES: Final = 16 * 1024 - 1
"""Of the envelope."""
MAX_MODELS: Final = 64
MAX_SOFTWARE: Final = 16
MIN_TTL_S: Final = 1.0
MAX_TTL_S: Final = 15 * 60.0

_FREE: Final = Price()
_REASONS: Final = {"wrong_signer": "publisher", "bad_signature": "signature"}


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One model over all executors that a validator knows."""

    id: str
    executors: int
    slots: int
    """Sum over them."""
    median_price: Price = _FREE
    """Each part the lower median over those that charge in the currency that most of them use."""
    priced_executors: int = 0
    """How many those are."""


@dataclass(frozen=True, slots=True)
class NetworkStatus:
    """What a validator says of its network: counts and medians, no peer but itself."""

    executors: int = 0
    """Whose lease holds."""
    members: int = 0
    """Connected peers that proved the network."""
    models_total: int = 0
    """Different models, also those that had no room in ``models``."""
    models: tuple[ModelStatus, ...] = ()
    """Those with the most executors first."""
    software: tuple[tuple[str, int], ...] = ()
    """Version and how many executors and connected members have it, the most frequent first."""
    in_flight: int = 0
    queued: int = 0
    slots: int = 0
    """Sums over the executors, as they announced it."""


@dataclass(frozen=True, slots=True)
class SignedStatus:
    """A network status whose envelope, signer and limits were checked."""

    peer: PeerId
    sequence: int
    issued_at_ms: int
    ttl_s: float
    is_member: bool
    """True when its tag was made with a key of one of our networks."""
    status: NetworkStatus
    raw: bytes = field(repr=False)


def seal_status(
    *,
    signer: Signer,
    key: NetworkKey | None,
    sequence: int,
    issued_at_ms: int,
    ttl_s: float,
    status: NetworkStatus,
) -> bytes:
    """Sign a status of the validator whose key ``signer`` is; returns its envelope. Models that have no room go.

    Args:
        key: of the network that it is about; None for a node without one (open mode).
        sequence: larger than every earlier one of this node, stored before the status is sent.
        issued_at_ms: now, Unix milliseconds.
        ttl_s: 1 to 900 seconds.

    Raises:
        LocalProtocolError: it breaks one of the rules that ``open_status`` checks.
    """
    models = [_model_message(model) for model in status.models[:MAX_MODELS]]
    try:
        while True:
            claims = pb.NetworkStatusClaims(
                peer=signer.peer.raw,
                sequence=sequence,
                issued_at_ms=issued_at_ms,
                ttl_ms=round(ttl_s * 1000),
                network_id=b"" if key is None else key.network_id,
                tag=b"" if key is None else key.announce_tag(signer.peer, sequence),
                executors=status.executors,
                members=status.members,
                models_total=status.models_total,
                models=models,
                software=[pb.SoftwareCount(software=name, nodes=nodes) for name, nodes in status.software],
                load=pb.LoadSum(in_flight=status.in_flight, queued=status.queued, slots=status.slots),
            )
            raw = seal(KIND_STATUS, claims.SerializeToString(), signer)
            if len(raw) <= MAX_STATUS_BYTES or not models:
                break
            models = models[: len(models) // 2]
        open_status(raw, keys=() if key is None else (key,), expected_signer=signer.peer)
    except (AnnouncementError, ValueError, OverflowError) as exc:
        raise LocalProtocolError(f"a network status that would break the rules: {exc}") from exc
    return raw


def open_status(raw: bytes, *, keys: Sequence[NetworkKey], expected_signer: PeerId | None) -> SignedStatus:
    """Check all of a status but its clock (``check_status_clock``) and whether its sequence is new.

    Args:
        raw: the envelope.
        keys: of our networks.
        expected_signer: who published it, where the transport vouches for that.

    Raises:
        AnnouncementError: reasons, cheapest check first: size, envelope, publisher, signature, schema, tag. ``tag`` is
            a wrong or missing tag for one of OUR networks; another network's cannot be checked and gives is_member
            False.
    """
    if len(raw) > MAX_STATUS_BYTES:
        raise AnnouncementError("size", f"a status of {len(raw)} bytes; {MAX_STATUS_BYTES} are allowed")
    try:
        opened = open_envelope(raw, KIND_STATUS, expected_signer=expected_signer)
    except RemoteProtocolError as exc:
        raise AnnouncementError(_REASONS.get(exc.code, "envelope"), exc.message) from exc
    try:
        claims = pb.NetworkStatusClaims.FromString(opened.payload)
    except DecodeError as exc:
        raise AnnouncementError("schema", "a status whose claims cannot be read") from exc
    if claims.peer != opened.signer.raw:
        raise AnnouncementError("publisher", "a status in the name of another peer than its signer")
    try:
        _check_fields(claims)
        models = tuple(_model(model) for model in claims.models)
        if len({model.id for model in models}) != len(models):
            raise ValueError("one model twice")
    except ValueError as exc:
        raise AnnouncementError("schema", f"a status that breaks the rules: {exc}") from exc
    return SignedStatus(
        peer=opened.signer,
        sequence=claims.sequence,
        issued_at_ms=claims.issued_at_ms,
        ttl_s=claims.ttl_ms / 1000,
        is_member=_is_member(claims, opened.signer, keys),
        status=NetworkStatus(
            executors=claims.executors,
            members=claims.members,
            models_total=claims.models_total,
            models=models,
            software=tuple((one.software, one.nodes) for one in claims.software),
            in_flight=claims.load.in_flight,
            queued=claims.load.queued,
            slots=claims.load.slots,
        ),
        raw=raw,
    )


def check_status_clock(status: SignedStatus, now_ms: int) -> None:
    """Refuse a status that was issued over 15 minutes from ``now_ms`` (Unix milliseconds), either way.

    Raises:
        AnnouncementError: reason ``clock``.
    """
    if abs(now_ms - status.issued_at_ms) > MAX_CLOCK_DIFFERENCE_MS:
        raise AnnouncementError("clock", "a status that was issued over 15 minutes from this node's clock")


def _check_fields(claims: pb.NetworkStatusClaims) -> None:
    rules = {
        "sequence": 0 < claims.sequence <= MAX_SEQUENCE,
        "issued_at": claims.issued_at_ms > 0,
        "ttl": MIN_TTL_S * 1000 <= claims.ttl_ms <= MAX_TTL_S * 1000,
        "network id": len(claims.network_id) in (0, 32),
        "tag": len(claims.tag) in ((0, 32) if claims.network_id else (0,)),
        "number of models": len(claims.models) <= MAX_MODELS,
        "software": len(claims.software) <= MAX_SOFTWARE
        and all(len(x.software) <= MAX_SOFTWARE_CHARACTERS and x.software.isprintable() for x in claims.software),
    }
    wrong = [name for name, holds in rules.items() if not holds]
    if wrong:
        raise ValueError(", ".join(wrong))


def _model_message(model: ModelStatus) -> pb.ModelStatus:
    price = model.median_price
    return pb.ModelStatus(
        id=model.id,
        executors=model.executors,
        slots=model.slots,
        median_price=pb.Price(
            prompt_per_million=price.prompt_per_million,
            completion_per_million=price.completion_per_million,
            currency=price.currency,
        ),
        priced_executors=model.priced_executors,
    )


def _model(message: pb.ModelStatus) -> ModelStatus:
    price = message.median_price
    if max(price.prompt_per_million, price.completion_per_million) > MAX_PRICE:
        raise ValueError("a model's price")
    if len(price.currency) > 8 or not price.currency.isprintable():
        raise ValueError("a model's currency")
    return ModelStatus(
        id=check_model_id(message.id),
        executors=message.executors,
        slots=message.slots,
        median_price=Price(price.prompt_per_million, price.completion_per_million, price.currency),
        priced_executors=message.priced_executors,
    )


def _is_member(claims: pb.NetworkStatusClaims, signer: PeerId, keys: Sequence[NetworkKey]) -> bool:
    for key in keys:
        if key.network_id == claims.network_id:
            if not hmac.compare_digest(key.announce_tag(signer, claims.sequence), claims.tag):
                raise AnnouncementError("tag", "a status for this network by somebody without its key")
            return True
    return False

"""Announcements: what an executor says of itself, signed, for as long as it says so. Making and checking them. Pure.

Source: PROTOCOL.md, Announcement.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Sequence
from typing import Final

from google.protobuf.message import DecodeError

from lloom_sidecar.errors import AnnouncementError, LocalProtocolError, RemoteProtocolError
from lloom_sidecar.ids import Multiaddr, PeerId, check_model_id

from .envelope import Signer, open_envelope, seal
from .names import KIND_ANNOUNCEMENT
from .network_key import NetworkKey
from .offers import Announcement, Kind, Load, ModelOffer, Price
from .pb import lloom_pb2 as pb

MAX_FULL_BYTES: Final = 16 * 1024 - 1
"""Of the envelope of an initial or update."""
MAX_BRIEF_BYTES: Final = 511
"""Of the envelope of a heartbeat or removal."""
MAX_ADDRS: Final = 8
MAX_MODELS: Final = 64
MAX_FEATURES: Final = 16
MAX_FAMILY_CHARACTERS: Final = 64
MAX_QUANTISATION_CHARACTERS: Final = 32
MAX_SOFTWARE_CHARACTERS: Final = 64
MAX_SLOTS: Final = 65_535
MAX_PRICE: Final = 10**15
"""Minor units per million tokens; exact in every JSON reader."""
MAX_SEQUENCE: Final = 2**63 - 1
"""What fits a signed 64-bit column."""
MIN_TTL_S: Final = 1.0
MAX_TTL_S: Final = 15 * 60.0
MAX_CLOCK_DIFFERENCE_MS: Final = 15 * 60 * 1000

MIN_INTERVAL_S: Final = 10.0
MAX_INTERVAL_S: Final = 120.0
NETWORK_RATE_PER_S: Final = 50.0
"""Announcements per second that a whole network should stay near: each node takes all of them."""
INTERVAL_JITTER: Final = 0.1
"""An interval is shortened by up to this part, so that nodes that started together drift apart."""
TTL_INTERVALS: Final = 3

_NO_LOAD: Final = Load()
_FEATURE: Final = re.compile(r"[a-z0-9_]{1,32}")
_CURRENCY: Final = re.compile(r"[A-Za-z0-9]{1,8}")
_REASONS: Final = {"wrong_signer": "publisher", "bad_signature": "signature"}


def seal_announcement(
    *,
    signer: Signer,
    key: NetworkKey | None,
    sequence: int,
    issued_at_ms: int,
    ttl_s: float,
    kind: int,
    addrs: Sequence[Multiaddr] = (),
    models: Sequence[ModelOffer] = (),
    load: Load = _NO_LOAD,
    software: str = "",
    full_digest: bytes = b"",
) -> bytes:
    """Sign an announcement of the node whose key ``signer`` is; returns its envelope.

    Args:
        key: of the network that it is announced in; None for a node without one (open mode).
        sequence: larger than every earlier one of this node, stored before the announcement is sent.
        issued_at_ms: now, Unix milliseconds.
        ttl_s: 1 to 900 seconds.
        kind: of ``offers.Kind``. Only a full one (initial, update) has ``addrs`` and ``models``.
        full_digest: heartbeat only: ``Announcement.digest`` of the full one that still holds.

    Raises:
        LocalProtocolError: it breaks one of the rules that ``open_announcement`` checks; the full text names it.
    """
    try:
        claims = pb.AnnouncementClaims(
            peer=signer.peer.raw,
            sequence=sequence,
            issued_at_ms=issued_at_ms,
            ttl_ms=round(ttl_s * 1000),
            kind=kind,  # type: ignore[arg-type]  # the numbers of offers.Kind are lloom.proto's
            network_id=b"" if key is None else key.network_id,
            tag=b"" if key is None else key.announce_tag(signer.peer, sequence),
            addrs=[address.raw for address in addrs],
            models=[_model_message(model) for model in models],
            load=pb.Load(
                in_flight=load.in_flight, queued=load.queued, tokens_per_s=load.tokens_per_s, ttft_s=load.ttft_s
            ),
            software=software,
            full_digest=full_digest,
        )
        raw = seal(KIND_ANNOUNCEMENT, claims.SerializeToString(), signer)
        open_announcement(raw, keys=() if key is None else (key,), expected_signer=signer.peer)
    except (AnnouncementError, ValueError, OverflowError) as exc:
        raise LocalProtocolError(f"an announcement that would break the rules: {exc}") from exc
    return raw


def open_announcement(raw: bytes, *, keys: Sequence[NetworkKey], expected_signer: PeerId | None) -> Announcement:
    """Check all of an announcement but its clock (``check_clock``) and whether its sequence is new (the peer book).

    Args:
        raw: the envelope.
        keys: of our networks, as ``NetworkKeys.valid`` gives them.
        expected_signer: who published it, where the transport vouches for that; None for a catalogue's entry.

    Raises:
        AnnouncementError: reasons, cheapest check first: size, envelope, publisher, signature, schema, tag. ``tag`` is
            a wrong or missing tag for one of OUR networks; another network's cannot be checked and gives is_member
            False.
    """
    if len(raw) > MAX_FULL_BYTES:
        raise AnnouncementError("size", f"an announcement of {len(raw)} bytes; {MAX_FULL_BYTES} are allowed")
    try:
        opened = open_envelope(raw, KIND_ANNOUNCEMENT, expected_signer=expected_signer)
    except RemoteProtocolError as exc:
        raise AnnouncementError(_REASONS.get(exc.code, "envelope"), exc.message) from exc
    try:
        claims = pb.AnnouncementClaims.FromString(opened.payload)
    except DecodeError as exc:
        raise AnnouncementError("schema", "an announcement whose claims cannot be read") from exc
    is_full = claims.kind in (Kind.INITIAL, Kind.UPDATE)
    if not is_full and len(raw) > MAX_BRIEF_BYTES:
        raise AnnouncementError("size", f"a heartbeat or removal of {len(raw)} bytes; {MAX_BRIEF_BYTES} are allowed")
    if claims.peer != opened.signer.raw:
        raise AnnouncementError("publisher", "an announcement about another peer than its signer")
    try:
        _check_fields(claims, is_full)
        addrs = tuple(_address(address, opened.signer) for address in claims.addrs)
        models = tuple(_model(model) for model in claims.models)
        if len({model.id for model in models}) != len(models):
            raise ValueError("one model twice")
        load = _load(claims.load)
    except ValueError as exc:
        raise AnnouncementError("schema", f"an announcement that breaks the rules: {exc}") from exc
    return Announcement(
        peer=opened.signer,
        sequence=claims.sequence,
        issued_at_ms=claims.issued_at_ms,
        ttl_s=claims.ttl_ms / 1000,
        kind=int(claims.kind),
        network_id=claims.network_id,
        is_member=_is_member(claims, opened.signer, keys),
        addrs=addrs,
        models=models,
        load=load,
        software=claims.software,
        full_digest=claims.full_digest,
        raw=raw,
        digest=hashlib.sha256(raw).digest(),
    )


def check_clock(announcement: Announcement, now_ms: int) -> None:
    """Refuse an announcement that was issued over 15 minutes from ``now_ms`` (Unix milliseconds), either way.

    Only for an announcement that is new: one that the peer book has is a duplicate, however old.

    Raises:
        AnnouncementError: reason ``clock``.
    """
    if abs(now_ms - announcement.issued_at_ms) > MAX_CLOCK_DIFFERENCE_MS:
        raise AnnouncementError("clock", "an announcement that was issued over 15 minutes from this node's clock")


def announcement_interval_s(executors_seen: int, rng_jitter: float) -> float:
    """Seconds until the next heartbeat: 10, growing to 120 so that the whole network sends about 50 a second.

    Args:
        executors_seen: executors in the peer book. A node that has just started must count all of them, or it would
            speak too often; a member that invents names can make others speak as seldom as each 120 s, no less.
        rng_jitter: a random number from 0 to 1; shortens the interval by up to a tenth.
    """
    interval_s = min(MAX_INTERVAL_S, max(MIN_INTERVAL_S, executors_seen / NETWORK_RATE_PER_S))
    return interval_s * (1 - INTERVAL_JITTER * rng_jitter)


def announcement_ttl_s(interval_s: float) -> float:
    """The ttl to state with heartbeats every ``interval_s`` seconds: three of them, at most 15 minutes."""
    return min(MAX_TTL_S, TTL_INTERVALS * interval_s)


def _check_fields(claims: pb.AnnouncementClaims, is_full: bool) -> None:
    rules = {
        "kind": Kind.INITIAL <= claims.kind <= Kind.REMOVAL,
        "sequence": 0 < claims.sequence <= MAX_SEQUENCE,
        "issued_at": claims.issued_at_ms > 0,
        "ttl": MIN_TTL_S * 1000 <= claims.ttl_ms <= MAX_TTL_S * 1000,
        "network id": len(claims.network_id) in (0, 32),
        "tag": len(claims.tag) in ((0, 32) if claims.network_id else (0,)),
        "number of addresses": len(claims.addrs) <= (MAX_ADDRS if is_full else 0),
        "number of models": len(claims.models) <= (MAX_MODELS if is_full else 0),
        "software": _is_text(claims.software, MAX_SOFTWARE_CHARACTERS),
        "full digest": len(claims.full_digest) == (32 if claims.kind == Kind.HEARTBEAT else 0),
    }
    wrong = [name for name, holds in rules.items() if not holds]
    if wrong:
        raise ValueError(", ".join(wrong))


def _address(raw: bytes, signer: PeerId) -> Multiaddr:
    address = Multiaddr.from_bytes(raw)
    if address.unix_path is not None:
        raise ValueError("a unix address, which leads nowhere from another host")
    if address.peer_id not in (None, signer):
        raise ValueError("an address of another peer")
    return address


def _model_message(model: ModelOffer) -> pb.Model:
    return pb.Model(
        id=model.id,
        family=model.family,
        context_length=model.context_length,
        quantisation=model.quantisation,
        features=sorted(model.features),
        price=pb.Price(
            prompt_per_million=model.price.prompt_per_million,
            completion_per_million=model.price.completion_per_million,
            currency=model.price.currency,
        ),
        slots=model.slots,
        digest=model.digest,
    )


def _model(message: pb.Model) -> ModelOffer:
    price = Price(message.price.prompt_per_million, message.price.completion_per_million, message.price.currency)
    rules = {
        "family": _is_text(message.family, MAX_FAMILY_CHARACTERS),
        "quantisation": _is_text(message.quantisation, MAX_QUANTISATION_CHARACTERS),
        "features": len(message.features) <= MAX_FEATURES
        and all(_FEATURE.fullmatch(feature) for feature in message.features),
        "price": max(price.prompt_per_million, price.completion_per_million) <= MAX_PRICE,
        "currency": (price.is_free and not price.currency) or _CURRENCY.fullmatch(price.currency) is not None,
        "slots": 0 < message.slots <= MAX_SLOTS,
        "digest": len(message.digest) in (0, 32),
    }
    wrong = [name for name, holds in rules.items() if not holds]
    if wrong:
        raise ValueError(f"a model's {', '.join(wrong)}")
    return ModelOffer(
        id=check_model_id(message.id),
        family=message.family,
        context_length=message.context_length,
        quantisation=message.quantisation,
        features=frozenset(message.features),
        price=price,
        slots=message.slots,
        digest=message.digest,
    )


def _load(message: pb.Load) -> Load:
    for value in (message.tokens_per_s, message.ttft_s):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError("a load that is no number")
    return Load(message.in_flight, message.queued, message.tokens_per_s, message.ttft_s)


def _is_member(claims: pb.AnnouncementClaims, signer: PeerId, keys: Sequence[NetworkKey]) -> bool:
    for key in keys:
        if key.network_id == claims.network_id:
            if not hmac.compare_digest(key.announce_tag(signer, claims.sequence), claims.tag):
                raise AnnouncementError("tag", "an announcement for this network by somebody without its key")
            return True
    return False


def _is_text(text: str, max_characters: int) -> bool:
    return len(text) <= max_characters and text.isprintable()

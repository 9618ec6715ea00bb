"""Every parser of the wire: any cutting of the bytes gives the same events, and garbage raises only what it may."""

from __future__ import annotations

import contextlib
import gzip
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lloom_sidecar.errors import AnnouncementError, ConfigError, ProtocolError, RemoteProtocolError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.protocol import claims, names
from lloom_sidecar.protocol.announcement import open_announcement, seal_announcement
from lloom_sidecar.protocol.compression import Decoder, SizedDecoder, compress
from lloom_sidecar.protocol.envelope import MAX_ENVELOPE_BYTES, Signer, open_envelope, seal
from lloom_sidecar.protocol.exchange import RequesterStream, ResponderStream, State
from lloom_sidecar.protocol.framing import FrameCutter, frame
from lloom_sidecar.protocol.hello import HelloAnswerer, HelloOpener, HelloState
from lloom_sidecar.protocol.network_key import Invite, NetworkKey, format_key_file, parse_key_file
from lloom_sidecar.protocol.offers import Kind, Load, ModelOffer, Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.varint import decode_varint, encode_varint

FEW = settings(max_examples=50, deadline=None)

SIGNER = Signer(bytes(range(32)))
OTHER = Signer(bytes(32))
KEY = NetworkKey(b"k" * 32)
NODE = pb.NodeInfo(roles=[pb.ROLE_CLIENT], features=["resume"], software="lloom/0.1.0")


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    bounds = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(bounds)]


CUTS = st.lists(st.integers(0, 10_000), max_size=12)


@FEW
@given(st.integers(0, 2**63 - 1), st.binary(max_size=4))
def test_a_varint_comes_back_and_no_part_of_it_is_one(value: int, tail: bytes) -> None:
    data = encode_varint(value)
    assert decode_varint(data + tail, 0, 2**63) == (value, len(data))
    for end in range(len(data)):
        assert decode_varint(data[:end], 0, 2**63) is None


@FEW
@given(st.lists(st.binary(max_size=300), max_size=8), CUTS)
def test_frames_come_out_the_same_however_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    data = b"".join(map(frame, messages))
    for parts in (pieces(data, cuts), [data], [bytes((byte,)) for byte in data]):
        cutter = FrameCutter()
        assert [message for part in parts for message in cutter.feed(part)] == messages
        assert not cutter.has_partial


@FEW
@given(st.integers(1, 2**62), st.integers(1, 70_000))
def test_an_oversize_frame_is_refused_from_its_prefix_alone(over: int, limit: int) -> None:
    cutter = FrameCutter(limit)
    prefix = encode_varint(limit + over)
    with pytest.raises(RemoteProtocolError) as caught:
        _ = [cutter.feed(bytes((byte,))) for byte in prefix]
    assert caught.value.code == "oversize"


ANSWER_FRAMES = st.lists(
    st.one_of(
        st.builds(lambda data: pb.Frame(data=data), st.binary(max_size=300)),
        st.builds(lambda data: pb.Frame(checkpoint=pb.Checkpoint(envelope=data)), st.binary(max_size=30)),
        st.builds(lambda payload: pb.Frame(ping=pb.Ping(payload=payload)), st.integers(0, 2**64 - 1)),
        st.builds(lambda reason: pb.Frame(go_away=pb.GoAway(reason=reason)), st.text(max_size=20)),
    ),
    max_size=8,
)


def requester() -> RequesterStream:
    stream = RequesterStream()
    stream.open()
    stream.receive(frame(pb.Frame(accept=pb.Accept(challenge=b"c" * 16)).SerializeToString()))
    stream.request(b"envelope", b"s" * 16, b"")
    return stream


@FEW
@given(ANSWER_FRAMES, st.booleans(), CUTS)
def test_an_answer_gives_the_same_events_however_it_is_cut(
    messages: list[pb.Frame], is_error: bool, cuts: list[int]
) -> None:
    end = pb.Frame(error=pb.Error(code="busy")) if is_error else pb.Frame(end=pb.End(receipt=b"r"))
    data = b"".join(frame(message.SerializeToString()) for message in [*messages, end])
    outcomes = []
    for parts in (pieces(data, cuts), [data], [bytes((byte,)) for byte in data]):
        stream = requester()
        events = [event for part in parts for event in stream.receive(part)]
        assert len(events) == len(messages) + 1
        assert stream.state is State.IDLE
        outcomes.append([repr(event) for event in events])
    assert outcomes[0] == outcomes[1] == outcomes[2]


@FEW
@given(st.binary(max_size=2000), CUTS)
def test_a_request_gives_the_same_events_however_it_is_cut(body: bytes, cuts: list[int]) -> None:
    sender = RequesterStream()
    data = sender.open()
    outcomes = []
    sender.receive(frame(pb.Frame(accept=pb.Accept(challenge=b"c" * 16)).SerializeToString()))
    request = b"".join(sender.request(b"envelope", b"s" * 16, body)) + sender.ping(1)
    for parts in (pieces(request, cuts), [request], [bytes((byte,)) for byte in request]):
        stream = ResponderStream()
        stream.receive(data)
        stream.accept(now_ms=0, challenge=b"c" * 16, max_streams=1)
        outcomes.append([event for part in parts for event in stream.receive(part)])
        assert stream.state is State.ANSWERING
    assert outcomes[0] == outcomes[1] == outcomes[2]


def a_responder() -> ResponderStream:
    stream = ResponderStream()
    stream.receive(RequesterStream().open())
    stream.accept(now_ms=0, challenge=b"c" * 16, max_streams=1)
    return stream


def an_opener() -> HelloOpener:
    side = HelloOpener(me=SIGNER.peer, peer=OTHER.peer, keys=[KEY], is_open=True, node=NODE, nonce=b"n" * 32)
    side.start()
    return side


def an_answerer() -> HelloAnswerer:
    return HelloAnswerer(me=OTHER.peer, peer=SIGNER.peer, keys=[KEY], is_open=True, node=NODE, nonce=b"m" * 32)


# Bytes that are more often nearly right than random ones are.
VALUES = st.one_of(st.binary(max_size=40), st.just(b"n" * 32), st.just(b"s" * 16), st.just(KEY.network_id))


@st.composite
def near_frames(draw: st.DrawFn, message_type: Any) -> bytes:
    """One frame of ``message_type`` with some fields of one of its kinds set, perhaps with a byte changed."""
    field = draw(st.sampled_from(list(message_type.DESCRIPTOR.fields)))
    message = message_type()
    if field.message_type is None:
        setattr(message, field.name, draw(VALUES))
    else:
        inner = getattr(message, field.name)
        inner.SetInParent()
        for inner_field in field.message_type.fields:
            if draw(st.booleans()):
                with contextlib.suppress(AttributeError, TypeError, ValueError):  # not a field of this type
                    setattr(inner, inner_field.name, draw(st.one_of(VALUES, st.integers(0, 3), st.text(max_size=5))))
    raw = bytearray(message.SerializeToString())
    if raw and draw(st.integers(0, 5)) == 0:
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return frame(bytes(raw))


Machine = RequesterStream | ResponderStream | HelloOpener | HelloAnswerer
MAKERS: list[tuple[Callable[[], Machine], Any]] = [
    (requester, pb.Frame),
    (a_responder, pb.Frame),
    (ResponderStream, pb.Frame),
    (an_opener, pb.HelloFrame),
    (an_answerer, pb.HelloFrame),
]


@pytest.mark.parametrize(("make", "message_type"), MAKERS)
@FEW
@given(st.data())
def test_garbage_raises_only_the_remote_error_and_it_stays_broken(
    make: Callable[[], Machine], message_type: Any, data: st.DataObject
) -> None:
    chunks = st.lists(st.one_of(st.binary(max_size=60), near_frames(message_type)), max_size=6)
    machine = make()
    try:
        for chunk in data.draw(chunks):
            machine.receive(chunk)
    except RemoteProtocolError:
        assert machine.state in (State.BROKEN, HelloState.BROKEN)
        for chunk in (b"", frame(b""), b"\x00" * 10):
            with pytest.raises(ProtocolError):
                machine.receive(chunk)
            assert machine.state in (State.BROKEN, HelloState.BROKEN)


@FEW
@given(CUTS, CUTS)
def test_a_hello_ends_the_same_however_it_is_cut(to_answerer: list[int], to_opener: list[int]) -> None:
    opener, answerer = an_opener(), an_answerer()
    fresh = HelloOpener(me=SIGNER.peer, peer=OTHER.peer, keys=[KEY], is_open=True, node=NODE, nonce=b"n" * 32)
    data, events = fresh.start(), []
    while data:
        received = [answerer.receive(part) for part in pieces(data, to_answerer)]
        events += [repr(event) for _, batch in received for event in batch]
        answers = [opener.receive(part) for part in pieces(b"".join(out for out, _ in received), to_opener)]
        events += [repr(event) for _, batch in answers for event in batch]
        data = b"".join(out for out, _ in answers)
    assert len(events) == 2
    assert all(event.startswith("HelloDone(is_member=True") for event in events)


@pytest.mark.parametrize("kind", names.ALL_KINDS, ids=[kind.domain for kind in names.ALL_KINDS])
@given(payload=st.binary(max_size=300), position=st.integers(0, 10_000), value=st.integers(0, 255))
@settings(max_examples=15, deadline=None)
def test_an_envelope_opens_to_its_payload_and_one_changed_byte_closes_it(
    kind: names.EnvelopeKind, payload: bytes, position: int, value: int
) -> None:
    raw = seal(kind, payload, SIGNER)
    assert open_envelope(raw, kind, expected_signer=SIGNER.peer).payload == payload
    changed = bytearray(raw)
    changed[position % len(raw)] = value
    if changed != raw:
        with pytest.raises(RemoteProtocolError):
            open_envelope(bytes(changed), kind, expected_signer=SIGNER.peer)


@FEW
@given(st.one_of(st.binary(max_size=400), st.builds(lambda size: bytes(size), st.integers(MAX_ENVELOPE_BYTES, 40_000))))
def test_bytes_that_are_no_statement_raise_only_what_they_may(raw: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        open_envelope(raw, names.KIND_REQUEST)
    with pytest.raises(AnnouncementError) as caught:
        open_announcement(raw, keys=(KEY,), expected_signer=None)
    assert caught.value.reason in ("size", "envelope", "signature")


@FEW
@given(st.binary(max_size=400))
def test_a_signed_payload_that_is_garbage_raises_only_what_it_may(payload: bytes) -> None:
    with contextlib.suppress(AnnouncementError):
        open_announcement(seal(names.KIND_ANNOUNCEMENT, payload, SIGNER), keys=(KEY,), expected_signer=SIGNER.peer)
    with contextlib.suppress(RemoteProtocolError):
        claims.check_request(
            seal(names.KIND_REQUEST, payload, SIGNER),
            sender=SIGNER.peer,
            executor=OTHER.peer,
            challenge=b"",
            exchange=0,
            now_ms=0,
        )
    with contextlib.suppress(RemoteProtocolError):
        claims.check_ack(seal(names.KIND_ACK, payload, SIGNER), client=SIGNER.peer, receipt=b"r")


TEXT = st.text(st.characters(categories=["L", "N"]), max_size=20)
FEATURES = st.sampled_from(["chat", "completions", "tools", "later_feature"])
MODELS = st.builds(
    ModelOffer,
    id=TEXT.filter(bool),
    family=TEXT,
    context_length=st.integers(0, 2**32 - 1),
    quantisation=TEXT,
    features=st.frozensets(FEATURES),
    price=st.builds(Price, st.integers(0, 10**15), st.integers(0, 10**15), st.just("EUR")),
    slots=st.integers(1, 65_535),
    digest=st.sampled_from([b"", b"d" * 32]),
)
FLOATS = st.floats(0, 1e9, width=32)


@FEW
@given(
    models=st.lists(MODELS, max_size=5, unique_by=lambda model: model.id),
    load=st.builds(Load, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), FLOATS, FLOATS),
    sequence=st.integers(1, 2**63 - 1),
    ttl_ms=st.integers(1000, 900_000),
    key=st.sampled_from([KEY, None]),
    cut=st.integers(1, 10_000),
)
def test_an_announcement_comes_back_and_a_cut_one_does_not(
    models: list[ModelOffer], load: Load, sequence: int, ttl_ms: int, key: NetworkKey | None, cut: int
) -> None:
    raw = seal_announcement(
        signer=SIGNER,
        key=key,
        sequence=sequence,
        issued_at_ms=1,
        ttl_s=ttl_ms / 1000,
        kind=Kind.INITIAL,
        models=models,
        load=load,
    )
    announcement = open_announcement(raw, keys=(KEY,), expected_signer=SIGNER.peer)
    assert (announcement.models, announcement.load) == (tuple(models), load)
    assert (announcement.sequence, announcement.ttl_s) == (sequence, ttl_ms / 1000)
    assert announcement.is_member is (key is not None)
    with pytest.raises(AnnouncementError):
        open_announcement(raw[: -(cut % len(raw) or 1)], keys=(KEY,), expected_signer=SIGNER.peer)


KEYS = st.builds(NetworkKey, st.binary(min_size=32, max_size=32))
ADDRESSES = st.sampled_from(
    [
        Multiaddr.parse(f"/ip4/192.0.2.1/tcp/4001/p2p/{SIGNER.peer}"),
        Multiaddr.parse(f"/ip6/2001:db8::1/udp/4001/quic-v1/p2p/{SIGNER.peer}"),
        Multiaddr.parse(f"/dns4/v.example/tcp/443/p2p/{OTHER.peer}/p2p-circuit/p2p/{SIGNER.peer}"),
    ]
)


@FEW
@given(KEYS, st.lists(ADDRESSES, max_size=16), st.integers(1, 10_000))
def test_an_invite_comes_back_and_a_cut_one_does_not(key: NetworkKey, validators: list[Multiaddr], cut: int) -> None:
    invite = Invite(tuple(validators), key)
    text = invite.encode()
    assert Invite.decode(text) == invite
    with pytest.raises(ConfigError):
        Invite.decode(text[: -(cut % len(text) or 1)])


@FEW
@given(KEYS, KEYS, st.integers(1, 10**18 - 1), st.integers(1, 10_000))
def test_a_key_file_comes_back_and_a_cut_one_does_not(
    current: NetworkKey, previous: NetworkKey, until_ms: int, cut: int
) -> None:
    rotated = None if current == previous else (previous, until_ms)
    data = format_key_file(current, rotated)
    keys = parse_key_file(data)
    assert (keys.current, keys.previous) == (current, None if rotated is None else previous)
    with pytest.raises(ConfigError):
        parse_key_file(data[: -(2 + cut % (len(data) - 2))])  # the last line's end alone may be missing


@FEW
@given(st.one_of(st.text(max_size=200), st.text(max_size=60).map("lloom-invite-1:".__add__)), st.binary(max_size=200))
def test_garbage_for_an_invite_or_a_key_file_raises_only_config_error(text: str, data: bytes) -> None:
    with pytest.raises(ConfigError):
        Invite.decode(text)
    for candidate in (data, b"format: lloom-network-key-1\n" + data):
        with pytest.raises(ConfigError):
            parse_key_file(candidate)


@FEW
@given(st.binary(max_size=60))
def test_bytes_from_a_peer_are_an_address_or_raise_value_error(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        address = Multiaddr.from_bytes(raw)
        assert Multiaddr.parse(str(address)).raw == raw
    with contextlib.suppress(ValueError):
        assert PeerId.parse(str(PeerId(raw))).raw == raw


@FEW
@given(st.binary(max_size=2000), st.sampled_from([pb.ENCODING_ZSTD, pb.ENCODING_GZIP]), CUTS, st.integers(1, 100))
def test_what_was_compressed_comes_back_however_it_is_cut(
    content: bytes, encoding: pb.Encoding, cuts: list[int], room: int
) -> None:
    packed = compress(content) if encoding == pb.ENCODING_ZSTD else gzip.compress(content)
    decoder, out = Decoder(encoding), b""
    for part in pieces(packed, cuts):
        piece = decoder.decode(part, room)
        while piece:
            assert len(piece) <= room
            out += piece
            piece = decoder.decode(b"", room)
    decoder.finish()
    assert out == content


@FEW
@given(st.binary(min_size=1, max_size=300), st.sampled_from([pb.ENCODING_ZSTD, pb.ENCODING_GZIP]), st.integers(0, 300))
def test_what_is_not_compressed_right_is_refused_and_nothing_else_happens(
    garbage: bytes, encoding: pb.Encoding, at: int
) -> None:
    packed = bytearray(compress(b"words " * 50) if encoding == pb.ENCODING_ZSTD else gzip.compress(b"words " * 50))
    packed[at % len(packed) : at % len(packed) + len(garbage)] = garbage
    for data in (garbage, bytes(packed)):
        decoder = SizedDecoder(encoding, 300)
        with contextlib.suppress(RemoteProtocolError):
            assert len(decoder.feed(data)) <= 300
            decoder.finish()

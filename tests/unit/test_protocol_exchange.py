"""One stream of the request protocol as a dialogue: who says what in which state, and what each may not say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lloom_sidecar.errors import (
    BackendRejectedError,
    LocalProtocolError,
    PeerBusyError,
    PriceError,
    RemoteProtocolError,
)
from lloom_sidecar.protocol import exchange as ex
from lloom_sidecar.protocol.exchange import RequesterStream, ResponderStream, State
from lloom_sidecar.protocol.framing import MAX_FRAME_BYTES, frame
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.varint import encode_varint

CHALLENGE = b"c" * 16
SALT = b"s" * 16


def sent(**fields: object) -> bytes:
    return frame(pb.Frame(**fields).SerializeToString())  # type: ignore[arg-type]


def opened(max_body_bytes: int = ex.MAX_BODY_BYTES) -> tuple[RequesterStream, ResponderStream]:
    requester, responder = RequesterStream(), ResponderStream(max_body_bytes=max_body_bytes)
    assert responder.receive(requester.open()) == [ex.OpenReceived(1, 0)]
    (accepted,) = requester.receive(responder.accept(now_ms=5, challenge=CHALLENGE, max_streams=3))
    assert accepted == ex.Accepted(5, CHALLENGE, 3, max_body_bytes) == requester.accepted
    assert (requester.state, responder.state) == (State.IDLE, State.IDLE)
    return requester, responder


def asked(body: bytes = b"") -> tuple[RequesterStream, ResponderStream]:
    requester, responder = opened()
    for data in requester.request(b"envelope", SALT, body):
        responder.receive(data)
    return requester, responder


def ended(count: int = 1) -> tuple[RequesterStream, ResponderStream]:
    requester, responder = opened()
    for _ in range(count):
        for data in requester.request(b"envelope", SALT, b""):
            responder.receive(data)
        requester.receive(responder.end(b"receipt"))
    return requester, responder


class TestDialogue:
    def test_a_whole_exchange(self) -> None:
        requester, responder = opened()
        (data,) = requester.request(b"envelope", SALT, b"body", pb.ENCODING_GZIP, 70_000)
        assert requester.state is State.PENDING
        assert responder.receive(data) == [
            ex.RequestReceived(1, b"envelope", SALT, 4, pb.ENCODING_GZIP, 70_000),
            ex.BodyReceived(b"body", is_last=True),
        ]
        assert requester.receive(responder.head("text/event-stream", backend_us=9, encoding=pb.ENCODING_ZSTD)) == [
            ex.HeadReceived("text/event-stream", pb.ENCODING_ZSTD, 9)
        ]
        assert requester.receive(responder.data(b"one")) == [ex.DataReceived(b"one")]
        assert requester.receive(responder.checkpoint(b"c")) == [ex.CheckpointReceived(b"c")]
        assert requester.receive(responder.end(b"receipt")) == [ex.EndReceived(b"receipt")]
        assert responder.receive(requester.ack(1, b"ack")) == [ex.AckReceived(1, b"ack")]
        assert (requester.state, responder.state) == (State.IDLE, State.IDLE)
        assert requester.receive_eof() is State.IDLE

    def test_a_body_and_an_answer_over_one_frame_are_cut(self) -> None:
        requester, responder = opened()
        body = bytes(range(256)) * 600
        frames = requester.request(b"envelope", SALT, body)
        assert len(frames) == 1 + 3
        assert max(map(len, frames)) <= MAX_FRAME_BYTES + 3
        events = [event for data in frames for event in responder.receive(data)]
        received = [event for event in events if isinstance(event, ex.BodyReceived)]
        assert b"".join(event.data for event in received) == body
        assert [event.is_last for event in received] == [False, False, True]
        answer = [event for event in requester.receive(responder.data(body)) if isinstance(event, ex.DataReceived)]
        assert b"".join(event.data for event in answer) == body
        assert len(answer) == 3

    def test_a_changed_price_travels(self) -> None:
        requester, responder = asked()
        price = Price(15, 60, "EUR")
        error = PriceError("dearer", code="price_changed", retryable=True, details={"price": price})
        (event,) = requester.receive(responder.error(error))
        assert isinstance(event, ex.ErrorReceived)
        assert event.error.details == {"price": price}
        requester, responder = asked()
        (event,) = requester.receive(responder.error(PeerBusyError("no", details={"price": "?"})))
        assert isinstance(event, ex.ErrorReceived)
        assert event.error.details == {}

    @pytest.mark.parametrize("currency", ["x" * 9, "E\nR"])
    def test_a_price_over_its_limits_breaks_the_stream(self, currency: str) -> None:
        requester, _ = asked()
        with pytest.raises(RemoteProtocolError):
            requester.receive(sent(error=pb.Error(code="price_changed", price=pb.Price(currency=currency))))

    def test_an_error_ends_the_exchange_and_the_next_one_begins(self) -> None:
        requester, responder = asked()
        error = PeerBusyError("All slots are taken.", retry_after_s=1.5)
        (event,) = requester.receive(responder.error(error))
        assert isinstance(event, ex.ErrorReceived)
        assert event.during is State.PENDING
        assert (event.error.code, event.error.message) == ("peer_busy", "All slots are taken.")
        assert (event.error.http_status, event.error.retryable, event.error.retry_after_s) == (503, True, 1.5)
        for data in requester.request(b"envelope", SALT, b""):
            assert responder.receive(data) == [ex.RequestReceived(2, b"envelope", SALT, 0, 0, 0)]

    def test_a_refusal_before_the_body_drops_what_still_comes(self) -> None:
        requester, responder = opened()
        head, *rest = requester.request(b"envelope", SALT, bytes(3 * ex.MAX_DATA_BYTES))
        responder.receive(head)
        (event,) = requester.receive(responder.error(PeerBusyError("busy")))
        assert isinstance(event, ex.ErrorReceived)
        dropped = [event for data in rest for event in responder.receive(data)]
        assert dropped == [ex.BodyReceived(b"", is_last) for is_last in (False, False, True)]
        assert responder.state is State.IDLE

    def test_a_backends_error_document_travels_when_it_is_small(self) -> None:
        for body, expected in ((b"{}", b"{}"), (b"", None), (bytes(ex.MAX_ERROR_BODY_BYTES + 1), None)):
            requester, responder = asked()
            error = BackendRejectedError("The backend said no.", status=422)
            (event,) = requester.receive(responder.error(error, body=body))
            assert isinstance(event, ex.ErrorReceived)
            assert (event.error.body, event.error.http_status) == (expected, 422)
            assert event.error.retry_after_s is None

    def test_a_status_that_is_none_becomes_502_and_a_silent_error_says_its_code(self) -> None:
        requester, _ = asked()
        (event,) = requester.receive(sent(error=pb.Error(code="odd", http_status=200)))
        assert isinstance(event, ex.ErrorReceived)
        assert (event.error.http_status, event.error.message) == (502, "odd")

    def test_an_error_instead_of_accept_closes_and_the_rest_is_dropped(self) -> None:
        requester, responder = RequesterStream(), ResponderStream()
        responder.receive(requester.open())
        refusal = responder.error(PeerBusyError("Say hello first.", code="hello_required"))
        for data in (refusal + sent(pong=pb.Pong()), b"\xff\xff"):
            requester.receive(data)
        assert (requester.state, responder.state) == (State.CLOSED, State.CLOSED)
        assert requester.receive_eof() is State.CLOSED
        assert responder.receive(sent(open=pb.Open())) == []

    def test_goaway_drains(self) -> None:
        requester, responder = asked()
        assert requester.receive(responder.go_away("shutdown", 2.5)) == [ex.GoAwayReceived("shutdown", 2.5)]
        assert requester.receive(responder.data(b"x") + responder.end(b"r")) == [
            ex.DataReceived(b"x"),
            ex.EndReceived(b"r"),
        ]
        assert requester.is_draining
        with pytest.raises(LocalProtocolError, match="GOAWAY"):
            requester.request(b"envelope", SALT, b"")
        assert requester.receive(responder.go_away("again")) == [ex.GoAwayReceived("again", None)]

    def test_pings_are_answered_at_any_time_after_the_first_frame(self) -> None:
        requester, responder = asked()
        assert responder.receive(requester.ping(7)) == [ex.PingReceived(7)]
        assert requester.receive(responder.pong(7)) == [ex.PongReceived(7)]
        assert requester.receive(responder.ping(2**64 - 1)) == [ex.PingReceived(2**64 - 1)]

    def test_eof_in_the_middle_says_in_the_middle_of_what(self) -> None:
        requester, responder = asked()
        assert requester.receive_eof() is State.PENDING
        assert responder.receive_eof() is State.ANSWERING
        requester, responder = opened()
        requester.receive(responder.ping(300)[:1])
        assert requester.receive_eof() is State.BROKEN


class TestAck:
    def test_the_last_eight_may_be_acknowledged_late_and_once(self) -> None:
        requester, responder = ended(9)
        assert not requester.is_ack_awaited(1)
        for number in range(2, 10):
            assert responder.receive(requester.ack(number, b"a")) == [ex.AckReceived(number, b"a")]
        for number in (1, 2, 10):
            with pytest.raises(LocalProtocolError, match=f"ack for exchange {number}"):
                requester.ack(number, b"a")

    def test_the_next_exchange_may_end_meanwhile(self) -> None:
        requester, responder = ended(8)
        late = requester.ack(1, b"a")
        requester.request(b"envelope", SALT, b"")
        assert not requester.is_ack_awaited(1)  # it could be forgotten before it arrives
        assert responder.receive(late) == [ex.AckReceived(1, b"a")]

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_an_ack_for_nothing_breaks_the_stream(self, number: int) -> None:
        _, responder = ended(1)
        responder.receive(sent(ack=pb.Ack(exchange=1)))
        with pytest.raises(RemoteProtocolError):
            responder.receive(sent(ack=pb.Ack(exchange=number)))


def requester_in(state: State) -> RequesterStream:
    if state is State.NEW:
        return RequesterStream()
    if state is State.OPENING:
        stream = RequesterStream()
        stream.open()
        return stream
    if state is State.IDLE:
        return opened()[0]
    stream, responder = asked()
    if state is State.ANSWERING:
        stream.receive(responder.data(b"x"))
    return stream


def responder_in(state: State) -> ResponderStream:
    if state is State.NEW:
        return ResponderStream()
    if state is State.OPENING:
        stream = ResponderStream()
        stream.receive(sent(open=pb.Open()))
        return stream
    if state is State.IDLE:
        return opened()[1]
    if state is State.ANSWERING:
        return asked()[1]
    requester, stream = opened()
    stream.receive(requester.request(b"e", SALT, bytes(ex.MAX_DATA_BYTES + 1))[0])
    if state is State.DISCARDING:
        stream.error(PeerBusyError("busy"))
    return stream


FRAMES = {
    "open": sent(open=pb.Open(version_major=1)),
    "accept": sent(accept=pb.Accept(challenge=CHALLENGE)),
    "request": sent(request=pb.Request(salt=SALT)),
    "body": sent(body=b"x"),
    "head": sent(head=pb.Head()),
    "data": sent(data=b"x"),
    "checkpoint": sent(checkpoint=pb.Checkpoint()),
    "end": sent(end=pb.End()),
    "error": sent(error=pb.Error(code="busy")),
    "ack": sent(ack=pb.Ack(exchange=1)),
    "go_away": sent(go_away=pb.GoAway()),
    "ping": sent(ping=pb.Ping()),
    "pong": sent(pong=pb.Pong()),
    "nothing": frame(b""),
    "unknown": frame(b"\xf2\x01\x00"),
    "ping and data": frame(pb.Frame(ping=pb.Ping()).SerializeToString() + b"\x32\x01x"),
}
ANSWER = {"head", "data", "checkpoint", "end", "error", "go_away", "ping", "pong"}
REQUESTER_MAY_HEAR = {
    State.NEW: set[str](),
    State.OPENING: {"accept", "error", "go_away", "ping", "pong"},
    State.IDLE: {"go_away", "ping", "pong"},
    State.PENDING: ANSWER,
    State.ANSWERING: ANSWER - {"head"},
}
RESPONDER_MAY_HEAR = {
    State.NEW: {"open"},
    State.OPENING: {"ping", "pong"},
    State.IDLE: {"request", "ping", "pong"},
    State.BODY: {"body", "ping", "pong"},
    State.DISCARDING: {"body", "ping", "pong"},
    State.ANSWERING: {"ping", "pong"},
}


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize(
    ("make", "state", "allowed"),
    [
        *((requester_in, state, allowed) for state, allowed in REQUESTER_MAY_HEAR.items()),
        *((responder_in, state, allowed) for state, allowed in RESPONDER_MAY_HEAR.items()),
    ],
)
def test_each_frame_in_each_state(
    make: Callable[[State], RequesterStream | ResponderStream], state: State, allowed: set[str], kind: str
) -> None:
    stream = make(state)
    assert stream.state is state
    if kind in allowed:
        assert len(stream.receive(FRAMES[kind])) == 1
        return
    with pytest.raises(RemoteProtocolError) as caught:
        stream.receive(FRAMES[kind])
    assert caught.value.code == "unexpected_frame"
    assert stream.state is State.BROKEN
    with pytest.raises(LocalProtocolError, match="broken"):
        stream.receive(FRAMES["ping"])
    with pytest.raises(LocalProtocolError, match="broken"):
        stream.ping(1)


@pytest.mark.parametrize(
    ("make", "state", "data", "code"),
    [
        (requester_in, State.OPENING, sent(accept=pb.Accept(challenge=b"short")), "bad_frame"),
        (requester_in, State.PENDING, sent(error=pb.Error(code="no spaces")), "bad_frame"),
        (requester_in, State.PENDING, sent(error=pb.Error(code="")), "bad_frame"),
        (requester_in, State.PENDING, sent(error=pb.Error(code="\u00fc")), "bad_frame"),
        (requester_in, State.PENDING, sent(error=pb.Error(code="x" * 41)), "bad_frame"),
        (requester_in, State.PENDING, sent(error=pb.Error(code="x", message="m" * 1001)), "bad_frame"),
        (requester_in, State.PENDING, sent(error=pb.Error(code="x", body=bytes(32 * 1024 + 1))), "bad_frame"),
        (requester_in, State.PENDING, sent(head=pb.Head(content_type="a\r\nset-cookie: b")), "bad_frame"),
        (requester_in, State.PENDING, sent(head=pb.Head(content_type="\u00fc")), "bad_frame"),
        (requester_in, State.PENDING, sent(head=pb.Head(content_type="x" * 201)), "bad_frame"),
        (requester_in, State.PENDING, frame(b"\x32\x02x"), "bad_frame"),
        (requester_in, State.PENDING, frame(b"\x32"), "bad_frame"),
        (requester_in, State.PENDING, frame(b"\x32\x80\x00"), "bad_frame"),
        (requester_in, State.PENDING, frame(b"\x32\x01x\x32\x01y"), "bad_frame"),
        (requester_in, State.PENDING, frame(b"\xff"), "bad_frame"),
        (requester_in, State.PENDING, encode_varint(MAX_FRAME_BYTES + 1), "oversize"),
        (responder_in, State.IDLE, sent(request=pb.Request(salt=b"short")), "bad_frame"),
        (responder_in, State.IDLE, sent(request=pb.Request(salt=SALT, body_length=2**40)), "oversize"),
        (responder_in, State.BODY, sent(body=b""), "bad_frame"),
    ],
)
def test_a_frame_that_breaks_its_own_rules(
    make: Callable[[State], RequesterStream | ResponderStream], state: State, data: bytes, code: str
) -> None:
    stream = make(state)
    with pytest.raises(RemoteProtocolError) as caught:
        stream.receive(data)
    assert caught.value.code == code
    assert stream.state is State.BROKEN


def test_a_node_that_takes_less_refuses_more() -> None:
    _, responder = opened(max_body_bytes=3)
    with pytest.raises(RemoteProtocolError, match="this node takes 3") as caught:
        responder.receive(sent(request=pb.Request(salt=SALT, body_length=4)))
    assert caught.value.code == "oversize"


def test_a_body_over_its_stated_length() -> None:
    _, responder = opened()
    responder.receive(sent(request=pb.Request(salt=SALT, body_length=4)) + sent(body=b"123"))
    with pytest.raises(RemoteProtocolError, match="over the body's length"):
        responder.receive(sent(body=b"45"))


@pytest.mark.parametrize(
    "misuse",
    [
        lambda: RequesterStream().ping(1),
        lambda: RequesterStream().request(b"", SALT, b""),
        lambda: requester_in(State.OPENING).open(),
        lambda: requester_in(State.PENDING).request(b"", SALT, b""),
        lambda: requester_in(State.IDLE).request(bytes(MAX_FRAME_BYTES), SALT, b""),
        lambda: ResponderStream().accept(now_ms=0, challenge=CHALLENGE, max_streams=1),
        lambda: responder_in(State.IDLE).accept(now_ms=0, challenge=CHALLENGE, max_streams=1),
        lambda: responder_in(State.BODY).head("text/plain"),
        lambda: responder_in(State.IDLE).data(b"x"),
        lambda: responder_in(State.IDLE).checkpoint(b"c"),
        lambda: responder_in(State.IDLE).end(b"r"),
        lambda: responder_in(State.IDLE).error(PeerBusyError("busy")),
        lambda: responder_in(State.NEW).go_away("x"),
    ],
)
def test_a_misuse_of_ours_is_a_local_error(misuse: Callable[[], object]) -> None:
    with pytest.raises(LocalProtocolError):
        misuse()


def test_a_head_comes_first_or_not_at_all() -> None:
    speeches: list[Callable[[ResponderStream], bytes]] = [
        lambda responder: responder.head("text/plain"),
        lambda responder: responder.data(b""),
        lambda responder: responder.checkpoint(b"c"),
    ]
    for speech in speeches:
        requester, responder = asked()
        requester.receive(speech(responder))
        with pytest.raises(LocalProtocolError, match="head after"):
            responder.head("text/plain")
        requester.receive(responder.end(b"r"))
        responder.receive(b"".join(requester.request(b"envelope", SALT, b"")))
        requester.receive(responder.head("text/plain"))


def test_the_shared_part_is_no_stream_by_itself() -> None:
    for data in (FRAMES["data"], FRAMES["open"]):
        with pytest.raises(NotImplementedError):
            ex._Stream().receive(data)

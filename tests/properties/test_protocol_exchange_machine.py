"""Requester and responder at the two ends of a pipe that cuts as it likes, held against a model of the exchange."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lloom_sidecar.errors import PeerBusyError
from lloom_sidecar.protocol import exchange as ex
from lloom_sidecar.protocol.exchange import RequesterStream, ResponderStream, State

CHALLENGE = b"c" * 16
SALT = b"s" * 16
LENGTHS = st.sampled_from([0, 4, ex.MAX_DATA_BYTES + 5])
SIZES = st.sampled_from([1, 2, 7, 60_000, 1_000_000])


class Exchanges(RuleBasedStateMachine):
    """Two real machines; each rule is one thing that one side does or one piece of bytes that arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.requester = RequesterStream()
        self.responder = ResponderStream()
        self.to_responder = bytearray(self.requester.open())
        self.to_requester = bytearray()
        self.bodies: list[bytes] = []
        """Of each exchange: the responder may still be dropping one when the requester begins the next."""
        self.received_body = b""
        self.answer = b""
        self.received_answer = b""
        self.has_answered = False
        self.begun = 0
        self.heard = 0
        """Exchange of the last REQUEST event: the machine itself may be further on within one batch of events."""
        self.outcomes: dict[int, str] = {}
        """How the responder ended each exchange: end or error."""
        self.unacked: deque[int] = deque(maxlen=ex.MAX_UNACKED)
        self.acks_under_way: set[int] = set()
        self.pings: deque[int] = deque()
        self.has_said_goaway = False

    # ------------------------------------------------------------ the pipe

    @precondition(lambda self: self.to_responder)
    @rule(size=SIZES)
    def bytes_reach_the_responder(self, size: int) -> None:
        piece, self.to_responder = bytes(self.to_responder[:size]), self.to_responder[size:]
        for event in self.responder.receive(piece):
            self.at_responder(event)

    @precondition(lambda self: self.to_requester)
    @rule(size=SIZES)
    def bytes_reach_the_requester(self, size: int) -> None:
        piece, self.to_requester = bytes(self.to_requester[:size]), self.to_requester[size:]
        for event in self.requester.receive(piece):
            self.at_requester(event)

    def at_responder(self, event: ex.Event) -> None:
        if isinstance(event, ex.OpenReceived):
            self.to_requester += self.responder.accept(now_ms=1, challenge=CHALLENGE, max_streams=2)
        elif isinstance(event, ex.RequestReceived):
            assert event.exchange == self.begun
            assert event.body_length == len(self.bodies[-1])
            self.received_body = b""
            self.heard = event.exchange
            self.has_answered = False
        elif isinstance(event, ex.BodyReceived):
            self.received_body += event.data
            if event.is_last:
                number = self.heard
                assert self.received_body == self.bodies[number - 1] or self.outcomes[number] == "error"
        elif isinstance(event, ex.AckReceived):
            self.acks_under_way.remove(event.exchange)
        else:
            assert isinstance(event, ex.PingReceived)
            self.to_requester += self.responder.pong(event.payload)

    def at_requester(self, event: ex.Event) -> None:
        if isinstance(event, ex.DataReceived):
            self.received_answer += event.data
            assert self.answer.startswith(self.received_answer)
        elif isinstance(event, ex.EndReceived):
            assert self.outcomes[self.begun] == "end"
            assert self.received_answer == self.answer
            self.unacked.append(self.begun)
        elif isinstance(event, ex.ErrorReceived):
            assert self.outcomes[self.begun] == "error"
        elif isinstance(event, ex.GoAwayReceived):
            assert self.has_said_goaway
        elif isinstance(event, ex.PongReceived):
            assert event.payload == self.pings.popleft()
        else:
            assert isinstance(event, ex.Accepted | ex.HeadReceived | ex.CheckpointReceived)

    # ------------------------------------------------------------ the requester

    @precondition(lambda self: self.requester.state is State.IDLE and not self.requester.is_draining)
    @rule(length=LENGTHS)
    def ask(self, length: int) -> None:
        self.begun += 1
        body = bytes(length)
        self.bodies.append(body)
        self.answer = self.received_answer = b""
        self.to_responder += b"".join(self.requester.request(b"envelope", SALT, body))

    @precondition(lambda self: self.unacked)
    @rule(index=st.integers(0, 7))
    def acknowledge(self, index: int) -> None:
        number = self.unacked[index % len(self.unacked)]
        if self.requester.is_ack_awaited(number):
            self.to_responder += self.requester.ack(number, b"ack")
            self.acks_under_way.add(number)
        else:
            assert number <= self.begun - ex.MAX_UNACKED
        self.unacked.remove(number)

    @precondition(lambda self: self.requester.accepted is not None)
    @rule(payload=st.integers(0, 2**64 - 1))
    def ping(self, payload: int) -> None:
        self.pings.append(payload)
        self.to_responder += self.requester.ping(payload)

    # ------------------------------------------------------------ the responder

    @precondition(lambda self: self.responder.state is State.ANSWERING and not self.has_answered)
    @rule()
    def begin_the_answer(self) -> None:
        self.has_answered = True
        self.to_requester += self.responder.head("text/plain")

    @precondition(lambda self: self.responder.state is State.ANSWERING)
    @rule()
    def sign_a_checkpoint(self) -> None:
        self.has_answered = True
        self.to_requester += self.responder.checkpoint(b"checkpoint")

    @precondition(lambda self: self.responder.state is State.ANSWERING)
    @rule(length=LENGTHS)
    def answer_more(self, length: int) -> None:
        data = b"x" * length
        self.has_answered = True
        self.answer += data
        self.to_requester += self.responder.data(data)

    @precondition(lambda self: self.responder.state is State.ANSWERING)
    @rule()
    def end(self) -> None:
        self.outcomes[self.responder.exchange] = "end"
        self.to_requester += self.responder.end(b"receipt")

    @precondition(lambda self: self.responder.state in (State.BODY, State.ANSWERING))
    @rule()
    def fail(self) -> None:
        self.outcomes[self.responder.exchange] = "error"
        self.to_requester += self.responder.error(PeerBusyError("busy"))

    @precondition(lambda self: self.responder.state not in (State.NEW, State.OPENING))
    @rule()
    def say_goaway(self) -> None:
        self.has_said_goaway = True
        self.to_requester += self.responder.go_away("shutdown", 1)

    # ------------------------------------------------------------ always

    @invariant()
    def neither_side_is_ahead_of_the_other(self) -> None:
        assert self.responder.exchange <= self.requester.exchange == self.begun
        assert self.requester.exchange - self.responder.exchange <= 1
        assert State.BROKEN not in (self.requester.state, self.responder.state)

    def teardown(self) -> None:
        while self.to_responder or self.to_requester:
            self.bytes_reach_the_responder(70_000)
            self.bytes_reach_the_requester(70_000)
        assert not self.acks_under_way
        assert not self.pings
        if self.responder.state is State.IDLE:
            assert self.requester.state is State.IDLE
            assert self.requester.receive_eof() is self.responder.receive_eof() is State.IDLE


TestExchanges = Exchanges.TestCase
TestExchanges.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)

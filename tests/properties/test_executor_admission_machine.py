"""Admission against a model: bounds hold after every step, and whoever waits gets a slot in the end."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from lloom_sidecar.errors import PeerBusyError
from lloom_sidecar.executor.admission import Admission, Ticket
from lloom_sidecar.ids import PeerId

PEERS = [PeerId.from_ed25519(bytes([i]) * 32) for i in range(1, 4)]
QUEUE_LIMIT, MAX_PER_PEER = 4, 5


class AdmissionMachine(RuleBasedStateMachine):
    tickets: Any = Bundle("tickets")
    left: Any = Bundle("left")

    def __init__(self) -> None:
        super().__init__()
        self.state = Admission(slots=2, queue_limit=QUEUE_LIMIT, max_per_peer=MAX_PER_PEER)
        self.slots = 2
        self.here: list[Ticket] = []

    @rule(target=tickets, peer=st.sampled_from(PEERS), priority=st.integers(-1, 2))
    def enter(self, peer: PeerId, priority: int) -> Any:
        mine = sum(t.peer == peer for t in self.here)
        working = sum(t.is_admitted for t in self.here)
        try:
            ticket = self.state.enter(peer, priority=priority)
        except PeerBusyError as exc:
            assert exc.retry_after_s is not None
            assert exc.retry_after_s > 0
            if exc.code == "peer_limit":
                assert mine == MAX_PER_PEER
            else:
                assert working >= self.slots
                assert len(self.here) - working == QUEUE_LIMIT
            return multiple()
        assert mine < MAX_PER_PEER
        assert ticket.is_admitted == (working < self.slots)
        self.here.append(ticket)
        return ticket

    @rule(target=left, ticket=consumes(tickets), held_s=st.none() | st.floats(0, 100))
    def leave(self, ticket: Ticket, held_s: float | None) -> Ticket:
        was_waiting = {id(t) for t in self.here if not t.is_admitted}
        was_admitted = ticket.is_admitted
        self.here.remove(ticket)
        following = self.state.leave(ticket, held_s=held_s)
        if following is not None:
            assert was_admitted
            assert id(following) in was_waiting
            assert following.is_admitted
        return ticket

    @rule(ticket=left)
    def leave_again(self, ticket: Ticket) -> None:
        before = (self.state.working, self.state.queued)
        assert self.state.leave(ticket) is None
        assert (self.state.working, self.state.queued) == before

    @rule(slots=st.integers(1, 4))
    def resize(self, slots: int) -> None:
        waiting = [t for t in self.here if not t.is_admitted]
        admitted = self.state.resize(slots)
        assert all(t.is_admitted and any(t is w for w in waiting) for t in admitted)
        self.slots = slots

    @invariant()
    def bounds_hold(self) -> None:
        working = sum(t.is_admitted for t in self.here)
        waiting = len(self.here) - working
        assert (self.state.working, self.state.queued) == (working, waiting)
        assert waiting <= QUEUE_LIMIT
        assert all(sum(t.peer == peer for t in self.here) <= MAX_PER_PEER for peer in PEERS)
        assert not (waiting and working < self.slots), "a slot is free while somebody waits"

    def teardown(self) -> None:
        # Whoever works ends; then everybody who waited has worked.
        for _ in range(len(self.here)):
            working = [t for t in self.here if t.is_admitted]
            assert working
            self.here.remove(working[0])
            self.state.leave(working[0])
        assert not self.here
        assert (self.state.working, self.state.queued) == (0, 0)


AdmissionMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestAdmission = AdmissionMachine.TestCase

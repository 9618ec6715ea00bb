"""Admission against a model: bounds hold after every step, sums agree, and whoever waits gets a slot in the end."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from lloom_sidecar.errors import PeerBusyError
from lloom_sidecar.executor.admission import (
    MAX_PRIORITY,
    PRIORITY_IN_A_ROW,
    PRIORITY_STEP_S,
    Admission,
    Place,
    Ticket,
)
from lloom_sidecar.ids import PeerId

PEERS = [PeerId.from_ed25519(bytes([i]) * 32) for i in range(1, 5)]
PREFERRED = PEERS[0]
QUEUE_LIMIT, MAX_PER_PEER, MAX_SLOTS, PRIORITY_SLOTS = 4, 5, 4, 2


class AdmissionMachine(RuleBasedStateMachine):
    tickets: Any = Bundle("tickets")
    left: Any = Bundle("left")

    def __init__(self) -> None:
        super().__init__()
        self.slots = 2
        self.state = Admission(
            slots=self.slots,
            queue_limit=QUEUE_LIMIT,
            max_per_peer=MAX_PER_PEER,
            priority_peers=frozenset({PREFERRED}),
            priority_slots=PRIORITY_SLOTS,
        )
        self.here: list[Ticket] = []
        """Every ticket that holds a place or slot."""
        self.now = 0.0

    def of(self, *places: Place) -> list[Ticket]:
        return [t for t in self.here if t.place in places]

    def got_slots(self, found: list[Ticket], waiting: list[Ticket]) -> None:
        assert all(t.place is Place.WORKING and t in waiting for t in found)

    @rule(seconds=st.floats(0, 400))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        target=tickets,
        peer=st.sampled_from(PEERS),
        priority=st.integers(-99, 99),
        deadline_s=st.just(float("inf")) | st.floats(0, 60),
    )
    def enter(self, peer: PeerId, priority: int, deadline_s: float) -> Any:
        mine = [t for t in self.here if t.peer == peer]
        in_lane = [
            t for t in self.here if (t.peer == PREFERRED) == (peer == PREFERRED) and t.place is not Place.WORKING
        ]
        kept_before = self.state.kept(self.now)
        before = (self.state.working, self.state.queued)
        try:
            ticket, pushed_out = self.state.enter(peer, self.now, priority=priority, deadline_at=self.now + deadline_s)
        except PeerBusyError as exc:
            assert exc.retry_after_s is not None
            assert exc.retry_after_s > 0
            assert (self.state.working, self.state.queued) == before
            match exc.code:
                case "peer_limit":
                    assert len(mine) == MAX_PER_PEER
                case "deadline_too_short":
                    assert deadline_s < float("inf")
                    # Never when a slot is free for it.
                    assert len(in_lane) + self.state.working + kept_before >= self.slots
                case _:
                    assert exc.code == "busy"
                    assert len(in_lane) >= QUEUE_LIMIT
                    places = len([t for t in mine if t.place is not Place.WORKING])
                    most = max(sum(t.peer == other for t in in_lane) for other in PEERS)
                    assert most <= places + 1, "refused though somebody has more than a fair share of the queue"
            return multiple()
        assert len(mine) < MAX_PER_PEER
        assert ticket.place is Place.ARRIVING
        self.here.append(ticket)
        if pushed_out is not None:
            assert pushed_out.place is Place.PUSHED_OUT
            assert pushed_out.peer != peer
            assert (pushed_out.peer == PREFERRED) == (peer == PREFERRED)
            self.here.remove(pushed_out)
        return ticket

    @rule(ticket=tickets)
    def ready(self, ticket: Ticket) -> None:
        was = ticket.place
        waiting = [*self.of(Place.WAITING), ticket]
        found = self.state.ready(ticket, self.now)
        self.got_slots(found, waiting)
        if was is Place.ARRIVING:
            assert ticket.place in (Place.WAITING, Place.WORKING)
        else:
            assert (found, ticket.place) == ([], was)

    @rule(target=tickets, peer=st.sampled_from(PEERS), priorities=st.lists(st.integers(-3, 3), max_size=4))
    def ask(self, peer: PeerId, priorities: list[int]) -> Any:
        """Several requests whose bodies come at once."""
        taken = []
        for priority in priorities:
            with suppress(PeerBusyError):
                ticket, pushed_out = self.state.enter(peer, self.now, priority=priority)
                if pushed_out is not None:
                    self.here.remove(pushed_out)
                self.here.append(ticket)
                self.state.ready(ticket, self.now)
                taken.append(ticket)
        return multiple(*taken)

    @rule(target=left, ticket=consumes(tickets))
    def leave(self, ticket: Ticket) -> Ticket:
        was, waiting = ticket.place, self.of(Place.WAITING)
        queued = self.state.queued
        if ticket in self.here:
            self.here.remove(ticket)
        found = self.state.leave(ticket, self.now)
        assert ticket.place is Place.GONE
        self.got_slots(found, waiting)
        if was in (Place.ARRIVING, Place.WAITING):
            assert self.state.queued == queued - 1 - len(found)
        return ticket

    @rule(ticket=left)
    def leave_again(self, ticket: Ticket) -> None:
        before = (self.state.working, self.state.queued)
        assert self.state.leave(ticket, self.now) == []
        assert (self.state.working, self.state.queued) == before

    @rule(slots=st.integers(1, MAX_SLOTS))
    def resize(self, slots: int) -> None:
        waiting = self.of(Place.WAITING)
        self.slots = slots
        self.got_slots(self.state.resize(slots, self.now), waiting)

    @invariant()
    def sums_agree(self) -> None:
        assert all(t.place not in (Place.GONE, Place.PUSHED_OUT) for t in self.here)
        assert self.state.working == len(self.of(Place.WORKING))
        assert self.state.queued == len(self.of(Place.WAITING, Place.ARRIVING))
        lanes = (self.state._lane, self.state._priority_lane)
        assert sum(lane.waiting for lane in lanes) == len(self.of(Place.WAITING))
        held = {peer: share.places + share.working for lane in lanes for peer, share in lane.shares.items()}
        assert held == {peer: n for peer in PEERS if (n := sum(t.peer == peer for t in self.here))}

    @invariant()
    def bounds_hold(self) -> None:
        # After a shrink those that had a slot go on.
        assert len(self.of(Place.WORKING)) <= MAX_SLOTS
        for is_preferred in (True, False):
            places = [t for t in self.of(Place.WAITING, Place.ARRIVING) if (t.peer == PREFERRED) == is_preferred]
            assert len(places) <= QUEUE_LIMIT + MAX_SLOTS
        assert all(sum(t.peer == peer for t in self.here) <= MAX_PER_PEER for peer in PEERS)

    @invariant()
    def no_slot_is_idle_while_somebody_may_have_it(self) -> None:
        waiting = self.of(Place.WAITING)
        free = self.slots - self.state.working
        if free > 0 and waiting:
            # Only the slots that are kept: they end being so with time, which the next step notices.
            assert all(t.peer != PREFERRED for t in waiting)
            assert free <= PRIORITY_SLOTS

    @invariant()
    def one_peers_requests_go_in_order_of_priority_and_age(self) -> None:
        for lane in (self.state._lane, self.state._priority_lane):
            for share in lane.shares.values():
                order = [t.due_at for t in share.waiting]
                assert order == sorted(order)
                for ticket in share.waiting:
                    assert ticket.due_at <= self.now + MAX_PRIORITY * PRIORITY_STEP_S

    def teardown(self) -> None:
        """Nobody starves: though priority peers keep asking, everybody who waits has worked after so many ends."""
        for ticket in self.of(Place.ARRIVING):
            self.state.ready(ticket, self.now)
        # Every one of them needs at most PRIORITY_IN_A_ROW + 1 slots to become free, beside those that work now.
        most = (PRIORITY_IN_A_ROW + 1) * len(self.of(Place.WAITING)) + MAX_SLOTS
        others = [t for t in self.of(Place.WAITING) if t.peer != PREFERRED]
        while any(t.place is Place.WAITING for t in others):
            most -= 1
            assert most > 0, "somebody waits for ever"
            with suppress(PeerBusyError):
                while True:
                    more, _ = self.state.enter(PREFERRED, self.now)
                    self.here.append(more)
                    self.state.ready(more, self.now)
            self.now += 1
            working = self.of(Place.WORKING)[0]
            self.here.remove(working)
            self.state.leave(working, self.now)
        for ticket in list(self.here):
            self.here.remove(ticket)
            self.state.leave(ticket, self.now)
        assert (self.state.working, self.state.queued) == (0, 0)
        self.sums_agree()


AdmissionMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAdmission = AdmissionMachine.TestCase

"""Slots, the queue in front of them, and whose turn it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lloom_sidecar.errors import PeerBusyError
from lloom_sidecar.executor.admission import (
    KEEP_S,
    MAX_PRIORITY,
    MAX_RETRY_AFTER_S,
    MIN_RETRY_AFTER_S,
    PRIORITY_IN_A_ROW,
    PRIORITY_STEP_S,
    Admission,
    Place,
    Ticket,
)
from lloom_sidecar.ids import PeerId

A, B, C, D = (PeerId.from_ed25519(bytes([i]) * 32) for i in (1, 2, 3, 4))


class Line:
    """An admission whose requests are ready at once, at a time that the test sets."""

    def __init__(self, slots: int = 1, queue_limit: int = 9, **settings: object) -> None:
        self.state = Admission(slots=slots, queue_limit=queue_limit, **settings)  # type: ignore[arg-type]
        self.now = 1000.0

    def ask(self, peer: PeerId = A, **more: float) -> Ticket:
        ticket, self.pushed_out = self.state.enter(peer, self.now, **more)  # type: ignore[arg-type]
        self.state.ready(ticket, self.now)
        return ticket

    def end(self, ticket: Ticket) -> Ticket | None:
        """The one that follows it."""
        found = self.state.leave(ticket, self.now)
        assert len(found) <= 1
        return found[0] if found else None

    def serve(self, ticket: Ticket, count: int) -> list[Ticket]:
        """End ``ticket``, then whoever follows, so many times."""
        order = []
        for _ in range(count):
            following = self.end(ticket)
            assert following is not None
            order.append(ticket := following)
        return order


def refusal(ask: Callable[[], object]) -> PeerBusyError:
    with pytest.raises(PeerBusyError) as caught:
        ask()
    assert caught.value.retryable
    return caught.value


class TestBounds:
    def test_slots_first_then_the_queue_then_busy(self) -> None:
        line = Line(queue_limit=2)
        working, first, second = (line.ask() for _ in range(3))
        assert [t.place for t in (working, first, second)] == [Place.WORKING, Place.WAITING, Place.WAITING]
        error = refusal(line.ask)
        assert (error.code, error.http_status, error.retry_after_s) == ("busy", 503, 2.0)
        assert line.end(working) is first
        assert first.place is Place.WORKING
        assert (line.state.working, line.state.queued) == (1, 1)

    def test_no_queue(self) -> None:
        line = Line(queue_limit=0)
        line.ask(A)
        assert refusal(lambda: line.ask(B)).code == "busy"

    def test_one_peer_has_its_limit(self) -> None:
        line = Line(slots=4, max_per_peer=2)
        first = line.ask(A)
        line.ask(A)
        error = refusal(lambda: line.ask(A))
        assert (error.code, error.http_status, error.retry_after_s) == ("peer_limit", 429, 0.5)
        line.ask(B)
        line.end(first)
        line.ask(A)

    def test_one_that_waited_and_left_frees_its_place(self) -> None:
        line = Line(queue_limit=1)
        working, waiting = line.ask(A), line.ask(A)
        assert line.end(waiting) is None
        assert line.end(waiting) is None
        assert line.end(working) is None
        assert (line.state.working, line.state.queued) == (0, 0)

    def test_resize(self) -> None:
        line = Line()
        working = line.ask()
        waiting = [line.ask() for _ in range(3)]
        assert line.state.resize(3, line.now) == waiting[:2]
        assert line.state.resize(0, line.now) == []
        assert line.state.slots == 1
        assert line.end(working) is None
        assert line.end(waiting[0]) is None
        assert line.end(waiting[1]) is waiting[2]


class TestBody:
    def test_without_its_body_a_request_holds_no_slot(self) -> None:
        line = Line(queue_limit=0)
        late, _ = line.state.enter(A, line.now)
        assert (line.state.working, line.state.queued) == (0, 1)
        assert refusal(lambda: line.ask(B)).code == "busy"
        assert line.state.ready(late, line.now) == [late]
        assert line.state.ready(late, line.now) == []

    def test_whoever_is_ready_first_works_first(self) -> None:
        line = Line()
        late, _ = line.state.enter(A, line.now)
        quick = line.ask(B)
        assert quick.place is Place.WORKING
        assert line.state.ready(late, line.now) == []
        assert line.end(quick) is late

    def test_one_that_never_sent_its_body_leaves(self) -> None:
        line = Line(queue_limit=0)
        late, _ = line.state.enter(A, line.now)
        assert line.end(late) is None
        assert line.ask(B).place is Place.WORKING


class TestFairness:
    def test_one_request_does_not_wait_behind_a_hundred_of_another_peer(self) -> None:
        line = Line(queue_limit=200)
        working = line.ask(A)
        crowd = [line.ask(A) for _ in range(100)]
        alone = line.ask(B)
        assert line.serve(working, 3) == [alone, crowd[0], crowd[1]]

    def test_peers_take_turns(self) -> None:
        line = Line(queue_limit=20)
        working = line.ask(D)
        asked = [line.ask(peer) for peer in (A, A, A, B, B, C)]
        assert [t.peer for t in line.serve(working, len(asked))] == [A, B, C, A, B, A]

    def test_a_slot_goes_to_the_peer_that_holds_the_fewest(self) -> None:
        """A's requests are long, B's short: B has its slot again each time."""
        line = Line(slots=4, queue_limit=20)
        long = [line.ask(A) for _ in range(4)]
        for _ in range(4):
            line.ask(A)
            line.ask(B)
        first, second = line.end(long[0]), line.end(long[1])
        assert first is not None
        assert second is not None
        assert (first.peer, second.peer) == (B, B)
        third = line.end(first)
        assert third is not None
        assert third.peer is B

    def test_newcomers_do_not_overtake_for_ever(self) -> None:
        """Peers that never asked before keep coming, one for each slot; A's second has its turn all the same."""
        line = Line(queue_limit=20)
        working: Ticket | None = line.ask(A)
        second = line.ask(A)
        others = iter(PeerId.from_ed25519(bytes([i]) * 32) for i in range(10, 20))
        for turns in range(10):  # noqa: B007
            line.ask(next(others))
            assert working is not None
            working = line.end(working)
            if working is second:
                break
        assert turns <= 1

    def test_a_full_queue_makes_room_for_whoever_has_less_in_it(self) -> None:
        line = Line(queue_limit=4)
        working = line.ask(A)
        crowd = [line.ask(A) for _ in range(4)]
        alone = line.ask(B)
        assert line.pushed_out is crowd[3]
        assert crowd[3].place is Place.PUSHED_OUT
        assert (line.state.queued, alone.place) == (4, Place.WAITING)
        assert line.end(crowd[3]) is None
        again = line.ask(B)
        assert line.pushed_out is crowd[2]
        assert refusal(lambda: line.ask(B)).code == "busy"  # two each: that is fair
        assert line.serve(working, 4) == [alone, crowd[0], again, crowd[1]]

    def test_whoever_sends_no_bodies_is_pushed_out_too(self) -> None:
        line = Line(slots=2, queue_limit=0)
        idle = [line.state.enter(A, line.now)[0] for _ in range(2)]
        line.ask(B)
        assert line.pushed_out is idle[1]
        assert line.state.ready(idle[1], line.now) == []
        assert line.state.ready(idle[0], line.now) == [idle[0]]


class TestPriority:
    def test_it_orders_the_requests_of_one_peer_only(self) -> None:
        line = Line()
        working = line.ask(A)
        low, other, high = line.ask(A, priority=1), line.ask(B, priority=99), line.ask(A, priority=5)
        assert line.serve(working, 3) == [other, high, low]

    def test_equal_ones_keep_their_order(self) -> None:
        line = Line()
        working, first, second = (line.ask(A) for _ in range(3))
        assert line.serve(working, 2) == [first, second]

    @pytest.mark.parametrize("steps", [1, 3, 10**9])
    def test_waiting_makes_up_for_it(self, steps: int) -> None:
        line = Line(queue_limit=10**6)
        working = line.ask(A)
        old = line.ask(A)
        counted = min(steps, MAX_PRIORITY)
        line.now += counted * PRIORITY_STEP_S - 1
        soon = line.ask(A, priority=steps)
        line.now += 2
        late = line.ask(A, priority=steps)
        assert line.serve(working, 3) == [soon, old, late]

    def test_the_least_has_its_bound_as_well(self) -> None:
        line = Line()
        working = line.ask(A)
        least = line.ask(A, priority=-(10**9))
        line.now += MAX_PRIORITY * PRIORITY_STEP_S + 1
        line.ask(A)
        assert line.end(working) is least


class TestPriorityPeers:
    def test_they_go_first_and_have_a_queue_of_their_own(self) -> None:
        line = Line(queue_limit=1, priority_peers=frozenset({B}))
        working, waiting = line.ask(A), line.ask(A)
        assert refusal(lambda: line.ask(C)).code == "busy"
        preferred = line.ask(B)
        assert refusal(lambda: line.ask(B)).code == "busy"
        assert line.serve(working, 2) == [preferred, waiting]

    def test_others_have_their_turn_now_and_then(self) -> None:
        line = Line(queue_limit=20, priority_peers=frozenset({B}))
        working = line.ask(B)
        for _ in range(9):
            line.ask(A)
            line.ask(B)
        order = [t.peer for t in line.serve(working, 12)]
        assert order == ([B] * PRIORITY_IN_A_ROW + [A]) * 3

    def test_a_slot_is_kept_for_them_while_they_ask(self) -> None:
        line = Line(slots=3, priority_peers=frozenset({B}))
        line.end(line.ask(B))
        others = [line.ask(A) for _ in range(3)]
        assert [t.place for t in others] == [Place.WORKING, Place.WORKING, Place.WAITING]
        preferred = line.ask(B)
        assert preferred.place is Place.WORKING
        assert line.end(preferred) is None
        assert line.end(others[0]) is others[2]

    def test_it_is_given_to_others_when_they_have_not_asked_for_long(self) -> None:
        line = Line(slots=2, priority_peers=frozenset({B}))
        line.end(line.ask(B))
        line.ask(A)
        line.now += KEEP_S + 1
        assert line.ask(A).place is Place.WORKING

    def test_the_only_slot_is_kept_for_nobody(self) -> None:
        line = Line(slots=1, priority_peers=frozenset({B}), priority_slots=4)
        line.end(line.ask(B))
        assert line.ask(A).place is Place.WORKING

    def test_without_kept_slots_they_wait_in_front(self) -> None:
        line = Line(slots=2, priority_peers=frozenset({B}), priority_slots=0)
        line.end(line.ask(B))
        first = line.ask(A)
        line.ask(A)
        line.ask(A)
        preferred = line.ask(B)
        assert line.end(first) is preferred


class TestDeadlines:
    def test_what_cannot_be_met_is_refused_at_once(self) -> None:
        line = Line(queue_limit=9)
        first = line.ask(A)
        line.now += 10
        line.end(first)
        assert line.state.service_s == 10
        line.ask(A)
        # One works, so the next begins after about 10 s and ends after 20.
        error = refusal(lambda: line.ask(A, deadline_at=line.now + 15))
        assert (error.code, error.http_status, error.retry_after_s) == ("deadline_too_short", 503, 5.0)
        line.ask(A, deadline_at=line.now + 21)
        assert refusal(lambda: line.ask(A, deadline_at=line.now + 29)).code == "deadline_too_short"
        # Another peer's first goes before A's third.
        line.ask(B, deadline_at=line.now + 31)
        assert refusal(lambda: line.ask(A, deadline_at=line.now + 35)).code == "deadline_too_short"

    def test_its_own_priority_counts(self) -> None:
        line = Line()
        first = line.ask(A)
        line.now += 10
        line.end(first)
        for _ in range(3):
            line.ask(A)
        assert refusal(lambda: line.ask(A, deadline_at=line.now + 25)).code == "deadline_too_short"
        line.ask(A, deadline_at=line.now + 25, priority=1)

    def test_priority_peers_go_before(self) -> None:
        line = Line(slots=1, priority_peers=frozenset({B}))
        first = line.ask(A)
        line.now += 10
        line.end(first)
        line.ask(A)
        line.ask(B)
        assert refusal(lambda: line.ask(A, deadline_at=line.now + 25)).code == "deadline_too_short"

    def test_with_a_free_slot_nothing_is_refused(self) -> None:
        line = Line()
        first = line.ask(A)
        line.now += 100
        line.end(first)
        assert line.ask(A, deadline_at=line.now + 1).place is Place.WORKING

    def test_slots_that_wait_for_bodies_are_no_wait(self) -> None:
        line = Line(slots=2)
        line.state.enter(A, line.now)
        line.state.enter(A, line.now)
        assert refusal(lambda: line.ask(B, deadline_at=line.now + 1.4)).code == "deadline_too_short"
        line.ask(B, deadline_at=line.now + 1.6)


class TestAdvice:
    @pytest.mark.parametrize(("held_s", "expected"), [(0.0, MIN_RETRY_AFTER_S), (1e6, MAX_RETRY_AFTER_S)])
    def test_it_follows_the_service_time_within_bounds(self, held_s: float, expected: float) -> None:
        line = Line(queue_limit=0)
        for _ in range(50):
            ticket = line.ask()
            line.now += held_s
            line.end(ticket)
        line.ask()
        assert refusal(line.ask).retry_after_s == expected

    def test_waiting_is_no_service(self) -> None:
        line = Line()
        first, second = line.ask(), line.ask()
        line.now += 3
        line.end(first)
        line.now += 3
        line.end(second)
        assert line.state.service_s == 3

"""Slots and the queue in front of them."""

from __future__ import annotations

import pytest

from lloom_sidecar.errors import PeerBusyError
from lloom_sidecar.executor.admission import MAX_RETRY_AFTER_S, Admission
from lloom_sidecar.ids import PeerId

A, B = (PeerId.from_ed25519(bytes([i]) * 32) for i in (1, 2))


def admission(slots: int = 1, queue_limit: int = 2, max_per_peer: int = 9) -> Admission:
    return Admission(slots=slots, queue_limit=queue_limit, max_per_peer=max_per_peer)


def test_slots_first_then_the_queue_then_busy() -> None:
    state = admission()
    working, first, second = (state.enter(A) for _ in range(3))
    assert (working.is_admitted, first.is_admitted, second.is_admitted) == (True, False, False)
    with pytest.raises(PeerBusyError) as caught:
        state.enter(A)
    assert (caught.value.code, caught.value.http_status, caught.value.retryable) == ("busy", 503, True)
    assert caught.value.retry_after_s == 3.0
    assert state.leave(working) is first
    assert first.is_admitted
    assert (state.working, state.queued) == (1, 1)


def test_no_queue() -> None:
    state = admission(queue_limit=0)
    state.enter(A)
    with pytest.raises(PeerBusyError):
        state.enter(B)


def test_one_peer_has_its_limit() -> None:
    state = admission(slots=4, max_per_peer=2)
    first = state.enter(A)
    state.enter(A)
    with pytest.raises(PeerBusyError) as caught:
        state.enter(A)
    assert (caught.value.code, caught.value.http_status) == ("peer_limit", 429)
    state.enter(B)
    state.leave(first)
    state.enter(A)


def test_priority_orders_the_requests_of_one_peer_only() -> None:
    state = admission(queue_limit=9)
    working = state.enter(A)
    low, other, high = state.enter(A, priority=1), state.enter(B, priority=99), state.enter(A, priority=5)
    assert state.leave(working) is high
    assert state.leave(high) is low
    assert state.leave(low) is other


def test_equal_priorities_keep_their_order() -> None:
    state = admission(queue_limit=9)
    working = state.enter(A)
    first, second = state.enter(A), state.enter(A)
    assert state.leave(working) is first
    assert state.leave(first) is second


def test_one_that_waited_and_left_frees_its_place() -> None:
    state = admission(queue_limit=1)
    working = state.enter(A)
    waiting = state.enter(A)
    assert state.leave(waiting) is None
    assert state.leave(waiting) is None
    following = state.enter(B)
    assert state.leave(working) is following


def test_resize() -> None:
    state = admission(queue_limit=9)
    working = state.enter(A)
    waiting = [state.enter(A) for _ in range(3)]
    assert state.resize(3) == waiting[:2]
    assert state.resize(0) == []
    assert state.slots == 1
    assert state.leave(working) is None
    assert state.leave(waiting[0]) is None
    assert state.leave(waiting[1]) is waiting[2]


def test_the_advice_follows_the_service_time_within_bounds() -> None:
    state = admission(queue_limit=0)
    for held_s, expected in ((0.0, 0.1), (1e6, MAX_RETRY_AFTER_S)):
        for _ in range(50):
            state.leave(state.enter(A), held_s=held_s)
        ticket = state.enter(A)
        with pytest.raises(PeerBusyError) as caught:
            state.enter(A)
        assert caught.value.retry_after_s == pytest.approx(expected, abs=0.01)
        state.leave(ticket)

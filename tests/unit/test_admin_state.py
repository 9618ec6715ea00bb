"""Health conditions, metrics and events: the parts of the admin room that only hold state."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from lloom_sidecar.admin.events import (
    EVENT_KINDS,
    BootstrapComplete,
    ConnectionClosed,
    EventBus,
    EventsDropped,
    ExecutorLost,
    NetworkError,
    Stamped,
)
from lloom_sidecar.admin.health import CONDITION_KINDS, Condition, HealthConditions
from lloom_sidecar.admin.metrics import MAX_LABEL_VALUES, Metrics


def metrics_of(**kwargs: object) -> Metrics:
    return Metrics(version="0.0.test", with_process=False, **kwargs)  # type: ignore[arg-type]


# --- health


def test_conditions_come_worst_first_and_report_only_changes() -> None:
    seen: list[tuple[str, str, bool]] = []
    health = HealthConditions(on_change=lambda one, holds: seen.append((one.code, one.text, holds)))
    health.set("no_bootstrap", "none is configured")
    health.set("p2pd_down", "no answer for 3 s")
    health.set("few_peers", "0 of 1 peers")
    health.set("few_peers", "0 of 1 peers")
    assert [one.code for one in health.current()] == ["p2pd_down", "few_peers", "no_bootstrap"]
    health.clear("p2pd_down")
    health.clear("p2pd_down")
    health.update("few_peers", "0 of 2 peers")
    health.update("few_peers", None)
    assert "few_peers" not in health
    assert "no_bootstrap" in health
    assert seen == [
        ("no_bootstrap", "none is configured", True),
        ("p2pd_down", "no answer for 3 s", True),
        ("few_peers", "0 of 1 peers", True),
        ("p2pd_down", "no answer for 3 s", False),
        ("few_peers", "0 of 2 peers", True),
        ("few_peers", "0 of 2 peers", False),
    ]


def test_a_condition_outside_the_vocabulary_is_a_bug() -> None:
    health = HealthConditions()
    with pytest.raises(KeyError):
        health.set("weather", "rain")
    with pytest.raises(KeyError):
        health.clear("weather")


def test_the_vocabulary_is_complete_sentences() -> None:
    codes = [kind.code for kind in CONDITION_KINDS]
    assert len(codes) == len(set(codes))
    for kind in CONDITION_KINDS:
        assert kind.remedy.endswith(".")
        assert 0 < len(kind.title) < 50


def test_a_condition_in_json_has_five_texts() -> None:
    health = HealthConditions()
    health.set("few_peers", "0 of 1 peers")
    (one,) = health.as_dicts()
    assert list(one) == ["code", "title", "severity", "text", "remedy"]
    assert (one["severity"], type(one["severity"])) == ("warning", str)
    assert isinstance(health.current()[0], Condition)


# --- metrics


def test_the_seeds_five_metrics_have_their_names() -> None:
    metrics = metrics_of()
    metrics.set_peers(3, 2)
    metrics.message_sent("announcement")
    metrics.message_received("request", 2)
    metrics.discovery_finished(0.2)
    metrics.request_started("client")
    metrics.request_finished("client", "ok", 1.5)
    text = metrics.render().decode()
    for line in (
        "lloom_connected_peers 3.0",
        'lloom_messages_sent_total{kind="announcement"} 1.0',
        'lloom_messages_received_total{kind="request"} 2.0',
        "lloom_discovery_latency_seconds_count 1.0",
        'lloom_request_duration_seconds_bucket{le="2.5",role="client"} 1.0',
        'lloom_requests_total{outcome="ok",role="client"} 1.0',
        'lloom_requests_in_flight{role="client"} 0.0',
        'lloom_build_info{version="0.0.test"} 1.0',
    ):
        assert line in text.splitlines()
    assert "_created" not in text


def test_every_other_metric_moves() -> None:
    health = HealthConditions()
    health.set("few_peers", "0 of 1 peers")
    metrics = metrics_of(health=health)
    metrics.set_known(4, 2)
    metrics.announcement_dropped("clock")
    metrics.first_token("executor", 0.03)
    metrics.attempt_failed("peer_unreachable")
    metrics.refused("busy")
    metrics.set_capacity(4, 1)
    metrics.http_refused("origin")
    metrics.p2pd_up(True)
    metrics.p2pd_restarted()
    metrics.events_dropped(5)
    metrics.set_callback("in_flight_executor", lambda: 9)
    lines = metrics.render().decode().splitlines()
    for line in (
        "lloom_known_executors 4.0",
        "lloom_known_models 2.0",
        'lloom_announcements_dropped_total{reason="clock"} 1.0',
        'lloom_time_to_first_token_seconds_count{role="executor"} 1.0',
        'lloom_attempts_failed_total{code="peer_unreachable"} 1.0',
        'lloom_refused_total{code="busy"} 1.0',
        "lloom_slots 4.0",
        "lloom_queued_requests 1.0",
        'lloom_http_refusals_total{reason="origin"} 1.0',
        "lloom_p2pd_up 1.0",
        "lloom_p2pd_restarts_total 1.0",
        "lloom_events_dropped_total 5.0",
        'lloom_requests_in_flight{role="executor"} 9.0',
        'lloom_health_condition{code="few_peers",severity="warning"} 1.0',
    ):
        assert line in lines


def test_words_of_other_nodes_cannot_grow_the_metrics() -> None:
    metrics = metrics_of()
    for number in range(3 * MAX_LABEL_VALUES):
        metrics.refused(f"code_{number}")
    metrics.refused("with\nnewline")
    metrics.refused("x" * 41)
    lines = [one for one in metrics.render().decode().splitlines() if one.startswith("lloom_refused_total{")]
    assert len(lines) == MAX_LABEL_VALUES + 1
    assert f'lloom_refused_total{{code="other"}} {2.0 * MAX_LABEL_VALUES + 2}' in lines


def test_two_nodes_of_one_process_count_apart() -> None:
    one, other = metrics_of(), metrics_of()
    one.set_peers(3, 0)
    assert b"lloom_connected_peers 0.0" in other.render()
    assert b"process_cpu_seconds_total" in Metrics(version="1", with_process=True).render()


# --- events


def lost(number: int) -> ExecutorLost:
    return ExecutorLost(f"peer-{number}", "lease")


def test_there_are_the_seeds_eight_events_and_executor_lost() -> None:
    assert set(EVENT_KINDS) == {
        "connection_established", "connection_closed", "executor_discovered", "validator_discovered",
        "request_received", "response_received", "bootstrap_complete", "network_error", "executor_lost",
    }  # fmt: skip


def test_an_event_in_json() -> None:
    bus = EventBus(wall_clock=lambda: 1_700_000_000.5)
    stamped = bus.publish(ConnectionClosed("12D3", "reset"))
    assert stamped.as_dict() == {
        "event": "connection_closed",
        "sequence": 1,
        "at": "2023-11-14T22:13:20.500Z",
        "peer": "12D3",
        "cause": "reset",
    }
    assert len(bus.publish(NetworkError("clock", "x" * 9999)).as_dict()["text"]) == 500


async def test_a_reader_gets_what_is_published_after_it_came() -> None:
    bus = EventBus()
    bus.publish(lost(0))
    with bus.subscribe() as reader:
        bus.publish(lost(1))
        found = await reader.receive()
        assert isinstance(found, Stamped)
        assert (found.sequence, found.event) == (2, lost(1))
        with pytest.raises(trio.WouldBlock):
            reader.receive_nowait()
        assert bus.readers == 1
    assert bus.readers == 0


async def test_a_reader_can_begin_with_history_and_choose_kinds() -> None:
    bus = EventBus(history=2)
    for event in (lost(1), BootstrapComplete(1, 1), lost(2), lost(3)):
        bus.publish(event)
    with bus.subscribe(history=True, kinds=["executor_lost"]) as reader:
        bus.publish(BootstrapComplete(2, 2))
        bus.close()
        assert [one.event async for one in reader if isinstance(one, Stamped)] == [lost(2), lost(3)]
    assert [one.event.kind for one in bus.recent(kinds=["bootstrap_complete"])] == ["bootstrap_complete"]
    with pytest.raises(ValueError, match="no such event: weather"):
        bus.subscribe(kinds=["weather"])


async def test_a_waiting_reader_wakes_for_an_event_and_for_the_end(autojump_clock: trio.testing.MockClock) -> None:
    bus = EventBus()
    got: list[Stamped | EventsDropped] = []

    async def read() -> None:
        with bus.subscribe() as reader:
            async for one in reader:
                got.append(one)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        bus.publish(lost(1))
        await trio.testing.wait_all_tasks_blocked()
        assert len(got) == 1
        bus.close()


async def test_a_cancelled_receive_loses_nothing() -> None:
    bus = EventBus()
    with bus.subscribe() as reader:
        with trio.move_on_after(0):
            await reader.receive()
        bus.publish(lost(1))
        with trio.CancelScope() as scope:
            scope.cancel()
            await reader.receive()
        assert isinstance(await reader.receive(), Stamped)


@given(limit=st.integers(1, 5), batches=st.lists(st.integers(0, 12), max_size=8))
def test_a_slow_reader_is_told_exactly_what_it_missed(limit: int, batches: list[int]) -> None:
    counted: list[int] = []
    bus = EventBus(on_dropped=counted.append)
    reader = bus.subscribe(limit=limit)
    seen = dropped = 0
    for batch in batches:
        for number in range(batch):
            bus.publish(lost(number))
        while True:
            try:
                one = reader.receive_nowait()
            except trio.WouldBlock:
                break
            if isinstance(one, EventsDropped):
                dropped += one.count
                assert one.as_dict() == {"event": "events_dropped", "count": one.count}
            else:
                seen += 1
                assert one.sequence == seen + dropped  # nothing is skipped without a word
    assert seen + dropped == sum(batches)
    assert sum(counted) == dropped

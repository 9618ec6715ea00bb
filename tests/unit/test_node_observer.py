"""What a node tells of its peers: causes, discoveries, warnings."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from lloom_sidecar.admin.events import BootstrapComplete, ConnectionClosed, EventBus, NetworkError, ValidatorDiscovered
from lloom_sidecar.admin.metrics import Metrics
from lloom_sidecar.errors import LloomError, PeerUnreachableError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.network.upkeep import Round
from lloom_sidecar.node.observer import CAUSE_S, MAX_CAUSES, Observer

A = PeerId.from_ed25519(b"a" * 32)
PEERS = [PeerId.from_ed25519(number.to_bytes(32, "big")) for number in range(MAX_CAUSES + 1)]


@pytest.fixture
def events() -> EventBus:
    return EventBus()


@pytest.fixture
def roles() -> set[str]:
    return {"validator"}


@pytest.fixture
def observer(events: EventBus, roles: set[str]) -> Observer:
    return Observer(
        metrics=Metrics(version="1", with_process=False),
        events=events,
        models_of=lambda peer: (),
        roles_of=lambda peer: frozenset(roles),
        keep_receipt=lambda receipt: None,
    )


def closed(events: EventBus) -> list[str]:
    return [one.event.cause for one in events.recent() if isinstance(one.event, ConnectionClosed)]


async def test_a_closed_connection_has_the_cause_that_was_told(
    observer: Observer, events: EventBus, autojump_clock: MockClock
) -> None:
    told = []
    observer.hello_refused(A, "not_member")
    told.append(observer.disconnected(A))
    observer.attempt_failed(A, "m", PeerUnreachableError("gone"), "open")
    told.append(observer.disconnected(A))
    observer.attempt_failed(A, "m", LloomError("busy", code="busy"), "open")
    told.append(observer.disconnected(A))
    observer.will_close(A, "banned")
    await trio.sleep(CAUSE_S + 1)
    told.append(observer.disconnected(A))
    assert told == closed(events) == ["not_member", "peer_unreachable", "unknown", "unknown"]


async def test_causes_are_bounded(observer: Observer, events: EventBus) -> None:
    for peer in PEERS:
        observer.will_close(peer, "banned")
    observer.disconnected(PEERS[0])
    observer.disconnected(PEERS[-1])
    assert closed(events) == ["unknown", "banned"]


def test_only_a_validator_is_discovered_as_one(observer: Observer, events: EventBus, roles: set[str]) -> None:
    observer.validator_joined(A, 3)
    observer.validator_seen(A)
    roles.clear()
    observer.validator_joined(A, 3)
    told = [one.event for one in events.recent()]
    assert told == [ValidatorDiscovered(str(A), "bootstrap"), ValidatorDiscovered(str(A), "hello")]


def test_a_round_is_told_unless_there_was_nobody_to_try(observer: Observer, events: EventBus) -> None:
    observer.round_ended(Round(0, 0, 0, 0, 0.1))
    observer.round_ended(Round(1, 2, 3, 4, 1.23456))
    assert [one.event for one in events.recent()] == [BootstrapComplete(4, 6, 1.235)]


def test_warnings_are_network_errors(observer: Observer, events: EventBus) -> None:
    observer.few_peers(0, 2, "nobody answered")
    observer.peer_banned(A, "rate")
    observer.peer_refused(A, "version")
    told = [one.event for one in events.recent()]
    assert told[0] == NetworkError("few_peers", "0 of 2 wanted peers: nobody answered.")
    assert [(one.code, one.peer) for one in told[1:] if isinstance(one, NetworkError)] == [
        ("peer_banned", str(A)),
        ("hello_version", str(A)),
    ]

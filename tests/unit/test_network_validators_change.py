"""Validators that are added and removed while a node runs, and what is kept of the reason why one does not answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio
from test_network_services import KEY, NOW_MS, Sidecar
from test_network_status import VALIDATOR
from trio.testing import MockClock

from lloom_sidecar.errors import PeerUnreachableError
from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.network.status import StatusBoard
from lloom_sidecar.p2p.daemon import TopicMessage
from lloom_sidecar.protocol.names import TOPIC_NETWORK
from lloom_sidecar.protocol.status import NetworkStatus, seal_status
from tests.fakes.fake_nodes import fake_nodes

FIRST, SECOND = (Multiaddr.parse(f"/ip4/192.0.2.{number}/tcp/4001") for number in (1, 2))


def address_of(side: Sidecar) -> Multiaddr:
    return side.node.p2pd.addr.with_peer(side.node.peer)


@asynccontextmanager
async def strangers() -> AsyncGenerator[tuple[Sidecar, Sidecar]]:
    """Two nodes that are not connected and do not know each other."""
    async with fake_nodes(2, connected=False) as (near, far):
        yield Sidecar(near), Sidecar(far)


@asynccontextmanager
async def running(side: Sidecar, other: Sidecar) -> AsyncGenerator[trio.Nursery]:
    """``side`` with its bootstrap and its look at the connections; ``other`` answers hello."""
    await other.listen()
    async with trio.open_nursery() as nursery:
        await nursery.start(side.connections.run)
        await nursery.start(side.bootstrap.run)
        yield nursery
        nursery.cancel_scope.cancel()


async def test_an_added_validator_is_joined_at_once(autojump_clock: MockClock) -> None:
    async with strangers() as (here, there), running(here, there):
        await trio.sleep(5)
        assert here.bootstrap.validators == []
        assert here.bootstrap.add(address_of(there))
        assert not here.bootstrap.add(address_of(there))
        await trio.sleep(0.1)
        assert here.bootstrap.joined == [there.node.peer]


async def test_ones_own_and_a_nameless_address_are_none(autojump_clock: MockClock) -> None:
    async with strangers() as (here, _):
        assert not here.bootstrap.add(address_of(here))
        assert not here.bootstrap.add(FIRST)
        assert here.bootstrap.validators == []


async def test_what_is_added_before_the_start_is_joined_then(autojump_clock: MockClock) -> None:
    async with strangers() as (here, there):
        assert here.bootstrap.add(address_of(there))
        async with running(here, there):
            await trio.sleep(0.1)
            assert here.bootstrap.joined == [there.node.peer]


async def test_a_removed_validator_is_not_dialled_again(autojump_clock: MockClock) -> None:
    async with strangers() as (here, there), running(here, there):
        here.bootstrap.add(address_of(there))
        await trio.sleep(0.1)
        assert here.bootstrap.remove(there.node.peer, {address_of(there)})
        assert not here.bootstrap.remove(there.node.peer, {address_of(there)})
        assert here.bootstrap.validators == []
        await here.node.daemon.disconnect(there.node.peer)
        await trio.sleep(60)
        assert there.node.peer not in here.connections


async def test_addresses_come_and_go_one_by_one(autojump_clock: MockClock) -> None:
    async with strangers() as (here, there):
        peer = there.node.peer
        assert here.bootstrap.add(FIRST.with_peer(peer))
        assert here.bootstrap.add(SECOND.with_peer(peer))
        validator = here.bootstrap.validators[0]
        assert validator.addrs == (FIRST.with_peer(peer), SECOND.with_peer(peer))
        assert here.bootstrap.remove(peer, {FIRST.with_peer(peer)})
        assert list(validator.addrs) == [SECOND.with_peer(peer)]
        assert here.bootstrap.validators == [validator]


async def test_the_reason_outlives_that_no_dial_was_made(autojump_clock: MockClock) -> None:
    async with strangers() as (here, there), running(here, there):
        reasons = ["connection refused", "all dials failed: dial backoff", "no route to host"]

        async def fail(*args: object, **kwargs: object) -> None:
            await trio.lowlevel.checkpoint()
            raise PeerUnreachableError(reasons[min(attempts, 2)])

        attempts = 0
        here.node.daemon.connect = fail  # type: ignore[method-assign]
        here.bootstrap.add(address_of(there))
        (validator,) = here.bootstrap.validators
        for attempts, expected in ((0, "connection refused"), (1, "connection refused"), (2, "no route to host")):
            await here.bootstrap.retry_all(timeout_s=60)
            assert validator.last_error == expected, attempts


async def test_the_board_looks_at_the_validators_of_the_moment(autojump_clock: MockClock) -> None:
    peers = {VALIDATOR.peer}
    board = StatusBoard(
        validators=peers,
        keys=lambda: (KEY,),
        now_ms=lambda: NOW_MS,
        on_dropped=lambda reason: None,
        on_offence=lambda peer, reason: None,
    )
    raw = seal_status(
        signer=VALIDATOR, key=KEY, sequence=1, issued_at_ms=NOW_MS, ttl_s=90, status=NetworkStatus(executors=1)
    )
    message = TopicMessage(VALIDATOR.peer, raw, 1, (TOPIC_NETWORK,))
    peers.clear()
    assert not board.take(message)
    peers.add(VALIDATOR.peer)
    assert board.take(message)
    assert [one.peer for one in board.latest()] == [VALIDATOR.peer]
    peers.clear()
    assert board.latest() == []

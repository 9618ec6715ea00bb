"""What an executor's announcements say, and when there are none: on virtual time, over a fake daemon."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from lloom_sidecar.errors import DaemonUnavailableError, LloomError
from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.network.announcer import BURST, FULL_EVERY_S, MAX_PER_S, REMOVAL_TIMEOUT_S, Announcer, Offer
from lloom_sidecar.node.control_plane import ANNOUNCEMENT_BURST, MAX_ANNOUNCEMENTS_PER_S
from lloom_sidecar.p2p.daemon import Daemon, Subscription
from lloom_sidecar.peers.rate import RateLimiter
from lloom_sidecar.protocol.announcement import open_announcement
from lloom_sidecar.protocol.names import TOPIC_EXECUTORS
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Announcement, Kind, Load, ModelOffer
from tests.fakes.fake_nodes import FakeNode, fake_nodes

KEY = NetworkKey(b"k" * 32)
START_MS = 1_790_000_000_000
ADDR = Multiaddr.parse("/ip4/10.0.0.1/tcp/4001")


class Bench:
    """One announcer, and the neighbour that hears it."""

    def __init__(self, node: FakeNode, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.node = node
        self.daemon: Daemon | None = node.daemon
        self.heard: list[tuple[float, Announcement]] = []
        self.models: tuple[ModelOffer, ...] = (ModelOffer("m"),)
        self.load = Load()
        self.addrs: tuple[Multiaddr, ...] = (ADDR,)
        self.seen = 0
        self.published = 0
        self.sequence = 0
        self.sequence_error: LloomError | None = None
        self.announcer = Announcer(
            signer=node.signer,
            key=lambda: KEY,
            offer=lambda: Offer(self.models, self.load),
            addrs=lambda: self.addrs,
            executors_seen=lambda: self.seen,
            get_daemon=self.get_daemon,
            next_sequence=self.next_sequence,
            now_ms=lambda: START_MS + round(trio.current_time() * 1000),
            software="lloom/test",
            on_published=self.on_published,
            rng=random.Random(1),
        )

    def get_daemon(self) -> Daemon:
        if self.daemon is None:
            raise DaemonUnavailableError("away")
        return self.daemon

    async def next_sequence(self, now_ms: int) -> int:
        await trio.lowlevel.checkpoint()
        if self.sequence_error is not None:
            raise self.sequence_error
        self.sequence = max(self.sequence + 1, now_ms)
        return self.sequence

    def on_published(self) -> None:
        self.published += 1

    async def listen(self, subscription: Subscription) -> None:
        while True:
            message = await subscription.receive()
            found = open_announcement(message.data, keys=[KEY], expected_signer=self.node.peer)
            self.heard.append((trio.current_time(), found))

    def kinds(self) -> list[int]:
        return [one.kind for _, one in self.heard]


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    async with fake_nodes(2) as (near, far), far.daemon.subscribe(TOPIC_EXECUTORS) as subscription:
        async with trio.open_nursery() as nursery:
            b = Bench(near, nursery)
            nursery.start_soon(b.listen, subscription)
            yield b
            nursery.cancel_scope.cancel()


@pytest.fixture
async def b() -> AsyncIterator[Bench]:
    async with bench() as made:
        yield made


async def test_the_first_one_says_everything(autojump_clock: MockClock, b: Bench) -> None:
    await b.nursery.start(b.announcer.run)
    await trio.sleep(0.5)
    ((_, first),) = b.heard
    assert (first.kind, first.models, first.addrs, first.software) == (Kind.INITIAL, b.models, (ADDR,), "lloom/test")
    assert first.is_member
    assert 27 <= first.ttl_s <= 30
    assert b.announcer.current == first.raw


async def test_heartbeats_refer_to_it_and_carry_the_load(autojump_clock: MockClock, b: Bench) -> None:
    await b.nursery.start(b.announcer.run)
    await trio.sleep(1.5)
    b.load = Load(in_flight=3)
    await trio.sleep(30)
    full = [one for _, one in b.heard if one.is_full][-1]
    beats = [(at, one) for at, one in b.heard if one.kind == Kind.HEARTBEAT]
    assert 2 <= len(beats) <= 4
    assert all(one.full_digest == full.digest for _, one in beats)
    assert beats[-1][1].load.in_flight == 3
    assert all(9 <= later - earlier <= 10.1 for (earlier, _), (later, _) in itertools.pairwise(beats))
    sequences = [one.sequence for _, one in b.heard]
    assert sequences == sorted(set(sequences))
    assert b.published == len(b.heard)


async def test_the_interval_grows_with_the_network(autojump_clock: MockClock, b: Bench) -> None:
    b.seen = 3000
    await b.nursery.start(b.announcer.run)
    await trio.sleep(50)
    assert b.kinds().count(Kind.HEARTBEAT) == 0
    assert b.heard[0][1].ttl_s >= 3 * 54


@pytest.mark.parametrize("what", ["models", "addrs"])
async def test_a_change_is_told_at_once(autojump_clock: MockClock, b: Bench, what: str) -> None:
    await b.nursery.start(b.announcer.run)
    await trio.sleep(4)
    count = len(b.heard)
    if what == "models":
        b.models = (ModelOffer("m"), ModelOffer("n"))
    else:
        b.addrs = ()
    b.announcer.changed()
    await trio.sleep(0.1)
    (_, update) = b.heard[count]
    assert update.kind == Kind.UPDATE
    assert (update.models, update.addrs) == (b.models, b.addrs)
    assert b.announcer.current == update.raw


async def test_many_changes_are_told_together_and_the_last_one_is(autojump_clock: MockClock, b: Bench) -> None:
    await b.nursery.start(b.announcer.run)
    await trio.sleep(4)
    count, began_at = len(b.heard), trio.current_time()
    for number in range(40):
        b.models = (ModelOffer("m", slots=number + 1),)
        b.announcer.changed()
        await trio.sleep(0.05)
    await trio.sleep(1.1)
    told = b.heard[count:]
    took_s = trio.current_time() - began_at
    assert [one.models for _, one in told if one.is_full][-1] == b.models
    assert BURST - 1 <= len(told) <= BURST + MAX_PER_S * took_s
    assert told[0][0] - began_at < 0.01
    # No receiver takes them for a flood.
    rates: RateLimiter[int] = RateLimiter(rate_per_s=MAX_ANNOUNCEMENTS_PER_S, burst=ANNOUNCEMENT_BURST, max_keys=1)
    assert all(rates.take(0, at) for at, _ in b.heard)


async def test_a_full_one_every_ten_minutes(autojump_clock: MockClock, b: Bench) -> None:
    await b.nursery.start(b.announcer.run)
    await trio.sleep(2 * FULL_EVERY_S + 60)
    times = [at for at, one in b.heard if one.is_full and at > 2]
    assert len(times) == 2
    assert all(
        FULL_EVERY_S <= later - earlier <= FULL_EVERY_S + 12
        for earlier, later in zip([0.0, *times], times, strict=False)
    )


async def test_the_end_is_told(autojump_clock: MockClock, b: Bench) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(b.announcer.run)
        await trio.sleep(2.5)
        nursery.cancel_scope.cancel()
    await trio.sleep(0.1)
    last = b.heard[-1][1]
    assert (last.kind, last.models) == (Kind.REMOVAL, ())
    assert b.announcer.current == b""


async def test_a_daemon_that_hangs_does_not_hold_up_the_end(autojump_clock: MockClock, b: Bench) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(b.announcer.run)
        await trio.sleep(2.5)
        b.node.p2pd.hold.add("PUBSUB PUBLISH")
        began_at = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began_at <= REMOVAL_TIMEOUT_S + 0.01


@pytest.mark.parametrize("way", ["no models", "draining"])
async def test_what_is_offered_no_more_is_withdrawn_once_and_offered_again(
    autojump_clock: MockClock, b: Bench, way: str
) -> None:
    await b.nursery.start(b.announcer.run)
    await trio.sleep(2.5)
    models, b.models = b.models, () if way == "no models" else b.models
    b.announcer.is_draining = way == "draining"
    b.announcer.changed()
    await trio.sleep(60)
    assert b.kinds()[-1] == Kind.REMOVAL
    assert b.kinds().count(Kind.REMOVAL) == 1
    assert b.announcer.current == b""
    b.models, b.announcer.is_draining = models, False
    b.announcer.changed()
    await trio.sleep(0.5)
    assert b.heard[-1][1].kind == Kind.INITIAL


async def test_nothing_is_said_while_nothing_is_offered(autojump_clock: MockClock, b: Bench) -> None:
    b.models = ()
    async with trio.open_nursery() as nursery:
        await nursery.start(b.announcer.run)
        await trio.sleep(60)
        nursery.cancel_scope.cancel()
    assert b.heard == []
    assert b.announcer.current == b""


async def test_it_goes_on_when_the_daemon_is_back(autojump_clock: MockClock, b: Bench) -> None:
    b.daemon = None
    await b.nursery.start(b.announcer.run)
    await trio.sleep(25)
    assert b.heard == []
    assert b.announcer.current != b""  # hello may hand it out all the same
    b.daemon = b.node.daemon
    await trio.sleep(3)
    # The neighbour is new to it, which is reason enough for a full one.
    assert b.kinds()[-1] in (Kind.INITIAL, Kind.UPDATE)
    assert hashlib.sha256(b.announcer.current).digest() == b.heard[-1][1].digest


async def test_one_that_could_not_be_made_is_made_at_the_next_interval(autojump_clock: MockClock, b: Bench) -> None:
    b.sequence_error = LloomError("the ledger is busy")
    await b.nursery.start(b.announcer.run)
    await trio.sleep(0.5)
    assert b.announcer.current == b""
    b.sequence_error = None
    b.node.p2pd.refuse["PUBSUB LIST_PEERS"] = "no"  # the neighbour's appearance is not what helps
    await trio.sleep(12)
    assert b.heard[0][1].is_full
    assert b.announcer.current == b.heard[0][1].raw

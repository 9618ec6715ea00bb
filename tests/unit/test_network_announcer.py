"""When an executor announces itself, on virtual time and a daemon that only notes what is published."""

from __future__ import annotations

import random
from typing import Any, cast

import trio
from trio.testing import MockClock

from lloom_sidecar.network.announcer import Announcer, Offer
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.protocol.announcement import open_announcement
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Kind, Load, ModelOffer

KEY = NetworkKey(bytes(32))
SIGNER = Signer(bytes(32))
OTHER = Signer(b"o" * 32).peer


class Topic:
    """The two calls that an announcer makes."""

    def __init__(self) -> None:
        self.peers: list[Any] = []
        self.published: list[tuple[float, int]] = []
        """(time, kind)"""

    async def topic_peers(self, topic: str) -> list[Any]:
        await trio.lowlevel.checkpoint()
        return self.peers

    async def publish(self, topic: str, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        kind = open_announcement(data, keys=[KEY], expected_signer=SIGNER.peer).kind
        self.published.append((trio.current_time(), kind))


def announcer_of(topic: Topic, models: list[ModelOffer] | None = None, **more: Any) -> Announcer:
    async def next_sequence(now_ms: int) -> int:
        await trio.lowlevel.checkpoint()
        return now_ms + len(topic.published)

    return Announcer(
        signer=SIGNER,
        key=lambda: KEY,
        offer=lambda: Offer(tuple(models or [ModelOffer("m")]), Load()),
        addrs=lambda: (),
        executors_seen=lambda: 0,
        get_daemon=lambda: cast("Daemon", topic),
        next_sequence=next_sequence,
        now_ms=lambda: 1_700_000_000_000 + round(trio.current_time() * 1000),
        software="lloom/test",
        on_published=lambda: None,
        rng=random.Random(1),
        **more,
    )


async def test_the_first_topic_peer_gets_a_full_one_and_later_ones_do_not(autojump_clock: MockClock) -> None:
    topic = Topic()
    announcer = announcer_of(topic)
    async with trio.open_nursery() as nursery:
        await nursery.start(announcer.run)
        await trio.sleep(1.5)
        topic.peers = [OTHER]
        await trio.sleep(2)
        topic.peers = [OTHER, SIGNER.peer]
        await trio.sleep(3)
        # Alone again, and back.
        topic.peers = []
        await trio.sleep(1)
        topic.peers = [OTHER]
        await trio.sleep(1.5)
        nursery.cancel_scope.cancel()
    full = [round(at) for at, kind in topic.published if kind in (Kind.INITIAL, Kind.UPDATE)]
    assert full == [0, 2, 8]


async def test_it_introduces_itself_when_told_that_somebody_is_there(autojump_clock: MockClock) -> None:
    topic = Topic()
    announcer = announcer_of(topic)
    async with trio.open_nursery() as nursery:
        await nursery.start(announcer.run)
        await trio.sleep(0.3)
        topic.peers = [OTHER]
        announcer.introduce()
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    # Once: the look at the topic that follows knows of it.
    assert [(round(at, 1), kind) for at, kind in topic.published[:-1]] == [(0.0, Kind.INITIAL), (0.3, Kind.UPDATE)]


async def test_no_topic_peer_no_repetition(autojump_clock: MockClock) -> None:
    topic = Topic()
    announcer = announcer_of(topic)
    async with trio.open_nursery() as nursery:
        await nursery.start(announcer.run)
        await trio.sleep(25)
        nursery.cancel_scope.cancel()
    kinds = [kind for _, kind in topic.published]
    assert kinds == [Kind.INITIAL, Kind.HEARTBEAT, Kind.HEARTBEAT, Kind.REMOVAL]


async def test_the_same_topic_peer_is_told_once(autojump_clock: MockClock) -> None:
    topic = Topic()
    topic.peers = [OTHER]
    announcer = announcer_of(topic)
    async with trio.open_nursery() as nursery:
        await nursery.start(announcer.run)
        await trio.sleep(8)
        nursery.cancel_scope.cancel()
    kinds = [kind for _, kind in topic.published]
    assert kinds == [Kind.INITIAL, Kind.UPDATE, Kind.REMOVAL]


async def test_a_silent_one_makes_announcements_for_hello_alone(autojump_clock: MockClock) -> None:
    topic = Topic()
    topic.peers = [OTHER]
    models = [ModelOffer("m")]
    announcer = announcer_of(topic, models, is_silent=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(announcer.run)
        await trio.sleep(60)
        first = announcer.current
        models.append(ModelOffer("n"))
        announcer.changed()
        await trio.sleep(1)
        found = [open_announcement(raw, keys=[KEY], expected_signer=SIGNER.peer) for raw in (first, announcer.current)]
        nursery.cancel_scope.cancel()
    assert [[model.id for model in one.models] for one in found] == [["m"], ["m", "n"]]
    assert topic.published == []
    assert announcer.current == b""

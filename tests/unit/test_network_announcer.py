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


def announcer_of(topic: Topic, models: list[ModelOffer] | None = None) -> Announcer:
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
    )


async def test_a_topic_peer_that_appears_right_after_an_announcement_gets_one_too(autojump_clock: MockClock) -> None:
    topic = Topic()
    models = [ModelOffer("m")]
    announcer = announcer_of(topic, models)
    async with trio.open_nursery() as nursery:
        await nursery.start(announcer.run)
        await trio.sleep(1.9)
        models.append(ModelOffer("n"))
        announcer.changed()
        await trio.sleep(0.05)
        # Too late for that announcement, and the look at 2 s comes too early for another one.
        topic.peers = [OTHER]
        await trio.sleep(3)
        nursery.cancel_scope.cancel()
    full = [round(at, 3) for at, kind in topic.published if kind in (Kind.INITIAL, Kind.UPDATE)]
    assert full == [0.0, 1.9, 3.0]


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

"""A pool says from when to when streams to a peer are held, so that its connection is spared."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.stream_pool import IDLE_STREAM_S, StreamPool
from tests.fakes.request_stream import EXECUTOR, NOW_MS, FakeStreamDaemon, serve


async def test_from_the_first_stream_to_the_end_of_the_last(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    told: list[tuple[PeerId, bool]] = []
    daemon = FakeStreamDaemon(nursery)
    daemon.play(serve())

    async def say_hello(peer: PeerId) -> None:
        raise AssertionError("no hello was asked for")

    pool = StreamPool(
        lambda: daemon, say_hello, now_ms=lambda: NOW_MS, on_use=lambda peer, is_used: told.append((peer, is_used))
    )
    nursery.start_soon(pool.run)
    first = await pool.acquire(EXECUTOR.peer)
    second = await pool.acquire(EXECUTOR.peer)
    assert told == [(EXECUTOR.peer, True)]
    pool.release(first)
    pool.discard(second)
    await trio.sleep(IDLE_STREAM_S / 2)
    assert told == [(EXECUTOR.peer, True)]
    await trio.sleep(IDLE_STREAM_S)
    assert told == [(EXECUTOR.peer, True), (EXECUTOR.peer, False)]
    daemon.close_streams()
    nursery.cancel_scope.cancel()

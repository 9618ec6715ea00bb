"""The stream pool: what is reused, what is not, who waits, and that its count is always right."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lloom_sidecar.errors import (
    DaemonRejectedError,
    DaemonUnavailableError,
    LloomError,
    PeerBusyError,
    PeerTimeoutError,
    PeerUnreachableError,
    RefusedError,
    RemoteProtocolError,
)
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.stream_pool import ACCEPT_TIMEOUT_S, IDLE_STREAM_S, STOCK_MAX_STREAMS, Link, StreamPool
from lloom_sidecar.p2p.errors import DaemonTimeoutError
from tests.fakes.request_stream import EXECUTOR, NOW_MS, FakeStreamDaemon, Responder, Script, serve

PEER = EXECUTOR.peer
HELLO_REQUIRED = RemoteProtocolError("say hello first", code="hello_required")


class Bench:
    """A pool on a fake daemon, and the hellos that it asked for."""

    def __init__(self, nursery: trio.Nursery, *scripts: Script) -> None:
        self.nursery = nursery
        self.daemon = FakeStreamDaemon(nursery)
        self.daemon.play(*(scripts or (serve(),)))
        self.hellos: list[PeerId] = []
        self.pool = StreamPool(lambda: self.daemon, self.say_hello, now_ms=lambda: NOW_MS)

    async def say_hello(self, peer: PeerId) -> None:
        self.hellos.append(peer)
        await trio.lowlevel.checkpoint()


@asynccontextmanager
async def bench(*scripts: Script) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        b = Bench(nursery, *scripts)
        try:
            yield b
        finally:
            b.daemon.close_streams()
            nursery.cancel_scope.cancel()


async def accepting(far: Responder) -> None:
    await far.accept(max_streams=2)
    await far.until_closed()


def refusing(error: LloomError) -> Script:
    async def script(far: Responder) -> None:
        await far.read()
        await far.refuse(error)
        await far.until_closed()

    return script


async def silent(far: Responder) -> None:
    await far.until_closed()


async def closing(far: Responder) -> None:
    await far.read()


class TestReuse:
    async def test_a_released_stream_is_given_out_again(self) -> None:
        async with bench() as b:
            link = await b.pool.acquire(PEER)
            assert b.pool.counts() == (1, 0)
            b.pool.release(link)
            assert b.pool.counts() == (0, 1)
            assert await b.pool.acquire(PEER) is link
            assert b.daemon.opened == 1

    async def test_fresh_forbids_an_idle_one(self) -> None:
        async with bench() as b:
            link = await b.pool.acquire(PEER)
            b.pool.release(link)
            assert await b.pool.acquire(PEER, fresh=True) is not link
            assert b.pool.counts() == (1, 1)

    async def test_fresh_takes_an_idle_ones_place_when_there_is_no_other(self) -> None:
        async with bench(serve(max_streams=1)) as b:
            link = await b.pool.acquire(PEER)
            b.pool.release(link)
            assert await b.pool.acquire(PEER, fresh=True) is not link
            assert link.stream.closed
            assert b.pool.counts() == (1, 0)

    @pytest.mark.parametrize("way", ["goaway", "eof", "garbage", "data"])
    async def test_what_waits_in_an_idle_stream_ends_it(self, way: str) -> None:
        async with bench() as b:
            link = await b.pool.acquire(PEER)
            b.pool.release(link)
            far = b.daemon.responders[0]
            match way:
                case "goaway":
                    await far.send_raw(far.machine.go_away("bye"))
                case "eof":
                    far.stream.close()
                case "garbage":
                    await far.send_raw(b"\xff" * 20)
                case _:
                    await far.send_raw(b"\x03\x32\x01x")  # DATA without a request
            other = await b.pool.acquire(PEER)
            assert other is not link
            assert link.stream.closed
            assert b.pool.counts() == (1, 0)

    async def test_a_late_pong_does_not_end_it(self) -> None:
        async with bench() as b:
            link = await b.pool.acquire(PEER)
            b.pool.release(link)
            far = b.daemon.responders[0]
            await far.send_raw(far.machine.pong(1))
            assert await b.pool.acquire(PEER) is link

    async def test_a_stream_that_drains_is_closed_when_released(self) -> None:
        async with bench() as b:
            link = await b.pool.acquire(PEER)
            far = b.daemon.responders[0]
            link.machine.receive(far.machine.go_away("bye"))
            b.pool.release(link)
            assert link.stream.closed
            assert b.pool.counts() == (0, 0)

    async def test_an_idle_one_is_closed_after_two_minutes(self, autojump_clock: MockClock) -> None:
        async with bench() as b:
            await b.nursery.start(b.pool.run)
            link = await b.pool.acquire(PEER)
            b.pool.release(link)
            await trio.sleep(IDLE_STREAM_S - 2)
            assert not link.stream.closed
            await trio.sleep(4)
            assert link.stream.closed
            assert b.pool.counts() == (0, 0)

    async def test_drop_peer_closes_the_idle_ones_only(self) -> None:
        async with bench() as b:
            idle, busy = await b.pool.acquire(PEER), await b.pool.acquire(PEER)
            b.pool.release(idle)
            b.pool.drop_peer(PEER)
            b.pool.drop_peer(PeerId.from_ed25519(bytes(32)))
            assert idle.stream.closed
            assert not busy.stream.closed
            assert b.pool.counts() == (1, 0)

    async def test_the_end_of_run_closes_all(self) -> None:
        async with bench() as b:
            async with trio.open_nursery() as nursery:
                await nursery.start(b.pool.run)
                idle, busy = await b.pool.acquire(PEER), await b.pool.acquire(PEER)
                b.pool.release(idle)
                nursery.cancel_scope.cancel()
            assert idle.stream.closed
            assert busy.stream.closed
            b.pool.discard(busy)
            assert b.pool.counts() == (0, 0)


class TestOpening:
    async def test_hello_is_said_and_the_stream_opened_once_more(self) -> None:
        async with bench(refusing(HELLO_REQUIRED), serve()) as b:
            await b.pool.acquire(PEER)
            assert b.hellos == [PEER]
            assert b.daemon.opened == 2

    async def test_but_only_once(self) -> None:
        async with bench(refusing(HELLO_REQUIRED)) as b:
            with pytest.raises(RefusedError) as caught:
                await b.pool.acquire(PEER)
            assert caught.value.code == "hello_required"
            assert b.hellos == [PEER]
            assert b.daemon.opened == 2
            await assert_free(b)

    async def test_a_failed_hello_is_the_failure(self) -> None:
        async with bench(refusing(HELLO_REQUIRED)) as b:

            async def fail(peer: PeerId) -> None:
                raise PeerTimeoutError("no hello")

            pool = StreamPool(lambda: b.daemon, fail, now_ms=lambda: NOW_MS)
            with pytest.raises(PeerTimeoutError):
                await pool.acquire(PEER)

    async def test_another_refusal_is_raised(self) -> None:
        async with bench(refusing(PeerBusyError("full", code="draining", retry_after_s=5.0))) as b:
            with pytest.raises(RefusedError) as caught:
                await b.pool.acquire(PEER)
            assert (caught.value.code, caught.value.retry_after_s) == ("draining", 5.0)
            await assert_free(b)

    async def test_no_accept_within_the_deadline(self, autojump_clock: MockClock) -> None:
        async with bench(silent) as b:
            began_at = trio.current_time()
            with pytest.raises(PeerTimeoutError):
                await b.pool.acquire(PEER)
            assert trio.current_time() - began_at == pytest.approx(ACCEPT_TIMEOUT_S)
            await assert_free(b)

    async def test_a_daemon_that_hangs_counts_as_no_accept(self, autojump_clock: MockClock) -> None:
        async with bench() as b:
            b.daemon.hangs = True
            with pytest.raises(PeerTimeoutError):
                await b.pool.acquire(PEER)

    @pytest.mark.parametrize(
        ("refusal", "raised"),
        [
            (DaemonUnavailableError("gone"), DaemonUnavailableError),
            (DaemonRejectedError("no route"), PeerUnreachableError),
            (DaemonTimeoutError("slow"), PeerUnreachableError),
        ],
    )
    async def test_what_the_daemon_says(self, refusal: LloomError, raised: type[LloomError]) -> None:
        async with bench() as b:
            b.daemon.refusal = refusal
            with pytest.raises(raised):
                await b.pool.acquire(PEER)
            await assert_free(b)

    async def test_an_end_before_accept(self) -> None:
        async with bench(closing) as b:
            with pytest.raises(PeerUnreachableError):
                await b.pool.acquire(PEER)
            await assert_free(b)

    async def test_garbage_before_accept(self) -> None:
        async def garbage(far: Responder) -> None:
            await far.send_raw(b"\xff" * 20)
            await far.until_closed()

        async with bench(garbage) as b:
            with pytest.raises(RemoteProtocolError):
                await b.pool.acquire(PEER)
            await assert_free(b)

    async def test_goaway_right_behind_accept_is_a_refusal(self) -> None:
        async def leaving(far: Responder) -> None:
            await far.read()
            accept = far.machine.accept(now_ms=NOW_MS, challenge=bytes(16), max_streams=8)
            await far.send_raw(accept + far.machine.go_away("shutting down"))
            await far.until_closed()

        async with bench(leaving) as b:
            with pytest.raises(PeerBusyError) as caught:
                await b.pool.acquire(PEER)
            assert caught.value.code == "draining"
            await assert_free(b)

    async def test_the_responders_clock_is_learnt(self) -> None:
        async def ahead(far: Responder) -> None:
            await far.accept(now_ms=NOW_MS + 7000)
            await far.until_closed()

        async with bench(ahead) as b:
            link = await b.pool.acquire(PEER)
            assert 7000 <= link.clock_offset_ms < 8000

    @pytest.mark.parametrize("script", [silent, accepting])
    async def test_cancelled_while_opening(self, script: Script) -> None:
        async with bench(script) as b:
            with trio.CancelScope() as scope:
                scope.cancel()
                await b.pool.acquire(PEER)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(b.pool.acquire, PEER)
                    if script is silent:
                        await wait_all_tasks_blocked()
                    scope.cancel()
            await wait_all_tasks_blocked()
            assert all(far.stream.closed for far in b.daemon.responders)
            await assert_free(b)


async def assert_free(b: Bench, expected: int = 2) -> None:
    """Nothing is counted: as many streams can be opened as the peer allows, and not one more."""
    await wait_all_tasks_blocked()
    assert b.pool.counts() == (0, 0)
    assert all(stream.closed for stream in b.daemon.streams)
    b.daemon.refusal = None
    b.daemon.play(accepting)
    links = [await b.pool.acquire(PEER) for _ in range(expected)]
    waiter = trio.CancelScope()

    async def wait() -> None:
        with waiter:
            b.pool.discard(await b.pool.acquire(PEER))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert b.pool.counts()[0] == expected
        waiter.cancel()
    for link in links:
        b.pool.discard(link)


class TestCap:
    async def waiting(self, b: Bench, nursery: trio.Nursery, got: list[Link], count: int = 1) -> None:
        async def one() -> None:
            got.append(await b.pool.acquire(PEER))

        for _ in range(count):
            nursery.start_soon(one)
            await wait_all_tasks_blocked()

    @pytest.mark.parametrize("end", ["release", "discard"])
    async def test_above_the_cap_one_waits_for_a_place(self, end: str) -> None:
        async with bench(serve(max_streams=1)) as b, trio.open_nursery() as nursery:
            link = await b.pool.acquire(PEER)
            got: list[Link] = []
            await self.waiting(b, nursery, got)
            assert not got
            getattr(b.pool, end)(link)
            await wait_all_tasks_blocked()
            assert (got == [link]) is (end == "release")
            assert b.pool.counts() == (1, 0)

    async def test_a_peer_that_says_nothing_gets_the_stock_cap(self) -> None:
        async with bench(serve(max_streams=0)) as b, trio.open_nursery() as nursery:
            links = [await b.pool.acquire(PEER) for _ in range(STOCK_MAX_STREAMS)]
            got: list[Link] = []
            await self.waiting(b, nursery, got)
            assert not got
            b.pool.release(links[0])
            await wait_all_tasks_blocked()
            assert got == [links[0]]

    async def test_a_cap_that_turns_out_higher_frees_those_who_wait(self) -> None:
        go = trio.Event()

        async def slow(far: Responder) -> None:
            await go.wait()
            await far.accept(max_streams=100)
            await far.until_closed()

        async with bench(slow) as b, trio.open_nursery() as nursery:
            got: list[Link] = []
            await self.waiting(b, nursery, got, STOCK_MAX_STREAMS + 20)
            assert b.daemon.opened == STOCK_MAX_STREAMS
            go.set()
            await wait_all_tasks_blocked()
            assert len(got) == STOCK_MAX_STREAMS + 20

    async def test_a_cancelled_waiter_is_forgotten(self) -> None:
        async with bench(serve(max_streams=1)) as b, trio.open_nursery() as nursery:
            link = await b.pool.acquire(PEER)
            scope = trio.CancelScope()

            async def cancelled() -> None:
                with scope:
                    await b.pool.acquire(PEER)

            nursery.start_soon(cancelled)
            await wait_all_tasks_blocked()
            got: list[Link] = []
            await self.waiting(b, nursery, got)
            scope.cancel()
            await wait_all_tasks_blocked()
            b.pool.release(link)
            await wait_all_tasks_blocked()
            assert got == [link]

    async def test_one_that_is_woken_and_cancelled_at_once_wakes_the_next(self) -> None:
        async with bench(serve(max_streams=1)) as b, trio.open_nursery() as nursery:
            link = await b.pool.acquire(PEER)
            scope = trio.CancelScope()

            async def cancelled() -> None:
                with scope:
                    await b.pool.acquire(PEER)

            nursery.start_soon(cancelled)
            await wait_all_tasks_blocked()
            got: list[Link] = []
            await self.waiting(b, nursery, got)
            b.pool.discard(link)
            scope.cancel()
            await wait_all_tasks_blocked()
            assert len(got) == 1

    async def test_a_failed_opening_wakes_the_next(self, autojump_clock: MockClock) -> None:
        async with bench(serve(max_streams=1)) as b, trio.open_nursery() as nursery:
            b.pool.discard(await b.pool.acquire(PEER))
            b.daemon.play(silent, serve(max_streams=1))
            failures: list[LloomError] = []

            async def fails() -> None:
                try:
                    await b.pool.acquire(PEER)
                except LloomError as exc:
                    failures.append(exc)

            nursery.start_soon(fails)
            await wait_all_tasks_blocked()
            got: list[Link] = []
            nursery.start_soon(self.waiting, b, nursery, got)
            await trio.sleep(ACCEPT_TIMEOUT_S + 1)
            assert len(failures) == len(got) == 1

    async def test_a_sweep_between_the_place_and_its_taker_loses_nothing(self) -> None:
        async with bench(serve(max_streams=1)) as b, trio.open_nursery() as nursery:
            link = await b.pool.acquire(PEER)
            got: list[Link] = []
            await self.waiting(b, nursery, got)
            b.pool.discard(link)
            b.pool._sweep(trio.current_time())  # what ``run`` may do before the waiter's turn
            await wait_all_tasks_blocked()
            b.pool.release(got[0])
            assert b.pool.counts() == (0, 1)
            assert await b.pool.acquire(PEER) is got[0]


class TestModel:
    @pytest.mark.parametrize("seed", range(25))
    async def test_the_count_is_always_right(self, seed: int) -> None:
        """Random takers, ends and cancellations; afterwards exactly as many streams as are open are counted."""
        rng = random.Random(seed)
        cap = rng.choice([1, 2, 3])
        held: list[Link] = []
        scopes: list[trio.CancelScope] = []

        async def flaky(far: Responder) -> None:
            roll = rng.random()
            if roll < 0.15:
                return  # ends before ACCEPT
            await far.accept(max_streams=cap)
            if roll < 0.3:
                await far.send_raw(far.machine.go_away("x"))
            if roll > 0.9:
                return
            await far.until_closed()

        async with bench(flaky) as b, trio.open_nursery() as nursery:

            async def take(scope: trio.CancelScope, fresh: bool) -> None:
                with scope, suppress(LloomError):
                    held.append(await b.pool.acquire(PEER, fresh=fresh))

            def step() -> None:
                action = rng.choice(["take", "take", "take", "release", "discard", "cancel", "sweep", "drop"])
                if action == "take":
                    scopes.append(trio.CancelScope())
                    nursery.start_soon(take, scopes[-1], rng.random() < 0.2)
                elif action in ("release", "discard") and held:
                    getattr(b.pool, action)(held.pop(rng.randrange(len(held))))
                elif action == "cancel" and scopes:
                    scopes.pop(rng.randrange(len(scopes))).cancel()
                elif action == "sweep":
                    b.pool._sweep(trio.current_time())
                elif action == "drop":
                    b.pool.drop_peer(PEER)

            for _ in range(60):
                step()
                if rng.random() < 0.5:
                    await wait_all_tasks_blocked()
                else:
                    await trio.lowlevel.checkpoint()
            # Everybody who waits is served as places come back.
            while True:
                await wait_all_tasks_blocked()
                assert_counted(b.pool, held)
                if not held:
                    break
                b.pool.discard(held.pop())
            await wait_all_tasks_blocked()
            assert not nursery.child_tasks
            b.pool.drop_peer(PEER)
            b.pool._sweep(trio.current_time())
            assert b.pool._peers == {}


def assert_counted(pool: StreamPool, held: list[Link]) -> None:
    in_use, idle = pool.counts()
    assert in_use == len(held)
    streams = pool._peers.get(PEER)
    assert (0 if streams is None else streams.open_count) == in_use + idle

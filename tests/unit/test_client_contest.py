"""Several executors at one request: races and hedges, who wins, what becomes of the others."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from lloom_sidecar.client.route import OutrunError, Route
from lloom_sidecar.errors import (
    DaemonUnavailableError,
    PeerUnreachableError,
    RefusedError,
    RequestError,
    StreamLostError,
)
from lloom_sidecar.http.errors import ClientDisconnectedError
from lloom_sidecar.link.exchange import Exchange
from lloom_sidecar.peers.health import Outcome
from lloom_sidecar.peers.hedging import Hedge
from lloom_sidecar.peers.selection import DEFAULT_RACE, Policy
from lloom_sidecar.protocol.offers import Price
from tests.fakes.router_bench import BUSY, Bench, peer, refused

EUR = Price(1, 2, "EUR")


class TestRace:
    @pytest.mark.parametrize("is_streamed", [True, False])
    async def test_the_first_wins_and_the_others_are_cancelled(
        self, is_streamed: bool, autojump_clock: MockClock
    ) -> None:
        b = Bench()
        slow = b.add(1, [0.5, b"x", 5.0, b"y"])
        # The first bytes win a streamed answer, the verified end any other.
        early = b.add(2, [0.1, b"x", 3.0, b"y"])
        whole = b.add(3, [0.2, b"x", 0.1, b"y"])
        began_at = trio.current_time()
        route = await b.run(policy=Policy.RACE, commits=is_streamed)
        winner = early if is_streamed else whole
        assert b.answered == [winner]
        assert dict(b.reasons()) == {p: "" if p == winner else "raced" for p in (slow, early, whole)}
        assert (route.executor, route.raced, route.asked) == (winner, 3, 3)
        assert {attempt.reason for attempt in route.attempts} == {"raced"}
        assert trio.current_time() - began_at == pytest.approx(3.1 if is_streamed else 0.3)
        assert [view.in_flight for view in b.health.snapshot(trio.current_time())] == [0, 0, 0]
        assert route.first_at == pytest.approx(began_at + (0.1 if is_streamed else 0.2))

    async def test_it_is_bounded(self, autojump_clock: MockClock) -> None:
        b = Bench()
        for n in range(1, 8):
            b.add(n, [0.1, b"x"])
        await b.run(policy=Policy.RACE)
        assert len(b.asked) == DEFAULT_RACE

    async def test_one_that_fails_fast_wins_nothing(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, BUSY)
        b.add(2, [b"x", StreamLostError("cut")])
        good = b.add(3, [1.0, b"x"])
        route = await b.run(policy=Policy.RACE)
        assert b.answered == [good]
        assert sorted(attempt.reason for attempt in route.attempts) == ["peer_busy", "stream_lost"]

    async def test_when_all_fail_others_are_asked(self, autojump_clock: MockClock) -> None:
        b = Bench()
        peers = [b.add(n, BUSY) for n in range(1, 6)]
        good = b.add(6, [0.1, b"x"])
        for _ in range(3):
            b.scripts.update({p: [BUSY] for p in peers})
            await b.run(policy=Policy.RACE)
        assert set(b.answered) == {good}

    async def test_what_blames_the_request_is_raised(self, autojump_clock: MockClock) -> None:
        b = Bench()
        for n in (1, 2, 3):
            b.add(n, refused(400, retryable=False))
        with pytest.raises(RefusedError) as caught:
            await b.run(policy=Policy.RACE)
        assert caught.value.http_status == 400
        assert len(b.asked) == 3

    async def test_a_winner_that_is_lost_in_the_middle_ends_it(self, autojump_clock: MockClock) -> None:
        b = Bench()
        first = b.add(1, [0.1, b"x", 1.0, StreamLostError("cut")])
        other = b.add(2, [0.2, b"x"])
        with pytest.raises(StreamLostError):
            await b.run(policy=Policy.RACE, commits=True)
        assert dict(b.reasons()) == {first: "lost", other: "raced"}
        assert b.answered == []

    @pytest.mark.parametrize("error", [ClientDisconnectedError("gone"), DaemonUnavailableError("p2pd is away")])
    async def test_what_befalls_the_winner_on_this_side_ends_it(
        self, error: Exception, autojump_clock: MockClock
    ) -> None:
        b = Bench()
        for n in (1, 2):
            b.add(n, [0.1 * n, b"x", 100.0])

        async def use(route: Route, exchange: Exchange) -> None:
            await exchange.receive()
            route.commit(exchange)
            raise error

        with pytest.raises(type(error)):
            await b.run(use, policy=Policy.RACE)
        assert {reason for _, reason in b.reasons()} <= {"cancelled", "raced"}
        assert len(b.reasons()) == 2
        assert b.failed == []

    async def test_one_that_may_not_be_paid_does_not_stop_the_others(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, RequestError("spent", code="daily_cap", http_status=402))
        other = b.add(2, [0.1, b"x"])
        await b.run(policy=Policy.RACE)
        assert b.answered == [other]
        b = Bench()
        for n in (1, 2):
            b.add(n, RequestError("spent", code="daily_cap", http_status=402))
        with pytest.raises(RequestError):
            await b.run(policy=Policy.RACE)

    async def test_cancelled_all_streams_close(self, autojump_clock: MockClock) -> None:
        b = Bench()
        for n in (1, 2, 3):
            b.add(n, [100.0, b"x"])
        with trio.move_on_after(1):
            await b.run(policy=Policy.RACE)
        assert [reason for _, reason in b.reasons()] == ["cancelled"] * 3
        assert b.answered == []

    async def test_two_that_are_ready_at_once_give_one_answer(self, autojump_clock: MockClock) -> None:
        b = Bench()
        for n in (1, 2, 3):
            b.add(n, [0.1, b"x"])
        used: list[Exchange] = []

        async def use(route: Route, exchange: Exchange) -> None:
            while await exchange.receive() is not None:
                pass
            route.commit(exchange)  # without a checkpoint between: a loser must not get beyond this line
            used.append(exchange)

        await b.run(use, policy=Policy.RACE)
        assert len(used) == len(b.answered) == 1

    @pytest.mark.parametrize(("hedge", "expected"), [(Hedge.OFF, 1), (Hedge.FREE, 1), (Hedge.ON, 3)])
    async def test_priced_ones_race_only_when_allowed(
        self, hedge: Hedge, expected: int, autojump_clock: MockClock
    ) -> None:
        b = Bench()
        for n in (1, 2, 3):
            b.add(n, [0.1, b"x"], price=EUR)
        await b.run(policy=Policy.RACE, hedge=hedge)
        assert len(b.asked) == expected
        assert len(b.answered) == 1


class TestHedge:
    def slow_and_fast(self, **kwargs: Any) -> tuple[Bench, Any, Any]:
        b = Bench()
        slow = b.add(1, [30.0, b"late"], **kwargs)
        fast = b.add(2, [0.05, b"x"], **kwargs)
        b.measured(0.1, slow, fast)
        b.health.end(b.health.begin(fast, "m", 0.0), outcome=Outcome.CANCELLED, now=0.0)  # it is slow's turn
        return b, slow, fast

    async def test_a_second_one_is_asked_after_the_p95(self, autojump_clock: MockClock) -> None:
        b, slow, fast = self.slow_and_fast()
        began_at = trio.current_time()
        route = await b.run(hedge=Hedge.FREE)
        assert b.asked == [slow, fast]
        assert trio.current_time() - began_at == pytest.approx(0.15)
        assert b.answered == [fast]
        assert dict(b.reasons()) == {slow: "hedged", fast: ""}
        assert (route.is_hedged, route.asked, route.executor) == (True, 2, fast)
        assert [attempt.reason for attempt in route.attempts] == ["hedged"]
        estimates = {view.peer: view.estimate_s for view in b.health.snapshot(trio.current_time())}
        assert estimates[slow] == pytest.approx(0.15)
        assert {view.failures_in_a_row for view in b.health.snapshot(trio.current_time())} == {0}

    async def test_a_prompt_that_takes_both_long_is_answered(self, autojump_clock: MockClock) -> None:
        b, slow, fast = self.slow_and_fast()
        b.scripts[slow], b.scripts[fast] = [[3.0, b"x"]], [[3.0, b"x"]]
        await b.run(hedge=Hedge.FREE)
        assert dict(b.reasons()) == {slow: "lost", fast: ""}  # the first was given up within its budget

    async def test_when_both_are_silent_a_third_is_asked(self, autojump_clock: MockClock) -> None:
        b, slow, fast = self.slow_and_fast()
        third = b.add(3, [1e9], [1e9])
        b.measured(0.1, third)
        for who in (slow, fast, third):
            b.scripts[who] = [[1e9, b"never"]]
        b.scripts[b.add(4)] = [[0.05, b"x"]]
        began_at = trio.current_time()
        await b.run(hedge=Hedge.FREE, pinned=frozenset({slow, fast, third, peer(4)}))
        assert b.answered == [peer(4)]
        assert trio.current_time() - began_at < 10

    async def test_the_first_may_still_win(self, autojump_clock: MockClock) -> None:
        b, slow, fast = self.slow_and_fast()
        b.scripts[slow], b.scripts[fast] = [[0.12, b"x"]], [[9.0, b"x"]]
        await b.run(hedge=Hedge.FREE)
        assert dict(b.reasons()) == {slow: "", fast: "hedged"}

    async def test_not_when_the_first_byte_is_in_time(self, autojump_clock: MockClock) -> None:
        b, slow, _ = self.slow_and_fast()
        b.scripts[slow] = [[0.05, b"x", 20.0, b"y"]]
        route = await b.run(hedge=Hedge.FREE)
        assert (b.asked, route.is_hedged) == ([slow], False)

    async def test_one_that_fails_in_time_is_a_failover(self, autojump_clock: MockClock) -> None:
        b, slow, fast = self.slow_and_fast()
        b.scripts[slow] = [PeerUnreachableError("gone")]
        route = await b.run(hedge=Hedge.FREE)
        assert (b.asked, route.is_hedged) == ([slow, fast], False)

    async def test_when_both_fail_the_request_goes_on(self, autojump_clock: MockClock) -> None:
        b, slow, fast = self.slow_and_fast()
        third = b.add(3, [0.01, b"x"])
        b.measured(0.1, third, third)
        b.scripts[slow], b.scripts[fast] = [[0.2, StreamLostError("cut")]], [BUSY]
        for who in (fast, third):
            b.health.end(b.health.begin(who, "m", 0.0), outcome=Outcome.CANCELLED, now=0.0)
        b.scripts[third] = [BUSY, [0.01, b"x"]]
        await b.run(hedge=Hedge.FREE, excluded=frozenset())
        assert len(b.answered) == 1

    @pytest.mark.parametrize(
        ("hedge", "price", "expected"),
        [
            (Hedge.OFF, None, False),
            (Hedge.OFF, EUR, False),
            (Hedge.FREE, EUR, False),
            (Hedge.ON, EUR, True),
            (Hedge.ON, None, True),
        ],
    )
    async def test_when_it_is_allowed(
        self, hedge: Hedge, price: Price | None, expected: bool, autojump_clock: MockClock
    ) -> None:
        b, slow, _ = self.slow_and_fast(price=price)
        b.scripts[slow] = [[0.25, b"x"]]
        route = await b.run(hedge=hedge)
        assert route.is_hedged is expected
        assert len(b.answered) == 1

    async def test_not_before_enough_is_known_nor_without_another(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, [1.0, b"x"])
        b.add(2, [1.0, b"x"])
        assert not (await b.run(hedge=Hedge.FREE)).is_hedged
        b = Bench()
        b.measured(0.1, b.add(1, [1.0, b"x"]))
        assert not (await b.run(hedge=Hedge.FREE)).is_hedged

    async def test_at_most_two_per_cent(self, autojump_clock: MockClock) -> None:
        b, slow, fast = self.slow_and_fast()
        hedged = 0
        for _ in range(300):
            b.scripts[slow], b.scripts[fast] = [[0.25, b"x"]], [[0.25, b"x"]]
            hedged += (await b.run(hedge=Hedge.FREE)).is_hedged
        assert 0 < hedged <= 1 + 0.02 * 300


def test_a_route_is_committed_once() -> None:
    from lloom_sidecar.link.exchange import Sent
    from tests.fakes.router_bench import FakeExchange, peer

    async def main() -> None:
        route = Route(0.0)
        one, two = (FakeExchange(Sent(peer(n), 1, b"", b""), []) for n in (1, 2))
        route.commit(one)  # type: ignore[arg-type]
        route.commit(one)  # type: ignore[arg-type]
        with pytest.raises(OutrunError):
            route.commit(two)  # type: ignore[arg-type]
        assert route.executor == peer(1)

    trio.run(main)

"""Which executor is asked next, and when nobody is: on exchanges that play scripts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from lloom_sidecar.client.route import Route
from lloom_sidecar.client.router import LOOK_UP_S, MAX_ATTEMPTS, MAX_AWAY_PAUSE_S, PATIENCE_S
from lloom_sidecar.errors import (
    DaemonUnavailableError,
    LloomError,
    NoExecutorError,
    PeerBusyError,
    PeerTimeoutError,
    PeerUnreachableError,
    ReceiptError,
    RefusedError,
    RequestError,
    StreamLostError,
    UnknownModelError,
)
from lloom_sidecar.http.errors import ClientDisconnectedError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Exchange, Sent
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.peers.executors import LeaseState
from lloom_sidecar.peers.health import Circuit, Outcome
from lloom_sidecar.peers.selection import Policy
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.offers import Price
from tests.fakes.router_bench import BUSY, CALL, Bench, FakeExchange, peer, receipt_of, refused


class TestFailover:
    async def test_the_first_that_answers(self) -> None:
        b = Bench()
        who = b.add(1, price=Price(5, 6, "EUR"))
        route = await b.run()
        assert (b.asked, b.answered, route.attempts, route.executor) == ([who], [who], [], who)
        assert b.calls[0].max_price == Price(5, 6, "EUR")
        assert route.first_at is not None

    @pytest.mark.parametrize(
        ("failure", "code", "stage"),
        [
            (PeerUnreachableError("x"), "peer_unreachable", "first_byte"),
            (BUSY, "peer_busy", "first_byte"),
            (refused(401), "x", "first_byte"),
            (refused(404), "x", "first_byte"),
            (refused(429), "x", "first_byte"),
            (refused(500), "x", "first_byte"),
            *(
                (refused(status, code, retry_after_s=20.0), code, "first_byte")
                for status, code in (
                    (503, "busy"),
                    (503, "draining"),
                    (503, "deadline_too_short"),
                    (503, "global_rate"),
                    (429, "peer_limit"),
                    (429, "peer_rate"),
                    (429, "subnet_rate"),
                )
            ),
            ([StreamLostError("cut")], "stream_lost", "answer"),
            ([ReceiptError("bad")], "bad_receipt", "answer"),
            ([b"some", StreamLostError("cut")], "stream_lost", "answer"),
        ],
    )
    async def test_a_failure_before_the_application_got_anything_moves_on(
        self, failure: Any, code: str, stage: str
    ) -> None:
        b = Bench()
        first, second = b.add(1, failure), b.add(2, failure)
        third = b.add(3)
        b.scripts[third] = [[b"ok"]]
        route = await b.run()
        assert len(set(b.asked)) == len(b.asked)
        assert b.asked[-1] == third or len(b.asked) < 3
        assert b.answered == [b.asked[-1]]
        assert [(a.reason, a.stage) for a in route.attempts] == [(code, stage)] * (len(b.asked) - 1)
        assert {who for who, _, _ in b.failed} <= {first, second}

    @pytest.mark.parametrize(("code", "is_kept_away"), [("busy", True), ("deadline_too_short", False)])
    async def test_a_deadline_that_was_too_short_keeps_no_other_request_away(
        self, code: str, is_kept_away: bool
    ) -> None:
        b = Bench()
        who = b.add(1, refused(503, code, retry_after_s=20.0))
        with pytest.raises(RefusedError) as caught:
            await b.run()
        assert caught.value.retry_after_s == 20.0
        judged = b.health.judge(who, CALL.model, trio.current_time())
        assert (judged.verdict is not None, judged.wait_s > 0) == (is_kept_away, is_kept_away)

    async def test_everybody_is_asked_once_and_the_last_failure_raised(self) -> None:
        b = Bench()
        peers = {b.add(n, refused(503, f"busy{n}")) for n in range(1, 5)}
        with pytest.raises(RefusedError) as caught:
            await b.run()
        assert len(b.asked) == 4
        assert set(b.asked) == peers
        assert caught.value.code == b.route.attempts[-1].reason

    async def test_at_most_so_many_attempts(self) -> None:
        b = Bench()
        for n in range(1, MAX_ATTEMPTS + 5):
            b.add(n, BUSY)
        with pytest.raises(PeerBusyError):
            await b.run()
        assert len(b.asked) == len(set(b.asked)) == MAX_ATTEMPTS

    async def test_no_connection(self) -> None:
        b = Bench()
        gone, here = b.add(1), b.add(2)
        b.ensure_errors[gone] = PeerUnreachableError("no route")
        for _ in range(2):
            await b.run()
        assert set(b.answered) == {here}
        assert b.failed[0] == (gone, "peer_unreachable", "open")
        assert b.book.executors_of("m", trio.current_time())[0].peer is not None
        states = {v.peer: v.state(trio.current_time()) for v in b.book.executors_of("m", trio.current_time())}
        assert states == {gone: LeaseState.SUSPECT, here: LeaseState.FRESH}

    @pytest.mark.parametrize("status", [400, 413, 422])
    async def test_what_blames_the_request_passes_through(self, status: int) -> None:
        b = Bench()
        one, two = b.add(1, refused(status, retryable=False)), b.add(2, refused(status, retryable=False))
        with pytest.raises(RefusedError) as caught:
            await b.run()
        assert caught.value.http_status == status
        assert len(b.asked) == 1
        assert b.health.snapshot(0)[0].failures_in_a_row == 0
        assert {one, two} >= set(b.asked)

    async def test_committed_means_no_failover(self) -> None:
        b = Bench()
        for n in (1, 2):
            b.add(n, [b"some", StreamLostError("cut")])
        with pytest.raises(StreamLostError):
            await b.run(commits=True)
        assert len(b.asked) == 1
        assert b.route.attempts[0].stage == "answer"

    async def test_pinned(self) -> None:
        b = Bench()
        b.add(1)
        two = b.add(2, BUSY)
        with pytest.raises(PeerBusyError):
            await b.run(pinned=frozenset({two}))
        assert set(b.asked) == {two}

    async def test_a_daemon_that_is_down_is_nobodys_fault_and_waited_for(self, autojump_clock: MockClock) -> None:
        away = [DaemonUnavailableError("p2pd is away")] * 100
        b = Bench()
        for n in (1, 2):
            b.add(n, *away)
        began_at = trio.current_time()
        with pytest.raises(DaemonUnavailableError) as caught:
            await b.run()
        assert caught.value.http_status == 503
        assert PATIENCE_S - MAX_AWAY_PAUSE_S <= trio.current_time() - began_at <= PATIENCE_S * 1.1
        assert (b.failed, b.route.attempts) == ([], [])
        assert b.health.snapshot(0)[0].in_flight == 0
        b = Bench()
        b.add(1, *away[:3])
        route = await b.run()
        assert (len(b.answered), route.attempts) == (1, [])


class TestPrices:
    def changed(self, price: Price | None) -> RefusedError:
        details = None if price is None else {"price": price}
        return RefusedError("dearer now", code="price_changed", http_status=402, retryable=True, details=details)

    @pytest.mark.parametrize("ceiling", [None, Price(9, 9, "EUR")])
    async def test_a_price_that_changed_in_flight_is_paid_when_it_is_allowed(self, ceiling: Price | None) -> None:
        b = Bench()
        who = b.add(1, self.changed(Price(9, 9, "EUR")), [b"ok"], price=Price(5, 5, "EUR"))
        route = await b.run(max_price=ceiling)
        assert [call.max_price for call in b.calls] == [Price(5, 5, "EUR"), Price(9, 9, "EUR")]
        assert b.reasons() == [(who, "refused"), (who, "")]
        assert b.answered == [who]
        assert [attempt.reason for attempt in route.attempts] == ["price_changed"]
        view = b.health.snapshot(trio.current_time())[0]
        assert (view.failures_in_a_row, view.wait_s) == (0, 0.0)

    @pytest.mark.parametrize(
        ("now", "ceiling"),
        [(Price(9, 9, "EUR"), Price(8, 9, "EUR")), (Price(1, 1, "USD"), Price(8, 9, "EUR")), (None, None)],
    )
    async def test_else_another_one_is_asked(self, now: Price | None, ceiling: Price | None) -> None:
        b = Bench()
        dear = b.add(1, self.changed(now), self.changed(now), price=Price(5, 5, "EUR"))
        other = b.add(2, price=Price(5, 5, "EUR"))
        for _ in range(2):
            await b.run(max_price=ceiling)
        assert set(b.answered) == {other}
        assert b.asked.count(dear) == 1

    async def test_not_more_than_once(self) -> None:
        b = Bench()
        b.add(1, *[self.changed(Price(n, n, "EUR")) for n in range(6, 20)], price=Price(5, 5, "EUR"))
        with pytest.raises(RefusedError) as caught:
            await b.run()
        assert caught.value.code == "price_changed"
        assert len(b.asked) == 2


class TestContext:
    def too_long(self, code: str = "context_length_exceeded") -> RefusedError:
        body = b'{"error":{"message":"too long","code":"%s"}}' % code.encode()
        return refused(400, "backend_rejected", retryable=False, body=body)

    async def test_only_a_longer_context_is_asked_then(self) -> None:
        b = Bench()
        for n in (1, 2, 3):
            b.add(n, self.too_long(), self.too_long(), context=4096)
        large = b.add(4, context=8192)
        for _ in range(4):
            await b.run()
        assert set(b.answered) == {large}
        assert b.failed
        assert len(b.asked) <= 2 * 4
        assert set(b.asked) > {large}

    async def test_when_there_is_none_the_application_is_told(self) -> None:
        b = Bench()
        for n, context in enumerate((4096, 8192, 0)):
            b.add(n + 1, self.too_long(), context=context)
        with pytest.raises(RefusedError) as caught:
            await b.run(pinned=frozenset({peer(2), peer(3)}))
        assert (caught.value.http_status, caught.value.body is not None) == (400, True)
        assert set(b.asked) <= {peer(2), peer(3)}

    async def test_another_400_is_none(self) -> None:
        b = Bench()
        b.add(1, self.too_long("other"), context=1)
        b.add(2, self.too_long("other"), context=2)
        with pytest.raises(RefusedError):
            await b.run()
        assert len(b.asked) == 1


class TestAffinity:
    def call(self, *said: str) -> Call:
        messages = [{"role": "system", "content": "be kind"}, *({"role": "user", "content": one} for one in said)]
        return replace(CALL, body=json.dumps({"model": "m", "messages": messages}).encode())

    async def test_a_conversation_stays_with_its_executor(self) -> None:
        b = Bench()
        b.measured(0.1, *(b.add(n) for n in range(1, 9)))
        for talk in range(30):
            said = [f"question {talk}"]
            first = (await b.run(policy=Policy.ADAPTIVE, call=self.call(*said))).executor
            for turn in range(4):
                said += ["answer", f"and {turn}"]
                route = await b.run(policy=Policy.ADAPTIVE, call=self.call(*said))
                assert route.executor == first
        assert len(set(b.answered)) == 8

    async def test_it_moves_when_its_executor_is_loaded_and_then_stays_there(self) -> None:
        b = Bench()
        b.measured(0.1, *(b.add(n) for n in range(1, 5)))
        said = ["hello"]
        first = (await b.run(policy=Policy.ADAPTIVE, call=self.call(*said))).executor
        assert first is not None
        held = [b.health.begin(first, "m", trio.current_time()) for _ in range(4)]
        said += ["answer", "more"]
        second = (await b.run(policy=Policy.ADAPTIVE, call=self.call(*said))).executor
        assert second not in (None, first)
        for ticket in held:
            b.health.end(ticket, Outcome.CANCELLED, trio.current_time())
        said += ["answer", "more"]
        assert (await b.run(policy=Policy.ADAPTIVE, call=self.call(*said))).executor == second


async def test_an_open_circuit_stops_nobody_when_there_is_nobody_else(autojump_clock: MockClock) -> None:
    """The application hears what is wrong, not that something was; and the first good answer ends it."""
    b = Bench()
    who = b.add(1, *(refused(500) for _ in range(12)))
    for _ in range(11):
        with pytest.raises(RefusedError):
            await b.run()
    assert b.health.circuit(who, "m", trio.current_time()) is Circuit.OPEN
    asked = len(b.asked)
    with pytest.raises(RefusedError):
        await b.run()
    assert len(b.asked) == asked + 1
    await b.run()
    assert b.answered == [who]
    assert b.health.circuit(who, "m", trio.current_time()) is Circuit.CLOSED


class TestSettling:
    """Every REQUEST that went out is settled once, and one at most is owed."""

    async def test_the_answer_is_owed_and_failures_before_it_are_not(self) -> None:
        b = Bench()
        failures = {
            b.add(1, BUSY): "refused",
            b.add(2, refused(500)): "refused",
            b.add(3, [b"x", StreamLostError("cut")]): "lost",
            b.add(4, PeerUnreachableError("gone")): "lost",
            b.add(5, [b"x", ReceiptError("bad")]): "failed",
        }
        winner = b.add(6, [b"ok"])
        await b.run(pinned=frozenset({*failures}) | {winner})
        assert b.answered == [winner]
        assert dict(b.reasons()) == {**{p: failures[p] for p, _ in b.reasons()[:-1]}, winner: ""}
        last = b.settled[-1]
        assert (last.receipt, last.request, last.salt) == (b.sent[-1].receipt, b.sent[-1].request, b"s" * 16)
        assert last.call.max_price == Price()

    async def test_what_was_never_sent_is_not_settled(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.ensure_errors[b.add(1)] = PeerUnreachableError("no route")
        with pytest.raises(PeerUnreachableError):
            await b.run()
        assert b.settled == []

    async def test_an_application_that_leaves(self) -> None:
        b = Bench()
        who = b.add(1, [b"x", 1e9])
        with trio.move_on_after(0.05):
            await b.run(commits=True)
        assert b.reasons() == [(who, "cancelled")]
        assert b.answered == []

    async def test_one_that_leaves_behind_a_checkpoint_owes_it(self) -> None:
        b = Bench()
        who = b.add(1, [b"x", 1e9], price=Price(1, 1, "EUR"))

        async def use(route: Route, exchange: Exchange) -> None:
            await exchange.receive()
            route.commit(exchange)
            exchange.sent.checkpoint = receipt_of(exchange.sent)
            await exchange.receive()

        with trio.move_on_after(0.05):
            await b.run(use)
        assert b.answered == [who]
        assert (b.settled[0].reason, b.settled[0].receipt) == ("cancelled", None)
        assert b.settled[0].checkpoint is not None

    async def test_a_checkpoint_of_what_the_application_did_not_get_is_not_owed(self) -> None:
        b = Bench()
        first, second = b.add(1), b.add(2)
        for who in (first, second):
            b.scripts[who] = [[b"x"], [b"x"]]
        asked: list[PeerId] = []

        async def use(route: Route, exchange: Exchange) -> None:
            await exchange.receive()
            asked.append(exchange.peer)
            if len(asked) == 1:
                exchange.sent.checkpoint = receipt_of(exchange.sent)
                raise StreamLostError("cut")
            await exchange.receive()
            route.commit(exchange)

        await b.run(use)
        assert b.answered == [asked[1]]
        assert b.reasons() == [(asked[0], "lost"), (asked[1], "")]

    async def test_a_request_sent_again_on_a_fresh_stream(self) -> None:
        b = Bench()
        who = b.add(1)

        @asynccontextmanager
        async def twice(
            pool: StreamPool, signer: Signer, peer: PeerId, call: Call, on_sent: Callable[[Sent], None]
        ) -> AsyncIterator[Exchange]:
            on_sent(Sent(peer, 7, b"stale", b""))
            on_sent(fresh := Sent(peer, 1, b"fresh", b""))
            yield cast("Exchange", FakeExchange(fresh, [b"ok"]))

        b.router = b.make_router(twice)
        await b.run()
        assert b.reasons() == [(who, "stale"), (who, "")]
        assert [(one.is_owed, one.exchange) for one in b.settled] == [(False, 7), (True, 1)]


class TestTheApplicationsSide:
    """What goes wrong between this node and its application is not the executor's fault."""

    @pytest.mark.parametrize(
        "error", [ClientDisconnectedError("gone"), RequestError("too large", code="answer_too_large")]
    )
    async def test_is_raised_and_blames_nobody(self, error: LloomError) -> None:
        b = Bench()
        who, _ = b.add(1), b.add(2)

        async def use(route: Route, exchange: Exchange) -> None:
            await exchange.receive()
            raise error

        with pytest.raises(type(error)):
            await b.run(use)
        assert len(b.asked) == 1
        assert b.failed == []
        view = b.health.snapshot(trio.current_time())[0]
        assert (view.in_flight, view.failures_in_a_row) == (0, 0)
        assert b.book.executors_of("m", trio.current_time())[0].state(trio.current_time()) is LeaseState.FRESH
        assert who is not None

    async def test_cancelled_it_counts_as_nothing(self) -> None:
        b = Bench()
        who = b.add(1, [b"x", 1e9])
        with trio.move_on_after(0.05):
            await b.run()
        view = b.health.snapshot(trio.current_time())[0]
        assert (view.peer, view.in_flight, view.failures_in_a_row, view.circuit) == (who, 0, 0, Circuit.CLOSED)
        assert b.failed == b.answered == []


class TestWaiting:
    async def test_the_only_executor_is_asked_again_when_it_said_so(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, refused(503, "busy", retry_after_s=1.5), [b"ok"])
        began_at = trio.current_time()
        route = await b.run()
        assert len(b.asked) == 2
        assert 1.5 <= trio.current_time() - began_at <= 1.7
        assert len(route.attempts) == 1

    @pytest.mark.parametrize(
        "failure",
        [
            refused(503, "busy", retry_after_s=60.0),
            refused(503, "busy", retryable=False, retry_after_s=1.0),
            refused(500),
            PeerUnreachableError("banned", code="kept_away"),
        ],
    )
    async def test_otherwise_not(self, failure: LloomError, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, failure, [b"ok"])
        with pytest.raises(type(failure)):
            await b.run()
        assert len(b.asked) == 1

    async def test_not_for_ever(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, *[refused(503, "busy", retry_after_s=1.0)] * 50)
        with pytest.raises(RefusedError):
            await b.run()
        assert 4 <= len(b.asked) <= MAX_ATTEMPTS

    @pytest.mark.parametrize(
        "away",
        [
            PeerUnreachableError("restarting"),
            PeerBusyError("restarting", code="draining"),
            [b"x", StreamLostError("killed")],
            refused(502, "backend_unavailable"),
        ],
    )
    async def test_the_only_one_that_is_away_is_waited_for(self, away: Any, autojump_clock: MockClock) -> None:
        b = Bench()
        who = b.add(1, away, away, away)
        route = await b.run()
        assert b.answered == [who]
        assert len(route.attempts) == 3
        assert trio.current_time() < 5

    async def test_one_that_leaves_the_network_and_returns(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, *[refused(503, "draining", retry_after_s=5.0)] * 20, ttl_s=1.0)
        began_at = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.run)
            await trio.sleep(1.5)
            b.book.expire(trio.current_time())
            assert not b.book.executors_of("m", trio.current_time())
            await trio.sleep(2)
            back = b.add(2)
        assert b.answered == [back]
        assert trio.current_time() - began_at < 5
        assert b.looked_up == []

    async def test_one_that_is_back_at_once_is_not_kept_out(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, refused(503, "draining", retry_after_s=5.0))
        began_at = trio.current_time()
        await b.run()
        assert len(b.answered) == 1
        assert trio.current_time() - began_at < 1.5

    async def test_but_not_for_ever(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, *[PeerUnreachableError("dead")] * 100)
        began_at = trio.current_time()
        with pytest.raises(LloomError):
            await b.run()
        assert trio.current_time() - began_at <= PATIENCE_S * 1.1
        assert len(b.asked) < 25

    async def test_of_two_only_the_one_that_is_away_is_asked_again(self, autojump_clock: MockClock) -> None:
        b = Bench()
        broken = b.add(1, refused(500), refused(500))
        away = b.add(2, PeerUnreachableError("restarting"))
        await b.run(pinned=frozenset({broken, away}))
        assert b.answered == [away]
        assert b.asked.count(broken) <= 1

    async def test_of_two_that_said_so_neither_is_asked_twice(self, autojump_clock: MockClock) -> None:
        b = Bench()
        for n in (1, 2):
            b.add(n, refused(503, "busy", retry_after_s=1.0), [b"ok"])
        with pytest.raises(RefusedError):
            await b.run()
        assert len(b.asked) == 2

    async def test_one_that_refused_is_not_asked_again_while_another_is_awaited(
        self, autojump_clock: MockClock
    ) -> None:
        b = Bench()
        waits = b.add(1)
        now = trio.current_time()
        b.health.end(b.health.begin(waits, "m", now), outcome=Outcome.REFUSED, now=now, retry_after_s=2.0)
        b.add(2, BUSY)
        route = await b.run()
        assert b.answered == [waits]
        assert len(b.asked) == 2
        assert len(route.attempts) == 1


class TestBudget:
    async def test_the_first_byte_is_awaited_so_long_when_there_are_others(self, autojump_clock: MockClock) -> None:
        b = Bench()
        for n in (1, 2):
            b.add(n, [100.0, b"late"])
        b.add(3, [0.5, b"ok"])
        began_at = trio.current_time()
        route = await b.run()
        assert {a.reason for a in route.attempts} <= {"first_byte_timeout"}
        assert trio.current_time() - began_at <= 2.0 + 4.0 + 1.0
        assert b.answered == [b.asked[-1]]

    async def test_the_last_one_has_all_the_time(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, [100.0, b"late"])
        await b.run()
        assert len(b.answered) == 1
        b = Bench()
        for n in (1, 2):
            b.add(n, [100.0, b"late"])
        route = await b.run()
        assert [a.reason for a in route.attempts] == ["first_byte_timeout"]
        assert len(b.answered) == 1

    async def test_it_ends_with_the_first_byte(self, autojump_clock: MockClock) -> None:
        b = Bench()
        for n in (1, 2):
            b.add(n, [0.5, b"x", 500.0, b"y"])
        await b.run()
        assert len(b.asked) == 1

    async def test_a_timeout_is_one_in_http(self, autojump_clock: MockClock) -> None:
        b = Bench()
        one = b.add(1, [100.0], [100.0])
        b.add(2, PeerTimeoutError("slow"))
        b.scripts[one] = [PeerTimeoutError("slow")]
        with pytest.raises(PeerTimeoutError) as caught:
            await b.run()
        assert caught.value.http_status == 504


class TestNobody:
    async def test_an_unknown_model_is_searched_then_404(self) -> None:
        b = Bench()
        with pytest.raises(UnknownModelError) as caught:
            await b.run()
        assert b.looked_up == ["m"]
        assert caught.value.http_status == 404

    async def test_503_while_the_catalogue_is_not_complete(self) -> None:
        b = Bench(is_complete=False)
        with pytest.raises(NoExecutorError) as caught:
            await b.run()
        assert (caught.value.http_status, caught.value.retry_after_s) == (503, 2.0)

    async def test_503_for_a_model_that_was_here(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, ttl_s=1.0)
        await trio.sleep(2)
        b.book.expire(trio.current_time())
        began_at = trio.current_time()
        with pytest.raises(NoExecutorError) as caught:
            await b.run()
        assert (caught.value.http_status, caught.value.retry_after_s) == (503, 5.0)
        assert PATIENCE_S - MAX_AWAY_PAUSE_S <= trio.current_time() - began_at <= PATIENCE_S * 1.1
        assert b.looked_up == ["m"]

    async def test_one_that_was_here_and_comes_back(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.add(1, ttl_s=1.0)
        await trio.sleep(2)
        b.book.expire(trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.run)
            await trio.sleep(3)
            back = b.add(2)
        assert b.answered == [back]

    async def test_a_search_that_finds_somebody(self) -> None:
        b = Bench(is_complete=False)

        async def find() -> None:
            b.add(1)

        b.on_look_up = find
        await b.run()
        assert len(b.answered) == 1

    async def test_a_search_that_hangs(self, autojump_clock: MockClock) -> None:
        b = Bench()
        b.on_look_up = trio.sleep_forever
        began_at = trio.current_time()
        with pytest.raises(UnknownModelError):
            await b.run()
        assert trio.current_time() - began_at == pytest.approx(LOOK_UP_S)

    async def test_nobody_is_searched_for_when_somebody_offers_it(self) -> None:
        b = Bench()
        one = b.add(1)
        with pytest.raises(NoExecutorError):
            await b.run(pinned=frozenset({peer(9)}))
        assert b.looked_up == []
        assert one not in b.asked

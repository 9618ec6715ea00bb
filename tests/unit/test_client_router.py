"""Which executor is asked next, and when nobody is: on exchanges that play scripts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from lloom_sidecar.client.route import Route
from lloom_sidecar.client.router import LOOK_UP_S, MAX_ATTEMPTS, Router
from lloom_sidecar.client.settled import Settled
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
from lloom_sidecar.link.exchange import Call, Exchange, Receipt, Sent
from lloom_sidecar.link.stream_pool import StreamPool
from lloom_sidecar.peers.executors import LeaseState
from lloom_sidecar.peers.health import Circuit, HealthBook, HealthLimits
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.selection import Policy, Wanted
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.offers import Announcement, Kind, Load, ModelOffer, Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

SIGNER = Signer(b"c" * 32)
CALL = Call(request_id=b"r" * 16, operation=pb.OPERATION_CHAT, model="m", body=b"{}", deadline_ms=1000)


def peer(number: int) -> PeerId:
    return PeerId.from_ed25519(number.to_bytes(32, "big"))


class FakeExchange:
    """Gives pieces; a None in between is a verified end, an exception is raised."""

    def __init__(self, sent: Sent, script: list[Any]) -> None:
        self.peer = sent.peer
        self.head = None
        self.sent = sent
        self.first_at = trio.current_time()
        self._script = script

    async def receive(self) -> bytes | None:
        await trio.lowlevel.checkpoint()
        while self._script:
            line = self._script.pop(0)
            if isinstance(line, float):
                await trio.sleep(line)
            elif isinstance(line, Exception):
                raise line
            else:
                return cast("bytes", line)
        self.sent.receipt = receipt_of(self.sent)
        return None


def receipt_of(sent: Sent) -> Receipt:
    return Receipt(pb.ReceiptClaims(), sent.exchange, b"end", sent.request, sent.salt, b"ack")


@dataclass
class Bench:
    """A router over a real peer book and a real health book."""

    ensure_errors: dict[PeerId, LloomError] = field(default_factory=dict)
    scripts: dict[PeerId, list[Any]] = field(default_factory=dict)
    """Per peer: what its exchanges do, one entry each: an exception (refused), or a list for FakeExchange, whose first
    float is the time to the first byte."""
    is_complete: bool = True
    budget_s: float = 2.0
    asked: list[PeerId] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    looked_up: list[str] = field(default_factory=list)
    failed: list[tuple[PeerId, str, str]] = field(default_factory=list)
    settled: list[Settled] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    on_look_up: Callable[[], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        self.book = PeerBook(me=SIGNER.peer, is_open=True, allow_list=frozenset())
        limits = HealthLimits(budget_initial_s=self.budget_s)
        self.health = HealthBook(limits)
        self.router = self.make_router(self._exchange)

    def make_router(self, exchange_with: Any) -> Router:
        return Router(
            pool=cast("StreamPool", None),
            signer=SIGNER,
            book=self.book,
            health=self.health,
            look_up=self._look_up,
            ensure_connected=self._ensure,
            catalogue_is_complete=lambda: self.is_complete,
            observer=self,
            rng=random.Random(1),
            exchange_with=exchange_with,
        )

    def add(self, number: int, *exchanges: Any, price: Price | None = None, ttl_s: float = 900.0) -> PeerId:
        digest = hashlib.sha256(number.to_bytes(4, "big")).digest()
        offer = ModelOffer("m", price=price or Price())
        who = peer(number)
        self.book.apply(
            Announcement(who, 1, 0, ttl_s, Kind.INITIAL, b"", True, (), (offer,), Load(), "", b"", digest, digest),
            now=trio.current_time(),
            direct=True,
            source=None,
        )
        self.scripts[who] = list(exchanges)
        return who

    def attempt_failed(self, peer: PeerId, model: str, error: LloomError, stage: str) -> None:
        self.failed.append((peer, error.code, stage))

    def exchange_settled(self, settled: Settled) -> None:
        self.settled.append(settled)

    @property
    def answered(self) -> list[PeerId]:
        """Whose answers are owed. Whatever was sent must be settled once."""
        assert sorted(one.request for one in self.settled) == sorted(one.request for one in self.sent)
        return [one.peer for one in self.settled if one.is_owed]

    def reasons(self) -> list[tuple[PeerId, str]]:
        """(peer, reason) of what was settled."""
        return [(one.peer, one.reason) for one in self.settled]

    async def _look_up(self, model: str) -> None:
        self.looked_up.append(model)
        if self.on_look_up is not None:
            await self.on_look_up()

    async def _ensure(self, peer: PeerId) -> None:
        await trio.lowlevel.checkpoint()
        if peer in self.ensure_errors:
            self.asked.append(peer)
            raise self.ensure_errors[peer]

    @asynccontextmanager
    async def _exchange(
        self, pool: StreamPool, signer: Signer, peer: PeerId, call: Call, on_sent: Callable[[Sent], None]
    ) -> AsyncIterator[Exchange]:
        self.asked.append(peer)
        self.calls.append(call)
        sent = Sent(peer, 1, b"request %d" % len(self.sent), b"s" * 16)
        self.sent.append(sent)
        on_sent(sent)
        script = self.scripts[peer]
        step = script.pop(0) if script else [b"hi"]
        if isinstance(step, Exception):
            raise step
        step = list(step)
        if step and isinstance(step[0], float):
            await trio.sleep(float(step.pop(0)))
        yield cast("Exchange", FakeExchange(sent, step))

    async def run(self, use: Any = None, *, commits: bool = False, **wanted: Any) -> Route:
        route = Route(trio.current_time())

        async def read(route: Route, exchange: Exchange) -> None:
            while await exchange.receive() is not None:
                if commits:
                    route.commit(exchange)
            route.commit(exchange)

        self.route = route
        await self.router.run(CALL, Wanted("m", **wanted), Policy.ROUND_ROBIN, use or read, route)
        return route


BUSY = PeerBusyError("full")


def refused(status: int, code: str = "x", **kwargs: Any) -> RefusedError:
    kwargs.setdefault("retryable", True)
    return RefusedError("no", code=code, http_status=status, **kwargs)


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

    async def test_a_daemon_that_is_down_is_nobodys_fault(self) -> None:
        b = Bench()
        b.add(1, DaemonUnavailableError("p2pd is away"))
        b.add(2, DaemonUnavailableError("p2pd is away"))
        with pytest.raises(DaemonUnavailableError) as caught:
            await b.run()
        assert caught.value.http_status == 503
        assert len(b.asked) == 1
        assert b.failed == []
        assert b.health.snapshot(0)[0].in_flight == 0


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

    async def test_what_was_never_sent_is_not_settled(self) -> None:
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
            PeerUnreachableError("gone"),
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
        b.health.end(b.health.begin(waits, "m", now), outcome=refused_outcome(), now=now, retry_after_s=2.0)
        b.add(2, BUSY)
        route = await b.run()
        assert b.answered == [waits]
        assert len(b.asked) == 2
        assert len(route.attempts) == 1


def refused_outcome() -> Any:
    from lloom_sidecar.peers.health import Outcome

    return Outcome.REFUSED


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
        with pytest.raises(NoExecutorError) as caught:
            await b.run()
        assert (caught.value.http_status, caught.value.retry_after_s) == (503, 5.0)

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

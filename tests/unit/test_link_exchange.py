"""One exchange over one stream: retried when that is safe, ended only by a receipt that holds, closed when left."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lloom_sidecar.errors import (
    LloomError,
    PeerBusyError,
    PeerTimeoutError,
    PeerUnreachableError,
    ReceiptError,
    RefusedError,
    RemoteProtocolError,
    RequestError,
    StreamLostError,
)
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Exchange, Sent, open_exchange
from lloom_sidecar.link.stream_pool import WRITE_STALL_S, StreamPool
from lloom_sidecar.protocol.claims import check_ack, salted_digest
from lloom_sidecar.protocol.compression import PIECE_BYTES, Encoder, compress, decompress
from lloom_sidecar.protocol.envelope import Signer, open_envelope
from lloom_sidecar.protocol.exchange import BodyReceived, RequestReceived
from lloom_sidecar.protocol.names import KIND_REQUEST
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.fakes.request_stream import CLIENT, EXECUTOR, NOW_MS, Asked, FakeStreamDaemon, Responder, Script, serve

PEER = EXECUTOR.peer
STRANGER = Signer(b"s" * 32)
CALL = Call(
    request_id=b"r" * 16,
    operation=pb.OPERATION_CHAT,
    model="m",
    body=b'{"model":"m"}',
    deadline_ms=60_000,
    idempotency_key=b"key",
    traceparent="00-abc",
)
PIECES = (b"data: one\n\n", b"data: two\n\n")


class Bench:
    """A pool on a fake daemon, and the clock that requests are signed with."""

    def __init__(self, nursery: trio.Nursery, *scripts: Script, takes_compressed: bool = False) -> None:
        self.nursery = nursery
        self.daemon = FakeStreamDaemon(nursery)
        self.daemon.play(*scripts)
        self.hellos = 0
        self.pool = StreamPool(
            lambda: self.daemon, self.say_hello, now_ms=lambda: NOW_MS, takes_compressed=lambda peer: takes_compressed
        )

    async def say_hello(self, peer: PeerId) -> None:
        self.hellos += 1

    def open(self, call: Call = CALL) -> Any:
        return open_exchange(self.pool, CLIENT, PEER, call)

    async def ask(self, call: Call = CALL) -> bytes:
        """The whole answer."""
        async with self.open(call) as exchange:
            return await read_all(exchange)

    def is_clean(self) -> bool:
        """No stream is in use, and those that are not idle are closed."""
        in_use, idle = self.pool.counts()
        return in_use == 0 and sum(not stream.closed for stream in self.daemon.streams) == idle


@asynccontextmanager
async def bench(*scripts: Script, takes_compressed: bool = False) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        b = Bench(nursery, *scripts, takes_compressed=takes_compressed)
        try:
            yield b
        finally:
            b.daemon.close_streams()
            nursery.cancel_scope.cancel()


async def read_all(exchange: Exchange) -> bytes:
    data = b""
    while (piece := await exchange.receive()) is not None:
        assert exchange.receipt is None
        data += piece
    assert exchange.receipt is not None
    return data


def then(*acts: Callable[[Responder, Asked], Awaitable[object]]) -> Script:
    """Accepts, and does one act a request; then reads to the end."""

    async def script(far: Responder) -> None:
        await far.accept()
        for act in acts:
            asked = await far.request()
            if asked is None:
                return
            await act(far, asked)
            if far.stream.closed:
                return
        await far.until_closed()

    return script


async def answer(far: Responder, asked: Asked) -> None:
    await far.answer(asked, *PIECES)


async def close(far: Responder, asked: Asked) -> None:
    far.stream.close()


async def nothing(far: Responder, asked: Asked) -> None:
    pass


def refuse(code: str, **kwargs: Any) -> Callable[[Responder, Asked], Awaitable[None]]:
    async def act(far: Responder, asked: Asked) -> None:
        await far.refuse(RemoteProtocolError("no", code=code, **kwargs))

    return act


class TestAnswer:
    async def test_bytes_head_receipt_and_ack(self) -> None:
        async with bench(serve(*PIECES)) as b:
            async with b.open() as exchange:
                assert exchange.peer == PEER
                assert exchange.head is not None
                assert exchange.head.backend_us == 1500
                assert await read_all(exchange) == b"".join(PIECES)
                receipt = exchange.receipt
                assert await exchange.receive() is None
            await wait_all_tasks_blocked()
            far = b.daemon.responders[0]
            assert receipt is not None
            assert receipt.exchange == 1
            assert receipt.claims.usage.completion_tokens == 5
            check_ack(far.acks[1], client=CLIENT.peer, receipt=receipt.envelope)
            assert far.acks[1] == receipt.ack
            assert b.pool.counts() == (0, 1)

    async def test_the_request_says_what_was_called(self) -> None:
        seen: list[Asked] = []

        async def note(far: Responder, asked: Asked) -> None:
            seen.append(asked)
            await far.answer(asked, *PIECES)

        async with bench(then(note, note)) as b:
            call = replace(CALL, max_price=Price(1, 2, "EUR"), max_cost=7, priority=3)
            await b.ask(call)
            await b.ask()
        claims = seen[0].claims
        assert seen[0].body == CALL.body
        assert claims.body_digest == salted_digest(seen[0].salt, CALL.body)
        assert (claims.executor, claims.challenge, claims.exchange) == (PEER.raw, b"x" * 16, 1)
        assert (claims.max_price.prompt_per_million, claims.max_price.currency) == (1, "EUR")
        assert (claims.max_cost, claims.max_cost_set, claims.priority) == (7, True, 3)
        assert (claims.idempotency_key, claims.traceparent) == (b"key", "00-abc")
        assert abs(claims.issued_at_ms - NOW_MS) < 1000
        assert not seen[1].claims.max_cost_set
        assert seen[1].claims.exchange == 2
        assert seen[1].salt != seen[0].salt

    async def test_one_answer_in_one_piece_and_byte_by_byte(self) -> None:
        for step in (1, 10**6):

            async def cut(far: Responder, asked: Asked, step: int = step) -> None:
                m = far.machine
                whole = m.head("text/event-stream") + m.data(PIECES[0]) + m.data(PIECES[1])
                whole += m.end(far.receipt(asked, b"".join(PIECES)))
                for at in range(0, len(whole), step):
                    await far.send_raw(whole[at : at + step])

            async with bench(then(cut)) as b:
                assert await b.ask() == b"".join(PIECES)

    async def test_an_answer_without_head_and_without_data(self) -> None:
        async def bare(far: Responder, asked: Asked) -> None:
            await far.send_raw(far.machine.end(far.receipt(asked, b"")))

        async with bench(then(bare)) as b, b.open() as exchange:
            assert exchange.head is None
            assert await exchange.receive() is None

    async def test_goaway_in_the_middle_ends_the_stream_behind_the_answer(self) -> None:
        async def leaving(far: Responder, asked: Asked) -> None:
            await far.send_raw(far.machine.head("x") + far.machine.go_away("bye"))
            await far.send_raw(far.machine.data(b"x") + far.machine.end(far.receipt(asked, b"x")))

        async with bench(then(leaving)) as b:
            assert await b.ask() == b"x"
            assert b.pool.counts() == (0, 0)
            await wait_all_tasks_blocked()
            assert b.daemon.responders[0].acks

    async def test_a_ping_of_the_responder_is_answered(self) -> None:
        async def pinging(far: Responder, asked: Asked) -> None:
            await far.send_raw(far.machine.ping(77))
            pong = await far.stream.receive_some()
            assert pong == far.machine.pong(77)
            await far.answer(asked, b"x")

        async with bench(then(pinging)) as b:
            assert await b.ask() == b"x"


class TestOnceMore:
    @pytest.mark.parametrize("closes", ["at the request", "while idle"])
    async def test_a_reused_stream_that_ends_before_any_frame_is_replaced(self, closes: str) -> None:
        seen: list[Asked] = []

        async def note(far: Responder, asked: Asked) -> None:
            seen.append(asked)
            await far.answer(asked, *PIECES)

        async def note_and_close(far: Responder, asked: Asked) -> None:
            seen.append(asked)
            far.stream.close()

        async with bench(then(note, note_and_close), then(note)) as b:
            await b.ask()
            if closes == "while idle":
                b.daemon.responders[0].stream.close()
            assert await b.ask() == b"".join(PIECES)
            assert b.daemon.opened == 2
            assert b.is_clean()
        first, last = seen[-2:]
        assert first.claims.idempotency_key == last.claims.idempotency_key == b"key"
        assert first.claims.request_id == last.claims.request_id
        assert first.envelope != last.envelope
        assert last.claims.exchange == 1

    async def test_but_only_once(self) -> None:
        async with bench(then(answer, close), then(close)) as b:
            await b.ask()
            with pytest.raises(PeerUnreachableError):
                await b.ask()
            assert b.daemon.opened == 2
            assert b.is_clean()

    async def test_a_fresh_stream_that_ends_is_a_failure(self) -> None:
        async with bench(then(close), serve()) as b:
            with pytest.raises(PeerUnreachableError):
                await b.ask()
            assert b.daemon.opened == 1
            assert b.is_clean()

    @pytest.mark.parametrize("code", ["expired", "hello_required", "replayed"])
    async def test_a_stale_stream_is_replaced_and_not_kept(self, code: str) -> None:
        async with bench(then(answer, refuse(code), answer), then(answer, answer)) as b:
            await b.ask()
            assert await b.ask() == b"".join(PIECES)
            assert b.daemon.opened == 2
            assert b.daemon.streams[0].closed
            assert b.is_clean()

    @pytest.mark.parametrize("code", ["busy", "draining", "price_changed"])
    async def test_any_other_refusal_of_a_reused_stream_is_raised(self, code: str) -> None:
        async with bench(then(answer, refuse(code), answer)) as b:
            await b.ask()
            with pytest.raises(RefusedError) as caught:
                await b.ask()
            assert caught.value.code == code
            assert b.pool.counts() == (0, 1)
            assert await b.ask() == b"".join(PIECES)

    async def test_expired_on_a_fresh_stream_is_raised(self) -> None:
        async with bench(then(refuse("expired"))) as b:
            with pytest.raises(RefusedError):
                await b.ask()
            assert b.daemon.opened == 1
            assert b.is_clean()

    async def test_an_answer_that_began_is_never_asked_for_again(self) -> None:
        async def begin(far: Responder, asked: Asked) -> None:
            await far.send_raw(far.machine.head("x"))
            far.stream.close()

        async with bench(then(answer, begin), serve()) as b:
            await b.ask()
            with pytest.raises(StreamLostError):
                await b.ask()
            assert b.daemon.opened == 1


class TestSent:
    async def test_every_request_that_goes_out_is_told(self) -> None:
        sent: list[Sent] = []

        async def ask(b: Bench) -> None:
            async with open_exchange(b.pool, CLIENT, PEER, CALL, sent.append) as exchange:
                await read_all(exchange)
                assert exchange.sent is sent[-1]

        async with bench(then(answer, refuse("expired"), answer), then(answer, close)) as b:
            await ask(b)
            await ask(b)
            assert [(one.peer, one.exchange, one.receipt is not None) for one in sent] == [
                (PEER, 1, True),
                (PEER, 2, False),  # refused on a stale stream, sent again on a fresh one
                (PEER, 1, True),
            ]
            assert len({one.request for one in sent}) == len({one.salt for one in sent}) == 3
            assert sent[0].receipt is not None
            assert (sent[0].receipt.request, sent[0].receipt.salt) == (sent[0].request, sent[0].salt)

    async def test_also_when_no_frame_ever_comes(self) -> None:
        sent: list[Sent] = []
        async with bench(then(close)) as b:
            with pytest.raises(PeerUnreachableError):
                async with open_exchange(b.pool, CLIENT, PEER, CALL, sent.append):
                    pass
        assert [one.receipt for one in sent] == [None]


class TestFailures:
    async def test_the_end_after_data_is_a_loss(self) -> None:
        async def cut(far: Responder, asked: Asked) -> None:
            await far.send_raw(far.machine.data(b"half"))
            far.stream.close()

        async with bench(then(cut)) as b:
            got = b""
            with pytest.raises(StreamLostError):
                async with b.open() as exchange:
                    got += await exchange.receive() or b""
                    await exchange.receive()
            assert got == b"half"
            assert b.is_clean()

    async def test_error_in_the_middle(self) -> None:
        async def fail(far: Responder, asked: Asked) -> None:
            await far.send_raw(far.machine.data(b"half"))
            await wait_all_tasks_blocked()
            await far.refuse(PeerBusyError("gone", code="backend_unavailable", http_status=502))

        async with bench(then(fail)) as b:
            with pytest.raises(RefusedError) as caught:
                await b.ask()
            assert caught.value.code == "backend_unavailable"
            assert b.is_clean()

    async def test_garbage_names_the_peer(self) -> None:
        async def garbage(far: Responder, asked: Asked) -> None:
            await far.send_raw(b"\xff" * 30)

        async with bench(then(garbage)) as b:
            with pytest.raises(RemoteProtocolError, match=PEER.short()):
                await b.ask()
            assert b.is_clean()

    @pytest.mark.parametrize(
        "changes",
        [
            {"client": STRANGER.peer.raw},
            {"executor": STRANGER.peer.raw},
            {"request_digest": b"x" * 32},
            {"answer_digest": hashlib.sha256(b"").digest()},
            {"answer_bytes": 1},
            {"model": "other"},
            {"outcome": pb.OUTCOME_PARTIAL},
            {"outcome": pb.OUTCOME_UNSPECIFIED},
            {"price": pb.Price(prompt_per_million=1, currency="EUR"), "cost": 1},
            {"cost": 1},
        ],
        ids=lambda changes: ",".join(changes),
    )
    async def test_a_receipt_that_is_wrong_in_one_field(self, changes: dict[str, Any]) -> None:
        async def lie(far: Responder, asked: Asked) -> None:
            await far.answer(asked, *PIECES, **changes)

        async with bench(then(lie)) as b:
            with pytest.raises(ReceiptError):
                await b.ask()
            await wait_all_tasks_blocked()
            assert not b.daemon.responders[0].acks
            assert b.is_clean()
            assert b.pool.counts() == (0, 0)

    @pytest.mark.parametrize("signer", [STRANGER, None])
    async def test_a_receipt_of_somebody_else_or_of_nobody(self, signer: Signer | None) -> None:
        async def forge(far: Responder, asked: Asked) -> None:
            if signer is None:
                await far.send_raw(far.machine.end(b"no envelope"))
            else:
                far.signer = signer
                await far.answer(asked, *PIECES, executor=PEER.raw)

        async with bench(then(forge)) as b:
            with pytest.raises(ReceiptError):
                await b.ask()
            assert b.is_clean()

    async def test_data_that_was_changed_on_the_way_does_not_fit_the_receipt(self) -> None:
        async def change(far: Responder, asked: Asked) -> None:
            receipt = far.receipt(asked, b"yes")
            await far.send_raw(far.machine.data(b"no!") + far.machine.end(receipt))

        async with bench(then(change)) as b:
            with pytest.raises(ReceiptError):
                await b.ask()


class TestLeaving:
    async def test_leaving_before_the_receipt_closes_at_once(self) -> None:
        async def begin(far: Responder, asked: Asked) -> None:
            await far.send_raw(far.machine.data(b"half"))

        async with bench(then(begin)) as b:
            async with b.open() as exchange:
                assert await exchange.receive() == b"half"
            assert b.daemon.streams[0].closed
            assert b.is_clean()

    async def test_an_exception_of_the_user_closes_too(self) -> None:
        async with bench(serve()) as b:
            with pytest.raises(KeyError):
                async with b.open() as exchange:
                    await read_all(exchange)
                    raise KeyError
            assert b.daemon.streams[0].closed
            assert b.is_clean()

    @pytest.mark.parametrize("stage", ["place", "open", "accept", "send", "first", "data", "user"])
    async def test_cancelled_anywhere_the_stream_closes_and_nothing_is_counted(self, stage: str) -> None:
        async def no_accept(far: Responder) -> None:
            await far.until_closed()

        async def no_read(far: Responder) -> None:
            await far.accept()
            await trio.sleep_forever()

        async def begin(far: Responder, asked: Asked) -> None:
            await far.send_raw(far.machine.data(b"half"))

        scripts: dict[str, Script] = {
            "place": serve(max_streams=1),
            "accept": no_accept,
            "send": no_read,
            "first": then(nothing),
            "data": then(begin),
        }
        async with bench(scripts.get(stage, serve())) as b:
            held = await b.pool.acquire(PEER) if stage == "place" else None
            b.daemon.hangs = stage == "open"
            scope = trio.CancelScope()

            async def ask() -> None:
                with scope:
                    async with b.open(replace(CALL, body=bytes(2**21)) if stage == "send" else CALL) as exchange:
                        if stage == "user":
                            await trio.sleep_forever()
                        await read_all(exchange)

            b.nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            scope.cancel()
            await wait_all_tasks_blocked()
            assert scope.cancelled_caught
            if held is not None:
                b.pool.release(held)
            assert b.is_clean()
            if stage == "send":
                b.nursery.cancel_scope.cancel()
                return
            assert all(far.stream.closed for far in b.daemon.responders) or held is not None
            b.daemon.hangs = False
            b.daemon.play(serve(*PIECES))
            with trio.fail_after(5):
                await b.ask()

    async def test_an_ack_that_finds_no_room_costs_the_stream_not_the_answer(self) -> None:
        async with bench(serve(*PIECES)) as b:
            async with b.open() as exchange:
                await read_all(exchange)
                exchange.link.stream.close()
            assert exchange.receipt is not None
            assert b.is_clean()


class TestKeepAlive:
    async def run_pool(self, b: Bench) -> None:
        await b.nursery.start(b.pool.run)

    async def test_silence_is_pinged_and_a_pong_keeps_the_stream(self, autojump_clock: MockClock) -> None:
        async def slow(far: Responder, asked: Asked) -> None:
            with trio.move_on_after(120):
                await far.read()
            await far.answer(asked, *PIECES)

        async with bench(then(slow)) as b:
            await self.run_pool(b)
            assert await b.ask() == b"".join(PIECES)
            far = b.daemon.responders[0]
            assert 20 <= len(far.pings) <= 40

    async def test_no_ping_within_three_seconds_nor_while_nobody_reads(self, autojump_clock: MockClock) -> None:
        async def slow(far: Responder, asked: Asked) -> None:
            with trio.move_on_after(2.9):
                await far.read()
            await far.answer(asked, *PIECES)

        async with bench(then(slow)) as b:
            await self.run_pool(b)
            async with b.open() as exchange:
                await trio.sleep(60)  # an application that does not read
                await read_all(exchange)
            assert b.daemon.responders[0].pings == []

    async def test_a_peer_that_answers_no_ping_is_dead(self, autojump_clock: MockClock) -> None:
        async def mute(far: Responder, asked: Asked) -> None:
            far.answers_pings = False

        async with bench(then(mute)) as b:
            await self.run_pool(b)
            began_at = trio.current_time()
            with pytest.raises(PeerTimeoutError, match="PING"):
                await b.ask()
            assert 10 <= trio.current_time() - began_at <= 13
            assert b.is_clean()

    async def test_silence_after_data_counts_from_the_data(self, autojump_clock: MockClock) -> None:
        async def dies(far: Responder, asked: Asked) -> None:
            far.answers_pings = False
            for _ in range(5):
                await far.send_raw(far.machine.data(b"x"))
                await trio.sleep(8)

        async with bench(then(dies)) as b:
            await self.run_pool(b)
            began_at = trio.current_time()
            with pytest.raises(PeerTimeoutError):
                await b.ask()
            assert 42 <= trio.current_time() - began_at <= 46

    async def test_a_write_that_stalls_ends_the_exchange(self, autojump_clock: MockClock) -> None:
        async def deaf(far: Responder) -> None:
            await far.accept()
            await trio.sleep_forever()

        async with bench(deaf) as b:
            await self.run_pool(b)
            began_at = trio.current_time()
            with pytest.raises(PeerTimeoutError, match="took no bytes"):
                await b.ask(replace(CALL, body=bytes(2**22)))
            assert WRITE_STALL_S <= trio.current_time() - began_at <= WRITE_STALL_S + 3
            assert b.is_clean()


class TestBodies:
    async def test_two_megabytes(self) -> None:
        body = b"b" * 2**21
        seen: list[Asked] = []

        async def note(far: Responder, asked: Asked) -> None:
            seen.append(asked)
            await far.answer(asked, body)

        async with bench(then(note)) as b:
            assert await b.ask(replace(CALL, body=body)) == body
        assert seen[0].body == body

    async def test_an_early_refusal_leaves_the_stream_usable(self) -> None:
        async def early(far: Responder) -> None:
            await far.accept()
            assert isinstance(await far.read(), RequestReceived)
            await far.refuse(RequestError("no", code="invalid_request"))
            is_last = False
            while not is_last:
                event = await far.read()
                assert isinstance(event, BodyReceived)
                assert event.data == b""
                is_last = event.is_last
            asked = await far.request()
            assert asked is not None
            await far.answer(asked, *PIECES)
            await far.until_closed()

        async with bench(early) as b:
            with pytest.raises(RefusedError):
                await b.ask(replace(CALL, body=bytes(2**21)))
            assert b.pool.counts() == (0, 1)
            assert await b.ask() == b"".join(PIECES)
            assert b.daemon.opened == 1

    async def test_a_body_over_the_responders_limit_is_not_sent(self) -> None:
        async def small(far: Responder) -> None:
            far.machine = type(far.machine)(max_body_bytes=100)
            await far.accept()
            asked = await far.request()
            assert asked is not None
            await far.answer(asked, *PIECES)
            await far.until_closed()

        async with bench(small) as b:
            with pytest.raises(RefusedError) as caught:
                await b.ask(replace(CALL, body=bytes(101)))
            assert caught.value.http_status == 413
            assert await b.ask() == b"".join(PIECES)
            assert b.daemon.opened == 1

    async def test_a_peer_that_closes_while_the_body_is_sent(self) -> None:
        async def leave(far: Responder) -> None:
            await far.accept()
            await far.read()

        async with bench(leave) as b:
            with pytest.raises(PeerUnreachableError):
                await b.ask(replace(CALL, body=bytes(2**22)))
            assert b.is_clean()


async def test_many_at_once_share_the_streams() -> None:
    async with bench(serve(*PIECES, max_streams=3)) as b:
        answers: list[bytes] = []

        async def ask() -> None:
            answers.append(await b.ask())

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for _ in range(60):
                    nursery.start_soon(ask)
        assert answers == [b"".join(PIECES)] * 60
        assert b.is_clean()


async def test_errors_are_lloom_errors_whatever_the_responder_does(autojump_clock: MockClock) -> None:
    """Every act of a stranger ends in one family of errors, and the pool is as before."""
    acts: list[Callable[[Responder, Asked], Awaitable[object]]] = [
        close,
        refuse("busy"),
        lambda far, asked: far.send_raw(far.machine.end(b"")),
        lambda far, asked: far.send_raw(b"\x00"),
        lambda far, asked: far.send_raw(b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"),
        lambda far, asked: far.send_raw(far.machine.head("x") + far.machine.data(b"x") + b"\x05"),
        lambda far, asked: far.send_raw(b"\x04\x32\x01x"),
    ]
    for act in acts:
        async with bench(then(act)) as b:
            await b.nursery.start(b.pool.run)
            with pytest.raises(LloomError):
                await b.ask()
            assert b.is_clean()


def packed_answer(*pieces: bytes, encoding: int = pb.ENCODING_ZSTD, content: bytes = b"") -> Script:
    """One answer whose DATA are ``pieces``, with a receipt for ``content``."""

    async def act(far: Responder, asked: Asked) -> None:
        m = far.machine
        head = m.head("text/event-stream", encoding=encoding)
        await far.send_raw(head + b"".join(m.data(piece) for piece in pieces))
        await far.send_raw(m.end(far.receipt(asked, content)))

    return then(act)


class TestCompression:
    @pytest.mark.parametrize(
        ("body", "takes", "is_packed"),
        [
            (b"x" * 1023, True, False),  # too short
            (b"x" * 1024, True, True),
            (b"x" * 1024, False, False),  # not asked for
            (os.urandom(5000), True, False),  # does not shrink
            (b"words " * 100_000, True, True),  # in a thread
        ],
    )
    async def test_a_body_goes_compressed_where_that_is_agreed_and_pays(
        self, body: bytes, takes: bool, is_packed: bool
    ) -> None:
        seen: list[tuple[RequestReceived, bytes]] = []

        async def script(far: Responder) -> None:
            await far.accept()
            request = await far.read()
            assert isinstance(request, RequestReceived)
            sent = b""
            while len(sent) < request.body_length:
                event = await far.read()
                assert isinstance(event, BodyReceived)
                sent += event.data
            seen.append((request, sent))
            opened = open_envelope(request.envelope, KIND_REQUEST, expected_signer=CLIENT.peer)
            claims = pb.RequestClaims.FromString(opened.payload)
            await answer(far, Asked(1, request.envelope, request.salt, sent, claims))
            await far.until_closed()

        async with bench(script, takes_compressed=takes) as b:
            assert await b.ask(replace(CALL, body=body)) == b"".join(PIECES)
            request, sent = seen[0]
            if is_packed:
                assert (request.encoding, request.body_size) == (pb.ENCODING_ZSTD, len(body))
                assert decompress(sent, pb.ENCODING_ZSTD, len(body)) == body
            else:
                assert (request.encoding, request.body_size, sent) == (pb.ENCODING_IDENTITY, 0, body)
            claims = pb.RequestClaims.FromString(
                open_envelope(request.envelope, KIND_REQUEST, expected_signer=CLIENT.peer).payload
            )
            assert claims.body_digest == salted_digest(request.salt, body)

    @pytest.mark.parametrize("step", [1, 50, 60_000])
    @pytest.mark.parametrize("encoding", [pb.ENCODING_ZSTD, pb.ENCODING_GZIP])
    async def test_an_answer_is_decompressed_and_its_receipt_is_about_that(self, encoding: int, step: int) -> None:
        content = b"".join(PIECES) * 100
        data = compress(content) if encoding == pb.ENCODING_ZSTD else gzip.compress(content)
        pieces = [data[at : at + step] for at in range(0, len(data), step)]
        async with bench(packed_answer(*pieces, encoding=encoding, content=content)) as b:
            assert await b.ask() == content

    async def test_each_piece_of_a_compressed_stream_is_given_at_once(self) -> None:
        encoder = Encoder()

        async def act(far: Responder, asked: Asked) -> None:
            m = far.machine
            await far.send_raw(m.head("text/event-stream", encoding=pb.ENCODING_ZSTD))
            for piece in PIECES:
                await far.send_raw(m.data(encoder.encode(piece)))
                await gates.pop(0).wait()
            await far.send_raw(m.data(encoder.finish()) + m.end(far.receipt(asked, b"".join(PIECES))))

        gates = [trio.Event(), trio.Event()]
        waiting = list(gates)
        async with bench(then(act)) as b, b.open() as exchange:
            for piece, gate in zip(PIECES, waiting, strict=True):
                assert await exchange.receive() == piece
                gate.set()
            assert await exchange.receive() is None

    async def test_a_bomb_comes_out_in_bounded_pieces(self) -> None:
        content = bytes(20 << 20)
        bomb = compress(content)
        assert len(bomb) < 60_000
        async with bench(packed_answer(bomb, content=content)) as b, b.open() as exchange:
            sizes = []
            while (piece := await exchange.receive()) is not None:
                sizes.append(len(piece))
            assert sum(sizes) == len(content)
            assert max(sizes) <= PIECE_BYTES

    async def test_many_small_frames_that_are_bombs_together(self) -> None:
        encoder = Encoder()
        pieces = [encoder.encode(bytes(PIECE_BYTES // 2 + 1)) for _ in range(40)]
        content = bytes((PIECE_BYTES // 2 + 1) * 40)
        async with bench(packed_answer(*pieces, encoder.finish(), content=content)) as b, b.open() as exchange:
            sizes = []
            while (piece := await exchange.receive()) is not None:
                sizes.append(len(piece))
            assert (sum(sizes), max(sizes)) == (len(content), PIECE_BYTES)

    @pytest.mark.parametrize(
        ("pieces", "encoding"),
        [
            ((compress(b"text")[:-1],), pb.ENCODING_ZSTD),  # cut: END before the frame's own end
            ((gzip.compress(b"text")[:-1],), pb.ENCODING_GZIP),
            ((compress(b"text"), b"more"), pb.ENCODING_ZSTD),
            ((compress(b"text"),), pb.ENCODING_GZIP),
            ((b"text",), pb.ENCODING_ZSTD),
            ((b"text",), 9),
        ],
    )
    async def test_what_cannot_be_decompressed_is_a_failure(self, pieces: tuple[bytes, ...], encoding: int) -> None:
        async with bench(packed_answer(*pieces, encoding=encoding, content=b"text")) as b:
            with pytest.raises(RemoteProtocolError) as caught:
                await b.ask()
            assert (caught.value.code, caught.value.http_status) == ("bad_encoding", 502)
            assert b.is_clean()

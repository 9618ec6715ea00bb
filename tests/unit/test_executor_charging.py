"""What an executor signs for priced answers, where it stops itself, and from whom it takes no priced work."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import trio
from test_executor_serve import SALT, STREAMED, WHOLE, Requester, bench
from trio.testing import MockClock, wait_all_tasks_blocked

from lloom_sidecar.executor.serve import ServedReceipt
from lloom_sidecar.executor.statements import CHECKPOINT_S, CHECKPOINT_TOKENS
from lloom_sidecar.executor.unacked import FORGET_S, GRACE_S, MAX_PEERS, UnackedBook
from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.claims import check_checkpoint, salted_digest, seal_ack
from lloom_sidecar.protocol.compression import Decoder
from lloom_sidecar.protocol.envelope import open_envelope
from lloom_sidecar.protocol.exchange import CheckpointReceived, DataReceived, EndReceived, HeadReceived
from lloom_sidecar.protocol.names import KIND_CHECKPOINT, KIND_RECEIPT
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.fakes.fake_backend import Line, chunk, sse
from tests.fakes.request_stream import CLIENT, EXECUTOR

PRICE = Price(1_000_000, 1_000_000, "EUR")
"""One minor unit a token."""
CEILING = pb.Price(prompt_per_million=1_000_000, completion_per_million=1_000_000, currency="EUR")


def claims_of(envelope: bytes, *, is_checkpoint: bool = False) -> pb.ReceiptClaims:
    opened = open_envelope(envelope, KIND_CHECKPOINT if is_checkpoint else KIND_RECEIPT, expected_signer=EXECUTOR.peer)
    return pb.ReceiptClaims.FromString(opened.payload)


async def read_checked(r: Requester, *, until: int | None = None) -> tuple[bytes, list[pb.ReceiptClaims]]:
    """(the answer, its checkpoints), each checked as a client does; to END, or to that many checkpoints."""
    answer = b""
    found: list[pb.ReceiptClaims] = []
    while until is None or len(found) < until:
        match await r.next():
            case DataReceived(data=data):
                answer += data
            case CheckpointReceived(envelope=envelope):
                found.append(
                    check_checkpoint(
                        envelope,
                        client=CLIENT.peer,
                        executor=EXECUTOR.peer,
                        request_digest=hashlib.sha256(r.envelope).digest(),
                        request=r.claims,
                        answer_digest=salted_digest(SALT, answer),
                        answer_bytes=len(answer),
                        before=found[-1] if found else None,
                    )
                )
            case EndReceived(receipt=receipt):
                r.receipt = receipt
                return answer, found
            case None:
                raise EOFError
            case _:
                pass
    return answer, found


def many(count: int, *, ends: bool = True) -> list[bytes]:
    """A backend that gives ``count`` pieces of text."""
    last = sse(chunk("", "stop"), {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}})
    return [*sse(*(chunk(f"w{n}") for n in range(count)), done=False), *(last if ends else [])]


class TestCheckpoints:
    async def test_one_each_1024_tokens(self) -> None:
        async with bench(many(2500), price=PRICE) as b:
            r = await b.open()
            await r.ask(max_price=CEILING)
            answer, found = await read_checked(r)
            assert [one.usage.completion_tokens for one in found] == [CHECKPOINT_TOKENS, 2 * CHECKPOINT_TOKENS]
            assert [one.cost for one in found] == [1024, 2048]
            assert {one.usage_source for one in found} == {pb.USAGE_SOURCE_CHUNKS}
            receipt = claims_of(r.receipt)
            assert (receipt.cost, receipt.outcome, receipt.answer_bytes) == (2503, pb.OUTCOME_COMPLETE, len(answer))
            kept = b.observer.receipts
            assert [(one.receipt is None, one.reason) for one in kept] == [(True, ""), (True, ""), (False, "")]
            assert kept[-1].checkpoint == kept[-2].checkpoint

    async def test_one_each_five_seconds_in_which_something_came(self, autojump_clock: MockClock) -> None:
        script: list[Line] = []
        for piece in many(4, ends=False):
            script += [piece, CHECKPOINT_S / 2]
        async with bench([*script, 20.0, *many(1)], price=PRICE) as b:
            r = await b.open()
            await r.ask(max_price=CEILING)
            _, found = await read_checked(r)
            assert [one.usage.completion_tokens for one in found] == [3, 5]

    @pytest.mark.parametrize(("price", "body"), [(Price(), STREAMED), (PRICE, WHOLE)])
    async def test_none_for_what_is_free_and_none_before_a_document(self, price: Price, body: dict[str, Any]) -> None:
        async with bench(many(2500), price=price) as b:
            r = await b.open()
            await r.ask(body, max_price=CEILING)
            _, found = await read_checked(r)
            assert found == []

    async def test_a_compressed_stream_is_signed_for_as_the_application_gets_it(self) -> None:
        async with bench(many(1500), price=PRICE, compresses=True, compresses_streams=True) as b:
            r = await b.open()
            await r.ask(max_price=CEILING)
            packed, checkpoint, decoder = b"", None, None
            while not isinstance(event := await r.next(), EndReceived):
                match event:
                    case HeadReceived(encoding=encoding):
                        decoder = Decoder(encoding)
                    case DataReceived(data=data):
                        packed += data
                    case CheckpointReceived(envelope=envelope):
                        assert decoder is not None
                        answer = decoder.decode(packed, 1 << 24)
                        checkpoint = claims_of(envelope, is_checkpoint=True)
                        assert checkpoint.answer_bytes == len(answer) > len(packed)
                        assert checkpoint.answer_digest == salted_digest(SALT, answer)
            assert checkpoint is not None

    async def test_the_backends_own_running_count_is_taken_where_it_gives_one(self) -> None:
        usage = {"prompt_tokens": 7, "completion_tokens": 9}
        script = [*sse(*(chunk("a", usage=usage) for _ in range(1024)), done=False), *many(1)]
        async with bench(script, price=PRICE) as b:
            r = await b.open()
            await r.ask(max_price=CEILING)
            _, found = await read_checked(r)
            assert [(one.cost, one.usage_source) for one in found] == [(16, pb.USAGE_SOURCE_BACKEND)]


class TestCut:
    async def test_a_client_that_leaves_owes_the_last_checkpoint(self) -> None:
        async with bench([*many(1100, ends=False), trio.Event()], price=PRICE) as b:
            r = await b.open()
            await r.ask(max_price=CEILING)
            await read_checked(r, until=1)
            r.stream.close()
            await wait_all_tasks_blocked()
            served = b.observer.receipts[-1]
            assert (served.receipt, served.reason) == (None, "cancelled")
            assert served.checkpoint is not None
            assert claims_of(served.checkpoint, is_checkpoint=True).cost == 1024
            assert b.is_idle()

    async def test_one_that_leaves_before_any_owes_nothing(self) -> None:
        async with bench([*many(3, ends=False), trio.Event()], price=PRICE) as b:
            r = await b.open()
            await r.ask(max_price=CEILING)
            await r.next()
            r.stream.close()
            await wait_all_tasks_blocked()
            (served,) = b.observer.receipts
            assert (served.receipt, served.checkpoint, served.reason) == (None, None, "cancelled")


class TestMaxCost:
    async def test_a_backend_that_ignores_its_limit_is_stopped(self) -> None:
        async with bench([*many(500, ends=False), trio.Event()], price=PRICE) as b:
            r = await b.open()
            paid = len(json.dumps(STREAMED).encode()) + 100
            await r.ask(max_price=CEILING, max_cost=paid, max_cost_set=True)
            answer, _ = await read_checked(r)
            assert json.loads(b.backend.calls[0].body)["max_tokens"] == 100
            events = [line[6:] for line in answer.decode().split("\n\n") if line]
            assert events[-1] == "[DONE]"
            last = json.loads(events[-2])
            assert (last["id"], last["choices"]) == ("c", [{"index": 0, "delta": {}, "finish_reason": "length"}])
            assert len(events) == 100 + 5 + 2
            receipt = claims_of(r.receipt)
            assert receipt.outcome == pb.OUTCOME_STOPPED
            assert receipt.cost <= paid
            await wait_all_tasks_blocked()
            assert b.observer.ended == ["ok"]
            assert b.backend.outcomes == ["left"]

    async def test_so_is_one_whose_answer_becomes_a_document(self) -> None:
        async with bench([*many(500, ends=False), trio.Event()], price=PRICE) as b:
            r = await b.open()
            await r.ask(WHOLE, max_price=CEILING, max_cost=len(json.dumps(WHOLE)) + 10, max_cost_set=True)
            answer, _ = await read_checked(r)
            choice = json.loads(answer)["choices"][0]
            assert choice["finish_reason"] == "length"
            assert choice["message"]["content"].startswith("w0w1")
            assert claims_of(r.receipt).outcome == pb.OUTCOME_STOPPED

    @pytest.mark.parametrize("body", [STREAMED, WHOLE])
    @pytest.mark.parametrize("more", [{}, {"usage": {"prompt_tokens": 1, "completion_tokens": 10}}])
    async def test_one_that_keeps_to_it_ends_by_itself_and_the_receipt_says_why(
        self, body: dict[str, Any], more: dict[str, Any]
    ) -> None:
        script = [*many(10, ends=False), *sse(chunk("", "length", **more))]
        async with bench(script, price=PRICE) as b:
            r = await b.open()
            await r.ask(body, max_price=CEILING, max_cost=len(json.dumps(body)) + 10, max_cost_set=True)
            await read_checked(r)
            assert claims_of(r.receipt).outcome == pb.OUTCOME_STOPPED
            b.backend.script = script
            await r.ask(body, max_price=CEILING, max_cost=10_000, max_cost_set=True)
            await read_checked(r)
            assert claims_of(r.receipt).outcome == pb.OUTCOME_COMPLETE

    async def test_a_count_over_the_max_cost_is_the_executors_loss(self) -> None:
        usage = {"choices": [], "usage": {"prompt_tokens": 90_000, "completion_tokens": 1}}
        async with bench(sse(chunk("a"), chunk("", "stop"), usage), price=PRICE) as b:
            r = await b.open()
            await r.ask(max_price=CEILING, max_cost=1000, max_cost_set=True)
            await read_checked(r)
            receipt = claims_of(r.receipt)
            assert (receipt.cost, receipt.usage.prompt_tokens) == (1000, 90_000)


class TestGates:
    async def test_with_a_full_ledger_only_free_work_is_done(self) -> None:
        async with bench(price=PRICE) as b:
            r = await b.open()
            b.ledger_trouble = "no room"
            await r.ask(max_price=CEILING)
            error = await r.error()
            assert (error.code, error.http_status, error.retryable) == ("ledger_full", 503, True)
            assert error.retry_after_s == 30
            await r.ask({"model": "m"}, operation=pb.OPERATION_QUOTE)
            assert await r.answer()
            b.executor.price = Price()
            await r.ask(max_price=CEILING)
            assert await r.answer()
            b.ledger_trouble = None
            b.executor.price = PRICE
            await r.ask(max_price=CEILING)
            assert await r.answer()

    async def test_who_never_acks_gets_no_priced_answer_any_more(self, autojump_clock: MockClock) -> None:
        async with bench(price=PRICE, max_unacked=2) as b:
            r = await b.open()

            async def ask(*, acks: bool) -> ServedReceipt:
                await r.ask(max_price=CEILING)
                await r.answer()
                if acks:
                    await r.stream.send_all(r.machine.ack(r.machine.exchange, seal_ack(r.receipt, CLIENT)))
                return b.observer.receipts[-1]

            for _ in range(5):
                await ask(acks=True)
            await ask(acks=False)
            await ask(acks=False)
            await ask(acks=True)  # those two may still come
            await trio.sleep(GRACE_S + 1)
            await r.ask(max_price=CEILING)
            error = await r.error()
            assert (error.code, error.http_status, error.retryable) == ("unacked", 429, True)
            b.executor.price = Price()
            await r.ask()
            assert await r.answer()
            b.executor.price = PRICE
            await trio.sleep(FORGET_S)
            r = await b.open()
            await r.ask(max_price=CEILING)
            assert await r.answer()


def peers(count: int) -> list[PeerId]:
    return [PeerId.from_ed25519(number.to_bytes(32, "big")) for number in range(count)]


class TestUnackedBook:
    def test_counts_what_is_overdue(self) -> None:
        book = UnackedBook(2)
        (peer,) = peers(1)
        for now in (0.0, 1.0, 2.0):
            book.ended(peer, now)
        assert book.missing(peer, 5.0) == 0
        assert not book.is_over(peer, 5.0)
        assert book.missing(peer, 1.0 + GRACE_S) == 2
        assert book.is_over(peer, 1.0 + GRACE_S)
        book.acked(peer)
        book.acked(peer)
        assert not book.is_over(peer, 100.0)
        assert book.missing(peer, FORGET_S + 1) == 0

    def test_zero_is_no_limit_and_the_book_is_bounded(self) -> None:
        assert not UnackedBook(0).is_over(peers(1)[0], 0.0)
        free = UnackedBook(0)
        free.ended(peers(1)[0], 0.0)
        assert free.missing(peers(1)[0], 100.0) == 0
        book = UnackedBook(1)
        for peer in peers(MAX_PEERS + 1):
            book.ended(peer, 0.0)
        assert not book.is_over(peers(1)[0], 100.0)
        assert book.is_over(peers(2)[1], 100.0)

    def test_an_ack_of_somebody_unknown_is_nothing(self) -> None:
        UnackedBook(1).acked(peers(1)[0])

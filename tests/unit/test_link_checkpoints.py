"""Checkpoints as the client meets them: checked like a receipt, the last one kept; and numbers that cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from test_link_exchange import CALL, PEER, PIECES, STRANGER, bench, read_all, then

from lloom_sidecar.errors import ReceiptError, RequestError, StreamLostError
from lloom_sidecar.link.exchange import Call, Sent, open_exchange
from lloom_sidecar.protocol.claims import seal_checkpoint, seal_receipt
from lloom_sidecar.protocol.offers import Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.fakes.request_stream import CLIENT, Asked, Responder

PRICE = Price(1_000_000, 2_000_000, "EUR")
PRICED = Call(
    request_id=CALL.request_id,
    operation=CALL.operation,
    model=CALL.model,
    body=CALL.body,
    deadline_ms=CALL.deadline_ms,
    max_price=PRICE,
    max_cost=1000,
)


def usage(prompt: int, completion: int) -> pb.Usage:
    return pb.Usage(prompt_tokens=prompt, completion_tokens=completion)


async def begin(far: Responder, asked: Asked) -> None:
    await far.send_raw(far.machine.head("text/event-stream") + far.machine.data(PIECES[0]))


class TestHolds:
    async def test_each_is_checked_against_what_came_before_it_and_the_last_is_kept(self) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            # All in one write: DATA before a checkpoint belongs to it, DATA behind it does not.
            whole = b"".join(PIECES)
            sent = [far.machine.head("text/event-stream"), far.machine.data(PIECES[0])]
            sent.append(far.machine.checkpoint(far.checkpoint(asked, PIECES[0], usage=usage(0, 1))))
            sent.append(far.machine.data(PIECES[1]))
            sent.append(far.machine.checkpoint(far.checkpoint(asked, whole, usage=usage(0, 2))))
            await far.send_raw(b"".join([*sent, far.machine.end(far.receipt(asked, whole))]))

        async with bench(then(priced)) as b:
            seen: list[int] = []
            async with b.open(PRICED) as exchange:
                exchange.on_checkpoint = lambda claims: seen.append(claims.cost)
                assert await read_all(exchange) == b"".join(PIECES)
                assert seen == [2, 4]
                checkpoint = exchange.sent.checkpoint
                assert checkpoint is not None
                assert (checkpoint.claims.cost, checkpoint.ack) == (4, b"")
                assert exchange.receipt is not None
                assert exchange.receipt.claims.cost == 13

    async def test_before_any_data_it_is_for_no_bytes(self) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            await far.send_raw(far.machine.checkpoint(far.checkpoint(asked, b"", usage=usage(0, 0))))
            await far.send_raw(far.machine.data(b"x") + far.machine.end(far.receipt(asked, b"x")))

        async with bench(then(priced)) as b:
            assert await b.ask(PRICED) == b"x"

    async def test_a_cut_answer_leaves_the_last(self) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            await begin(far, asked)
            await far.send_raw(far.machine.checkpoint(far.checkpoint(asked, PIECES[0])))
            await far.send_raw(far.machine.data(PIECES[1]))
            far.stream.close()

        sent: list[Sent] = []
        async with bench(then(priced)) as b:
            with pytest.raises(StreamLostError):
                async with open_exchange(b.pool, CLIENT, PEER, PRICED, sent.append) as exchange:
                    await read_all(exchange)
            assert sent[0].receipt is None
            assert sent[0].checkpoint is not None
            assert sent[0].checkpoint.claims.answer_bytes == len(PIECES[0])
            assert b.is_clean()

    async def test_what_the_hook_raises_ends_the_exchange(self) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            await begin(far, asked)
            await far.send_raw(far.machine.checkpoint(far.checkpoint(asked, PIECES[0])))
            await far.until_closed()

        def enough(claims: pb.ReceiptClaims) -> None:
            raise RequestError("enough", code="daily_cap")

        async with bench(then(priced)) as b:
            with pytest.raises(RequestError, match="enough"):
                async with b.open(PRICED) as exchange:
                    exchange.on_checkpoint = enough
                    await read_all(exchange)
            assert b.is_clean()


class TestDoesNotHold:
    @pytest.mark.parametrize(
        ("wrong", "changes"),
        [
            ("client", {"client": PEER.raw}),
            ("executor", {"executor": CLIENT.peer.raw}),
            ("request", {"request_digest": bytes(32)}),
            ("answer", {"answer_digest": bytes(32)}),
            ("answer", {"answer_bytes": 1}),
            ("model", {"model": "n"}),
            ("outcome", {"outcome": pb.OUTCOME_COMPLETE}),
            ("price", {"price": pb.Price(prompt_per_million=1_000_001, currency="EUR"), "cost": 4}),
            ("price", {"price": pb.Price(prompt_per_million=1, currency="USD"), "cost": 1}),
            ("cost", {"cost": 14}),
            ("cost", {"usage": pb.Usage(completion_tokens=501), "cost": 1002}),
        ],
    )
    async def test_it_is_refused(self, wrong: str, changes: dict[str, Any]) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            await begin(far, asked)
            claims = far.statement(asked, PIECES[0], **({"outcome": pb.OUTCOME_PARTIAL} | changes))
            await far.send_raw(far.machine.checkpoint(seal_checkpoint(claims, far.signer)))
            await far.until_closed()

        async with bench(then(priced)) as b:
            with pytest.raises(ReceiptError, match=f"checkpoint does not fit this exchange: .*{wrong}"):
                await b.ask(PRICED)
            assert b.is_clean()

    @pytest.mark.parametrize(
        ("wrong", "first", "second"),
        [
            ("usage", usage(5, 5), usage(4, 9)),
            ("usage", usage(5, 5), usage(9, 4)),
        ],
    )
    async def test_usage_only_grows(self, wrong: str, first: pb.Usage, second: pb.Usage) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            await begin(far, asked)
            for one in (first, second):
                await far.send_raw(far.machine.checkpoint(far.checkpoint(asked, PIECES[0], usage=one)))
            await far.until_closed()

        async with bench(then(priced)) as b:
            with pytest.raises(ReceiptError, match=wrong):
                await b.ask(PRICED)

    async def test_the_price_is_fixed(self) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            await begin(far, asked)
            await far.send_raw(far.machine.checkpoint(far.checkpoint(asked, PIECES[0])))
            cheaper = pb.Price(prompt_per_million=1_000_000, completion_per_million=1_000_000, currency="EUR")
            again = far.checkpoint(asked, PIECES[0], price=cheaper, cost=8)
            await far.send_raw(far.machine.checkpoint(again))
            await far.until_closed()

        async with bench(then(priced)) as b:
            with pytest.raises(ReceiptError, match="price"):
                await b.ask(PRICED)

    @pytest.mark.parametrize("kind", ["receipt", "stranger", "garbage"])
    async def test_it_is_a_checkpoint_of_this_executor(self, kind: str) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            await begin(far, asked)
            claims = far.statement(asked, PIECES[0], outcome=pb.OUTCOME_PARTIAL)
            envelope = {
                "receipt": seal_receipt(claims, far.signer),
                "stranger": far.checkpoint(asked, PIECES[0]),
                "garbage": b"garbage",
            }[kind]
            if kind == "stranger":
                far.signer = STRANGER
                envelope = far.checkpoint(asked, PIECES[0])
            await far.send_raw(far.machine.checkpoint(envelope))
            await far.until_closed()

        async with bench(then(priced)) as b:
            with pytest.raises(ReceiptError, match="executor's checkpoint cannot be used"):
                await b.ask(PRICED)

    async def test_a_checkpoint_is_no_receipt(self) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            await begin(far, asked)
            await far.send_raw(far.machine.end(far.checkpoint(asked, PIECES[0])))

        async with bench(then(priced)) as b:
            with pytest.raises(ReceiptError, match="executor's receipt cannot be used"):
                await b.ask(PRICED)


class TestCost:
    async def test_what_is_done_beyond_the_max_cost_is_the_executors_loss(self) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            await begin(far, asked)
            beyond = far.receipt(asked, PIECES[0], usage=usage(3, 900), outcome=pb.OUTCOME_STOPPED)
            await far.send_raw(far.machine.end(beyond))

        async with bench(then(priced)) as b, b.open(PRICED) as exchange:
            await read_all(exchange)
            assert exchange.receipt is not None
            assert exchange.receipt.claims.cost == 1000


class TestDoubts:
    @pytest.mark.parametrize(
        ("stated", "doubts"),
        [
            (usage(5, 2), 0),
            (usage(0, 22 + 1024), 0),
            (usage(0, 22 + 1024 + 1), 1),
            (usage(len(CALL.body) + 1024, 2), 0),
            (usage(len(CALL.body) + 1025, 2), 1),
            (usage(10**9, 10**9), 2),
        ],
    )
    async def test_numbers_that_cannot_be_are_told_with_the_receipt(self, stated: pb.Usage, doubts: int) -> None:
        async def priced(far: Responder, asked: Asked) -> None:
            await far.send_raw(far.machine.head("text/event-stream"))
            for piece in PIECES:
                await far.send_raw(far.machine.data(piece))
            await far.send_raw(far.machine.end(far.receipt(asked, b"".join(PIECES), usage=stated)))

        async with bench(then(priced)) as b, b.open(PRICED) as exchange:
            await read_all(exchange)
            assert exchange.receipt is not None
            assert len(exchange.receipt.doubts) == doubts

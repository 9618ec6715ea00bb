"""The checks of the chaos suite see what they are there for: each one is shown a record that breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chaos import invariants
from chaos.faults import VALIDATOR, Kill, Outage, Plan
from chaos.figures import deaths, quiet, share, summary, untouched
from chaos.ledgers import Entry, Work
from chaos.record import Ask, Outcome, Record, make_ask

ASK = Ask(tag=7, chunks=3, delay_ms=10)


def complete(ask: Ask = ASK) -> Record:
    """A record of an answer as it should be."""
    return Record(
        ask,
        began_at=100.0,
        status=200,
        request_id="aa",
        executor="x",
        attempts=1,
        pieces=[f" {ask.tag}.{index}" for index in range(ask.chunks)],
        has_finish=True,
        has_done=ask.streams,
        has_end=True,
        ended_at=101.0,
    )


def cut(**changes: object) -> Record:
    """A record of an answer that broke off after one chunk, as its application should see it."""
    record = complete()
    record.pieces = record.pieces[:1]
    record.has_finish = record.has_done = record.has_end = False
    record.error = "stream_lost"
    for name, value in changes.items():
        setattr(record, name, value)
    return record


def done(record: Record) -> Work:
    assert record.ended_at is not None
    return Work(record.ask.tag, record.began_at, record.ended_at, "complete", record.ask.chunks)


def entry(**changes: object) -> Entry:
    return replace(Entry("aa", b"d", b"r", is_owed=True, reason="", has_ack=True), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("record", "outcome"),
    [
        (complete(), Outcome.COMPLETE),
        (complete(replace(ASK, streams=False)), Outcome.COMPLETE),
        (cut(), Outcome.ERROR),
        (cut(status=503, pieces=[], has_end=True), Outcome.ERROR),
        (cut(error="", left=True), Outcome.CANCELLED),
        (cut(error=""), Outcome.SILENT),
        (cut(has_end=True), Outcome.SILENT),
        (cut(has_finish=True), Outcome.SILENT),
        (cut(has_done=True), Outcome.SILENT),
        (cut(error="", has_finish=True, has_end=True), Outcome.SILENT),
        (cut(ended_at=None), Outcome.LOST),
    ],
)
def test_one_outcome_each(record: Record, outcome: Outcome) -> None:
    assert record.outcome is outcome
    assert bool(invariants.outcomes([record])) == (outcome in (Outcome.SILENT, Outcome.LOST))


@pytest.mark.parametrize(
    "pieces",
    [[" 7.0", " 7.1"], [" 7.0", " 7.0", " 7.1", " 7.2"], [" 7.1", " 7.0", " 7.2"], [" 8.0", " 8.1", " 8.2"]],
    ids=["short", "doubled", "out of order", "somebody else's"],
)
def test_wrong_texts_are_seen(pieces: list[str]) -> None:
    record = complete()
    assert invariants.texts([record]) == []
    record.pieces = pieces
    assert len(invariants.texts([record])) == 1


def test_a_part_is_no_violation_when_it_is_the_beginning() -> None:
    assert invariants.texts([cut()]) == []
    assert len(invariants.texts([cut(pieces=[" 7.1"])])) == 1
    assert len(invariants.texts([cut(unread="{x")])) == 1


def test_work_that_goes_on_and_text_that_nobody_sent() -> None:
    record = complete()
    assert invariants.work([record], [done(record)]) == []
    assert invariants.work([record], [replace(done(record), ended_at=None)]) == []
    assert len(invariants.work([record], [replace(done(record), sent=2)])) == 1
    assert len(invariants.work([record], [])) == 1
    assert len(invariants.work([cut()], [replace(done(record), ended_at=101.0 + invariants.STOP_S + 1)])) == 1


def test_ledgers_that_do_not_agree() -> None:
    record = complete()
    mine, far = entry(), entry(has_ack=False)
    assert invariants.receipts([record], [mine], [far]) == []
    assert invariants.receipts([cut()], [], []) == []
    assert len(invariants.receipts([record], [], [far])) == 2
    assert len(invariants.receipts([record], [mine], [])) == 1
    assert invariants.receipts([record], [mine], [], lambda _: True) == []
    assert len(invariants.receipts([record], [entry(is_owed=False, reason="lost")], [far])) == 1
    assert len(invariants.receipts([record], [mine], [entry(receipt=b"other")])) == 2
    assert len(invariants.receipts([], [], [far])) == 1
    assert invariants.receipts([], [entry(is_owed=False, reason="cancelled")], [far]) == []
    assert invariants.receipts([], [entry(is_owed=False, reason="lost")], [entry(receipt=None)]) == []
    assert len(invariants.receipts([], [entry(is_owed=False)], [far])) == 1
    assert len(invariants.receipts([], [entry(receipt=None)], [])) == 1
    assert len(invariants.receipts([record], [mine, entry(request_digest=b"e")], [far])) >= 1


def test_a_plan_is_its_seed_and_breaks_one_executor_at_a_time() -> None:
    first, second = (Plan(3, 4) for _ in range(2))
    kills = [(first.next(frozenset()), second.next(frozenset())) for _ in range(50)]
    assert all(one == other for one, other in kills)
    assert {one.part for one, _ in kills if one} == {"sidecar", "p2pd", "backend"}
    assert {one.executor for one, _ in kills if one} == {0, 1, 2, 3}
    # While one is down: that one or the validator, never what is dead already.
    for part in ("sidecar", "p2pd", "backend"):
        active = frozenset({Kill(part, 2)})
        more = {first.next(active) for _ in range(50)}
        assert more == {VALIDATOR, Kill("backend", 2), Kill("p2pd", 2)} - active - (
            {Kill("p2pd", 2)} if part == "sidecar" else set()
        )
    assert first.next(frozenset({Kill("sidecar", 2), Kill("backend", 2), VALIDATOR})) is None


def test_requests_are_their_seed_and_of_every_kind() -> None:
    asks = [make_ask(1, tag) for tag in range(400)]
    assert asks == [make_ask(1, tag) for tag in range(400)]
    assert any(ask.leave_after for ask in asks)
    assert not all(ask.streams for ask in asks)


def test_figures_count_what_they_say() -> None:
    calm, hit = complete(), cut(began_at=199.0, ended_at=200.5)
    during = cut(began_at=200.2, ended_at=200.4, status=503, has_end=True)
    outages = [Outage(Kill("p2pd", 1), 200.0, 201.0), Outage(VALIDATOR, 90.0, 110.0)]
    records = [calm, hit, during, cut(error="", left=True)]
    assert share(records) == (1, 3)
    assert hit in quiet(records, outages)
    assert during not in quiet(records, outages)
    assert hit not in untouched(records, outages)
    assert calm in untouched(records, outages)
    shown = "\n".join([*deaths(outages), *summary(records, outages)])
    assert "1 x 200 stream_lost, 1 x 503 stream_lost" in shown
    assert "2 kills" in shown

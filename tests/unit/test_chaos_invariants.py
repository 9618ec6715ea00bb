"""The checks of the chaos suite see what they are there for: each one is shown a record that breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from chaos import invariants
from chaos.faults import Plan
from chaos.figures import quiet, share, summary, untouched
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
    assert len(invariants.receipts([record], [], [far])) == 1
    assert len(invariants.receipts([record], [mine], [])) == 1
    assert len(invariants.receipts([record], [entry(is_owed=False)], [far])) == 1
    assert len(invariants.receipts([record], [mine], [entry(receipt=b"other")])) == 1
    assert len(invariants.receipts([record], [mine, entry(request_digest=b"e")], [far])) >= 1


def test_a_plan_is_its_seed_and_breaks_one_executor_at_a_time() -> None:
    first, second = (Plan(3, 4) for _ in range(2))
    kills = [(first.next(is_one_down=False), second.next(is_one_down=False)) for _ in range(50)]
    assert all(one == other for one, other in kills)
    assert {one.part for one, _ in kills} == {"sidecar", "p2pd", "backend"}
    assert {one.executor for one, _ in kills} == {0, 1, 2, 3}
    assert first.next(is_one_down=True).executor is None


def test_requests_are_their_seed_and_of_every_kind() -> None:
    asks = [make_ask(1, tag) for tag in range(400)]
    assert asks == [make_ask(1, tag) for tag in range(400)]
    assert any(ask.leave_after for ask in asks)
    assert not all(ask.streams for ask in asks)


def test_figures_count_what_they_say() -> None:
    calm, hit, validator = complete(), cut(), complete()
    hit.faults = {"p2pd 1"}
    hit.faults_at_begin = frozenset()
    validator.faults, validator.faults_at_begin = {"validator"}, frozenset({"validator"})
    records = [calm, hit, validator, cut(error="", left=True)]
    assert share(records) == (2, 3)
    assert hit in quiet(records)
    assert hit not in untouched(records)
    assert validator in untouched(records)
    assert "1 x 200 stream_lost" in "\n".join(summary(records))

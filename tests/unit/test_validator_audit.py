"""The audit on virtual time: liars are found, honest executors are not, whatever else happens."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio
from test_protocol_evidence import EXECUTORS, KEY, NOW_MS, VALIDATOR, receipt
from trio.testing import MockClock

from lloom_sidecar.errors import DaemonUnavailableError, PeerUnreachableError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.evidence import Evidence, open_evidence, seal_evidence
from lloom_sidecar.validator.audit import FINDING_S, MAX_FINDINGS, PUBLISH_EVERY_S, ROUNDS, Answered, Auditor, Group
from lloom_sidecar.validator.canary import Canary

SIGNERS = {one.peer: one for one in EXECUTORS}
A, B, C, D = list(SIGNERS)[:4]
INTERVAL_S = 600.0
Behaviour = Callable[[Canary], str | None]


def honest(canary: Canary) -> str:
    return f"The answer to {canary.digest.hex()[:40]} is this, and it goes on for a while."


def liar(canary: Canary) -> str:
    return "I am sorry, but I cannot say anything about that today. Please come back tomorrow."


class Bench:
    def __init__(self, behaviours: dict[PeerId, Behaviour], *, seed: int = 1) -> None:
        self.behaviours = behaviours
        self.asked: list[tuple[float, PeerId, bytes]] = []
        self.published: list[tuple[float, Evidence]] = []
        self.found: list[Evidence] = []
        self.fails_to_publish = False
        self.digest = b"d" * 32
        self.auditor = Auditor(
            groups=lambda: [Group("m", self.digest, tuple(self.behaviours))],
            ask=self.ask,
            publish=self.publish,
            on_finding=self.found.append,
            interval_s=INTERVAL_S,
            rng=random.Random(seed),
        )

    async def ask(self, peer: PeerId, canary: Canary) -> Answered:
        self.asked.append((trio.current_time(), peer, canary.digest))
        text = self.behaviours[peer](canary)
        if text is None:
            raise PeerUnreachableError("away")
        if canary.is_streamed:
            deltas = [text[: len(text) // 2], text[len(text) // 2 :]]
            events = [msgspec.json.encode({"choices": [{"delta": {"content": one}}]}) for one in deltas]
            data = b"".join(b"data: " + event + b"\n\n" for event in events) + b"data: [DONE]\n\n"
        else:
            data = msgspec.json.encode({"choices": [{"message": {"content": text}}]})
        return Answered(data, receipt(SIGNERS[peer], len(self.asked)))

    async def publish(self, evidence: Evidence) -> None:
        if self.fails_to_publish:
            raise DaemonUnavailableError("away")
        self.published.append((trio.current_time(), evidence))

    async def audit(self) -> tuple[Evidence, ...]:
        return await self.auditor.audit(Group("m", self.digest, tuple(self.behaviours)))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.auditor.run)
            yield
            nursery.cancel_scope.cancel()


async def test_a_liar_is_found_and_the_evidence_can_be_published(autojump_clock: MockClock) -> None:
    b = Bench({A: honest, B: liar, C: honest, D: honest})
    (found,) = await b.audit()
    assert b.found == [found]
    assert (found.subject, found.model, found.model_digest, len(found.rounds)) == (B, "m", b"d" * 32, ROUNDS)
    assert len({one.prompt_digest for one in found.rounds}) == ROUNDS
    for one in found.rounds:
        assert {answer.executor for answer in one.answers if answer.agrees} == {A, C, D}
    raw = seal_evidence(signer=VALIDATOR, key=KEY, sequence=1, issued_at_ms=NOW_MS, ttl_s=900, evidence=found)
    assert open_evidence(raw, keys=(KEY,), expected_signer=VALIDATOR.peer).evidence == found


async def test_everybody_gets_the_same_question_and_not_at_one_instant(autojump_clock: MockClock) -> None:
    b = Bench({A: honest, B: liar, C: honest})
    await b.audit()
    assert len({digest for _, _, digest in b.asked}) == ROUNDS
    for start in range(0, len(b.asked), 3):
        one = b.asked[start : start + 3]
        assert {peer for _, peer, _ in one} == {A, B, C}
        assert len({digest for _, _, digest in one}) == 1
        assert len({at for at, _, _ in one}) == 3


async def test_honest_ones_are_asked_once(autojump_clock: MockClock) -> None:
    b = Bench({A: honest, B: honest, C: honest})
    assert await b.audit() == ()
    assert len(b.asked) == 3
    assert b.auditor.audits == 1


def once(times: int) -> Behaviour:
    """Lies so many times, then answers as it should."""
    left = [times]

    def behave(canary: Canary) -> str:
        left[0] -= 1
        return liar(canary) if left[0] >= 0 else honest(canary)

    return behave


@pytest.mark.parametrize("times", [1, ROUNDS - 1])
async def test_who_answers_well_when_asked_again_is_not_found(autojump_clock: MockClock, times: int) -> None:
    b = Bench({A: honest, B: once(times), C: honest})
    assert await b.audit() == ()
    assert len(b.asked) == 3 * (times + 1)


def mute(canary: Canary) -> str | None:
    return None


def different(canary: Canary) -> str:
    return f"{random.random()} is something that only this one says"


@pytest.mark.parametrize(
    "behaviours",
    [
        {A: honest, B: liar},  # between two nobody can say
        {A: honest, B: liar, C: mute},
        {A: different, B: different, C: different},  # a model that does not answer greedily
        {A: honest, B: honest, C: liar, D: liar},
    ],
)
async def test_no_finding_without_a_majority_of_three(
    autojump_clock: MockClock, behaviours: dict[PeerId, Behaviour]
) -> None:
    b = Bench(behaviours)
    assert await b.audit() == ()
    assert b.found == []


async def test_one_that_is_away_harms_nobody(autojump_clock: MockClock) -> None:
    b = Bench({A: honest, B: liar, C: honest, D: mute})
    (found,) = await b.audit()
    assert found.subject == B
    assert all(len(one.answers) == 3 for one in found.rounds)


async def test_a_finding_is_said_again_each_minute_until_it_is_old(autojump_clock: MockClock) -> None:
    b = Bench({A: honest, B: liar, C: honest})
    async with b.running():
        await trio.sleep(INTERVAL_S * 8)
        times = [at for at, _ in b.published]
        assert len(times) > 5
        assert min(later - sooner for sooner, later in itertools.pairwise(times)) >= 1
        assert {evidence.subject for _, evidence in b.published} == {B}
        # It mends its ways: the next audit clears it.
        b.behaviours[B] = honest
        audits = b.auditor.audits
        while b.auditor.audits == audits:
            await trio.sleep(1)
        assert b.auditor.findings == {}
        said = len(b.published)
        await trio.sleep(PUBLISH_EVERY_S * 3)
        assert len(b.published) == said


async def test_a_finding_that_nobody_confirms_ends(autojump_clock: MockClock) -> None:
    b = Bench({A: honest, B: liar, C: honest})
    await b.audit()
    for peer in (A, C):
        b.behaviours[peer] = mute
    async with b.running():
        await trio.sleep(FINDING_S + 2)
        assert b.auditor.findings == {}
        said = len(b.published)
        assert said == pytest.approx(FINDING_S / PUBLISH_EVERY_S, abs=1)
        await trio.sleep(300)
        assert len(b.published) == said


async def test_what_could_not_be_published_is_tried_again(autojump_clock: MockClock) -> None:
    b = Bench({A: honest, B: liar, C: honest})
    await b.audit()
    b.fails_to_publish = True
    async with b.running():
        await trio.sleep(2)
        b.fails_to_publish = False
        await trio.sleep(PUBLISH_EVERY_S + 2)
        assert len(b.published) == 1


async def test_audits_come_at_random_times_about_the_interval_apart(autojump_clock: MockClock) -> None:
    b = Bench({A: honest, B: honest, C: honest})
    async with b.running():
        await trio.sleep(INTERVAL_S * 100)
    assert 60 < b.auditor.audits < 160
    starts = [at for at, _, _ in b.asked][::3]
    gaps = {round(later - sooner) for sooner, later in itertools.pairwise(starts)}
    assert len(gaps) > 30


async def test_findings_are_bounded(autojump_clock: MockClock) -> None:
    b = Bench({A: honest, B: liar, C: honest})
    for number in range(MAX_FINDINGS + 3):
        await b.auditor.audit(Group(f"m{number}", b"", (A, B, C)))
    assert list(b.auditor.findings) == [(B, f"m{number}") for number in range(3, MAX_FINDINGS + 3)]


async def test_too_few_executors_are_not_asked(autojump_clock: MockClock) -> None:
    b = Bench({A: honest, B: liar})
    async with b.running():
        await trio.sleep(INTERVAL_S * 10)
    assert b.asked == []


def test_nothing_is_said_that_is_no_text(autojump_clock: Any) -> None:
    assert Answered(b"secret", b"receipt").__repr__() == "Answered()"

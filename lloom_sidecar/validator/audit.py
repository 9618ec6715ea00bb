"""The audit: now and then a validator asks several executors of one model the same question, and compares.

Who answers unlike most of the others is asked again, together with them; only who does so every time is a finding. A
finding goes out as evidence, and again each minute, as long as it stands: a later audit in which the executor agrees
ends it, and so does half an hour.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.evidence import MAX_ANSWERS, CanaryAnswer, CanaryRound, Evidence

from .canary import Canary, make_canary, text_of
from .verdict import MIN_ANSWERS, Verdict, judge

ROUNDS: Final = 3
"""Questions that an executor has to fail, all of them."""
REPEAT_SHARE: Final = 0.1
"""The pause before the next question of one audit, as a share of the interval, at most."""
PUBLISH_EVERY_S: Final = 60.0
FINDING_S: Final = 1800.0
"""How long a finding stands without another audit of that executor."""
MAX_FINDINGS: Final = 8
"""At once; the oldest goes. Keeps the topic's rate."""
LOOK_S: Final = 1.0

log = structlog.get_logger("lloom.audit")


@dataclass(frozen=True, slots=True)
class Group:
    """Executors that say that they serve the same."""

    model: str
    digest: bytes
    """Of the weights, as all of them announced it; empty when they announce none."""
    executors: tuple[PeerId, ...]


@dataclass(frozen=True, slots=True)
class Answered:
    """A verified answer to a canary."""

    data: bytes = field(repr=False)
    """DATA, as an application would have got it."""
    receipt: bytes = field(repr=False)
    """END's envelope."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An executor that answered unlike most of the others, each time."""

    evidence: Evidence
    found_at: float


@dataclass(frozen=True, slots=True)
class _Round:
    answers: dict[PeerId, tuple[str, bytes]]
    """Executor -> text, receipt."""
    verdict: Verdict
    prompt_digest: bytes


class Auditor:
    """Asks, compares, and says what it found."""

    def __init__(
        self,
        *,
        groups: Callable[[], Sequence[Group]],
        ask: Callable[[PeerId, Canary], Awaitable[Answered]],
        publish: Callable[[Evidence], Awaitable[None]],
        on_finding: Callable[[Evidence], None],
        interval_s: float,
        rng: Random,
    ) -> None:
        """``groups``: who may be asked now. ``ask``: one executor, as a client would; raises LloomError. ``publish``:
        to the network; raises LloomError. ``on_finding``: a new one. ``interval_s``: mean time between two audits."""
        self._groups = groups
        self._ask = ask
        self._publish = publish
        self._on_finding = on_finding
        self._interval_s = interval_s
        self._rng = rng
        self.findings: dict[tuple[PeerId, str], Finding] = {}
        """By executor and model."""
        self._published_at: dict[tuple[PeerId, str], float] = {}
        self.audits = 0
        """That came to an end, with whatever result."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Audit at random times, and publish what stands, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_publishing)
            task_status.started()
            while True:
                # Exponential: what has passed tells nobody when the next one comes.
                await trio.sleep(min(self._rng.expovariate(1 / self._interval_s), 4 * self._interval_s))
                groups = [group for group in self._groups() if len(group.executors) >= MIN_ANSWERS]
                if groups:
                    await self.audit(self._rng.choice(groups))

    async def audit(self, group: Group) -> tuple[Evidence, ...]:
        """Audit up to seven executors of one group; returns the new findings."""
        asked = tuple(self._rng.sample(group.executors, min(MAX_ANSWERS, len(group.executors))))
        rounds: list[_Round] = []
        suspects = frozenset(asked)
        while len(rounds) < ROUNDS:
            if rounds:
                await trio.sleep(self._rng.random() * REPEAT_SHARE * self._interval_s)
            one = await self._ask_all(asked, make_canary(group.model, self._rng))
            rounds.append(one)
            suspects &= one.verdict.outliers
            for peer in one.verdict.agreeing:
                self.findings.pop((peer, group.model), None)
            if not suspects:
                break
        self.audits += 1
        log.info("audited", model=group.model, executors=len(asked), rounds=len(rounds), outliers=len(suspects))
        found = tuple(self._evidence(group, peer, rounds) for peer in sorted(suspects))
        for evidence in found:
            key = (evidence.subject, group.model)
            self.findings.pop(key, None)
            self.findings[key] = Finding(evidence, trio.current_time())
            self._published_at.pop(key, None)
            if len(self.findings) > MAX_FINDINGS:
                del self.findings[next(iter(self.findings))]
            self._on_finding(evidence)
        return found

    async def _ask_all(self, executors: Sequence[PeerId], canary: Canary) -> _Round:
        answers: dict[PeerId, tuple[str, bytes]] = {}

        async def ask(peer: PeerId) -> None:
            # Not all at the same instant: executors of one operator would compare.
            await trio.sleep(self._rng.random() * REPEAT_SHARE * self._interval_s / 4)
            try:
                answered = await self._ask(peer, canary)
            except LloomError as exc:
                log.info(
                    "canary_unanswered", peer=str(peer), model=canary.model, code=exc.code
                )  # no answer, no verdict
                return
            text = text_of(answered.data, is_streamed=canary.is_streamed)
            if text is not None:
                answers[peer] = (text, answered.receipt)

        async with trio.open_nursery() as nursery:
            for peer in executors:
                nursery.start_soon(ask, peer)
        verdict = judge({peer: text for peer, (text, _) in answers.items()})
        return _Round(answers, verdict, canary.digest)

    def _evidence(self, group: Group, subject: PeerId, rounds: Sequence[_Round]) -> Evidence:
        return Evidence(
            subject,
            group.model,
            group.digest,
            tuple(
                CanaryRound(
                    one.prompt_digest,
                    tuple(
                        CanaryAnswer(
                            peer, receipt, hashlib.sha256(text.encode()).digest(), peer in one.verdict.agreeing
                        )
                        for peer, (text, receipt) in sorted(one.answers.items())
                    ),
                )
                for one in rounds
            ),
        )

    async def _keep_publishing(self) -> None:
        while True:
            now = trio.current_time()
            for key, finding in list(self.findings.items()):
                if now >= finding.found_at + FINDING_S:
                    del self.findings[key]
                elif now >= self._published_at.get(key, float("-inf")) + PUBLISH_EVERY_S:
                    self._published_at[key] = now
                    try:
                        await self._publish(finding.evidence)
                    except LloomError as exc:
                        log.info("evidence_not_published", code=exc.code)
            for key in [key for key in self._published_at if key not in self.findings]:
                del self._published_at[key]
            await trio.sleep(LOOK_S)

"""Why a request went where it went, or where one would go now, as JSON. Fields are added, never renamed or removed."""

from __future__ import annotations

from typing import Literal, TypedDict

from .view import PriceInfo


class CandidateInfo(TypedDict):
    """One executor that a choice looked at."""

    peer: str
    filtered: str | None
    """Why it could not have the request (``selection.Filtered``): price, circuit_open, ...; None = it could."""
    state: Literal["fresh", "suspect", "dead"]
    """Of its lease, at the time of asking."""
    path: Literal["direct", "relayed"]
    estimate_ms: float
    """Expected time to the first token: its usual one, or the peak of late that fades."""
    in_flight: int
    """Requests under way there: this node's own, or what it announced if that is more."""
    slots: int
    score_ms: float
    """estimate x (in flight + 1) / slots, a quarter more when relayed; the lower wins."""
    due: bool
    """It failed before, and the next request finds out whether it is back."""
    wait_s: float
    """How long until it may be used, when its health rules it out."""
    context_length: int
    """0 = unknown."""
    price: PriceInfo


class ChoiceInfo(TypedDict):
    """One choice."""

    rule: str
    """What decided (``selection.Rule``): two_choices, affinity, probe, policy, only, none."""
    picks: list[str]
    candidates: list[CandidateInfo]
    complete: bool
    """False when there were too many candidates to look at all."""


class AttemptInfo(TypedDict):
    """One executor that was asked and did not give the answer."""

    executor: str
    stage: str
    """open, first_byte, answer."""
    reason: str
    """An error's code; hedged or raced when another one was first."""
    ms: float
    message: str


class RequestInfo(TypedDict):
    """One request of an application, when it was over."""

    id: str
    model: str
    code: str
    """ok, cancelled, or an error's code."""
    executor: str | None
    policy: str | None
    started_at_ms: int
    """Unix milliseconds."""
    ms: float
    first_ms: float | None
    asked: int
    raced: int
    hedged: bool
    attempts: list[AttemptInfo]
    choices: list[ChoiceInfo]
    """Empty in lists."""


class ModelExplanation(TypedDict):
    """Where a request for a model would go now."""

    model: str
    policy: str
    choice: ChoiceInfo
    error: str | None
    """What an application would be told, when nobody can be asked."""
    p95_first_ms: float | None
    """Of the model's last first tokens; None while there are fewer than 20."""
    budget_ms: float
    """How long a first byte is awaited while there are others to ask."""
    hedge: str
    """The setting: off, free, on."""


class Explanation(TypedDict):
    """The answer to ``lloomctl explain``: one of the two."""

    request: RequestInfo | None
    model: ModelExplanation | None

"""Going on with a streamed answer that was cut: whether it may, and what is asked of the next executor. Pure.

Source: PROTOCOL.md, Continuation; OpenAI's request objects.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import msgspec

from lloom_sidecar.errors import LloomError, PeerTimeoutError, PeerUnreachableError, RefusedError, StreamLostError
from lloom_sidecar.link.exchange import Call, Exchange
from lloom_sidecar.peers.selection import Wanted
from lloom_sidecar.protocol.continuation import continued
from lloom_sidecar.protocol.offers import RESUME
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .part import Part, Progress
from .router import MAX_ATTEMPTS

MAX_RESUMPTIONS: Final = 4
"""Times that one answer may go on elsewhere."""
MAX_STOPS: Final = 64
MAX_STOP_CHARACTERS: Final = 4096

_LIMITS: Final = ("max_tokens", "max_completion_tokens")
_FORMATS: Final = (
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"),
    *("grammar", "json_schema"),
)
"""Constraints that vLLM, SGLang and llama.cpp take besides ``response_format``."""
_THINKING: Final = ("reasoning", "reasoning_effort", "thinking", "think", "enable_thinking")


@dataclass(frozen=True, slots=True)
class Plan:
    """What one request means for going on with its answer."""

    operation: int
    document: dict[str, Any] = field(repr=False)
    stops: tuple[str, ...] = field(default=(), repr=False)
    obstacle: str = ""
    """Why a cut answer cannot go on, a word for ``lloom.not_resumed``; empty = it can."""


def plan_of(operation: int, body: bytes) -> Plan:
    """Read what matters of a body that was read before: it is JSON."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return Plan(operation, {}, obstacle="form")
    if operation == pb.OPERATION_COMPLETIONS:
        prompt = document.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1:
            document["prompt"] = prompt[0]
    stops = _stops_of(document)
    obstacle = _obstacle(operation, document) or ("form" if stops is None else "")
    return Plan(operation, document, stops or (), obstacle)


def _obstacle(operation: int, document: dict[str, Any]) -> str:
    if any((document.get(name) or 1) != 1 for name in ("n", "best_of")) or document.get("use_beam_search"):
        return "several_choices"
    if document.get("tools") or document.get("functions"):
        return "tools"
    logprobs = document.get("logprobs")  # a text completion's 0 asks for them
    if (logprobs is not None and logprobs is not False) or document.get("prompt_logprobs") is not None:
        return "logprobs"
    wanted_format = document.get("response_format")
    if wanted_format is not None and wanted_format != {"type": "text"}:
        return "response_format"
    if any(document.get(name) is not None for name in _FORMATS):
        return "response_format"
    template = document.get("chat_template_kwargs")
    switches = [document, template] if isinstance(template, dict) else [document]
    if any(one.get(name) not in (None, False, "none") for one in switches for name in _THINKING):
        return "reasoning"
    if any(not isinstance(document.get(name) or 0, int) for name in _LIMITS):
        return "form"
    if operation == pb.OPERATION_COMPLETIONS:
        is_plain = isinstance(document.get("prompt"), str) and not document.get("suffix") and not document.get("echo")
        return "" if is_plain else "form"
    if operation != pb.OPERATION_CHAT:
        return "form"
    messages = document.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict) or last.get("role") == "assistant" or document.get("continue_final_message"):
        return "form"  # an answer that was begun already, in one of several ways
    return ""


def _stops_of(document: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The stop strings, None when they are none that we understand."""
    found = document.get("stop")
    found = [found] if isinstance(found, str) else found or []
    if not isinstance(found, list) or len(found) > MAX_STOPS:
        return None
    if not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_CHARACTERS for one in found):
        return None
    return tuple(found)


def is_loss(error: LloomError) -> bool:
    """Whether an answer that ended with ``error`` was lost, rather than answered by an executor that cannot be
    believed: a wrong receipt or a broken rule throws doubt on the text that came before."""
    if isinstance(error, RefusedError):
        return error.retryable and error.code != "deadline"
    return isinstance(error, StreamLostError | PeerUnreachableError | PeerTimeoutError)


def is_exhausted(plan: Plan, progress: Progress) -> bool:
    """The text has as many tokens as it may have: only the end is missing."""
    given = [plan.document[name] for name in _LIMITS if plan.document.get(name) is not None]
    return any(limit <= progress.tokens for limit in given)


def body_after(plan: Plan, progress: Progress) -> bytes:
    """The body that asks for the rest of an answer. Raises ValueError when its text cannot travel as JSON."""
    document = plan.document
    if progress.text:
        document = continued(document, plan.operation, progress.text)
    for name in (*_LIMITS, "min_tokens"):
        value = document.get(name)
        if isinstance(value, int):
            document = {**document, name: max(0, value - progress.tokens)}
    return msgspec.json.encode(document)


class ResumedAnswer:
    """One answer, over as many executors as it takes. ``call`` and ``wanted`` are what to ask for next."""

    def __init__(self, call: Call, wanted: Wanted) -> None:
        self.call = call
        self.wanted = wanted
        self._first = call, wanted
        self._plan = plan_of(call.operation, call.body)
        self._progress = Progress()
        self._parts: dict[Exchange, tuple[Part, bytes]] = {}
        """Part and the digest of its executor's weights, of every executor that is answering."""
        self._digest = b""
        self._resumptions = 0
        self._spent = 0
        self._loss: LloomError | None = None

    def begin_part(self, exchange: Exchange, digest: bytes) -> Part:
        """``exchange`` begins to answer ``call``; of several at once one may be committed to. ``digest``: of its
        executor's weights, b"" = unknown."""
        part = Part(self._plan.operation, self._plan.stops, self._progress)
        self._parts[exchange] = part, digest
        return part

    def lose(self, error: LloomError, winner: Exchange | None, attempts: int, seconds_left: float) -> bytes:
        """The answer was cut by ``error`` while ``winner`` gave it, or nobody could be found to go on (None).

        ``attempts``: executors that failed at this request so far, of which there may be ``MAX_ATTEMPTS``.
        ``seconds_left``: until the request's deadline.

        Returns:
            b"" when ``call`` and ``wanted`` now ask for the rest; else the end of the answer: only that is missing.

        Raises:
            LloomError: ``error``, or the loss before it. ``details["not_resumed"]`` says why it could not go on.
        """
        if winner is None:
            if self._loss is None:
                raise error
            self._loss.details["not_resumed"] = "no_executor"
            raise self._loss from error
        part, digest = self._parts[winner]
        self._parts.clear()
        self._progress = progress = part.progress
        self._digest = self._digest or digest
        call, wanted = self._first
        if winner.sent.checkpoint is not None:
            self._spent += winner.sent.checkpoint.claims.cost
        cost_left = None if call.max_cost is None else call.max_cost - self._spent
        obstacle = self._obstacle(error, attempts, cost_left)
        if obstacle:
            error.details["not_resumed"] = obstacle
            raise error
        if is_exhausted(self._plan, progress):
            return part.ending("length")
        self._loss = error
        self._resumptions += 1
        needs_ability = call.operation == pb.OPERATION_CHAT and progress.text
        self.call = replace(
            call,
            body=body_after(self._plan, progress),
            deadline_ms=max(1, round(seconds_left * 1000)),
            idempotency_key=part_key(call.idempotency_key, self._resumptions),
            max_cost=cost_left,
        )
        self.wanted = replace(
            wanted,
            digest=self._digest,
            features=wanted.features | {RESUME} if needs_ability else wanted.features,
            excluded=wanted.excluded | {winner.peer},
        )
        return b""

    def _obstacle(self, error: LloomError, attempts: int, cost_left: int | None) -> str:
        """Why the answer cannot go on after ``error``, "" when it can."""
        if not is_loss(error):
            return "not_lost"
        if self._plan.obstacle or self._progress.obstacle:
            return self._plan.obstacle or self._progress.obstacle
        if self._resumptions >= MAX_RESUMPTIONS or attempts >= MAX_ATTEMPTS:
            return "too_often"
        if not self._digest:
            return "weights_unknown"
        return "max_cost" if cost_left is not None and cost_left <= 0 else ""


def part_key(key: bytes, number: int) -> bytes:
    """The idempotency key of a later part, numbered from 1: SHA-256(key ‖ number). One exchange is owed per key, and so
    one of each part."""
    return hashlib.sha256(key + bytes([number])).digest()

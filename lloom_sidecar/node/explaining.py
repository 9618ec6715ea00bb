"""Where requests go and why, for the admin API."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from lloom_sidecar.admin.explaining import (
    AttemptInfo,
    CandidateInfo,
    ChoiceInfo,
    Explanation,
    ModelExplanation,
    RequestInfo,
)
from lloom_sidecar.client.api import OpenAiApi
from lloom_sidecar.client.records import RequestRecord
from lloom_sidecar.errors import RequestError
from lloom_sidecar.ids import check_model_id
from lloom_sidecar.peers.health import HealthBook
from lloom_sidecar.peers.selection import Choice, Considered, Policy

if TYPE_CHECKING:
    from .node import Node


class Explainer:
    """Explains one node's routing."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def requests(self) -> list[RequestInfo]:
        """The last requests of applications, newest first, without choices."""
        found: list[RequestInfo] = [_request(record, with_choices=False) for record in self._api().records]
        found.reverse()
        return found

    def explain(self, what: str, policy: str | None) -> Explanation:
        """A request by its id, or else what would be chosen for a model now. Raises RequestError, ValueError."""
        api = self._api()
        record = api.records.get(what.lower())
        if record is not None:
            return Explanation(request=_request(record, with_choices=True), model=None)
        return Explanation(request=None, model=self._model(api, check_model_id(what), policy))

    def _model(self, api: OpenAiApi, model: str, policy: str | None) -> ModelExplanation:
        if not self._node.control.book.seen_model(model, trio.current_time()):
            raise RequestError(
                f"{model} is neither a model that is offered nor one of the last requests: `lloomctl model list` and "
                "`lloomctl request list` show them",
                code="not_found",
                http_status=404,
            )
        choice, by, hedge = api.explain(model, _policy(policy))
        health: HealthBook = self._node.health_book
        p95_s = health.p95_ttft_s(model)
        return ModelExplanation(
            model=model,
            policy=by.value.replace("_", "-"),
            choice=_choice(choice),
            error=None if choice.pick is not None else choice.error(model).message,
            p95_first_ms=None if p95_s is None else _ms(p95_s),
            budget_ms=_ms(health.first_byte_budget_s(model)),
            hedge=hedge.value,
        )

    def _api(self) -> OpenAiApi:
        api = self._node.api
        if api is None:
            raise RequestError("this node has no applications: it is not run with --role client")
        return api


def _policy(text: str | None) -> Policy | None:
    try:
        return None if text is None else Policy(text.lower().replace("-", "_"))
    except ValueError:
        known = ", ".join(one.value.replace("_", "-") for one in Policy)
        raise ValueError(f"{text!r} is no policy; there are {known}") from None


def _request(record: RequestRecord, *, with_choices: bool) -> RequestInfo:
    return RequestInfo(
        id=record.request_id,
        model=record.model,
        code=record.code,
        executor=None if record.executor is None else str(record.executor),
        policy=None if record.policy is None else record.policy.value.replace("_", "-"),
        started_at_ms=record.started_at_ms,
        ms=_ms(record.seconds),
        first_ms=None if record.first_s is None else _ms(record.first_s),
        asked=record.asked,
        raced=record.raced,
        hedged=record.is_hedged,
        attempts=[
            AttemptInfo(
                executor=one.executor, stage=one.stage, reason=one.reason, ms=round(one.ms, 3), message=one.message
            )
            for one in record.attempts
        ],
        choices=[_choice(one) for one in record.choices] if with_choices else [],
    )


def _choice(choice: Choice) -> ChoiceInfo:
    usable_first = sorted(choice.considered, key=lambda one: (one.filtered is not None, one.cost))
    return ChoiceInfo(
        rule=choice.rule.value,
        picks=[str(view.peer) for view in choice.picks],
        candidates=[_candidate(one) for one in usable_first],
        complete=choice.is_complete,
    )


def _candidate(one: Considered) -> CandidateInfo:
    view, offer = one.view, one.view.offer
    return CandidateInfo(
        peer=str(view.peer),
        filtered=None if one.filtered is None else one.filtered.value,
        state=view.state(trio.current_time()).value,
        path="relayed" if view.is_relayed else "direct",
        estimate_ms=_ms(one.estimate_s),
        in_flight=one.in_flight,
        slots=offer.slots,
        score_ms=_ms(one.cost),
        due=one.is_due,
        wait_s=round(one.wait_s, 3),
        context_length=offer.context_length,
        price={
            "prompt_per_million": offer.price.prompt_per_million,
            "completion_per_million": offer.price.completion_per_million,
            "currency": offer.price.currency,
        },
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)

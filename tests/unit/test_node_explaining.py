"""What the node says of its routing: on a real router, peer book and health book."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lloom_sidecar.client.api import ApiSettings, OpenAiApi
from lloom_sidecar.client.records import MAX_CHOICES, RequestRecords
from lloom_sidecar.client.route import Route
from lloom_sidecar.errors import RequestError
from lloom_sidecar.node.explaining import Explainer
from lloom_sidecar.peers.hedging import Hedge
from lloom_sidecar.peers.selection import Policy
from lloom_sidecar.protocol.offers import Price
from tests.fakes.router_bench import BUSY, Bench


def node_of(b: Bench, **settings: Any) -> tuple[Explainer, OpenAiApi]:
    api = OpenAiApi(
        router=b.router, book=b.book, settings=ApiSettings(**settings), observer=cast("Any", None), started_at_s=0
    )
    node = SimpleNamespace(api=api, control=SimpleNamespace(book=b.book), health_book=b.health)
    return Explainer(cast("Any", node)), api


async def test_a_model() -> None:
    b = Bench()
    dear, cheap = b.add(1, price=Price(9, 9, "EUR"), context=2048), b.add(2, price=Price(1, 1, "EUR"))
    explainer, _ = node_of(b, max_price=Price(5, 5, "EUR"), hedge=Hedge.FREE)
    found = explainer.explain("m", None)["model"]
    assert found is not None
    assert (found["policy"], found["hedge"], found["p95_first_ms"], found["error"]) == ("adaptive", "free", None, None)
    assert found["choice"]["picks"] == [str(cheap)]
    usable, filtered = found["choice"]["candidates"]
    assert (usable["peer"], usable["filtered"], usable["score_ms"]) == (str(cheap), None, 250.0)
    assert (filtered["peer"], filtered["filtered"], filtered["context_length"]) == (str(dear), "price", 2048)
    b.measured(0.1, cheap)
    found = explainer.explain("m", "round-robin")["model"]
    assert found is not None
    assert (found["policy"], found["p95_first_ms"], found["choice"]["rule"]) == ("round-robin", 100.0, "policy")


async def test_asking_changes_no_choice() -> None:
    b = Bench()
    for n in range(1, 5):
        b.add(n)
    explainer, _ = node_of(b)
    state = b.router._rng.getstate()
    explainer.explain("m", None)
    assert b.router._rng.getstate() == state
    assert len(b.health) == 0


async def test_when_nobody_can_be_asked() -> None:
    b = Bench()
    b.add(1, price=Price(9, 9, "EUR"))
    explainer, _ = node_of(b, max_price=Price(5, 5, "EUR"))
    found = explainer.explain("m", None)["model"]
    assert found is not None
    assert found["choice"]["picks"] == []
    assert "price ceiling" in str(found["error"])


async def test_what_is_not_known() -> None:
    explainer, _ = node_of(Bench())
    with pytest.raises(RequestError, match="neither a model") as caught:
        explainer.explain("x", None)
    assert caught.value.http_status == 404
    with pytest.raises(ValueError, match="model id"):
        explainer.explain("\n", None)
    b = Bench()
    b.add(1)
    with pytest.raises(ValueError, match="round-robin"):
        node_of(b)[0].explain("m", "best")
    with pytest.raises(RequestError, match="--role client"):
        Explainer(cast("Any", SimpleNamespace(api=None))).requests()


async def test_a_request_and_the_list() -> None:
    b = Bench()
    failing = b.add(1, BUSY)
    good = b.add(2)
    route = await b.run(pinned=frozenset({failing, good}))
    route.model = "m"
    explainer, api = node_of(b)
    for number in range(2):
        api.records.add(route, request_id=f"{number:032x}", started_at_ms=number, seconds=1.5, code="ok")
    first, second = explainer.requests()
    assert (first["id"], second["id"], first["choices"]) == (f"{1:032x}", f"{0:032x}", [])
    found = explainer.explain(f"{1:032x}".upper(), None)["request"]
    assert found is not None
    assert (found["executor"], found["policy"]) == (str(good), "round-robin")
    assert (found["ms"], found["asked"]) == (1500.0, len(b.asked))
    assert [one["reason"] for one in found["attempts"]] == ["peer_busy"] * (len(b.asked) - 1)
    assert len(found["choices"]) == len(b.asked)
    assert {one["peer"] for one in found["choices"][0]["candidates"]} == {str(failing), str(good)}


def test_the_ring_is_bounded() -> None:
    records = RequestRecords(limit=3)
    route = Route(0.0, choices=[cast("Any", None)] * 50, policy=Policy.RACE)
    for number in range(10):
        records.add(route, request_id=str(number), started_at_ms=0, seconds=0.0, code="cancelled")
    assert [one.request_id for one in records] == ["7", "8", "9"]
    found = records.get("9")
    assert found is not None
    assert (len(found.choices), found.first_s, records.get("0")) == (MAX_CHOICES, None, None)

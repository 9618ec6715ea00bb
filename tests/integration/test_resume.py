"""Streams that are cut in the middle and go on elsewhere, over a real network: the text is the uncut one, always."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.harness import Network
from tests.harness.cut_streams import cut_at_random, read, text_of, wait_can_resume
from tests.harness.waiting import wait_until

WEIGHTS = "5" * 64
OTHER_WEIGHTS = "6" * 64
STREAMS = 24
"""Cut at random; `make soak` does hundreds."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    flags = ["--heartbeat", "1", "--model-digest", WEIGHTS]
    with Network(validators=1, executors=3, clients=1, flags=flags) as network:
        wait_can_resume(network, network.executors)
        yield network


def test_streams_that_are_cut_at_random_have_their_uncut_text(network: Network) -> None:
    found = cut_at_random(network.client, STREAMS)
    resumed = [len(one.resumed_at) for one in found]
    print(f"{len(found)} streams, {sum(map(bool, resumed))} of them resumed, {sum(resumed)} times")
    assert sum(map(bool, resumed)) > STREAMS / 2


def test_a_killed_executor(network: Network) -> None:
    chunks = 300
    events = 0
    with openai.OpenAI(base_url=f"{network.client.api}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="scripted",
            messages=[{"role": "user", "content": f"seed=7 chunks={chunks} delay_ms=10"}],
            stream=True,
            stream_options={"include_usage": True},
            extra_headers={"x-lloom-resume": "on"},
        )
        victim = network.node_of(stream.response.headers["x-lloom-executor"])
        text, finish, usage = "", None, None
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
            events += 1
            if events == 20:
                victim.kill()
    assert text == text_of(7, chunks)
    assert finish == "stop"
    assert usage is not None
    assert usage.completion_tokens == chunks
    victim.start()
    wait_can_resume(network, network.executors)


def test_each_part_of_a_priced_answer_is_settled_for_itself(network: Network) -> None:
    """The part that was cut owes its last checkpoint, the other one its receipt."""
    client = network.client
    for executor in network.executors:
        assert executor.ctl("executor", "price", "scripted", "0/1000000 EUR").returncode == 0
    try:
        found = read(client, "seed=5 chunks=1300 cut=1200", max_price="0/9000000 EUR", max_tokens=1300)
        assert (found.text, found.error) == (text_of(5, 1300), {})
    finally:
        for executor in network.executors:
            assert executor.ctl("executor", "price", "scripted", "free").returncode == 0

    def of_it() -> list[dict[str, Any]]:
        listed = json.loads(client.ctl("receipt", "list", "--role", "client", "--json").stdout)["receipts"]
        return [one for one in listed if one["request_id"] == found.headers["x-request-id"]]

    second, first = wait_until(lambda: len(of_it()) == 2 and of_it(), "both parts to be settled")
    assert (first["owed"], first["outcome"], second["owed"], second["outcome"]) == (True, "partial", True, "complete")
    assert 1000 < first["cost"] <= 1200
    assert second["cost"] == 100
    assert first["peer"] != second["peer"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"reasoning_effort": "low"}, "reasoning"),
    ],
)
def test_an_answer_that_cannot_go_on_says_why(network: Network, more: dict[str, Any], reason: str) -> None:
    found = read(network.client, "chunks=9 cut=4", **more)
    assert found.text == " w0 w1 w2 w3"
    assert found.is_cut
    assert (found.has_ended, found.finish) == (False, "")
    assert (found.error["lloom"]["code"], found.error["lloom"]["not_resumed"]) == ("backend_unavailable", reason)


def test_without_being_asked_nothing_is_resumed(network: Network) -> None:
    for resume in (None, "off"):
        found = read(network.client, "chunks=9 cut=4", resume=resume)
        assert found.is_cut
        assert "not_resumed" not in found.error["lloom"]
    assert read(network.client, "chunks=1", resume="maybe").error["code"] == "invalid_request"


def test_other_weights_never_go_on() -> None:
    with Network(validators=1, executors=0, clients=1, flags=["--heartbeat", "1"]) as network:
        for digest in (WEIGHTS, OTHER_WEIGHTS):
            network.executors.append(network.add("executor", "--model-digest", digest))
        network.wait_known(network.client)
        wait_can_resume(network, network.executors)
        found = read(network.client, "chunks=9 cut=4")
        assert found.is_cut
        assert found.error["lloom"]["not_resumed"] == "no_executor"
        unknown = network.add("executor")
        network.wait_known(network.client, [unknown])
        found = read(network.client, "chunks=9 cut=4", pin=unknown.peer)
        assert found.is_cut
        assert found.error["lloom"]["not_resumed"] == "weights_unknown"

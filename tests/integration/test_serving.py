"""The main job on real nodes: requests through two p2pd to a backend and back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.harness import Network
from tests.harness.waiting import wait_until


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(validators=1, executors=2, clients=1) as network:
        yield network


def events_of(answer: httpx.Response) -> list[str]:
    return [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]


def test_a_streamed_chat_arrives_whole_and_in_order(network: Network) -> None:
    with network.client.stream("chunks=20") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-lloom-executor"] in {node.peer for node in network.executors}
        assert answer.headers["x-lloom-attempts"] == "1"
        events = events_of(answer)
    assert events[-1] == "[DONE]"
    text = "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events[:-1])
    assert text == "".join(f" w{i}" for i in range(20))
    # Usage was not asked for: the chunk that the executor added for itself does not travel.
    assert not any('"usage"' in event for event in events)


def test_usage_comes_when_asked_for(network: Network) -> None:
    with network.client.stream("chunks=3", stream_options={"include_usage": True}) as answer:
        events = events_of(answer)
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 3


def test_an_unstreamed_chat_is_one_document_with_unknown_fields(network: Network) -> None:
    answer = network.client.chat("chunks=4", temperature=0.1, some_new_field={"a": [1]})
    assert answer.status_code == 200
    document = answer.json()
    assert document["object"] == "chat.completion"
    assert document["choices"][0]["message"] == {"role": "assistant", "content": " w0 w1 w2 w3"}
    assert document["choices"][0]["finish_reason"] == "stop"
    assert document["system_fingerprint"] == "fp"
    assert document["usage"]["total_tokens"] == 7
    backend = network.backend_of(answer.headers["x-lloom-executor"])
    assert backend.requests()[-1]["body"]["some_new_field"] == {"a": [1]}


def test_completions_and_embeddings(network: Network) -> None:
    answer = network.client.post("/v1/completions", {"model": "scripted", "prompt": "chunks=2"})
    assert answer.json()["choices"][0]["text"] == " w0 w1"
    answer = network.client.post("/v1/embeddings", {"model": "scripted", "input": "hello"})
    assert answer.json()["data"][0]["embedding"] == [0.5, -0.25]


def test_the_receipt_of_each_answer_can_be_read(network: Network) -> None:
    answer = network.client.chat("chunks=4")
    with network.client.admin() as admin:
        receipt = admin.receipt(answer.headers["x-request-id"])
    assert receipt["claims"]["executor"] == answer.headers["x-lloom-executor"]
    assert receipt["claims"]["client"] == network.client.peer
    assert receipt["claims"]["completion_tokens"] == 4
    assert receipt["claims"]["answer_bytes"] == len(answer.content)


def test_models_are_listed_and_an_unknown_one_is_404(network: Network) -> None:
    listed = httpx.get(f"{network.client.api}/v1/models", trust_env=False).json()
    assert [one["id"] for one in listed["data"]] == ["scripted"]
    assert listed["data"][0]["lloom"]["executors"] == 2
    one = httpx.get(f"{network.client.api}/v1/models/scripted", trust_env=False)
    assert one.json()["id"] == "scripted"
    answer = network.client.chat("hi", model="no/such:model")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_backends_refusal_of_the_request_passes_through(network: Network, status: int) -> None:
    answer = network.client.chat(f"status={status}")
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"] == "scripted refusal"
    assert [a["reason"] for a in error["lloom"]["attempts"]] == ["backend_rejected"]


@pytest.mark.parametrize("status", [401, 404, 429, 500, 503])
def test_a_backends_own_failure_moves_on_and_then_says_so(network: Network, status: int) -> None:
    answer = network.client.chat(f"status={status}")
    assert answer.status_code in (status, 502, 503)
    tried = [a["executor"] for a in answer.json()["error"]["lloom"]["attempts"]]
    assert len(tried) == len(set(tried)) == 2
    assert answer.headers["x-should-retry"] == "false"


def test_a_cut_answer_never_looks_finished(network: Network) -> None:
    events: list[str] = []

    def read_all() -> None:
        with network.client.stream("chunks=10 cut=4 delay_ms=5") as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:])

    with pytest.raises(httpx.RemoteProtocolError):
        read_all()
    assert "[DONE]" not in events
    assert 'finish_reason":"' not in "".join(events)
    error = json.loads(events[-1])["error"]
    assert error["lloom"]["code"] == "backend_unavailable"


def test_an_app_that_leaves_stops_the_backend(network: Network) -> None:
    with network.client.stream("chunks=1000 delay_ms=20") as answer:
        lines = answer.iter_lines()
        for _ in range(5):
            next(lines)
        backend = network.backend_of(answer.headers["x-lloom-executor"])
        left_at = time.time()
    ended = wait_until(lambda: [r for r in backend.requests()[-1:] if r["outcome"]], "the backend to stop")[0]
    assert ended["outcome"] == "gone"
    assert ended["ended_at"] - left_at < 0.5


def test_an_app_that_leaves_an_unstreamed_request_stops_the_backend(network: Network) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{network.client.api}/v1/chat/completions",
            json={"model": "scripted", "messages": [{"role": "user", "content": "chunks=1000 delay_ms=20"}]},
            timeout=httpx.Timeout(5, read=0.4),
            trust_env=False,
        )
    left_at = time.time()

    def gone() -> list[dict[str, object]]:
        last = [b.requests()[-1] for b in network.backends if b.requests()]
        return [r for r in last if r["outcome"] == "gone" and float(r["ended_at"]) > left_at - 0.1]

    ended = wait_until(gone, "the backend to stop")[0]
    assert float(str(ended["ended_at"])) - left_at < 0.5

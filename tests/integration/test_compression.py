"""Compression between real nodes: agreed in hello, and nothing compressed goes to a node that did not say so."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest
from backports import zstd

from lloom_sidecar.protocol.compression import compress
from tests.harness import Network
from tests.harness.node import Node

PROMPT = {"model": "scripted", "messages": [{"role": "user", "content": "chunks=400 " + "One more sentence. " * 3000}]}


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """The second executor has compression off, the third compresses streams too."""
    with Network(validators=1, executors=1, clients=1) as network:
        network.executors.append(network.add("executor", "--compression", "off"))
        network.executors.append(network.add("executor", "--compression", "all"))
        network.wait_known(network.client)
        yield network


def rss(node: Node) -> int:
    assert node.process is not None
    return int(psutil.Process(node.process.pid).memory_info().rss)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_every_mix_of_settings_gives_the_same_answer(network: Network, which: int, stream: bool) -> None:
    executor = network.executors[which]
    answer = network.client.post(
        "/v1/chat/completions", {**PROMPT, "stream": stream}, headers={"x-lloom-pin-executor": executor.peer}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-lloom-executor"] == executor.peer
    words = "".join(f" w{i}" for i in range(400))
    if stream:
        events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
        assert events[-1] == "[DONE]"
        deltas = [choice["delta"] for event in events[:-1] for choice in json.loads(event)["choices"]]
        assert "".join(delta.get("content") or "" for delta in deltas) == words
    else:
        assert answer.json()["choices"][0]["message"]["content"] == words


@pytest.mark.parametrize(("coding", "pack"), [("zstd", compress), ("gzip", gzip.compress)])
def test_an_application_may_compress_its_body(network: Network, coding: str, pack: Callable[[bytes], bytes]) -> None:
    body = pack(json.dumps(PROMPT).encode())
    headers = {"content-encoding": coding, "content-type": "application/json"}
    answer = httpx.post(f"{network.client.api}/v1/chat/completions", content=body, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text


def test_a_bomb_of_an_application_is_refused_in_small_memory(network: Network) -> None:
    before = rss(network.client)
    bomb = zstd.compress(bytes(1 << 30))
    for _ in range(5):
        headers = {"content-encoding": "zstd", "content-type": "application/json"}
        answer = httpx.post(f"{network.client.api}/v1/chat/completions", content=bomb, headers=headers, timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert rss(network.client) - before < 200 << 20

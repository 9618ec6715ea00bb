"""What an executor takes, from whom, and what applications see of it: on real nodes, through HTTP."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.harness import Network, Node, ScriptedBackend
from tests.harness.waiting import wait_until


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two clients and three executors, each with a model and limits of its own."""
    with Network(validators=1, executors=0, clients=2) as network:
        preferred = network.clients[1].peer
        flags = {
            "rated": ["--peer-rate", "0.02"],
            "small": ["--slots", "2", "--queue-limit", "2", "--priority-peer", preferred],
            "brief": ["--grace", "5"],
        }
        for model, more in flags.items():
            network.executors.append(network.add("executor", "--model-alias", model, *more, start=False))
            network.executors[-1].start(wait=False)
        for node in network.executors:
            node.wait_up()
        for client in network.clients:
            network.wait_known(client)
        yield network


def code_of(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


def prompts(backend: ScriptedBackend) -> list[str]:
    """What came to the backend, in order."""
    return [one["body"]["messages"][-1]["content"] for one in backend.requests()]


class Later:
    """A chat in a thread of its own."""

    def __init__(self, client: Node, prompt: str, model: str) -> None:
        self.answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._run, args=(client, prompt, model), daemon=True)
        self._thread.start()

    def _run(self, client: Node, prompt: str, model: str) -> None:
        self.answer = client.chat(prompt, model=model)

    def status(self) -> int:
        self._thread.join(60)
        assert self.answer is not None
        return self.answer.status_code


def test_each_client_has_its_rate_and_all_together_have_one(network: Network) -> None:
    first, second = network.clients
    rated = network.executors[0]
    assert first.chat("chunks=1", model="rated").status_code == 200
    refused = first.chat("chunks=1", model="rated")
    assert (refused.status_code, code_of(refused)) == (429, "peer_rate")
    assert 1 <= int(refused.headers["retry-after"]) <= 50
    assert refused.headers["x-should-retry"] == "false"
    assert [one["reason"] for one in refused.json()["error"]["lloom"]["attempts"]] == ["peer_rate"]
    assert rated.metric("lloom_refused_total", code="peer_rate") == 1
    assert second.chat("chunks=1", model="rated").status_code == 200

    # The application hears of it only when no other executor can take its request.
    capped = network.add("executor", "--model-alias", "rated", "--global-rate", "0.02")
    network.wait_known(first, [capped])
    network.wait_known(second, [capped])
    answer = second.chat("chunks=1", model="rated")
    assert (answer.status_code, answer.headers["x-lloom-executor"]) == (200, capped.peer)
    refused = first.chat("chunks=1", model="rated")
    assert (refused.status_code, code_of(refused)) == (503, "global_rate")
    assert 1 <= int(refused.headers["retry-after"]) <= 50


def test_whose_turn_it_is(network: Network) -> None:
    """Every slot is taken; one client's requests fill the queue, the priority client's goes in front of them."""
    crowd, preferred = network.clients
    node, backend = network.executors[1], network.backends[1]

    def queued() -> int:
        return int(node.status()["requests"]["queued"])

    with ExitStack() as streams:
        long, pieces = [], []
        for i in range(2):
            stream = ExitStack()
            streams.enter_context(stream)
            answer = stream.enter_context(crowd.stream(f"chunks=2000 delay_ms=50 long={i}", model="small"))
            pieces.append(answer.iter_raw())
            next(pieces[-1])
            long.append(stream)
        waiting = [Later(crowd, f"chunks=1 crowd={i}", "small") for i in range(2)]
        wait_until(lambda: queued() == 2, "the crowd to wait")
        refused = crowd.chat("chunks=1 crowd=9", model="small")
        assert (refused.status_code, code_of(refused)) == (503, "busy")
        assert int(refused.headers["retry-after"]) >= 1
        own = Later(preferred, "chunks=1 preferred=1", "small")
        wait_until(lambda: queued() == 3, "the priority client's request to wait")
        assert len(backend.requests()) == 2
        long[0].close()
        assert own.status() == 200
        # The slot that it had is kept for it; the crowd's go on in the other one.
        assert [one.answer for one in waiting] == [None, None]
        long[1].close()
        assert [one.status() for one in waiting] == [200, 200]
        assert [text.split()[-1] for text in prompts(backend)][2] == "preferred=1"
        assert node.metric("lloom_queue_wait_seconds_count") == 5
        assert node.metric("lloom_refused_total", code="busy") >= 1


def test_drain_and_resume(network: Network) -> None:
    client = network.client
    node = network.executors[2]

    def ctl(*args: str) -> Any:
        done = node.ctl("executor", *args)
        assert done.returncode == 0, done.stderr
        return done

    with client.stream("chunks=60 delay_ms=50", model="brief") as answer:
        lines = answer.iter_lines()
        next(lines)
        assert "still under way: 1 request" in ctl("drain", "--stay").stderr
        assert "executor_paused" in node.conditions()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    wait_until(lambda: node.peer not in client.executors(), "the removal to be known")
    assert client.chat("chunks=1", model="brief").status_code == 503
    assert "takes work again" in ctl("resume").stderr
    assert "executor_paused" not in node.conditions()
    network.wait_known(client, [node])
    assert client.chat("chunks=1", model="brief").status_code == 200
    assert node.is_running


def test_what_outlasts_the_grace_of_a_drain_is_cut(network: Network) -> None:
    node, backend = network.executors[2], network.backends[2]
    with network.client.stream("chunks=4000 delay_ms=50", model="brief") as answer:
        lines = answer.iter_lines()
        next(lines)
        assert node.ctl("executor", "drain", "--stay").returncode == 0
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    before = len(backend.requests())
    assert backend.wait_ended(before)[-1]["outcome"] == "gone"
    assert node.ctl("executor", "resume").returncode == 0
    network.wait_known(network.client, [node])
    assert network.client.chat("chunks=1", model="brief").status_code == 200

"""One network whose nodes run different daemons: Lloom's p2pd, and the unmodified upstream one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import psutil
import pytest

from tests.contract.binaries import p2pd_upstream
from tests.harness import Network, Node
from tests.harness.waiting import wait_until

__all__ = ["p2pd_upstream"]


@dataclass
class Mixed:
    """Two executors and two clients; of each pair one runs on each daemon."""

    network: Network
    ours: tuple[Node, Node]
    """(executor, client)"""
    stock: tuple[Node, Node]


@pytest.fixture(scope="module")
def mixed(p2pd_upstream: object) -> Iterator[Mixed]:
    # A quick heartbeat: gossip is how the clients learn of executors that start after them.
    with Network(validators=1, executors=1, clients=1, flags=["--heartbeat", "1"]) as network:
        stock = ["--p2pd", str(p2pd_upstream)]
        network.executors.append(network.add("executor", *stock))
        network.clients.append(network.add("client", *stock))
        for client in network.clients:
            network.wait_known(client, timeout_s=30)
        yield Mixed(network, (network.executors[0], network.clients[0]), (network.executors[1], network.clients[1]))


def ask(client: Node, executor: Node) -> None:
    """A streamed and an unstreamed answer from that executor."""
    pin = {"x-lloom-pin-executor": executor.peer}
    body = {"model": "scripted", "messages": [{"role": "user", "content": "chunks=40"}]}
    answer = client.post("/v1/chat/completions", body, headers=pin)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-lloom-executor"] == executor.peer
    text = "".join(f" w{i}" for i in range(40))
    assert answer.json()["choices"][0]["message"]["content"] == text
    answer = client.post("/v1/chat/completions", {**body, "stream": True}, headers=pin)
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in events[:-1]) == text


@pytest.mark.parametrize("client", ["ours", "stock"])
@pytest.mark.parametrize("executor", ["ours", "stock"])
def test_every_pair_of_daemons_serves(mixed: Mixed, client: str, executor: str) -> None:
    ask(getattr(mixed, client)[1], getattr(mixed, executor)[0])


def test_an_application_that_leaves_stops_the_backend_behind_a_stock_p2pd(mixed: Mixed) -> None:
    executor, client = mixed.stock[0], mixed.ours[1]
    backend = mixed.network.backend_of(executor.peer)
    body = {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": "chunks=5000 delay_ms=20"}]}
    with httpx.Client(timeout=30, trust_env=False) as http:
        request = http.build_request(
            "POST",
            f"{client.api}/v1/chat/completions",
            json=body,
            headers={"x-lloom-pin-executor": executor.peer},
        )
        answer = http.send(request, stream=True)
        next(answer.iter_lines())
        answer.close()
    ended = wait_until(lambda: [r for r in backend.requests()[-1:] if r["outcome"]], "the backend to stop")
    assert ended[0]["outcome"] == "gone"


def test_status_says_what_a_stock_p2pd_lacks(mixed: Mixed) -> None:
    for node in mixed.stock:
        wait_until(lambda node=node: "p2pd_stock" in node.conditions(), "the condition")  # type: ignore[misc]
        status = node.status()
        assert "exit_with_parent" not in status["p2pd"]["features"]
        shown = node.ctl("status")
        assert "p2pd_stock" in shown.stdout + shown.stderr
    for node in (*mixed.ours, *mixed.network.validators):
        assert "p2pd_stock" not in node.conditions()


@pytest.mark.parametrize("index", [0, 1], ids=["executor", "client"])
def test_a_stock_p2pd_that_outlived_its_sidecar_is_ended_at_the_next_start(mixed: Mixed, index: int) -> None:
    node = mixed.stock[index]
    pid = node.pid_of("p2pd")
    old = psutil.Process(pid)
    node.kill()
    assert old.is_running(), "a stock p2pd ends with its parent?"
    node.start()
    assert not old.is_running() or old.status() == psutil.STATUS_ZOMBIE
    assert node.pid_of("p2pd") != pid
    assert any(line["event"] == "p2pd_leftover_ended" and line["pid"] == pid for line in node.log())
    for client in mixed.network.clients:
        mixed.network.wait_known(client, timeout_s=30)
    ask(mixed.ours[1], mixed.stock[0])
    ask(mixed.stock[1], mixed.ours[0])

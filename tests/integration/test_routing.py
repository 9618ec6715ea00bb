"""Policies, races, hedges, pins and what explains them; executors that fall silent; a single one that restarts."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.harness import Network, Node
from tests.harness.waiting import wait_until

BACK_S = 40.0
"""How long a node may take until it is used again."""
PATIENCE_S = 30.0
"""Far more than a silent executor may cost a request: it would be 10 s for a stream that PING finds dead."""


def ask(client: Node, prompt: str, **headers: str) -> httpx.Response:
    """One unstreamed chat with headers; their underscores are dashes."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": prompt}]}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = client.post("/v1/chat/completions", body, headers=names)
    assert answer.status_code == 200, answer.text
    return answer


numbers = itertools.count()


def fresh(script: str) -> str:
    """A conversation that nobody has in a cache."""
    return f"{next(numbers)} {script}"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(validators=1, executors=2, clients=1, flags=["--heartbeat", "1"]) as network:
        yield network


def test_round_robin_and_pinning(network: Network) -> None:
    client = network.client
    served = [ask(client, fresh("chunks=1"), x_lloom_policy="round-robin").headers for _ in range(6)]
    order = [headers["x-lloom-executor"] for headers in served]
    assert set(order[::2]) | set(order[1::2]) == {node.peer for node in network.executors}
    assert len(set(order[::2])) == len(set(order[1::2])) == 1
    for node in network.executors:
        for _ in range(3):
            answer = ask(client, fresh("chunks=1"), x_lloom_pin_executor=node.peer)
            assert answer.headers["x-lloom-executor"] == node.peer


def race(client: Node, prompt: str) -> tuple[httpx.Headers, str]:
    """(headers, text) of a streamed answer that was raced for."""
    body = {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": prompt}]}
    url = f"{client.api}/v1/chat/completions"
    with (
        httpx.Client(timeout=60, trust_env=False) as http,
        http.stream("POST", url, json=body, headers={"x-lloom-policy": "race"}) as answer,
    ):
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return answer.headers, "".join(json.loads(one)["choices"][0]["delta"].get("content", "") for one in lines[:-1])


def test_a_race_has_one_winner_and_the_loser_stops(network: Network) -> None:
    client = network.client
    tag = next(numbers)
    headers, text = race(client, f"tag={tag} chunks=100 delay_ms=20 first_ms=50")
    assert text == "".join(f" {tag}.{i}" for i in range(100))
    assert (headers["x-lloom-raced"], headers["x-lloom-attempts"]) == ("2", "2")

    def outcomes(node: Node) -> list[str | None]:
        log = network.backend_of(node.peer).requests()
        return [request["outcome"] for request in log if request["script"].get("tag") == tag]

    winner = network.node_of(headers["x-lloom-executor"])
    (loser,) = [node for node in network.executors if node is not winner]
    assert outcomes(winner) == ["complete"]
    assert set(outcomes(loser)) <= {"gone"}  # none if it was cancelled before its backend heard of it
    told = json.loads(client.ctl("explain", headers["x-request-id"], "--json").stdout)["request"]
    assert (told["raced"], told["policy"], told["code"]) == (2, "race", "ok")
    assert [one["reason"] for one in told["attempts"]] == ["raced"]


def test_an_unstreamed_race(network: Network) -> None:
    for _ in range(10):
        answer = ask(network.client, fresh("chunks=5"), x_lloom_policy="race")
        assert answer.json()["choices"][0]["message"]["content"] == " w0 w1 w2 w3 w4"
        assert answer.headers["x-lloom-raced"] == "2"


def test_a_slow_first_token_is_hedged(network: Network) -> None:
    client = network.client
    for _ in range(60):  # what the model's first tokens usually take, and a hedge that is earned
        ask(client, fresh("chunks=1 first_ms=5"), x_lloom_policy="round-robin")
    answer = ask(client, fresh("chunks=1 first_ms=450"), x_lloom_hedge="on")
    assert answer.headers["x-lloom-hedged"] == "1"
    assert answer.headers["x-lloom-attempts"] == "2"
    told = json.loads(client.ctl("request", "show", answer.headers["x-request-id"], "--json").stdout)
    # Cancelled when the other one answered, unless its own time was over first.
    assert [one["reason"] for one in told["attempts"]] in (["hedged"], ["first_byte_timeout"])
    assert "x-lloom-hedged" not in ask(client, fresh("chunks=1 first_ms=450")).headers


def test_a_conversation_stays_where_its_beginning_is_cached(network: Network) -> None:
    client = network.client
    for talk in range(6):
        messages = [{"role": "user", "content": f"talk {talk} {next(numbers)} chunks=1"}]
        served = set()
        for turn in range(4):
            answer = client.post("/v1/chat/completions", {"model": "scripted", "messages": messages})
            assert answer.status_code == 200
            served.add(answer.headers["x-lloom-executor"])
            messages += [{"role": "assistant", "content": "w0"}, {"role": "user", "content": f"more {turn} chunks=1"}]
        assert len(served) == 1


def test_explain_a_model_and_a_refusal(network: Network) -> None:
    client = network.client
    told = json.loads(client.ctl("explain", "scripted", "--json").stdout)["model"]
    assert {one["peer"] for one in told["choice"]["candidates"]} == {node.peer for node in network.executors}
    assert told["choice"]["picks"]
    assert "picked" in client.ctl("explain", "scripted", "--policy", "fastest").stdout
    answer = client.chat(fresh("status=500"))
    assert answer.status_code == 500
    assert answer.headers["x-should-retry"] == "false"
    attempts = answer.json()["error"]["lloom"]["attempts"]
    assert {one["executor"] for one in attempts} == {node.peer for node in network.executors}
    assert all(one["reason"] == "backend_rejected" and one["ms"] >= 0 for one in attempts)
    shown = json.loads(client.ctl("request", "list", "-n", "1", "--json").stdout)["requests"][0]
    assert (shown["code"], shown["asked"]) == ("backend_rejected", 2)
    unknown = client.ctl("explain", "nobody-has-this")
    assert (unknown.returncode, "neither a model" in unknown.stderr) == (1, True)
    # Two failures: let both be used again before the next test.
    wait_until(lambda: client.chat(fresh("chunks=1")).status_code == 200, "the client to be served again")


@pytest.mark.parametrize("what", ["sidecar", "p2pd", "backend"])
def test_an_executor_that_falls_silent_costs_a_request_little(network: Network, what: str) -> None:
    client = network.client
    for _ in range(30):  # the budget follows what first tokens usually take
        ask(client, fresh("chunks=1"), x_lloom_policy="round-robin")
    prompt = fresh("chunks=1")
    victim = network.node_of(ask(client, prompt).headers["x-lloom-executor"])
    assert victim.process is not None
    pid = {
        "sidecar": lambda: victim.process.pid,
        "p2pd": lambda: victim.pid_of("p2pd"),
        "backend": lambda: network.backend_of(victim.peer).pid,
    }[what]()
    os.kill(pid, signal.SIGSTOP)
    try:
        began_at = time.monotonic()
        answer = ask(client, prompt)  # the one that has this conversation in its cache is the silent one
        took_s = time.monotonic() - began_at
        assert answer.headers["x-lloom-executor"] != victim.peer
        assert answer.headers["x-lloom-attempts"] == "2"
        later = []
        for _ in range(20):
            began_at = time.monotonic()
            ask(client, fresh("chunks=1"))
            later.append(time.monotonic() - began_at)
        print(f"{what} stopped: another one answered after {took_s:.3f} s, slowest of 20 more {max(later):.3f} s")
        assert max(took_s, *later) < PATIENCE_S
    finally:
        os.kill(pid, signal.SIGCONT)
    began_at = time.monotonic()
    wait_until(
        lambda: ask(client, fresh("chunks=1")).headers["x-lloom-executor"] == victim.peer,
        f"{victim.name} to be used again",
        timeout_s=BACK_S,
        explain=client.log_tail,
    )
    print(f"{what} goes on: used again after {time.monotonic() - began_at:.3f} s")


def ledger(client: Node, request: str) -> list[dict[str, Any]]:
    """What the client's ledger says of a request's exchanges."""
    with client.admin() as admin:
        return [dict(one) for one in admin.exchanges(request=request)]


def test_of_a_race_for_priced_answers_exactly_one_is_owed(priced: Network) -> None:
    client = priced.client
    alone = ask(client, fresh("chunks=2"), x_lloom_policy="race")
    assert "x-lloom-raced" not in alone.headers, "priced executors race only when that is allowed"
    for _ in range(5):
        answer = ask(client, fresh("chunks=5 delay_ms=10"), x_lloom_policy="race", x_lloom_hedge="on")
        assert answer.headers["x-lloom-raced"] == "2"
        request = answer.headers["x-request-id"]
        rows = wait_until(
            lambda request=request: len(found := ledger(client, request)) == 2 and found,  # type: ignore[misc]
            "both exchanges to be settled",
        )
        (owed,) = [row for row in rows if row["owed"]]
        (other,) = [row for row in rows if not row["owed"]]
        assert (owed["peer"], owed["reason"]) == (answer.headers["x-lloom-executor"], "")
        assert owed["cost"] > 0
        assert (other["reason"], other["cost"] if other["outcome"] == "" else 0) == ("raced", 0)


def test_of_a_hedge_between_priced_ones_exactly_one_is_owed(priced: Network) -> None:
    client = priced.client
    for _ in range(60):  # what the model's first tokens usually take, and a hedge that is earned
        ask(client, fresh("chunks=1 first_ms=5"), x_lloom_policy="round-robin")
    unasked = ask(client, fresh("chunks=1 first_ms=450"))
    assert "x-lloom-hedged" not in unasked.headers, "hedged although nobody allowed it"
    answer = ask(client, fresh("chunks=1 first_ms=450"), x_lloom_hedge="on")
    assert answer.headers["x-lloom-hedged"] == "1"
    rows = wait_until(
        lambda: len(found := ledger(client, answer.headers["x-request-id"])) == 2 and found,
        "both exchanges to be settled",
        timeout_s=10,
    )
    owed = [row for row in rows if row["owed"]]
    assert [row["peer"] for row in owed] == [answer.headers["x-lloom-executor"]]
    assert [row["reason"] for row in rows if not row["owed"]] in (["hedged"], ["lost"])


def test_a_price_that_rises_is_paid_up_to_the_ceiling(priced: Network) -> None:
    client = priced.client
    for executor in priced.executors:
        assert executor.ctl("executor", "price", "scripted", "2000000/2000000 EUR").returncode == 0
    # Whether the client has heard of the new price or is told by price_changed: it pays it, or does not ask.
    assert ask(client, fresh("chunks=2"), x_lloom_max_price="3000000/3000000 EUR").status_code == 200
    body = {"model": "scripted", "messages": [{"role": "user", "content": fresh("chunks=2")}]}
    answer = client.post("/v1/chat/completions", body, headers={"x-lloom-max-price": "1000000/1000000 EUR"})
    assert answer.status_code == 402


@pytest.fixture(scope="module")
def priced() -> Iterator[Network]:
    price = ("--price-prompt", "1000000", "--price-completion", "1000000", "--price-currency", "EUR")
    with Network(validators=1, executors=0, clients=1, flags=["--heartbeat", "1"]) as network:
        network.executors += [network.add("executor", *price), network.add("executor", *price)]
        network.wait_known(network.client)
        yield network


def kill_and_start(executor: Node) -> None:
    executor.kill()
    executor.start()


def stop_and_start(executor: Node) -> None:
    executor.stop()
    executor.start()


def kill_p2pd(executor: Node) -> None:
    executor.kill("p2pd")


@pytest.mark.parametrize("act", [kill_and_start, stop_and_start, kill_p2pd])
def test_a_single_executor_that_restarts_is_a_short_delay(
    single: Network, act: Callable[[Node], None], request: pytest.FixtureRequest
) -> None:
    client, executor = single.client, single.executors[0]
    answers: list[tuple[int, float]] = []
    is_over = threading.Event()

    def ask_on() -> None:
        while not is_over.is_set():
            began_at = time.monotonic()
            answer = client.chat(fresh("chunks=1"))
            answers.append((answer.status_code, time.monotonic() - began_at))

    application = threading.Thread(target=ask_on, daemon=True)
    application.start()
    try:
        wait_until(lambda: len(answers) >= 5, "the first answers")
        act(executor)
        seen = len(answers)
        wait_until(lambda: len(answers) >= seen + 20, "answers afterwards", timeout_s=BACK_S, explain=client.log_tail)
    finally:
        is_over.set()
        application.join(60)
    slowest = max(seconds for _, seconds in answers)
    print(f"{request.node.name}: {len(answers)} answers, slowest {slowest:.3f} s")
    assert {status for status, _ in answers} == {200}


@pytest.fixture(scope="module")
def single() -> Iterator[Network]:
    with Network(validators=1, executors=1, clients=1, flags=["--heartbeat", "1"], keeps_ports=True) as network:
        yield network

"""Processes that end in the middle of an answer, killed or asked to: what the application sees and what comes after."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.harness import Network, Node
from tests.harness.waiting import wait_until

BACK_S = 40.0
"""How long a node may take until it is used again."""
GRACE_S = 5.0
"""The harness starts its nodes with --grace 5."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    # A restarted executor gets into the gossip at the next heartbeat: with the default of 10 s this would mostly wait.
    with Network(validators=1, executors=2, clients=1, flags=["--heartbeat", "1"]) as network:
        yield network


class Reader(threading.Thread):
    """An application that reads one stream to its end, whatever that is. ``with`` waits for its end."""

    def __init__(self, client: Node, prompt: str) -> None:
        super().__init__(daemon=True)
        self._client = client
        self._prompt = prompt
        self.executor = ""
        self.events: list[str] = []
        self.failure: Exception | None = None
        self.began = threading.Event()
        """Set when a few events came."""
        self.ended_at = 0.0

    def run(self) -> None:
        try:
            with self._client.stream(self._prompt) as answer:
                self.executor = answer.headers.get("x-lloom-executor", "")
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line[6:])
                        if len(self.events) == 3:
                            self.began.set()
        except httpx.HTTPError as exc:
            self.failure = exc
        self.ended_at = time.monotonic()
        self.began.set()

    def __enter__(self) -> Reader:
        self.start()
        assert self.began.wait(30)
        assert self.ended_at == 0.0, self.events
        return self

    def __exit__(self, *_: object) -> None:
        self.join(30)
        assert not self.is_alive(), "the application waits for ever"


def assert_cut(reader: Reader) -> None:
    """The application was told: an error event, then a connection that ends without HTTP's last chunk."""
    assert isinstance(reader.failure, httpx.RemoteProtocolError), reader.failure
    error = json.loads(reader.events[-1])["error"]
    assert error["message"]
    assert [a["executor"] for a in error["lloom"]["attempts"]] == [reader.executor]
    text = "".join(reader.events)
    assert "[DONE]" not in text
    assert '"finish_reason":"' not in text


def assert_served_by(network: Network, peer: str) -> None:
    answer = network.client.chat("chunks=2")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-lloom-executor"] == peer


def wait_used(network: Network, peer: str) -> None:
    """Until the client's own choice falls on this executor: being known is not enough.

    A failure makes it count as slow for a while, so it is used when the other one has something to do: twelve
    conversations at once, none of which begins like another, with answers that begin as late as a model's do.
    """

    numbers = itertools.count()

    def ask(number: int) -> str:
        answer = network.client.chat(f"{number} chunks=1 first_ms=400")
        assert answer.status_code == 200, answer.text
        return str(answer.headers["x-lloom-executor"])

    with ThreadPoolExecutor(12) as threads:
        wait_until(
            lambda: peer in set(threads.map(ask, itertools.islice(numbers, 12))),
            f"{peer} to be used again",
            timeout_s=BACK_S,
            explain=network.client.log_tail,
        )


@pytest.mark.parametrize("what", ["sidecar", "p2pd", "backend"])
def test_a_killed_part_of_the_executor_cuts_the_answer_and_the_other_executor_serves(
    network: Network, what: str
) -> None:
    # Keep-alive would notice after 10 s; a process that ends is noticed by its sockets.
    with Reader(network.client, "chunks=2000 delay_ms=20") as reader:
        victim = network.node_of(reader.executor)
        (other,) = [node for node in network.executors if node is not victim]
        killed_at = time.monotonic()
        if what == "backend":
            network.backend_of(victim.peer).kill()
        else:
            victim.kill(what)
    print(f"{what}: the application knew after {reader.ended_at - killed_at:.3f} s")
    assert reader.ended_at - killed_at < 5
    assert_cut(reader)
    began_at = time.monotonic()
    assert_served_by(network, other.peer)
    print(f"{what}: the next request took {time.monotonic() - began_at:.3f} s")
    assert time.monotonic() - began_at < 10

    began_at = time.monotonic()
    if what == "sidecar":
        victim.start()
    elif what == "backend":
        network.backends[network.executors.index(victim)].start()
    wait_used(network, victim.peer)
    print(f"{what}: used again after {time.monotonic() - began_at:.3f} s")


def test_the_clients_own_p2pd_killed(network: Network) -> None:
    client = network.client
    with Reader(client, "chunks=2000 delay_ms=20") as reader:
        killed_at = time.monotonic()
        client.kill("p2pd")
    print(f"the application knew after {reader.ended_at - killed_at:.3f} s")
    assert_cut(reader)
    statuses = []

    def is_served() -> bool:
        statuses.append(client.chat("chunks=1").status_code)
        return statuses[-1] == 200

    wait_until(is_served, "the client to serve again", timeout_s=BACK_S, explain=client.log_tail)
    print(f"served again after {time.monotonic() - killed_at:.3f} s; statuses until then: {statuses[:-1]}")
    assert set(statuses) <= {200, 502, 503}
    assert client.metric("lloom_p2pd_restarts_total") == 1


def test_a_second_sidecar_in_the_same_home_is_refused(network: Network) -> None:
    client = network.client
    assert client.process is not None
    second = subprocess.run(
        [sys.executable, "-m", "lloom_sidecar.cli.sidecar", "run", "--home", str(client.home), *client.args],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 1
    assert f"process {client.process.pid} runs a node in {client.home}" in second.stderr
    assert len(second.stderr.splitlines()) == 1
    # And the first one is unharmed: its sockets, its p2pd, its API.
    assert client.status()["p2pd"]["up"]
    assert client.chat("chunks=1").status_code == 200


def test_an_executor_that_is_asked_to_end_finishes_its_stream(network: Network) -> None:
    client = network.client
    with Reader(client, "chunks=100 delay_ms=20") as reader:
        victim = network.node_of(reader.executor)
        (other,) = [node for node in network.executors if node is not victim]
        code: list[int] = []
        asked_at = time.monotonic()
        stopping = threading.Thread(target=lambda: code.append(victim.stop()))
        stopping.start()
        wait_until(
            lambda: client.executors().get(victim.peer, {"state": "gone"})["state"] not in ("fresh", "suspect"),
            "the client to know that the executor leaves",
            explain=client.log_tail,
        )
        known_s = time.monotonic() - asked_at
        print(f"the client knew after {known_s:.3f} s")
        assert reader.is_alive(), "known only when the stream had ended"
        assert_served_by(network, other.peer)
    assert reader.failure is None
    assert reader.events[-1] == "[DONE]"
    text = "".join(json.loads(e)["choices"][0]["delta"].get("content", "") for e in reader.events[:-1])
    assert text == "".join(f" w{i}" for i in range(100))
    stopping.join(30)
    assert code == [0]
    print(f"ended {time.monotonic() - reader.ended_at:.3f} s after its stream")
    victim.start()
    wait_used(network, victim.peer)


def test_a_client_that_is_asked_to_end_finishes_its_stream(network: Network) -> None:
    client = network.client
    with Reader(client, "chunks=100 delay_ms=20") as reader:
        api = client.api
        code: list[int] = []
        stopping = threading.Thread(target=lambda: code.append(client.stop()))
        stopping.start()
        wait_until(lambda: is_refused(api), "new requests to be refused")
    assert reader.failure is None
    assert reader.events[-1] == "[DONE]"
    stopping.join(30)
    assert code == [0]
    client.start()
    network.wait_known(client)


def is_refused(api: str) -> bool:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "chunks=1"}]}
    try:
        answer = httpx.post(f"{api}/v1/chat/completions", json=body, timeout=30, trust_env=False)
    except httpx.TransportError:
        return True
    return answer.status_code == 503


def test_an_application_that_never_reads_holds_the_client_no_longer_than_its_grace(network: Network) -> None:
    client = network.client
    host, port = client.api.removeprefix("http://").split(":")
    body = json.dumps(
        {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": "chunks=10000000"}]}
    ).encode()
    with socket.socket() as app:
        app.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        app.connect((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        app.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(stalled(network), "the backend to be held up")
        began_at = time.monotonic()
        assert client.stop() == 0
        took_s = time.monotonic() - began_at
    print(f"ended after {took_s:.3f} s, grace {GRACE_S:g} s")
    assert took_s < GRACE_S + 6
    # Nothing of it goes on behind the client's back.
    for backend in network.backends:
        wait_until(
            lambda backend=backend: all(r["outcome"] for r in backend.requests()),  # type: ignore[misc]
            "the backend to be rid of it",
        )
    client.start()
    network.wait_known(client)
    assert client.chat("chunks=1").status_code == 200


def stalled(network: Network) -> Callable[[], bool]:
    """True once an endless answer makes no progress any more: every buffer on the way is full."""
    seen: list[int] = []

    def look() -> bool:
        with contextlib.suppress(IndexError):
            seen.append(max(r["sent"] for backend in network.backends for r in backend.requests() if not r["outcome"]))
        return len(seen) > 25 and seen[-1] > 0 and len(set(seen[-25:])) == 1

    def look_safely() -> bool:
        try:
            return look()
        except ValueError:  # it has not arrived
            return False

    return look_safely

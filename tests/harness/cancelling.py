"""How long it takes from an application's leaving until nothing works for it, for each moment at which it leaves."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from .backend import ScriptedBackend
from .network import Network
from .node import Node
from .waiting import wait_until


class App:
    """A request over a bare socket, so that leaving is one close and nothing else."""

    def __init__(self, client: Node, prompt: str, *, stream: bool = True, **headers: str) -> None:
        host, port = client.api.removeprefix("http://").split(":")
        body = {"model": "scripted", "stream": stream, "messages": [{"role": "user", "content": prompt}]}
        content = json.dumps(body).encode()
        more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{more}"
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        self._socket.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)

    def read_some(self) -> bytes:
        """What has come, at least something."""
        return self._socket.recv(65536)

    def leave(self) -> float:
        """Close; returns when, Unix seconds."""
        at = time.time()
        self._socket.close()
        return at


def stopped_after_ms(network: Network, tag: int, left_at: float) -> float:
    """Until the backend that worked for the request with this tag saw that it is gone."""

    def look() -> dict[str, Any] | None:
        mine = [one for backend in network.backends for one in backend.requests() if one["script"].get("tag") == tag]
        mine = [one for one in mine if one["outcome"] != "complete"]
        return mine[-1] if mine and mine[-1]["outcome"] is not None else None

    entry = wait_until(look, "the backend to stop", timeout_s=10)
    assert entry["outcome"] == "gone", entry
    return float((entry["ended_at"] - left_at) * 1000)


def wait_begun(network: Network, tag: int, sent: int = 0) -> None:
    """Until a backend works for the request with this tag, and has sent so many pieces."""
    wait_until(
        lambda: any(
            one["script"].get("tag") == tag and one["sent"] >= sent and one["outcome"] is None
            for backend in network.backends
            for one in backend.requests()
        ),
        "the backend to begin",
        timeout_s=20,
    )


def streamed(network: Network, tag: int) -> float:
    """In the middle of a stream."""
    app = App(network.client, f"tag={tag} chunks=2000 delay_ms=5")
    assert app.read_some()
    wait_begun(network, tag, sent=3)
    return stopped_after_ms(network, tag, app.leave())


def unstreamed(network: Network, tag: int) -> float:
    """While an answer that comes as one document is made."""
    app = App(network.client, f"tag={tag} chunks=2000 delay_ms=5", stream=False)
    wait_begun(network, tag, sent=3)
    return stopped_after_ms(network, tag, app.leave())


def before_the_first_byte(network: Network, tag: int) -> float:
    """While the backend reads a long prompt."""
    app = App(network.client, f"tag={tag} chunks=5 first_ms=60000")
    wait_begun(network, tag)
    return stopped_after_ms(network, tag, app.leave())


def raced(network: Network, tag: int) -> float:
    """While two executors are asked at once and neither has answered: until the later one has stopped."""
    app = App(network.client, f"tag={tag} chunks=5 first_ms=60000", x_lloom_policy="race")
    wait_until(
        lambda: sum(one["script"].get("tag") == tag for b in network.backends for one in b.requests()) == 2,
        "both to be asked",
    )
    left_at = app.leave()

    def ended() -> list[dict[str, Any]]:
        mine = [one for b in network.backends for one in b.requests() if one["script"].get("tag") == tag]
        return mine if all(one["outcome"] for one in mine) else []

    entries = wait_until(ended, "both to stop", timeout_s=10)
    assert [one["outcome"] for one in entries] == ["gone", "gone"]
    return float(max(one["ended_at"] for one in entries) - left_at) * 1000


def serves(client: Node, peer: str) -> bool:
    """Whether this executor answers when it alone may."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": "chunks=1"}]}
    return client.post("/v1/chat/completions", body, headers={"x-lloom-pin-executor": peer}).status_code == 200


def after_failover(network: Network, tag: int) -> float:
    """At the second executor, when the first has failed: its backend answers everything with 500."""
    sick = network.backends[0]
    for executor in network.executors:  # one that failed before is asked first again only when it has served again
        wait_until(partial(serves, network.client, executor.peer), "the executor to be used again", timeout_s=60)
    sick.set_script(status=500)
    try:
        for _ in range(50):
            app = App(network.client, f"tag={tag} chunks=5 first_ms=60000", x_lloom_policy="round-robin")
            wait_begun(network, tag)
            has_failed_over = any(one["script"].get("tag") == tag for one in sick.requests())
            took_ms = stopped_after_ms(network, tag, app.leave())
            if has_failed_over:
                return took_ms
            tag += 1
    finally:
        sick.set_script()
    raise AssertionError("the sick one was never asked first")


KINDS = {
    "streamed": streamed,
    "unstreamed": unstreamed,
    "before the first byte": before_the_first_byte,
    "raced": raced,
    "after a failover": after_failover,
}


@contextmanager
def occupied(client: Node, backend: ScriptedBackend, tag: int) -> Iterator[None]:
    """Every slot of the only executor is taken while the context lasts (its --slots is 1)."""
    app = App(client, f"tag={tag} chunks=100000 delay_ms=20")
    try:
        wait_until(lambda: any(one["script"].get("tag") == tag for one in backend.requests()), "the slot to be taken")
        yield
    finally:
        app.leave()


def queued_freed_after_ms(executor: Node, client: Node, tag: int) -> float:
    """A request that waits for a slot: until its place in the queue is free again."""
    app = App(client, f"tag={tag} chunks=5")
    wait_until(lambda: queue_of(executor) == 1, "the request to be queued")
    left_at = app.leave()
    deadline = time.monotonic() + 10
    while queue_of(executor):
        assert time.monotonic() < deadline, "the place is never freed"
        threading.Event().wait(0.001)
    return (time.time() - left_at) * 1000


def queue_of(executor: Node) -> int:
    """Requests that wait at an executor."""
    return int(executor.status()["requests"]["queued"])

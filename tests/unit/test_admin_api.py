"""The admin API and its client over a real unix socket, and the probes."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_admin_fake_node import OTHER, PEER, FakeNode, Served, served

from lloom_sidecar.admin.client import NodeClient, NodeRefusedError, NodeUnreachableError
from lloom_sidecar.admin.events import ConnectionClosed, ExecutorLost
from lloom_sidecar.admin.probes import probe_app
from lloom_sidecar.admin.view import Check


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as one:
        yield one


@pytest.fixture
def client(node: Served) -> Iterator[NodeClient]:
    with NodeClient.for_home(node.home) as one:
        yield one


def raw(home: Path, method: str, path: str, **kwargs: Any) -> httpx.Response:
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(home / "run" / "admin.sock"))) as one:
        return one.request(method, f"http://localhost{path}", **kwargs)


def test_the_client_reads_every_snapshot(node: Served, client: NodeClient) -> None:
    node.node.health.set("few_peers", "0 of 1 peers")
    assert client.status() == node.node.status()
    assert client.peers() == node.node.peers()
    assert client.models() == node.node.models()
    assert client.executors() == node.node.executors()
    assert client.config() == node.node.config_effective()
    assert 'lloom_health_condition{code="few_peers"' in client.metrics()


def test_a_receipt_is_found_by_its_request(node: Served, client: NodeClient) -> None:
    assert client.receipt("0a") == node.node.receipt("0a")
    for name in ("0b", "../status"):
        with pytest.raises(NodeRefusedError) as caught:
            client.receipt(name)
        assert (caught.value.code, caught.value.http_status) == ("not_found", 404)


def test_only_the_owner_can_open_the_socket(node: Served) -> None:
    assert (node.home / "run" / "admin.sock").stat().st_mode & 0o777 == 0o600


def test_actions_reach_the_node(node: Served, client: NodeClient) -> None:
    client.drain()
    client.drain()
    assert node.node.drained == 2
    addr = f"/ip4/192.0.2.9/tcp/4001/p2p/{OTHER}"
    assert client.connect(addr)["peer"] == OTHER
    assert node.node.connected == [addr]


def test_an_error_of_the_node_keeps_its_code(client: NodeClient) -> None:
    with pytest.raises(NodeRefusedError, match="does not answer") as caught:
        client.connect("/ip4/192.0.2.66/tcp/1/p2p/x")
    assert (caught.value.code, caught.value.http_status) == ("peer_unreachable", 502)
    with pytest.raises(NodeRefusedError, match="not a multiaddr: 'x'"):
        client.connect("x")


@pytest.mark.parametrize(
    ("method", "path", "kwargs", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, 404, "not_found"),
        ("GET", "/v1/drain", {}, 405, "method_not_allowed"),
        ("POST", "/v1/status", {}, 405, "method_not_allowed"),
        ("POST", "/v1/peers/connect", {"content": b"{"}, 400, "invalid_request"),
        ("POST", "/v1/peers/connect", {"json": [1]}, 400, "invalid_request"),
        ("POST", "/v1/peers/connect", {"json": {"addr": 1}}, 400, "invalid_request"),
        ("POST", "/v1/peers/connect", {"content": b"x" * 70_000}, 413, "invalid_request"),
        ("GET", "/v1/events?kind=weather", {}, 400, "invalid_request"),
    ],
)
def test_what_the_api_refuses(
    node: Served, method: str, path: str, kwargs: dict[str, Any], status: int, code: str
) -> None:
    answer = raw(node.home, method, path, **kwargs)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_events_without_follow_are_the_history(node: Served, client: NodeClient) -> None:
    node.call(lambda: node.node.events.publish(ExecutorLost(OTHER, "lease")))
    node.call(lambda: node.node.events.publish(ConnectionClosed(PEER)))
    assert [one["event"] for one in client.events(follow=False)] == ["executor_lost", "connection_closed"]
    assert [one["peer"] for one in client.events(follow=False, kinds=["executor_lost"])] == [OTHER]
    assert node.node.events.readers == 0


def test_followed_events_arrive_as_they_happen_and_end_with_the_node(node: Served, client: NodeClient) -> None:
    node.call(lambda: node.node.events.publish(ExecutorLost("first")))
    stream = client.events()
    assert next(stream)["peer"] == "first"
    node.call(lambda: node.node.events.publish(ExecutorLost("second")))
    assert next(stream)["peer"] == "second"
    node.stop()
    assert list(stream) == []


def test_a_reader_that_goes_away_leaves_nothing_behind(node: Served, client: NodeClient) -> None:
    node.call(lambda: node.node.events.publish(ExecutorLost("first")))
    stream = client.events()
    next(stream)
    assert node.node.events.readers == 1
    stream.close()  # type: ignore[attr-defined]
    client.close()
    with NodeClient.for_home(node.home) as other:
        for _ in range(50):  # each request is a turn of the node's loop
            other.status()
            if node.node.events.readers == 0:
                break
    assert node.node.events.readers == 0


def test_no_node_is_explained_with_the_next_step(tmp_path: Path) -> None:
    with (
        NodeClient.for_home(tmp_path) as client,
        pytest.raises(NodeUnreachableError, match="no node runs in") as caught,
    ):
        client.status()
    assert f"lloom-sidecar run --home {tmp_path}" in caught.value.message


def test_a_socket_that_a_dead_node_left_is_explained(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "run" / "admin.sock"))
    with NodeClient.for_home(tmp_path) as client, pytest.raises(NodeUnreachableError, match="has ended"):
        client.status()


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"", NodeUnreachableError, "ended before it had answered"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", NodeRefusedError, "is it a Lloom node"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", NodeRefusedError, "is it a Lloom node"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", NodeRefusedError, "is it a Lloom node"),
        (b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nno", NodeRefusedError, "status 500"),
    ],
)
def test_something_else_on_the_socket_is_explained(
    tmp_path: Path, answer: bytes, error: type[Exception], text: str
) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer_once() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    if connection.recv(65536):  # the client's look at the socket sends nothing
                        connection.sendall(answer)
                        return

        thread = threading.Thread(target=answer_once)
        thread.start()
        with NodeClient.for_node(f"unix:{path}") as client, pytest.raises(error, match=text):
            client.peers()
        thread.join(10)


def test_a_node_is_named_in_two_ways(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a node's address"):
        NodeClient.for_node("ftp://x")
    for name, text in ((f"unix://{tmp_path}/none", "no node runs at"), ("http://127.0.0.1:1/", "no node answers at")):
        with NodeClient.for_node(name) as client, pytest.raises(NodeUnreachableError, match=text):
            client.status()
    with pytest.raises(ValueError, match="either"):
        NodeClient()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every socket")
def test_another_users_socket_is_explained(node: Served, client: NodeClient) -> None:
    (node.home / "run" / "admin.sock").chmod(0)
    with pytest.raises(NodeUnreachableError, match="belongs to another user"):
        client.status()


# --- probes


async def probe(node: FakeNode, path: str, method: str = "GET") -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(probe_app(node)), base_url="http://probe") as client:
        return await client.request(method, path)


@pytest.mark.parametrize("path", ["/startupz", "/livez", "/readyz", "/metrics"])
async def test_probes_pass_on_a_good_node(path: str) -> None:
    answer = await probe(FakeNode(), path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")


async def test_a_failing_check_is_named_and_does_not_kill() -> None:
    node = FakeNode()
    node.checks[1] = Check(name="p2pd", ok=False, text="no answer for 4 s")
    for path in ("/readyz", "/startupz"):
        answer = await probe(node, path)
        assert (answer.status_code, answer.text) == (503, "[+] api ok\n[-] p2pd failed: no answer for 4 s\nfailed\n")
    assert (await probe(node, "/livez")).text == "[+] loop ok\npassed\n"


async def test_probes_answer_head_and_refuse_the_rest() -> None:
    head = await probe(FakeNode(), "/readyz", "HEAD")
    assert (head.status_code, head.content) == (200, b"")
    refused = await probe(FakeNode(), "/readyz", "POST")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
    assert (await probe(FakeNode(), "/v1/status")).status_code == 404


def test_json_shapes_hold_json_only() -> None:
    node = FakeNode()
    for value in (node.status(), node.peers(), node.models(), node.executors(), node.config_effective()):
        assert json.loads(json.dumps(value)) == value

"""The admin API's operations over a real unix socket: what arrives at the node, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_admin_api import raw
from test_admin_fake_node import OTHER, PEER, FakeOperations, Served, served

from lloom_sidecar.admin.client import NodeClient, NodeRefusedError


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as one:
        yield one


@pytest.fixture
def fake(node: Served) -> FakeOperations:
    return node.node.operations


@pytest.fixture
def client(node: Served) -> Iterator[NodeClient]:
    with NodeClient.for_home(node.home) as one:
        yield one


def test_every_operation_reaches_the_node(client: NodeClient, fake: FakeOperations) -> None:
    assert client.ping(OTHER)["rtt_ms"] == 1.5
    assert client.disconnect(OTHER)["was_connected"]
    assert client.bootstrap() == fake.bootstrap()
    assert client.bootstrap_add("/a")["lasts"]
    assert client.bootstrap_remove(OTHER)["peer"] == OTHER
    assert client.find_providers("/k", count=3, timeout_s=9, at=OTHER)["asked"] == OTHER
    assert client.find_providers("/k", count=3, timeout_s=9)["complete"]
    assert client.provide("/k", timeout_s=9)["cid"] == "bafkx"
    assert client.closest("/k", timeout_s=9)["peers"][0]["peer"] == OTHER
    assert client.find_peer(OTHER, timeout_s=9)["connected"]
    assert client.get_record(f"/pk/{OTHER}", timeout_s=9)[1].endswith(b"kkk")
    assert client.put_record("/pk/x", b"v", timeout_s=9) == ("/pk/x", b"v")
    assert client.put_record(None, b"", timeout_s=9) == (f"/pk/{PEER}", b"own")
    assert client.topics()[0]["topic"] == "/lloom/executors/1.0.0"
    assert client.topic_peers("a/b&c")["topic"] == "a/b&c"
    assert client.query_models(OTHER)["load"]["in_flight"] == 1
    assert client.ask_quote(OTHER, "m")["valid_s"] == 600
    assert client.requests() == fake.requests()
    assert client.explain("4f" * 16)["request"] == fake.request()
    assert client.explain("m", policy="fastest")["model"]["policy"] == "fastest"  # type: ignore[index]
    assert client.set_price("m1", "15/60 EUR")["price"]["prompt_per_million"] == 15
    assert client.p2pd_effective() == fake.p2pd_effective()
    assert client.examine() == fake.findings
    assert fake.asked == [
        ("ping", OTHER),
        ("disconnect", OTHER),
        ("add", "/a"),
        ("rm", OTHER),
        ("findprovs", "/k", 3, 9, OTHER),
        ("findprovs", "/k", 3, 9, None),
        ("provide", "/k", 9),
        ("closest", "/k", 9),
        ("findpeer", OTHER, 9),
        ("get", f"/pk/{OTHER}", 9),
        ("put", "/pk/x", b"v", 9),
        ("put", None, b"", 9),
        ("topics",),
        ("topic_peers", "a/b&c"),
        ("query", OTHER),
        ("quote", OTHER, "m"),
        ("explain", "4f" * 16, None),
        ("explain", "m", "fastest"),
        ("price", "m1", "15/60 EUR"),
        ("examine",),
    ]


def test_what_the_operator_got_wrong_is_400_and_a_sentence(client: NodeClient) -> None:
    with pytest.raises(NodeRefusedError, match="that is this node itself") as caught:
        client.ping(PEER)
    assert (caught.value.code, caught.value.http_status) == ("invalid_request", 400)
    with pytest.raises(NodeRefusedError, match="not a multiaddr"):
        client.bootstrap_add("x")
    with pytest.raises(NodeRefusedError, match="'15 EUR' is not a price such as 15/60 EUR"):
        client.set_price("m1", "15 EUR")
    with pytest.raises(NodeRefusedError, match="does not know it") as caught:
        client.find_peer(OTHER[:-3] + "bad", timeout_s=1)
    assert caught.value.http_status == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "text"),
    [
        ("POST", "/v1/peers/ping", {}, 'the body lacks "peer": a peer id'),
        ("POST", "/v1/peers/ping", {"peer": 1}, 'the body lacks "peer"'),
        ("POST", "/v1/peers/ping", [], "not a JSON object"),
        ("POST", "/v1/dht/findprovs", {"key": "/k", "count": 0}, '"count" is not a number from 1 to 1000'),
        ("POST", "/v1/dht/findprovs", {"key": "/k", "count": True}, '"count" is not a number'),
        ("POST", "/v1/dht/findprovs", {"key": "/k", "timeout_s": "9"}, '"timeout_s" is not a number'),
        ("POST", "/v1/dht/findprovs", {"key": "/k", "at": ""}, 'the body lacks "at"'),
        ("POST", "/v1/dht/provide", {"key": "/k", "timeout_s": 601}, '"timeout_s" is not a number from 1 to 600'),
        ("POST", "/v1/dht/put", {"key": "/k"}, 'the body lacks "value"'),
        ("POST", "/v1/dht/put", {"key": "/k", "value": "?"}, '"value" is not base64'),
        ("POST", "/v1/dht/put", {"key": "/k", "value": "QUFB" * 12_000}, "a record has at most 32768 bytes"),
        ("POST", "/v1/executor/price", {"price": "free"}, 'the body lacks "model"'),
        ("POST", "/v1/executor/price", {"model": "m1"}, 'the body lacks "price": such as 15/60 EUR, or free'),
        ("GET", "/v1/gossip/peers", None, "the query lacks topic=TOPIC"),
        ("GET", "/v1/doctor", None, "method not allowed"),
    ],
)
def test_what_is_refused(node: Served, fake: FakeOperations, method: str, path: str, body: Any, text: str) -> None:
    answer = raw(node.home, method, path, **({} if body is None else {"json": body}))
    assert answer.status_code in (400, 405)
    assert text in answer.json()["error"]["message"]
    assert fake.asked == []

"""lloomctl's commands that ask other nodes or change something: what they send, print, and their exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_admin_fake_node import OTHER, PEER, FakeOperations, Served, served
from test_cli_lloomctl import run

from lloom_sidecar.cli import ctl_dht
from lloom_sidecar.protocol import names

BAD = OTHER[:-3] + "bad"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path) as one:
        yield one


@pytest.fixture
def fake(node: Served) -> FakeOperations:
    return node.node.operations


# --- which peer is meant


@pytest.mark.parametrize("text", [OTHER, OTHER[-8:], OTHER[-4:], f"…{OTHER[-8:]}"])
def test_a_peer_is_named_by_its_id_or_the_end_of_it(node: Served, fake: FakeOperations, text: str) -> None:
    assert run(node.home, "peer", "disconnect", text).exit_code == 0
    assert fake.asked == [("disconnect", OTHER)]


def test_a_peer_that_cannot_be_told(node: Served, fake: FakeOperations) -> None:
    for text, code, words in (
        ("abc", 2, "at least its last 4 characters"),
        ("nobody", 1, "no known peer ends in nobody"),
    ):
        done = run(node.home, "peer", "ping", text)
        assert (done.exit_code, done.stdout) == (code, "")
        assert words in done.stderr
    node.node.peers = lambda: [{"peer": "X" + OTHER[1:]}]  # type: ignore[method-assign, typeddict-item]
    done = run(node.home, "peer", "ping", OTHER[-6:])
    assert (done.exit_code, "several peers end in" in done.stderr) == (1, True)
    assert fake.asked == []


# --- peers


def test_ping(node: Served, fake: FakeOperations) -> None:
    done = run(node.home, "peer", "ping", OTHER, "-c", "2", "-i", "0")
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        f"{number}: 1.50 ms, relayed by /ip4/192.0.2.9/tcp/4001, member, clock -2.5 s" for number in (1, 2)
    ]
    assert done.stderr == "2 of 2 answered; min 1.50, average 1.50, max 1.50 ms\n"
    done = run(node.home, "peer", "ping", OTHER, "-c", "2", "-i", "0", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["number"], one["rtt_ms"], one["path"]) for one in lines] == [(1, 1.5, "relayed"), (2, 1.5, "relayed")]
    assert done.stderr == ""
    assert fake.asked == [("ping", OTHER)] * 4


def test_ping_of_one_that_does_not_answer(node: Served) -> None:
    done = run(node.home, "peer", "ping", BAD, "-c", "2", "-i", "0")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "error: nobody answers\nerror: nobody answers\n0 of 2 answered\n"
    done = run(node.home, "peer", "ping", BAD, "-c", "1", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"] == {"code": "peer_unreachable", "message": "nobody answers"}


def test_ping_of_the_node_itself_ends_at_once(node: Served, fake: FakeOperations) -> None:
    done = run(node.home, "peer", "ping", PEER, "-c", "9")
    assert (done.exit_code, done.stderr) == (1, "error: that is this node itself: name another peer\n")
    assert len(fake.asked) == 1


def test_disconnect(node: Served, fake: FakeOperations) -> None:
    assert run(node.home, "peer", "disconnect", OTHER).stdout == f"{OTHER} disconnected\n"
    assert run(node.home, "peer", "disconnect", BAD).stdout == f"{BAD} was not connected\n"
    fake.is_validator = True
    assert "bootstrap rm" in run(node.home, "peer", "disconnect", OTHER).stderr
    shown = json.loads(run(node.home, "peer", "disconnect", OTHER, "--json").stdout)
    assert shown == {"peer": OTHER, "was_connected": True, "is_validator": True}


# --- models and executors


def test_model_show(node: Served) -> None:
    done = run(node.home, "model", "show", "smollm2:135m")
    assert done.exit_code == 0
    facts, _, table = done.stdout.partition("\n\n")
    assert facts.splitlines() == [
        "model      smollm2:135m",
        "family     smollm2",
        "executors  1, 1 fresh",
        "slots      1 of 4 busy",
        "context    2048 tokens",
        "prices     10/30 EUR",
    ]
    assert table.splitlines()[1].split() == [OTHER, "fresh", "2048", "1/4", "0", "80ms", "41.3", "10/30", "EUR", "chat"]
    assert json.loads(run(node.home, "model", "show", "smollm2:135m", "--json").stdout) == node.node.models()[0]
    done = run(node.home, "model", "show", "smollm2")
    assert (done.exit_code, done.stderr) == (1, "error: no executor offers smollm2; did you mean smollm2:135m?\n")
    assert "`lloomctl model list`" in run(node.home, "model", "show", "?").stderr


def test_executor_show(node: Served) -> None:
    done = run(node.home, "executor", "show", OTHER[-8:])
    assert done.exit_code == 0
    facts, _, table = done.stdout.partition("\n\n")
    assert "lease      suspect, 2s left" in facts
    assert "path       relayed, 12.3ms" in facts
    assert "addresses  /ip4/192.0.2.9/tcp/4001" in facts
    assert table.splitlines()[1].split()[:2] == ["smollm2:135m", "fresh"]
    shown = json.loads(run(node.home, "executor", "show", OTHER, "--json").stdout)
    assert shown["peer"] == OTHER
    assert [one["id"] for one in shown["models"]] == ["smollm2:135m"]
    assert "a peer, but no executor" in run(node.home, "executor", "show", PEER).stderr
    done = run(node.home, "executor", "show", BAD)
    assert (done.exit_code, "is not known" in done.stderr) == (1, True)


def test_model_query(node: Served) -> None:
    text = run(node.home, "model", "query", OTHER).stdout
    assert text.splitlines()[0].split() == ["MODEL", "FIELD", "VALUE"]
    assert [line.split()[0] for line in text.splitlines() if not line.startswith(" ")][1:] == ["m1", "m2", "(load)"]
    assert "10/30 EUR" in text
    assert "chat, tools" in text
    assert "free" in text
    assert "\x1b" not in text
    assert "x\\x1b[2J" in text
    assert "(load)" in text
    assert json.loads(run(node.home, "model", "query", OTHER, "--json").stdout)["load"]["busy"] is True


def test_model_quote(node: Served, fake: FakeOperations) -> None:
    done = run(node.home, "model", "quote", OTHER, "m1")
    assert done.stdout.splitlines()[1:4] == ["model     m1", "price     10/30 EUR", "holds     10m"]
    assert json.loads(run(node.home, "model", "quote", OTHER, "m1", "--json").stdout)["valid_s"] == 600.0
    assert fake.asked == [("quote", OTHER, "m1")] * 2


# --- bootstrap


def test_bootstrap_list(node: Served, fake: FakeOperations) -> None:
    done = run(node.home, "bootstrap", "list")
    assert done.stdout.splitlines()[1].split() == (
        [OTHER, "joined", "direct", "12.3ms", "0", "yes", "/dns4/v.example.org/tcp/4001"]
    )
    assert done.stderr == ""
    fake.last_error = "connection refused\x1b[2J"
    done = run(node.home, "bootstrap", "list")
    assert done.stdout.splitlines()[1].split()[1:5] == ["unreachable", "-", "-", "3"]
    assert done.stderr == f"…{OTHER[-8:]}: connection refused\\x1b[2J\n"
    assert json.loads(run(node.home, "bootstrap", "list", "--json").stdout) == fake.bootstrap()


def test_bootstrap_add_and_rm(node: Served, fake: FakeOperations) -> None:
    whole = f"/ip4/192.0.2.9/tcp/4001/p2p/{OTHER}"
    assert run(node.home, "bootstrap", "add", whole).stdout == f"{whole} added\n"
    assert run(node.home, "bootstrap", "add", "/known").stdout == f"{whole} known already\n"
    assert run(node.home, "bootstrap", "rm", OTHER[-8:]).stdout == f"{whole} removed\n"
    assert run(node.home, "bootstrap", "rm", whole).exit_code == 0
    assert fake.asked == [("add", whole), ("add", "/known"), ("rm", OTHER), ("rm", whole)]
    fake.lasts = False
    assert "the next start forgets this" in run(node.home, "bootstrap", "add", whole).stderr
    assert json.loads(run(node.home, "bootstrap", "rm", OTHER, "--json").stdout)["file_changed"] is True
    done = run(node.home, "bootstrap", "add", "x")
    assert (done.exit_code, done.stderr) == (1, "error: not a multiaddr: 'x'\n")


def test_executor_drain_and_resume(node: Served, fake: FakeOperations) -> None:
    done = run(node.home, "executor", "drain", "--stay")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.splitlines()[0] == "no new work is taken; still under way: 2 requests"
    shown = json.loads(run(node.home, "executor", "drain", "--stay", "--json").stdout)
    assert shown == {"draining": True, "paused": True, "requests": 2}
    assert run(node.home, "executor", "resume").stderr == "this executor takes work again\n"
    assert json.loads(run(node.home, "executor", "resume", "--json").stdout) == {"paused": False, "requests": 0}
    assert fake.asked == [("pause",), ("pause",), ("resume",), ("resume",)]
    assert node.node.drained == 0
    fake.is_executor = False
    done = run(node.home, "executor", "resume")
    assert (done.exit_code, done.stderr) == (1, "error: this node is no executor: it has nothing to resume\n")


def test_executor_price(node: Served, fake: FakeOperations) -> None:
    done = run(node.home, "executor", "price", "m1", "15/60", "EUR")
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr.splitlines()[0] == "m1 costs 15/60 EUR from now on, before 10/30 EUR"
    assert "until the node ends" in done.stderr
    assert run(node.home, "executor", "price", "m1", "10/30 EUR").stderr == "m1 costs 10/30 EUR as before\n"
    shown = json.loads(run(node.home, "executor", "price", "m1", "free", "--json").stdout)
    assert (shown["model"], shown["price"]["currency"], shown["before"]["currency"]) == ("m1", "", "EUR")
    assert fake.asked == [("price", "m1", "15/60 EUR"), ("price", "m1", "10/30 EUR"), ("price", "m1", "free")]
    done = run(node.home, "executor", "price", "m1", "15", "EUR")
    assert (done.exit_code, "is not a price such as 15/60 EUR" in done.stderr) == (1, True)
    done = run(node.home, "executor", "price", "m9", "free")
    assert (done.exit_code, done.stderr) == (1, "error: the backend does not serve m9; it serves m1\n")
    assert run(node.home, "executor", "price", "m1").exit_code == 2


# --- DHT


def test_the_service_keys_are_those_of_the_wire() -> None:
    assert ctl_dht.SERVICES == {"executor": names.SERVICE_EXECUTOR, "validator": names.SERVICE_VALIDATOR}
    assert names.service_model("") == ctl_dht.MODEL_PREFIX


@pytest.mark.parametrize(
    ("args", "key"),
    [
        (["/lloom/x"], "/lloom/x"),
        (["--model", "m:1"], "/lloom/model/1.0.0/m:1"),
        (["--service", "validator"], "/lloom/validator/1.0.0"),
    ],
)
def test_a_key_of_the_dht(node: Served, fake: FakeOperations, args: list[str], key: str) -> None:
    for verb in ("findprovs", "provide", "closest"):
        assert run(node.home, "dht", verb, *args, "--timeout", "9").exit_code == 0
    assert fake.asked == [("findprovs", key, 20, 9.0, None), ("provide", key, 9.0), ("closest", key, 9.0)]


@pytest.mark.parametrize("args", [[], ["/x", "--model", "m"], ["--model", "m", "--service", "executor"]])
def test_not_one_key(tmp_path: Path, args: list[str]) -> None:
    for verb in ("findprovs", "provide", "closest"):
        done = run(tmp_path, "dht", verb, *args)
        assert (done.exit_code, "give one of KEY" in done.stderr) == (2, True)


def test_findprovs(node: Served, fake: FakeOperations) -> None:
    done = run(node.home, "dht", "findprovs", "--model", "m")
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [
        [OTHER, "yes", "/ip4/192.0.2.9/tcp/4001"],
        [PEER, "this", "node", "/ip4/192.0.2.9/tcp/4001"],
    ]
    assert run(node.home, "dht", "findprovs", "/none", "--at", OTHER[-8:], "-n", "3").stderr == (
        f"…{OTHER[-8:]} holds no record of /none (bafkx)\n"
    )
    assert fake.asked[-1] == ("findprovs", "/none", 3, 60.0, OTHER)
    fake.complete = False
    done = run(node.home, "dht", "findprovs", "/none")
    assert "not through after 60 s" in done.stderr
    assert "nobody has a record" in done.stderr
    assert json.loads(run(node.home, "dht", "findprovs", "/none", "--json").stdout)["providers"] == []


def test_closest_provide_findpeer(node: Served) -> None:
    assert run(node.home, "dht", "closest", "/x").stdout.splitlines()[1].split()[0] == OTHER
    assert json.loads(run(node.home, "dht", "closest", "/x", "--json").stdout)["key"] == "/x"
    assert run(node.home, "dht", "provide", "/x").stdout == "/x provided (bafkx)\n"
    assert json.loads(run(node.home, "dht", "provide", "/x", "--json").stdout) == {"key": "/x", "cid": "bafkx"}
    assert run(node.home, "dht", "findpeer", OTHER).stdout == f"/ip4/192.0.2.9/tcp/4001/p2p/{OTHER}\n"
    assert "none of its addresses" in run(node.home, "dht", "findpeer", PEER).stderr
    assert json.loads(run(node.home, "dht", "findpeer", PEER, "--json").stdout)["is_self"] is True
    done = run(node.home, "dht", "findpeer", BAD)
    assert (done.exit_code, done.stderr) == (1, "error: the DHT does not know it\n")


def test_get(node: Served, tmp_path: Path) -> None:
    key = f"/pk/{OTHER}"
    done = run(node.home, "dht", "get", key)
    value = b"\x08\x01\x12\x20" + b"k" * 32
    assert done.stdout.splitlines() == [
        f"key    {key}",
        "kind   Ed25519 public key, 36 bytes",
        f"value  {value.hex()}",
    ]
    out = tmp_path / "out"
    done = run(node.home, "dht", "get", key, "--out", str(out))
    assert (out.read_bytes(), done.stdout, done.stderr) == (value, "", f"{key}: 36 bytes\n")
    assert "cannot be written" in run(node.home, "dht", "get", key, "--out", "/nowhere/x").stderr
    assert run(node.home, "dht", "get", "/pk/x").exit_code == 1


def test_put(node: Served, fake: FakeOperations, tmp_path: Path) -> None:
    file = tmp_path / "record"
    file.write_bytes(b"\x00value")
    assert run(node.home, "dht", "put", "/ipns/x", str(file)).stdout.splitlines()[1] == "kind   6 bytes"
    shown = json.loads(run(node.home, "dht", "put", "--own", "--json").stdout)
    assert shown == {"key": f"/pk/{PEER}", "value": "b3du"}
    assert [one[1:3] for one in fake.asked] == [("/ipns/x", b"\x00value"), (None, b"")]
    for args in ([], ["/ipns/x"], ["/ipns/x", str(file), "--own"]):
        done = run(node.home, "dht", "put", *args)
        assert (done.exit_code, "KEY and FILE, or --own" in done.stderr) == (2, True)
    file.write_bytes(b"x" * 40_000)
    assert "is no record" in run(node.home, "dht", "put", "/ipns/x", str(file)).stderr
    assert "cannot be read" in run(node.home, "dht", "put", "/ipns/x", str(tmp_path / "none")).stderr


# --- gossip, config


def test_gossip(node: Served, fake: FakeOperations) -> None:
    assert run(node.home, "gossip", "topics").stdout.splitlines()[1].split() == ["/lloom/executors/1.0.0", "1"]
    rows = [line.split() for line in run(node.home, "gossip", "peers", "/a b").stdout.splitlines()[1:]]
    assert rows == [[OTHER, "executor", "direct", "yes", "lloom/0.1.0"], [PEER[:-4] + "none", "-", "-", "-", "-"]]
    assert fake.asked[-1] == ("topic_peers", "/a b")
    assert run(node.home, "gossip", "peers", "network").stderr == "no neighbour shares network\n"
    assert json.loads(run(node.home, "gossip", "topics", "--json").stdout)["topics"][0]["peers"] == [OTHER]
    assert json.loads(run(node.home, "gossip", "peers", "network", "--json").stdout)["peers"] == []


def test_config_show_tells_what_p2pd_works_with(node: Served) -> None:
    text = run(node.home, "config", "show").stdout
    rows = [line.split() for line in text.partition("\n\n")[2].splitlines()]
    assert rows[1][:3] == ["dht_k", "20", "kad-dht"]
    assert rows[2][:3] == ["dht_deadline_s", "60", "p2pd"]
    assert rows[3][:3] == ["gossip_heartbeat_s", "-", "heartbeat_s"]
    assert "dht_k" not in run(node.home, "config", "show", "--changed").stdout


def test_an_older_node_is_explained(node: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "lloom_sidecar.admin.client.NodeClient._get_list", lambda self, path, key: self._get("/v1/nothing")
    )
    done = run(node.home, "gossip", "topics")
    assert done.exit_code == 1
    assert "GET /v1/nothing: not found" in done.stderr


# --- requests and routing


def test_request_list_and_show(node: Served, fake: FakeOperations) -> None:
    done = run(node.home, "request", "list")
    head, row = done.stdout.splitlines()
    assert head.split() == ["REQUEST", "STARTED", "MODEL", "CODE", "TOOK", "FIRST", "ASKED", "EXECUTOR"]
    assert row.split() == ["4f" * 16, "2023-11-14", "22:13:20", "UTC", "m1", "ok", "1234ms", "80ms", "2", OTHER]
    assert json.loads(run(node.home, "request", "list", "--json").stdout) == {"requests": fake.requests()}
    done = run(node.home, "request", "show", "4F" * 16)
    facts, _, table = done.stdout.partition("\n\n")
    assert "policy       adaptive, hedged" in facts
    assert table.splitlines()[1].split() == [PEER, "first_byte", "hedged", "70.0ms", "-"]
    assert json.loads(run(node.home, "request", "show", "4f" * 16, "--json").stdout) == fake.requests()[0]
    done = run(node.home, "request", "show", "00")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "`lloomctl request list`" in done.stderr
    fake.requests = list  # type: ignore[method-assign]
    done = run(node.home, "request", "list")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "no request has ended" in done.stderr


def test_explain_a_request(node: Served, fake: FakeOperations) -> None:
    done = run(node.home, "explain", "4f" * 16)
    assert done.exit_code == 0
    assert "choice 1: by two_choices, 4 candidates, not all looked at" in done.stdout
    rows = [line.split() for line in done.stdout.partition("choice 1")[2].splitlines()[2:]]
    assert [row[1] for row in rows] == ["picked", "due", "circuit_open", "price"]
    assert rows[0] == [OTHER, "picked", "40.0ms", "80.0ms", "1/4", "-", "fresh", "direct", "2048", "10/30", "EUR"]
    assert rows[2][5] == "4.2s"
    assert rows[3][2:4] == ["-", "-"]
    assert json.loads(run(node.home, "explain", "4f" * 16, "--json").stdout)["request"] == fake.request()


def test_explain_a_model(node: Served, fake: FakeOperations) -> None:
    done = run(node.home, "explain", "m1", "--policy", "fastest")
    assert done.stdout.splitlines()[:5] == [
        "model         m1",
        "policy        fastest",
        "first tokens  95 % within 120.0ms",
        "first byte    awaited for 500ms while there are others",
        "hedge         off",
    ]
    assert "now: by two_choices" in done.stdout
    assert "error         nobody" in run(node.home, "explain", "m2").stdout
    done = run(node.home, "explain", "m1", "--policy", "best")
    assert (done.exit_code, done.stderr) == (1, "error: 'best' is no policy; there are adaptive\n")

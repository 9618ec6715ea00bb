"""What both ledgers say on real nodes: whole answers, cut ones, ones that are never countersigned, caps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.claims import salted_digest, seal_request
from lloom_sidecar.protocol.network_key import NetworkKey, parse_key_file
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.harness import Network, Node
from tests.harness.hand_peer import HandPeer, Wire, now_ms, open_request_stream
from tests.harness.waiting import wait_until

PRICED = ("--price-prompt", "1000000", "--price-completion", "1000000", "--price-currency", "EUR")
"""One minor unit a token."""
PRICE = pb.Price(prompt_per_million=1_000_000, completion_per_million=1_000_000, currency="EUR")
SALT = b"s" * 16
OFFLINE_VERIFIER = Path(__file__).parents[1] / "golden" / "offline_verifier.py"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """One executor that charges."""
    with Network(validators=1, executors=0, clients=1) as network:
        network.executors.append(network.add("executor", *PRICED))
        network.wait_known(network.client)
        yield network


@pytest.fixture(scope="module")
def hand() -> Iterator[HandPeer]:
    with HandPeer() as peer:
        yield peer


def exchanges(node: Node, request: str | None = None, **wanted: Any) -> list[dict[str, Any]]:
    with node.admin() as admin:
        return [dict(one) for one in admin.exchanges(request=request, **wanted)]


def settled(node: Node, request: str, **facts: Any) -> dict[str, Any]:
    """The one exchange of a request in a node's ledger, once it has these facts."""

    def found() -> list[dict[str, Any]]:
        rows = exchanges(node, request)
        return [one for one in rows if all(one[name] == value for name, value in facts.items())]

    rows: list[dict[str, Any]] = wait_until(found, f"{node.name} to settle", explain=lambda: exchanges(node, request))
    assert len(exchanges(node, request)) == 1
    return rows[0]


# ---------------------------------------------------------------- whole answers
def test_both_ledgers_agree_on_a_whole_answer(network: Network) -> None:
    answer = network.client.chat("chunks=4")
    request = answer.headers["x-request-id"]
    facts = {"owed": True, "reason": "", "outcome": "complete", "acknowledged": True, "cost": 7, "currency": "EUR"}
    ours = settled(network.client, request, role="client", **facts)
    theirs = settled(network.executors[0], request, role="executor", **facts)
    assert ours["request_digest"] == theirs["request_digest"]
    assert (ours["peer"], theirs["peer"]) == (network.executors[0].peer, network.client.peer)
    assert ours["doubts"] == ""


def test_exported_receipts_are_verified_without_a_node(network: Network, tmp_path: Path) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "chunks=3"}]}
    raw = json.dumps(body).encode()
    answer = httpx.post(
        f"{network.client.api}/v1/chat/completions",
        content=raw,
        headers={"content-type": "application/json"},
        trust_env=False,
        timeout=60,
    )
    request = answer.headers["x-request-id"]
    settled(network.executors[0], request, acknowledged=True)
    files = {"body": raw, "answer": answer.content}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for node in (network.client, network.executors[0]):
        exported = node.ctl("receipt", "export", request, "--with-salt")
        assert exported.returncode == 0, exported.stderr
        file = tmp_path / f"{node.home.name}.json"
        file.write_text(exported.stdout)
        texts = ["--body", str(tmp_path / "body"), "--answer", str(tmp_path / "answer")]
        command = [sys.executable, "-m", "lloom_sidecar.cli.lloomctl", "--home", str(tmp_path / "none")]
        done = subprocess.run(
            [*command, "receipt", "verify", str(file), *texts, "--json"], capture_output=True, text=True, check=False
        )
        (verdict,) = json.loads(done.stdout)["receipts"]
        assert {check["name"]: check["holds"] for check in verdict["checks"]} == dict.fromkeys(
            [
                *("request", "receipt", "client", "executor", "request_digest", "model", "price", "cost", "outcome"),
                *("ack", "body", "answer"),
            ],
            True,
        )
        done = subprocess.run(
            [sys.executable, "-I", str(OFFLINE_VERIFIER), str(file)], capture_output=True, text=True, check=False
        )
        assert (done.stdout, done.returncode) == ("holds\n", 0)
    assert "salt" not in json.loads(network.client.ctl("receipt", "export", request).stdout)


def test_usage_is_the_same_on_both_sides(network: Network) -> None:
    request = network.client.chat("chunks=4").headers["x-request-id"]
    settled(network.executors[0], request, acknowledged=True)
    for by in ("model", "peer", "day"):
        sums = []
        for node, other in ((network.client, network.executors[0]), (network.executors[0], network.client)):
            done = node.ctl("usage", "--by", by, "--json")
            row = next(one for one in json.loads(done.stdout)["usage"] if one["currency"] == "EUR")
            if by == "peer":
                assert row["key"] == other.peer
            sums.append((row["owed"], row["cost"], row["completion_tokens"]))
        assert sums[0] == sums[1]
        assert sums[0][1] > 0


# ---------------------------------------------------------------- cut answers
def leave_after(node: Node, prompt: str, events: int) -> str:
    """Read so many events of a streamed chat, then go. Returns the request's id."""
    with node.stream(prompt) as answer:
        lines = answer.iter_lines()
        for _ in range(2 * events):
            next(lines)
        return str(answer.headers["x-request-id"])


def test_an_application_that_leaves_owes_the_last_checkpoint(network: Network) -> None:
    request = leave_after(network.client, "chunks=100000 delay_ms=1", 1500)
    facts = {"owed": True, "reason": "cancelled", "outcome": "partial", "acknowledged": False}
    ours = settled(network.client, request, **facts)
    theirs = settled(network.executors[0], request, **facts)
    assert ours["cost"] >= 1024
    assert theirs["cost"] >= ours["cost"]  # a later one may have been on its way
    exported = network.client.ctl("receipt", "export", request)
    assert set(json.loads(exported.stdout)) == {"format", "request", "checkpoint"}


def test_one_that_leaves_before_any_checkpoint_owes_nothing(network: Network) -> None:
    request = leave_after(network.client, "chunks=1000 delay_ms=20", 3)
    facts = {"owed": False, "reason": "cancelled", "outcome": "", "cost": 0}
    settled(network.client, request, **facts)
    settled(network.executors[0], request, **facts)
    done = network.client.ctl("receipt", "export", request)
    assert (done.returncode, "nothing was signed" in done.stderr) == (1, True)


def test_an_answer_that_the_backend_cuts_owes_its_last_checkpoint(network: Network) -> None:
    events: list[str] = []
    with pytest.raises(httpx.RemoteProtocolError), network.client.stream("chunks=3000 cut=1100") as answer:
        request = answer.headers["x-request-id"]
        events.extend(line for line in answer.iter_lines() if line)
    assert json.loads(events[-1][6:])["error"]["lloom"]["code"] == "backend_unavailable"
    ours = settled(network.client, request, owed=True, outcome="partial")
    theirs = settled(network.executors[0], request, owed=True, outcome="partial", reason="backend_unavailable")
    assert ours["cost"] == theirs["cost"] >= 1024


def test_an_executor_that_is_killed_has_its_last_checkpoint_on_disk(network: Network) -> None:
    executor = network.executors[0]
    with pytest.raises(httpx.RemoteProtocolError), network.client.stream("chunks=100000 delay_ms=1") as answer:
        request = str(answer.headers["x-request-id"])
        for number, _ in enumerate(answer.iter_lines()):
            if number == 2 * 1500:
                wait_until(lambda: exchanges(executor, request), "the checkpoint to be on disk")
                executor.kill()
    executor.start()
    theirs = settled(executor, request, owed=True, outcome="partial", reason="")
    ours = settled(network.client, request, owed=True, outcome="partial", reason="lost")
    assert theirs["request_digest"] == ours["request_digest"]
    assert theirs["cost"] >= 1024
    network.wait_known(network.client)
    wait_until(lambda: network.client.chat("chunks=1").status_code == 200, "it to serve again", timeout_s=30)


# ---------------------------------------------------------------- max cost
def test_the_max_cost_shortens_the_answer(network: Network) -> None:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "chunks=500"}], "stream": True}
    paid = len(json.dumps(body)) + 50
    with (
        httpx.Client(trust_env=False, timeout=60, headers={"x-lloom-max-cost": str(paid)}) as http,
        http.stream("POST", f"{network.client.api}/v1/chat/completions", json=body) as answer,
    ):
        request = answer.headers["x-request-id"]
        events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    assert 45 <= len(events) <= 70
    ours = settled(network.client, request, owed=True, outcome="stopped", acknowledged=True)
    assert ours["cost"] <= paid
    settled(network.executors[0], request, owed=True, outcome="stopped", cost=ours["cost"], acknowledged=True)


def test_a_cap_per_day_refuses_before_anything_is_sent(network: Network) -> None:
    client = network.add("client", "--max-cost-per-day", "300 EUR")
    network.wait_known(client)
    first = client.chat("chunks=20")
    assert first.status_code == 200
    # What is left of the day is the request's max cost: the executor stops there, or says that it is too little.
    codes = set()
    for _ in range(20):
        answer = client.chat("chunks=60")
        if answer.status_code != 200:
            codes.add(answer.json()["error"]["lloom"]["code"])
            break
    assert codes <= {"daily_cap", "max_cost"}
    assert codes
    with client.admin() as admin:
        rows = admin.usage("day", role="client")
    assert sum(row["cost"] for row in rows) <= 300
    client.stop()
    client.start()
    network.wait_known(client)
    again = client.chat("chunks=60")
    assert again.status_code == 402


# ---------------------------------------------------------------- a client that never acknowledges
async def ask_by_hand(wire: Wire[pb.Frame], accept: pb.Accept, hand: HandPeer, to: Node, exchange: int) -> pb.Frame:
    """One priced request; returns END or ERROR. No ACK follows."""
    body = json.dumps({"model": "scripted", "messages": [{"role": "user", "content": "chunks=2"}]}).encode()
    claims = pb.RequestClaims(
        request_id=bytes([exchange]) * 16,
        executor=PeerId.parse(to.peer).raw,
        issued_at_ms=now_ms(),
        challenge=accept.challenge,
        exchange=exchange,
        deadline_ms=60_000,
        operation=pb.OPERATION_CHAT,
        model="scripted",
        body_digest=salted_digest(SALT, body),
        max_price=PRICE,
    )
    envelope = seal_request(claims, hand.signer)
    await wire.send(
        pb.Frame(request=pb.Request(envelope=envelope, salt=SALT, body_length=len(body))), pb.Frame(body=body)
    )
    while True:
        frame = await wire.receive()
        assert frame is not None
        if frame.WhichOneof("kind") in ("end", "error"):
            return frame


async def test_who_never_acknowledges_is_seen_in_the_ledger(network: Network, hand: HandPeer) -> None:
    """That it gets no priced answer any more after a while is a unit test: an ACK is overdue after ten seconds."""
    executor = network.executors[0]
    key: NetworkKey = parse_key_file(network.key_file.read_bytes()).current
    async with hand.daemon(executor) as daemon:
        await hand.say_hello(daemon, executor, [key])
        wire, accept = await open_request_stream(daemon, executor)
        async with wire:
            for exchange in (1, 2):
                assert (await ask_by_hand(wire, accept, hand, executor, exchange)).WhichOneof("kind") == "end"
    rows = await trio.to_thread.run_sync(lambda: exchanges(executor, peer=str(hand.peer)))
    assert [(one["owed"], one["acknowledged"], one["outcome"], one["cost"]) for one in rows] == [
        (True, False, "complete", 5)
    ] * 2


# ---------------------------------------------------------------- several executors
@pytest.fixture(scope="module")
def two() -> Iterator[Network]:
    """Two executors that charge; a heartbeat so slow that a client learns of prices by asking."""
    with Network(validators=1, executors=0, clients=1) as network:
        network.executors += [network.add("executor", *PRICED), network.add("executor", *PRICED)]
        network.wait_known(network.client)
        yield network


def ask(client: Node, prompt: str, **headers: str) -> httpx.Response:
    body = {"model": "scripted", "messages": [{"role": "user", "content": prompt}]}
    return client.post("/v1/chat/completions", body, headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_of_a_retried_request_exactly_one_is_owed(two: Network) -> None:
    bad, good = two.executors
    two.backend_of(bad.peer).set_script(status=500)
    try:
        retried = 0
        for number in range(6):
            answer = ask(two.client, f"chunks=2 number={number}", x_lloom_policy="round-robin")
            assert answer.status_code == 200
            request = answer.headers["x-request-id"]
            tries = int(answer.headers["x-lloom-attempts"])
            rows = wait_until(
                lambda request=request, tries=tries: len(found := exchanges(two.client, request)) == tries and found,  # type: ignore[misc]
                "every attempt to be settled",
                explain=lambda request=request: exchanges(two.client, request),  # type: ignore[misc]
            )
            assert [(one["peer"], one["reason"], one["cost"] > 0) for one in rows if one["owed"]] == [
                (good.peer, "", True)
            ]
            lost = [one for one in rows if not one["owed"]]
            assert {(one["peer"], one["reason"], one["outcome"]) for one in lost} <= {(bad.peer, "refused", "")}
            retried += len(lost)
            for one in lost:  # the executor's ledger has it too, by the same digest, and asks for nothing
                (theirs,) = exchanges(bad, request)
                assert (theirs["request_digest"], theirs["owed"]) == (one["request_digest"], False)
        assert retried
    finally:
        two.backend_of(bad.peer).set_script()


def test_of_two_answers_under_one_idempotency_key_the_first_is_owed(two: Network) -> None:
    requests = [
        ask(two.client, "chunks=2", idempotency_key="order-7").headers["x-request-id"],
        ask(two.client, "chunks=2", idempotency_key="order-7").headers["x-request-id"],
    ]
    settled(two.client, requests[0], owed=True, outcome="complete")
    settled(two.client, requests[1], owed=False, reason="duplicate", outcome="complete")


def test_a_price_that_changes_in_flight_is_what_the_receipt_says(two: Network) -> None:
    """The price is fixed when the REQUEST is taken; who is asked at an old one says so, and is asked again."""
    for executor in two.executors:
        assert executor.ctl("executor", "price", "scripted", "2000000/3000000 EUR").returncode == 0
    try:
        answer = ask(two.client, "chunks=2", x_lloom_max_price="9000000/9000000 EUR")
        assert answer.status_code == 200, answer.text
        request = answer.headers["x-request-id"]
        rows = wait_until(
            lambda: (found := exchanges(two.client, request)) and any(one["owed"] for one in found) and found,
            "the answer to be settled",
        )
        (owed,) = [one for one in rows if one["owed"]]
        assert owed["cost"] == 3 * 2 + 2 * 3
        assert {one["reason"] for one in rows if not one["owed"]} <= {"refused"}
        theirs = settled(two.node_of(owed["peer"]), request, owed=True, acknowledged=True)
        assert theirs["cost"] == owed["cost"]
    finally:
        for executor in two.executors:
            executor.ctl("executor", "price", "scripted", "1000000/1000000 EUR")


def test_numbers_that_cannot_be_are_flagged(two: Network) -> None:
    """Last: its executors stay doubtful."""
    assert "numbers_doubtful" not in two.client.conditions()
    answer = ask(two.client, "chunks=2 lie=1000000", x_lloom_max_price="9000000/9000000 EUR")
    assert answer.status_code == 200
    found = settled(two.client, answer.headers["x-request-id"], owed=True)
    assert "completion_tokens 1000002" in found["doubts"]
    wait_until(lambda: "numbers_doubtful" in two.client.conditions(), "the condition")
    assert two.client.metric("lloom_doubtful_receipts_total") == 1
    listed = json.loads(two.client.ctl("receipt", "list", "--doubtful", "--json").stdout)["receipts"]
    assert [one["request_id"] for one in listed] == [found["request_id"]]

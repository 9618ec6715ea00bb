"""lloomctl on a real small network: every command that asks other nodes; doctor on what is well and what is broken."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result

from lloom_sidecar.cli.lloomctl import root
from lloom_sidecar.errors import PeerUnreachableError, RemoteProtocolError
from lloom_sidecar.identity import load_identity
from lloom_sidecar.network.security_dialogue import NOISE, accepted_security
from lloom_sidecar.node.daemon import find_p2pd
from lloom_sidecar.protocol.framing import frame
from lloom_sidecar.protocol.names import PROTOCOL_HELLO
from lloom_sidecar.protocol.network_key import parse_key_file
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.contract.binaries import find_upstream
from tests.harness import Network, Node
from tests.harness.hand_peer import HandPeer
from tests.harness.waiting import wait_until

FAST = ["--heartbeat", "1"]
TOPICS = {"/lloom/executors/1.0.0", "/lloom/network/1.0.0"}


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(validators=1, executors=1, clients=1, flags=FAST) as network:
        yield network


def ctl(node: Node, *args: str, code: int = 0) -> Any:
    """The JSON that a command prints, or its words on stderr; ``code`` is its expected exit code."""
    done = invoke(node, *args, "--json")
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if done.stdout else done.stderr


def invoke(node: Node, *args: str) -> Result:
    """Run lloomctl inside this process, which saves its start; a few tests run the real one with ``node.ctl``."""
    clean = {"LLOOM_HOME": None, "LLOOM_NODE": None}
    return CliRunner(env=clean).invoke(root, ["--home", str(node.home), *args], prog_name="lloomctl")


def findings(node: Node, *, code: int = 0) -> dict[str, list[dict[str, str]]]:
    """What doctor says, by check."""
    by_check: dict[str, list[dict[str, str]]] = {}
    for one in ctl(node, "doctor", code=code)["findings"]:
        by_check.setdefault(one["check"], []).append(one)
    return by_check


def severities(found: dict[str, list[dict[str, str]]]) -> set[str]:
    return {one["severity"] for many in found.values() for one in many}


# ---------------------------------------------------------------- peers
def test_ping(network: Network) -> None:
    validator = network.validators[0].peer
    done = network.client.ctl("peer", "ping", validator[-8:], "-c", "2", "-i", "0", "--json")
    assert done.returncode == 0, done.stderr
    for one in map(json.loads, done.stdout.splitlines()):
        assert (one["peer"], one["path"], one["member"]) == (validator, "direct", True)
        assert one["rtt_ms"] > 0
        assert abs(one["clock_ahead_ms"]) < 2000
    # An executor that the client is not connected to is dialled.
    ctl(network.client, "peer", "disconnect", network.executors[0].peer)
    # That this node closed the connection says nothing against it.
    assert network.client.executors()[network.executors[0].peer]["state"] == "fresh"
    ctl(network.client, "peer", "ping", network.executors[0].peer, "-c", "1")
    stranger = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
    failed = invoke(network.client, "peer", "ping", stranger, "-c", "1")
    assert (failed.exit_code, "cannot be reached" in failed.stderr) == (1, True)
    assert invoke(network.client, "peer", "ping", network.client.peer).exit_code == 1


def test_disconnect_is_an_event_and_a_validator_comes_back(network: Network) -> None:
    client, validator = network.client, network.validators[0].peer
    done = ctl(client, "peer", "disconnect", validator[-8:])
    assert done == {"peer": validator, "was_connected": True, "is_validator": True}
    with client.admin() as admin:
        closed = [one for one in admin.events(follow=False, kinds=["connection_closed"]) if one["peer"] == validator]
    assert closed[-1]["cause"] == "operator"
    wait_until(lambda: client.peers().get(validator, {}).get("connected"), "the validator to be dialled again")


# ---------------------------------------------------------------- models
def test_models_and_executors(network: Network) -> None:
    executor = network.executors[0].peer
    shown = ctl(network.client, "model", "show", "scripted")
    assert [one["peer"] for one in shown["executors"]] == [executor]
    assert "did you mean scripted" in ctl(network.client, "model", "show", "scriptet", code=1)
    shown = ctl(network.client, "executor", "show", executor[-8:])
    assert (shown["peer"], [one["id"] for one in shown["models"]]) == (executor, ["scripted"])
    asked = ctl(network.client, "model", "query", executor)
    assert [one["id"] for one in asked["models"]] == ["scripted"]
    quote = ctl(network.client, "model", "quote", executor, "scripted")
    assert (quote["model"], quote["price"]["prompt_per_million"]) == ("scripted", 0)
    assert quote["valid_s"] > 60


def offers(node: Node) -> dict[str, Any]:
    """Each model that the node sees, with its first offer's price."""
    return {one["id"]: one["executors"][0]["price"] for one in ctl(node, "model", "list")["models"]}


def test_a_new_price_is_announced_kept_and_asked_for(network: Network) -> None:
    client, executor = network.client, network.executors[0]
    paid = {"prompt_per_million": 15, "completion_per_million": 60, "currency": "EUR"}
    free = {"prompt_per_million": 0, "completion_per_million": 0, "currency": ""}
    done = executor.ctl("executor", "price", "scripted", "15/60", "EUR", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"model": "scripted", "price": paid, "before": free}
    try:
        for node in (client, network.validators[0]):
            wait_until(lambda node=node: offers(node) == {"scripted": paid}, f"{node.name} to know the price")  # type: ignore[misc]
        assert ctl(client, "model", "quote", executor.peer, "scripted")["price"] == paid
        assert client.chat("chunks=1", model="scripted").status_code == 200
        refused = client.post(
            "/v1/chat/completions",
            {"model": "scripted", "messages": [{"role": "user", "content": "chunks=1"}]},
            headers={"x-lloom-max-price": "1/1 EUR"},
        )
        assert refused.status_code == 402, refused.text
    finally:
        ctl(executor, "executor", "price", "scripted", "free")
    wait_until(lambda: offers(client) == {"scripted": free}, "the client to know that it is free again")
    assert "the backend does not serve nothing; it serves scripted" in ctl(
        executor, "executor", "price", "nothing", "free", code=1
    )
    assert "no executor" in ctl(client, "executor", "price", "scripted", "free", code=1)


def test_a_model_that_the_backend_lists_no_more_is_gone(network: Network) -> None:
    client, backend = network.client, network.backends[0]
    backend.set_models(["scripted", "second"])
    wait_until(lambda: set(offers(client)) == {"scripted", "second"}, "the second model to be known")
    assert client.chat("chunks=1", model="second").status_code == 200
    backend.set_models(["scripted"])
    wait_until(lambda: set(offers(client)) == {"scripted"}, "the second model to be gone")
    # Seen within a day: absent for now, not unknown.
    assert client.chat("chunks=1", model="second").status_code == 503
    assert client.chat("chunks=1").status_code == 200


# ---------------------------------------------------------------- DHT
def test_the_dht(network: Network) -> None:
    client, executor, validator = network.client, network.executors[0], network.validators[0]

    def providers(*args: str) -> set[str]:
        return {one["peer"] for one in ctl(client, "dht", "findprovs", *args)["providers"]}

    wait_until(lambda: executor.peer in providers("--model", "scripted"), "the executor's record", timeout_s=20)
    assert providers("--service", "executor") == {executor.peer}
    assert providers("--service", "validator") == {validator.peer}
    # The same CID as other tools name it, and what one other peer holds itself.
    cid = ctl(client, "dht", "findprovs", "--service", "executor")["cid"]
    assert providers(cid) == {executor.peer}
    assert providers("--service", "executor", "--at", validator.peer) == {executor.peer}
    assert providers("--model", "nobody's") == set()

    found = ctl(client, "dht", "findpeer", executor.peer)
    assert executor.address.partition("/p2p/")[0] in found["addrs"]
    near = {one["peer"] for one in ctl(client, "dht", "closest", "--service", "executor")["peers"]}
    assert near == {executor.peer, validator.peer}
    assert validator.peer in {one["peer"] for one in ctl(client, "dht", "closest", validator.peer)["peers"]}

    assert ctl(client, "dht", "provide", "--model", "own")["key"] == "/lloom/model/1.0.0/own"
    # p2pd does not wait until the others have the record.
    wait_until(lambda: providers("--model", "own", "--at", validator.peer) == {client.peer}, "the record elsewhere")


def test_a_record_round_trips(network: Network, tmp_path: Path) -> None:
    client, executor = network.client, network.executors[0]
    ctl(client, "dht", "get", executor.peer, code=1)
    put = ctl(executor, "dht", "put", "--own")
    assert put["key"] == f"/pk/{executor.peer}"
    assert ctl(client, "dht", "get", put["key"]) == put
    # The file form: what was read can be put again by anybody, and nothing else under that key.
    file = tmp_path / "record"
    assert invoke(client, "dht", "get", executor.peer, "--out", str(file)).exit_code == 0
    assert file.read_bytes()[4:] == load_identity(executor.home).peer.ed25519_public_key
    assert ctl(client, "dht", "put", put["key"], str(file)) == put
    file.write_bytes(b"\x08\x01\x12\x20" + bytes(32))
    assert invoke(client, "dht", "put", put["key"], str(file)).exit_code == 1
    assert "/pk/PEER and /ipns/NAME only" in invoke(client, "dht", "put", "/lloom/x", str(file)).stderr


# ---------------------------------------------------------------- gossip, settings
def test_gossip_and_settings(network: Network) -> None:
    assert {one["topic"] for one in ctl(network.client, "gossip", "topics")["topics"]} == TOPICS

    def neighbours() -> set[str]:
        return set(ctl(network.client, "gossip", "peers", "executors")["peers"])

    wait_until(lambda: network.validators[0].peer in neighbours(), "a neighbour in the topic")
    effective = {one["name"]: one["value"] for one in ctl(network.client, "config", "show")["p2pd"]}
    assert (effective["dht_k"], effective["dht_deadline_s"], effective["gossip_heartbeat_s"]) == (20, 60, 1)
    assert effective["dht_mode"] == "server"


# ---------------------------------------------------------------- bootstrap
def test_validators_come_and_go_while_the_node_runs(network: Network) -> None:
    extra = network.add("validator")
    lone = network.add("client", bootstrap=False)
    assert ctl(lone, "bootstrap", "list")["validators"] == []
    assert "validators" in findings(lone)
    done = ctl(lone, "bootstrap", "add", network.validators[0].address)
    assert (done["file_changed"], done["node_changed"], done["lasts"]) == (True, True, True)

    def states() -> dict[str, str]:
        return {one["peer"]: one["state"] for one in ctl(lone, "bootstrap", "list")["validators"]}

    first = network.validators[0].peer
    wait_until(lambda: states() == {first: "joined"}, "the added validator to be joined")
    network.wait_known(lone)
    assert not ctl(lone, "bootstrap", "add", network.validators[0].address)["node_changed"]
    ctl(lone, "bootstrap", "add", extra.address)
    wait_until(lambda: states() == {first: "joined", extra.peer: "joined"}, "both")

    assert ctl(lone, "bootstrap", "rm", first[-8:])["node_changed"]
    assert states() == {extra.peer: "joined"}
    assert first not in {one["peer"] for one in lone.status()["network_status"]}
    ctl(lone, "bootstrap", "rm", first, code=1)
    ctl(lone, "peer", "disconnect", first)
    # What was removed is not dialled again, also after a restart, which reads the file.
    assert lone.stop() == 0
    lone.start()
    wait_until(lambda: states() == {extra.peer: "joined"}, "the file's validator after a restart")
    # A node whose validators are flags says that the file comes after them.
    assert not ctl(network.client, "bootstrap", "add", extra.address)["lasts"]
    ctl(network.client, "bootstrap", "rm", extra.address)
    # One that does not answer: the error is shown.
    extra.stop()

    def failed() -> list[dict[str, Any]]:
        return [one for one in ctl(lone, "bootstrap", "list")["validators"] if one["state"] == "unreachable"]

    (one,) = wait_until(failed, "the validator to be missed", timeout_s=20)
    assert one["last_error"]
    found = findings(lone, code=1)["validators"]
    assert [one["severity"] for one in found] == ["error"]
    assert "nothing listens at its address" in found[0]["text"]
    assert "Start the validator" in found[0]["remedy"]
    lone.stop()


# ---------------------------------------------------------------- doctor: well
def test_a_healthy_network_has_no_error(network: Network) -> None:
    for node in network.nodes:

        def ready(node: Node = node) -> bool:
            found = findings(node)
            return severities(found) <= {"ok", "info", "skipped"}

        wait_until(ready, f"{node.name} to be well", timeout_s=30)
    found = findings(network.executors[0])
    for key in ("/lloom/executor/1.0.0", "/lloom/model/1.0.0/scripted"):
        assert re.search(rf"{key} at [1-9] of [1-9]", found["provider_record"][0]["text"])
    assert "refuses plaintext, speaks Noise" in found["plaintext"][0]["text"]
    assert found["validators"][0]["text"].startswith("1 of 1 answer")
    assert found["clock"][0]["severity"] == "ok"
    done = network.client.ctl("doctor")
    assert (done.returncode, "ERROR" in done.stdout) == (0, False)


# ---------------------------------------------------------------- doctor: broken
def test_a_record_that_nobody_holds(network: Network) -> None:
    lone = network.add("executor", bootstrap=False)
    found = findings(lone)["provider_record"]
    assert [one["severity"] for one in found] == ["info"]
    assert "Connect to a validator" in found[0]["remedy"]
    lone.stop()


def test_a_node_that_has_ended(network: Network) -> None:
    node = network.add("client")
    node.kill()
    found = findings(node, code=3)
    assert found["node"][0]["severity"] == "error"
    assert "lloom-sidecar run" in found["node"][0]["remedy"]
    assert found["home"][0]["severity"] == "ok"


def test_p2pd_that_cannot_be_started_again(network: Network) -> None:
    copy = network.root / "p2pd"
    shutil.copy(find_p2pd(None), copy)
    node = network.add("client", "--p2pd", str(copy))
    assert findings(node)["stale_binary"][0]["severity"] == "ok"
    copy.unlink()
    found = findings(node)
    assert found["stale_binary"][0]["severity"] == "warning"
    assert "Restart the node" in found["stale_binary"][0]["remedy"]
    assert found["binary"][0]["severity"] == "ok"  # by the home's settings the next start uses the packaged one
    node.kill("p2pd")
    wait_until(lambda: not node.status()["p2pd"]["up"], "p2pd to be missed")
    found = findings(node, code=1)
    assert found["p2pd"][0]["severity"] == "error"
    assert "p2pd.log" in found["p2pd"][0]["remedy"]
    assert found["validators"][0]["severity"] == found["plaintext"][0]["severity"] == "skipped"
    done = invoke(node, "peer", "ping", network.validators[0].peer, "-c", "1")
    assert (done.exit_code, "p2pd is not up" in done.stderr) == (1, True)
    node.stop()


def test_another_key_than_the_running_nodes(network: Network) -> None:
    node = network.add("client")
    identity, network_key = node.home / "identity.key", node.home / "network.key"
    shutil.copy(network.client.home / "identity.key", identity)
    assert node.ctl("network", "rotate").returncode == 0
    network_key.chmod(0o644)
    found = findings(node, code=1)
    assert found["identity"][0]["severity"] == "error"
    assert found["network_key"][0]["severity"] == "warning"
    assert "Restart the node" in found["network_key"][0]["remedy"]
    node.stop()


def test_a_validator_of_another_network(network: Network) -> None:
    node = network.add("client", in_network=False, start=False)
    assert node.ctl("network", "create").returncode == 0
    node.start()

    def explained() -> bool:
        found = [one for one in findings(node, code=1)["validators"] if one["severity"] == "error"]
        return any("another network" in one["text"] and "network show" in one["remedy"] for one in found)

    wait_until(explained, "the reason", explain=lambda: findings(node, code=1)["validators"])
    node.stop()


def test_open_settings_and_a_wrong_peer_id_are_told(network: Network) -> None:
    wrong = network.validators[0].address.rpartition("/")[0] + f"/{network.client.peer}"
    node = network.add("client", "--open", "--bootstrap", wrong, bootstrap=False)

    def told() -> bool:
        return "another node answers" in json.dumps(findings(node, code=1)["validators"])

    wait_until(told, "the reason", explain=lambda: findings(node, code=1)["validators"])
    assert findings(node, code=1)["open_settings"][0]["severity"] == "warning"
    node.stop()


class WrongClock(HandPeer):
    """A validator whose clock is ahead."""

    ahead_ms = 0

    def info(self, **kwargs: Any) -> pb.NodeInfo:
        """As everybody's, with its time."""
        found = super().info(**kwargs)
        found.now_ms += self.ahead_ms
        return found


@pytest.fixture
def wrong_clock() -> Iterator[WrongClock]:
    # Outside the event loop: it starts its p2pd by one of its own.
    hand = WrongClock()
    with hand:
        yield hand


@pytest.mark.parametrize(("ahead_min", "severity"), [(2, "warning"), (20, "error")])
async def test_a_clock_that_differs_from_the_validators(
    network: Network, wrong_clock: WrongClock, ahead_min: int, severity: str
) -> None:
    key = parse_key_file(network.key_file.read_bytes()).current
    hand = wrong_clock
    hand.ahead_ms = ahead_min * 60_000
    async with hand.serving({PROTOCOL_HELLO: lambda stream: hand.answer_hello(stream, [key])}):
        node = await trio.to_thread.run_sync(
            lambda: network.add("client", "--bootstrap", hand.address, bootstrap=False)
        )
        done = await trio.to_thread.run_sync(lambda: node.ctl("doctor", "--json"))
        await trio.to_thread.run_sync(node.stop)
    assert done.returncode == (1 if severity == "error" else 0), done.stdout
    found = {one["check"]: one for one in json.loads(done.stdout)["findings"]}
    assert found["validators"]["severity"] == "ok"
    assert found["clock"]["severity"] == severity
    assert abs(float(found["clock"]["text"].split()[0]) - ahead_min * 60) < 2
    assert "s behind the validators' clocks" in found["clock"]["text"]
    assert "timedatectl" in found["clock"]["remedy"]


def test_an_unmodified_p2pd_is_well_and_its_lacks_are_told(network: Network) -> None:
    node = network.add("executor", "--p2pd", str(find_upstream()))

    def ready() -> bool:
        return severities(findings(node)) <= {"ok", "info", "skipped"}

    wait_until(ready, "the node to be well", timeout_s=30, explain=lambda: findings(node))
    found = findings(node)
    assert found["features"][0]["severity"] == "info"
    for words in ("mDNS", "hole punching", "relays for nodes behind NAT", "raised limits"):
        assert words in found["features"][0]["text"]
    assert "refuses plaintext, speaks Noise" in found["plaintext"][0]["text"]
    assert "/lloom/executor/1.0.0 at " in found["provider_record"][0]["text"]
    node.stop()


# ---------------------------------------------------------------- the dialogue beneath
class _Listener:
    """Answers each connection with fixed bytes; closes it then."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._sock.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._sock.accept()
            except OSError:
                return
            with connection:
                connection.recv(1000)
                if self._answer == b"silent":
                    connection.settimeout(10)
                    connection.recv(1)
                connection.sendall(self._answer)

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


MULTISTREAM = frame(b"/multistream/1.0.0\n")


async def test_a_listener_that_offers_plaintext_is_found_out() -> None:
    listener = _Listener(MULTISTREAM + frame(b"/plaintext/2.0.0\n"))
    try:
        assert await accepted_security("127.0.0.1", listener.port, ["/plaintext/2.0.0"]) == {"/plaintext/2.0.0"}
    finally:
        listener.close()


async def test_our_listener_does_not(network: Network) -> None:
    port = int(network.client.address.split("/")[4])
    assert await accepted_security("127.0.0.1", port) == {NOISE}


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", PeerUnreachableError),
        (MULTISTREAM, PeerUnreachableError),
        (b"silent", PeerUnreachableError),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" * 30, RemoteProtocolError),
        (MULTISTREAM + frame(b"something\n"), RemoteProtocolError),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", RemoteProtocolError),
    ],
)
async def test_what_is_no_libp2p_listener(answer: bytes, error: type[Exception]) -> None:
    listener = _Listener(answer)
    try:
        with pytest.raises(error):
            await accepted_security("127.0.0.1", listener.port, [NOISE], timeout_s=1)
    finally:
        listener.close()
    with pytest.raises(PeerUnreachableError, match="nobody listens"):
        await accepted_security("127.0.0.1", listener.port, [NOISE])

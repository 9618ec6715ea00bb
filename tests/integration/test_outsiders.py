"""Those who do not belong: nodes of no network or of another one, proofs at second hand, pages of other web sites."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trio

from lloom_sidecar.cli.network_files import create_network
from lloom_sidecar.identity import load_network_keys
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.hello import HelloDone, HelloRefused, membership_proof
from lloom_sidecar.protocol.names import PROTOCOL_HELLO, PROTOCOL_REQUEST
from lloom_sidecar.protocol.network_key import NetworkKey, format_key_file
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.harness import Network, Node, ScriptedBackend
from tests.harness.hand_peer import HandPeer, Wire, now_ms
from tests.harness.waiting import wait_until

GRACE_MS = 8_000
"""How long the old key counts in the test that waits for its end."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    # A quick heartbeat: strangers find each other by gossip only.
    with Network(validators=1, executors=1, clients=1, flags=["--heartbeat", "1"]) as network:
        yield network


@dataclass
class Strangers:
    """Nodes of no network or of another one, all connected to our validator's p2pd."""

    open_client: Node
    open_executor: Node
    open_backend: ScriptedBackend
    other_executor: Node
    """Of another network; serves the same model as ours and one of its own."""
    other_backend: ScriptedBackend


@pytest.fixture(scope="module")
def strangers(network: Network) -> Strangers:
    open_client = network.add("client", "--open", start=False, in_network=False)
    open_executor = network.add("executor", "--open", start=False, in_network=False)
    network.backends[-1].set_models(["open"])
    other_executor = network.add("executor", start=False, in_network=False)
    create_network(other_executor.home)
    network.backends[-1].set_models(["scripted", "other"])
    for node in (open_client, open_executor, other_executor):
        node.start(wait=False)
    for node in (open_client, open_executor, other_executor):
        node.wait_up()
    return Strangers(open_client, open_executor, network.backends[1], other_executor, network.backends[2])


@pytest.fixture(scope="module")
def hand() -> Iterator[HandPeer]:
    with HandPeer() as hand:
        yield hand


@pytest.fixture
def key(network: Network) -> NetworkKey:
    return load_network_keys(network.key_file).current


# ---------------------------------------------------------------- real nodes
def test_two_open_nodes_serve_each_other_and_say_so(network: Network, strangers: Strangers) -> None:
    client, executor = strangers.open_client, strangers.open_executor
    network.wait_known(client, [executor], timeout_s=30)
    answer = client.chat("chunks=2", model="open")
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-lloom-executor"] == executor.peer
    assert len(strangers.open_backend.requests()) == 1
    for node in (client, executor):
        assert "open_network" in node.conditions()
        shown = node.ctl("status")
        assert shown.returncode == 0
        assert "open_network" in shown.stdout + shown.stderr


def test_an_open_client_is_not_served_by_an_executor_that_is_not_open(network: Network, strangers: Strangers) -> None:
    # Hello does not tell it what there is; only the topic does, when everything is announced because something changed.
    with network.executors[0].admin() as admin:
        prices = itertools.count(1)

        def is_heard() -> bool:
            admin.set_price("scripted", f"{next(prices)}/1 EUR")
            return network.executors[0].peer in strangers.open_client.executors()

        # Whoever has just joined the topic is not yet in everybody's mesh: said once, it may go unheard.
        wait_until(is_heard, "the stranger to hear of the executor", timeout_s=30, poll_s=1.5)
        admin.set_price("scripted", "free")
    answer = strangers.open_client.chat("a secret chunks=2")
    assert answer.status_code in (404, 502, 503), answer.text
    assert network.backends[0].requests() == []
    assert strangers.other_backend.requests() == []
    # At hello, or at the request: who was refused at hello is not asked again for a while.
    assert network.executors[0].metric("lloom_refused_total", code="not_member") > 0
    assert network.executors[0].peers().get(strangers.open_client.peer, {"member": False})["member"] is False


# ---------------------------------------------------------------- hello by hand
async def begin(daemon: Daemon, to: Node, network_ids: list[bytes]) -> tuple[Wire[pb.HelloFrame], bytes]:
    nonce = os.urandom(32)
    wire = Wire(await daemon.open_stream(PeerId.parse(to.peer), PROTOCOL_HELLO), pb.HelloFrame)
    await wire.send(pb.HelloFrame(hello=pb.Hello(version_major=1, nonce=nonce, network_ids=network_ids)))
    return wire, nonce


def fields_of(message: pb.HelloFrame) -> set[str]:
    """Every field that was sent, as ``kind.field``."""
    kind = message.WhichOneof("kind")
    assert kind is not None
    return {f"{kind}.{field.name}" for field, _ in getattr(message, kind).ListFields()}


@pytest.mark.parametrize("role", ["validator", "executor", "client"])
@pytest.mark.parametrize("named", ["no network", "another network"])
async def test_a_stranger_learns_nothing_in_hello(network: Network, hand: HandPeer, role: str, named: str) -> None:
    node = {"validator": network.validators, "executor": network.executors, "client": network.clients}[role][0]
    before = await trio.to_thread.run_sync(lambda: node.metric("lloom_refused_total", code="not_member"))
    async with hand.daemon(node) as daemon:
        wire, _ = await begin(daemon, node, [] if named == "no network" else [os.urandom(32)])
        async with wire:
            answer = await wire.receive_kind("refuse")
            assert fields_of(answer) == {"refuse.code", "refuse.message"}
            assert answer.refuse.code == "not_member"
            # The whole of what came is that one frame, of fixed words.
            assert wire.received[1:] == answer.SerializeToString() or wire.received[2:] == answer.SerializeToString()
            for secret in (node.peer.encode(), str(node.home).encode(), b"/ip4/", b"scripted", b"lloom/"):
                assert secret not in wire.received
    after = await trio.to_thread.run_sync(lambda: node.metric("lloom_refused_total", code="not_member"))
    assert after > before


async def test_whoever_knows_the_networks_public_id_learns_no_more_than_that(
    network: Network, hand: HandPeer, key: NetworkKey
) -> None:
    (validator,) = network.validators
    async with hand.daemon(validator) as daemon:
        wire, _ = await begin(daemon, validator, [key.network_id])
        async with wire:
            reply = await wire.receive_kind("reply")
            # version_minor is 0, which protobuf does not send.
            assert fields_of(reply) == {"reply.version_major", "reply.nonce", "reply.network_id", "reply.proof"}
            assert reply.reply.network_id == key.network_id
            await wire.send(pb.HelloFrame(prove=pb.Prove(proof=os.urandom(32), node=hand.info())))
            refuse = await wire.receive_kind("refuse")
            assert fields_of(refuse) == {"refuse.code", "refuse.message"}
            assert refuse.refuse.code == "bad_proof"
            await wire.send(pb.HelloFrame(catalogue_query=pb.CatalogueQuery()))
            await wire.expect_silence()


@pytest.mark.parametrize("what", ["catalogue_query", "prove", "welcome"])
async def test_nothing_can_be_had_before_hello(network: Network, hand: HandPeer, what: str) -> None:
    (validator,) = network.validators
    frames = {
        "catalogue_query": pb.HelloFrame(catalogue_query=pb.CatalogueQuery()),
        "prove": pb.HelloFrame(prove=pb.Prove(node=hand.info())),
        "welcome": pb.HelloFrame(welcome=pb.Welcome(node=hand.info())),
    }
    async with (
        hand.daemon(validator) as daemon,
        Wire(await daemon.open_stream(PeerId.parse(validator.peer), PROTOCOL_HELLO), pb.HelloFrame) as wire,
    ):
        await wire.send(frames[what])
        await wire.expect_end()
        assert wire.received == b""


async def test_a_member_by_hand_is_welcome(network: Network, hand: HandPeer, key: NetworkKey) -> None:
    """The tests around differ from this one in the proof: without it their refusals would prove nothing."""
    (validator,) = network.validators
    async with hand.daemon(validator) as daemon:
        wire, nonce = await begin(daemon, validator, [key.network_id])
        async with wire:
            reply = (await wire.receive_kind("reply")).reply
            await wire.send(prove(hand, validator, key, nonce, reply.nonce))
            welcome = (await wire.receive_kind("welcome")).welcome
            assert list(welcome.node.roles) == [pb.ROLE_VALIDATOR]
            await wire.send(pb.HelloFrame(catalogue_query=pb.CatalogueQuery()))
            await wire.receive_kind("catalogue_entry")


def prove(
    hand: HandPeer,
    to: Node,
    key: NetworkKey,
    nonce: bytes,
    their_nonce: bytes,
    *,
    opener: PeerId | None = None,
    by_opener: bool = True,
) -> pb.HelloFrame:
    proof = membership_proof(
        key,
        by_opener=by_opener,
        opener=opener or hand.peer,
        answerer=PeerId.parse(to.peer),
        nonce_opener=nonce,
        nonce_answerer=their_nonce,
    )
    return pb.HelloFrame(prove=pb.Prove(proof=proof, node=hand.info()))


@pytest.mark.parametrize("how", ["reflected", "replayed", "made for another peer", "of another key", "none"])
async def test_a_proof_at_second_hand_is_refused(network: Network, hand: HandPeer, key: NetworkKey, how: str) -> None:
    (validator,) = network.validators
    before = await trio.to_thread.run_sync(lambda: validator.metric("lloom_refused_total", code="bad_proof"))
    async with hand.daemon(validator) as daemon:
        wire, nonce = await begin(daemon, validator, [key.network_id])
        async with wire:
            reply = (await wire.receive_kind("reply")).reply
            if how == "reflected":
                await wire.send(pb.HelloFrame(prove=pb.Prove(proof=reply.proof, node=hand.info())))
            elif how == "replayed":
                # A proof that held, for other nonces of the same two peers.
                await wire.send(prove(hand, validator, key, nonce, os.urandom(32)))
            elif how == "made for another peer":
                client = PeerId.parse(network.client.peer)
                await wire.send(prove(hand, validator, key, nonce, reply.nonce, opener=client))
            elif how == "of another key":
                await wire.send(prove(hand, validator, NetworkKey(bytes(32)), nonce, reply.nonce))
            else:
                await wire.send(pb.HelloFrame(prove=pb.Prove(node=hand.info())))
            assert (await wire.receive_kind("refuse")).refuse.code == "bad_proof"
        # It is no member now, whatever it did.
        executor = network.executors[0]
    async with hand.daemon(executor) as daemon:
        stream = await daemon.open_stream(PeerId.parse(executor.peer), PROTOCOL_REQUEST)
        async with Wire(stream, pb.Frame) as request:
            await request.send(pb.Frame(open=pb.Open(version_major=1)))
            assert (await request.receive_kind("error")).error.code == "hello_required"
    after = await trio.to_thread.run_sync(lambda: validator.metric("lloom_refused_total", code="bad_proof"))
    assert after == before + 1


@pytest.mark.parametrize("how", ["carried on", "without a network", "reflected"])
async def test_a_node_in_the_middle_gets_no_proof_out_of_a_victim(
    network: Network, hand: HandPeer, key: NetworkKey, how: str
) -> None:
    """The victim takes the node in the middle for a validator; that one carries its HELLO on to a real member."""
    (validator,) = network.validators
    streams: list[list[pb.HelloFrame]] = []

    node = await trio.to_thread.run_sync(
        lambda: network.add("client", "--bootstrap", hand.address, start=False, bootstrap=False)
    )

    async def middle(stream: P2PStream) -> None:
        if str(stream.peer) != node.peer:
            return  # other nodes may look in; an open one would even prove that it has no network
        async with Wire(stream, pb.HelloFrame) as victim:
            hello = await victim.receive_kind("hello")
            got = [hello]
            streams.append(got)
            if how == "carried on":
                async with hand.daemon(validator) as daemon:
                    far = Wire(await daemon.open_stream(PeerId.parse(validator.peer), PROTOCOL_HELLO), pb.HelloFrame)
                    async with far:
                        await far.send(hello)
                        await victim.send(await far.receive_kind("reply"))
            else:
                proof = hello.hello.nonce if how == "reflected" else b""
                named = key.network_id if how == "reflected" else b""
                reply = pb.Reply(version_major=1, nonce=os.urandom(32), network_id=named, proof=proof)
                await victim.send(pb.HelloFrame(reply=reply))
            while (message := await victim.receive()) is not None:
                got.append(message)

    code = "not_member" if how == "without a network" else "bad_proof"
    async with hand.serving({PROTOCOL_HELLO: middle}):
        try:
            await trio.to_thread.run_sync(node.start)
            await trio.to_thread.run_sync(
                lambda: wait_until(
                    lambda: node.metric("lloom_refused_total", code=f"hello_{code}") >= 2,
                    "the victim to refuse",
                    timeout_s=30,
                    explain=node.log_tail,
                )
            )
        finally:
            await trio.to_thread.run_sync(node.stop)
    assert len(streams) >= 2
    for got in streams:
        # The victim closes behind its REFUSE, so that one may be lost; a PROVE never came.
        for message, kind in zip(got, ("hello", "refuse"), strict=False):
            assert message.WhichOneof("kind") == kind
        assert len(got) <= 2
        assert fields_of(got[0]) <= {"hello.version_major", "hello.version_minor", "hello.nonce", "hello.network_ids"}
        assert [message.refuse.code for message in got[1:]] in ([], [code])
    nonces = {got[0].hello.nonce for got in streams}
    assert len(nonces) == len(streams)


# ---------------------------------------------------------------- rotation
def test_a_node_with_the_new_key_is_served_by_one_with_the_old(network: Network) -> None:
    rotated = network.add("client", start=False)
    done = rotated.ctl("network", "rotate", "--keep-old", "1h")
    assert done.returncode == 0, done.stderr
    rotated.start()
    try:
        network.wait_known(rotated, timeout_s=30)
        answer = rotated.chat("chunks=1")
        assert answer.status_code == 200, answer.text
        wait_until(lambda: "previous_key" in rotated.conditions(), "the condition previous_key")
    finally:
        rotated.stop()


async def test_the_old_key_counts_until_the_stated_time(network: Network, hand: HandPeer, key: NetworkKey) -> None:
    new = NetworkKey(os.urandom(32))
    node = await trio.to_thread.run_sync(lambda: network.add("validator", start=False, bootstrap=False))
    until_ms = now_ms() + GRACE_MS
    (node.home / "network.key").write_bytes(format_key_file(new, (key, until_ms)))
    await trio.to_thread.run_sync(node.start)
    accepted = 0
    try:
        async with hand.daemon(node) as daemon:
            with trio.fail_after(60):
                while True:
                    asked_ms = now_ms()
                    outcome = await hand.say_hello(daemon, node, [key])
                    if isinstance(outcome, HelloRefused):
                        break
                    assert isinstance(outcome, HelloDone)
                    assert outcome.is_member
                    assert outcome.network_id == key.network_id
                    assert asked_ms < until_ms
                    accepted += 1
                    await trio.sleep(0.1)
            assert outcome.code == "not_member"
            assert now_ms() >= until_ms
            assert accepted
            # Who holds both is known by the new one, before and after.
            outcome = await hand.say_hello(daemon, node, [new, key])
            assert isinstance(outcome, HelloDone)
            assert outcome.network_id == new.network_id
    finally:
        await trio.to_thread.run_sync(node.stop)


# ---------------------------------------------------------------- strangers within reach
def test_a_client_sends_nothing_to_executors_outside_its_network(network: Network, strangers: Strangers) -> None:
    outside = (strangers.open_executor, strangers.other_executor)
    # It is even led to them: what keeps it from them is not that it never met them.
    led = [part for node in outside for part in ("--bootstrap", node.address)]
    client = network.add("client", *led, start=False)
    client.start()
    try:
        network.wait_known(client, timeout_s=30)
        wait_until(
            lambda: client.metric("lloom_refused_total", code="hello_not_member") >= 2,
            "the client to have met the strangers",
            timeout_s=30,
            explain=client.log_tail,
        )
        open_before = len(strangers.open_backend.requests())
        for model in ("open", "other"):
            answer = client.chat("a secret chunks=2", model=model)
            assert answer.status_code in (404, 503), answer.text
        with client.admin() as admin:
            assert {one["id"] for one in admin.models()} == {"scripted"}
        for _ in range(6):
            answer = client.chat("chunks=1")
            assert answer.headers["x-lloom-executor"] == network.executors[0].peer
        pin = {"x-lloom-pin-executor": strangers.other_executor.peer}
        body = {"model": "scripted", "messages": [{"role": "user", "content": "a secret chunks=1"}]}
        assert client.post("/v1/chat/completions", body, headers=pin).status_code in (404, 503)
        assert len(strangers.open_backend.requests()) == open_before
        assert strangers.other_backend.requests() == []
    finally:
        client.stop()


# ---------------------------------------------------------------- the API, and web pages of others
BODY = {"model": "scripted", "messages": [{"role": "user", "content": "chunks=1"}]}


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"origin": "https://evil.example"}, 403, "origin_not_allowed"),
        ({"origin": "null"}, 403, "origin_not_allowed"),
        ({"sec-fetch-site": "cross-site"}, 403, "cross_site"),
        ({"sec-fetch-site": "same-site"}, 403, "cross_site"),
        ({"host": "evil.example"}, 403, "host_not_allowed"),
        ({"host": "localhost.evil.example"}, 403, "host_not_allowed"),
        ({"content-type": "text/plain"}, 415, "content_type"),
        ({"content-type": "application/x-www-form-urlencoded"}, 415, "content_type"),
    ],
)
def test_a_page_of_another_site_cannot_spend_a_users_slots(
    network: Network, headers: dict[str, str], status: int, code: str
) -> None:
    client, backend = network.client, network.backends[0]
    before = len(backend.requests())
    answer = client.post("/v1/chat/completions", BODY, headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert len(backend.requests()) == before
    assert client.chat("chunks=1").status_code == 200


def test_a_page_from_here_may(network: Network) -> None:
    client = network.client
    headers = {"origin": client.api, "sec-fetch-site": "same-origin", "host": client.api.removeprefix("http://")}
    assert client.post("/v1/chat/completions", BODY, headers=headers).status_code == 200


def test_an_api_that_others_reach_wants_its_key(network: Network, tmp_path: Path) -> None:
    keys = tmp_path / "api.keys"
    keys.write_text("# of the team\nfirst-key\nsecond-key\n")
    node = network.add("client", "--api", "0.0.0.0:0", "--api-key-file", str(keys), start=False)
    node.start()
    try:
        network.wait_known(node, timeout_s=30)
        url = node.api

        def ask(**headers: str) -> httpx.Response:
            return httpx.post(f"{url}/v1/chat/completions", json=BODY, headers=headers, timeout=60, trust_env=False)

        for refused in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first-key"}):
            answer = ask(**refused)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
        for good in ("first-key", "second-key"):
            assert ask(authorization=f"Bearer {good}").status_code == 200
        # With a key any Host will do, an Origin will not.
        assert ask(authorization="Bearer first-key", host="lloom.example.org").status_code == 200
        assert ask(authorization="Bearer first-key", origin="https://evil.example").status_code == 403
        shown = node.ctl("config", "show").stdout
        assert "first-key" not in shown + node.log_path.read_text()
        assert str(keys) in shown
    finally:
        node.stop()


def test_a_rotated_executor_is_found_by_a_client_that_has_only_the_old_key(network: Network, key: NetworkKey) -> None:
    executor = network.add("executor", start=False)
    rotated = format_key_file(NetworkKey(os.urandom(32)), (key, now_ms() + 3_600_000))
    (executor.home / "network.key").write_bytes(rotated)
    backend = network.backends[-1]
    executor.start()
    try:
        backend.set_models(["only-here"])
        # Its announcements have the new key's tag, which the client cannot check; hello proves the old one to it.
        wait_until(
            lambda: network.client.chat("chunks=2", model="only-here").status_code == 200,
            "the rotated executor to serve a client with the old key",
            timeout_s=60,
            explain=network.client.log_tail,
        )
    finally:
        executor.stop()

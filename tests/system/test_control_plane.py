"""The network finds itself, on real nodes: status, rejoining, offenders, strangers, events."""

from __future__ import annotations

import sqlite3
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import pytest
import trio

from lloom_sidecar.errors import DaemonError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.network.bootstrap import VALIDATOR_TAG, VALIDATOR_WEIGHT
from lloom_sidecar.network.tags import Tags
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.protocol.announcement import seal_announcement
from lloom_sidecar.protocol.names import PROTOCOL_HELLO, TOPIC_EXECUTORS, TOPIC_NETWORK
from lloom_sidecar.protocol.network_key import NetworkKey, parse_key_file
from lloom_sidecar.protocol.offers import Kind, ModelOffer
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.status import NetworkStatus, seal_status
from tests.contract.binaries import RealNode, find_ours
from tests.harness import Network, Node
from tests.harness.hand_peer import HandPeer, Wire, now_ms
from tests.harness.waiting import wait_until

DEAD = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
FAST = ["--heartbeat", "1"]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(validators=1, executors=2, clients=1, flags=FAST) as network:
        yield network


@pytest.fixture
def hand() -> Iterator[HandPeer]:
    with HandPeer() as hand:
        yield hand


def key_of(network: Network) -> NetworkKey:
    return parse_key_file(network.key_file.read_bytes()).current


def events_of(node: Node, *kinds: str) -> list[dict[str, object]]:
    with node.admin() as admin:
        return list(admin.events(follow=False, kinds=list(kinds)))


def errors_of(node: Node) -> set[object]:
    return {event["code"] for event in events_of(node, "network_error")}


# ---------------------------------------------------------------- status
def test_the_validators_status_reaches_every_node(network: Network) -> None:
    validator = network.validators[0].peer
    for node in (network.client, network.executors[0]):

        def complete(node: Node = node) -> list[dict[str, object]]:
            heard = node.status()["network_status"]
            return [one for one in heard if one["executors"] == 2]

        (heard,) = wait_until(complete, f"{node.name} to hear the status", timeout_s=40)
        assert heard["peer"] == validator
        assert heard["current"]
        assert heard["models"][0]["id"] == "scripted"
        assert heard["models"][0]["executors"] == 2
        assert heard["members"] == 4
        assert heard["software"][0]["nodes"] == 4
        assert heard["slots"] == heard["models"][0]["slots"]
    own = network.validators[0].status()["network_status"]
    assert [one["peer"] for one in own] == [validator]
    assert network.client.metric("lloom_messages_received_total", kind="status") >= 1


async def test_a_status_of_somebody_else_is_counted_and_not_shown(network: Network, hand: HandPeer) -> None:
    def dropped() -> bool:
        return network.client.metric("lloom_statuses_dropped_total", reason="envelope") > 0

    async with hand.daemon(network.client) as daemon, daemon.subscribe(TOPIC_NETWORK):
        await _topic_peer(daemon, TOPIC_NETWORK)
        status = NetworkStatus(executors=99)
        with trio.fail_after(10):
            sequence = 0
            while True:
                # What is published before the mesh has formed is lost.
                sequence += 1
                raw = seal_status(
                    signer=hand.signer,
                    key=key_of(network),
                    sequence=sequence,
                    issued_at_ms=now_ms(),
                    ttl_s=60,
                    status=status,
                )
                # One author's messages arrive in order: when garbage is seen to be dropped, the status was looked at.
                await daemon.publish(TOPIC_NETWORK, raw)
                await daemon.publish(TOPIC_NETWORK, b"no status at all")
                await trio.sleep(1)
                if await trio.to_thread.run_sync(dropped):
                    break
    shown = {one["peer"] for one in network.client.status()["network_status"]}
    assert shown == {network.validators[0].peer}


async def _topic_peer(daemon: Daemon, topic: str) -> None:
    with trio.fail_after(15):
        while not await daemon.topic_peers(topic):
            await trio.sleep(0.05)


# ---------------------------------------------------------------- strangers
async def test_another_major_version_is_told_and_shown(network: Network, hand: HandPeer) -> None:
    client = network.client
    async with hand.daemon(client) as daemon:
        stream = await daemon.open_stream(PeerId.parse(client.peer), PROTOCOL_HELLO)
        async with Wire(stream, pb.HelloFrame) as wire:
            await wire.send(pb.HelloFrame(hello=pb.Hello(version_major=2, nonce=b"n" * 32)))
            refuse = (await wire.receive_kind("refuse")).refuse
        assert refuse.code == "version"
        await trio.to_thread.run_sync(
            lambda: wait_until(lambda: "other_version" in client.conditions(), "the condition")
        )
        await trio.to_thread.run_sync(lambda: _wait_gone(client, hand.peer))
    assert "hello_version" in errors_of(client)


def _wait_gone(node: Node, peer: PeerId) -> None:
    def gone() -> bool:
        known = node.peers().get(str(peer))
        return known is None or not known["connected"]

    wait_until(gone, f"{node.name} to disconnect it", timeout_s=15)


def test_a_node_of_another_network_is_refused_and_disconnected(network: Network) -> None:
    client = network.client
    with Network(validators=0, executors=0, clients=0, flags=FAST) as other:
        stranger = other.add("executor", "--bootstrap", client.address, bootstrap=False)

        def closed() -> list[dict[str, object]]:
            events = events_of(client, "connection_closed")
            return [event for event in events if event["peer"] == stranger.peer and event["cause"] == "not_member"]

        wait_until(closed, "the stranger to be refused and disconnected", timeout_s=20)
        assert "hello_not_member" in errors_of(client)
        for node in network.nodes:
            assert stranger.peer not in node.executors()


# ---------------------------------------------------------------- offenders
def forged(hand: HandPeer, network: Network, number: int) -> bytes:
    raw = bytearray(
        seal_announcement(
            signer=hand.signer,
            key=key_of(network),
            sequence=number + 1,
            issued_at_ms=now_ms(),
            ttl_s=60,
            kind=Kind.INITIAL,
            models=[ModelOffer(f"forged-{number}")],
        )
    )
    raw[-1] ^= 1
    return bytes(raw)


async def test_a_flooder_is_kept_away_and_what_is_still_forwarded(hand: HandPeer) -> None:
    """The flooder's only neighbour is the validator; the client is behind that one."""
    with Network(validators=1, executors=1, clients=1, flags=FAST) as network:
        validator, client = network.validators[0], network.client

        def received(node: Node) -> float:
            return node.metric("lloom_messages_received_total", kind="announcement")

        sent = 0
        rates: list[float] = []
        target, address = PeerId.parse(validator.peer), Multiaddr.parse(validator.address)

        async with hand.daemon(validator) as daemon, trio.open_nursery() as nursery:

            async def flood() -> None:
                nonlocal sent
                while True:
                    for _ in range(20):
                        await daemon.publish(TOPIC_EXECUTORS, forged(hand, network, sent))
                        sent += 1
                    await trio.sleep(0.05)

            async def come_back() -> None:
                while True:
                    await trio.sleep(1)
                    with suppress(DaemonError):
                        await daemon.connect(target, [address])

            async with daemon.subscribe(TOPIC_EXECUTORS):
                await _topic_peer(daemon, TOPIC_EXECUTORS)
                before, began_at = received(client), time.monotonic()
                nursery.start_soon(flood)
                nursery.start_soon(come_back)
                await trio.to_thread.run_sync(
                    lambda: wait_until(
                        lambda: validator.metric("lloom_peers_banned_total", reason="signature") == 1, "the ban"
                    )
                )
                banned_after_s = time.monotonic() - began_at
                for _ in range(8):
                    count, at = await trio.to_thread.run_sync(received, client), time.monotonic()
                    await trio.sleep(1)
                    rates.append((await trio.to_thread.run_sync(received, client) - count) / (time.monotonic() - at))
                sent_per_s = sent / (time.monotonic() - began_at)
                nursery.cancel_scope.cancel()
        print(
            f"flood of {sent_per_s:.0f}/s: banned after {banned_after_s:.2f} s; the node behind got "
            f"{received(client) - before:.0f} in all, then {statistics.mean(rates):.0f}/s on average "
            f"({', '.join(f'{rate:.0f}' for rate in rates)})"
        )
        assert "peer_banned" in errors_of(validator)
        closed = events_of(validator, "connection_closed")
        assert "banned" in {event["cause"] for event in closed if event["peer"] == str(hand.peer)}
        assert statistics.mean(rates) < sent_per_s / 2
        # Whatever came: nothing of it is believed, and the honest executor is still there.
        assert set(client.executors()) == {network.executors[0].peer}
        assert client.chat("still here").status_code == 200


# ---------------------------------------------------------------- rejoining
def test_an_ordinary_node_is_enough_as_bootstrap(network: Network) -> None:
    began_at = time.monotonic()
    late = network.add("client", "--bootstrap", network.executors[0].address, bootstrap=False)
    try:
        network.wait_known(late)
        print(f"a client by an executor alone: {time.monotonic() - began_at:.2f} s from its start")
        assert late.chat("hello").status_code == 200
    finally:
        late.stop()


def test_without_any_validator_a_restarted_node_rejoins_from_its_store() -> None:
    with Network(validators=2, executors=2, clients=1, flags=FAST) as network:
        client = network.client

        def remembered() -> bool:
            with sqlite3.connect(client.home / "lloom.db") as database:
                rows = database.execute("SELECT roles FROM known_peers").fetchall()
            return sum("executor" in roles for (roles,) in rows) == 2

        wait_until(remembered, "the client to remember the executors", timeout_s=30)
        for validator in network.validators:
            validator.kill()
        # Running nodes work on.
        assert client.chat("hello").status_code == 200
        client.stop()
        client.start()
        began_at = time.monotonic()
        network.wait_known(client, timeout_s=20)
        print(f"rejoined without a validator {time.monotonic() - began_at:.2f} s after it was up")
        assert client.chat("hello").status_code == 200
        rounds = events_of(client, "bootstrap_complete")
        assert any(int(str(event["connected"])) >= 1 for event in rounds)


def test_too_few_peers_are_said_with_what_was_tried(network: Network) -> None:
    lonely = network.add("client", "--bootstrap", DEAD, "--rebootstrap", "4", bootstrap=False)
    try:
        errors = wait_until(
            lambda: [e for e in events_of(lonely, "network_error") if e["code"] == "few_peers"],
            "the warning",
            timeout_s=20,
        )
        text = str(errors[0]["text"])
        assert text.startswith("0 of 1 wanted peers: 0 of 1 validators answer")
        assert "peers found in the DHT" in text
        wait_until(lambda: "few_peers" in lonely.conditions(), "the condition")
        wait_until(lambda: len(events_of(lonely, "bootstrap_complete")) >= 2, "the periodic rounds", timeout_s=30)
    finally:
        lonely.stop()


def test_a_lost_validator_is_found_again() -> None:
    with Network(validators=1, executors=1, clients=1, flags=FAST) as network:
        validator, client = network.validators[0], network.client
        address = validator.address
        port = address.split("/tcp/")[1].split("/")[0]
        validator.args[validator.args.index("/ip4/127.0.0.1/tcp/0")] = f"/ip4/127.0.0.1/tcp/{port}"
        validator.kill()
        wait_until(lambda: "no_validator" in client.conditions(), "the loss to be noticed", timeout_s=60)
        validator.start()
        began_at = time.monotonic()
        wait_until(lambda: "no_validator" not in client.conditions(), "the validator to be back", timeout_s=60)
        print(f"validator joined again {time.monotonic() - began_at:.2f} s after it was up")


# ---------------------------------------------------------------- connections
async def test_a_trim_spares_validators_and_peers_in_use() -> None:
    # Outside this event loop: a RealNode starts in one of its own. DHT clients, because the DHT protects some of its
    # servers from trims.
    here = await trio.to_thread.run_sync(
        partial(RealNode, find_ours(), connmgr_lo=2, connmgr_hi=3, connmgr_grace_s=0.0)
    )
    others = [await trio.to_thread.run_sync(partial(RealNode, find_ours(), dht_mode="client")) for _ in range(6)]
    daemon = Daemon(here.control)
    try:
        for other in others:
            await daemon.connect(other.peer, other.identity.addrs)
        validator, used, *idle = others
        await daemon.tag_peer(validator.peer, VALIDATOR_TAG, VALIDATOR_WEIGHT)
        async with trio.open_nursery() as nursery:
            tags = Tags(lambda: daemon)
            nursery.start_soon(tags.run)
            tags.hold(used.peer)
            await trio.sleep(0.2)
            with trio.fail_after(10):
                while len(connected := {row.peer for row in await daemon.list_peers()}) > 2:
                    await daemon.trim()
                    await trio.sleep(0.1)
            assert connected == {validator.peer, used.peer}
            # Not in use any more: the next trim may take it.
            tags.release(used.peer)
            await daemon.connect(idle[0].peer, idle[0].identity.addrs)
            await daemon.connect(idle[1].peer, idle[1].identity.addrs)
            tags.hold(idle[1].peer)
            await trio.sleep(0.2)
            with trio.fail_after(10):
                while len(connected := {row.peer for row in await daemon.list_peers()}) > 2:
                    await daemon.trim()
                    await trio.sleep(0.1)
            assert connected == {validator.peer, idle[1].peer}
            nursery.cancel_scope.cancel()
    finally:
        daemon.close()
        for node in (here, *others):
            node.stop()


# ---------------------------------------------------------------- events
def test_the_seeds_eight_events_in_order() -> None:
    with Network(validators=1, executors=1, clients=0, flags=FAST) as network:
        client = network.add("client", "--bootstrap", DEAD)
        network.clients.append(client)
        network.wait_known(client)
        assert client.chat("hello").status_code == 200
        # A client that joined a moment ago has no place in gossip's mesh yet, and would miss the removal.
        wait_until(
            lambda: client.metric("lloom_messages_received_total", kind="announcement"), "gossip to come", timeout_s=30
        )
        network.executors[0].stop()
        wait_until(lambda: events_of(client, "connection_closed"), "the end of a connection", timeout_s=30)
        wait_until(lambda: events_of(client, "executor_lost"), "the executor's removal", timeout_s=30)
        kinds = [str(event["event"]) for event in events_of(client)]
        first = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}
        ordered = [
            *("connection_established", "validator_discovered", "bootstrap_complete"),
            *("request_received", "response_received", "connection_closed"),
        ]
        assert sorted(ordered, key=lambda kind: first[kind]) == ordered
        assert first["executor_discovered"] < first["request_received"] < first["executor_lost"]
        assert [event["reason"] for event in events_of(client, "executor_lost")] == ["removal"]
        assert "network_error" in first
        sequences = [int(str(event["sequence"])) for event in events_of(client)]
        assert sequences == sorted(set(sequences))

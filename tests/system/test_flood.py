"""One peer floods the topic, a hostile validator invents executors: what it costs, and that it does no harm."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trio
from hostile import GOSSIPSUB, gossip, invented, lying_catalogue

from lloom_sidecar.errors import DaemonError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.protocol.announcement import seal_announcement
from lloom_sidecar.protocol.hello import HelloAnswerer
from lloom_sidecar.protocol.names import PROTOCOL_HELLO, TOPIC_EXECUTORS
from lloom_sidecar.protocol.network_key import NetworkKey, parse_key_file
from lloom_sidecar.protocol.offers import Kind, ModelOffer
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.harness import Network, Node
from tests.harness.hand_peer import HandPeer, now_ms
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.soak
FAST = ["--heartbeat", "1"]
FLOOD_S = 30.0
PER_S = 1000
HOUR_MS = 3_600_000
INVENTED = 5000
MEGABYTE = 1 << 20
FLAT = 64 * MEGABYTE
"""What a process may grow by: a catalogue of this size takes less, a table without a bound would take more."""


@pytest.fixture
def hand() -> Iterator[HandPeer]:
    with HandPeer() as hand:
        yield hand


def key_of(network: Network) -> NetworkKey:
    return parse_key_file(network.key_file.read_bytes()).current


# ---------------------------------------------------------------- what it costs
@dataclass(frozen=True)
class Usage:
    """Of one process: CPU seconds, resident bytes, bytes read and written by system calls."""

    at: float
    cpu_s: float
    resident: int
    read: int
    written: int


def usage_of(pid: int) -> Usage:
    process = psutil.Process(pid)
    cpu = process.cpu_times()
    io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    resident = process.memory_info().rss
    return Usage(time.monotonic(), cpu.user + cpu.system, resident, int(io["rchar"]), int(io["wchar"]))


def usages(nodes: list[Node]) -> dict[tuple[str, str], Usage]:
    found = {}
    for node in nodes:
        assert node.process is not None
        found[node.name, "sidecar"] = usage_of(node.process.pid)
        found[node.name, "p2pd"] = usage_of(node.pid_of("p2pd"))
    return found


def told(what: str, before: dict[tuple[str, str], Usage], after: dict[tuple[str, str], Usage]) -> None:
    """Print the costs, and fail when memory grew."""
    for (name, part), first in before.items():
        last = after[name, part]
        seconds = last.at - first.at
        print(
            f"{what}: {name} {part}: {100 * (last.cpu_s - first.cpu_s) / seconds:.0f} % CPU, "
            f"{(last.read - first.read) / seconds / 1000:.0f} kB/s read, "
            f"{(last.written - first.written) / seconds / 1000:.0f} kB/s written, "
            f"{(last.resident - first.resident) / MEGABYTE:+.1f} MB to {last.resident / MEGABYTE:.0f}"
        )
        assert last.resident - first.resident < FLAT


async def topic_peer(daemon: Daemon) -> None:
    with trio.fail_after(15):
        while not await daemon.topic_peers(TOPIC_EXECUTORS):
            await trio.sleep(0.05)


# ---------------------------------------------------------------- the topic
def bad_messages(hand: HandPeer, key: NetworkKey) -> list[bytes]:
    """Of each kind many: forged, replayed, oversized, of the future. Made before, so that the flood is not slowed."""

    def sealed(sequence: int, issued_at_ms: int) -> bytes:
        return seal_announcement(
            signer=hand.signer,
            key=key,
            sequence=sequence,
            issued_at_ms=issued_at_ms,
            ttl_s=60,
            kind=Kind.INITIAL,
            models=[ModelOffer(f"flood-{sequence}")],
        )

    replayed = sealed(1, now_ms())
    found = []
    for number in range(250):
        forged = bytearray(sealed(1000 + number, now_ms()))
        forged[-1] ^= 1
        found += [bytes(forged), replayed, os.urandom(17_000), sealed(2000 + number, now_ms() + HOUR_MS)]
    return found


async def test_a_thousand_bad_announcements_a_second_from_one_peer(hand: HandPeer) -> None:
    """The flooder's only neighbour is the validator, which it dials again each second; the rest is behind that one."""
    with Network(validators=1, executors=1, clients=1, flags=FAST) as network:
        validator, client, executor = network.validators[0], network.client, network.executors[0]
        bad = bad_messages(hand, key_of(network))
        target, address = PeerId.parse(validator.peer), Multiaddr.parse(validator.address)
        behind = [client, executor]
        sent = 0

        def received() -> float:
            return sum(node.metric("lloom_messages_received_total", kind="announcement") for node in behind)

        def knows_late() -> bool:
            return "late" in str(client.executors()[executor.peer])

        quiet_from = usages(network.nodes)
        await trio.sleep(10)
        told("before", quiet_from, usages(network.nodes))
        async with hand.daemon(validator) as daemon, trio.open_nursery() as nursery:

            async def flood() -> None:
                nonlocal sent
                began_at = trio.current_time()
                while True:
                    while sent < (trio.current_time() - began_at) * PER_S:
                        await daemon.publish(TOPIC_EXECUTORS, bad[sent % len(bad)])
                        sent += 1
                    await trio.sleep(0.01)

            async def come_back() -> None:
                while True:
                    await trio.sleep(1)
                    with suppress(DaemonError):
                        await daemon.connect(target, [address])

            async with daemon.subscribe(TOPIC_EXECUTORS):
                await topic_peer(daemon)
                before, heard, began_at = usages(network.nodes), received(), time.monotonic()
                nursery.start_soon(flood)
                nursery.start_soon(come_back)
                await trio.sleep(FLOOD_S / 2)
                # Honest ones are heard meanwhile: a new model, and an answer.
                network.backends[0].set_models(["scripted", "late"])
                changed_at = time.monotonic()
                await trio.to_thread.run_sync(
                    lambda: wait_until(
                        lambda: "late" in str(client.executors()[executor.peer]),
                        "the new model to be known",
                        timeout_s=30,
                    )
                )
                print(f"a new model known {time.monotonic() - changed_at:.2f} s after its backend had it")
                assert (await trio.to_thread.run_sync(client.chat, "still here")).status_code == 200
                await trio.sleep(max(0.0, began_at + FLOOD_S - time.monotonic()))
                after, seconds = usages(network.nodes), time.monotonic() - began_at
                nursery.cancel_scope.cancel()
        told("flood", before, after)
        forwarded = (received() - heard) / len(behind)
        print(
            f"flood of {sent / seconds:.0f}/s for {seconds:.0f} s: the nodes behind the validator got "
            f"{forwarded / seconds:.1f}/s each, {forwarded:.0f} in all"
        )
        assert sent / seconds > PER_S / 4, "the flooder itself was too slow to show anything"
        assert validator.metric("lloom_peers_banned_total") >= 1 or "banned" in str(events_of(validator))
        for node in (validator, client):
            # The one that it replays may have been believed before its author was banned: it is signed and tagged.
            assert set(node.executors()) - {str(hand.peer)} == {executor.peer}
        assert client.chat("and now").status_code == 200


def events_of(node: Node) -> list[dict[str, object]]:
    with node.admin() as admin:
        return list(admin.events(follow=False, kinds=["network_error", "connection_closed"]))


# ---------------------------------------------------------------- invented executors
async def test_five_thousand_invented_executors_of_a_hostile_validator(hand: HandPeer) -> None:
    """It has the network's key and is one of the client's validators: the worst that a member can be."""
    with Network(validators=1, executors=2, clients=0, flags=FAST) as network:
        key = key_of(network)
        names = [raw for _, raw in invented(INVENTED, key)]

        def answerer(stream: object) -> HelloAnswerer:
            return HelloAnswerer(
                me=hand.peer,
                peer=stream.peer,  # type: ignore[attr-defined]
                keys=[key],
                is_open=False,
                node=hand.info(roles=(pb.ROLE_VALIDATOR,)),
                nonce=os.urandom(32),
            )

        async with hand.serving({PROTOCOL_HELLO: lying_catalogue(answerer, names)}):
            # Trusted later than the honest one, by a client that has been served.
            client = await trio.to_thread.run_sync(lambda: network.add("client"))
            network.clients.append(client)
            await trio.to_thread.run_sync(network.wait_known, client)
            assert (await trio.to_thread.run_sync(client.chat, "hello")).status_code == 200
            added = await trio.to_thread.run_sync(client.ctl, "bootstrap", "add", hand.address)
            assert added.returncode == 0, added.stderr
            before = usages(network.nodes)

            def look() -> None:
                wait_until(lambda: len(client.executors()) > INVENTED / 2, "the lies to arrive", timeout_s=60)
                network.wait_known(client)
                chats(client, "with a lying validator")
                told("lying catalogue", before, usages(network.nodes))
                # Nobody else was told of them.
                assert len(network.validators[0].executors()) == 2

            await trio.to_thread.run_sync(look)


def chats(client: Node, what: str) -> None:
    """Ask ten times; the invented ones cannot answer."""
    took = []
    for number in range(10):
        began_at = time.monotonic()
        answer = client.chat(f"{number} is another conversation, for which no executor is warm")
        took.append((round(time.monotonic() - began_at, 2), answer.status_code, answer.headers.get("x-lloom-attempts")))
    print(f"{what}: (seconds, status, attempts) {took}")
    assert {status for _, status, _ in took} == {200}


@pytest.mark.parametrize("has_key", [False, True])
async def test_five_thousand_invented_executors_on_the_topic(hand: HandPeer, has_key: bool) -> None:
    """Each message is signed by its invented author as pubsub wants it: p2pd lets them through."""
    with Network(validators=1, executors=2, clients=1, flags=FAST) as network:
        validator, client = network.validators[0], network.client
        messages = invented(INVENTED, key_of(network) if has_key else NetworkKey(b"another network's key, 32 bytes."))
        # Whoever has answered before the flood is found in it.
        assert client.chat("hello").status_code == 200
        before, began_at = usages(network.nodes), time.monotonic()
        async with hand.daemon(validator) as daemon:
            target = PeerId.parse(validator.peer)
            stream = await daemon.open_stream(target, GOSSIPSUB)
            for rpc in gossip(messages):
                with suppress(DaemonError):
                    await stream.send_all(rpc)
                    await trio.sleep(0.02)
                    continue
                # The far side keeps one stream a peer: its own p2pd has opened another one, and gives up in the end.
                stream.close()
                stream = await daemon.open_stream(target, GOSSIPSUB)
            await trio.sleep(2)
            stream.close()
        seconds = time.monotonic() - began_at
        after = usages(network.nodes)
        told(f"invented on the topic, {'with' if has_key else 'without'} the key", before, after)
        for node in network.nodes:
            got = node.metric("lloom_messages_received_total", kind="announcement")
            print(f"{node.name}: {got:.0f} messages in {seconds:.0f} s, {len(node.executors())} executors in its book")
        assert client.metric("lloom_messages_received_total", kind="announcement") > INVENTED / 10
        for node in (validator, client):
            assert {one.peer for one in network.executors} <= set(node.executors())
        if not has_key:
            assert len(client.executors()) == 2
            assert len(validator.executors()) == 2
        chats(client, "with invented executors")

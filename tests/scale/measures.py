"""What is measured, each as a function of the running network."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime

import httpx
import psutil
import trio

from lloom_sidecar.errors import AnnouncementError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.protocol.announcement import open_announcement
from lloom_sidecar.protocol.names import TOPIC_EXECUTORS
from lloom_sidecar.protocol.network_key import parse_key_file
from lloom_sidecar.protocol.offers import Kind
from tests.harness import Node
from tests.harness.hand_peer import HandPeer, now_ms
from tests.harness.waiting import pause, wait_until

from .figures import Figures
from .lab import MODEL, Lab

USERS = 4
"""Clients with a stream to the executor that is killed."""
DEAD_BOOTSTRAP = "/ip4/127.0.0.1/tcp/9/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"
MIB = 1024 * 1024
JOINED, FOUND = "connection_established", "executor_discovered"


def measure_start(lab: Lab, figures: Figures) -> None:
    """From the last start until everybody knows everybody."""
    peers = {node.peer for node in lab.network.executors}
    complete = lab.until(
        lab.network.clients, lambda node: lab.knows_all(node, peers), since=lab.last_start_at, what="every catalogue"
    )
    figures.add("last process started -> every client's catalogue complete", max(complete.values()))
    figures.add("last node up -> every client's catalogue complete", max(time.monotonic() - lab.last_up_at, 0.0))


def measure_memory(lab: Lab, figures: Figures) -> None:
    """Resident and proportional memory of every process of ours."""
    for role, nodes in (
        ("validator", lab.network.validators),
        ("executor", lab.network.executors),
        ("client", lab.network.clients),
    ):
        for what in ("sidecar", "p2pd"):
            found = [
                _memory(node.process.pid if what == "sidecar" else node.pid_of(what)) for node in nodes if node.process
            ]
            figures.add(f"memory of a {role}'s {what}, RSS", [rss for rss, _ in found], "MiB")
            figures.add(f"memory of a {role}'s {what}, PSS", [pss for _, pss in found], "MiB")


def _memory(pid: int) -> tuple[float, float]:
    info = psutil.Process(pid).memory_full_info()
    return info.rss / MIB, info.pss / MIB


def measure_traffic(lab: Lab, figures: Figures, seconds: float) -> None:
    """Messages that a node receives while nobody asks anything, and what they are, as one more peer hears them."""
    nodes = lab.network.nodes

    def counts(name: str, kind: str) -> list[float]:
        return [node.metric(name, kind=kind) for node in nodes]

    cpu_before, at_before = [_cpu_s(node) for node in nodes], time.monotonic()
    announcements, statuses = (counts("lloom_messages_received_total", kind) for kind in ("announcement", "status"))
    with HandPeer() as listener:
        heard = trio.run(_listen, lab, listener, seconds)
    took_s = time.monotonic() - at_before
    after = counts("lloom_messages_received_total", "announcement")
    figures.add(
        "announcements received by a node", [(b - a) / took_s for a, b in zip(announcements, after, strict=True)], "1/s"
    )
    after = counts("lloom_messages_received_total", "status")
    figures.add("statuses received by a node", [(b - a) / took_s for a, b in zip(statuses, after, strict=True)], "1/s")
    figures.add("... heartbeats, as one listener hears them", heard[Kind.HEARTBEAT] / seconds, "1/s")
    full = heard[Kind.INITIAL] + heard[Kind.UPDATE]
    figures.add("... full announcements, as one listener hears them", full / seconds, "1/s")
    spent = [(after - before) / took_s * 100 for before, after in zip(cpu_before, map(_cpu_s, nodes), strict=True)]
    figures.add("CPU of a node at rest, sidecar and p2pd", spent, "%")
    connections = [float(node.status()["connections"]) for node in nodes]
    figures.add("connections of a node", connections, "")


def _cpu_s(node: Node) -> float:
    assert node.process is not None
    times = [psutil.Process(pid).cpu_times() for pid in (node.process.pid, node.pid_of("p2pd"))]
    return float(sum(one.user + one.system for one in times))


async def _listen(lab: Lab, listener: HandPeer, seconds: float) -> Counter[int]:
    key = parse_key_file(lab.network.key_file.read_bytes()).current
    heard: Counter[int] = Counter()
    neighbours = await trio.to_thread.run_sync(lambda: [*lab.network.validators, *lab.network.executors[:2]])
    async with listener.daemon() as daemon:
        for node in neighbours:
            address = await trio.to_thread.run_sync(lambda node=node: node.address)  # type: ignore[misc]
            await daemon.connect(PeerId.parse(node.peer), [Multiaddr.parse(address)])
        while not await daemon.topic_peers(TOPIC_EXECUTORS):
            await trio.sleep(0.05)
        began_ms = now_ms()
        async with daemon.subscribe(TOPIC_EXECUTORS) as subscription:
            with trio.move_on_after(seconds):
                while True:
                    message = await subscription.receive()
                    with suppress(AnnouncementError):
                        found = open_announcement(message.data, keys=[key], expected_signer=message.sender)
                        # A newcomer is given what was said in the last half minute too.
                        heard[found.kind] += found.issued_at_ms >= began_ms
    return heard


def measure_price(lab: Lab, figures: Figures, repeats: int) -> None:
    """``lloomctl executor price`` until every client knows."""
    for repeat in range(repeats):
        executor = lab.network.executors[repeat]
        done = executor.ctl("executor", "price", MODEL, f"{repeat + 1}/9", "EUR")
        since = time.monotonic()
        assert done.returncode == 0, done.stderr
        known = lab.until(
            lab.network.clients,
            lambda node: lab.offers_of(node, executor.peer)[MODEL]["prompt_per_million"] == repeat + 1,  # noqa: B023
            since=since,
            what="the price",
        )
        figures.add("price changed -> known to every client", max(known.values()), wanted=2.0)
        assert executor.ctl("executor", "price", MODEL, "free").returncode == 0


def measure_models(lab: Lab, figures: Figures, repeats: int) -> None:
    """A model appears at a backend, and is gone again."""
    for repeat in range(repeats):
        executor = lab.network.executors[-1 - repeat]
        backend = lab.network.backend_of(executor.peer)
        for models, name in (
            ([MODEL, "another"], "model added at the backend"),
            ([MODEL], "model removed at the backend"),
        ):
            since = time.monotonic()
            backend.set_models(models)
            known = lab.until(
                lab.network.clients,
                lambda node: set(lab.offers_of(node, executor.peer)) == set(models),  # noqa: B023
                since=since,
                what="the models",
            )
            figures.add(f"{name} -> known to every client", max(known.values()), wanted=2.0)


def measure_new_client(lab: Lab, figures: Figures, repeats: int) -> None:
    """A client that knows the validators joins."""
    peers = {node.peer for node in lab.network.executors}
    hosts = {node.peer for node in lab.network.validators}
    for _ in range(repeats):
        with lab.extra("client") as (node, began_at):
            complete = lab.until([node], lab.is_complete(peers), since=began_at, what="the new client's catalogue")
            node.wait_up()
            figures.add("new client: process started -> catalogue complete", list(complete.values()), wanted=2.0)
            with node.admin() as admin:
                events = [event for event in admin.events(follow=False) if event.get("peer") in {None, *peers, *hosts}]
            told = {kind: [_instant(one["at"]) for one in events if one["event"] == kind] for kind in (JOINED, FOUND)}
            joined_s = max(told[FOUND]) - min(told[JOINED])
            figures.add("... from its first connection, by its own events", joined_s, wanted=2.0)


def _instant(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def measure_new_executor(lab: Lab, figures: Figures, repeats: int) -> None:
    """An executor joins: until every running client knows it."""
    for _ in range(repeats):
        with lab.extra("executor") as (node, _):
            node.wait_up()
            since = time.monotonic()
            known = lab.until(lab.network.clients, lab.is_complete({node.peer}), since=since, what="the new executor")
            figures.add("new executor up -> known to every client", max(known.values()))
        # Its removal is none of the next measure's business.
        lab.until(lab.network.clients, lambda one: node.peer not in lab.executors_of(one), since=since, what="its end")


def measure_dht_alone(lab: Lab, figures: Figures, repeats: int, dead: Sequence[str]) -> None:
    """Gossip off, no validator, one ordinary node as bootstrap: an ordinary client; and a p2pd without a sidecar, which
    has no catalogue, so that provider records alone lead to the executors."""
    living = {node.peer for node in lab.network.executors if node.peer not in dead}
    for repeat in range(repeats):
        ordinary = lab.network.clients[repeat].address
        with lab.extra("client", "--gossip", "off", "--bootstrap", ordinary, bootstrap=False) as (node, began_at):
            complete = lab.until([node], lab.is_complete(living), since=began_at, what="the executors")
            figures.add("gossip off, bootstrap by an ordinary client -> complete", list(complete.values()), wanted=15.0)
    with HandPeer() as somebody:
        trio.run(_connect, somebody, lab.network.clients[0])
        for _ in range(repeats):
            with lab.extra("client", "--gossip", "off", "--bootstrap", somebody.address, bootstrap=False) as (
                node,
                began_at,
            ):
                complete = lab.until([node], lab.is_complete(living), since=began_at, what="the executors by the DHT")
                figures.add(
                    "the DHT alone (a bare p2pd as bootstrap) -> complete", list(complete.values()), wanted=15.0
                )
                sources = Counter(node.peers()[peer]["source"] for peer in living)
                figures.note(f"found by: {dict(sources)}; {len(dead)} executors dead, their records still there")
                assert not set(dead) & set(node.executors())


async def _connect(somebody: HandPeer, node: Node) -> None:
    address = await trio.to_thread.run_sync(lambda: node.address)
    async with somebody.daemon() as daemon:
        await daemon.connect(PeerId.parse(node.peer), [Multiaddr.parse(address)])


class _User(threading.Thread):
    """An application: a stream from the executor that will be killed, then one chat after another."""

    def __init__(self, client: Node, executor: str) -> None:
        super().__init__(daemon=True)
        self.client = client
        self._executor = executor
        self.is_streaming = threading.Event()
        self.may_end = threading.Event()
        self.statuses: Counter[int] = Counter()

    def run(self) -> None:
        body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "chunks=4000 delay_ms=20"}]}
        api = self.client.api
        headers = {"x-lloom-pin-executor": self._executor}
        with httpx.Client(timeout=60, trust_env=False) as http:
            with (
                suppress(httpx.HTTPError),
                http.stream("POST", f"{api}/v1/chat/completions", json=body, headers=headers) as answer,
            ):
                for line in answer.iter_lines():
                    if line:
                        self.is_streaming.set()
            number = 0
            while not self.may_end.is_set():
                number += 1
                asked = {"model": MODEL, "messages": [{"role": "user", "content": f"{number} {self.name} chunks=1"}]}
                self.statuses[http.post(f"{api}/v1/chat/completions", json=asked).status_code] += 1
                pause(0.05)

    def failures(self) -> int:
        """Attempts at the executor that failed, by the client's own log."""
        log = self.client.log()
        return sum(one.get("event") == "attempt_failed" and one.get("peer") == self._executor for one in log)


def measure_kills(lab: Lab, figures: Figures, repeats: int) -> list[str]:
    """``kill -9`` of an executor with users; returns those killed, which stay dead."""
    clients, dead = lab.network.clients, []
    for repeat in range(repeats):
        executor = lab.network.executors[2 * repeat]
        users = [_User(client, executor.peer) for client in clients[repeat * USERS :][:USERS]]
        for user in users:
            user.start()
        for user in users:
            assert user.is_streaming.wait(30)
        connected = [one for one in clients if lab.executors_of(one)[executor.peer]["connected"]]
        others = [one for one in clients if one not in connected]
        executor.kill()
        since = time.monotonic()

        def is_dropped(node: Node) -> bool:
            known = lab.executors_of(node).get(executor.peer)  # noqa: B023
            return known is None or known["state"] != "fresh"

        names = {user.client.name for user in users}
        dropped = lab.until(clients, is_dropped, since=since, what="the death to be known")
        figures.add("kill -9 -> its users choose others", [s for n, s in dropped.items() if n in names], wanted=10.0)
        unused = [s for n, s in dropped.items() if n not in names]
        figures.add("kill -9 -> every other client chooses others", unused, wanted=35.0)
        gone = lab.until(
            clients,
            lambda node: executor.peer not in lab.executors_of(node),  # noqa: B023
            since=since,
            what="the dead to be out of every book",
        )
        figures.add("kill -9 -> out of the users' books", [s for n, s in gone.items() if n in names])
        figures.add("kill -9 -> out of every other book", [s for n, s in gone.items() if n not in names], wanted=35.0)
        for user in users:
            user.may_end.set()
            user.join()
        after = [max(0, user.failures() - 1) for user in users]
        figures.add("requests to it after a user's first failure", [float(one) for one in after], "", wanted=0.0)
        figures.note(
            f"{len(connected)} clients were connected to it, {len(others)} were not; answers: "
            f"{dict(sum((user.statuses for user in users), Counter()))}"
        )
        dead.append(executor.peer)
        lab.forget(executor)
    return dead


def measure_leaves(lab: Lab, figures: Figures, repeats: int) -> None:
    """SIGTERM: the removal reaches everybody. The executor comes back after it."""
    clients = lab.network.clients
    for repeat in range(repeats):
        executor = lab.network.executors[-2 - repeat]
        assert executor.process is not None
        executor.process.terminate()
        since = time.monotonic()
        gone = lab.until(
            clients,
            lambda node: executor.peer not in lab.executors_of(node),  # noqa: B023
            since=since,
            what="the removal",
        )
        figures.add("SIGTERM -> out of every client's book", max(gone.values()), wanted=1.0)
        executor.process.wait(20)
        lab.forget(executor)
        executor.stop()
        executor.start()
        lab.until(clients, lab.is_complete({executor.peer}), since=since, what="it to be back")


def measure_status(lab: Lab, figures: Figures) -> None:
    """Validators' statuses, received and shown."""
    client, executors = lab.network.client, len(lab.network.executors)
    heard = wait_until(
        lambda: [one for one in client.status()["network_status"] if one["executors"] == executors],
        "a status with every executor",
        timeout_s=60,
    )
    shown = client.ctl("network", "status")
    assert shown.returncode == 0, shown.stderr
    figures.note(f"{len(heard)} validators' statuses at a client; lloomctl network status:")
    for line in shown.stdout.splitlines():
        figures.note(line)


def measure_lloomctl(lab: Lab, figures: Figures) -> None:
    """Query, quote, findpeer, and a /pk record put by one and got by another; each by a lloomctl process."""
    client, executor = lab.network.clients[-1], lab.network.executors[1]

    def ctl(node: Node, *args: str) -> dict[str, object]:
        began_at = time.monotonic()
        done = node.ctl(*args, "--json")
        assert done.returncode == 0, (args, done.stderr)
        figures.add(f"lloomctl {' '.join(args[:2])}", time.monotonic() - began_at)
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    asked = ctl(client, "model", "query", executor.peer)
    quote = ctl(client, "model", "quote", executor.peer, MODEL)
    figures.note(f"query: {json.dumps(asked)[:160]}")
    figures.note(
        f"quote: {quote['price']}, holds {quote['valid_s']} s, signed ({len(str(quote['envelope'])) // 2} bytes)"
    )
    found = ctl(client, "dht", "findpeer", executor.peer)
    figures.note(f"findpeer: {found['addrs']}")
    put = ctl(executor, "dht", "put", "--own")
    assert ctl(client, "dht", "get", str(put["key"])) == put
    figures.note(f"/pk record round-trips: {put['key']}")


def measure_events(lab: Lab, figures: Figures) -> None:
    """All eight events of a node's life, and executor_lost, in order at one client."""
    with lab.extra("client", "--bootstrap", DEAD_BOOTSTRAP) as (client, _):
        client.wait_up()
        victim = lab.network.executors[3]
        lab.until([client], lab.is_complete({victim.peer}), since=time.monotonic(), what="its catalogue")
        body = {"model": MODEL, "messages": [{"role": "user", "content": "chunks=1"}]}
        answer = client.post("/v1/chat/completions", body, headers={"x-lloom-pin-executor": victim.peer})
        assert answer.status_code == 200, answer.text
        victim.stop()
        lab.forget(victim)

        def kinds() -> list[str]:
            with client.admin() as admin:
                found = [
                    e
                    for e in admin.events(follow=False)
                    if e.get("peer") in (None, victim.peer) or "lost" not in e["event"]
                ]
            return [str(event["event"]) for event in found]

        wait_until(lambda: {"executor_lost", "connection_closed"} <= set(kinds()), "the victim's end", timeout_s=60)
        first = list(dict.fromkeys(kinds()))
        wanted = [
            *("connection_established", "validator_discovered", "executor_discovered", "bootstrap_complete"),
            *("request_received", "response_received", "executor_lost", "connection_closed"),
        ]
        figures.note(f"events at one client, by their first appearance: {', '.join(first)}")
        assert {*wanted, "network_error"} == set(first), first
        must = (
            "connection_established",
            "validator_discovered",
            "request_received",
            "response_received",
            "executor_lost",
        )
        assert [kind for kind in first if kind in must] == list(must), first
        victim.start()
        lab.until(lab.network.clients, lab.is_complete({victim.peer}), since=time.monotonic(), what="it to be back")

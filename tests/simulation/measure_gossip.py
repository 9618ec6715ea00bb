"""What a gossip hop costs on real p2pd: ``python -m tests.simulation.measure_gossip`` prints the figures as JSON.

Ten daemons on loopback, driven by ``lloom_sidecar.p2p``. The model's defaults (``gossip.MEASURED_HOP``) come from here.
Bytes are those of the loopback interface, so they are exact only in a network namespace without other traffic:
``unshare -n sh -c 'ip link set lo up && python -m tests.simulation.measure_gossip'`` (root).
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import tempfile
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
import structlog
import trio

from lloom_sidecar.errors import DaemonError
from lloom_sidecar.node.daemon import VALIDATOR_DEGREE
from lloom_sidecar.p2p.daemon import Daemon, Identity
from lloom_sidecar.p2p.supervisor import DaemonSupervisor
from tests.contract.binaries import find_ours, make_key, settings_for

TOPIC: Final = "/measure/gossip/1"
MESSAGE_BYTES: Final = 450
"""About a sealed heartbeat with its tag, see ``sizes``."""
NODES: Final = 10
SETTLE_HEARTBEATS: Final = 1.5


@dataclass
class GossipNode:
    """One p2pd and what it heard."""

    daemon: Daemon
    identity: Identity
    pid: int
    process: trio.CancelScope
    """Cancelled, its p2pd ends."""
    heard: dict[int, float] = field(default_factory=dict)
    """Instant at which each message number came."""
    may_read: trio.Event = field(default_factory=trio.Event)

    async def listen(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Subscribe, and read whenever ``may_read`` is set."""
        with suppress(DaemonError):  # it was ended
            async with self.daemon.subscribe(TOPIC) as subscription:
                task_status.started()
                while True:
                    message = await subscription.receive()
                    self.heard.setdefault(int.from_bytes(message.data[:8], "big"), trio.current_time())
                    await self.may_read.wait()

    async def say(self, number: int, size: int = MESSAGE_BYTES) -> None:
        """Publish message ``number``."""
        await self.daemon.publish(TOPIC, number.to_bytes(8, "big") + bytes(size - 8))

    def cpu_s(self) -> float:
        """CPU seconds that its p2pd has used."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)


class Lab:
    """Starts nodes; they end with the nursery."""

    def __init__(self, nursery: trio.Nursery, directory: Path, heartbeat_s: float) -> None:
        self._nursery = nursery
        self._directory = directory
        self.heartbeat_s = heartbeat_s
        self._count = 0

    async def node(self, *, listens: bool = True, **changes: object) -> GossipNode:
        """A daemon that knows nobody and listens to the topic, or does not yet."""
        self._count += 1
        directory = self._directory / str(self._count)
        directory.mkdir(mode=0o700)
        key = make_key(directory)
        settings = settings_for(find_ours(), directory, key, dht_mode="off", heartbeat_s=self.heartbeat_s, **changes)
        found: list[Identity] = []

        async def on_up(daemon: Daemon, identity: Identity) -> None:
            found.append(identity)

        supervisor = DaemonSupervisor(settings, expected_peer=key.peer, on_up=on_up, on_down=lambda reason: None)
        life = trio.CancelScope()

        async def run(*, task_status: trio.TaskStatus[Daemon]) -> None:
            with life:
                await supervisor.run(task_status=task_status)

        daemon: Daemon = await self._nursery.start(run)
        assert supervisor.pid is not None
        node = GossipNode(daemon, found[0], supervisor.pid, life)
        node.may_read.set()
        if listens:
            await self.listen(node)
        return node

    async def listen(self, node: GossipNode) -> None:
        """Returns when it has subscribed."""
        await self._nursery.start(node.listen)

    async def settle(self) -> None:
        """Until meshes have formed."""
        await trio.sleep(max(2.0, SETTLE_HEARTBEATS * self.heartbeat_s))


@asynccontextmanager
async def open_lab(heartbeat_s: float) -> AsyncGenerator[Lab, None]:
    """Room for some nodes."""
    with tempfile.TemporaryDirectory(prefix="lloom-") as name:
        async with trio.open_nursery() as nursery:
            yield Lab(nursery, Path(name), heartbeat_s)
            nursery.cancel_scope.cancel()


def spread(values: Sequence[float], digits: int = 5) -> dict[str, float]:
    """Median, 90th and 99th percentile and maximum."""
    ordered = sorted(values)
    if not ordered:
        return {}

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], digits)

    return {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0), "count": len(ordered)}


async def connect(near: GossipNode, far: GossipNode) -> None:
    await near.daemon.connect(far.identity.peer, far.identity.addrs)


async def measure_chain(heartbeat_s: float, messages: int) -> dict[str, Any]:
    """Nodes in a line, so that the number of hops is known: publish at one end, time of receipt at each."""
    async with open_lab(heartbeat_s) as lab:
        nodes = [await lab.node() for _ in range(NODES)]
        for near, far in itertools.pairwise(nodes):
            await connect(near, far)
        await lab.settle()
        said: dict[int, float] = {}
        for number in range(messages):
            said[number] = trio.current_time()
            await nodes[0].say(number)
            await trio.sleep(0.05)
        await trio.sleep(1.0)
        per_hop: list[float] = []
        first_hop: list[float] = []
        lost_by_hop = []
        for hops, node in enumerate(nodes[1:], 1):
            delays = [node.heard[number] - at for number, at in said.items() if number in node.heard]
            lost_by_hop.append(messages - len(delays))
            if hops == 1:
                first_hop = delays
            else:
                before = nodes[hops - 1].heard
                per_hop += [
                    node.heard[number] - before[number] for number in said if number in node.heard and number in before
                ]
        # The sidecars' own reading jitters more than a hop lasts: the difference over all hops is what counts.
        end = nodes[-1].heard
        whole = [(end[number] - nodes[1].heard[number]) / (NODES - 2) for number in said if number in end]
        logs = [delay for delay in whole if delay > 0]
        return {
            "first_hop_s": spread(first_hop),
            "next_hop_s": spread(per_hop),
            "mean_hop_s": spread(whole),
            "mean_hop_relative_spread": round(statistics.stdev(logs) / statistics.mean(logs), 3),
            "lost_by_hop": lost_by_hop,
            "messages": messages,
        }


async def measure_mesh(heartbeat_s: float, messages: int) -> dict[str, Any]:
    """All connected to all: bytes, copies and CPU of one message; what a burst and a stalled reader lose."""
    async with open_lab(heartbeat_s) as lab:
        nodes = [await lab.node() for _ in range(NODES)]
        for index, near in enumerate(nodes):
            for far in nodes[index + 1 :]:
                await connect(near, far)
        await lab.settle()

        async def window(rate_per_s: float, count: int, first: int, size: int) -> tuple[float, float, float]:
            bytes_0, cpu_0 = _loopback_bytes(), sum(node.cpu_s() for node in nodes)
            began_at = trio.current_time()
            for index in range(count):
                await nodes[index % NODES].say(first + index, size)
                await trio.sleep(max(0.0, began_at + (index + 1) / rate_per_s - trio.current_time()))
            took_s = trio.current_time() - began_at
            return _loopback_bytes() - bytes_0, sum(node.cpu_s() for node in nodes) - cpu_0, took_s

        quiet_0, cpu_0 = _loopback_bytes(), sum(node.cpu_s() for node in nodes)
        quiet_s = max(5.0, heartbeat_s)
        await trio.sleep(quiet_s)
        idle_bytes = (_loopback_bytes() - quiet_0) / quiet_s
        idle_cpu = (sum(node.cpu_s() for node in nodes) - cpu_0) / quiet_s
        used, cpu, took_s = await window(50.0, messages, 10_000, MESSAGE_BYTES)
        await trio.sleep(1.0)
        longer, _, longer_s = await window(50.0, messages, 50_000, 2 * MESSAGE_BYTES)
        await trio.sleep(1.0)
        more = (longer - idle_bytes * longer_s) / messages / (NODES - 1)
        per_node_message = (used - idle_bytes * took_s) / messages / (NODES - 1)
        received = sum(number in node.heard for node in nodes for number in range(10_000, 10_000 + messages))
        answer: dict[str, Any] = {
            "idle_bytes_per_node_s": round(idle_bytes / NODES, 1),
            "bytes_per_message_and_receiver": round(per_node_message),
            "copies_by_receiver": round((more - per_node_message) / MESSAGE_BYTES, 2),
            "p2pd_cpu_us_per_message_and_node": round((cpu - idle_cpu * took_s) / messages / NODES * 1e6),
            "share_received": received / (messages * NODES),
            "bursts": {},
            "stalled_reader": {},
        }
        first = 100_000
        for size in (16, 64, 256, 1024):
            for index in range(size):
                await nodes[0].say(first + index)
            await trio.sleep(2.0)
            got = [sum(first + index in node.heard for index in range(size)) / size for node in nodes[1:]]
            answer["bursts"][size] = {"mean": round(statistics.mean(got), 4), "worst": round(min(got), 4)}
            first += size
        deaf = nodes[1]
        for size in (100, 1000, 4000):
            deaf.may_read = trio.Event()
            for index in range(size):
                await nodes[0].say(first + index)
                await trio.sleep(0.001)
            await trio.sleep(0.5)
            deaf.may_read.set()
            await trio.sleep(2.0)
            answer["stalled_reader"][size] = sum(first + index in deaf.heard for index in range(size))
            first += size
        return answer


async def measure_newcomer(heartbeat_s: float, repeats: int) -> dict[str, Any]:
    """A node joins a running mesh over one or three neighbours: until it is heard, and until it hears.

    Subscribed before it has neighbours, as a sidecar does, or 0.3 s after ("late"): then Join grafts at once.
    """
    heard_after: dict[str, list[float]] = defaultdict(list)
    hears_after: dict[str, list[float]] = defaultdict(list)
    lost: dict[str, int] = defaultdict(int)
    async with open_lab(heartbeat_s) as lab:
        nodes = [await lab.node() for _ in range(NODES)]
        for index, near in enumerate(nodes):
            for far in nodes[index + 1 :]:
                await connect(near, far)
        await lab.settle()
        number = 1_000_000
        for repeat in range(repeats):
            for way, neighbours, is_late in (("1", 1, False), ("3", 3, False), ("1 late", 1, True)):
                newcomer = await lab.node(listens=not is_late)
                # At any point of the others' heartbeat.
                await trio.sleep(heartbeat_s * ((repeat * 2 + neighbours) % 7) / 7)
                joined_at = trio.current_time()
                for far in nodes[:neighbours]:
                    await connect(newcomer, far)
                if is_late:
                    await trio.sleep(0.3)
                    await lab.listen(newcomer)
                first = number
                witness = nodes[-1]
                with trio.move_on_after(3 * heartbeat_s + 5):
                    while not (
                        any(n in witness.heard for n in range(first, number, 2))
                        and any(n in newcomer.heard for n in range(first + 1, number, 2))
                    ):
                        await newcomer.say(number)
                        await nodes[-2].say(number + 1)
                        number += 2
                        await trio.sleep(0.1)
                ours = [n for n in range(first, number, 2) if n in witness.heard]
                theirs = [n for n in range(first + 1, number, 2) if n in newcomer.heard]
                lost[way] += bool(ours) and ours[0] != first
                if ours:
                    heard_after[way].append(witness.heard[ours[0]] - joined_at)
                if theirs:
                    hears_after[way].append(newcomer.heard[theirs[0]] - joined_at)
                number += 2
                newcomer.process.cancel()
    return {
        "is_heard_after_s": {n: spread(values, 3) for n, values in heard_after.items()},
        "hears_after_s": {n: spread(values, 3) for n, values in hears_after.items()},
        "first_message_lost": {way: f"{count} of {repeats}" for way, count in lost.items()},
    }


async def measure_star(heartbeat_s: float, leaves: int, degree: int | None) -> dict[str, Any]:
    """Leaves that are connected to one hub only, as nodes behind NAT are to a validator: who hears each leaf's message.

    ``degree`` is the hub's; the leaves keep the library's.
    """
    async with open_lab(heartbeat_s) as lab:
        hub = await lab.node(gossip_degree=degree)
        nodes = []
        for _ in range(leaves):
            leaf = await lab.node(listens=False)
            await connect(leaf, hub)
            while not await leaf.daemon.topic_peers(TOPIC):
                await trio.sleep(0.02)
            await lab.listen(leaf)
            nodes.append(leaf)
        await lab.settle()
        for number, leaf in enumerate(nodes):
            await leaf.say(number)
        await trio.sleep(1.0)

        def heard() -> float:
            others = [(number, one) for number in range(leaves) for one in (hub, *nodes) if one is not nodes[number]]
            return round(sum(number in one.heard for number, one in others) / len(others), 4)

        at_once = heard()
        await trio.sleep(3 * heartbeat_s)
        return {"leaves": leaves, "degree": degree, "heard_within_1_s": at_once, "heard_3_heartbeats_later": heard()}


def _loopback_bytes() -> float:
    return float(psutil.net_io_counters(pernic=True)["lo"].bytes_recv)


async def measure(heartbeats_s: Sequence[float], messages: int, repeats: int) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for heartbeat_s in heartbeats_s:
        answer[f"heartbeat {heartbeat_s:g} s"] = {
            "chain": await measure_chain(heartbeat_s, messages),
            "mesh": await measure_mesh(heartbeat_s, messages),
            "newcomer": await measure_newcomer(heartbeat_s, repeats),
            "star": [await measure_star(heartbeat_s, 20, degree) for degree in (None, VALIDATOR_DEGREE)],
        }
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--heartbeats", default="10,1", help="gossipsub heartbeats to measure with, seconds")
    parser.add_argument("--messages", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=4, help="newcomers for each number of neighbours")
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    heartbeats_s = [float(part) for part in args.heartbeats.split(",")]
    print(json.dumps(trio.run(measure, heartbeats_s, args.messages, args.repeats), indent=2))


if __name__ == "__main__":
    main()

"""Applications that do little: a thousand that only connect, and some that do not read."""

from __future__ import annotations

import json
import time
from contextlib import AsyncExitStack

import psutil
import pytest
import trio

from tests.harness import Network, Node
from tests.harness.waiting import wait_until

from .descriptors import count_descriptors
from .figures import share
from .record import make_ask
from .test_killing import FAST
from .world import World

pytestmark = pytest.mark.soak

IDLE = 1000
APPS = 8
SLOW = 8
MAX_GROWTH_BYTES = 96 * 1024 * 1024
"""Of all processes that a stream passes, for SLOW streams without end: what sockets and p2pd's windows hold."""


def memory(nodes: list[Node]) -> int:
    """Resident bytes of the nodes' sidecars and p2pds."""
    found = 0
    for node in nodes:
        assert node.process is not None
        found += psutil.Process(node.process.pid).memory_info().rss
        found += psutil.Process(node.pid_of("p2pd")).memory_info().rss
    return found


async def test_a_thousand_idle_applications() -> None:
    with Network(validators=1, executors=2, clients=1, flags=FAST, keeps_ports=True) as network:
        world = World(network, seed=9)
        client = network.client
        before = await world.ask_all((make_ask(9, tag, leavers=False) for tag in range(1, 101)), apps=APPS)
        held, bytes_before = count_descriptors(client), memory([client])
        host, _, port = client.api.removeprefix("http://").partition(":")
        async with AsyncExitStack() as idle:
            for _ in range(IDLE):
                await idle.enter_async_context(await trio.open_tcp_stream(host, int(port)))
            await _until(lambda: count_descriptors(client).sidecar >= IDLE, "all to be accepted")
            during = await world.ask_all((make_ask(9, tag, leavers=False) for tag in range(101, 201)), apps=APPS)
            each = (memory([client]) - bytes_before) / IDLE
            medians = [sorted(one.delay_s for one in some)[len(some) // 2] for some in (before, during)]
            print(f"{each / 1024:.1f} KiB for each; median delay {medians[0]:.3f} s, with them {medians[1]:.3f} s")
        assert share(during) == (100, 100)
        # The pool may keep a few more streams to executors, at most one for each application.
        most = held.sidecar + len(network.executors) * APPS
        await _until(lambda: count_descriptors(client).sidecar <= most, "their descriptors to be given back")
        violations = await trio.to_thread.run_sync(world.violations)
        assert not violations, "\n".join(violations)


async def _until(condition: object, what: str) -> None:
    await trio.to_thread.run_sync(lambda: wait_until(condition, what, timeout_s=30.0))  # type: ignore[arg-type]


async def test_applications_that_do_not_read_hold_up_nobody() -> None:
    with Network(validators=1, executors=2, clients=1, flags=FAST, keeps_ports=True) as network:
        world = World(network, seed=10)
        client = network.client
        await world.ask_all((make_ask(10, tag, leavers=False) for tag in range(1, 21)), apps=4)
        nodes = [client, *network.executors]
        bytes_before = memory(nodes)
        host, _, port = client.api.removeprefix("http://").partition(":")
        messages = [{"role": "user", "content": "chunks=100000000"}]
        body = json.dumps({"model": "scripted", "stream": True, "messages": messages}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        async with AsyncExitStack() as apps:
            for _ in range(SLOW):
                app = await apps.enter_async_context(await trio.open_tcp_stream(host, int(port)))
                await app.send_all(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            sent: list[int] = []

            def stands_still() -> bool:
                running = [one for backend in network.backends for one in backend.requests() if one["outcome"] is None]
                sent.append(sum(one["sent"] for one in running))
                return len(running) == SLOW and len(sent) > 20 and len(set(sent[-20:])) == 1

            await _until(stands_still, "every buffer on the way to be full")
            grown = memory(nodes) - bytes_before
            began_at = time.time()
            records = await world.ask_all((make_ask(10, tag, leavers=False) for tag in range(101, 151)), apps=4)
            print(
                f"{SLOW} that do not read: {sent[-1] // SLOW} chunks each on the way, {grown / 2**20:.1f} MiB more in "
                f"all processes; 50 others answered in {time.time() - began_at:.1f} s"
            )
            assert share(records) == (50, 50)
            assert grown < MAX_GROWTH_BYTES
        await _until(
            lambda: all(one["outcome"] for backend in network.backends for one in backend.requests()),
            "the backends to be rid of them",
        )

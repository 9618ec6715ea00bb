"""Parts of an executor that stand still (SIGSTOP): nothing is closed, nothing is refused, nothing comes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from tests.harness import Network, Node

from .figures import share
from .record import Ask, Outcome, make_ask
from .test_killing import FAST
from .world import World

pytestmark = pytest.mark.soak


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """The process stands still while the context lasts."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def pid_of(network: Network, node: Node, part: str) -> int:
    if part == "backend":
        return network.backend_of(node.peer).pid
    if part == "p2pd":
        return node.pid_of("p2pd")
    assert node.process is not None
    return node.process.pid


@pytest.mark.parametrize("part", ["sidecar", "p2pd", "backend"])
async def test_others_answer_while_one_stands_still(part: str) -> None:
    with Network(validators=1, executors=3, clients=1, flags=FAST, keeps_ports=True) as network:
        world = World(network, seed=5)
        # So many that the client knows how soon a first byte comes here.
        await world.ask_all((make_ask(5, tag, leavers=False) for tag in range(1, 61)), apps=8)
        running = Ask(tag=1000, chunks=500, delay_ms=20)
        async with trio.open_nursery() as nursery:
            app = world.app()
            held = await nursery.start(app.ask_told, running)
            victim = network.node_of(held.executor)
            with stopped(await trio.to_thread.run_sync(pid_of, network, victim, part)):
                stopped_at = time.time()
                during = await world.ask_all((make_ask(6, tag, leavers=False) for tag in range(2001, 2061)), apps=8)
                first = min(one.ended_at or 0.0 for one in during) - stopped_at
                worst = max(one.delay_s for one in during)
                retried = sum(one.attempts > 1 for one in during)
                print(
                    f"{part}: first answer after {first:.2f} s, worst delay {worst:.2f} s, {retried} went on to others"
                )
                assert {one.executor for one in during} <= {node.peer for node in network.executors if node != victim}
                assert share(during) == (len(during), len(during))
                if part != "backend":
                    # Its stream is cut, and its application told, when keep-alive has found out.
                    with trio.fail_after(60):
                        await app.ended.wait()
                    assert held.outcome is Outcome.ERROR
                    assert held.ended_at is not None
                    print(f"{part}: the application of its stream was told after {held.ended_at - stopped_at:.1f} s")
        # A backend that only paused goes on where it was.
        assert held.outcome is (Outcome.COMPLETE if part == "backend" else Outcome.ERROR)
        world.records.append(held)
        violations = await trio.to_thread.run_sync(world.violations)
        assert not violations, "\n".join(violations)

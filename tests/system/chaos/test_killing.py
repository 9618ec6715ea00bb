"""Something dies every second while applications stream: nothing is lost, doubled or silently cut."""

from __future__ import annotations

import pytest
import trio

from tests.harness import Network
from tests.harness.cut_streams import wait_can_resume
from tests.harness.waiting import wait_until

from .descriptors import count_descriptors, kinds
from .faults import Plan
from .figures import deaths, share, summary, untouched
from .record import Outcome, make_ask
from .world import World

APPS = 32
EXECUTORS = 4
EVERY_S = 1.0
FAST = ["--heartbeat", "1"]
"""A restarted executor gets into the gossip at the next heartbeat: with the default of 10 s runs would mostly wait."""


@pytest.mark.parametrize(
    ("requests", "seed", "resume", "least"),
    [
        (600, 1, False, 0.90),
        pytest.param(2000, 2, False, 0.90, marks=pytest.mark.soak),
        pytest.param(2000, 3, True, 0.99, marks=pytest.mark.soak),
    ],
    ids=["short", "long", "resumed"],
)
async def test_something_dies_every_second(requests: int, seed: int, resume: bool, least: float) -> None:
    """``least``: the share of all requests that must be complete."""
    flags = [*FAST, "--model-digest", "5" * 64]
    with Network(validators=1, executors=EXECUTORS, clients=1, flags=flags, keeps_ports=True) as network:
        await trio.to_thread.run_sync(wait_can_resume, network, network.executors)
        world = World(network, seed=seed, resume=resume)
        client = network.client
        assert client.process is not None
        # One request each way, so that what is opened once is open: the ledger, the pool's watch, an idle stream.
        assert client.chat("chunks=1").status_code == 200
        at_rest, kinds_at_rest = count_descriptors(client), kinds(client.process.pid)
        over = trio.Event()
        began_at = trio.current_time()

        async def ask() -> None:
            await world.ask_all((make_ask(seed, tag) for tag in range(1, requests + 1)), apps=APPS)
            print(f"asked for {trio.current_time() - began_at:.1f} s")
            over.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await world.kill_until(over, Plan(seed, EXECUTORS), EVERY_S)
        print("\n".join([*deaths(world.outages), *summary(world.records, world.outages)]))
        assert len(world.records) == requests
        violations = await trio.to_thread.run_sync(world.violations)
        assert not violations, "\n".join(violations[:20])
        complete, count = share(world.records)
        assert complete >= least * count
        calm = untouched(world.records, world.outages)
        complete, count = share(calm)
        failed = [record for record in calm if record.outcome is Outcome.ERROR]
        assert complete >= 0.995 * count, failed

        # Executors that end say GOAWAY, so the client closes its streams to them: it holds what it held at the start.
        for node in network.executors:
            assert await trio.to_thread.run_sync(node.stop) == 0
        await trio.to_thread.run_sync(
            lambda: wait_until(
                lambda: count_descriptors(client) <= at_rest,
                "the client to give back its descriptors",
                timeout_s=30,
                explain=lambda: f"{at_rest} {kinds_at_rest} at first, now {kinds(client.process.pid)}",  # type: ignore[union-attr]
            )
        )

"""One backend of three is bad by itself: what it breaks, how soon it is left alone, and what no application sees."""

from __future__ import annotations

from collections import Counter

import pytest
import trio

from tests.harness import Network

from .figures import share
from .record import Outcome, make_ask
from .test_killing import FAST
from .world import World

BEFORE_ITS_FIRST_BYTE = {"status 500": {"status": 500}, "cut at once": {"cut": 0}, "slow": {"first_ms": 3000}}
IN_ITS_MIDDLE = {"truncated": {"cut": 3}, "garbage": {"garbage": 2}, "error event": {"error": 2}}


SHORT = "garbage"
FAULTS = [*BEFORE_ITS_FIRST_BYTE, *IN_ITS_MIDDLE, "lies"]


@pytest.mark.parametrize("fault", [pytest.param(one, marks=() if one == SHORT else pytest.mark.soak) for one in FAULTS])
async def test_a_bad_backend(fault: str) -> None:
    with Network(validators=1, executors=3, clients=1, flags=FAST, keeps_ports=True) as network:
        world = World(network, seed=8)
        directives = {**BEFORE_ITS_FIRST_BYTE, **IN_ITS_MIDDLE, "lies": {"lie": 1_000_000}}[fault]
        await trio.to_thread.run_sync(lambda: network.backends[0].set_script(**directives))
        bad = network.executors[0].peer
        asks = (make_ask(8, tag, leavers=False) for tag in range(1, 201))
        records = await world.ask_all(asks, apps=8)
        complete, count = share(records)
        errors = Counter(record.error for record in records if record.outcome is Outcome.ERROR)
        worst = max(record.delay_s for record in records if record.outcome is Outcome.COMPLETE)
        used = sum(record.executor == bad for record in records)
        print(f"{fault}: {complete} of {count} complete, {dict(errors)}, it was used {used} times, worst {worst:.2f} s")
        # What it sends is either whole or cut with a word; nothing of its garbage arrives.
        violations = await trio.to_thread.run_sync(world.violations)
        assert not violations, "\n".join(violations)
        if fault == "lies":
            assert "numbers_doubtful" in network.client.conditions()
        if fault in IN_ITS_MIDDLE:
            assert {record.executor for record in records if record.outcome is Outcome.ERROR} <= {bad}
            assert complete >= 0.8 * count
        else:
            assert complete == count

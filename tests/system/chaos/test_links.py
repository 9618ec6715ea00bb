"""Links that lose a fifth of what they carry, and a host that is cut off and comes back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import trio
from natlab import Lan, add_on, address_of

from tests.harness import Network, ScriptedBackend

from .figures import share
from .record import Ask, Outcome, make_ask
from .test_killing import FAST
from .world import World

pytestmark = [pytest.mark.soak, pytest.mark.root]

EXECUTORS = 2


@contextmanager
def world_on(lan: Lan, seed: int) -> Iterator[World]:
    """A validator, two executors and a client, each on a host of its own."""
    with Network(validators=0, executors=0, clients=0, flags=FAST) as network, ExitStack() as backends:
        validator_host, *executor_hosts, client_host = lan.hosts
        validator = add_on(validator_host, network, "validator")
        known = ("--bootstrap", address_of(validator_host, validator))
        network.validators.append(validator.start())
        for number, host in enumerate(executor_hosts):
            journal = network.root / f"backend{number}.jsonl"
            backend = backends.enter_context(ScriptedBackend(journal=journal, prefix=host.prefix))
            network.backends.append(backend)
            network.executors.append(add_on(host, network, "executor", *known, backend=backend.url).start())
        network.clients.append(add_on(client_host, network, "client", *known).start())
        network.wait_known(network.client)
        yield World(network, seed=seed, host=client_host)


async def test_a_fifth_of_the_packets_is_lost() -> None:
    with Lan(2 + EXECUTORS) as lan, world_on(lan, 14) as world:
        lossy = lan.hosts[1]
        await world.ask_all((make_ask(14, tag, leavers=False) for tag in range(1, 41)), apps=8)
        lossy.lose(0.2)
        records = await world.ask_all((make_ask(14, tag) for tag in range(101, 301)), apps=8)
        complete, count = share(records)
        used = sum(record.executor == world.network.executors[0].peer for record in records)
        worst = max(record.delay_s for record in records if record.outcome is Outcome.COMPLETE)
        errors = Counter(record.error for record in records if record.outcome is Outcome.ERROR)
        lost = lossy.lost()
        assert lost > 0
        print(
            f"{lost} packets lost; {complete} of {count} complete, {dict(errors)}, lossy one used {used} times, "
            f"worst {worst:.2f} s"
        )
        violations = await trio.to_thread.run_sync(world.violations)
        assert not violations, "\n".join(violations)
        assert complete >= 0.9 * count


async def test_an_executor_is_cut_off_and_comes_back() -> None:
    with Lan(2 + EXECUTORS) as lan, world_on(lan, 15) as world:
        network, cut = world.network, world.network.executors[0]
        await world.ask_all((make_ask(15, tag, leavers=False) for tag in range(1, 61)), apps=8)
        running = [Ask(tag=1000 + number, chunks=400, delay_ms=20) for number in range(8)]
        async with trio.open_nursery() as nursery:
            apps = [world.app() for _ in running]
            held = [await nursery.start(app.ask_told, ask) for app, ask in zip(apps, running, strict=True)]
            with lan.unplugged(lan.hosts[1]):
                cut_at = time.time()
                during = await world.ask_all((make_ask(15, tag) for tag in range(2001, 2061)), apps=8)
                for app in apps:
                    with trio.fail_after(60):
                        await app.ended.wait()
        told = [one.ended_at - cut_at for one in held if one.executor == cut.peer and one.ended_at]
        print(f"cut off: {share(during)} complete, worst delay {max(one.delay_s for one in during):.2f} s")
        print(f"{len(told)} streams told after {', '.join(f'{seconds:.1f}' for seconds in told)} s")
        assert share(during)[0] == share(during)[1]
        assert told
        for one in held:
            assert one.outcome is (Outcome.ERROR if one.executor == cut.peer else Outcome.COMPLETE)
        healed_at = time.time()
        with trio.fail_after(90):
            tags = iter(range(3001, 100_000))
            while True:
                after = await world.ask_all((make_ask(15, next(tags)) for _ in range(12)), apps=12)
                assert share(after)[0] == share(after)[1]
                if any(one.executor == cut.peer for one in after):
                    break
        print(f"used again {time.time() - healed_at:.1f} s after it was plugged in")
        world.records += held
        # What it worked on when it was cut off it cannot know to be for nobody before its own keep-alive ends.
        world.records = [one for one in world.records if one.executor != cut.peer or one.outcome is not Outcome.ERROR]
        violations = await trio.to_thread.run_sync(world.violations)
        assert not violations, "\n".join(violations)
        await trio.to_thread.run_sync(network.client.stop)

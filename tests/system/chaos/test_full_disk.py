"""The disk of an executor is full: free work goes on, and what it cannot keep it says."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import trio

from tests.harness import Network
from tests.harness.waiting import wait_until

from .figures import share
from .record import make_ask
from .test_killing import FAST
from .world import World

pytestmark = [pytest.mark.soak, pytest.mark.root]


@contextmanager
def small_disk(home: Path) -> Iterator[None]:
    """``home`` on a file system of 4 MiB while the context lasts."""
    kept = home.with_name(home.name + "-kept")
    shutil.move(home, kept)
    home.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(home)], check=True, timeout=10)
    try:
        shutil.copytree(kept, home, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(home)], check=True, timeout=10)


def fill(file: Path) -> None:
    """Write until nothing more fits."""
    with suppress(OSError), file.open("wb", buffering=0) as out:
        for size in (65536, 4096, 1):
            with suppress(OSError):
                while True:
                    out.write(bytes(size))


async def test_a_full_disk() -> None:
    with Network(validators=1, executors=1, clients=1, flags=FAST, keeps_ports=True) as network:
        victim = network.add("executor", start=False)
        with small_disk(victim.home):
            await trio.to_thread.run_sync(victim.start)
            network.executors.append(victim)
            await trio.to_thread.run_sync(network.wait_known, network.client)
            world = World(network, seed=11)
            await world.ask_all((make_ask(11, tag, leavers=False) for tag in range(1, 41)), apps=8)
            violations = await trio.to_thread.run_sync(world.violations)
            assert not violations, "\n".join(violations)

            ballast = victim.home / "ballast"
            await trio.to_thread.run_sync(fill, ballast)
            full = World(network, seed=12)
            records = await full.ask_all((make_ask(12, tag, leavers=False) for tag in range(1001, 1201)), apps=8)

            def losers() -> list[str]:
                kept = {entry.request_id for entry in full.executor_ledgers()}
                return [record.executor for record in records if record.request_id not in kept]

            # The other executor's are written by and by.
            await trio.to_thread.run_sync(
                lambda: wait_until(lambda: set(losers()) == {victim.peer}, "all but the full one to keep theirs")
            )
            print(f"full: {share(records)} complete, {len(losers())} receipts not kept, {victim.conditions()}")
            assert share(records) == (len(records), len(records))
            assert "ledger_full" in victim.conditions()

            ballast.unlink()
            again = World(network, seed=13)
            await again.ask_all((make_ask(13, tag, leavers=False) for tag in range(2001, 2041)), apps=8)
            violations = await trio.to_thread.run_sync(again.violations)
            assert not violations, "\n".join(violations)
            await trio.to_thread.run_sync(victim.stop)

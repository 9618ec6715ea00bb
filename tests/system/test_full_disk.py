"""A disk that is really full under a node's home: nothing that costs is begun, free work goes on, and it heals."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lloom_sidecar.ledger.store import MIN_FREE_BYTES
from tests.harness import Network, Node
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.root
DISK_BYTES = MIN_FREE_BYTES + 24 * 1024 * 1024
PRICED = ("--price-prompt", "1000000", "--price-completion", "1000000", "--price-currency", "EUR")


@contextmanager
def small_disk(node: Node) -> Iterator[Path]:
    """The node's home on a file system of its own; gives the path of the file that fills it."""
    beside = node.home.parent / f"{node.home.name}.copy"
    shutil.move(node.home, beside)
    node.home.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=700", "tmpfs", str(node.home)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        shutil.copytree(beside, node.home, dirs_exist_ok=True)
        yield node.home / "filler"
    finally:
        if node.is_running:
            node.stop()
        subprocess.run(["umount", "-l", str(node.home)], check=True, capture_output=True)


def fill(filler: Path) -> None:
    """Write until not one byte more fits."""
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def code_of(client: Node, *, model: str = "scripted") -> str:
    answer = client.chat("chunks=2", model=model)
    if answer.status_code == 200:
        return "ok"
    error = answer.json()["error"]
    return str((error["lloom"]["attempts"] or [{"reason": error["lloom"]["code"]}])[-1]["reason"])


def exchanges(node: Node) -> list[dict[str, Any]]:
    with node.admin() as admin:
        return [dict(one) for one in admin.exchanges(limit=1000)]


@pytest.mark.parametrize("where", ["executor", "client"])
def test_with_a_full_disk_only_free_work_is_done(where: str) -> None:
    with Network(validators=1, executors=0, clients=0) as network:
        executor = network.add("executor", *PRICED, start=False)
        client = network.add("client", start=False)
        full = executor if where == "executor" else client
        with small_disk(full) as filler:
            network.executors.append(executor.start())
            network.clients.append(client.start())
            network.wait_known(client)
            assert code_of(client) == "ok"
            assert "ledger_full" not in full.conditions()

            fill(filler)
            assert os.statvfs(full.home).f_bavail == 0
            # Nothing of the ledger's may be written now; a node that does not know it yet learns it by its first try.
            wait_until(
                lambda: code_of(client) == "ledger_full" and "ledger_full" in full.conditions(),
                "the full disk to be noticed",
                timeout_s=30,
                explain=full.log_tail,
            )
            # Who refuses again and again is not asked for a while.
            assert code_of(client) in ("ledger_full", "no_executor")
            other = client if full is executor else executor
            assert "ledger_full" not in other.conditions()

            done = executor.ctl("executor", "price", "scripted", "free")
            assert done.returncode == 0, done.stderr
            wait_until(lambda: code_of(client) == "ok", "free work to be done", timeout_s=30, explain=client.log_tail)
            for _ in range(20):
                assert code_of(client) == "ok"
            assert full.metric("lloom_ledger_failed_writes") > 0

            filler.unlink()
            wait_until(lambda: "ledger_full" not in full.conditions(), "the ledger to have room again", timeout_s=30)
            done = executor.ctl("executor", "price", "scripted", "15/60 EUR")
            assert done.returncode == 0, done.stderr
            wait_until(lambda: code_of(client) == "ok", "priced work to be done", timeout_s=30, explain=client.log_tail)
            rows = wait_until(
                lambda: (found := exchanges(full)) and found[0]["owed"] and found[0]["acknowledged"] and found,
                "the last answer's countersignature",
                timeout_s=30,
            )
            # A start needs no more than what there is: the file is whole.
            full.kill()
            full.start()
            assert exchanges(full) == rows

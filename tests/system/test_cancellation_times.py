"""Cancellation measured: from an application's leaving to the backend's stop, p50 and p99 of each kind."""

from __future__ import annotations

import itertools
import statistics

import pytest

from tests.harness import Network
from tests.harness.cancelling import KINDS, occupied, queued_freed_after_ms

TIMES = 100

pytestmark = pytest.mark.soak


def show(kind: str, took_ms: list[float]) -> None:
    took_ms.sort()
    print(
        f"{kind:24} p50 {statistics.median(took_ms):7.1f} ms   p99 {took_ms[len(took_ms) * 99 // 100]:7.1f} ms   "
        f"most {took_ms[-1]:7.1f} ms   of {len(took_ms)}",
        flush=True,
    )


def test_times() -> None:
    tags = itertools.count(1, 1000)
    print()
    with Network(validators=1, executors=2, clients=1, flags=["--heartbeat", "1"]) as network:
        for kind, measure in KINDS.items():
            times = TIMES if kind != "after a failover" else TIMES // 10
            show(kind, [measure(network, next(tags)) for _ in range(times)])
    with Network(validators=1, executors=0, clients=1) as network:
        executor = network.add("executor", "--slots", "1")
        network.executors.append(executor)
        network.wait_known(network.client)
        with occupied(network.client, network.backends[0], 1):
            show(
                "queued: place freed",
                [queued_freed_after_ms(executor, network.client, n) for n in range(2, 2 + TIMES)],
            )

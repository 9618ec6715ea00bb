"""Two hundred streams cut at random places, by backends that break off and executors that are killed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import pytest

from tests.harness import Network
from tests.harness.cut_streams import Read, cut_at_random, read, text_of, wait_can_resume

STREAMS = 300
"""Of which some stop before their cut: over 200 are resumed."""
FLAGS = ["--heartbeat", "1", "--model-digest", "5" * 64]

pytestmark = pytest.mark.soak


def test_cut_by_backends_that_break_off() -> None:
    with Network(validators=1, executors=3, clients=1, flags=FLAGS) as network:
        wait_can_resume(network, network.executors)
        began_at = time.monotonic()
        found = cut_at_random(network.client, STREAMS, seed=2)
        resumed = Counter(len(one.resumed_at) for one in found)
        print(f"\n{STREAMS} streams in {time.monotonic() - began_at:.1f} s, by the times they were resumed: {resumed}")
        assert sum(n for times, n in resumed.items() if times) >= 200


def test_cut_by_executors_that_are_killed() -> None:
    """One executor at a time is killed and started again, while streams run one after another in four threads."""
    with Network(validators=1, executors=3, clients=1, flags=FLAGS, keeps_ports=True) as network:
        wait_can_resume(network, network.executors)
        rng = random.Random(3)
        over = threading.Event()
        found: list[tuple[int, Read]] = []
        kills = 0

        def application(number: int) -> None:
            seed = number * 1000
            while not over.is_set():
                seed += 1
                found.append((seed, read(network.client, f"seed={seed} chunks=120 delay_ms=10")))

        threads = [threading.Thread(target=application, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        try:
            while kills < 12:
                over.wait(rng.uniform(0.5, 1.5))  # anywhere in the streams that run
                victim = rng.choice(network.executors)
                victim.kill(rng.choice(["sidecar", "p2pd"]))
                kills += 1
                if not victim.is_running:
                    victim.start()
                wait_can_resume(network, network.executors)
        finally:
            over.set()
            for thread in threads:
                thread.join(60)
        wrong = [seed for seed, one in found if not text_of(seed, 120).startswith(one.text)]
        whole = [one for seed, one in found if one.has_ended and one.text == text_of(seed, 120)]
        silent = [seed for seed, one in found if not one.has_ended and not one.error]
        resumed = Counter(len(one.resumed_at) for _, one in found)
        reasons = Counter(one.error["lloom"].get("not_resumed", one.error["code"]) for _, one in found if one.error)
        print(
            f"\n{kills} kills, {len(found)} streams, {len(whole)} whole; by the times they were resumed: {resumed}; "
            f"errors: {reasons}"
        )
        assert not wrong
        assert not silent
        assert len(whole) >= 0.99 * len(found)

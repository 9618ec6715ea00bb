"""Clocks that disagree: two minutes do no harm and are said, twenty are refused with the reason named.

The sidecar's processes see another time by libfaketime, which answers libc's clock calls; its monotonic clock stays.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.harness import Network, Node
from tests.harness.waiting import wait_until

FAST = ["--heartbeat", "1"]
MINUTE_S = 60


def shifted(seconds: int) -> dict[str, str]:
    """Environment of a process whose clock is so far ahead, or behind when negative."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not found:
        pytest.fail("libfaketime is missing: apt-get install libfaketime")
    return {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME": f"{seconds:+d}s",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def clock_of(node: Node) -> tuple[int, dict[str, Any]]:
    """lloomctl doctor's exit code, and what it says of the clock."""
    done = node.ctl("doctor", "--json")
    (said,) = [one for one in json.loads(done.stdout)["findings"] if one["check"] == "clock"]
    return done.returncode, said


def test_two_minutes_apart_everything_works_and_doctor_says_so() -> None:
    with Network(validators=1, executors=0, clients=0, flags=FAST) as network:
        fast = network.add("executor", env=shifted(2 * MINUTE_S))
        slow = network.add("client", env=shifted(-2 * MINUTE_S))
        network.executors.append(fast)
        network.clients.append(slow)
        network.wait_known(slow, timeout_s=30)
        assert slow.chat("hello").status_code == 200
        with slow.stream("chunks=5") as answer:
            assert "[DONE]" in answer.read().decode()
        quoted = slow.ctl("model", "quote", fast.peer, "scripted", "--json")
        assert quoted.returncode == 0, quoted.stderr
        for node, way in ((fast, "ahead of"), (slow, "behind")):
            code, said = clock_of(node)
            print(f"{node.name}: {said['text']}")
            assert code == 0
            assert said["severity"] == "warning"
            assert said["text"].startswith(("119.", "120."))
            assert way in said["text"]
            assert "set-ntp" in said["remedy"]
            assert "clock_skew" in node.conditions()
        code, said = clock_of(network.validators[0])
        assert said["severity"] == "skipped"  # nobody to compare with


def test_twenty_minutes_apart_are_refused_with_the_reason() -> None:
    with Network(validators=1, executors=1, clients=1, flags=FAST) as network:
        off = network.add("executor", env=shifted(20 * MINUTE_S))
        lost = network.add("client", env=shifted(-20 * MINUTE_S))

        # Whoever hears the announcement drops it and counts why.
        def dropped(node: Node) -> float:
            return node.metric("lloom_announcements_dropped_total", reason="clock")

        for node in (network.client, network.validators[0]):
            wait_until(partial(dropped, node), f"{node.name} to drop it", timeout_s=30)
            assert set(node.executors()) == {network.executors[0].peer}
        assert network.client.chat("hello").status_code == 200
        # A client of that kind believes nobody, and its answer to an application is no crash.
        wait_until(lambda: dropped(lost), "the client to drop all", timeout_s=30)
        assert lost.executors() == {}
        assert lost.chat("hello").status_code in (404, 503)
        for node in (off, lost):
            code, said = clock_of(node)
            print(f"{node.name}: {said['text']}")
            assert code == 1
            assert said["severity"] == "error"
            assert "announcements are dropped over 15 min" in said["text"]
            assert said["text"].startswith(("1199.", "1200."))
            assert "clock_skew" in node.conditions()
        # Nobody holds it against them: a wrong clock is no offence.
        for node in network.nodes:
            assert node.metric("lloom_peers_banned_total", reason="clock") == 0
            known = node.peers()
            assert all(known[one.peer]["connected"] for one in (off, lost) if one.peer in known)

"""What a node's processes hold."""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

import psutil

from tests.harness import Node


class Held(NamedTuple):
    """Open descriptors of a node's two processes."""

    sidecar: int
    p2pd: int

    def __le__(self, other: tuple[int, ...]) -> bool:
        """Neither holds more."""
        return self.sidecar <= other[0] and self.p2pd <= other[1]


def count_descriptors(node: Node) -> Held:
    """Files, sockets, pipes."""
    assert node.process is not None
    return Held(psutil.Process(node.process.pid).num_fds(), psutil.Process(node.pid_of("p2pd")).num_fds())


def kinds(pid: int) -> Counter[str]:
    """What a process holds, by kind: for a failed test."""
    found: Counter[str] = Counter()
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[os.readlink(f"/proc/{pid}/fd/{name}").partition(":")[0]] += 1
        except OSError:
            continue
    return found

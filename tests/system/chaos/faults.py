"""What breaks, and when: a seeded plan. Pure.

At most one executor is down at a time. While one is down, a tick breaks the validator's p2pd instead: it carries
gossip and bootstrap, no request goes through it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

EXECUTOR_PARTS = ("sidecar", "p2pd", "backend")


@dataclass(frozen=True, slots=True)
class Kill:
    """One ``kill -9``."""

    part: str
    """sidecar, p2pd, backend: of an executor; validator: the p2pd of the validator."""
    executor: int | None
    """Which executor; None for the validator's."""

    @property
    def name(self) -> str:
        """For records and logs."""
        return self.part if self.executor is None else f"{self.part} {self.executor}"


class Plan:
    """Which kill comes next."""

    def __init__(self, seed: int, executors: int) -> None:
        self._rng = random.Random(seed)
        self._executors = executors

    def next(self, *, is_one_down: bool) -> Kill:
        """The kill of this tick; ``is_one_down``: an executor is not back yet."""
        part = self._rng.choice(EXECUTOR_PARTS)
        executor = self._rng.randrange(self._executors)
        return Kill("validator", None) if is_one_down else Kill(part, executor)

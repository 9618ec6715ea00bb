"""What breaks, and when: a seeded plan. Pure.

At most one executor is down at a time. While one is, a tick strikes another part of the same one, or the validator's
p2pd: that carries gossip and bootstrap, no request goes through it.
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


VALIDATOR = Kill("validator", None)


@dataclass(frozen=True, slots=True)
class Outage:
    """Something was broken for a while. Instants: seconds of Unix time."""

    kill: Kill
    began_at: float
    ended_at: float


class Plan:
    """Which kill comes next."""

    def __init__(self, seed: int, executors: int) -> None:
        self._rng = random.Random(seed)
        self._executors = executors

    def next(self, active: frozenset[Kill]) -> Kill | None:
        """The kill of this tick, None when everything that may be dead is; ``active``: what is not back yet."""
        down = next((kill.executor for kill in active if kill.executor is not None), None)
        if down is None:
            return Kill(self._rng.choice(EXECUTOR_PARTS), self._rng.randrange(self._executors))
        others = [VALIDATOR, Kill("backend", down)]
        if Kill("sidecar", down) not in active:  # a starting one may have no p2pd yet
            others.append(Kill("p2pd", down))
        others = [kill for kill in others if kill not in active]
        return self._rng.choice(others) if others else None

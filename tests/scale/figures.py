"""What was measured: named samples, and the table that they make."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Figure:
    """One quantity, sampled once or often."""

    name: str
    unit: str
    wanted: float | None
    """What it must not exceed, None = there is no such limit."""
    values: list[float] = field(default_factory=list)

    @property
    def is_met(self) -> bool:
        """Every sample keeps to the limit."""
        return self.wanted is None or all(value <= self.wanted for value in self.values)

    def row(self) -> str:
        """A line of the table."""
        wanted = "" if self.wanted is None else f"<= {self.wanted:g}{'' if self.is_met else '  MISSED'}"
        ordered = sorted(self.values)
        shown = f"{statistics.median(ordered):>10.3f} {ordered[-1]:>10.3f} {len(ordered):>5}" if ordered else "-"
        return f"{self.name:<76} {shown} {self.unit:<5} {wanted}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        median = statistics.median(self.values) if self.values else None
        rounded = [round(value, 4) for value in self.values]
        return {"name": self.name, "unit": self.unit, "wanted": self.wanted, "median": median, "values": rounded}


class Figures:
    """All of a run."""

    def __init__(self) -> None:
        self._figures: dict[str, Figure] = {}
        self.notes: list[str] = []
        """What a command showed, in words."""

    def add(self, name: str, values: float | Sequence[float], unit: str = "s", wanted: float | None = None) -> None:
        """Samples of ``name``; those of a later call are added to them."""
        figure = self._figures.setdefault(name, Figure(name, unit, wanted))
        figure.values += [values] if isinstance(values, int | float) else values
        print(figure.row(), flush=True)

    def note(self, text: str) -> None:
        """Something that was seen."""
        self.notes.append(text)
        print(f"  {text}", flush=True)

    @property
    def missed(self) -> list[str]:
        """Names of the figures that are over their limit."""
        return [one.name for one in self._figures.values() if not one.is_met]

    def table(self) -> str:
        """All of it."""
        head = f"{'':<76} {'median':>10} {'worst':>10} {'n':>5}"
        return "\n".join([head, *(one.row() for one in self._figures.values())])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"figures": [one.as_dict() for one in self._figures.values()], "notes": self.notes}

"""Print the table of docs/routing.md: ``python -m tests.replay``."""

from __future__ import annotations

import math

from . import REFUSES, SLOW, WAYS, WEDGES, Replay

SEEDS = (1, 2, 3)


def main() -> None:
    """Three seeds of 5,000 requests each."""
    titles = "chosen by", "within 1 s", "p99", "slowest", "attempts at the slow, refusing, wedged one", "in use again"
    print(f"| {' | '.join(titles)} |")
    print("|---|---|---|---|---|---|")
    for name, way in WAYS.items():
        results = [Replay(way, seed=seed).run() for seed in SEEDS]
        total = sum(result.attempts.total() for result in results)
        bad = [sum(result.attempts[number] for result in results) / total for number in (SLOW, REFUSES, WEDGES)]
        within = sum(result.within for result in results) / len(results)
        print(
            f"| {name} | {within:.2%} | {_seconds(max(r.percentile(0.99) for r in results))} "
            f"| {_seconds(max(r.percentile(1.0) for r in results))} | {', '.join(f'{share:.2%}' for share in bad)} "
            f"| {_seconds(max(r.back_after_s for r in results))} |"
        )


def _seconds(value: float) -> str:
    return "never" if math.isinf(value) else f"{value:.2f} s"


if __name__ == "__main__":
    main()

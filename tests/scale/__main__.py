"""``python -m tests.scale``: start the network, measure, print a table, write JSON. Takes minutes and every core."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from tests.harness import Network
from tests.harness.waiting import pause

from . import measures
from .figures import Figures
from .lab import Lab

PARTS = (
    *("rest", "status", "price", "models", "new_client", "new_executor", "lloomctl", "events", "leaves", "kills"),
    "dht_alone",
)
"""In the order in which they are measured."""


def measure(lab: Lab, figures: Figures, parts: Sequence[str], args: argparse.Namespace) -> None:
    """Start the network and measure the parts that are wanted."""
    began_at, dead = time.monotonic(), []
    lab.start()
    figures.add("all started, a few at a time", time.monotonic() - began_at)
    measures.measure_start(lab, figures)
    once = {
        "status": measures.measure_status,
        "lloomctl": measures.measure_lloomctl,
        "events": measures.measure_events,
    }
    repeated = {
        "price": measures.measure_price,
        "models": measures.measure_models,
        "new_client": measures.measure_new_client,
        "new_executor": measures.measure_new_executor,
        "leaves": measures.measure_leaves,
    }
    for part in parts:
        if part == "rest":
            pause(args.settle)
            measures.measure_memory(lab, figures)
            measures.measure_traffic(lab, figures, args.window)
        elif part == "kills":
            dead = measures.measure_kills(lab, figures, args.repeats)
        elif part == "dht_alone":
            measures.measure_dht_alone(lab, figures, args.repeats, dead)
        elif part in once:
            once[part](lab, figures)
        else:
            repeated[part](lab, figures, args.repeats)


def main() -> int:
    """Run; exit status 1 when a figure is over its limit."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--validators", type=int, default=2)
    parser.add_argument("--executors", type=int, default=20)
    parser.add_argument("--clients", type=int, default=18)
    parser.add_argument("--repeats", type=int, default=3, help="of what takes seconds")
    parser.add_argument(
        "--settle", type=float, default=15.0, help="seconds of rest before memory and traffic are measured"
    )
    parser.add_argument("--window", type=float, default=40.0, help="seconds over which traffic is counted")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, with commas (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    parts = [part for part in PARTS if part in args.only.split(",")]
    figures, began_at = Figures(), time.monotonic()
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before the start", flush=True)
    with Network(validators=args.validators, executors=0, clients=0) as network:
        lab = Lab(network, args.executors, args.clients)
        try:
            measure(lab, figures, parts, args)
        finally:
            lab.close()
            # What was measured before something failed counts too.
            if args.json is not None:
                nodes = [args.validators, args.executors, args.clients]
                facts = {"nodes": nodes, "cores": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]}
                args.json.write_text(json.dumps({**facts, **figures.as_dict()}, indent=1) + "\n")
    took_s, load = time.monotonic() - began_at, os.getloadavg()[0]
    print(f"\n{figures.table()}\n\n{took_s:.0f} s; load {load:.1f} at the end")
    for name in figures.missed:
        print(f"over its limit: {name}")
    return 1 if figures.missed else 0


if __name__ == "__main__":
    raise SystemExit(main())

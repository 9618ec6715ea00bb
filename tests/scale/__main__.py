"""``python -m tests.scale``: start the network, measure, print a table, write JSON. Takes minutes and every core."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import psutil

from tests.harness import Network

from . import measures
from .figures import Figures
from .lab import Lab


def main() -> int:
    """Run; exit status 1 when a figure is over its limit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--validators", type=int, default=2)
    parser.add_argument("--executors", type=int, default=20)
    parser.add_argument("--clients", type=int, default=18)
    parser.add_argument("--repeats", type=int, default=3, help="of what takes seconds")
    parser.add_argument(
        "--settle", type=float, default=15.0, help="seconds of rest before memory and traffic are measured"
    )
    parser.add_argument("--window", type=float, default=40.0, help="seconds over which traffic is counted")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    figures, began_at = Figures(), time.monotonic()
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f} before the start", flush=True)
    with Network(validators=args.validators, executors=0, clients=0) as network:
        lab = Lab(network, args.executors, args.clients)
        try:
            lab.start()
            figures.add("all started, one after the other", time.monotonic() - began_at)
            measures.measure_start(lab, figures)
            time.sleep(args.settle)  # noqa: TID251
            measures.measure_memory(lab, figures)
            measures.measure_traffic(lab, figures, args.window)
            measures.measure_status(lab, figures)
            measures.measure_price(lab, figures, args.repeats)
            measures.measure_models(lab, figures, args.repeats)
            measures.measure_new_client(lab, figures, args.repeats)
            measures.measure_new_executor(lab, figures, args.repeats)
            measures.measure_lloomctl(lab, figures)
            measures.measure_events(lab, figures)
            measures.measure_leaves(lab, figures, args.repeats)
            dead = measures.measure_kills(lab, figures, args.repeats)
            measures.measure_dht_alone(lab, figures, args.repeats, dead)
        finally:
            lab.close()
    took_s = time.monotonic() - began_at
    print(
        f"\n{figures.table()}\n\n{took_s:.0f} s; load {os.getloadavg()[0]:.1f}, "
        f"{psutil.virtual_memory().percent:g} % of memory"
    )
    if args.json is not None:
        facts = {"nodes": [args.validators, args.executors, args.clients], "cores": os.cpu_count(), "load_before": load}
        args.json.write_text(json.dumps({**facts, **figures.as_dict()}, indent=1) + "\n")
    for name in figures.missed:
        print(f"over its limit: {name}")
    return 1 if figures.missed else 0


if __name__ == "__main__":
    raise SystemExit(main())

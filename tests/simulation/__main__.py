"""``python -m tests.simulation --executors 10,40,100,1000,10000 --out docs/img``: table, JSON and plots."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from .plots import PlotError, draw
from .runs import collect, plan, run
from .tables import loss_table, table, variants_table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--executors", default="10,40,100,1000,10000", help="sizes, with commas")
    parser.add_argument("--out", type=Path, help="folder for simulation.json and the plots; none: the table only")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--window", type=float, default=300.0, help="seconds of the model's time that are counted")
    parser.add_argument("--scenarios", default="loss,variants", help="beside the sizes: loss, variants, or nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--from-json", type=Path, help="draw from an earlier simulation.json instead of running")
    args = parser.parse_args(arguments)
    if args.from_json is not None:
        results = json.loads(args.from_json.read_text(encoding="utf-8"))
    else:
        sizes = [int(part) for part in args.executors.split(",")]
        jobs = plan(sizes, args.seed, args.window, frozenset(args.scenarios.split(",")))
        done = []
        with ProcessPoolExecutor(args.jobs, max_tasks_per_child=1) as pool:
            for job, figures in pool.map(run, jobs):
                print(f"{job.group} {job.name} {job.parameters.executors}", file=sys.stderr, flush=True)
                done.append((job, figures))
        results = collect(done)
    print(table(results))
    if results["loss"]:
        print("\n" + loss_table(results))
    if results["variants"]:
        print("\n" + variants_table(results))
    if args.out is None:
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "simulation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    try:
        for file in draw(results, args.out):
            print(file, file=sys.stderr)
    except PlotError as exc:
        print(exc, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

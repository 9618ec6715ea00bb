"""``python -m tests.simulation --executors 10,40,100,1000,10000 --out docs/img``: table, JSON and plots."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .gossip import LOCAL
from .parameters import Death, Parameters
from .plots import PlotError, draw
from .world import simulate

LOSSES = (0.0, 0.01, 0.05, 0.2)


@dataclass(frozen=True)
class Job:
    """One run and where its figures go."""

    group: str
    name: str
    parameters: Parameters


def traffic(executors: int, seed: int, window_s: float) -> Parameters:
    """Churn alone: what is sent, how old what is held is, how newcomers fare."""
    return Parameters(executors=executors, seed=seed, window_s=window_s, newcomer_every_s=30.0)


def deaths(executors: int, seed: int, window_s: float) -> Parameters:
    """No churn but a kill or a goodbye each 5 s, of executors that somebody uses."""
    return Parameters(executors=executors, seed=seed, window_s=window_s, lifetime_s=0.0, aimed_every_s=5.0)


def plan(sizes: Sequence[int], seed: int, window_s: float, scenarios: frozenset[str]) -> list[Job]:
    """Every run that the arguments ask for."""
    jobs = []
    for size in sizes:
        jobs.append(Job("sizes", "traffic", traffic(size, seed, window_s)))
        jobs.append(Job("sizes", "deaths", deaths(size, seed, window_s)))
    middle = [size for size in sizes if 40 <= size <= 1000][-2:] or list(sizes[:1])
    if 40 in sizes and 1000 in sizes:
        middle = [40, 1000]
    if "loss" in scenarios:
        for size in middle:
            for loss in LOSSES:
                jobs.append(Job("loss", f"{size}", replace(traffic(size, seed, window_s), loss=loss)))
    if "variants" in scenarios:
        for size in middle:
            jobs.append(Job("variants", "host death", replace(deaths(size, seed, window_s), death=Death.HOST)))
        one_host = replace(traffic(40, seed, window_s), hop=LOCAL, bandwidth_bytes_s=1e9)
        jobs.append(Job("variants", "one machine, traffic", one_host))
        jobs.append(Job("variants", "one machine, deaths", replace(deaths(40, seed, window_s), hop=LOCAL)))
        large = max(sizes)
        base, killed = traffic(large, seed, window_s), deaths(large, seed, window_s)
        jobs += [
            Job("variants", "three full ones at start", replace(base, first_fulls=3)),
            Job("variants", "no full one for topic peers", replace(base, first_fulls=3, reannounces=False)),
            Job("variants", "10 s interval", replace(base, interval_s=10.0, window_s=60.0)),
            Job("variants", "hints of validators each 5 s", replace(killed, hints_every_s=5.0)),
        ]
    return jobs


def run(job: Job) -> tuple[Job, dict[str, Any]]:
    """One job, in a process of its own."""
    return job, simulate(job.parameters)


def collect(done: Sequence[tuple[Job, dict[str, Any]]]) -> dict[str, Any]:
    """Results by group."""
    sizes: dict[int, dict[str, Any]] = {}
    results: dict[str, Any] = {"sizes": [], "loss": [], "variants": []}
    for job, figures in done:
        count = job.parameters.executors
        if job.group == "sizes":
            sizes.setdefault(count, {"executors": count})[job.name] = figures
        elif job.group == "loss":
            results["loss"].append({"executors": count, "loss": job.parameters.loss, "figures": figures})
        else:
            results["variants"].append({"executors": count, "name": job.name, "figures": figures})
    results["sizes"] = list(sizes.values())
    return results


def table(results: dict[str, Any]) -> str:
    """The table of the docs, in Markdown."""
    rows: list[tuple[str, list[str]]] = []
    runs = results["sizes"]

    def add(name: str, *path: str, of: str = "traffic", factor: float = 1.0, digits: int = 2) -> None:
        cells = []
        for one in runs:
            value: Any = one[of]
            for part in path:
                value = value[part]
            cells.append("-" if value is None else f"{value * factor:,.{digits}f}")
        rows.append((name, cells))

    add("interval, s", "interval_s", digits=0)
    add("ttl, s", "ttl_s", digits=0)
    add("hops, median", "hops", "p50", digits=0)
    add("sent by an executor, messages/min", "messages_per_s", "published_by_executor", factor=60)
    add("received by a node, messages/s", "messages_per_s", "received_by_node")
    add("... of these heartbeats", "messages_per_s", "received_by_kind", "heartbeat")
    add("... of these full ones", "messages_per_s", "received_by_kind", "full")
    add("copies received (and forwarded), /s", "messages_per_s", "received_copies_by_node", digits=1)
    add("gossip in (and out), kB/s", "bytes_per_s", "gossip_in", factor=1e-3, digits=1)
    add("catalogue refresh into a client, kB/s", "bytes_per_s", "catalogue_refresh_in", factor=1e-3, digits=1)
    add("... out of a validator, kB/s", "bytes_per_s", "catalogue_out_of_validators", factor=1e-3, digits=0)
    add("probes that an executor gets, /min", "probes", "received_by_executor_per_s", factor=60)
    add("catalogue age, median, s", "catalogue_age_s", "p50", digits=1)
    add("catalogue age, 99 %, s", "catalogue_age_s", "p99", digits=1)
    for key, label in (
        ("users", "death known: connected"),
        ("others_suspect", "death known: others, suspect"),
        ("others_dead", "death known: others, out of the book"),
    ):
        add(f"{label}, median, s", "death_known_s", key, "p50", of="deaths", digits=1)
        add(f"{label}, 99 %, s", "death_known_s", key, "p99", of="deaths", digits=1)
    add("removal (SIGTERM) known, median, s", "removal_known_s", "p50", of="deaths")
    add("removal (SIGTERM) known, 99 %, s", "removal_known_s", "p99", of="deaths")
    add("new executor known, median, s", "new_executor_known_s", "p50", digits=1)
    add("new executor known, 99 %, s", "new_executor_known_s", "p99", digits=1)
    add("newcomer's catalogue complete, median, s", "newcomer_complete_s", "p50")
    add("newcomer's catalogue complete, worst, s", "newcomer_complete_s", "max")
    add("false deaths per executor-hour", "false_deaths_per_executor_hour", digits=4)
    add("requests to a dead one after the first failure", "requests", "asked_after_failure", of="deaths", digits=0)
    head = "| executors | " + " | ".join(f"{one['executors']:,}" for one in runs) + " |"
    lines = [head, "|---" * (len(runs) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows)])


def loss_table(results: dict[str, Any]) -> str:
    """What lost messages do, in Markdown."""
    lines = [
        "| executors | lost, % | false deaths per executor-hour | shown suspect, % of looks | probes an executor gets, /min "
        "| catalogue age 99 %, s |",
        "|---|---|---|---|---|---|",
    ]
    for one in results["loss"]:
        figures = one["figures"]
        lines.append(
            f"| {one['executors']:,} | {100 * one['loss']:g} | {figures['false_deaths_per_executor_hour']:.4f} "
            f"| {100 * figures['false_suspect_share']:.2f} "
            f"| {60 * figures['probes']['received_by_executor_per_s']:.2f} | {figures['catalogue_age_s']['p99']:.1f} |"
        )
    return "\n".join(lines)


def variants_table(results: dict[str, Any]) -> str:
    """The other runs, in Markdown."""
    lines = [
        "| run | executors | received, messages/s | full ones, /s | probes an executor gets, /min | new executor known, "
        "median / 99 %, s | death known: connected, 99 %, s | others, suspect, 99 %, s | others, out, 99 %, s |",
        "|---" * 9 + "|",
    ]

    def cell(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    for one in results["variants"]:
        figures = one["figures"]
        death, known = figures["death_known_s"], figures["new_executor_known_s"]
        messages = figures["messages_per_s"]
        cells = (
            one["name"],
            f"{one['executors']:,}",
            cell(messages["received_by_node"]),
            cell(messages["received_by_kind"]["full"]),
            cell(60 * figures["probes"]["received_by_executor_per_s"]),
            f"{cell(known['p50'])} / {cell(known['p99'])}",
            cell(death["users"]["p99"]),
            cell(death["others_suspect"]["p99"]),
            cell(death["others_dead"]["p99"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
        with ProcessPoolExecutor(args.jobs) as pool:
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

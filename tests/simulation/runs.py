"""Which runs make the page in the docs, and how their figures are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from .gossip import LOCAL
from .parameters import Death, Parameters
from .world import simulate

LOCALLY: Final[dict[str, Any]] = {"hop": LOCAL, "mesh_forms_s": (0.0, 0.2)}
"""All nodes on one machine."""
LOSSES: Final = (0.0, 0.01, 0.05, 0.2)


@dataclass(frozen=True)
class Job:
    """One run and where its figures go."""

    group: str
    name: str
    parameters: Parameters


def traffic(executors: int, seed: int, window_s: float) -> Parameters:
    """Churn alone: what is sent, how old what is held is, how newcomers fare."""
    return Parameters(
        executors=executors,
        seed=seed,
        window_s=window_s,
        warm_up_s=330.0,  # until connections and suspects have their usual number
        tail_s=30.0,
        observers=_observers(executors),
        newcomer_every_s=30.0,
    )


def deaths(executors: int, seed: int, window_s: float) -> Parameters:
    """No churn but a kill or a goodbye each second, of executors that somebody uses."""
    return Parameters(
        executors=executors,
        seed=seed,
        window_s=window_s,
        warm_up_s=60.0,
        observers=_observers(executors),
        lifetime_s=0.0,
        # In a small network slowly: it must stay as large as it is.
        aimed_every_s=max(1.0, 100.0 / executors),
    )


def _observers(executors: int) -> int:
    return 8 if executors <= 1000 else 3


def _window(executors: int, window_s: float) -> float:
    """Large networks give as many samples in less time."""
    return window_s if executors < 1000 else window_s / 2 if executors <= 1000 else window_s / 5


def plan(sizes: Sequence[int], seed: int, window_s: float, scenarios: frozenset[str]) -> list[Job]:
    """Every run that the arguments ask for, the longest first."""
    jobs = []
    for size in sizes:
        window = _window(size, window_s)
        jobs.append(Job("sizes", "traffic", traffic(size, seed, window)))
        jobs.append(Job("sizes", "deaths", deaths(size, seed, window)))
    middle = [size for size in (40, 1000) if size in sizes] or list(sizes[:1])
    if "loss" in scenarios:
        for size in middle:
            for loss in LOSSES:
                jobs.append(Job("loss", f"{size}", replace(traffic(size, seed, _window(size, window_s)), loss=loss)))
    if "variants" in scenarios:
        jobs += _variants(max(sizes), middle, seed, window_s)
    return sorted(jobs, key=lambda job: -job.parameters.executors)


def _variants(large: int, middle: Sequence[int], seed: int, window_s: float) -> list[Job]:
    def job(name: str, parameters: Parameters, **changes: Any) -> Job:
        return Job("variants", name, replace(parameters, **changes))

    window = _window(large, window_s)
    killed = deaths(large, seed, window)
    # As it was: subscribed before there is anybody, in full for each later topic peer.
    before: dict[str, Any] = {"mesh_forms_s": (0.3, 10.0), "introduces": False, "reannounces": True}
    shard = max(10, large // 20)
    last = middle[-1]
    return [
        *(job("the whole host dies", deaths(size, seed, _window(size, window_s)), death=Death.HOST) for size in middle),
        job("one machine: churn", traffic(40, seed, window_s), **LOCALLY, bandwidth_bytes_s=1e9),
        job("one machine: deaths", deaths(40, seed, window_s), **LOCALLY),
        job(
            "one machine, 20 executors and clients: churn",
            traffic(20, seed, window_s),
            **LOCALLY,
            bandwidth_bytes_s=1e9,
        ),
        job("one machine, 20 executors and clients: deaths", deaths(20, seed, window_s), **LOCALLY),
        job("idle connections closed after 300 s", traffic(last, seed, _window(last, window_s)), idle_peer_s=300.0),
        job("as it was", deaths(40, seed, window_s), **before),
        job("as it was", traffic(last, seed, _window(last, window_s)), **before),
        job("one topic of 20: churn", traffic(shard, seed, window_s)),
        job("one topic of 20: deaths", deaths(shard, seed, window_s)),
        job("10 s interval on one topic", killed, interval_s=10.0),
        job("hints of validators each 5 s", killed, hints_every_s=5.0),
    ]


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
    results["sizes"] = [sizes[count] for count in sorted(sizes)]
    results["loss"].sort(key=lambda one: (one["executors"], one["loss"]))
    return results

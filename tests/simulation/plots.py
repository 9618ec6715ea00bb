"""PNG plots of a set of runs. matplotlib is asked for only here; it is no dependency of the project."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

Run = Mapping[str, Any]

HOW_TO_GET_MATPLOTLIB: Final = "no plots: matplotlib is not installed (pip install matplotlib, in any environment)"
GOAL_S: Final = 35.0
"""Within which everybody is to know of a death. Source: the project's goal."""
NETWORK_RATE: Final = 50.0
_COLOURS: Final = ("#1f5fa8", "#d1602a", "#3a8a4d", "#7a4fa3", "#777777")


class PlotError(Exception):
    """matplotlib is missing; the message says how to get it."""


def draw(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draw every plot into ``directory``; the files. Raises PlotError."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as exc:
        raise PlotError(HOW_TO_GET_MATPLOTLIB) from exc
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    pyplot.rcParams.update(
        {
            "figure.figsize": (7.2, 4.2),
            "figure.dpi": 110,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "font.size": 9,
        }
    )
    directory.mkdir(parents=True, exist_ok=True)
    drawings: list[tuple[str, Callable[[Any, Mapping[str, Any]], None]]] = [
        ("sim_rate.png", _rate),
        ("sim_bytes.png", _bytes),
        ("sim_age.png", _age),
        ("sim_death.png", _death),
        ("sim_loss.png", _loss),
    ]
    files = []
    for name, drawing in drawings:
        figure, axes = pyplot.subplots()
        drawing(axes, results)
        figure.tight_layout()
        figure.savefig(directory / name, metadata={"Software": None})
        pyplot.close(figure)
        files.append(directory / name)
    return files


def _sizes(axes: Any, runs: Sequence[Run]) -> list[int]:
    sizes = [run["executors"] for run in runs]
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("executors (and as many clients)")
    return sizes


def _rate(axes: Any, results: Mapping[str, Any]) -> None:
    runs = results["sizes"]
    sizes = _sizes(axes, runs)
    kinds = (("heartbeat", "heartbeats"), ("full", "full announcements"), ("removal", "removals"))
    for (kind, label), colour in zip(kinds, _COLOURS, strict=False):
        values = [run["traffic"]["messages_per_s"]["received_by_kind"][kind] for run in runs]
        values = [value or math.nan for value in values]  # a logarithmic axis has no zero
        axes.plot(sizes, values, marker="o", color=colour, label=label)
    totals = [run["traffic"]["messages_per_s"]["received_by_node"] for run in runs]
    axes.plot(sizes, totals, marker="s", color="black", linewidth=2, label="all")
    alone = [run["executors"] / run["traffic"]["interval_s"] for run in runs]
    axes.plot(sizes, alone, color="#777777", linestyle=":", label="executors / interval, the policy alone")
    axes.axhline(NETWORK_RATE, color="#aa2222", linestyle="--", linewidth=1, label="50/s, the policy's aim")
    axes.set_yscale("log")
    axes.set_ylim(0.003, 30_000)
    axes.set_ylabel("different messages a second, per node")
    axes.set_title("What every node receives")
    axes.legend(loc="upper left", ncol=2)


def _bytes(axes: Any, results: Mapping[str, Any]) -> None:
    runs = results["sizes"]
    sizes = _sizes(axes, runs)
    gossip = [run["traffic"]["bytes_per_s"]["gossip_in"] / 1000 for run in runs]
    refresh = [run["traffic"]["bytes_per_s"]["catalogue_refresh_in"] / 1000 for run in runs]
    out = [run["traffic"]["bytes_per_s"]["catalogue_out_of_validators"] / 1000 for run in runs]
    axes.plot(sizes, gossip, marker="o", color=_COLOURS[0], label="gossip, into each node (as much out)")
    axes.plot(sizes, refresh, marker="o", color=_COLOURS[2], label="catalogue refresh, into each client")
    axes.plot(sizes, out, marker="s", color=_COLOURS[1], label="catalogue refresh, out of each validator")
    axes.set_yscale("log")
    axes.set_ylabel("kB/s")
    axes.set_title("Traffic of the control plane")
    axes.legend()


def _age(axes: Any, results: Mapping[str, Any]) -> None:
    runs = results["sizes"]
    sizes = _sizes(axes, runs)
    for at, label, colour in (("p50", "median", _COLOURS[0]), ("p99", "99 %", _COLOURS[1])):
        values = [run["traffic"]["catalogue_age_s"][at] for run in runs]
        axes.plot(sizes, values, marker="o", color=colour, label=label)
    axes.plot(sizes, [run["traffic"]["interval_s"] for run in runs], color="#777777", linestyle=":", label="interval")
    axes.set_yscale("log")
    axes.set_ylabel("seconds")
    axes.set_title("Age of the newest announcement that a node holds")
    axes.legend()


def _death(axes: Any, results: Mapping[str, Any]) -> None:
    runs = results["sizes"]
    sizes = _sizes(axes, runs)
    lines = (
        ("users", "connected to it: others are chosen", _COLOURS[2]),
        ("others_suspect", "not connected: suspect, others are chosen", _COLOURS[0]),
        ("others_dead", "not connected: out of the book", _COLOURS[1]),
    )
    for key, label, colour in lines:
        found = [run["deaths"]["death_known_s"][key] for run in runs]
        axes.plot(sizes, [one["p50"] for one in found], marker="o", color=colour, label=f"{label}, median")
        axes.plot(sizes, [one["p99"] for one in found], marker="^", color=colour, linestyle="--", label="... 99 %")
    axes.axhline(GOAL_S, color="#aa2222", linewidth=1, label="35 s")
    axes.set_yscale("log")
    axes.set_ylabel("seconds after kill -9")
    axes.set_title("Until a death is known")
    axes.legend(fontsize=7.5)


def _loss(axes: Any, results: Mapping[str, Any]) -> None:
    by_size: dict[int, list[Run]] = {}
    for run in results["loss"]:
        by_size.setdefault(run["executors"], []).append(run)
    for (size, runs), colour in zip(by_size.items(), _COLOURS, strict=False):
        shares = [100 * run["loss"] for run in runs]
        probes = [run["figures"]["probes"]["received_by_executor_per_s"] * 60 for run in runs]
        deaths = sum(run["figures"]["false_deaths"] for run in runs)
        label = f"{size:,} executors and clients ({deaths} living executors dropped)"
        axes.plot(shares, probes, marker="o", color=colour, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("probes that an executor gets, a minute")
    axes.set_xlabel("messages that never reach a node, %")
    axes.set_title("What lost messages cost: probes, not executors")
    axes.legend()

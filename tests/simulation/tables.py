"""The tables of the docs, in Markdown."""

from __future__ import annotations

from typing import Any


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
    add("dials of dead ones by a client, /min", "probes", "in_vain_per_client_s", factor=60)
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
    add("newcomer's first catalogue read, median, s", "newcomer_first_read_s", "p50")
    add("... of the living ones it had, %", "newcomer_first_read_share", factor=100, digits=1)
    add("newcomer's catalogue complete, median, s", "newcomer_complete_s", "p50")
    add("newcomer's catalogue complete, worst, s", "newcomer_complete_s", "max")
    add("living ones missing in a book, %", "missing_share", factor=100)
    add("false deaths per executor-hour", "false_deaths_per_executor_hour", digits=4)
    add("requests to a dead one after the first failure", "requests", "asked_after_failure", of="deaths", digits=0)
    lines = [_head("executors", *(f"{one['executors']:,}" for one in runs))]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows)])


_LOSS_COLUMNS = (
    "false deaths per executor-hour",
    "shown suspect, %",
    "probes to an executor, /min",
    "catalogue age 99 %, s",
)
_VARIANT_COLUMNS = (
    "received, messages/s",
    "full ones, /s",
    "probes to an executor, /min",
    "false deaths per executor-hour",
    "new executor known, median / 99 %, s",
    "death known, 99 %, s: connected",
    "others, suspect",
    "others, out",
)


def _head(*names: str) -> str:
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def loss_table(results: dict[str, Any]) -> str:
    """What lost messages do, in Markdown."""
    lines = [_head("executors", "lost, %", *_LOSS_COLUMNS)]
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
    lines = [_head("run", "executors", *_VARIANT_COLUMNS)]

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
            cell(figures["false_deaths_per_executor_hour"], 4),
            f"{cell(known['p50'])} / {cell(known['p99'])}",
            cell(death["users"]["p99"]),
            cell(death["others_suspect"]["p99"]),
            cell(death["others_dead"]["p99"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

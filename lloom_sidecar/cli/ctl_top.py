"""``lloomctl top``: the node while it works, once a second."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, TypedDict

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import Target, example, json_option, pass_target

if TYPE_CHECKING:
    from rich.console import Group

    from lloom_sidecar.admin.client import NodeClient
    from lloom_sidecar.admin.view import ModelInfo, Status

WINDOW_S: Final = 15.0
"""Rates are means over it."""
FIRST_S: Final = 1.0
"""How long a single look takes: a rate needs two moments."""
MAX_MODELS: Final = 8
MAX_EVENTS: Final = 6


class Top(TypedDict):
    """One look at the node: ``--json``."""

    peers: int
    members: int
    executors: int
    models: int
    in_flight: int
    queued: int
    requests_per_s: float
    tokens_per_s: float
    """Completion tokens received by applications, and generated here; counted when an answer ends."""
    served: int
    failed: int
    cancelled: int
    sidecar_mib: float | None
    """Resident memory."""
    sidecar_cpu: float | None
    """Cores in use."""
    p2pd_mib: float | None
    """None when it runs elsewhere."""
    conditions: list[str]
    """Codes, the worst first."""


class Meter:
    """Rates from totals. Pure."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, float, float | None]] = deque()

    def add(self, now: float, requests: float, tokens: float, cpu_s: float | None) -> tuple[float, float, float | None]:
        """(requests a second, tokens a second, cores in use) over the window; 0 at first, and after a restart."""
        if self._seen and requests < self._seen[-1][1]:
            self._seen.clear()
        self._seen.append((now, requests, tokens, cpu_s))
        while len(self._seen) > 2 and self._seen[0][0] < now - WINDOW_S:
            self._seen.popleft()
        at, requests_then, tokens_then, cpu_then = self._seen[0]
        seconds = now - at
        if seconds <= 0:
            return 0.0, 0.0, None
        cores = None if cpu_s is None or cpu_then is None else max(0.0, cpu_s - cpu_then) / seconds
        return (requests - requests_then) / seconds, max(0.0, tokens - tokens_then) / seconds, cores


def look(client: NodeClient, meter: Meter, status: Status, *, is_local: bool) -> Top:
    """What ``--json`` prints."""
    totals = dict(_process_totals(client.metrics()))
    requests, tokens = status["requests"], status["tokens"]
    rates = meter.add(
        time.monotonic(),
        requests["served"] + requests["failed"] + requests["cancelled"],
        tokens["received"] + tokens["generated"],
        totals.get("process_cpu_seconds_total"),
    )
    memory = totals.get("process_resident_memory_bytes")
    return Top(
        peers=status["connections"],
        members=status["members"],
        executors=status["executors"],
        models=status["models"],
        in_flight=requests["in_flight"],
        queued=requests["queued"],
        requests_per_s=round(rates[0], 2),
        tokens_per_s=round(rates[1], 2),
        served=requests["served"],
        failed=requests["failed"],
        cancelled=requests["cancelled"],
        sidecar_mib=None if memory is None else round(memory / 2**20, 1),
        sidecar_cpu=None if rates[2] is None else round(rates[2], 3),
        p2pd_mib=_memory_of(status["p2pd"]["pid"]) if is_local else None,
        conditions=[one["code"] for one in status["conditions"]],
    )


def _process_totals(metrics: str) -> list[tuple[str, float]]:
    lines = (line.split(" ") for line in metrics.splitlines() if line.startswith("process_"))
    return [(parts[0], float(parts[1])) for parts in lines if len(parts) == 2]


def _memory_of(pid: int | None) -> float | None:
    import psutil

    if pid is None:
        return None
    try:
        return round(psutil.Process(pid).memory_info().rss / 2**20, 1)
    except psutil.Error:
        return None


@click.command("top", epilog=example("lloomctl top", "lloomctl top --once --json"))
@click.option("--once", is_flag=True, help="One look, after a second, then end.")
@click.option(
    "--interval", type=click.FloatRange(0.2, 60), default=1.0, show_default=True, help="Seconds between looks."
)
@json_option
@pass_target
def top(target: Target, once: bool, interval: float, as_json: bool) -> None:
    """Watch the node: rates, requests, models, memory, events.

    Until Ctrl-C. With --json a JSON object a line; with --once one look. Rates are means over the last 15 s.
    """
    meter, is_local = Meter(), target.node is None
    with target.client() as client:
        look(client, meter, client.status(), is_local=is_local)
        if once or as_json:
            try:
                while True:
                    time.sleep(FIRST_S if once else interval)  # noqa: TID251  # no event loop here
                    found = look(client, meter, client.status(), is_local=is_local)
                    if as_json:
                        output.print_json_line(found)
                    else:
                        output.print_facts([(name.replace("_", " "), value) for name, value in found.items()])
                    if once:
                        return
            except KeyboardInterrupt:
                return
        _watch(client, meter, interval, is_local=is_local)


def _watch(client: NodeClient, meter: Meter, interval: float, *, is_local: bool) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False)
    try:
        with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
            while True:
                status = client.status()
                found = look(client, meter, status, is_local=is_local)
                events = list(client.events(follow=False))[-MAX_EVENTS:]
                live.update(_screen(status, found, client.models(), events, console.width), refresh=True)
                time.sleep(interval)  # noqa: TID251  # no event loop here
    except KeyboardInterrupt:
        return


def _screen(status: Status, found: Top, models: list[ModelInfo], events: list[dict[str, Any]], width: int) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = f"{output.short_id(status['peer'])}  {', '.join(status['roles'])}  up {output.duration(status['uptime_s'])}"
    worst = status["conditions"][0] if status["conditions"] else None
    colour = {"error": "bold red", "warning": "bold yellow"}.get(worst["severity"], "cyan") if worst else "green"
    health = "healthy" if worst is None else f"{worst['code']}: {output.printable(worst['text'] or worst['title'])}"
    memory = f"sidecar {output.number(found['sidecar_mib'])} MiB, {output.number(found['sidecar_cpu'], 2)} cores"
    facts = [
        f"peers {found['peers']}   executors {found['executors']}   models {found['models']}",
        f"in flight {found['in_flight']}   queued {found['queued']}",
        f"requests/s {found['requests_per_s']:.1f}   tokens/s {found['tokens_per_s']:.1f}",
        f"served {found['served']}   failed {found['failed']}   cancelled {found['cancelled']}",
        f"{memory}   p2pd {output.number(found['p2pd_mib'])} MiB",
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("MODEL", "EXECUTORS", "FREE", "QUEUED", "FIRST TOKEN", "TOKENS/S"):
        table.add_column(title, justify="left" if title == "MODEL" else "right", no_wrap=True, overflow="ellipsis")
    for model in models[:MAX_MODELS]:
        fresh = [one for one in model["executors"] if one["state"] == "fresh"]
        firsts = [one["ttft_ms"] for one in fresh if one["ttft_ms"] is not None]
        speeds = [one["tokens_per_s"] for one in fresh if one["tokens_per_s"] is not None]
        table.add_row(
            Text(output.printable(model["id"])),
            str(len(fresh)),
            str(sum(max(0, one["slots"] - one["in_flight"]) for one in fresh)),
            str(sum(one["queued"] for one in fresh)),
            output.milliseconds(min(firsts, default=None), 0),
            output.number(max(speeds, default=None)),
        )
    lines = [Text(head, style="bold"), Text(health[:width], style=colour), Text("")]
    lines += [Text(one[:width]) for one in facts]
    said = [Text(_event(one)[:width], style="dim") for one in events]
    return Group(*lines, Text(""), table, Text(""), *said)


def _event(one: dict[str, Any]) -> str:
    fields = {
        key: value for key, value in one.items() if key in ("peer", "model", "outcome", "reason", "code", "cause")
    }
    shown = "  ".join(
        f"{key}={output.short_id(output.printable(value))}" for key, value in fields.items() if value not in (None, "")
    )
    return f"{output.printable(one.get('at', '-'))[11:19]}  {output.printable(one.get('event', '-')):22}  {shown}"

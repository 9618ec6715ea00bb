"""``lloomctl status``: the node at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import Target, example, json_option, pass_target
from lloom_sidecar.cli.output import count, printable

if TYPE_CHECKING:
    from lloom_sidecar.admin.view import ConditionInfo, NetworkStatusInfo, Status


@click.command("status", epilog=example("lloomctl status", "lloomctl status --json | jq .conditions"))
@json_option
@pass_target
def status(target: Target, as_json: bool) -> None:
    """Show the node at a glance, with what needs attention."""
    with target.client() as client:
        found = client.status()
    if as_json:
        output.print_json(found)
        return
    output.print_facts(_facts(found))
    _print_conditions(found["conditions"])


def _facts(found: Status) -> list[tuple[str, object]]:
    requests, validators = found["requests"], found["validators"]
    connected = sum(1 for one in validators if one["connected"])
    draining = ", draining" if found["draining"] else ""
    facts: list[tuple[str, object]] = [
        ("peer", found["peer"]),
        ("version", f"{found['version']}, up {output.duration(found['uptime_s'])}{draining}"),
        ("roles", ", ".join(found["roles"])),
        ("home", found["home"]),
        ("network", _network(found)),
        ("p2pd", _p2pd(found)),
    ]
    if found["api"]["address"] is not None:
        facts.append(("api", f"{found['api']['address']} ({'ready' if found['api']['ready'] else 'not ready'})"))
    counts = "{in_flight} in flight, {queued} queued; {served} served, {failed} failed, {cancelled} cancelled"
    return [
        *facts,
        ("addresses", found["addrs"]),
        ("peers", f"{found['connections']} connected, {count(found['members'], 'member')}"),
        ("validators", f"{connected} of {len(validators)} connected"),
        *(("network says", [_said(one) for one in told]) for told in [found["network_status"]] if told),
        ("offers", f"{count(found['models'], 'model')} at {count(found['executors'], 'executor')}"),
        ("requests", counts.format_map(requests)),
    ]


def _said(one: NetworkStatusInfo) -> str:
    stale = "" if one["current"] else ", out of date"
    who = f"{output.short_id(one['peer'])} {output.duration(one['age_s'])} ago{stale}"
    seen = ((one["executors"], "executor"), (one["members"], "member"), (one["models_total"], "model"))
    busy = f"{one['in_flight']} of {one['slots']} slots busy"
    return f"{who}: {', '.join(count(number, what) for number, what in seen)}, {busy}"


def _network(found: Status) -> str:
    network = found["network"]
    parts = [network["id"] or "none"]
    if network["open"]:
        parts.append("open to any")
    if network["previous_key_until"]:
        parts.append(f"previous key until {network['previous_key_until']}")
    return ", ".join(parts)


def _p2pd(found: Status) -> str:
    p2pd = found["p2pd"]
    parts = [f"{p2pd['mode']}, {'up' if p2pd['up'] else 'DOWN'}"]
    if p2pd["version"]:
        parts.append(f"version {p2pd['version']}")
    if p2pd["pid"] is not None:
        parts.append(f"pid {p2pd['pid']}")
    if p2pd["restarts"]:
        parts.append(count(p2pd["restarts"], "restart"))
    return ", ".join(parts)


def _print_conditions(conditions: list[ConditionInfo]) -> None:
    for one in conditions:
        colour = output.SEVERITY_COLOURS.get(one["severity"], "white")
        head = output.style(printable(one["severity"]), colour)
        click.echo(f"\n{head} {printable(one['code'])}: {printable(one['text'] or one['title'])}")
        if one["remedy"]:
            click.echo(f"  {printable(one['remedy'])}")

"""``lloomctl executor``: the executors that a node knows, and draining this one."""

from __future__ import annotations

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import NounGroup, Target, example, json_option, pass_target
from lloom_sidecar.cli.output import Column

COLUMNS = (
    Column("EXECUTOR", is_id=True),
    Column("STATE"),
    Column("LEFT", is_number=True),
    Column("PATH"),
    Column("MEMBER"),
    Column("CIRCUIT"),
    Column("BUSY", is_number=True),
    Column("QUEUED", is_number=True),
    Column("MODELS"),
    Column("SOFTWARE"),
)


@click.group("executor", cls=NounGroup)
def executor() -> None:
    """Look at executors, and drain this one."""


@executor.command("list", epilog=example("lloomctl executor list"))
@json_option
@pass_target
def list_executors(target: Target, as_json: bool) -> None:
    """List the executors that the node knows.

    STATE is that of the lease; CIRCUIT is open while this node sends the executor nothing, after failures.
    """
    with target.client() as client:
        executors = client.executors()
    if as_json:
        output.print_json({"executors": executors})
        return
    rows = [
        (
            one["peer"],
            one["state"],
            output.duration(one["lease_left_s"]),
            one["path"] if one["connected"] else "-",
            "yes" if one["member"] else "no",
            one["circuit"],
            one["in_flight"],
            one["queued"],
            ",".join(one["models"]),
            one["software"],
        )
        for one in executors
    ]
    output.print_table(COLUMNS, rows, empty="no executors are known: `lloomctl peer list` shows who is here")


@executor.command("drain", epilog=example("lloomctl executor drain"))
@json_option
@pass_target
def drain(target: Target, as_json: bool) -> None:
    """Let the node refuse new work, finish what runs, and end."""
    with target.client() as client:
        client.drain()
    if as_json:
        output.print_json({"draining": True})
    else:
        output.say("draining: `lloomctl status` shows the requests that still run")

"""``lloomctl config``: the settings of a running node, and checking a file without one."""

from __future__ import annotations

import json
from typing import Any

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import EXIT_USAGE, NounGroup, Target, example, json_option, pass_target
from lloom_sidecar.cli.output import Column

P2PD_COLUMNS = (Column("P2PD"), Column("VALUE"), Column("DECIDED BY", is_minor=True), Column("MEANING"))
COLUMNS = (
    Column("SETTING"),
    Column("VALUE"),
    Column("SOURCE"),
    Column("ENVIRONMENT", is_minor=True),
    Column("FLAG", is_minor=True),
)


@click.group("config", cls=NounGroup)
def config() -> None:
    """Show the settings of the node, or check a file of them."""


@config.command("show", epilog=example("lloomctl config show --changed"))
@click.option("--changed", is_flag=True, help="Only settings that do not have their default.")
@json_option
@pass_target
def show(target: Target, changed: bool, as_json: bool) -> None:
    """Show the settings that the running node uses, and where each comes from.

    SOURCE is flag, env (the environment), file, joined (HOME/bootstrap) or default. A second table shows what p2pd
    works with, and which setting or program decides it; "-" is not known, since another one starts p2pd.
    """
    with target.client() as client:
        settings = [one for one in client.config() if not changed or one["source"] != "default"]
        effective = client.p2pd_effective()
    if as_json:
        output.print_json({"settings": settings, "p2pd": effective})
        return
    rows = [(one["name"], _value(one["value"]), one["source"], one["env"], one["flag"]) for one in settings]
    output.print_table(COLUMNS, rows, empty="every setting has its default")
    if not changed:
        click.echo()
        lines = [(one["name"], _value(one["value"]), one["source"], one["text"]) for one in effective]
        output.print_table(P2PD_COLUMNS, lines, empty="nothing is known of p2pd")


@config.command("check", epilog=example("lloomctl config check /etc/lloom/config.toml --role client"))
@click.argument("file", required=False, type=click.Path(dir_okay=False))
@click.option("--role", "roles", multiple=True, metavar="ROLE", help="As if the node were started with it; repeatable.")
@json_option
@pass_target
def check(target: Target, file: str | None, roles: tuple[str, ...], as_json: bool) -> None:
    """Check the settings in FILE, or HOME/config.toml, with the environment.

    Needs no node. Lists every fault. Exit status 2 when there is one, as `lloom-sidecar run` would end.
    """
    from lloom_sidecar.config import load_config
    from lloom_sidecar.errors import ConfigError

    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    try:
        # The home is a flag only when it was named: the file may name it too.
        warnings = load_config({"home": target.home_option, "roles": roles}, config_file=file).warnings
    except ConfigError as exc:
        faults = exc.faults
    if as_json:
        output.print_json({"ok": not faults, "faults": faults, "warnings": warnings})
    else:
        for fault in faults:
            output.fail(output.printable(fault))
        for warning in warnings:
            output.say(f"warning: {output.printable(warning)}")
        if not faults:
            output.say("the settings can be used")
    if faults:
        raise SystemExit(EXIT_USAGE)


def _value(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ",".join(str(one) for one in value)
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)

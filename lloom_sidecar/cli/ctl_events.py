"""``lloomctl events``: what happened lately at a node, and what happens now."""

from __future__ import annotations

from typing import Any

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import EXIT_UNREACHABLE, Target, example, json_option, pass_target


@click.command("events", epilog=example("lloomctl events --follow --kind executor_lost --kind executor_discovered"))
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only this kind of event; may be repeated.")
@json_option
@pass_target
def events(target: Target, follow: bool, kinds: tuple[str, ...], as_json: bool) -> None:
    """Print what happened lately, or what happens now.

    With --json a JSON object a line. A line of the kind events_dropped says how many were missed.
    """
    try:
        with target.client() as client:
            for one in client.events(follow=follow, kinds=kinds):
                if as_json:
                    output.print_json_line(one)
                else:
                    click.echo(_line(one))
    except KeyboardInterrupt:
        return
    if follow:
        output.fail("the node ended the stream: it is stopping")
        raise SystemExit(EXIT_UNREACHABLE)


def _line(one: dict[str, Any]) -> str:
    fields = {key: value for key, value in one.items() if key not in ("event", "at", "sequence")}
    shown = "  ".join(f"{key}={_value(value)}" for key, value in fields.items() if value not in (None, "", [], ()))
    return f"{output.printable(one.get('at', '-')):24}  {output.printable(one.get('event', '-')):22}  {shown}".rstrip()


def _value(value: object) -> str:
    if isinstance(value, list):
        return ",".join(_value(one) for one in value)
    if isinstance(value, float):
        return f"{value:.3f}"
    text = output.printable(value)
    return f'"{text}"' if " " in text else text

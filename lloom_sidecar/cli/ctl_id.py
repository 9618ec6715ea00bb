"""``lloomctl id``: the node's peer id, from its key file or from a running node."""

from __future__ import annotations

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import Target, example, json_option, pass_target


@click.command("id", epilog=example("lloomctl id"))
@json_option
@pass_target
def show_id(target: Target, as_json: bool) -> None:
    """Print the node's peer id.

    Reads it from the home, so the node need not run; with --node it asks that node.
    """
    if target.node is not None:
        with target.client() as client:
            peer = client.status()["peer"]
    else:
        from lloom_sidecar.identity import load_identity

        peer = str(load_identity(target.home).peer)
    if as_json:
        output.print_json({"peer": peer})
    else:
        click.echo(output.printable(peer))

"""``lloomctl bootstrap``: the validators that a node trusts and stays connected to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import NounGroup, Target, example, find_peer, json_option, pass_target
from lloom_sidecar.cli.output import Column, printable

if TYPE_CHECKING:
    from lloom_sidecar.admin.operations import BootstrapChange, ConfiguredValidator

COLUMNS = (
    Column("VALIDATOR", is_id=True),
    Column("STATE"),
    Column("PATH"),
    Column("RTT", is_number=True),
    Column("FAILED", is_number=True, is_minor=True),
    Column("IN FILE", is_minor=True),
    Column("ADDRESS"),
)


@click.group("bootstrap", cls=NounGroup)
def bootstrap() -> None:
    """Show and change the validators that the node trusts.

    They are in HOME/bootstrap, one multiaddr a line, unless flags, the environment or the config file name others.
    """


@bootstrap.command("list", epilog=example("lloomctl bootstrap list"))
@json_option
@pass_target
def list_validators(target: Target, as_json: bool) -> None:
    """List the configured validators and how they stand.

    STATE is joined (connected, greeted, catalogue read), connected, dialling or unreachable; FAILED counts attempts
    since it was last joined. Errors follow the table.
    """
    with target.client() as client:
        found = client.bootstrap()
    if as_json:
        output.print_json(found)
        return
    rows = [_row(one) for one in found["validators"]]
    output.print_table(COLUMNS, rows, empty="no validators: `lloomctl bootstrap add MULTIADDR`, or join a network")
    for one in found["validators"]:
        if one["last_error"]:
            output.say(f"{output.short_id(one['peer'])}: {printable(one['last_error'])}")


def _row(one: ConfiguredValidator) -> tuple[object, ...]:
    is_connected = one["path"] != "none"
    return (
        one["peer"],
        one["state"],
        one["path"] if is_connected else "-",
        output.milliseconds(one["rtt_ms"]),
        one["failures"],
        "yes" if one["in_file"] else "no",
        " ".join(one["addrs"]),
    )


@bootstrap.command("add", epilog=example("lloomctl bootstrap add /dns4/node.example.org/tcp/4001/p2p/12D3KooW..."))
@click.argument("addr", metavar="MULTIADDR")
@json_option
@pass_target
def add(target: Target, addr: str, as_json: bool) -> None:
    """Trust the validator at MULTIADDR, which ends with /p2p/<peer id>.

    Writes HOME/bootstrap and dials it at once. A validator is trusted to relay and to tell who is there, never with
    prompts; it still has to prove the network.
    """
    with target.client() as client:
        done = client.bootstrap_add(addr)
    _tell(done, "added", "known already", as_json=as_json)


@bootstrap.command(
    "rm",
    epilog=example(
        "lloomctl bootstrap rm 12D3KooW...", "lloomctl bootstrap rm /ip4/192.0.2.7/tcp/4001/p2p/12D3KooW..."
    ),
)
@click.argument("which", metavar="PEER|MULTIADDR")
@json_option
@pass_target
def remove(target: Target, which: str, as_json: bool) -> None:
    """Trust a validator no more: all its addresses, or the one MULTIADDR.

    PEER is a peer id, or the end of one that the node knows. Its connection stays until it is idle; `lloomctl peer
    disconnect` closes it.
    """
    with target.client() as client:
        done = client.bootstrap_remove(which if which.startswith("/") else find_peer(client, which))
    _tell(done, "removed", "not there", as_json=as_json)


def _tell(done: BootstrapChange, verb: str, otherwise: str, *, as_json: bool) -> None:
    if as_json:
        output.print_json(done)
        return
    has_changed = done["file_changed"] or done["node_changed"]
    for addr in done["addrs"]:
        click.echo(printable(f"{addr}/p2p/{done['peer']} {verb if has_changed else otherwise}"))
    if not done["lasts"]:
        output.say(
            "this node was started with --bootstrap, LLOOM_BOOTSTRAP or bootstrap in its config file, which goes "
            "before HOME/bootstrap: change it there too, or the next start forgets this"
        )

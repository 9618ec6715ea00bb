"""``lloomctl peer``: the peers that a node knows."""

from __future__ import annotations

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import NounGroup, Target, example, json_option, pass_target
from lloom_sidecar.cli.output import Column

COLUMNS = (
    Column("PEER", is_id=True),
    Column("ROLES"),
    Column("PATH"),
    Column("MEMBER"),
    Column("LEASE"),
    Column("LEFT", is_number=True),
    Column("RTT", is_number=True),
    Column("SOFTWARE"),
    Column("SOURCE"),
)


@click.group("peer", cls=NounGroup)
def peer() -> None:
    """Look at the peers that the node knows, and connect to one."""


@peer.command("list", epilog=example("lloomctl peer list --connected"))
@click.option("--connected", is_flag=True, help="Only peers with an open connection.")
@json_option
@pass_target
def list_peers(target: Target, connected: bool, as_json: bool) -> None:
    """List the peers that the node knows, connected ones first.

    LEASE is the state of an executor's announcement: fresh, suspect or dead. LEFT is how long it still holds.
    """
    with target.client() as client:
        peers = [one for one in client.peers() if one["connected"] or not connected]
    if as_json:
        output.print_json({"peers": peers})
        return
    rows = [
        (
            one["peer"],
            ",".join(one["roles"]),
            one["path"] if one["connected"] else "-",
            "yes" if one["member"] else "no",
            "-" if one["state"] == "none" else one["state"],
            output.duration(one["lease_left_s"]),
            "-" if one["rtt_ms"] is None else f"{one['rtt_ms']:.1f}ms",
            one["software"],
            one["source"],
        )
        for one in peers
    ]
    output.print_table(COLUMNS, rows, empty="no peers: `lloomctl status` shows whether a validator is connected")


@peer.command("connect", epilog=example("lloomctl peer connect /ip4/192.0.2.7/tcp/4001/p2p/12D3KooW..."))
@click.argument("addr", metavar="MULTIADDR")
@json_option
@pass_target
def connect(target: Target, addr: str, as_json: bool) -> None:
    """Connect the node to the peer at MULTIADDR, which ends with /p2p/<peer id>.

    A connection grants no trust: the peer proves its network in hello, as every other.
    """
    with target.client() as client:
        found = client.connect(addr)
    if as_json:
        output.print_json(found)
    else:
        kind = "a member" if found["member"] else "not a member of this network"
        click.echo(output.printable(f"{found['peer']} connected, {found['path']}, {kind}"))

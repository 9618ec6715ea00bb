"""``lloomctl peer``: the peers that a node knows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import EXIT_FAILED, NounGroup, Target, example, find_peer, json_option, pass_target
from lloom_sidecar.cli.output import Column
from lloom_sidecar.errors import LloomError

if TYPE_CHECKING:
    from lloom_sidecar.admin.client import NodeClient
    from lloom_sidecar.admin.operations import PingInfo

COLUMNS = (
    Column("PEER", is_id=True),
    Column("ROLES"),
    Column("PATH"),
    Column("MEMBER"),
    Column("LEASE"),
    Column("LEFT", is_number=True),
    Column("RTT", is_number=True),
    Column("SOFTWARE", is_minor=True),
    Column("SOURCE", is_minor=True),
)


@click.group("peer", cls=NounGroup)
def peer() -> None:
    """Look at the peers that the node knows; connect, disconnect, ping one."""


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


@peer.command("disconnect", epilog=example("lloomctl peer disconnect 12D3KooW...", "lloomctl peer disconnect 9aREpCEo"))
@click.argument("which", metavar="PEER")
@json_option
@pass_target
def disconnect(target: Target, which: str, as_json: bool) -> None:
    """Close the node's connections to PEER.

    PEER is a peer id, or the end of one that the node knows. It is not banned: either side may connect again, and a
    configured validator is dialled again at once.
    """
    with target.client() as client:
        done = client.disconnect(find_peer(client, which))
    if as_json:
        output.print_json(done)
        return
    state = "disconnected" if done["was_connected"] else "was not connected"
    click.echo(output.printable(f"{done['peer']} {state}"))
    if done["is_validator"]:
        output.say("it is a configured validator and dialled again; `lloomctl bootstrap rm PEER` ends that")


@peer.command("ping", epilog=example("lloomctl peer ping 12D3KooW...", "lloomctl peer ping 9aREpCEo -c 1 --json"))
@click.argument("which", metavar="PEER")
@click.option(
    "--count", "-c", default=4, show_default=True, type=click.IntRange(1, 10_000), help="How many round trips."
)
@click.option(
    "--interval", "-i", default=1.0, show_default=True, type=click.FloatRange(0, 3600), help="Seconds between two."
)
@json_option
@pass_target
def ping(target: Target, which: str, count: int, interval: float, as_json: bool) -> None:
    """Measure round trips to PEER; say whether they are direct or relayed.

    PEER is a peer id, or the end of one that the node knows. Each round trip is one of hello between the two sidecars,
    so it also shows that the other side is of this network; the peer is dialled when it is not connected.
    Exit status 1 when one fails. With --json an object a line.
    """
    times: list[float] = []
    sent = 0
    with target.client() as client:
        peer_id = find_peer(client, which)
        try:
            while sent < count:
                if sent:
                    time.sleep(interval)  # noqa: TID251 - no event loop here
                sent += 1
                rtt_ms = _ping_once(client, peer_id, sent, as_json=as_json)
                times += [] if rtt_ms is None else [rtt_ms]
        except KeyboardInterrupt:
            sent = max(sent, 1)
    if not as_json:
        words = f"{len(times)} of {sent} answered"
        if times:
            words += f"; min {min(times):.2f}, average {sum(times) / len(times):.2f}, max {max(times):.2f} ms"
        output.say(words)
    if len(times) < sent:
        raise SystemExit(EXIT_FAILED)


def _ping_once(client: NodeClient, peer_id: str, number: int, *, as_json: bool) -> float | None:
    try:
        found = client.ping(peer_id)
    except LloomError as exc:
        if exc.code == "node_unreachable" or exc.http_status == 400:
            raise
        if as_json:
            output.print_json_line(
                {"peer": peer_id, "number": number, "error": {"code": exc.code, "message": exc.message}}
            )
        else:
            output.fail(output.printable(exc.message))
        return None
    if as_json:
        output.print_json_line({"number": number, **found})
    else:
        click.echo(output.printable(_ping_line(found, number)))
    return found["rtt_ms"]


def _ping_line(found: PingInfo, number: int) -> str:
    member = "member" if found["member"] else "no member"
    skew = f", clock {found['clock_ahead_ms'] / 1000:+.1f} s" if abs(found["clock_ahead_ms"]) > 1000 else ""
    return f"{number}: {found['rtt_ms']:.2f} ms, {found['path']} by {found['addr']}, {member}{skew}"

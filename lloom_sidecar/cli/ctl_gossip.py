"""``lloomctl gossip``: the topics of a node and who shares them."""

from __future__ import annotations

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import NounGroup, Target, example, json_option, pass_target
from lloom_sidecar.cli.output import Column

TOPIC_COLUMNS = (Column("TOPIC"), Column("PEERS", is_number=True))
PEER_COLUMNS = (
    Column("PEER", is_id=True),
    Column("ROLES"),
    Column("PATH"),
    Column("MEMBER"),
    Column("SOFTWARE", is_minor=True),
)


@click.group("gossip", cls=NounGroup)
def gossip() -> None:
    """Look at the gossip topics of the node."""


@gossip.command("topics", epilog=example("lloomctl gossip topics"))
@json_option
@pass_target
def topics(target: Target, as_json: bool) -> None:
    """List the node's topics, and how many neighbours share each."""
    with target.client() as client:
        found = client.topics()
    if as_json:
        output.print_json({"topics": found})
        return
    rows = [(one["topic"], len(one["peers"])) for one in found]
    output.print_table(TOPIC_COLUMNS, rows, empty="no topics: `lloomctl doctor` says why")


@gossip.command(
    "peers", epilog=example("lloomctl gossip peers executors", "lloomctl gossip peers /lloom/network/1.0.0")
)
@click.argument("topic", metavar="TOPIC")
@json_option
@pass_target
def peers(target: Target, topic: str, as_json: bool) -> None:
    """List the neighbours that share TOPIC.

    TOPIC is executors, network, or a topic's whole name. Neighbours are directly connected; gossip skips relayed
    connections.
    """
    with target.client() as client:
        found = client.topic_peers(topic)
        known = {one["peer"]: one for one in client.peers()}
    if as_json:
        output.print_json(found)
        return
    rows = []
    for peer in found["peers"]:
        one = known.get(peer)
        if one is None:
            rows.append((peer, "", "", "", ""))
        else:
            member = "yes" if one["member"] else "no"
            rows.append((peer, ",".join(one["roles"]), one["path"], member, one["software"]))
    output.print_table(PEER_COLUMNS, rows, empty=f"no neighbour shares {output.printable(found['topic'])}")

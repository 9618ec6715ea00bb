"""``lloomctl executor``: the executors that a node knows; this one's prices, and draining it."""

from __future__ import annotations

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import NounGroup, Target, example, find_peer, json_option, pass_target
from lloom_sidecar.cli.output import Column
from lloom_sidecar.errors import LloomError

COLUMNS = (
    Column("EXECUTOR", is_id=True),
    Column("STATE"),
    Column("LEFT", is_number=True),
    Column("PATH"),
    Column("MEMBER"),
    Column("CIRCUIT", is_minor=True),
    Column("BUSY", is_number=True),
    Column("QUEUED", is_number=True, is_minor=True),
    Column("MODELS"),
    Column("SOFTWARE", is_minor=True),
)


@click.group("executor", cls=NounGroup)
def executor() -> None:
    """Look at executors, set this one's prices, drain and resume it."""


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


@executor.command(
    "show", epilog=example("lloomctl executor show 12D3KooW...", "lloomctl executor show 9aREpCEo --json")
)
@click.argument("which", metavar="PEER")
@json_option
@pass_target
def show_executor(target: Target, which: str, as_json: bool) -> None:
    """Show one executor and what it offers, as this node knows it.

    PEER is a peer id, or the end of one that the node knows. `lloomctl model query PEER` asks the executor itself.
    """
    from lloom_sidecar.cli.ctl_model import offer_row, offers_by

    with target.client() as client:
        peer_id = find_peer(client, which)
        found = next((one for one in client.executors() if one["peer"] == peer_id), None)
        known = next((one for one in client.peers() if one["peer"] == peer_id), None)
        offers = [
            (one["id"], offer) for one in client.models() for offer in one["executors"] if offer["peer"] == peer_id
        ]
    if found is None:
        what = "a peer, but no executor" if known is not None else "not known"
        raise LloomError(f"{output.printable(peer_id)} is {what}: `lloomctl executor list` shows the executors")
    if as_json:
        models = [{"id": model, **{k: v for k, v in offer.items() if k != "peer"}} for model, offer in offers]
        output.print_json({**found, "addrs": known["addrs"] if known else [], "models": models})
        return
    rtt_ms = known["rtt_ms"] if known else None
    output.print_facts(
        [
            ("executor", found["peer"]),
            ("software", found["software"]),
            ("member", "yes" if found["member"] else "no"),
            ("lease", f"{found['state']}, {output.duration(found['lease_left_s'])} left"),
            ("path", f"{found['path']}, {output.milliseconds(rtt_ms)}" if found["connected"] else "not connected"),
            ("circuit", found["circuit"]),
            ("trust", f"{found['trust']:.2f}"),
            ("doubts", found["doubts"]),
            ("load", f"{found['in_flight']} in flight, {found['queued']} queued"),
            ("found by", known["source"] if known else None),
            ("addresses", known["addrs"] if known else []),
        ]
    )
    click.echo()
    output.print_table(
        offers_by("MODEL"), [offer_row(model, offer) for model, offer in offers], empty="it offers no model"
    )


@executor.command(
    "price",
    epilog=example("lloomctl executor price smollm2:135m 15/60 EUR", "lloomctl executor price smollm2:135m free"),
)
@click.argument("model_id", metavar="MODEL")
@click.argument("words", metavar="PROMPT/COMPLETION CURRENCY | free", nargs=-1, required=True)
@json_option
@pass_target
def set_price(target: Target, model_id: str, words: tuple[str, ...], as_json: bool) -> None:
    """Let this executor ask another price for MODEL.

    In minor units (cents) per million prompt and completion tokens. It is announced at once and holds until the node
    ends, whose settings come back then. Requests that run and quotes that were given keep their price.
    """
    from lloom_sidecar.cli.ctl_model import price

    with target.client() as client:
        done = client.set_price(model_id, " ".join(words))
    if as_json:
        output.print_json(done)
        return
    if done["price"] == done["before"]:
        output.say(f"{output.printable(done['model'])} costs {price(done['price'])} as before")
        return
    output.say(
        f"{output.printable(done['model'])} costs {price(done['price'])} from now on, before {price(done['before'])}"
    )
    output.say(
        "until the node ends: --price-prompt, --price-completion and --price-currency set the price of every model"
    )


@executor.command("drain", epilog=example("lloomctl executor drain", "lloomctl executor drain --stay"))
@click.option("--stay", is_flag=True, help="Let the node go on, without work, until `executor resume`.")
@json_option
@pass_target
def drain(target: Target, stay: bool, as_json: bool) -> None:
    """Let the node refuse new work, finish what runs, and end.

    What still runs after the grace (the setting grace_s) is cut. With --stay the node itself goes on, for instance
    while its backend is changed.
    """
    with target.client() as client:
        if stay:
            state = client.pause_executor()
        else:
            client.drain()
    if as_json:
        output.print_json({**state, "draining": True} if stay else {"draining": True})
    elif stay:
        output.say(f"no new work is taken; still under way: {output.count(state['requests'], 'request')}")
        output.say("`lloomctl executor resume` lets it take work again")
    else:
        output.say("draining: `lloomctl status` shows the requests that still run")


@executor.command("resume", epilog=example("lloomctl executor resume"))
@json_option
@pass_target
def resume(target: Target, as_json: bool) -> None:
    """Let a node that was drained with --stay take work again."""
    with target.client() as client:
        state = client.resume_executor()
    if as_json:
        output.print_json(state)
    else:
        output.say("this executor takes work again")

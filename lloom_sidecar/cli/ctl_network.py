"""``lloomctl network``: networks are files, so these commands need no node, but for ``status``.

``cli/network_files.py`` does the work; here are words.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import NounGroup, Target, example, json_option, pass_target
from lloom_sidecar.cli.output import Column
from lloom_sidecar.errors import LloomError

if TYPE_CHECKING:
    from lloom_sidecar.ids import Multiaddr
    from lloom_sidecar.protocol.network_key import NetworkKey

VALIDATOR_COLUMNS = (
    Column("VALIDATOR", is_id=True),
    Column("SAID"),
    Column("EXECUTORS", is_number=True),
    Column("MEMBERS", is_number=True),
    Column("BUSY", is_number=True),
    Column("QUEUED", is_number=True, is_minor=True),
    Column("SOFTWARE", is_minor=True),
)
MODEL_COLUMNS = (
    Column("MODEL"),
    Column("EXECUTORS", is_number=True),
    Column("SLOTS", is_number=True),
    Column("MEDIAN PRICE"),
)
_RESTART = "a node that runs in this home takes it at its next start"


@click.group("network", cls=NounGroup)
def network() -> None:
    """Create a network, invite to it, join one, change its key, see how it is.

    A network is a key: whoever holds it, or an invite, is a member.
    """


@network.command("create", epilog=example("lloomctl network create"))
@json_option
@pass_target
def create(target: Target, as_json: bool) -> None:
    """Create a network and print its public id.

    Writes HOME/network.key, which is never overwritten.
    """
    from lloom_sidecar.cli import network_files

    home = target.home
    key = network_files.create_network(home)
    path = network_files.network_key_path(home)
    if as_json:
        output.print_json({"network": key.network_id.hex(), "file": str(path)})
        return
    click.echo(key.network_id.hex())
    output.say(f"the key is in {path}: whoever has it is a member")
    output.say("next: start a validator, then `lloomctl network invite` for the other nodes")


@network.command("show", epilog=example("lloomctl network show"))
@json_option
@pass_target
def show(target: Target, as_json: bool) -> None:
    """Show the network of the home and its validators.

    Never the key itself.
    """
    from lloom_sidecar.cli import network_files
    from lloom_sidecar.config import BOOTSTRAP_FILE_NAME, read_bootstrap_file
    from lloom_sidecar.identity import load_network_keys

    home = target.home
    path = network_files.network_key_path(home)
    keys = load_network_keys(path)
    validators = [str(addr) for addr in read_bootstrap_file(home / BOOTSTRAP_FILE_NAME)]
    is_kept = len(keys.valid(_now_ms())) > 1
    until = _instant(keys.previous_until_ms) if is_kept else None
    if as_json:
        shown = {"network": keys.current.network_id.hex(), "file": str(path)}
        output.print_json({**shown, "previous_key_until": until, "validators": validators})
        return
    facts: list[tuple[str, object]] = [("network", keys.current.network_id.hex()), ("file", str(path))]
    if until:
        facts.append(("previous key", f"accepted until {until}"))
    output.print_facts([*facts, ("validators", validators)])


@network.command(
    "invite",
    epilog=example(
        "lloomctl network invite > invite.txt",
        "lloomctl network invite --validator /dns4/node.example.org/tcp/4001/p2p/12D3KooW...",
    ),
)
@click.option(
    "--validator", "validators", multiple=True, metavar="MULTIADDR", help="A validator's address; repeatable."
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write to this new file (0600), not stdout."
)
@json_option
@pass_target
def invite(target: Target, validators: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Print an invite to the network of the home.

    It holds the key and where the validators are. Without --validator the addresses come from the running node when
    it is a validator, else from the validators that the home itself joined through. Hand the invite over as you would
    a password.
    """
    from lloom_sidecar.cli import network_files
    from lloom_sidecar.identity import load_network_keys, write_private_file
    from lloom_sidecar.protocol.network_key import Invite

    key = load_network_keys(network_files.network_key_path(target.home)).current
    addrs = _checked_validators(validators) if validators else _find_validators(target, key)
    try:
        text = Invite(addrs, key).encode()
    except ValueError as exc:
        raise LloomError(str(exc)) from exc
    if out is not None:
        try:
            if not write_private_file(out.absolute(), text.encode() + b"\n", replace=False):
                raise LloomError(f"{out} exists: name a new file")
        except OSError as exc:
            raise LloomError(f"{out} cannot be written: {(exc.strerror or type(exc).__name__).lower()}") from exc
    shown = [str(addr) for addr in addrs]
    if as_json:
        place = {"file": str(out)} if out is not None else {"invite": text}
        output.print_json({**place, "network": key.network_id.hex(), "validators": shown})
        return
    if out is None:
        click.echo(text)
    for one in shown:
        output.say(f"validator: {one}")
    output.say("whoever holds this invite is a member; they run `lloomctl network join FILE`")


@network.command(
    "join", epilog=example("lloomctl network join invite.txt", "ssh gateway cat invite.txt | lloomctl network join -")
)
@click.argument("file", type=click.Path(allow_dash=True, dir_okay=False))
@click.option("--replace", is_flag=True, help="Leave the network of this home for the invite's.")
@json_option
@pass_target
def join(target: Target, file: str, replace: bool, as_json: bool) -> None:
    """Join the network of the invite in FILE; - reads it from stdin.

    An invite is a secret, so it is never an argument: other users of the machine can see those.
    """
    from lloom_sidecar.cli import network_files
    from lloom_sidecar.protocol.network_key import Invite

    joined = network_files.join_network(target.home, Invite.decode(_read_invite(file)), replace=replace)
    added = [str(addr) for addr in joined.added]
    if as_json:
        output.print_json({"network": joined.key.network_id.hex(), "joined": joined.is_new, "validators_added": added})
        return
    click.echo(joined.key.network_id.hex())
    for one in added:
        output.say(f"validator: {one}")
    words = "joined the network" if joined.is_new else "this home was a member already"
    output.say(f"{words}; {_RESTART}")


@network.command("status", epilog=example("lloomctl network status"))
@json_option
@pass_target
def status(target: Target, as_json: bool) -> None:
    """Show what the validators say of the network.

    Each configured validator signs what it sees and tells it each half minute, or sooner. BUSY is requests under way of
    slots; MEDIAN PRICE is per million prompt and completion tokens. The models are those of the validator that sees
    most executors.
    """
    from lloom_sidecar.cli.ctl_model import price

    with target.client() as client:
        said = client.status()["network_status"]
    if as_json:
        output.print_json({"network_status": said})
        return
    rows = [
        (
            one["peer"],
            f"{output.duration(one['age_s'])} ago" + ("" if one["current"] else ", out of date"),
            one["executors"],
            one["members"],
            f"{one['in_flight']}/{one['slots']}",
            one["queued"],
            ", ".join(f"{found['nodes']} x {found['software']}" for found in one["software"]),
        )
        for one in said
    ]
    empty = "no validator has said anything yet: `lloomctl bootstrap list` shows whether one is joined"
    output.print_table(VALIDATOR_COLUMNS, rows, empty=empty)
    if not said:
        return
    widest = max(said, key=lambda one: (one["current"], one["executors"]))
    click.echo()
    output.print_table(
        MODEL_COLUMNS,
        [(one["id"], one["executors"], one["slots"], price(one["median_price"])) for one in widest["models"]],
        empty="it sees no model",
    )
    if widest["models_total"] > len(widest["models"]):
        output.say(f"and {widest['models_total'] - len(widest['models'])} more models")


@network.command("rotate", epilog=example("lloomctl network rotate --keep-old 24h"))
@click.option(
    "--keep-old",
    default="24h",
    show_default=True,
    metavar="TIME",
    help="How long the old key is accepted; 0 = no more.",
)
@json_option
@pass_target
def rotate(target: Target, keep_old: str, as_json: bool) -> None:
    """Change the network's key and print the new public id.

    Do it on one node, then hand new invites to the others, which take them with `lloomctl network join --replace`.
    Nodes that have the old key only are shut out when --keep-old has passed.
    """
    from lloom_sidecar.cli import network_files

    try:
        keep_old_s = network_files.parse_duration(keep_old)
    except ValueError as exc:
        raise click.BadParameter(str(exc), param_hint="--keep-old") from exc
    keys = network_files.rotate_network(target.home, keep_old_s=keep_old_s, now_ms=_now_ms())
    until = _instant(keys.previous_until_ms) if keys.previous is not None else None
    if as_json:
        output.print_json({"network": keys.current.network_id.hex(), "previous_key_until": until})
        return
    click.echo(keys.current.network_id.hex())
    output.say(f"the old key is accepted until {until}" if until else "the old key is accepted no more")
    output.say(f"{_RESTART}; then `lloomctl network invite` for the other nodes")


@network.command(
    "kubernetes",
    epilog=example("lloomctl network kubernetes --validators 2 --release lloom --namespace lloom | kubectl apply -f -"),
)
@click.option(
    "--validators", type=click.IntRange(1, 100), default=2, show_default=True, help="How many get an identity."
)
@click.option("--release", default="lloom", show_default=True, metavar="NAME", help="Name of the chart's release.")
@click.option("--namespace", default="default", show_default=True, metavar="NAME", help="Namespace of the release.")
@json_option
def kubernetes(validators: int, release: str, namespace: str, as_json: bool) -> None:
    """Print the Secrets of a new network in Kubernetes.

    RELEASE-network holds a new network key and where the validators are; RELEASE-validators their identities, which
    are in that list already. The chart in deploy/helm wants both. Run it once: another run is another network.
    """
    from lloom_sidecar.cli import network_files

    for option, name in (("--release", release), ("--namespace", namespace)):
        if not network_files.is_dns_label(name):
            raise click.BadParameter(
                f"{name!r} is no name in Kubernetes: lower-case letters, digits and '-', at most 40",
                param_hint=option,
            )
    output.print_json(
        network_files.kubernetes_secrets(validators, release, namespace)
    )  # what kubectl reads, either way
    if not as_json:
        output.say("whoever reads this is a member, and can be your validators: for kubectl, not for a file")


def _checked_validators(texts: tuple[str, ...]) -> tuple[Multiaddr, ...]:
    from lloom_sidecar.config import parse_bootstrap

    try:
        return tuple(dict.fromkeys(parse_bootstrap(text) for text in texts))
    except ValueError as exc:
        raise click.BadParameter(str(exc), param_hint="--validator") from exc


def _find_validators(target: Target, key: NetworkKey) -> tuple[Multiaddr, ...]:
    """The running node's own addresses when it is a validator, else what the home joined through."""
    from lloom_sidecar.admin.client import NodeUnreachableError
    from lloom_sidecar.cli import network_files
    from lloom_sidecar.config import BOOTSTRAP_FILE_NAME, read_bootstrap_file

    unreachable: NodeUnreachableError | None = None
    try:
        with target.client() as client:
            status = client.status()
    except NodeUnreachableError as exc:
        unreachable = exc
    else:
        if status["network"]["id"] not in (None, key.network_id.hex()):
            raise LloomError(
                "the running node belongs to another network than HOME/network.key: restart it, or give --validator"
            )
        addrs = network_files.reachable_addrs(status["addrs"]) if "validator" in status["roles"] else ()
        if addrs:
            return addrs
    joined = read_bootstrap_file(target.home / BOOTSTRAP_FILE_NAME)
    if joined:
        return joined
    if unreachable is not None:
        raise NodeUnreachableError(f"{unreachable.message}; or name a validator with --validator MULTIADDR")
    raise LloomError("the running node is no validator: name one with --validator MULTIADDR")


def _read_invite(file: str) -> str:
    from lloom_sidecar.protocol.network_key import MAX_INVITE_CHARACTERS

    if file.startswith("lloom-invite-"):
        raise click.UsageError(
            "an invite is a secret and no argument: give a file with it, or - and the invite on stdin"
        )
    try:
        with click.open_file(file, "r", encoding="utf-8") as stream:
            return str(stream.read(MAX_INVITE_CHARACTERS + 1))
    except UnicodeDecodeError as exc:
        raise LloomError(f"{file} is not a Lloom invite: it is not text") from exc
    except OSError as exc:
        raise LloomError(f"{file} cannot be read: {(exc.strerror or type(exc).__name__).lower()}") from exc


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _instant(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")

"""``lloomctl dht``: questions to the DHT, and records in it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import NounGroup, Target, example, find_peer, json_option, pass_target
from lloom_sidecar.cli.output import Column, printable
from lloom_sidecar.errors import LloomError

if TYPE_CHECKING:
    from lloom_sidecar.admin.operations import DhtPeer

Command = TypeVar("Command", bound=Callable[..., Any])

COLUMNS = (Column("PEER", is_id=True), Column("CONNECTED"), Column("ADDRESS"))
SERVICES: Final = {"executor": "/lloom/executor/1.0.0", "validator": "/lloom/validator/1.0.0"}
MODEL_PREFIX: Final = "/lloom/model/1.0.0/"
"""As in protocol/names.py, which a quick command does not import; a test compares them."""
MAX_FILE_BYTES: Final = 32 * 1024
_ED25519_KEY: Final = b"\x08\x01\x12\x20"


@click.group("dht", cls=NounGroup)
def dht() -> None:
    """Ask the DHT, and put records into it.

    A KEY is a service key such as /lloom/executor/1.0.0, or a CID. A provider record is only a hint: it lives 48 h and
    cannot be withdrawn, also when its node is long gone.
    """


def timeout_option(command: Command) -> Command:
    """Adds ``--timeout``, which arrives as ``timeout_s``."""
    option = click.option(
        "--timeout",
        "timeout_s",
        default=60.0,
        show_default=True,
        type=click.FloatRange(1, 600),
        help="Seconds that the DHT may take.",
    )
    return option(command)


def key_options(command: Command) -> Command:
    """Adds KEY, ``--model`` and ``--service``: one of the three."""
    command = click.option("--service", type=click.Choice(sorted(SERVICES)), help="The service key of a role.")(command)
    command = click.option("--model", metavar="MODEL", help="The service key of a model.")(command)
    return click.argument("key", metavar="[KEY]", required=False)(command)


def _key(key: str | None, model: str | None, service: str | None) -> str:
    given = [one for one in (key, model and MODEL_PREFIX + model, service and SERVICES[service]) if one]
    if len(given) != 1:
        raise click.UsageError("give one of KEY, --model MODEL and --service executor|validator")
    return given[0]


@dht.command(
    "findprovs",
    epilog=example(
        "lloomctl dht findprovs --model smollm2:135m",
        "lloomctl dht findprovs --service validator --at 9aREpCEo",
        "lloomctl dht findprovs /lloom/executor/1.0.0 --json",
    ),
)
@key_options
@click.option("--count", "-n", default=20, show_default=True, type=click.IntRange(1, 1000), help="At most so many.")
@click.option("--at", metavar="PEER", help="Ask only this peer, for the records that it holds itself.")
@timeout_option
@json_option
@pass_target
def findprovs(
    target: Target,
    key: str | None,
    model: str | None,
    service: str | None,
    count: int,
    at: str | None,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Find the peers that provide KEY, a model, or a service.

    Without --at the node's own records are among the answers, so it can't show that others know of this node; with --at
    it can.
    """
    wanted = _key(key, model, service)
    with target.client() as client:
        asked = find_peer(client, at) if at is not None else None
        found = client.find_providers(wanted, count=count, timeout_s=timeout_s, at=asked)
    if as_json:
        output.print_json(found)
        return
    if not found["complete"]:
        output.say(f"the DHT was not through after {timeout_s:g} s: there may be more")
    where = f"{output.short_id(found['asked'])} holds no record" if found["asked"] else "nobody has a record"
    _print_peers(found["providers"], f"{where} of {printable(found['key'])} ({found['cid']})")


@dht.command("provide", epilog=example("lloomctl dht provide /lloom/model/1.0.0/smollm2:135m"))
@key_options
@timeout_option
@json_option
@pass_target
def provide(
    target: Target, key: str | None, model: str | None, service: str | None, timeout_s: float, as_json: bool
) -> None:
    """Put a record that this node provides KEY, a model, or a service.

    A node does it by itself for what it offers. The record lives 48 h and cannot be withdrawn.
    """
    with target.client() as client:
        done = client.provide(_key(key, model, service), timeout_s=timeout_s)
    if as_json:
        output.print_json(done)
    else:
        click.echo(printable(f"{done['key']} provided ({done['cid']})"))


@dht.command("closest", epilog=example("lloomctl dht closest --service executor", "lloomctl dht closest 12D3KooW..."))
@key_options
@timeout_option
@json_option
@pass_target
def closest(
    target: Target, key: str | None, model: str | None, service: str | None, timeout_s: float, as_json: bool
) -> None:
    """List the peers nearest to KEY or a peer id, which hold its records.

    At most 20. The walk also refreshes the node's routing table.
    """
    with target.client() as client:
        found = client.closest(_key(key, model, service), timeout_s=timeout_s)
    if as_json:
        output.print_json(found)
    else:
        _print_peers(found["peers"], "no peer was found: `lloomctl peer list` shows who is connected")


@dht.command("findpeer", epilog=example("lloomctl dht findpeer 12D3KooW..."))
@click.argument("which", metavar="PEER")
@timeout_option
@json_option
@pass_target
def findpeer(target: Target, which: str, timeout_s: float, as_json: bool) -> None:
    """Print the addresses of PEER, an address a line.

    PEER is a peer id, or the end of one that the node knows.
    """
    with target.client() as client:
        found = client.find_peer(find_peer(client, which), timeout_s=timeout_s)
    if as_json:
        output.print_json(found)
        return
    for addr in found["addrs"]:
        click.echo(printable(f"{addr}/p2p/{found['peer']}"))
    if not found["addrs"]:
        output.say("it is known, but none of its addresses")


@dht.command(
    "get", epilog=example("lloomctl dht get /pk/12D3KooW...", "lloomctl dht get /pk/12D3KooW... --out key.bin")
)
@click.argument("key", metavar="KEY")
@click.option("--out", metavar="FILE", help="Write the value as it is to FILE; - is stdout.")
@timeout_option
@json_option
@pass_target
def get(target: Target, key: str, out: str | None, timeout_s: float, as_json: bool) -> None:
    """Print the best record under KEY: /pk/PEER (a public key) or /ipns/NAME.

    A peer id alone means its /pk record. The value is printed in hex.
    """
    with target.client() as client:
        found, value = client.get_record(key, timeout_s=timeout_s)
    if out is not None:
        _write(out, value)
        output.say(f"{printable(found)}: {output.count(len(value), 'byte')}")
        return
    _print_record(found, value, as_json=as_json)


@dht.command("put", epilog=example("lloomctl dht put --own", "lloomctl dht put /ipns/12D3KooW... record.bin"))
@click.argument("key", metavar="[KEY]", required=False)
@click.argument("file", metavar="[FILE]", required=False)
@click.option("--own", is_flag=True, help="Put the node's own public key under /pk/<its id>.")
@timeout_option
@json_option
@pass_target
def put(target: Target, key: str | None, file: str | None, own: bool, timeout_s: float, as_json: bool) -> None:
    """Put the contents of FILE (- is stdin) under KEY: /pk/PEER or /ipns/NAME.

    The DHT keeps only values that prove themselves: a public key that belongs to the peer id, or a signed IPNS record.
    """
    if own == (key is not None) or (key is None) != (file is None):
        raise click.UsageError("give KEY and FILE, or --own")
    value = b"" if file is None else _read(file)
    with target.client() as client:
        found, stored = client.put_record(key, value, timeout_s=timeout_s)
    _print_record(found, stored, as_json=as_json)


def _print_peers(peers: Sequence[DhtPeer], empty: str) -> None:
    rows = [
        (
            one["peer"],
            "this node" if one["is_self"] else "yes" if one["connected"] else "no",
            " ".join(one["addrs"]),
        )
        for one in peers
    ]
    output.print_table(COLUMNS, rows, empty=empty)


def _print_record(key: str, value: bytes, *, as_json: bool) -> None:
    if as_json:
        output.print_json({"key": key, "value": base64.b64encode(value).decode()})
        return
    kind = f"{len(value)} bytes"
    if key.startswith("/pk/") and value.startswith(_ED25519_KEY):
        kind = f"Ed25519 public key, {kind}"
    output.print_facts([("key", key), ("kind", kind), ("value", value.hex())])


def _read(file: str) -> bytes:
    try:
        with click.open_file(file, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise LloomError(f"{file} cannot be read: {(exc.strerror or type(exc).__name__).lower()}") from exc
    if len(data) > MAX_FILE_BYTES:
        raise LloomError(f"{file} is no record: it has over {MAX_FILE_BYTES} bytes")
    return bytes(data)


def _write(file: str, value: bytes) -> None:
    try:
        with click.open_file(file, "wb") as stream:
            stream.write(value)
    except OSError as exc:
        raise LloomError(f"{Path(file)} cannot be written: {(exc.strerror or type(exc).__name__).lower()}") from exc

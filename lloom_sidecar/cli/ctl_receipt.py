"""``lloomctl receipt``: what the node's exchanges left in its ledger, and receipts as files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import (
    EXIT_FAILED,
    WHOLE_ID_CHARACTERS,
    NounGroup,
    Target,
    example,
    find_peer,
    json_option,
    pass_target,
)
from lloom_sidecar.cli.output import Column
from lloom_sidecar.errors import LloomError

if TYPE_CHECKING:
    from lloom_sidecar.admin.books import ExchangeInfo
    from lloom_sidecar.protocol.receipt_file import ExportedReceipt, Verdict

REQUEST_HELP: Final = "REQUEST is the id in the answer's header x-request-id."
COLUMNS: Final = (
    Column("AT"),
    Column("ROLE"),
    Column("PEER", is_id=True),
    Column("MODEL"),
    Column("TOKENS", is_number=True),
    Column("COST", is_number=True),
    Column("OWED"),
    Column("ACK", is_minor=True),
    Column("REQUEST", is_minor=True),
)
role_option = click.option("--role", type=click.Choice(["client", "executor"]), help="What this node was in it.")


@click.group("receipt", cls=NounGroup)
def receipt() -> None:
    """List what the ledger keeps, export receipts, verify them."""


@receipt.command("list", epilog=example("lloomctl receipt list --role client --owed", "lloomctl receipt list --json"))
@role_option
@click.option("--peer", metavar="PEER", help="Only with this peer: its id, or the end of one that the node knows.")
@click.option("--model", metavar="MODEL", help="Only of this model.")
@click.option("--owed/--not-owed", "owed", default=None, help="Only what is owed, or what is not.")
@click.option("--doubtful", is_flag=True, help="Only those whose numbers cannot be.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="At most so many.")
@json_option
@pass_target
def list_receipts(
    target: Target,
    role: str | None,
    peer: str | None,
    model: str | None,
    owed: bool | None,
    doubtful: bool,
    limit: int,
    as_json: bool,
) -> None:
    """List the node's exchanges, the newest first.

    TOKENS are prompt + completion, as the executor signed them; COST is in minor units. OWED is yes, or why not; a
    partial answer owes its last checkpoint.
    """
    with target.client() as client:
        if peer is not None and len(peer) < WHOLE_ID_CHARACTERS:
            peer = find_peer(client, peer)
        found = client.exchanges(role=role, peer=peer, model=model, owed=owed, doubtful=doubtful, limit=limit)
    if as_json:
        output.print_json({"receipts": found})
        return
    rows = [
        (
            one["at"][:19].replace("T", " "),
            one["role"],
            one["peer"],
            one["model"],
            f"{one['prompt_tokens']}+{one['completion_tokens']}" if one["outcome"] else "-",
            f"{one['cost']} {one['currency']}".strip() if one["outcome"] else "-",
            _owed(one),
            "yes" if one["acknowledged"] else "no",
            one["request_id"],
        )
        for one in found
    ]
    output.print_table(COLUMNS, rows, empty="no such exchange: applications and peers have asked for nothing yet")


def _owed(one: ExchangeInfo) -> str:
    words = "yes" if one["owed"] else "no"
    notes = [note for note in (one["reason"], "partial" if one["outcome"] == "partial" else "") if note]
    notes += ["doubtful"] if one["doubts"] else []
    return f"{words} ({', '.join(notes)})" if notes else words


@receipt.command("show", epilog=example("lloomctl receipt show 5f0c6a7e..."))
@click.argument("request", metavar="REQUEST")
@json_option
@pass_target
def show(target: Target, request: str, as_json: bool) -> None:
    """Show every exchange of one request, with what was signed and what is owed.

    REQUEST is the id in the answer's header x-request-id.
    """
    with target.client() as client:
        found = client.exchanges(request=request, limit=100)
    if not found:
        raise LloomError(f"the ledger has no exchange of request {request}: `lloomctl receipt list` shows what it has")
    if as_json:
        output.print_json({"receipts": found})
        return
    for index, one in enumerate(reversed(found)):
        if index:
            click.echo()
        output.print_facts(
            [
                ("at", one["at"]),
                ("role", one["role"]),
                ("peer", one["peer"]),
                ("model", one["model"]),
                ("outcome", one["outcome"] or "nothing was signed"),
                ("tokens", f"{one['prompt_tokens']} prompt, {one['completion_tokens']} completion"),
                ("cost", f"{one['cost']} {one['currency']}".strip()),
                ("owed", _owed(one)),
                ("doubts", one["doubts"] or "none"),
                ("countersigned", "yes" if one["acknowledged"] else "no"),
                ("request digest", one["request_digest"]),
            ]
        )


@receipt.command(
    "export",
    epilog=example("lloomctl receipt export 5f0c6a7e... > receipt.json", "lloomctl receipt export 5f0c... --with-salt"),
)
@click.argument("request", metavar="REQUEST")
@role_option
@click.option("--with-salt", is_flag=True, help="Include what opens body and answer to a check, and to guesses.")
@json_option
@pass_target
def export(target: Target, request: str, role: str | None, with_salt: bool, as_json: bool) -> None:
    """Print the signed receipts of one request, for a third party. Always JSON.

    REQUEST is the id in the answer's header x-request-id. Without the salt the file shows who owes whom what, and
    nothing of prompt and answer.
    """
    with target.client() as client:
        found = client.export_receipts(request, role=role, with_salt=with_salt)
    output.print_json(found[0] if len(found) == 1 else found)


@receipt.command(
    "verify",
    epilog=example("lloomctl receipt verify receipt.json", "lloomctl receipt verify r.json --body b.json --answer a"),
)
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False, allow_dash=True))
@click.option("--body", metavar="FILE", type=click.Path(exists=True, dir_okay=False), help="The request's body.")
@click.option("--answer", metavar="FILE", type=click.Path(exists=True, dir_okay=False), help="The answer's bytes.")
@json_option
def verify(file: str, body: str | None, answer: str | None, as_json: bool) -> None:
    """Verify the exported receipts in FILE (- = standard input). Needs no node, no network and no keys.

    With the file's salt, --body and --answer are checked too: the bytes that the application sent and got. Exit status
    1 when anything is wrong.
    """
    from lloom_sidecar.protocol.receipt_file import MAX_FILE_BYTES, parse_receipts, verify_receipt

    try:
        data = sys.stdin.buffer.read(MAX_FILE_BYTES + 1) if file == "-" else _read(file, MAX_FILE_BYTES + 1)
        receipts = parse_receipts(data)
    except ValueError as exc:
        raise LloomError(f"{file} holds no receipts: {exc}") from exc
    texts = {name: None if path is None else _read(path) for name, path in (("body", body), ("answer", answer))}
    verdicts = [verify_receipt(one, **texts) for one in receipts]
    if as_json:
        output.print_json({"receipts": [_as_json(*pair) for pair in zip(receipts, verdicts, strict=True)]})
    else:
        for index, verdict in enumerate(verdicts):
            if index:
                click.echo()
            _print(verdict)
    if not all(verdict.holds for verdict in verdicts):
        raise SystemExit(EXIT_FAILED)


def _read(path: str, most: int = -1) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(most)
    except OSError as exc:
        raise LloomError(f"{path} cannot be read: {(exc.strerror or type(exc).__name__).lower()}") from exc


def _print(verdict: Verdict) -> None:
    for check in verdict.checks:
        word, colour = {True: ("ok", "green"), False: ("WRONG", "red"), None: ("-", "blue")}[check.holds]
        click.echo(f"{output.style(word.ljust(5), colour)}  {check.name.ljust(14)}  {check.text}".rstrip())
    facts = _facts(verdict)
    if facts:
        output.print_facts([(name.replace("_", " "), value) for name, value in facts.items()])
    click.echo("every check holds" if verdict.holds else "this receipt does not hold")


def _facts(verdict: Verdict) -> dict[str, Any]:
    """What the receipt states; empty when its signature says nothing."""
    from lloom_sidecar.ids import PeerId

    claims, request = verdict.claims, verdict.request
    if claims is None or request is None:
        return {}

    def peer(raw: bytes) -> str:
        try:
            return str(PeerId(raw))
        except ValueError:
            return raw.hex()

    return {
        "client": peer(claims.client),
        "executor": peer(claims.executor),
        "request_id": request.request_id.hex(),
        "model": claims.model,
        "prompt_tokens": claims.usage.prompt_tokens,
        "completion_tokens": claims.usage.completion_tokens,
        "cost": claims.cost,
        "currency": claims.price.currency,
        "answer_bytes": claims.answer_bytes,
        "accepted_at_ms": claims.accepted_at_ms,
        "ended_at_ms": claims.ended_at_ms,
    }


def _as_json(exported: ExportedReceipt, verdict: Verdict) -> dict[str, Any]:
    return {
        "holds": verdict.holds,
        "kind": "receipt" if exported.receipt else "checkpoint",
        "checks": [{"name": one.name, "holds": one.holds, "text": one.text} for one in verdict.checks],
        "states": _facts(verdict),
    }

"""``lloomctl request``: the last requests of the node's applications."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import NounGroup, Target, example, json_option, pass_target
from lloom_sidecar.cli.output import Column
from lloom_sidecar.errors import LloomError

if TYPE_CHECKING:
    from lloom_sidecar.admin.explaining import RequestInfo

COLUMNS = (
    Column("REQUEST"),
    Column("STARTED", is_minor=True),
    Column("MODEL"),
    Column("CODE"),
    Column("TOOK", is_number=True),
    Column("FIRST", is_number=True),
    Column("ASKED", is_number=True),
    Column("EXECUTOR", is_id=True),
)
ATTEMPTS = (
    Column("ATTEMPT AT", is_id=True),
    Column("STAGE"),
    Column("REASON"),
    Column("TOOK", is_number=True),
    Column("MESSAGE", is_minor=True),
)


@click.group("request", cls=NounGroup)
def request() -> None:
    """Look at the last requests of the node's applications."""


@request.command("list", epilog=example("lloomctl request list", "lloomctl request list -n 5 --json"))
@click.option("-n", "--count", type=click.IntRange(1, 500), default=20, show_default=True, help="How many at most.")
@json_option
@pass_target
def list_requests(target: Target, count: int, as_json: bool) -> None:
    """List the last requests, newest first. The node keeps 500, and none over a restart.

    CODE is ok, cancelled, or the error's code; ASKED how many executors were asked; FIRST the time until the answer
    began.
    """
    with target.client() as client:
        found = client.requests()[:count]
    if as_json:
        output.print_json({"requests": found})
        return
    rows = [
        (
            one["id"],
            _started(one),
            one["model"],
            one["code"],
            output.milliseconds(one["ms"], 0),
            output.milliseconds(one["first_ms"], 0),
            one["asked"],
            one["executor"],
        )
        for one in found
    ]
    output.print_table(COLUMNS, rows, empty="no request has ended since the node started")


@request.command("show", epilog=example("lloomctl request show 4f6b0c3e9a5d42d1b7a8c9d0e1f20304"))
@click.argument("request_id", metavar="REQUEST_ID")
@json_option
@pass_target
def show_request(target: Target, request_id: str, as_json: bool) -> None:
    """Show one request: how it ended, and who was asked. `lloomctl explain REQUEST_ID` shows the choices too.

    REQUEST_ID is the header x-request-id of the answer.
    """
    with target.client() as client:
        found = next((one for one in client.requests() if one["id"] == request_id.lower()), None)
    if found is None:
        raise LloomError(
            f"no request {output.printable(request_id)} is remembered: `lloomctl request list` shows those that are"
        )
    if as_json:
        output.print_json(found)
        return
    output.print_facts(request_facts(found))
    print_attempts(found)


def request_facts(found: RequestInfo) -> list[tuple[str, object]]:
    """Name and value of what there is to say of a request."""
    how = [
        *(["hedged"] if found["hedged"] else []),
        *([f"raced among {found['raced']}"] if found["raced"] else []),
    ]
    return [
        ("request", found["id"]),
        ("started", _started(found)),
        ("model", found["model"]),
        ("code", found["code"]),
        ("took", output.milliseconds(found["ms"])),
        ("first token", output.milliseconds(found["first_ms"])),
        ("policy", ", ".join([found["policy"] or "-", *how])),
        ("asked", output.count(found["asked"], "executor")),
        ("executor", found["executor"]),
    ]


def print_attempts(found: RequestInfo) -> None:
    """A table of those that did not give the answer, if there were any."""
    if not found["attempts"]:
        return
    click.echo()
    rows = [
        (one["executor"], one["stage"], one["reason"], output.milliseconds(one["ms"]), one["message"])
        for one in found["attempts"]
    ]
    output.print_table(ATTEMPTS, rows, empty="")


def _started(found: RequestInfo) -> str:
    at = datetime.datetime.fromtimestamp(found["started_at_ms"] / 1000, datetime.UTC)
    return at.strftime("%Y-%m-%d %H:%M:%S UTC")

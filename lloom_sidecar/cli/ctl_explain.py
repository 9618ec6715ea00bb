"""``lloomctl explain``: why a request went where it went, or where one would go now."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import Target, example, json_option, pass_target
from lloom_sidecar.cli.ctl_model import price
from lloom_sidecar.cli.ctl_request import print_attempts, request_facts
from lloom_sidecar.cli.output import Column

if TYPE_CHECKING:
    from lloom_sidecar.admin.explaining import ChoiceInfo, ModelExplanation, RequestInfo

CANDIDATES = (
    Column("EXECUTOR", is_id=True),
    Column("USE"),
    Column("SCORE", is_number=True),
    Column("FIRST", is_number=True),
    Column("BUSY", is_number=True),
    Column("WAIT", is_number=True, is_minor=True),
    Column("LEASE", is_minor=True),
    Column("PATH", is_minor=True),
    Column("CONTEXT", is_number=True, is_minor=True),
    Column("PRICE"),
)


@click.command(
    "explain",
    epilog=example("lloomctl explain smollm2:135m", "lloomctl explain 4f6b0c3e9a5d42d1b7a8c9d0e1f20304 --json"),
)
@click.argument("what", metavar="MODEL|REQUEST_ID")
@click.option("--policy", metavar="NAME", help="For a model: as if the request asked for this policy.")
@json_option
@pass_target
def explain(target: Target, what: str, policy: str | None, as_json: bool) -> None:
    """Say why a request went where it went, or where one would go now.

    REQUEST_ID is the header x-request-id of an answer; the node keeps the last 500. USE says whether the executor was
    picked, could have been (yes), or why not. SCORE is FIRST, the expected time to the first token, times the
    requests under way, shared among its slots: the lower wins.
    """
    with target.client() as client:
        found = client.explain(what, policy=policy)
    if as_json:
        output.print_json(found)
    elif found["request"] is not None:
        _print_request(found["request"])
    elif found["model"] is not None:
        _print_model(found["model"])


def _print_request(request: RequestInfo) -> None:
    output.print_facts(request_facts(request))
    print_attempts(request)
    for number, choice in enumerate(request["choices"], 1):
        click.echo()
        _print_choice(f"choice {number}", choice)


def _print_model(model: ModelExplanation) -> None:
    output.print_facts(
        [
            ("model", model["model"]),
            ("policy", model["policy"]),
            (
                "first tokens",
                f"95 % within {output.milliseconds(model['p95_first_ms'])}" if model["p95_first_ms"] else None,
            ),
            ("first byte", f"awaited for {output.milliseconds(model['budget_ms'], 0)} while there are others"),
            ("hedge", model["hedge"]),
            *([("error", model["error"])] if model["error"] else []),
        ]
    )
    click.echo()
    _print_choice("now", model["choice"])


def _print_choice(title: str, choice: ChoiceInfo) -> None:
    seen = len(choice["candidates"])
    rest = "" if choice["complete"] else ", not all looked at"
    click.echo(f"{title}: by {choice['rule']}, {output.count(seen, 'candidate')}{rest}")
    rows = [
        (
            one["peer"],
            "picked" if one["peer"] in choice["picks"] else one["filtered"] or ("due" if one["due"] else "yes"),
            output.milliseconds(one["score_ms"]) if one["estimate_ms"] else None,
            output.milliseconds(one["estimate_ms"]) if one["estimate_ms"] else None,
            f"{one['in_flight']}/{one['slots']}",
            f"{one['wait_s']:.1f}s" if one["wait_s"] else None,
            one["state"],
            one["path"],
            one["context_length"] or None,
            price(one["price"]),
        )
        for one in choice["candidates"]
    ]
    output.print_table(CANDIDATES, rows, empty="nobody offers it")

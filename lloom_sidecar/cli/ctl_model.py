"""``lloomctl model``: the models that are offered to a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import NounGroup, Target, example, json_option, pass_target
from lloom_sidecar.cli.output import Column

if TYPE_CHECKING:
    from lloom_sidecar.admin.view import PriceInfo

COLUMNS = (
    Column("MODEL"),
    Column("EXECUTOR", is_id=True),
    Column("STATE"),
    Column("CONTEXT", is_number=True),
    Column("BUSY", is_number=True),
    Column("QUEUED", is_number=True),
    Column("TTFT", is_number=True),
    Column("TOKENS/S", is_number=True),
    Column("PRICE"),
    Column("FEATURES"),
)


@click.group("model", cls=NounGroup)
def model() -> None:
    """Look at the models that are offered to the node."""


@model.command("list", epilog=example("lloomctl model list", "lloomctl model list smollm2:135m --json"))
@click.argument("model_id", metavar="[MODEL]", required=False)
@json_option
@pass_target
def list_models(target: Target, model_id: str | None, as_json: bool) -> None:
    """List the models, a line for each executor that offers one.

    BUSY is requests under way of slots. PRICE is per million prompt and completion tokens, in minor units (cents).
    """
    with target.client() as client:
        models = [one for one in client.models() if model_id in (None, one["id"])]
    if as_json:
        output.print_json({"models": models})
        return
    rows = [
        (
            one["id"],
            offer["peer"],
            offer["state"],
            offer["context_length"] or None,
            f"{offer['in_flight']}/{offer['slots']}",
            offer["queued"],
            "-" if offer["ttft_ms"] is None else f"{offer['ttft_ms']:.0f}ms",
            output.number(offer["tokens_per_s"], 1),
            _price(offer["price"]),
            ",".join(offer["features"]),
        )
        for one in models
        for offer in one["executors"]
    ]
    empty = "no models are offered: `lloomctl executor list` shows the executors that are known"
    if model_id is not None:
        empty = f"no executor offers {output.printable(model_id)}: `lloomctl model list` shows what is offered"
    output.print_table(COLUMNS, rows, empty=empty)


def _price(price: PriceInfo) -> str:
    if price["prompt_per_million"] == 0 and price["completion_per_million"] == 0:
        return "free"
    return f"{price['prompt_per_million']}/{price['completion_per_million']} {price['currency']}"

"""``lloomctl model``: the models that are offered to a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import NounGroup, Target, example, find_peer, json_option, pass_target
from lloom_sidecar.cli.output import Column
from lloom_sidecar.errors import LloomError

if TYPE_CHECKING:
    from lloom_sidecar.admin.view import OfferInfo, PriceInfo

_OFFER_COLUMNS = (
    Column("STATE"),
    Column("CONTEXT", is_number=True),
    Column("BUSY", is_number=True),
    Column("QUEUED", is_number=True, is_minor=True),
    Column("TTFT", is_number=True),
    Column("TOKENS/S", is_number=True, is_minor=True),
    Column("PRICE"),
    Column("FEATURES", is_minor=True),
)
_FREE = {"prompt_per_million": 0, "completion_per_million": 0, "currency": ""}
COLUMNS = (Column("MODEL"), Column("EXECUTOR", is_id=True), *_OFFER_COLUMNS)


def offers_by(title: str, *, is_id: bool = False) -> tuple[Column, ...]:
    """Columns of offers of which only one thing differs: their model, or their executor."""
    return (Column(title, is_id=is_id), *_OFFER_COLUMNS)


def offer_row(name: str, offer: OfferInfo) -> tuple[object, ...]:
    """A row of ``offers_by``."""
    return (
        name,
        offer["state"],
        offer["context_length"] or None,
        f"{offer['in_flight']}/{offer['slots']}",
        offer["queued"],
        output.milliseconds(offer["ttft_ms"], 0),
        output.number(offer["tokens_per_s"], 1),
        price(offer["price"]),
        ",".join(offer["features"]),
    )


@click.group("model", cls=NounGroup)
def model() -> None:
    """Look at the models that are offered, and ask executors about them."""


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
    rows = [(one["id"], offer["peer"], *offer_row("", offer)[1:]) for one in models for offer in one["executors"]]
    empty = "no models are offered: `lloomctl executor list` shows the executors that are known"
    if model_id is not None:
        empty = f"no executor offers {output.printable(model_id)}: `lloomctl model list` shows what is offered"
    output.print_table(COLUMNS, rows, empty=empty)


@model.command("show", epilog=example("lloomctl model show smollm2:135m", "lloomctl model show smollm2:135m --json"))
@click.argument("model_id", metavar="MODEL")
@json_option
@pass_target
def show_model(target: Target, model_id: str, as_json: bool) -> None:
    """Show one model: who offers it, with what context, price and load."""
    with target.client() as client:
        models = client.models()
    found = next((one for one in models if one["id"] == model_id), None)
    if found is None:
        import difflib

        near = difflib.get_close_matches(model_id, [one["id"] for one in models], 1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ": `lloomctl model list` shows what is offered"
        raise LloomError(f"no executor offers {model_id}{hint}")
    if as_json:
        output.print_json(found)
        return
    offers = found["executors"]
    contexts = sorted({one["context_length"] for one in offers if one["context_length"]})
    output.print_facts(
        [
            ("model", found["id"]),
            ("family", found["family"]),
            ("executors", f"{len(offers)}, {sum(one['state'] == 'fresh' for one in offers)} fresh"),
            ("slots", f"{sum(one['in_flight'] for one in offers)} of {sum(one['slots'] for one in offers)} busy"),
            (
                "context",
                " to ".join(dict.fromkeys(map(str, (*contexts[:1], *contexts[-1:])))) + " tokens" if contexts else None,
            ),
            ("prices", list(dict.fromkeys(price(one["price"]) for one in offers))),
        ]
    )
    click.echo()
    columns = offers_by("EXECUTOR", is_id=True)
    output.print_table(columns, [offer_row(one["peer"], one) for one in offers], empty="nobody offers it now")


@model.command("query", epilog=example("lloomctl model query 12D3KooW...", "lloomctl model query 9aREpCEo --json"))
@click.argument("which", metavar="PEER")
@json_option
@pass_target
def query(target: Target, which: str, as_json: bool) -> None:
    """Ask the executor PEER itself what it offers now.

    PEER is a peer id, or the end of one that the node knows. The answer is signed by the executor; `model list` shows
    what it announced.
    """
    with target.client() as client:
        found = client.query_models(find_peer(client, which))
    if as_json:
        output.print_json(found)
        return
    columns = (Column("MODEL"), Column("FIELD"), Column("VALUE"))
    rows = []
    for one in found["models"]:
        facts = {**one, **(one["lloom"] if isinstance(one.get("lloom"), dict) else {})}
        shown = [
            (key, value)
            for key, value in facts.items()
            if key not in ("id", "object", "lloom") and value not in (None, "", [])
        ]
        rows += [(one.get("id") if index == 0 else " ", key, _value(value)) for index, (key, value) in enumerate(shown)]
    rows += [
        (" " if index else "(load)", key, _value(value)) for index, (key, value) in enumerate(found["load"].items())
    ]
    output.print_table(columns, rows, empty="it offers no model")


@model.command("quote", epilog=example("lloomctl model quote 12D3KooW... smollm2:135m"))
@click.argument("which", metavar="PEER")
@click.argument("model_id", metavar="MODEL")
@json_option
@pass_target
def quote(target: Target, which: str, model_id: str, as_json: bool) -> None:
    """Ask the executor PEER for a signed price of MODEL.

    PEER is a peer id, or the end of one that the node knows. The node's own requests to that executor use the price
    while it holds.
    """
    with target.client() as client:
        found = client.ask_quote(find_peer(client, which), model_id)
    if as_json:
        output.print_json(found)
        return
    output.print_facts(
        [
            ("executor", found["peer"]),
            ("model", found["model"]),
            ("price", price(found["price"])),
            ("holds", output.duration(found["valid_s"])),
            ("quote", found["quote_id"]),
        ]
    )


@model.command(
    "pull", epilog=example("lloomctl model pull", "LLOOM_CACHE=/srv/models lloomctl model pull builtin --json")
)
@click.argument("name", default="builtin")
@json_option
def pull(name: str, as_json: bool) -> None:
    """Fetch the built-in model ahead of the first `--model builtin`, and check it.

    Needs no node. What is there already and sound is left as it is. For another model use your LLM server's own
    command, or name its GGUF file with `lloom-sidecar run --role executor --model FILE.gguf`.
    """
    import logging
    import sys

    import structlog
    import trio

    from lloom_sidecar.executor.model_fetch import BUILTIN_MODEL, ensure_builtin_model, terminal_progress

    if name not in ("builtin", BUILTIN_MODEL.alias):
        raise click.BadParameter(
            f"only builtin ({BUILTIN_MODEL.alias}) comes this way; for {output.printable(name)} use your LLM server's "
            "own command, or name its file: `lloom-sidecar run --role executor --model FILE.gguf`",
            param_hint="NAME",
        )
    # By itself structlog writes to stdout, where only the data belongs.
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    with terminal_progress() as progress:
        path = trio.run(lambda: ensure_builtin_model(progress=progress))
    if as_json:
        output.print_json(
            {
                "model": BUILTIN_MODEL.alias,
                "path": str(path),
                "bytes": path.stat().st_size,
                "sha256": BUILTIN_MODEL.sha256,
            }
        )
    else:
        click.echo(str(path))


def _value(value: object) -> str:
    if isinstance(value, dict) and {"prompt_per_million", "completion_per_million"} <= set(value):
        return price({**_FREE, **value})  # type: ignore[typeddict-item]
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "yes" if value is True else "no" if value is False else str(value)


def price(value: PriceInfo) -> str:
    """Prompt and completion price per million tokens, in minor units."""
    if value["prompt_per_million"] == 0 and value["completion_per_million"] == 0:
        return "free"
    return f"{value['prompt_per_million']}/{value['completion_per_million']} {value['currency']}"

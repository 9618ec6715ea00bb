"""``lloomctl usage``: what the ledger's exchanges come to."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

import click

from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import Target, example, json_option, pass_target
from lloom_sidecar.cli.output import Column

MAX_DAYS: Final = 36_500


def _instant_ms(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Unix milliseconds of ``2026-11-25`` (its beginning, UTC) or of ``30d`` ago."""
    if value is None:
        return None
    ago = re.fullmatch(r"(\d{1,5})d", value)
    if ago is not None and int(ago[1]) <= MAX_DAYS:
        return int((datetime.now(UTC) - timedelta(days=int(ago[1]))).timestamp() * 1000)
    try:
        return int(datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=UTC).timestamp() * 1000)
    except ValueError as exc:
        raise click.BadParameter(f"{value!r} is neither a day such as 2026-11-25 nor so many days ago, 30d") from exc


@click.command("usage", epilog=example("lloomctl usage --by model --since 30d", "lloomctl usage --by day --json"))
@click.option("--by", type=click.Choice(["model", "peer", "day"]), default="model", show_default=True)
@click.option("--role", type=click.Choice(["client", "executor"]), help="What this node was: asked, or answered.")
@click.option("--since", "since_ms", metavar="DAY", callback=_instant_ms, help="From this day on (UTC), or 30d = ago.")
@click.option("--until", "until_ms", metavar="DAY", callback=_instant_ms, help="Before this day (UTC).")
@json_option
@pass_target
def usage(target: Target, by: str, role: str | None, since_ms: int | None, until_ms: int | None, as_json: bool) -> None:
    """Sum up what is owed and earned, by model, peer or day (UTC).

    As client a node owes, as executor it earns. Tokens and cost are those of what is owed, as the executors signed
    them; cost is in minor units.
    """
    with target.client() as client:
        rows = client.usage(by, role=role, since_ms=since_ms, until_ms=until_ms)
    if as_json:
        output.print_json({"by": by, "usage": rows})
        return
    columns = (
        Column("ROLE"),
        Column(by.upper(), is_id=by == "peer"),
        Column("EXCHANGES", is_number=True),
        Column("OWED", is_number=True),
        Column("PROMPT", is_number=True),
        Column("COMPLETION", is_number=True),
        Column("COST", is_number=True),
    )
    output.print_table(
        columns,
        [
            (
                row["role"],
                row["key"],
                row["exchanges"],
                row["owed"],
                row["prompt_tokens"],
                row["completion_tokens"],
                f"{row['cost']} {row['currency']}".strip(),
            )
            for row in rows
        ],
        empty="nothing in the ledger for that",
    )

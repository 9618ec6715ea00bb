"""How the commands print: data on stdout, words on stderr, colours on a terminal only, ``--json`` for programs.

Text that other nodes sent goes through ``printable``: a model's name must not move the cursor of a terminal.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import click

SEVERITY_COLOURS: Final = {"error": "red", "warning": "yellow", "info": "cyan"}


class Column(NamedTuple):
    """A column of a table."""

    title: str
    is_number: bool = False
    """Aligned right."""
    is_id: bool = False
    """Never folded: a peer id that is cut in two cannot be copied."""


def printable(text: object) -> str:
    """``text`` with everything that is not printable shown as an escape."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in str(text))


def print_json(value: Any) -> None:
    """A JSON document on stdout, ASCII only."""
    click.echo(json.dumps(value, indent=2))


def print_json_line(value: Any) -> None:
    """A JSON document in one line, sent at once: for streams."""
    click.echo(json.dumps(value, separators=(",", ":")))


def say(text: str) -> None:
    """Words for a person, on stderr."""
    click.echo(text, err=True)


def fail(text: str) -> None:
    """An error, on stderr."""
    click.echo(f"{style('error:', 'red', err=True)} {text}", err=True)


def style(text: str, colour: str, *, err: bool = False) -> str:
    """``text`` in a colour when the stream is a terminal and NO_COLOR is unset."""
    return click.style(text, fg=colour, bold=True) if wants_colour(err=err) else text


def wants_colour(*, err: bool = False) -> bool:
    """True when colours suit the stream. Source: https://no-color.org"""
    stream = sys.stderr if err else sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """A table on stdout; without rows the sentence ``empty`` on stderr and nothing on stdout.

    On a terminal it is fitted to the width; elsewhere nothing is ever cut, and two spaces or more divide the columns.
    """
    if not rows:
        say(empty)
        return
    cells = [[printable("-" if one is None or one == "" else one) for one in row] for row in rows]
    if sys.stdout.isatty():
        _print_rich(columns, cells)
        return
    table = [[column.title for column in columns], *cells]
    widths = [max(len(row[i]) for row in table) for i in range(len(columns))]
    for row in table:
        parts = [
            text.rjust(width) if column.is_number else text.ljust(width)
            for text, width, column in zip(row, widths, columns, strict=True)
        ]
        click.echo("  ".join(parts).rstrip())


def _print_rich(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.is_number else "left",
            no_wrap=column.is_id or column.is_number,
            overflow="ignore" if column.is_id else "fold",
        )
    for row in cells:
        table.add_row(*(Text(one) for one in row))
    Console(highlight=False, markup=False, soft_wrap=False).print(table)


def print_facts(facts: Sequence[tuple[str, object]]) -> None:
    """Name and value, a line each, on stdout; a sequence takes a line for each of its items."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        values = [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)
        for index, one in enumerate(values or ["-"]):
            label = name if index == 0 else ""
            text = printable("-" if one is None or one == "" else one)
            click.echo(f"{label.ljust(width)}  {text}")


def duration(seconds: float | None) -> str:
    """``12s``, ``3m 20s``, ``5h 2m``, ``4d 3h``; ``-`` for None."""
    if seconds is None:
        return "-"
    whole = max(0, int(seconds))
    for size, name, smaller_size, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller_size
            return f"{whole // size}{name}" + (f" {rest}{smaller}" if rest else "")
    return f"{whole}s"


def number(value: float | None, digits: int = 0) -> str:
    """A rounded number, ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def count(many: int, one: str, plural: str | None = None) -> str:
    """``1 peer``, ``2 peers``."""
    return f"{many} {one if many == 1 else plural or one + 's'}"

"""How the commands print: data on stdout, words on stderr, colours on a terminal only, ``--json`` for programs.

Text that other nodes sent goes through ``printable``: a model's name must not move the cursor of a terminal.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import click

SEVERITY_COLOURS: Final = {"error": "red", "warning": "yellow", "info": "cyan", "ok": "green", "skipped": "blue"}
SHORT_MARK: Final = "…"
"""Before the end of a peer id that a narrow terminal has no room for; commands take it as it is."""
SHORT_CHARACTERS: Final = 8


class Column(NamedTuple):
    """A column of a table."""

    title: str
    is_number: bool = False
    """Aligned right."""
    is_id: bool = False
    """A peer id. Never folded: one that is cut in two cannot be copied. Where the terminal has no room for whole ones,
    their ends are shown, which every command takes."""
    is_minor: bool = False
    """Left out where the terminal has no room for it."""


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


def terminal_width() -> int:
    """Characters in a line of the terminal; elsewhere so many that nothing is folded."""
    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() else 100_000


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """A table on stdout; without rows the sentence ``empty`` on stderr and nothing on stdout.

    On a terminal it is fitted to the width, and says what it left out; elsewhere nothing is ever cut, and two spaces or
    more divide the columns.
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

    console = Console(highlight=False, markup=False, soft_wrap=False)
    columns, cells, dropped = _fit(columns, cells, console.width)
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
    console.print(table)
    if dropped:
        say(f"(no room for {', '.join(reversed(dropped))})")


def _fit(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int
) -> tuple[list[Column], list[list[str]], list[str]]:
    """(columns, cells, titles of what was left out) for this width: short ids first, then fewer columns."""
    kept = [list(row) for row in cells]
    left = list(columns)
    dropped: list[str] = []
    if _natural_width(left, kept) > width:
        kept = [[short_id(one) if c.is_id else one for one, c in zip(row, left, strict=True)] for row in kept]
    while _natural_width(left, kept) > width and any(column.is_minor for column in left):
        index = max(i for i, column in enumerate(left) if column.is_minor)
        dropped.append(left.pop(index).title)
        for row in kept:
            del row[index]
    return left, kept, dropped


def _natural_width(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> int:
    widths = (max(len(column.title), *(len(row[i]) for row in cells)) for i, column in enumerate(columns))
    return sum(widths) + 2 * (len(columns) - 1)


def short_id(peer: str) -> str:
    """The end of a peer id; anything short stays as it is."""
    return peer if len(peer) <= SHORT_CHARACTERS + 4 else SHORT_MARK + peer[-SHORT_CHARACTERS:]


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


def milliseconds(value: float | None, digits: int = 1) -> str:
    """``12.3ms``, ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}f}ms"


def count(many: int, one: str, plural: str | None = None) -> str:
    """``1 peer``, ``2 peers``."""
    return f"{many} {one if many == 1 else plural or one + 's'}"

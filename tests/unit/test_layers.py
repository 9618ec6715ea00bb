"""Imports run downwards only, and rooms beside each other never import each other: the map of the code, enforced."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lloom_sidecar

PACKAGE = Path(lloom_sidecar.__file__).parent

BASE = {"errors", "ids"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "ids": set(),
    "protocol": BASE,
    "tracing": set(),
    "identity": BASE | {"protocol"},
    "config": BASE | {"protocol", "identity"},
    "peers": BASE | {"protocol"},
    "p2p": BASE | {"protocol"},
    "http": {"errors"},
    "ledger": BASE | {"protocol"},
    "admin": BASE,
    "page": BASE | {"admin"},
    "link": BASE | {"protocol", "p2p"},
    "network": BASE | {"protocol", "p2p", "peers"},
    "client": BASE | {"protocol", "peers", "link", "http", "tracing"},
    "validator": BASE | {"protocol", "peers"},
    "executor": BASE | {"protocol", "peers", "p2p", "http", "tracing"},
}
"""Room -> the rooms that it may import. A room that is not a key may import all of them."""
TOP = {"node", "cli"}
SANS_IO = {"protocol": {"trio", "time", "random", "os", "socket", "logging", "structlog"}}
PURE = {"peers": {"trio", "time", "os", "socket", "logging", "structlog"}}
"""Room -> modules that would make it do IO or read a clock."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """(absolute module, line) of every import, also those inside functions."""
    package = ("lloom_sidecar", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*parts, *(node.module.split(".") if node.module else ())))
            yield base, node.lineno
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "pb")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    room = room_of(path)
    forbidden_modules = SANS_IO.get(room, set()) | PURE.get(room, set())
    faults = []
    for module, line in imports_of(path):
        parts = module.split(".")
        if parts[0] in forbidden_modules:
            faults.append(f"line {line}: {room}/ does no IO and reads no clock, but imports {parts[0]}")
        if parts[0] != "lloom_sidecar" or len(parts) == 1 or room == "__init__":
            continue
        target = parts[1]
        if target == room or not ((PACKAGE / target).exists() or (PACKAGE / f"{target}.py").exists()):
            continue
        allowed = MAY_IMPORT.get(room)
        if room == "node" and target == "cli":
            faults.append(f"line {line}: node/ may not import cli/")
        elif allowed is not None and target not in allowed:
            faults.append(f"line {line}: {room}/ may not import {target}/")
    assert not faults, f"{path.relative_to(PACKAGE)}: " + "; ".join(dict.fromkeys(faults))


def test_every_room_is_on_the_map() -> None:
    rooms = {room_of(path) for path in SOURCES} - {"__init__", "_bin"}
    assert rooms == set(MAY_IMPORT) | TOP

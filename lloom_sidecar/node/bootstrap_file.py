"""Changes to HOME/bootstrap, the list of validators that a node trusts. Comments and order stay as they are. Blocks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lloom_sidecar.config import parse_bootstrap, read_bootstrap_file
from lloom_sidecar.errors import LloomError
from lloom_sidecar.identity import write_private_file
from lloom_sidecar.ids import Multiaddr


def add_line(path: Path, addr: Multiaddr) -> bool:
    """Append ``addr``; False when the file names it already. Raises ConfigError when it has bad lines, LloomError."""
    if addr in read_bootstrap_file(path):
        return False
    text = _read(path)
    if text and not text.endswith("\n"):
        text += "\n"
    _write(path, f"{text}{addr}\n")
    return True


def remove_lines(path: Path, addrs: Collection[Multiaddr]) -> bool:
    """Drop the lines of ``addrs``; False when there were none. Raises ConfigError when it has bad lines, LloomError."""
    if not set(addrs) & set(read_bootstrap_file(path)):
        return False
    kept = [line for line in _read(path).splitlines(keepends=True) if _addr_of(line) not in addrs]
    _write(path, "".join(kept))
    return True


def _addr_of(line: str) -> Multiaddr | None:
    stripped = line.partition("#")[0].strip()
    return parse_bootstrap(stripped) if stripped else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except OSError as exc:
        raise LloomError(f"{path} cannot be read: {(exc.strerror or type(exc).__name__).lower()}") from exc


def _write(path: Path, text: str) -> None:
    try:
        write_private_file(path, text.encode(), replace=True)
    except OSError as exc:
        raise LloomError(f"{path} cannot be written: {(exc.strerror or type(exc).__name__).lower()}") from exc

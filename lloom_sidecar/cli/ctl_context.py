"""What every command of lloomctl shares: which node is meant, the ``--json`` option, how errors end the process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from lloom_sidecar.cli import output
from lloom_sidecar.errors import ConfigError, LloomError

if TYPE_CHECKING:
    from lloom_sidecar.admin.client import NodeClient

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNREACHABLE: Final = 3
WHOLE_ID_CHARACTERS: Final = 40
"""A text of so many characters is taken for a whole peer id: they have 46 (hashed keys) or 52 (Ed25519)."""
MIN_ENDING_CHARACTERS: Final = 4

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Target:
    """The node that a command is about."""

    home_option: str | None
    """``--home`` or LLOOM_HOME; None = the default."""
    node: str | None
    """``--node`` or LLOOM_NODE; None = the node that runs in the home."""
    token_file: str | None = None
    """``--token-file`` or LLOOM_TOKEN_FILE: for a node named by a URL."""

    @property
    def home(self) -> Path:
        """The home, whether or not it exists."""
        from lloom_sidecar.identity import resolve_home

        return resolve_home(self.home_option, {})

    def client(self) -> NodeClient:
        """A client of the node's admin API. Nothing is sent yet."""
        from lloom_sidecar.admin.client import NodeClient

        if self.node is None:
            return NodeClient.for_home(self.home)
        token = None
        if self.token_file is not None and not self.node.startswith("unix:"):
            from lloom_sidecar.config import read_secret_lines

            _check_path_of_token(self.node)
            token = read_secret_lines(Path(self.token_file))[0]
        try:
            return NodeClient.for_node(self.node, token)
        except ValueError as exc:
            raise click.BadParameter(str(exc), param_hint="--node") from exc


def _check_path_of_token(node: str) -> None:
    from urllib.parse import urlsplit

    from lloom_sidecar.http.guard import is_loopback_name

    parts = urlsplit(node)
    host = parts.hostname or ""
    if parts.scheme == "http" and not is_loopback_name(f"[{host}]" if ":" in host else host):
        raise click.UsageError(f"{node} is not encrypted: a token is sent by http to this machine only")


pass_target = click.make_pass_decorator(Target)


def json_option(command: Command) -> Command:
    """Adds ``--json``, which arrives as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)


def example(*lines: str) -> str:
    """The end of a help text: examples that click leaves as they are."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def find_peer(client: NodeClient, text: str) -> str:
    """The peer id that ``text`` means: a whole one, or the end of one that the node knows, as tables show it.

    Raises LloomError when no known id ends so, or several do; click.UsageError when it is no ending.
    """
    ending = text.removeprefix(output.SHORT_MARK)
    if len(ending) >= WHOLE_ID_CHARACTERS:
        return ending
    if len(ending) < MIN_ENDING_CHARACTERS:
        raise click.UsageError(
            f"{text!r} is no peer: give a peer id, or at least its last {MIN_ENDING_CHARACTERS} characters"
        )
    known = {one["peer"] for one in client.peers()} | {one["peer"] for one in client.bootstrap()["validators"]}
    found = sorted(peer for peer in known if peer.endswith(ending))
    if len(found) == 1:
        return found[0]
    if found:
        raise LloomError(f"several peers end in {ending}: {', '.join(found)}")
    raise LloomError(
        f"no known peer ends in {output.printable(ending)}: `lloomctl peer list` shows them; others need a whole id"
    )


class Failure(click.ClickException):
    """A LloomError on its way out of the process: a sentence a fault on stderr, and the exit code."""

    exit_code = EXIT_FAILED

    def __init__(self, exc: LloomError) -> None:
        super().__init__(exc.message)
        self.faults: Sequence[str] = exc.faults if isinstance(exc, ConfigError) else (exc.message,)

    def show(self, file: Any = None) -> None:
        """Print it, on stderr whatever ``file`` is."""
        for fault in self.faults:
            output.fail(output.printable(fault))

    @classmethod
    def of(cls, exc: LloomError) -> Failure:
        """The one with the exit code that suits ``exc``."""
        return UnreachableFailure(exc) if exc.code == "node_unreachable" else cls(exc)


class UnreachableFailure(Failure):
    """No node answered."""

    exit_code = EXIT_UNREACHABLE


class NounGroup(click.Group):
    """A noun of lloomctl: names the nearest verb when one is not known."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with a suggestion."""
        name = args[0] if args else ""
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            raise click.UsageError(_no_such(name, self.list_commands(ctx)), ctx)
        return super().resolve_command(ctx, args)


def _no_such(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), 1)
    return f"no such command: {name}" + (f"; did you mean {near[0]}?" if near else "")

"""``lloomctl``: looks at a node and steers it. A module per noun, imported only when it is used."""

from __future__ import annotations

import importlib
from typing import Any, Final, NamedTuple

import click

from lloom_sidecar import __version__
from lloom_sidecar.cli.ctl_context import Failure, NounGroup, Target
from lloom_sidecar.errors import LloomError


class _Lazy(NamedTuple):
    module: str
    name: str
    help: str
    """Equal to the command's own first line; a test compares them."""


COMMANDS: Final = {
    "status": _Lazy("ctl_status", "status", "Show the node at a glance, with what needs attention."),
    "top": _Lazy("ctl_top", "top", "Watch the node: rates, requests, models, memory, events."),
    "chat": _Lazy("ctl_chat", "chat", "Ask a model of the network, for a first taste."),
    "peer": _Lazy("ctl_peer", "peer", "Look at the peers that the node knows; connect, disconnect, ping one."),
    "model": _Lazy("ctl_model", "model", "Look at the models that are offered, and ask executors about them."),
    "executor": _Lazy("ctl_executor", "executor", "Look at executors, set this one's prices, drain and resume it."),
    "explain": _Lazy("ctl_explain", "explain", "Say why a request went where it went, or where one would go now."),
    "request": _Lazy("ctl_request", "request", "Look at the last requests of the node's applications."),
    "bootstrap": _Lazy("ctl_bootstrap", "bootstrap", "Show and change the validators that the node trusts."),
    "dht": _Lazy("ctl_dht", "dht", "Ask the DHT, and put records into it."),
    "gossip": _Lazy("ctl_gossip", "gossip", "Look at the gossip topics of the node."),
    "events": _Lazy("ctl_events", "events", "Print what happened lately, or what happens now."),
    "config": _Lazy("ctl_config", "config", "Show the settings of the node, or check a file of them."),
    "network": _Lazy(
        "ctl_network", "network", "Create a network, invite to it, join one, change its key, see how it is."
    ),
    "receipt": _Lazy("ctl_receipt", "receipt", "List what the ledger keeps, export receipts, verify them."),
    "usage": _Lazy("ctl_usage", "usage", "Sum up what is owed and earned, by model, peer or day (UTC)."),
    "id": _Lazy("ctl_id", "show_id", "Print the node's peer id."),
    "doctor": _Lazy("ctl_doctor", "doctor", "Check the node and its home; say what is wrong and what to do."),
    "support-bundle": _Lazy(
        "ctl_support", "support_bundle", "Pack what somebody else needs to see to help, without secrets."
    ),
    "completion": _Lazy("ctl_completion", "completion", "Print the completion script of a shell."),
}


class _Root(NounGroup):
    """Knows its commands' names and helps without importing them, so that ``--help`` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        module = importlib.import_module(f"lloom_sidecar.cli.{lazy.module}")
        command: click.Command = getattr(module, lazy.name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except LloomError as exc:
            raise Failure.of(exc) from exc


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--home", envvar="LLOOM_HOME", metavar="DIR", help="Home of the node. [default: ~/.local/share/lloom]")
@click.option(
    "--node", envvar="LLOOM_NODE", metavar="URL", help="Admin API of another node: unix:PATH or http://HOST:PORT."
)
@click.option(
    "--token-file", envvar="LLOOM_TOKEN_FILE", metavar="FILE", help="File with the token that a node at a URL wants."
)
@click.version_option(__version__, prog_name="lloomctl", message="%(prog)s %(version)s")
@click.pass_context
def root(ctx: click.Context, home: str | None, node: str | None, token_file: str | None) -> None:
    """Look at a Lloom node and steer it.

    Exit status: 0 done, 1 failed, 2 wrong usage, 3 the node cannot be reached.

    \b
    Example:
      lloomctl status
      lloomctl --home /srv/lloom peer list --json
      lloomctl --node http://127.0.0.1:4883 --token-file /etc/lloom/token status
    """
    given = click.core.ParameterSource.COMMANDLINE
    if home is not None and node is not None:
        if ctx.get_parameter_source("home") is given and ctx.get_parameter_source("node") is given:
            raise click.UsageError("--home and --node exclude each other: a node is named by one of the two")
        if ctx.get_parameter_source("home") is given:
            node = None  # a flag wins over the environment
    ctx.obj = Target(home, node, token_file)


def main() -> None:
    """Entry point."""
    root(prog_name="lloomctl")


if __name__ == "__main__":
    main()

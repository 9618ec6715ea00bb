"""``lloomctl completion``: the script that makes a shell complete lloomctl's words."""

from __future__ import annotations

import click

from lloom_sidecar.cli.ctl_context import example


@click.command(
    "completion",
    epilog=example(
        "lloomctl completion bash > ~/.local/share/bash-completion/completions/lloomctl",
        "lloomctl completion fish > ~/.config/fish/completions/lloomctl.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None  # click has all three
    script = kind(ctx.find_root().command, {}, "lloomctl", "_LLOOMCTL_COMPLETE")
    # Not source(): for bash that starts the machine's bash to look at its version.
    click.echo(script.source_template % script.source_vars())

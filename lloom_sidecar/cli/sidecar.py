"""``lloom-sidecar``: makes a node's home, runs a node, shows a demo network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import click

from lloom_sidecar import __version__
from lloom_sidecar.cli import output
from lloom_sidecar.config import SettingDoc, describe_settings, load_config, resolve_home
from lloom_sidecar.errors import ConfigError, LloomError

EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 2
_FILE: Final = click.Path(path_type=Path)
_CONTEXT: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(context_settings=_CONTEXT)
@click.version_option(__version__, message="lloom-sidecar %(version)s")
def main() -> None:
    """Serve and use large language models over a peer-to-peer network.

    \b
    A first look:     lloom-sidecar demo
    A node of yours:  lloomctl network create
                      lloom-sidecar run --role validator --role executor --role client --model builtin
    """


@main.command()
@click.option("--home", metavar="PATH", help="Folder of the node's state.  [env: LLOOM_HOME]")
@click.option("--identity", type=_FILE, metavar="FILE", help="Identity to take where the home has none yet.")
@click.option("--network", type=_FILE, metavar="DIR", help="Take network.key and bootstrap from here, each time.")
@click.option("--p2pd-home", type=_FILE, metavar="DIR", help="Make a home for `lloom-sidecar p2pd` too, each time.")
def init(home: str | None, identity: Path | None, network: Path | None, p2pd_home: Path | None) -> None:
    """Make the node's home and its identity; does nothing where they exist.

    Prints the peer id. The other options are for containers: --identity and --network take mounted files, --p2pd-home
    gives p2pd's container the identity and nothing else.

    \b
    Example: lloom-sidecar init --home ~/lloom
    """
    from lloom_sidecar.cli.network_files import read_given, share_with_p2pd, take_network
    from lloom_sidecar.identity import init_home

    try:
        where = resolve_home(home)
        signer, is_new = init_home(where, None if identity is None else read_given(identity))
        if network is not None:
            take_network(where, network, signer.peer)
        if p2pd_home is not None:
            share_with_p2pd(where, p2pd_home.absolute())
    except LloomError as exc:
        _end(exc)
    output.say(f"{'made' if is_new else 'found'} the identity in {where}")
    click.echo(str(signer.peer))


def _with_settings(command: Any) -> Any:
    for doc in reversed(describe_settings()):
        command = _option(doc)(command)
    return command


def _option(doc: SettingDoc) -> Any:
    text = f"{doc.doc}  [env: {doc.env}]" + (f"  [default: {doc.default}]" if doc.default else "")
    if doc.is_switch:
        return click.option(f"{doc.flag}/--no-{doc.flag.removeprefix('--')}", doc.name, default=None, help=text)
    return click.option(doc.flag, doc.name, metavar=doc.metavar, multiple=doc.is_multiple, help=text)


@main.command()
@click.option("--config", "config_file", metavar="FILE", help="TOML file of settings.  [env: LLOOM_CONFIG]")
@click.option("--exit-on-stdin-eof", is_flag=True, hidden=True, help="End when standard input ends.")
@_with_settings
def run(config_file: str | None, exit_on_stdin_eof: bool, **flags: Any) -> None:
    """Run one node until SIGTERM or Ctrl-C, which let running requests finish.

    \b
    Examples:
      lloom-sidecar run --role client
      lloom-sidecar run --role executor --backend http://127.0.0.1:8000/v1
      lloom-sidecar run --role validator --listen /ip4/0.0.0.0/tcp/4001
    """
    try:
        config = load_config(flags, config_file=config_file)
    except ConfigError as exc:
        _end(exc)
    from lloom_sidecar.cli.run_node import run_until_signal

    try:
        run_until_signal(config, exit_on_stdin_eof=exit_on_stdin_eof)
    except LloomError as exc:
        _end(exc)


@main.command()
@click.option("--config", "config_file", metavar="FILE", help="TOML file of settings.  [env: LLOOM_CONFIG]")
@_with_settings
def p2pd(config_file: str | None, **flags: Any) -> None:
    """Become the p2pd of a node that runs elsewhere, for instance in the container beside this one.

    Takes the settings of `run` and starts p2pd as `run` would, at --p2pd-control; `run` with the same
    --p2pd-control attaches to it. Both see the socket under the same path; the home here needs only the identity
    (`init --p2pd-home`).

    \b
    Example: lloom-sidecar p2pd --role client --p2pd-control /unix/run/lloom/p2pd.sock
    """
    import trio

    from lloom_sidecar.node.daemon import become_p2pd

    try:
        trio.run(become_p2pd, load_config(flags, config_file=config_file, for_p2pd=True))
    except LloomError as exc:
        _end(exc)


@main.command()
@click.option("--once", is_flag=True, help="End after the first answer.")
@click.option("--prompt", default=None, metavar="TEXT", help="What to ask.")
@click.option(
    "--api-port", type=click.IntRange(0, 65535), default=4880, show_default=True, help="Port of the API; 0 = any."
)
@click.option(
    "--keep", type=click.Path(path_type=Path), default=None, metavar="DIR", help="Keep the nodes' homes in DIR."
)
def demo(once: bool, prompt: str | None, api_port: int, keep: Path | None) -> None:
    """Show a whole network on this machine: a validator, two executors with a real model each, a client.

    Asks one question through the OpenAI API, prints the answer as it comes, who gave it, and the verified receipt. Then
    stays up for you to try, until Ctrl-C.
    """
    from lloom_sidecar.cli.demo import run_demo

    try:
        sys.exit(run_demo(once=once, prompt=prompt, api_port=api_port, keep=keep))
    except LloomError as exc:
        _end(exc)


def _end(exc: LloomError) -> Any:
    """Say why, one sentence a fault, and exit: 2 for the configuration, 1 for anything else."""
    if isinstance(exc, ConfigError):
        for fault in exc.faults:
            output.fail(fault)
        sys.exit(EXIT_CONFIG)
    output.fail(str(exc))
    sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()

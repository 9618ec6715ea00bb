"""``lloomctl doctor``: what is wrong with a node, why, and what to do."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

import click

from lloom_sidecar import __version__
from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import EXIT_FAILED, EXIT_UNREACHABLE, Target, example, json_option, pass_target
from lloom_sidecar.cli.output import printable

if TYPE_CHECKING:
    from lloom_sidecar.admin.doctor import Finding
    from lloom_sidecar.admin.view import Status

_MARKS: Final = {"ok": "ok", "skipped": "skipped", "info": "info", "warning": "warning", "error": "ERROR"}
_INDENT: Final = 26
_MIN_TEXT: Final = 30


@click.command(
    "doctor",
    epilog=example("lloomctl doctor", "lloomctl doctor --json | jq '.findings[] | select(.severity == \"error\")'"),
)
@click.option("--quiet", "-q", is_flag=True, help="Only what is not ok.")
@json_option
@pass_target
def doctor(target: Target, quiet: bool, as_json: bool) -> None:
    """Check the node and its home; say what is wrong and what to do.

    Files, the p2pd program and ports are checked here, also when no node runs; the rest is checked by the running node:
    p2pd, its addresses, the validators, whether other peers hold its provider records, the clock, plaintext, disk.
    With --node only the latter.

    Exit status 1 when a finding is an error (warnings are not), 3 when no node answers.
    """
    from lloom_sidecar.admin.doctor import count_severities, in_order

    findings, has_node = examine(target)
    findings = in_order(findings)
    counts = count_severities(findings)
    if as_json:
        output.print_json({"node_answers": has_node, "counts": counts, "findings": findings})
    else:
        for one in findings:
            if not quiet or one["severity"] not in ("ok", "skipped"):
                _print(one)
        shown = ", ".join(f"{many} {name}" for name, many in counts.items() if many)
        output.say(f"{len(findings)} findings: {shown}")
    if not has_node:
        raise SystemExit(EXIT_UNREACHABLE)
    if counts["error"]:
        raise SystemExit(EXIT_FAILED)


def examine(target: Target) -> tuple[list[Finding], bool]:
    """(findings, whether a node answers)."""
    from lloom_sidecar.admin.client import NodeRefusedError, NodeUnreachableError
    from lloom_sidecar.admin.doctor import finding

    found: list[Finding] = []
    status: Status | None = None
    with target.client() as client:
        try:
            status = client.status()
            found.append(_node(status))
            found += client.examine()
        except NodeUnreachableError as exc:
            text, _, remedy = exc.message.partition(": ")
            found.append(finding("node", "error", text, remedy[:1].upper() + remedy[1:] + "." if remedy else ""))
        except NodeRefusedError as exc:
            remedy = "Restart the node, so that it is of the same version as lloomctl."
            found.append(finding("node", "error", f"the node cannot examine itself: {exc.message}", remedy))
    if target.node is None:
        found += _local(target, status)
    return found, status is not None


def _local(target: Target, status: Status | None) -> list[Finding]:
    from lloom_sidecar.cli.local_checks import LocalFacts, check_binary, check_home_files, check_ports, read_settings

    found = check_home_files(LocalFacts(target.home, status))
    config, settings = read_settings(target.home_option)
    found.append(settings)
    found.append(check_binary(config))
    if status is None:
        found += check_ports(config)
    return found


def _node(status: Status) -> Finding:
    from lloom_sidecar.admin.doctor import finding

    version = status["version"]
    up = output.duration(status["uptime_s"])
    text = f"{', '.join(status['roles'])} {status['peer'][-8:]}, version {version}, up {up}"
    if version != __version__:
        remedy = "Restart the node, so that it runs what is installed."
        return finding("node", "warning", f"{text}, but lloomctl is {__version__}", remedy)
    if status["draining"]:
        return finding("node", "warning", f"{text}, draining", "It ends when its requests have ended; start it again.")
    return finding("node", "ok", text)


def _print(one: Finding) -> None:
    width = max(_MIN_TEXT, output.terminal_width() - _INDENT)
    mark = output.style(_MARKS[one["severity"]].ljust(8), output.SEVERITY_COLOURS[one["severity"]])
    lines = _wrapped(one["text"], width)
    click.echo(f"{mark} {one['check']:16} {lines[0]}")
    for line in lines[1:]:
        click.echo(" " * _INDENT + line)
    if one["remedy"]:
        for index, line in enumerate(_wrapped(one["remedy"], width - 3)):
            click.echo(" " * _INDENT + ("-> " if index == 0 else "   ") + line)


def _wrapped(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(printable(text), width, break_long_words=False, break_on_hyphens=False)
    return lines or [""]

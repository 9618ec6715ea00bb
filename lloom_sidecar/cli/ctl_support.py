"""``lloomctl support-bundle``: what somebody else needs to see to help, without what nobody else may see."""

from __future__ import annotations

import io
import json
import platform
import re
import tarfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from lloom_sidecar import __version__
from lloom_sidecar.cli import output
from lloom_sidecar.cli.ctl_context import Target, example, json_option, pass_target
from lloom_sidecar.errors import LloomError

if TYPE_CHECKING:
    from lloom_sidecar.admin.client import NodeClient

LOG_BYTES: Final = 256 * 1024
"""Of the end of p2pd's log."""
MAX_SECRET_BYTES: Final = 64 * 1024
"""Of a file of secrets that is looked at, to take out whatever it holds."""
MIN_SECRET_CHARACTERS: Final = 8
"""Shorter lines of such a file are found everywhere by chance."""
SECRET_FILES: Final = ("identity.key", "network.key")
REMOVED: Final = "[removed]"
_PATTERNS: Final = (
    re.compile(r"(?<=://)[^/@\s\"']+(?=@)"),  # user and password of a URL
    re.compile(r"lloom-invite-\d+:[A-Za-z0-9=+/_-]+"),
    re.compile(r"(?i)(?<=bearer )[^\s\"']+"),
    re.compile(r"\bsk-[A-Za-z0-9_-]{8,}"),
)
_README: Final = """Lloom support bundle, made {at} by lloomctl {version}

Look through it before you hand it on: it is text only. It holds no prompts, no answers, no keys, no receipts' salts and
no invites; what looked like one was replaced by {removed} ({count} times). It does name peers, their addresses, models,
paths on this machine and when requests were made.

{files}
"""


class Redactor:
    """Takes secrets out of texts: those in ``secrets``, and what has the form of one. Counts them."""

    def __init__(self, secrets: Iterable[str]) -> None:
        # The longest first, so that a secret inside another one leaves nothing of it.
        self._secrets = sorted({one for one in secrets if len(one) >= MIN_SECRET_CHARACTERS}, key=len, reverse=True)
        self.count = 0

    def __call__(self, text: str) -> str:
        """``text`` without them."""
        for secret in self._secrets:
            self.count += text.count(secret)
            text = text.replace(secret, REMOVED)
        for pattern in _PATTERNS:
            text, found = pattern.subn(REMOVED, text)
            self.count += found
        return text


def secrets_in(content: bytes) -> list[str]:
    """The texts by which a file of secrets could be recognised: its lines and their words, all of it in hex."""
    found = [content.hex()]
    for line in content.decode("utf-8", "replace").splitlines():
        if line.isprintable():
            found += [line.strip(), *line.replace("=", " ").replace(":", " ").split()]
    # A word such as "lloom-network-key" tells what the file is; it is no secret, and is short.
    return [one for one in found if not one.startswith(("#", "lloom-"))]


def _secrets_of(home: Path, settings: list[dict[str, Any]]) -> list[str]:
    paths = {home / name for name in SECRET_FILES}
    named = (one["value"] for one in settings if str(one["name"]).endswith(("key_file", "token_file")))
    paths |= {Path(one) for one in named if isinstance(one, str)}
    found: list[str] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                found += secrets_in(file.read(MAX_SECRET_BYTES))
        except OSError:  # it is not there, or not ours to read: then it is not in what we could read either
            continue
    return found


def _ask(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except LloomError as exc:
        return {"error": exc.message}


def _of_the_node(client: NodeClient) -> dict[str, Any]:
    found: dict[str, Any] = {
        "status.json": _ask(client.status),
        "peers.json": _ask(client.peers),
        "executors.json": _ask(client.executors),
        "models.json": _ask(client.models),
        "settings.json": _ask(client.config),
        "p2pd-settings.json": _ask(client.p2pd_effective),
        "bootstrap.json": _ask(client.bootstrap),
        "topics.json": _ask(client.topics),
        "requests.json": _ask(client.requests),
        "events.json": _ask(lambda: list(client.events(follow=False))),
        "metrics.txt": _ask(client.metrics),
    }
    return found


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            return file.read(LOG_BYTES).decode("utf-8", "replace")
    except OSError as exc:
        return f"cannot be read: {exc.strerror}\n"


def _of_this_machine(target: Target) -> dict[str, Any]:
    from importlib import metadata

    from lloom_sidecar.cli.ctl_doctor import examine

    packages = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    findings, has_node = examine(target)
    found: dict[str, Any] = {
        "versions.json": {
            "lloomctl": __version__,
            "python": platform.python_version(),
            "system": platform.platform(),
            "packages": dict(sorted(packages.items())),
        },
        "doctor.json": {"node_answers": has_node, "findings": findings},
    }
    if target.node is None:
        found["p2pd.log"] = _tail(target.home / "run" / "p2pd.log")
        if (target.home / "config.toml").exists():
            found["config.toml"] = _tail(target.home / "config.toml")
    return found


@click.command("support-bundle", epilog=example("lloomctl support-bundle", "lloomctl support-bundle -o help.tar.gz"))
@click.option("-o", "--output", "path", metavar="FILE", help="The archive. [default: lloom-support-TIME.tar.gz here]")
@json_option
@pass_target
def support_bundle(target: Target, path: str | None, as_json: bool) -> None:
    """Pack what somebody else needs to see to help, without secrets.

    Status, peers, settings, doctor's findings, last events and requests, metrics, p2pd's last log lines; no prompts,
    answers, keys. Works when no node runs, with what the files tell. Look through it before you hand it on.
    """
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    archive = Path(path or f"lloom-support-{at}.tar.gz")
    with target.client() as client:
        parts = _of_the_node(client) | _of_this_machine(target)
    settings = parts["settings.json"] if isinstance(parts["settings.json"], list) else []
    clean = Redactor(_secrets_of(target.home, settings))
    texts = {name: clean(one if isinstance(one, str) else json.dumps(one, indent=1)) for name, one in parts.items()}
    listing = "\n".join(f"  {name:20} {len(text.encode()):>8} bytes" for name, text in texts.items())
    readme = _README.format(at=at, version=__version__, removed=REMOVED, count=clean.count, files=listing)
    _write(archive, f"lloom-support-{at}", {"README.txt": readme, **texts})
    if as_json:
        output.print_json({"file": str(archive), "bytes": archive.stat().st_size, "removed": clean.count})
    else:
        click.echo(str(archive))
        output.say(
            f"{len(texts)} files, {output.count(clean.count, 'secret')} removed; look through it before you hand it on"
        )


def _write(archive: Path, folder: str, texts: dict[str, str]) -> None:
    """Raises LloomError when the archive is there already, or cannot be written."""
    try:
        with archive.open("xb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
            archive.chmod(0o600)
            for name, text in texts.items():
                content = text.encode()
                info = tarfile.TarInfo(f"{folder}/{name}")
                info.size, info.mode, info.mtime = len(content), 0o600, int(time.time())
                tar.addfile(info, io.BytesIO(content))
    except FileExistsError as exc:
        raise LloomError(f"{archive} is there already: name another with -o") from exc
    except OSError as exc:
        raise LloomError(f"{archive} cannot be written: {exc.strerror}") from exc

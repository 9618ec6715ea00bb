"""Known vulnerabilities in what a node is made of: pip-audit over the lock files, govulncheck over daemon/.

By hand (``make audit``): both ask advisory services, PyPI's and Go's vulnerability database, whose answers change while
this does not.
Exit status: 0 nothing is known, 1 something was found, 3 not everything could be checked, which is no good news.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
HOME: Final = ROOT / ".venv" / "audit"
"""Both tools are installed here: nothing else needs them."""
PIP_AUDIT: Final = "pip-audit==2.10.1"
GOVULNCHECK: Final = "golang.org/x/vuln/cmd/govulncheck@v1.9.0"
GOVULNCHECK_FOUND: Final = 3
"""Its exit status when the code calls something vulnerable. Source: golang.org/x/vuln/cmd/govulncheck, "Exit codes"."""
LIMIT_S: Final = 900

CLEAN, FOUND, UNCHECKED = 0, 1, 3


class Verdict(NamedTuple):
    """What one tool's run means."""

    status: int
    """CLEAN, FOUND or UNCHECKED."""
    lines: tuple[str, ...]
    """For people."""


def judge_pip_audit(returncode: int, stdout: str, stderr: str) -> Verdict:
    """What ``pip-audit --format json`` says.

    It exits with 0 when its service knows none of the packages, as a mirror without advisories does: what was skipped
    was not checked.
    """
    try:
        found: list[dict[str, Any]] = json.loads(stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return Verdict(UNCHECKED, _last_words("its advisory service (PyPI's) did not answer", stderr or stdout))
    faults = [
        f"{one['name']} {one['version']}: {vuln['id']}, repaired in {', '.join(vuln['fix_versions']) or 'no version'}"
        for one in found
        for vuln in one.get("vulns", ())
    ]
    skipped = [one["name"] for one in found if "skip_reason" in one]
    if faults:
        return Verdict(FOUND, tuple(faults))
    if skipped or not found or returncode != 0:
        what = f"{len(skipped)} of {len(found)} packages are unknown to the advisory service (a mirror without it?)"
        return Verdict(UNCHECKED, _last_words(what, stderr if returncode else ""))
    return Verdict(CLEAN, (f"{len(found)} packages, no vulnerability is known",))


def judge_govulncheck(returncode: int, stdout: str, stderr: str) -> Verdict:
    """What govulncheck says: its text, and its exit status."""
    if returncode == 0:
        return Verdict(CLEAN, tuple(stdout.strip().splitlines()[-1:]))
    if returncode == GOVULNCHECK_FOUND:
        return Verdict(FOUND, tuple(stdout.strip().splitlines()))
    return Verdict(
        UNCHECKED,
        _last_words("its advisory service (Go's vulnerability database) did not answer, or it failed", stderr),
    )


def _last_words(what: str, text: str) -> tuple[str, ...]:
    return (f"NOT CHECKED: {what}", *(f"  {line}" for line in text.strip().splitlines()[-3:]))


def _run(*command: str | Path, folder: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    whole = {**os.environ, **env}
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=whole,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def _install() -> str | None:
    """Put both tools in place; why that failed."""
    python = HOME / "bin" / "python"
    if not python.exists():
        venv.create(HOME, with_pip=True)
    for done in (
        _run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PIP_AUDIT),
        _run(ROOT / "tools" / "go.sh", "install", GOVULNCHECK, GOBIN=str(HOME / "bin")),
    ):
        if done.returncode != 0:
            return done.stderr.strip()[-500:]
    return None


def main() -> int:
    """Check everything; the worst status."""
    failure = _install()
    if failure is not None:
        print(f"make audit: the tools cannot be installed:\n{failure}", file=sys.stderr)
        return UNCHECKED
    verdicts: dict[str, Verdict] = {}
    for lock in ("requirements.lock", "requirements-dev.lock"):
        options = ("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--timeout", "20")
        done = _run(HOME / "bin" / "python", "-m", "pip_audit", "--requirement", lock, *options)
        verdicts[f"pip-audit {lock}"] = judge_pip_audit(done.returncode, done.stdout, done.stderr)
    go = _run(ROOT / "tools" / "go.sh", "--find").stdout.strip()
    path = f"{Path(go).parent}:{os.environ['PATH']}"
    done = _run(HOME / "bin" / "govulncheck", "./...", folder=ROOT / "daemon", PATH=path, GOTOOLCHAIN="local")
    verdicts["govulncheck daemon/"] = judge_govulncheck(done.returncode, done.stdout, done.stderr)
    for name, verdict in verdicts.items():
        print(f"{name}:")
        print("\n".join(f"  {line}" for line in verdict.lines))
    statuses = {verdict.status for verdict in verdicts.values()}
    return next((status for status in (FOUND, UNCHECKED) if status in statuses), CLEAN)


if __name__ == "__main__":
    sys.exit(main())

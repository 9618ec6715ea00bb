"""One node of a test's network: a sidecar process with its own home, and what a test does to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from lloom_sidecar.admin.client import NodeClient, NodeUnreachableError
from lloom_sidecar.identity import init_home

from .waiting import wait_until

START_TIMEOUT_S = 40.0
END_TIMEOUT_S = 15.0


class Node:
    """A sidecar with its p2pd. ``start`` may be called again after ``stop`` or ``kill``: the home stays."""

    def __init__(self, name: str, home: Path, args: list[str], *, env: dict[str, str] | None = None) -> None:
        self.name = name
        self.home = home
        self.args = args
        self.env = env or {}
        self.prefix: tuple[str, ...] = ()
        """Before the command: ``ip netns exec NAME`` and the like."""
        self.peer = str(init_home(home)[0].peer)
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    # ------------------------------------------------------------ life
    def start(self, *, wait: bool = True) -> Node:
        """Start the sidecar and wait until it serves."""
        kept = ("LLOOM_CACHE", "LLOOM_P2PD")
        env = {key: value for key, value in os.environ.items() if not key.startswith("LLOOM_") or key in kept}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *self.prefix,
                    *(sys.executable, "-m", "lloom_sidecar.cli.sidecar", "run", "--home", str(self.home)),
                    *("--exit-on-stdin-eof", "--log-format", "json", "--log-level", "debug", "--grace", "5"),
                    *self.args,
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**env, **self.env},
            )
        self.starts += 1
        if wait:
            self.wait_up()
        return self

    def wait_up(self) -> None:
        """Return when the node has started."""

        def is_up() -> bool:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended while it started:\n{self.log_tail()}")
            try:
                status = self.status()
            except NodeUnreachableError:
                return False
            is_ready = status["api"]["ready"] or "client" not in status["roles"]
            return bool(status["p2pd"]["up"] and status["addrs"] and is_ready)

        wait_until(is_up, f"{self.name} to be up", timeout_s=START_TIMEOUT_S, explain=self.log_tail)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self._reap()

    def kill(self, what: str = "sidecar") -> None:
        """kill -9 of the ``sidecar``, its ``p2pd``, or the ``model`` process of its embedded backend."""
        assert self.process is not None
        if what == "sidecar":
            self.process.kill()
            self._reap()
        else:
            os.kill(self.pid_of(what), signal.SIGKILL)

    def pid_of(self, what: str) -> int:
        """Process id of the node's ``p2pd`` or ``model`` child."""
        marks = {"p2pd": "p2pd", "model": "_llama_child"}
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(marks[what] in part for part in child.cmdline()[:4]):
                    return child.pid
        raise AssertionError(f"{self.name} has no {what} process")

    def _reap(self) -> int:
        assert self.process is not None
        try:
            code = self.process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"{self.name} did not end within {END_TIMEOUT_S:g} s:\n{self.log_tail()}") from None
        finally:
            if self.process.stdin is not None:
                self.process.stdin.close()
        return code

    @property
    def is_running(self) -> bool:
        """The sidecar's process is there."""
        return self.process is not None and self.process.poll() is None

    # ------------------------------------------------------------ looking
    @property
    def log_path(self) -> Path:
        """The sidecar's log, of all starts."""
        return self.home.parent / f"{self.home.name}.log"

    def log(self) -> list[dict[str, Any]]:
        """The log's JSON lines."""
        found = []
        for line in self.log_path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def log_tail(self, lines: int = 25) -> str:
        """The end of the sidecar's and p2pd's logs: what a failed test prints."""
        parts = []
        for path in (self.log_path, self.home / "run" / "p2pd.log"):
            with contextlib.suppress(OSError):
                parts.append(f"--- {path.name} of {self.name}")
                parts.extend(path.read_text(errors="replace").splitlines()[-lines:])
        return "\n".join(parts)

    def status(self) -> dict[str, Any]:
        """GET /v1/status of the admin API."""
        with self.admin() as client:
            return dict(client.status())

    def executors(self) -> dict[str, dict[str, Any]]:
        """The executors that it knows, by peer id."""
        with self.admin() as client:
            return {one["peer"]: dict(one) for one in client.executors()}

    def peers(self) -> dict[str, dict[str, Any]]:
        """The peers that it knows, by peer id."""
        with self.admin() as client:
            return {one["peer"]: dict(one) for one in client.peers()}

    def conditions(self) -> set[str]:
        """Codes of its health conditions."""
        return {one["code"] for one in self.status()["conditions"]}

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample, 0.0 when it is not there."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        with self.admin() as client:
            for line in client.metrics().splitlines():
                sample, _, value = line.rpartition(" ")
                found, _, rest = sample.partition("{")
                if found == name and wanted <= set(rest.rstrip("}").split(",")):
                    return float(value)
        return 0.0

    @contextlib.contextmanager
    def admin(self) -> Iterator[NodeClient]:
        """A client of its admin API."""
        with NodeClient.for_home(self.home) as client:
            yield client

    def ctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run ``lloomctl --home HOME ARGS``."""
        return subprocess.run(
            [sys.executable, "-m", "lloom_sidecar.cli.lloomctl", "--home", str(self.home), *args],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    # ------------------------------------------------------------ addresses
    @property
    def address(self) -> str:
        """A multiaddr on loopback with /p2p at its end."""
        found: list[str] = [a for a in self.status()["addrs"] if "/127.0.0.1/tcp/" in a]
        return found[0]

    @property
    def api(self) -> str:
        """Base URL of its OpenAI API, without /v1."""
        return str(self.status()["api"]["address"])

    # ------------------------------------------------------------ the API
    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        """POST JSON to the API."""
        return httpx.post(f"{self.api}{path}", json=body, timeout=60, trust_env=False, **kwargs)

    def chat(self, prompt: str, *, model: str = "scripted", **more: Any) -> httpx.Response:
        """One unstreamed chat."""
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], **more}
        return self.post("/v1/chat/completions", body)

    @contextlib.contextmanager
    def stream(self, prompt: str, *, model: str = "scripted", **more: Any) -> Iterator[httpx.Response]:
        """One streamed chat; leaving the context early closes the connection."""
        body = {"model": model, "stream": True, "messages": [{"role": "user", "content": prompt}], **more}
        with (
            httpx.Client(timeout=60, trust_env=False) as http,
            http.stream("POST", f"{self.api}/v1/chat/completions", json=body) as answer,
        ):
            yield answer

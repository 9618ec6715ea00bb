"""The scripted backend as a process that a test starts, asks and kills."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from .waiting import wait_until


class ScriptedBackend:
    """See ``scripted_backend.py`` for the script language. Ends with the test's process."""

    def __init__(
        self, *, models: list[str] | None = None, journal: Path | None = None, prefix: tuple[str, ...] = ()
    ) -> None:
        """``prefix``: before its command, such as ``ip netns exec NAME``; ``url`` is then for who is there too."""
        self._prefix = prefix
        self.journal = journal
        """Where it writes its log, for tests that kill it."""
        self._models = models
        self._process: subprocess.Popen[str] | None = None
        self._port = 0

    def start(self) -> ScriptedBackend:
        """Start it, on the same port as before when it was started before."""
        program = Path(__file__).with_name("scripted_backend.py")
        journal = [] if self.journal is None else [str(self.journal)]
        self._process = subprocess.Popen(
            [*self._prefix, sys.executable, str(program), str(self._port), *journal],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._port = int(self._process.stdout.readline())
        if self._models is not None:
            self.set_models(self._models)
        return self

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    def requests(self) -> list[dict[str, Any]]:
        """Every call that came, in order, and how it ended."""
        found: list[dict[str, Any]] = httpx.get(f"{self.url}/_requests", trust_env=False).json()
        return found

    def wait_ended(self, count: int = 1, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        """The log, once ``count`` calls have ended."""
        ended: list[dict[str, Any]] = wait_until(
            lambda: (log := self.requests()) and sum(r["outcome"] is not None for r in log) >= count and log,
            f"{count} ended calls at the backend",
            timeout_s=timeout_s,
        )
        return ended

    def set_models(self, models: list[str]) -> None:
        """What /v1/models lists."""
        httpx.post(f"{self.url}/_models", json=models, trust_env=False)

    def set_script(self, **directives: int) -> None:
        """Directives for every request from now on, whatever its prompt says."""
        httpx.post(f"{self.url}/_script", json=directives, trust_env=False)

    def set_status(self, status: int) -> None:
        """Status of /v1/models: anything but 200 is a sick backend."""
        httpx.post(f"{self.url}/_status", json=status, trust_env=False)

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process = None

    def __enter__(self) -> ScriptedBackend:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

"""``lloom-sidecar demo``, as a newcomer runs it; and what is left of it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from lloom_sidecar.admin.client import NodeClient
from tests.harness.waiting import wait_until

pytest.importorskip("xllamacpp", reason="the extra `local` is not installed")

START_S = 90.0
"""Four nodes and two models; an idle machine needs 5 s."""
END_S = 30.0
"""An idle machine needs 1 s."""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """The demo's temporary folder goes in here, so that its remains show."""
    with tempfile.TemporaryDirectory(prefix="lld-") as folder:
        yield Path(folder)


class Demo:
    """A running demo and everything that it started."""

    def __init__(self, scratch: Path, *args: str) -> None:
        env = {key: value for key, value in os.environ.items() if not key.startswith("LLOOM_") or key == "LLOOM_CACHE"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lloom_sidecar.cli.sidecar", "demo", "--api-port", "0", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**env, "TMPDIR": str(scratch)},
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=lambda: self.out.extend(self.process.stdout or ()), daemon=True),
            threading.Thread(target=lambda: self.err.extend(self.process.stderr or ()), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def wait_home(self) -> Path:
        """Until it is up and waits for its user; LLOOM_HOME as it says."""
        line = wait_until(
            lambda: next((one for one in self.err if one.startswith("LLOOM_HOME=")), None) or self.process.poll(),
            "the demo to say LLOOM_HOME",
            timeout_s=START_S,
            explain=lambda: "".join(self.err),
        )
        assert isinstance(line, str), "".join(self.err)
        return Path(line.strip().removeprefix("LLOOM_HOME="))

    def family(self) -> list[psutil.Process]:
        """All its processes but itself."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_end(self) -> int:
        code = self.process.wait(END_S)
        for reader in self._readers:
            reader.join(END_S)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return code

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.wait_end()


def assert_ended(family: list[psutil.Process], timeout_s: float) -> None:
    _, alive = psutil.wait_procs(family, timeout=timeout_s)
    assert not [one.cmdline() for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_once(scratch: Path) -> None:
    with Demo(scratch, "--once", "--prompt", "Name a colour.") as demo:
        wait_until(
            lambda: demo.process.poll() is not None,
            "the demo to end",
            timeout_s=START_S + END_S,
            explain=lambda: "".join(demo.err),
        )
        assert demo.wait_end() == 0, "".join(demo.err)
        said = "".join(demo.err)
        assert "receipt verified" in said
        assert "served by" in said
        assert "> Name a colour." in said
        # The answer alone is data.
        answer = "".join(demo.out)
        assert answer.strip()
        assert "receipt" not in answer
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_it_stays_up_until_it_is_asked_to_end(scratch: Path, number: signal.Signals) -> None:
    with Demo(scratch) as demo:
        home = demo.wait_home()
        family = demo.family()
        assert len(family) >= 4 + 4 + 2  # sidecars, daemons, models
        with NodeClient.for_home(home) as node:
            status = node.status()
        assert status["roles"] == ["client"]
        # What it tells its user to try works.
        answer = httpx.post(
            f"{status['api']['address']}/v1/chat/completions",
            json={"model": "smollm2:135m", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]},
            timeout=60,
            trust_env=False,
        )
        assert answer.status_code == 200, answer.text
        demo.process.send_signal(number)
        assert demo.wait_end() == 0, "".join(demo.err)
        assert "Traceback" not in "".join(demo.err)
        assert_ended(family, 1)
    assert not list(scratch.iterdir())


def test_a_killed_demo_takes_everything_with_it(scratch: Path) -> None:
    with Demo(scratch) as demo:
        demo.wait_home()
        family = demo.family()
        assert len(family) >= 10
        demo.process.kill()
        demo.wait_end()
        assert_ended(family, 15)
    # Its folder is left, as nobody was there to remove it; the next demo does, and does not touch those that run.
    assert len(list(scratch.iterdir())) == 1
    with Demo(scratch, "--once", "--prompt", "Hi") as demo:
        wait_until(lambda: demo.process.poll() is not None, "the demo to end", timeout_s=START_S + END_S)
        assert demo.wait_end() == 0, "".join(demo.err)
    assert not list(scratch.iterdir())

"""A whole network on one machine, for a first look: real processes, real p2pd, a real model, one question.

Every node is a process of its own that ends when its standard input does, so nothing outlives the demo, however that
ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import structlog
import trio

from lloom_sidecar.admin.client import NodeClient, NodeUnreachableError
from lloom_sidecar.cli import output
from lloom_sidecar.cli.local_checks import try_bind
from lloom_sidecar.cli.network_files import create_network
from lloom_sidecar.errors import LloomError, StartError
from lloom_sidecar.executor.model_fetch import ensure_builtin_model, terminal_progress
from lloom_sidecar.identity import init_home

START_TIMEOUT_S: Final = 60.0
PAGE_PORT: Final = 4882
END_TIMEOUT_S: Final = 10.0
POLL_S: Final = 0.05
WATCH_S: Final = 0.5
DEFAULT_PROMPT: Final = "What is a peer-to-peer network? Answer in two sentences."
MODEL: Final = "smollm2:135m"
MAX_TOKENS: Final = 96
_PREFIX: Final = "lloom-demo-"
_LOCK_NAME: Final = ".lock"


@dataclass(slots=True)
class _Member:
    """One node of the demo."""

    name: str
    home: Path
    args: list[str]
    process: subprocess.Popen[bytes] | None = None
    status: dict[str, Any] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        return self.home / "log.jsonl"

    def start(self) -> None:
        # No LLOOM_* of the caller: the demo's nodes are what their flags say.
        env = {key: value for key, value in os.environ.items() if not key.startswith("LLOOM_") or key == "LLOOM_CACHE"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "lloom_sidecar.cli.sidecar", "run", "--home", str(self.home)),
                    *("--exit-on-stdin-eof", "--log-format", "json", "--probe", "off", "--page", "off", *self.args),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,  # Ctrl-C is the demo's to handle
            )

    def client(self) -> NodeClient:
        return NodeClient.for_home(self.home)

    def wait_up(self, deadline: float) -> dict[str, Any]:
        """The node's status once it serves. Raises StartError with the log's last lines."""
        assert self.process is not None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise StartError(f"the {self.name} ended while it started:\n{self.last_lines()}")
            try:
                with self.client() as client:
                    self.status = dict(client.status())
                if self.status["p2pd"]["up"] and self.status["addrs"]:
                    return self.status
            except NodeUnreachableError:
                pass
            _pause(POLL_S)
        raise StartError(f"the {self.name} was not up within {START_TIMEOUT_S:.0f} s:\n{self.last_lines()}")

    def last_lines(self, count: int = 5) -> str:
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])
        except OSError:
            return "(no log)"

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait_end(self, deadline: float) -> None:
        if self.process is None:
            return
        try:
            self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()


def run_demo(*, once: bool, prompt: str | None, api_port: int, keep: Path | None) -> int:
    """Run the demo; returns the process' exit code. Raises LloomError with a sentence when something does not start."""

    def on_signal(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    # SIGINT too: whoever starts the demo in a script's background has it ignored, and still asks it to end so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    # The steps below say what a person wants to know; each node's log is in its home.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    members: list[_Member] = []
    began_at = time.monotonic()
    with _root(keep) as root:
        try:
            _step("fetching or checking the model")
            with terminal_progress() as progress:
                trio.run(lambda: ensure_builtin_model(progress=progress))
            _done(began_at)
            client = _start(root, members, api_port)
            _ask(client, members, prompt or DEFAULT_PROMPT)
            if not once:
                _invite(client)
                while all(m.process is not None and m.process.poll() is None for m in members):
                    _pause(WATCH_S)
                raise StartError("a node of the demo ended by itself; its log is in " + str(root))
        except KeyboardInterrupt:
            output.say("\nending ...")
        finally:
            _end(members)
    return 0


def _start(root: Path, members: list[_Member], api_port: int) -> _Member:
    began_at = time.monotonic()
    _step("making a network key and four identities")
    homes = {name: root / name for name in ("validator", "executor-1", "executor-2", "client")}
    for home in homes.values():
        init_home(home)
    create_network(homes["validator"])
    key = (homes["validator"] / "network.key").read_bytes()
    for home in homes.values():
        path = home / "network.key"
        path.write_bytes(key)
        path.chmod(0o600)
    _done(began_at)

    listen = ["--listen", "/ip4/127.0.0.1/tcp/0", "--dht", "server"]
    began_at = time.monotonic()
    _step("starting the validator")
    validator = _Member("validator", homes["validator"], ["--role", "validator", *listen])
    members.append(validator)
    validator.start()
    address = validator.wait_up(time.monotonic() + START_TIMEOUT_S)["addrs"][0]
    _done(began_at)

    began_at = time.monotonic()
    _step("starting two executors with a model each, and the client")
    known = [*listen, "--bootstrap", address]
    executors = [
        _Member(f"executor {i}", homes[f"executor-{i}"], ["--role", "executor", "--model", "builtin", *known])
        for i in (1, 2)
    ]
    # The port that the docs name, unless a node of yours has it.
    page_port = PAGE_PORT if try_bind(socket.SOCK_STREAM, "127.0.0.1", PAGE_PORT) is None else 0
    asks = ["--role", "client", "--api", f"127.0.0.1:{api_port}", "--page", f"127.0.0.1:{page_port}"]
    client = _Member("client", homes["client"], [*asks, *known])
    members.extend([*executors, client])
    for member in (*executors, client):
        member.start()
    deadline = time.monotonic() + START_TIMEOUT_S
    for member in (*executors, client):
        member.wait_up(deadline)
    _done(began_at)

    began_at = time.monotonic()
    _step("waiting until the client has found both executors")
    while len(_executors(client)) < 2:
        if time.monotonic() > deadline:
            raise StartError(f"the client did not find both executors:\n{client.last_lines()}")
        _pause(POLL_S)
    _done(began_at)
    return client


def _executors(client: _Member) -> list[dict[str, Any]]:
    with client.client() as node:
        return [dict(one) for one in node.executors()]


def _ask(client: _Member, members: list[_Member], prompt: str) -> None:
    base = client.status["api"]["address"]
    output.say(f"\n> {prompt}\n")
    body = {
        "model": MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": MAX_TOKENS,
        "temperature": 0.2,
        "messages": [{"role": "user", "content": prompt}],
    }
    began_at = time.monotonic()
    first_at = None
    usage: dict[str, Any] = {}
    with (
        httpx.Client(trust_env=False, timeout=120.0) as http,
        http.stream("POST", f"{base}/v1/chat/completions", json=body) as answer,
    ):
        if answer.status_code != 200:
            answer.read()
            raise LloomError(f"the API answered {answer.status_code}: {answer.text[:500]}")
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise LloomError(f"the answer was cut: {chunk['error'].get('message')}")
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices", []):
                text = choice.get("delta", {}).get("content") or ""
                if text and first_at is None:
                    first_at = time.monotonic()
                _print_piece(text)
        headers = answer.headers
    ended_at = time.monotonic()
    _print_piece("\n")
    _explain(client, members, headers, usage, (first_at or ended_at) - began_at, ended_at - began_at)


def _print_piece(text: str) -> None:
    """A piece of the answer, on stdout at once; a model must not move the terminal's cursor."""
    sys.stdout.write("".join(one if one.isprintable() or one == "\n" else " " for one in text))
    sys.stdout.flush()


def _explain(
    client: _Member,
    members: list[_Member],
    headers: httpx.Headers,
    usage: dict[str, Any],
    first_s: float,
    seconds: float,
) -> None:
    executor = headers["x-lloom-executor"]
    name = next((m.name for m in members if m.status.get("peer") == executor), "?")
    with client.client() as node:
        found = next((p["source"] for p in node.peers() if p["peer"] == executor), "?")
        receipt = node.receipt(headers["x-request-id"])
    claims = receipt["claims"]
    tokens = usage.get("completion_tokens", "?")
    counted = f"{claims['prompt_tokens']} prompt + {claims['completion_tokens']} completion, as the backend counted"
    if claims["usage_source"] != "backend":
        counted = f"{claims['completion_tokens']} chunks: the backend did not count"
    overhead = f"{headers['x-lloom-overhead-ms']} ms to the first byte, attempts: {headers['x-lloom-attempts']}"
    rows = {
        "served by": f"{name}, {executor}",
        "found by": found,
        "first token": f"{first_s * 1000:.0f} ms; whole answer {seconds:.1f} s, {tokens} tokens",
        "network overhead": overhead,
        "receipt verified": f"signed by {claims['executor'][-8:]}, countersigned by {claims['client'][-8:]}",
        "  model": claims["model"],
        "  tokens": counted,
        "  cost": "free" if not claims["cost"] else f"{claims['cost']} {claims['currency']}",
        "  answer": f"{claims['answer_bytes']} bytes, salted sha-256 {claims['answer_digest'][:16]}...",
        "  request": f"sha-256 {claims['request_digest'][:16]}...",
    }
    output.say("")
    for key, value in rows.items():
        output.say(f"{key + ':':<20}{value}")


def _invite(client: _Member) -> None:
    base = client.status["api"]["address"]
    ctl = Path(sys.executable).with_name("lloomctl")
    ctl = ctl.relative_to(Path.cwd()) if ctl.is_relative_to(Path.cwd()) else ctl
    output.say(
        f"""
The network is up until Ctrl-C. Try:

  curl -N {base}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{MODEL}", "stream": true, "messages": [{{"role": "user", "content": "Hello"}}]}}'

  python -c "from openai import OpenAI; print(OpenAI(base_url='{base}/v1', api_key='-').chat.completions.create(
    model='{MODEL}', messages=[dict(role='user', content='Hello')]).choices[0].message.content)"

  {base}/chat          in a browser: ask the network
  {client.status["page"]}               the network as this client sees it

  {ctl} status          (with the line below in your shell)

LLOOM_HOME={client.home}"""
    )


def _end(members: list[_Member]) -> None:
    for member in reversed(members):
        member.end()
    deadline = time.monotonic() + END_TIMEOUT_S
    for member in reversed(members):
        member.wait_end(deadline)


@contextlib.contextmanager
def _root(keep: Path | None) -> Iterator[Path]:
    """The folder of the demo's homes; a temporary one is removed at the end, and so are those of killed demos."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    base = Path(tempfile.gettempdir())
    for old in base.glob(_PREFIX + "*"):
        _remove_abandoned(old)
    root = Path(tempfile.mkdtemp(prefix=_PREFIX))
    fd = os.open(root / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
        os.close(fd)


def _remove_abandoned(folder: Path) -> None:
    try:
        if folder.stat().st_uid != os.getuid():
            return
        fd = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return  # its demo still runs
    finally:
        os.close(fd)


def _pause(seconds: float) -> None:
    """Wait; this program has no event loop, and a signal ends the wait."""
    signal.sigtimedwait([], seconds)


def _step(what: str) -> None:
    sys.stderr.write(f"{what:<60}")
    sys.stderr.flush()


def _done(began_at: float) -> None:
    output.say(f"{time.monotonic() - began_at:6.1f} s")

"""The embedded LLM as a trio service: a child process on a unix socket, watched, restarted, ended with the sidecar.

The executor talks to it like to any other OpenAI-compatible backend; only its life is managed here. The child program
and the contract between the two are in ``_llama_child.py``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
import trio

from lloom_sidecar.errors import StartError

GGUF_MAGIC = b"GGUF"
"""First bytes of every model file that llama.cpp reads. Source: the GGUF specification."""

MAX_SOCKET_PATH_BYTES = 107
"""Longest path of a unix socket on Linux, without its final zero byte. Source: unix(7)."""

SOCKET_SUFFIX = ".sock"
"""llama.cpp takes a host name for a unix socket only if it ends so. Source: its server's code, seen in 2026-11."""

START_TIMEOUT_S = 120.0
"""The built-in model loads in 0.6 s; tens of gigabytes from a slow disk need minutes and a higher setting."""

STOP_GRACE_S = 2.0
"""From closing the child's stdin to killing it. It needs some milliseconds."""

RESTART_DELAYS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Waits before the restarts of a child that keeps dying; the last one repeats."""

STABLE_AFTER_S = 60.0
"""A child that lived this long was healthy: the next restart begins at the first delay again."""

DIGEST_BLOCK_BYTES = 16 * 1024 * 1024
"""Read in one go while a file's digest is computed: some 10 ms."""

MAX_STDERR_LINES = 20
MAX_STDERR_LINE_BYTES = 400
MAX_REPORT_BYTES = 64 * 1024

Cause = Literal[
    "missing_file", "not_gguf", "socket_path", "missing_package", "missing_library", "load_failed", "died", "timeout"
]
OnState = Callable[[bool, str], None]

log = structlog.get_logger(__name__)


class LocalModelError(StartError):
    """The embedded LLM cannot run; the message says why and what to do."""

    code = "local_model"

    def __init__(self, cause: Cause, message: str, *, stderr: Sequence[str] = ()) -> None:
        super().__init__(message, details={"cause": cause, "stderr": list(stderr)})
        self.cause: Cause = cause
        """Which of the known causes it is."""
        self.stderr = tuple(stderr)
        """The child's last lines."""


@dataclass(frozen=True, slots=True)
class LocalModelCommand:
    """How the child is started."""

    model_path: Path
    """The GGUF file."""
    alias: str
    """Model id that the server answers to."""
    socket_path: Path
    """Unix socket that it listens on, 0600."""
    parallel: int = 4
    """Slots: answers at the same time."""
    ctx_per_slot: int = 2048
    """Context length of each slot, in tokens."""
    program: tuple[str, ...] = ()
    """Command without the options; empty = the real child under this Python."""

    def argv(self) -> list[str]:
        """Return the whole command line."""
        # -P and the file's path: the child's imports never come from the current folder, nor through this package.
        program = self.program or (sys.executable, "-P", str(Path(__file__).with_name("_llama_child.py")))
        return [
            *program,
            f"--model={self.model_path}",
            f"--socket={self.socket_path}",
            f"--alias={self.alias}",
            f"--parallel={self.parallel}",
            f"--ctx-per-slot={self.ctx_per_slot}",
        ]


def check_model_file(path: Path) -> None:
    """Check that ``path`` is a readable GGUF file.

    Raises:
        LocalModelError: it is not; cause ``missing_file`` or ``not_gguf``.

    """
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as exc:
        raise LocalModelError("missing_file", f"The model file {path} cannot be read: {exc.strerror or exc}.") from exc
    if magic != GGUF_MAGIC:
        raise LocalModelError(
            "not_gguf",
            f"{path} is not a GGUF model file (it begins with {magic!r}); `--model` takes `builtin` or a .gguf file, "
            "other formats need a server of their own and `--backend URL`.",
        )


async def digest_of_file(path: Path) -> bytes:
    """SHA-256 of a model file; b"" for one part of several, which says nothing of the others.

    Raises OSError. Cancellation ends it at the next block.
    """
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", path.name):  # llama.cpp's gguf-split
        return b""
    digest = hashlib.sha256()
    async with await trio.open_file(path, "rb") as file:
        while block := await file.read(DIGEST_BLOCK_BYTES):
            await trio.to_thread.run_sync(digest.update, block)
    return digest.digest()


def explain_exit(returncode: int) -> str:
    """Return how a process ended, as the end of a sentence."""
    if returncode >= 0:
        return f"it exited with status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = f"signal {-returncode}"
    hint = {
        "SIGILL": ", as on a CPU without the instructions that xllamacpp was built for: use `--backend URL` here",
        "SIGKILL": ", as the kernel does when memory runs out: use a smaller model, or fewer or shorter slots",
    }.get(name, "")
    return f"it was ended by {name}{hint}"


def explain_report(kind: object, text: str, path: Path, stderr: Sequence[str]) -> LocalModelError:
    """Turn the child's error report into an error with its remedy."""
    if kind == "missing_package":
        message = "The embedded LLM needs the package xllamacpp: run `pip install 'lloom-sidecar[local]'`."
        return LocalModelError("missing_package", message)
    if kind == "missing_library" and "libgomp" in text:
        return LocalModelError(
            "missing_library",
            "The embedded LLM needs the system library libgomp: install it (Debian, Ubuntu: "
            "`apt-get install libgomp1`).",
        )
    if kind == "missing_library":
        return LocalModelError("missing_library", f"xllamacpp cannot be imported ({text}): reinstall it.")
    errors = [words for _, mark, words in (line.partition(" E ") for line in stderr) if mark]
    why = " ".join(errors[0].split()) if errors else text  # the first error is the cause, the later ones its echo
    if "HTTP server" in why:
        return LocalModelError("socket_path", f"llama.cpp cannot listen on its socket: {why}.", stderr=stderr)
    return LocalModelError(
        "load_failed",
        f"llama.cpp cannot load {path} ({why}): the file is cut, or of an architecture unknown to this llama.cpp.",
        stderr=stderr,
    )


class _Child:
    """One run of the child process."""

    def __init__(self, process: trio.Process, command: LocalModelCommand) -> None:
        self.process = process
        self.command = command
        self.stderr: deque[str] = deque(maxlen=MAX_STDERR_LINES)
        self._stderr_ended = trio.Event()

    async def collect_stderr(self) -> None:
        """Keep the last lines that the child prints; never blocks it, never grows."""
        assert self.process.stderr is not None
        pending = b""
        try:
            async for chunk in self.process.stderr:
                *lines, pending = (pending + chunk).split(b"\n")
                pending = pending[-MAX_STDERR_LINE_BYTES:]
                self.stderr.extend(line[:MAX_STDERR_LINE_BYTES].decode("utf-8", "replace") for line in lines if line)
        finally:
            if pending:
                self.stderr.append(pending.decode("utf-8", "replace"))
            self._stderr_ended.set()

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait for the child's report.

        Raises:
            LocalModelError: it reported an error, ended, or said nothing for ``timeout_s``.

        """
        with trio.move_on_after(timeout_s):
            report = await self._read_report()
            if report.get("ready") is True:
                return
            await self._drain_stderr()
            if "error" in report:
                raise explain_report(
                    report.get("kind"), str(report["error"]), self.command.model_path, tuple(self.stderr)
                )
            await self.process.wait()
            raise await self.died("while it loaded the model")
        raise LocalModelError(
            "timeout",
            f"The embedded LLM did not load {self.command.model_path} within {timeout_s:g} s: "
            "give it more time, or a smaller model.",
            stderr=tuple(self.stderr),
        )

    async def died(self, when: str) -> LocalModelError:
        """Return the error for a child that has ended unasked."""
        assert self.process.returncode is not None
        await self._drain_stderr()
        last = f" Its last line: {self.stderr[-1]}" if self.stderr else ""
        how = explain_exit(self.process.returncode)
        return LocalModelError("died", f"The embedded LLM ended {when}: {how}.{last}", stderr=tuple(self.stderr))

    async def _drain_stderr(self) -> None:
        with trio.move_on_after(1):
            await self._stderr_ended.wait()

    async def _read_report(self) -> dict[str, object]:
        """Return the child's JSON line; empty when it closed stdout without one."""
        assert self.process.stdout is not None
        buffer = b""
        while b"\n" not in buffer and len(buffer) < MAX_REPORT_BYTES:
            chunk = await self.process.stdout.receive_some(4096)
            if not chunk:
                break
            buffer += chunk
        try:
            report = json.loads(buffer.partition(b"\n")[0])
        except ValueError:
            return {}
        return report if isinstance(report, dict) else {}

    async def stop(self, grace_s: float) -> None:
        """Close stdin, wait at most ``grace_s``, kill. Not cancellable."""
        with trio.CancelScope(shield=True):
            assert self.process.stdin is not None
            await self.process.stdin.aclose()
            with trio.move_on_after(grace_s):
                await self.process.wait()
            if self.process.returncode is None:
                self.process.kill()
                await self.process.wait()


async def _run_once(
    command: LocalModelCommand, start_timeout_s: float, stop_grace_s: float, on_up: Callable[[int], None]
) -> tuple[LocalModelError, float]:
    """Run the child until it ends; return why, and for how many seconds it served.

    ``on_up`` gets its pid when it is ready.

    On leaving, by cancellation too, the process has ended and its socket is gone.
    """
    try:
        process = await trio.lowlevel.open_process(
            command.argv(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as exc:
        return LocalModelError("died", f"The embedded LLM's process cannot be started: {exc}."), 0.0
    up_at: float | None = None
    child = _Child(process, command)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.collect_stderr)
            try:
                await child.wait_ready(start_timeout_s)
                up_at = trio.current_time()
                on_up(process.pid)
                await process.wait()
                error = await child.died("unexpectedly")
            except LocalModelError as exc:
                error = exc
            finally:
                await child.stop(stop_grace_s)
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    await stream.aclose()
        with contextlib.suppress(OSError):
            command.socket_path.unlink()
    return error, 0.0 if up_at is None else trio.current_time() - up_at


async def run_local_model(
    model_path: Path,
    *,
    alias: str,
    socket_path: Path,
    parallel: int = 4,
    ctx_per_slot: int = 2048,
    start_timeout_s: float = START_TIMEOUT_S,
    stop_grace_s: float = STOP_GRACE_S,
    restart_delays_s: Sequence[float] = RESTART_DELAYS_S,
    on_state: OnState | None = None,
    program: tuple[str, ...] = (),
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a GGUF model on a unix socket until cancelled.

    Calls ``task_status.started()`` when the model is loaded and the socket listens. A child that dies later is
    restarted, after the waits of ``restart_delays_s``; a restart that fails counts like another death.

    Args:
        model_path: the GGUF file.
        alias: model id under which it answers.
        socket_path: where it listens (0600, named ``*.sock``, at most 107 bytes); a file left there is replaced.
        parallel: slots, answers at the same time.
        ctx_per_slot: context length of each slot, in tokens.
        start_timeout_s: deadline for each loading.
        stop_grace_s: from closing the child's stdin to killing it.
        restart_delays_s: waits before the restarts of a child that keeps dying; the last one repeats.
        on_state: called with (True, "") when the model answers, (False, reason) when it stopped doing so.
        program: command of another child that keeps the same contract, for tests.
        task_status: trio's.

    Raises:
        LocalModelError: it could not be started the first time.

    Cancellation closes the child's stdin, waits at most ``stop_grace_s``, kills it, and removes the socket. A sidecar
    that is killed takes the child with it: its stdin ends.

    """
    if len(os.fsencode(socket_path)) > MAX_SOCKET_PATH_BYTES:
        raise LocalModelError(
            "socket_path",
            f"The socket path {socket_path} is longer than {MAX_SOCKET_PATH_BYTES} bytes: choose a shorter --home.",
        )
    if socket_path.suffix != SOCKET_SUFFIX:
        raise LocalModelError("socket_path", f"The socket {socket_path} must be named *{SOCKET_SUFFIX}.")
    command = LocalModelCommand(model_path, alias, socket_path, parallel, ctx_per_slot, program)
    await trio.to_thread.run_sync(check_model_file, model_path)
    was_started = False

    def on_up(pid: int) -> None:
        nonlocal was_started
        log.info("local_model_up", model=alias, pid=pid)
        if on_state is not None:
            on_state(True, "")
        if not was_started:
            was_started = True
            task_status.started()

    failures = 0
    while True:
        error, up_s = await _run_once(command, start_timeout_s, stop_grace_s, on_up)
        if not was_started:
            raise error
        if up_s >= STABLE_AFTER_S:
            failures = 0
        delay_s = restart_delays_s[min(failures, len(restart_delays_s) - 1)]
        failures += 1
        log.warning("local_model_down", model=alias, reason=error.message, restart_in_s=delay_s)
        if on_state is not None:
            on_state(False, error.message)
        await trio.sleep(delay_s)

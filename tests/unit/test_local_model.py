"""The embedded LLM's service, against a fake child that keeps the contract of ``_llama_child.py``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from lloom_sidecar.errors import StartError
from lloom_sidecar.executor import _llama_child, local_model
from lloom_sidecar.executor.local_model import DIGEST_BLOCK_BYTES, LocalModelError, digest_of_file, run_local_model

FAKE_CHILD = """
import json, os, signal, socket, sys
mode, pids = sys.argv[1:3]
options = dict(part[2:].split("=", 1) for part in sys.argv[3:])
with open(pids, "a") as file:
    file.write(f"{os.getpid()} {json.dumps(options)}\\n")
runs = len(open(pids).readlines())
def say(fields):
    print(json.dumps(fields), flush=True)
if mode.startswith("report:"):
    print("0.00.1 E llama_model_load: magic  is wrong\\n0.00.2 E srv: exiting", file=sys.stderr, flush=True)
    say({"error": "Failed to init server", "kind": mode.partition(":")[2]}); sys.exit(1)
if mode == "libgomp":
    say({"error": "libgomp.so.1: cannot open shared object file", "kind": "missing_library"}); sys.exit(1)
if mode == "illegal":
    os.kill(os.getpid(), signal.SIGILL)
if mode == "garbage":
    print("no json"); sys.exit(3)
if mode == "chatty":
    sys.stderr.write("x" * 5000 + "\\n")
    for number in range(3000): print("line", number, file=sys.stderr)
    sys.stderr.write("the end"); sys.exit(4)
if mode == "hang":
    signal.pause()
if mode == "second_fails" and runs == 2:
    say({"error": "gone", "kind": "load_failed"}); sys.exit(1)
listener = socket.socket(socket.AF_UNIX); listener.bind(options["socket"]); listener.listen()
say({"ready": True, "pid": os.getpid()})
if mode == "deaf":
    signal.pause()
sys.stdin.read()
"""


class Fake:
    """Starts fake children and remembers them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.script = folder / "child.py"
        self.script.write_text(FAKE_CHILD)
        self.pids = folder / "pids"
        self.socket = folder / "llm.sock"
        self.model = folder / "model.gguf"
        self.model.write_bytes(b"GGUF1234")
        self.states: list[tuple[bool, str]] = []
        self.changed = trio.Event()

    def on_state(self, up: bool, reason: str) -> None:
        self.states.append((up, reason))
        self.changed.set()
        self.changed = trio.Event()

    def service(
        self, mode: str, *, start_timeout_s: float = 10.0, stop_grace_s: float = 2.0
    ) -> Callable[..., Awaitable[None]]:
        return partial(
            run_local_model,
            self.model,
            alias="m:1",
            socket_path=self.socket,
            parallel=3,
            ctx_per_slot=64,
            on_state=self.on_state,
            restart_delays_s=(0.0,),
            program=(sys.executable, "-S", str(self.script), mode, str(self.pids)),
            start_timeout_s=start_timeout_s,
            stop_grace_s=stop_grace_s,
        )

    def started(self) -> list[int]:
        return [int(line.split()[0]) for line in self.pids.read_text().splitlines()]

    def options(self) -> dict[str, str]:
        found = json.loads(self.pids.read_text().splitlines()[0].partition(" ")[2])
        assert isinstance(found, dict)
        return found


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


async def test_started_means_ready_and_cancellation_leaves_nothing(fake: Fake) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(fake.service("good"))
            stream = await trio.open_unix_socket(str(fake.socket))
            await stream.aclose()
            assert fake.states == [(True, "")]
            nursery.cancel_scope.cancel()
    assert fake.options() == {
        "model": str(fake.model),
        "socket": str(fake.socket),
        "alias": "m:1",
        "parallel": "3",
        "ctx-per-slot": "64",
    }
    assert not is_alive(fake.started()[0])
    assert not fake.socket.exists()


async def test_a_child_that_ignores_the_end_of_stdin_is_killed(fake: Fake) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(fake.service("deaf", stop_grace_s=0.05))
            nursery.cancel_scope.cancel()
    assert not is_alive(fake.started()[0])
    assert not fake.socket.exists()


async def test_cancelled_while_it_loads(fake: Fake) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fake.service("hang", stop_grace_s=0.05))
            while not fake.pids.exists() or not fake.started():
                await trio.sleep(0.005)
            nursery.cancel_scope.cancel()
    assert not is_alive(fake.started()[0])
    assert fake.states == []


async def test_a_child_that_dies_is_restarted_and_reported(fake: Fake) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(fake.service("good"))
            os.kill(fake.started()[0], signal.SIGKILL)
            while len(fake.states) < 3:
                await fake.changed.wait()
            nursery.cancel_scope.cancel()
    assert [up for up, _ in fake.states] == [True, False, True]
    assert "SIGKILL" in fake.states[1][1]
    assert "memory" in fake.states[1][1]
    assert len(fake.started()) == 2


async def test_a_failed_restart_is_reported_and_tried_again(fake: Fake) -> None:
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            await nursery.start(fake.service("second_fails"))
            os.kill(fake.started()[0], signal.SIGTERM)
            while len(fake.states) < 4:
                await fake.changed.wait()
            nursery.cancel_scope.cancel()
    assert [up for up, _ in fake.states] == [True, False, False, True]
    assert "cannot load" in fake.states[2][1]


@pytest.mark.parametrize(
    ("mode", "cause", "words"),
    [
        ("report:missing_package", "missing_package", "pip install 'lloom-sidecar[local]'"),
        ("report:missing_library", "missing_library", "reinstall"),
        ("libgomp", "missing_library", "apt-get install libgomp1"),
        ("report:load_failed", "load_failed", "magic is wrong"),
        ("illegal", "died", "--backend URL"),
        ("garbage", "died", "status 3"),
        ("chatty", "died", "the end"),
        ("hang", "timeout", "within 0.3 s"),
    ],
)
async def test_a_start_that_fails_says_why(fake: Fake, mode: str, cause: str, words: str) -> None:
    timeout_s = 0.3 if mode == "hang" else 10.0
    with trio.fail_after(15), pytest.raises(LocalModelError) as caught:
        await fake.service(mode, start_timeout_s=timeout_s, stop_grace_s=0.05)()
    assert caught.value.cause == cause
    assert words in caught.value.message
    assert isinstance(caught.value, StartError)
    assert len(caught.value.stderr) <= local_model.MAX_STDERR_LINES
    assert all(len(line) <= local_model.MAX_STDERR_LINE_BYTES for line in caught.value.stderr)
    assert fake.states == []
    assert not is_alive(fake.started()[0])


async def test_the_file_is_checked_before_anything_starts(fake: Fake) -> None:
    fake.model.write_bytes(b"PK\x03\x04")
    with pytest.raises(LocalModelError, match="not a GGUF") as caught:
        await fake.service("good")()
    assert caught.value.cause == "not_gguf"
    fake.model.unlink()
    with pytest.raises(LocalModelError, match="No such file") as caught:
        await fake.service("good")()
    assert caught.value.cause == "missing_file"
    assert not fake.pids.exists()


async def test_a_socket_path_that_cannot_be_used(fake: Fake) -> None:
    fake.socket = fake.folder / ("x" * 108 + ".sock")
    with pytest.raises(LocalModelError, match="longer than 107 bytes"):
        await fake.service("good")()
    fake.socket = fake.folder / "llm"  # llama.cpp would take it for a host name
    with pytest.raises(LocalModelError, match=r"named \*\.sock"):
        await fake.service("good")()


async def test_a_program_that_does_not_exist(fake: Fake) -> None:
    with pytest.raises(LocalModelError, match="cannot be started"):
        await run_local_model(fake.model, alias="m", socket_path=fake.socket, program=("/nonexistent/program",))


def test_the_real_command_line(tmp_path: Path) -> None:
    argv = local_model.LocalModelCommand(tmp_path / "m", "a", tmp_path / "s").argv()
    assert argv[:2] == [sys.executable, "-P"]
    options = _llama_child.parse_arguments(argv[3:])
    assert (options.model, options.alias, options.parallel, options.ctx_per_slot) == (str(tmp_path / "m"), "a", 4, 2048)
    assert Path(argv[2]).samefile(_llama_child.__file__)


def test_how_a_process_ended() -> None:
    assert local_model.explain_exit(0) == "it exited with status 0"
    assert "SIGSEGV" in local_model.explain_exit(-signal.SIGSEGV)
    assert "signal 99" in local_model.explain_exit(-99)


class TestChild:
    """Parts of the child program that need no model."""

    def run(self, tmp_path: Path, modules: dict[str, str], *, stdin: int = subprocess.DEVNULL) -> tuple[int, object]:
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
        done = subprocess.run(
            [sys.executable, "-S", _llama_child.__file__, "--model=m", f"--socket={tmp_path}/s", "--alias=a"],
            env={"PYTHONPATH": str(tmp_path)},
            stdin=stdin,
            stdout=subprocess.PIPE,
            timeout=20,
            check=False,
        )
        return done.returncode, json.loads(done.stdout)

    def test_without_xllamacpp(self, tmp_path: Path) -> None:
        returncode, report = self.run(tmp_path, {})
        assert returncode == 1
        assert report == {"error": "No module named 'xllamacpp'", "kind": "missing_package"}

    def test_without_a_library_of_xllamacpp(self, tmp_path: Path) -> None:
        text = "raise ImportError('libgomp.so.1: cannot open shared object file', name='xllamacpp.xllamacpp')"
        returncode, report = self.run(tmp_path, {"xllamacpp": text})
        assert (returncode, report) == (
            1,
            {"error": "libgomp.so.1: cannot open shared object file", "kind": "missing_library"},
        )

    def test_a_refused_model_and_noise_on_stdout(self, tmp_path: Path) -> None:
        reading, writing = os.pipe()
        text = "print('noise')\ndef __getattr__(name): raise RuntimeError('refused')"
        returncode, report = self.run(tmp_path, {"xllamacpp": text}, stdin=reading)
        os.close(reading)
        os.close(writing)
        assert (returncode, report) == (1, {"error": "refused", "kind": "load_failed"})

    def test_it_ends_with_its_stdin_even_while_loading_keeps_the_interpreter_lock(self, tmp_path: Path) -> None:
        text = "import ctypes, os; os.write(2, b'loading'); ctypes.PyDLL(None).sleep(30)"
        (tmp_path / "xllamacpp.py").write_text(text)
        process = subprocess.Popen(
            [sys.executable, "-S", _llama_child.__file__, "--model=m", f"--socket={tmp_path}/s", "--alias=a"],
            env={"PYTHONPATH": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stderr is not None
        with process, contextlib.ExitStack() as stack:
            stack.callback(process.kill)
            assert process.stderr.read(7) == b"loading"
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            process.stdin.close()
            assert process.wait(timeout=5) == -signal.SIGIO


async def test_a_files_digest(tmp_path: Path) -> None:
    whole = tmp_path / "m.gguf"
    whole.write_bytes(b"GGUF" + bytes(DIGEST_BLOCK_BYTES))
    assert await digest_of_file(whole) == hashlib.sha256(whole.read_bytes()).digest()
    part = tmp_path / "m-00001-of-00002.gguf"
    part.write_bytes(b"GGUF")
    assert await digest_of_file(part) == b""
    with pytest.raises(FileNotFoundError):
        await digest_of_file(tmp_path / "none.gguf")

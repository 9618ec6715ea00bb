"""Nodes that cannot start, or start beside something that is not there: what they say, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import trio

from lloom_sidecar.cli.network_files import create_network
from lloom_sidecar.identity import init_home
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.launch import build_argv, probe_features
from lloom_sidecar.protocol.envelope import Signer
from tests.contract.binaries import Key, find_ours, free_port, settings_for
from tests.harness import Network, Node
from tests.harness.waiting import wait_until

START_S = 60.0
CHANGE_S = 30.0
"""How long a change may take to be noticed; probes of a backend that is up come every 5 s."""


@pytest.fixture
def home() -> Iterator[Path]:
    """A node's home with an identity and a network."""
    with tempfile.TemporaryDirectory(prefix="lls-") as folder:
        home = Path(folder) / "home"
        init_home(home)
        create_network(home)
        yield home


@dataclass
class Ended:
    """A start that came to nothing."""

    code: int
    stderr: str

    @property
    def sentences(self) -> list[str]:
        """What it said, without the log."""
        return [line for line in self.stderr.splitlines() if line and not line.startswith("{")]


def command(home: Path, *args: str) -> list[str]:
    return [
        *(sys.executable, "-m", "lloom_sidecar.cli.sidecar", "run", "--home", str(home)),
        *("--log-format", "json", "--probe", "off", "--page", "off", *args),
    ]


def p2pd_command(home: Path, *args: str) -> list[str]:
    return [sys.executable, "-m", "lloom_sidecar.cli.sidecar", "p2pd", "--home", str(home), "--role", "client", *args]


CLIENT = ("--role", "client", "--api", "127.0.0.1:0", "--listen", "/ip4/127.0.0.1/tcp/0")


def clean_env() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("LLOOM_") or key == "LLOOM_CACHE"}


def processes_of(home: Path) -> list[list[str]]:
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if any(str(home.parent) in part for part in line) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


def assert_nothing_left(home: Path) -> None:
    wait_until(lambda: not processes_of(home), "its processes to be gone", explain=lambda: processes_of(home))
    assert [path for path in home.rglob("*") if path.is_socket()] == []
    assert not (home / "run" / "p2pd.json").exists()


def start(home: Path, *args: str) -> Ended:
    done = subprocess.run(
        command(home, *args), capture_output=True, text=True, timeout=START_S, check=False, env=clean_env()
    )
    assert_nothing_left(home)
    assert "Traceback" not in done.stderr
    return Ended(done.returncode, done.stderr)


def assert_says(ended: Ended, code: int, *words: str) -> None:
    """One sentence, with these words in it."""
    assert ended.code == code, ended.stderr
    said = ended.sentences
    assert said, ended.stderr
    assert said[0].startswith("error: "), said
    for word in words:
        assert word in said[0], said
    # Behind the sentence only what p2pd itself said, indented.
    assert all(line.startswith("  ") or line == "p2pd's last lines:" for line in said[1:]), said


# ---------------------------------------------------------------- settings
def test_a_wrong_flag(home: Path) -> None:
    ended = start(home, "--rolle", "client")
    assert ended.code == 2
    assert "--rolle" in ended.stderr
    assert "--role" in ended.stderr


def test_every_fault_is_listed_at_once(home: Path) -> None:
    (home / "network.key").unlink()
    ended = start(
        home,
        *("--role", "executer", "--api", "nowhere", "--bootstrap", "/ip4/1.2.3.4/tcp/1"),
        *("--p2pd", "/no/such/p2pd", "--slots", "0"),
    )
    assert ended.code == 2
    said = ended.sentences
    assert len(said) == 6
    for flag, remedy in {
        "--role": "did you mean executor?",
        "--api": "HOST:PORT",
        "--bootstrap": "/p2p/<peer id>",
        "--p2pd": "does not exist",
        "--slots": "whole number",
        "no network": "lloomctl network create",
    }.items():
        assert [line for line in said if flag in line and remedy in line], (flag, said)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ("no role is given", "--role client")),
        (["--role", "executor"], ("needs what it serves", "--backend URL")),
        (["--role", "client", "--api", "0.0.0.0:0"], ("can be reached by others", "--api-key-file", "--api-open")),
        (["--role", "client", "--p2pd", "/etc"], ("--p2pd", "is not a program")),
        (["--role", "client", "--network-key-file", "/etc/hostname"], ("--network-key-file", "network key")),
        (["--role", "executor", "--model", "/no/such.gguf"], ("--model", "/no/such.gguf does not exist")),
    ],
)
def test_a_setting_that_cannot_be_used(home: Path, args: list[str], words: tuple[str, ...]) -> None:
    ended = start(home, *args)
    assert_says(ended, 2, *words)
    assert len(ended.sentences) == 1


def test_a_p2pd_that_is_not_executable(home: Path) -> None:
    program = home.parent / "p2pd"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o600)
    assert_says(start(home, *CLIENT, "--p2pd", str(program)), 2, "--p2pd", "not executable", "chmod +x")


# ---------------------------------------------------------------- what is in the home
def damaged(path: Path) -> None:
    """One character is another one."""
    data = bytearray(path.read_bytes())
    where = max(data.find(b"current: ") + 9, 20)
    data[where] ^= 1
    path.write_bytes(data)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def rsa(path: Path) -> None:
    """The beginning of what libp2p marshals for an RSA key: type 0, then DER."""
    path.write_bytes(bytes.fromhex("080012a709308204a30201000282010100") + bytes(1187))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def writable_by_all(path: Path) -> None:
    path.chmod(0o666)


@pytest.mark.parametrize("fault", [damaged, directory, rsa, empty, writable_by_all], ids=lambda f: f.__name__)
def test_an_identity_that_cannot_be_used(home: Path, fault: Callable[[Path], None]) -> None:
    fault(home / "identity.key")
    ended = start(home, *CLIENT)
    assert_says(ended, 2, f"{home / 'identity.key'}")
    words: dict[Callable[[Path], None], str] = {
        damaged: "restore it from a copy",
        directory: "is not a file",
        rsa: "not a libp2p Ed25519 private key",
        empty: "not a libp2p Ed25519 private key",
        writable_by_all: "chmod 600",
    }
    assert words[fault] in ended.sentences[0]


@pytest.mark.parametrize("fault", [damaged, directory, empty], ids=lambda f: f.__name__)
def test_a_network_key_that_cannot_be_used(home: Path, fault: Callable[[Path], None]) -> None:
    before = (home / "network.key").read_text()
    fault(home / "network.key")
    ended = start(home, *CLIENT)
    assert_says(ended, 2, str(home / "network.key"))
    words: dict[Callable[[Path], None], str] = {
        damaged: "is damaged",
        directory: "is not a file",
        empty: "is empty",
    }
    assert words[fault] in ended.sentences[0]
    secret = next(line for line in before.splitlines() if line.startswith("current:")).split()[1]
    assert secret not in ended.stderr


def test_a_home_with_other_peoples_things(home: Path) -> None:
    folder = home.parent / "documents"
    folder.mkdir(mode=0o755)
    (folder / "letter.txt").write_text("Dear all")
    ended = start(folder, *CLIENT, "--network-key-file", str(home / "network.key"))
    assert_says(ended, 2, str(folder), "choose a folder of its own with --home")
    assert [path.name for path in folder.iterdir()] == ["letter.txt"]


def test_a_database_of_a_newer_version(home: Path) -> None:
    path = home / "lloom.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE migrations (version INTEGER PRIMARY KEY, applied_at TEXT)")
        connection.execute("INSERT INTO migrations VALUES (9999, '')")
    assert_says(start(home, *CLIENT), 1, str(path), "newer lloom-sidecar", "upgrade")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT version FROM migrations").fetchall() == [(9999,)]
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("migrations",)]


def test_a_database_that_is_none(home: Path) -> None:
    path = home / "lloom.db"
    path.write_bytes(b"this is no database, whatever its name says" * 100)
    before = path.read_bytes()
    assert_says(start(home, *CLIENT), 1, f"{path} is damaged", f"mv {path}")
    assert path.read_bytes() == before


# ---------------------------------------------------------------- busy ports
@contextlib.contextmanager
def busy_port() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


def test_a_busy_api_port(home: Path) -> None:
    with busy_port() as port:
        ended = start(home, "--role", "client", "--api", f"127.0.0.1:{port}", "--listen", "/ip4/127.0.0.1/tcp/0")
    assert_says(ended, 1, f"127.0.0.1:{port}", "--api")


def test_a_busy_libp2p_port(home: Path) -> None:
    with busy_port() as port:
        ended = start(home, "--role", "client", "--api", "127.0.0.1:0", "--listen", f"/ip4/127.0.0.1/tcp/{port}")
    assert_says(ended, 1, f"/ip4/127.0.0.1/tcp/{port}", "another program uses the port", "--listen")


# ---------------------------------------------------------------- p2pd
def script(home: Path, text: str) -> str:
    path = home.parent / "p2pd"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_p2pd_that_ends_at_its_start(home: Path) -> None:
    ours = find_ours()
    program = script(
        home, f'case "$*" in -help|-version) exec {ours} "$@";; esac\necho "the flux is too low" >&2\nexit 3'
    )
    ended = start(home, *CLIENT, "--p2pd", program)
    assert_says(ended, 1, "p2pd ended with exit code 3", "the flux is too low")


def test_a_program_that_is_no_p2pd(home: Path) -> None:
    assert_says(start(home, *CLIENT, "--p2pd", script(home, "exit 0")), 1, "is no libp2p daemon", "--p2pd PATH")


def test_a_p2pd_that_hangs(home: Path) -> None:
    """One that does not even say what it can: given up after 10 s."""
    began_at = time.monotonic()
    ended = start(home, *CLIENT, "--p2pd", script(home, "exec sleep 1000"))
    assert_says(ended, 1, "did not end within 10 s", "--p2pd PATH")
    assert time.monotonic() - began_at < START_S


def test_a_model_file_that_is_none(home: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the extra `local` is not installed")
    path = home.parent / "model.gguf"
    path.write_bytes(b"PK\x03\x04 a zip archive")
    ended = start(home, "--role", "executor", "--model", str(path), "--listen", "/ip4/127.0.0.1/tcp/0")
    assert_says(ended, 1, f"{path} is not a GGUF model file", "--backend URL")
    path.write_bytes(b"GGUF" + bytes(100))
    ended = start(home, "--role", "executor", "--model", str(path), "--listen", "/ip4/127.0.0.1/tcp/0")
    assert_says(ended, 1, f"cannot load {path}")


# ---------------------------------------------------------------- a backend that comes and goes
def test_a_backend_that_comes_later_and_goes_again() -> None:
    with Network(validators=1, executors=1, clients=1, flags=["--heartbeat", "1"]) as network:
        client, (other,) = network.client, network.executors
        late = network.add("executor", start=False)
        backend = network.backends[-1]
        backend.set_models(["late"])
        backend.kill()
        late.start()
        wait_until(lambda: "backend_down" in late.conditions(), "the condition backend_down")
        (condition,) = [one for one in late.status()["conditions"] if one["code"] == "backend_down"]
        assert backend.url in condition["text"]
        assert client.chat("chunks=1", model="late").status_code in (404, 503)
        assert set(client.executors()) == {other.peer}

        backend.start()
        backend.set_models(["late"])
        began_at = time.monotonic()
        network.wait_known(client, [late], timeout_s=CHANGE_S)
        print(f"announced {time.monotonic() - began_at:.3f} s after the backend was up")
        assert "backend_down" not in late.conditions()
        answer = client.chat("chunks=2", model="late")
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-lloom-executor"] == late.peer

        backend.kill()
        began_at = time.monotonic()
        wait_until(
            lambda: client.executors().get(late.peer, {"state": "gone"})["state"] not in ("fresh", "suspect"),
            "the client to know that nothing is offered",
            timeout_s=CHANGE_S,
            explain=lambda: f"{client.log_tail()}\n{late.log_tail()}",
        )
        print(f"withdrawn {time.monotonic() - began_at:.3f} s after the backend was killed")
        assert client.chat("chunks=1", model="late").status_code == 503
        assert "backend_down" in late.conditions()
        assert late.is_running
        # The other executor's model was never touched by this.
        assert client.chat("chunks=1").status_code == 200


# ---------------------------------------------------------------- attached
class Daemon:
    """A p2pd that the test runs, as another container would, with the identity of a home."""

    def __init__(self, folder: Path, home: Path, port: int) -> None:
        key = Key(home / "identity.key", PeerId.parse(str(init_home(home)[0].peer)))
        listen = (Multiaddr.parse(f"/ip4/127.0.0.1/tcp/{port}"),)
        self.settings = settings_for(find_ours(), folder, key, listen=listen)
        self.argv = build_argv(self.settings, trio.run(probe_features, find_ours()))
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def control(self) -> str:
        return f"/unix{self.settings.control_path}"

    def start(self) -> None:
        with self.settings.log_path.open("ab") as log:
            self.process = subprocess.Popen(self.argv, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            if self.process.stdin is not None:
                self.process.stdin.close()
            self.process = None


def test_attached_to_a_p2pd_of_somebody_elses() -> None:
    with Network(validators=1, executors=1, clients=0) as network, tempfile.TemporaryDirectory(prefix="lla-") as folder:
        client = network.add("client", "--p2pd-control", f"/unix{folder}/p2pd.sock", start=False)
        daemon = Daemon(Path(folder), client.home, free_port())
        assert daemon.control == f"/unix{folder}/p2pd.sock"
        try:
            # The sidecar first: containers start in any order.
            client.start(wait=False)
            daemon.start()
            client.wait_up()
            network.wait_known(client, timeout_s=30)
            assert client.status()["p2pd"]["mode"] == "attached"
            assert client.chat("chunks=2").status_code == 200

            daemon.kill()
            wait_until(lambda: "p2pd_down" in client.conditions(), "the condition p2pd_down", timeout_s=CHANGE_S)
            assert client.chat("chunks=1").status_code == 503
            began_at = time.monotonic()
            daemon.start()
            wait_until(lambda: served(client), "the client to serve again", timeout_s=60, explain=client.log_tail)
            print(f"served again {time.monotonic() - began_at:.3f} s after p2pd was back")
            assert "p2pd_down" not in client.conditions()

            assert client.stop() == 0
            assert daemon.process is not None
            assert daemon.process.poll() is None, "it was not this node's to end"
        finally:
            daemon.kill()


def test_attached_to_the_p2pd_that_lloom_sidecar_p2pd_became() -> None:
    """Two containers: one command line, two programs; the node knows what its p2pd can do."""
    with Network(validators=1, executors=1, clients=0) as network, tempfile.TemporaryDirectory(prefix="lla-") as folder:
        control = f"/unix{folder}/p2pd.sock"
        client = network.add("client", "--p2pd-control", control, start=False)
        listen = f"/ip4/127.0.0.1/tcp/{free_port()}"
        argv = p2pd_command(client.home, "--p2pd-control", control, "--listen", listen)
        init_home(client.home)
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
            try:
                client.start()
                network.wait_known(client, timeout_s=30)
                p2pd = client.status()["p2pd"]
                assert p2pd["mode"] == "attached"
                assert "mdns" in p2pd["features"]
                assert client.chat("chunks=2").status_code == 200
            finally:
                client.stop()
                process.terminate()
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        ((), 2, "--p2pd-control says where"),
        (("--p2pd-control", "/unix/there/is/no/p2pd.sock"), 1, "p2pd cannot be started"),
    ],
)
def test_p2pd_that_cannot_be_started(home: Path, flags: tuple[str, ...], code: int, says: str) -> None:
    ended = subprocess.run(p2pd_command(home, *flags), capture_output=True, text=True, timeout=START_S, check=False)
    assert ended.returncode == code
    assert says in ended.stderr


def served(client: Node) -> bool:
    return client.chat("chunks=1").status_code == 200


def test_attached_to_the_p2pd_of_another_identity(home: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lla-") as folder:
        other = Path(folder) / "other"
        init_home(other)
        daemon = Daemon(Path(folder), other, free_port())
        daemon.start()
        try:
            ended = start(home, "--role", "client", "--api", "127.0.0.1:0", "--p2pd-control", daemon.control)
            mine = Signer.from_marshalled((home / "identity.key").read_bytes()).peer
            theirs = Signer.from_marshalled((other / "identity.key").read_bytes()).peer
            assert_says(ended, 1, f"p2pd is {theirs}", f"this node's own key is {mine}", "-id=")
            assert daemon.process is not None
            assert daemon.process.poll() is None
        finally:
            daemon.kill()


def test_the_log_of_a_failed_start_is_json_to_the_end(home: Path) -> None:
    """Whoever collects logs as JSON lines finds nothing else but lines that begin with error."""
    with busy_port() as port:
        ended = start(home, "--role", "client", "--api", f"127.0.0.1:{port}")
    for line in ended.stderr.splitlines():
        assert line.startswith("error: ") or json.loads(line)

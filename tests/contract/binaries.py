"""The real daemons that tests run: where they are, and how one is started without the supervisor.

A missing binary fails the tests that need it: a contract that silently runs against the fake alone proves nothing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from nacl.signing import SigningKey

from lloom_sidecar.errors import LloomError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.daemon import Daemon, Identity
from lloom_sidecar.p2p.launch import STOCK_CONFIG, DaemonSettings, build_argv, is_stock, probe_features

ROOT = Path(__file__).resolve().parents[2]
_START_S = 20.0


def find_ours() -> Path:
    """The package's own p2pd, else ``$LLOOM_P2PD``."""
    packaged = ROOT / "lloom_sidecar" / "_bin" / "p2pd"
    if packaged.is_file():
        return packaged
    named = os.environ.get("LLOOM_P2PD")
    if named and Path(named).is_file():
        return Path(named)
    pytest.fail(f"no p2pd at {packaged} and none named by LLOOM_P2PD: install the package (pip install -e .) first")


def find_upstream() -> Path:
    """``$LLOOM_UPSTREAM_P2PD``, else the unmodified one, built once from the pinned module and kept in the cache."""
    named = os.environ.get("LLOOM_UPSTREAM_P2PD")
    if named:
        if not Path(named).is_file():
            pytest.fail(f"LLOOM_UPSTREAM_P2PD names {named}, which is no file")
        return Path(named)
    source = ROOT / "tests" / "upstream_p2pd"
    pins = hashlib.sha256((source / "go.mod").read_bytes() + (source / "go.sum").read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lloom" / "test"
    binary = cache / f"p2pd-upstream-{pins}"
    if not binary.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        script = ROOT / "tools" / "go.sh"
        go = os.fspath(script) if script.is_file() else shutil.which("go")
        if go is None:
            pytest.fail("the upstream p2pd has to be built and there is no go: set LLOOM_UPSTREAM_P2PD to a built one")
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / "p2pd"
            done = subprocess.run(
                [go, "build", "-trimpath", "-o", os.fspath(made), "github.com/libp2p/go-libp2p-daemon/p2pd"],
                cwd=source,
                env={**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod"},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                pytest.fail(f"the upstream p2pd does not build: {done.stderr[-2000:]}")
            made.replace(binary)
    return binary


@pytest.fixture(scope="session")
def p2pd_ours() -> Path:
    """Lloom's p2pd."""
    return find_ours()


@pytest.fixture(scope="session")
def p2pd_upstream() -> Path:
    """The unmodified upstream p2pd."""
    return find_upstream()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path is short enough for sockets, which pytest's own is not always."""
    with tempfile.TemporaryDirectory(prefix="lloom-") as name:
        yield Path(name)


@dataclass(frozen=True)
class Key:
    """A node's identity in a file as p2pd reads it."""

    path: Path
    peer: PeerId


def make_key(directory: Path) -> Key:
    """A fresh Ed25519 identity. Source of the form: libp2p's PrivateKey message, type 1, 64 bytes."""
    signing = SigningKey.generate()
    public = bytes(signing.verify_key)
    path = directory / "identity.key"
    path.touch(mode=0o600)
    path.write_bytes(bytes.fromhex("08011240") + bytes(signing) + public)
    return Key(path, PeerId.from_ed25519(public))


def settings_for(binary: Path, directory: Path, key: Key, **changes: object) -> DaemonSettings:
    """Settings of a quiet local node: a free TCP port on loopback, DHT server, a quick heartbeat."""
    base = DaemonSettings(
        binary=binary,
        run_dir=directory,
        identity_file=key.path,
        listen=(Multiaddr.parse("/ip4/127.0.0.1/tcp/0"),),
        dht_mode="server",
        heartbeat_s=0.5,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


class RealNode:
    """A p2pd process that lasts for several tests, so it is started and ended outside any event loop."""

    def __init__(self, binary: Path, *, control: str | None = None, **changes: object) -> None:
        """``control``: another control address than the unix socket in its own directory; ``changes``: settings."""
        self.directory = Path(tempfile.mkdtemp(prefix="lloom-"))
        key = make_key(self.directory)
        self.peer = key.peer
        settings = settings_for(binary, self.directory, key, **changes)
        features = trio.run(probe_features, binary)
        argv = build_argv(settings, features)
        if is_stock(features):
            settings.stock_config_path.write_text(STOCK_CONFIG, encoding="ascii")
        self.control = Multiaddr.parse(control or f"/unix{settings.control_path}")
        argv = [f"-listen={self.control}" if arg.startswith("-listen=") else arg for arg in argv]
        with settings.log_path.open("wb") as log:
            self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            self.identity: Identity = trio.run(self._wait)
        except BaseException:
            self.stop()
            raise

    async def _wait(self) -> Identity:
        daemon = Daemon(self.control)
        with trio.fail_after(_START_S):
            while True:
                try:
                    identity = await daemon.identify()
                    if not await daemon.missing_services():
                        return identity
                except LloomError:
                    pass
                finally:
                    daemon.close()
                daemon = Daemon(self.control)
                await trio.sleep(0.02)

    def stop(self) -> None:
        """End it and remove its directory."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def free_port() -> int:
    """A TCP port on loopback that nobody has now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])

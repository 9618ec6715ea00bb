"""A private container engine for tests, from nothing, on a bare Debian 12 machine. Needs root.

What it makes, and where:

- ``dockerd`` with its own socket, process folder and pid file in ``/run/lloom-engine``; they go away with it. It adds
  no firewall rule, no default bridge and no sysctl. Networks of a compose project work (names, publishing on
  127.0.0.1), but have no way out, so images are built on the host's network (``compose.engine.yml``).
- Everything that is worth keeping in ``~/.cache/lloom/engine``: the engine's data (images, build cache) and the compose
  plugin. Delete that folder, when no engine runs, to start from nothing.
- Stand-ins of the base images that the Dockerfile names, made from Debian's own packages, because a test must not
  depend on a registry of images. ``LLOOM_TEST_PULL_BASES=1`` pulls the real ones instead.

By hand::

    eval "$(python3 tests/system/engine/engine.py up)"    # then: docker compose up --build --wait
    python3 tests/system/engine/engine.py down

Tests use :func:`running_engine`. Standard library only. Where PATH has no new Go, `make install` comes first.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]

RUN_DIR = Path("/run/lloom-engine")
"""Short, because it holds unix sockets (108 bytes at most), and in memory."""

LOCK_FILE = Path("/run/lloom-engine.lock")

COMPOSE_OVERRIDE = HERE / "compose.engine.yml"
"""Give it to compose as a second file: the build then uses the host's network."""

PYTHON_IMAGE = "python:3.11-slim-bookworm"
GO_IMAGE = "golang:1.26-bookworm"
"""The names in deploy/Dockerfile."""

STANDIN_LABEL = "lloom.standin"

COMPOSE_VERSION = "v2.40.3"
"""As in compose_plugin/go.mod; newer ones need a newer engine than Debian 12's."""

KEEP_BUILD_CACHE = "6GB"

LOCK_TIMEOUT_S = 1200.0
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0

STANDIN_RECIPE = 3
"""Count it up when the way that stand-ins are made changes."""

GO_TREE_LEFT_OUT = ("test", "doc", "api", "misc", "pkg/obj")
"""Folders of a Go installation that no build reads."""


class EngineError(RuntimeError):
    """The engine cannot be used; the message says why, with the end of the log that tells more."""


@dataclass(frozen=True)
class Engine:
    """A running engine."""

    socket: Path
    """The API's unix socket."""

    config_dir: Path
    """The docker command's own configuration, with the compose plugin."""

    docker: str
    """The docker command."""

    @property
    def host(self) -> str:
        """What DOCKER_HOST is set to."""
        return f"unix://{self.socket}"

    def variables(self) -> dict[str, str]:
        """Return what the docker command, compose and the SDK need in the environment to find this engine."""
        return {
            "DOCKER_HOST": self.host,
            "DOCKER_CONFIG": str(self.config_dir),
            "DOCKER_BUILDKIT": "1",
            "COMPOSE_BAKE": "false",  # would need the buildx plugin; compose has a builder of its own
            "COMPOSE_FILE": f"{ROOT / 'docker-compose.yml'}:{COMPOSE_OVERRIDE}",
        }

    def environment(self) -> dict[str, str]:
        """Return this process's environment, pointed at this engine and at no other."""
        others = (
            "DOCKER_CONTEXT",
            "DOCKER_TLS_VERIFY",
            "DOCKER_CERT_PATH",
            "COMPOSE_PROJECT_NAME",
            "COMPOSE_PROFILES",
            "COMPOSE_ENV_FILES",
        )
        return {name: value for name, value in os.environ.items() if name not in others} | self.variables()

    def run(self, *arguments: str, check: bool = True, timeout_s: float = 300) -> str:
        """Run the docker command and return its output.

        Raises:
            EngineError: it fails and ``check`` is set, or it takes longer than ``timeout_s``.

        """
        return run(
            [self.docker, *arguments], environment=self.environment(), cwd=ROOT, check=check, timeout_s=timeout_s
        )


def say(text: str) -> None:
    """Tell a person what is going on."""
    print(f"engine: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Say what took how long."""
    started = time.monotonic()
    yield
    say(f"{what}: {time.monotonic() - started:.1f} s")


def run(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    timeout_s: float,
) -> str:
    """Run a command without input and return what it prints.

    Raises:
        EngineError: it fails and ``check`` is set, or it takes longer than ``timeout_s``.

    """
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise EngineError(f"`{shlex.join(command)}` took longer than {timeout_s:.0f} s") from exc
    except OSError as exc:
        raise EngineError(f"`{command[0]}` cannot be run: {exc}") from exc
    if check and done.returncode != 0:
        raise EngineError(
            f"`{shlex.join(command)}` failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-2000:]}"
        )
    return done.stdout


def cache_dir() -> Path:
    """Return the folder of everything that outlives the engine."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    path = Path(base) / "lloom" / "engine"
    path.mkdir(parents=True, exist_ok=True)
    return path


def docker_command() -> str:
    """Return the docker command.

    Raises:
        EngineError: there is none.

    """
    command = shutil.which("docker")
    if command is None:
        raise EngineError("there is no docker command, even after installing packages")
    return command


# Go and the compose plugin


def find_go() -> tuple[str, dict[str, str]]:
    """Return the go command that this checkout uses, and the environment for it.

    Raises:
        EngineError: there is none.

    """
    go = run([str(ROOT / "tools" / "go.sh"), "--find"], timeout_s=600).strip()
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOROOT", "GOOS", "GOARCH", "GO111MODULE")
    }
    environment.update(CGO_ENABLED="0", GOTOOLCHAIN="local", GOFLAGS="-mod=readonly", GOWORK="off")
    environment["GOROOT"] = run([go, "env", "GOROOT"], environment=environment, cwd=Path("/"), timeout_s=60).strip()
    return go, environment


def ensure_compose(config_dir: Path) -> None:
    """Build the compose plugin in its exact version into the docker command's configuration, once."""
    source = HERE / "compose_plugin"
    plugin = config_dir / "cli-plugins" / "docker-compose"
    stamp = config_dir / "docker-compose.sum"
    digest = hashlib.sha256(
        COMPOSE_VERSION.encode() + (source / "go.mod").read_bytes() + (source / "go.sum").read_bytes()
    ).hexdigest()
    if os.access(plugin, os.X_OK) and stamp.exists() and stamp.read_text() == digest:
        return
    plugin.parent.mkdir(parents=True, exist_ok=True)
    go, environment = find_go()
    flags = f"-s -w -X github.com/docker/compose/v2/internal.Version={COMPOSE_VERSION}"
    target = plugin.with_name("docker-compose.new")
    with timed(f"compose plugin {COMPOSE_VERSION}, once"):
        run(
            [
                go,
                "build",
                "-trimpath",
                "-buildvcs=false",
                "-ldflags",
                flags,
                "-o",
                str(target),
                "github.com/docker/compose/v2/cmd",
            ],
            environment=environment,
            cwd=source,
            timeout_s=1200,
        )
    os.replace(target, plugin)
    stamp.write_text(digest)


# Stand-ins of the base images


def host_ca_bundle() -> Path:
    """Return the bundle of certificates that this machine trusts."""
    return Path(os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")


def build_variables() -> dict[str, str]:
    """Return how this machine reaches package indexes, for builds to do it the same way; empty on most machines."""
    names = (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "PIP_INDEX_URL",
        "PIP_EXTRA_INDEX_URL",
    )
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def apt_options() -> list[str]:
    """Return this machine's apt settings that decide whether a mirror can be used."""
    options = []
    for name in ("Acquire::Check-Valid-Until", "Acquire::Check-Date", "Acquire::http::Proxy", "Acquire::https::Proxy"):
        value = run(["apt-config", "shell", "V", name], timeout_s=30).strip()
        if value:
            options.append(f'{name} "{shlex.split(value)[0].partition("=")[2]}"')
    return options


def has_standin(engine: Engine, image: str, key: str) -> bool:
    """Tell whether the engine has this stand-in, made in the same way."""
    label = engine.run(
        "image", "inspect", "--format", f'{{{{index .Config.Labels "{STANDIN_LABEL}"}}}}', image, check=False
    )
    return label.strip() == key


def changes(variables: Mapping[str, str], key: str, *more: str) -> list[str]:
    """Return ``--change`` arguments that give an image its environment and label."""
    lines = [f"ENV {name}={json.dumps(value)}" for name, value in variables.items()]
    lines += [f"LABEL {STANDIN_LABEL}={key}", *more]
    return [argument for line in lines for argument in ("--change", line)]


def ensure_python(engine: Engine) -> str:
    """Make the stand-in of the Python image, if the engine lacks it: Debian's Python, under the real image's names.

    Returns:
        Its key, which changes with its content.

    """
    bundle = host_ca_bundle()
    options = apt_options()
    variables = build_variables() | {
        "PATH": "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
        "PIP_CERT": "/etc/ssl/certs/ca-certificates.crt",
    }
    parts = repr((STANDIN_RECIPE, PYTHON_IMAGE, variables, options)).encode() + bundle.read_bytes()
    key = hashlib.sha256(parts).hexdigest()[:16]
    if has_standin(engine, PYTHON_IMAGE, key):
        return key
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--include=ca-certificates,python3,python3-venv,libpython3-stdlib",
    ]
    for option in options:
        command += ["--aptopt", option]
    command += [
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        f"--customize-hook=upload {shlex.quote(str(bundle))} /etc/ssl/certs/ca-certificates.crt",
        '--customize-hook=ln -s /usr/bin/python3 "$1/usr/local/bin/python"',
        '--customize-hook=ln -s /usr/bin/python3 "$1/usr/local/bin/python3"',
        "bookworm",
        "-",
    ]
    load = [engine.docker, "import", *changes(variables, key, 'CMD ["python3"]'), "-", PYTHON_IMAGE]
    with timed(f"stand-in {PYTHON_IMAGE}, once"):
        pipe(command, load, engine.environment(), timeout_s=900)
    return key


def pipe(producer: Sequence[str], consumer: Sequence[str], environment: Mapping[str, str], *, timeout_s: float) -> None:
    """Run one command into another.

    Raises:
        EngineError: either fails, or both together take longer than ``timeout_s``.

    """
    log = RUN_DIR / "producer.log"
    with log.open("wb") as errors:
        first = subprocess.Popen(producer, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
        try:
            second = subprocess.run(
                consumer,
                env=environment,
                stdin=first.stdout,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
            code = first.wait(timeout=60)
        except subprocess.TimeoutExpired as exc:
            raise EngineError(
                f"`{producer[0]}` into `{shlex.join(consumer[:2])}` took longer than {timeout_s:.0f} s"
            ) from exc
        finally:
            if first.poll() is None:
                first.kill()
                first.wait()
            if first.stdout:
                first.stdout.close()
    if code != 0:
        raise EngineError(f"`{shlex.join(producer)}` failed ({code}): {tail(log)}")
    if second.returncode != 0:
        raise EngineError(f"`{shlex.join(consumer[:2])}` failed: {second.stderr.strip()[-2000:]}")


def ensure_go(engine: Engine, python_key: str) -> None:
    """Make the stand-in of the Go image, if the engine lacks it: the Python one and this machine's Go."""
    go, environment = find_go()
    names = ("GOROOT", "GOVERSION", "GOPROXY", "GOSUMDB", "GONOSUMDB", "GOPRIVATE", "GOINSECURE")
    told = json.loads(run([go, "env", "-json", *names], environment=environment, cwd=Path("/"), timeout_s=60))
    variables = {
        "PATH": "/go/bin:/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "GOPATH": "/go",
        "GOTOOLCHAIN": "local",
    }
    variables |= {name: told[name] for name in names[2:] if told.get(name)}
    key = hashlib.sha256(repr((STANDIN_RECIPE, python_key, told, GO_TREE_LEFT_OUT)).encode()).hexdigest()[:16]
    if has_standin(engine, GO_IMAGE, key):
        return
    with timed(f"stand-in {GO_IMAGE}, once"):
        container = engine.run("create", PYTHON_IMAGE, "true").strip()
        try:
            copy_tree(engine, Path(told["GOROOT"]), f"{container}:/usr/local")
            engine.run("commit", *changes(variables, key, "WORKDIR /go"), container, GO_IMAGE)
        finally:
            engine.run("rm", "-f", container)


def copy_tree(engine: Engine, goroot: Path, target: str) -> None:
    """Stream a Go installation into a container, as a folder ``go``."""

    def choose(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        return None if entry.name.removeprefix("go/") in GO_TREE_LEFT_OUT else entry

    command = [engine.docker, "cp", "-", target]
    with subprocess.Popen(command, env=engine.environment(), stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        fault = ""
        try:
            with tarfile.open(fileobj=process.stdin, mode="w|") as archive:
                archive.add(goroot, arcname="go", filter=choose)
            process.stdin.close()
        except BrokenPipeError:
            fault = "it ended early"
        errors = process.stderr.read().decode(errors="replace").strip()
        if process.wait() != 0 or fault:
            raise EngineError(f"`{shlex.join(command)}` failed: {errors or fault}")


def ensure_images(engine: Engine) -> None:
    """Have both base images, as stand-ins or, with LLOOM_TEST_PULL_BASES=1, the real ones."""
    if os.environ.get("LLOOM_TEST_PULL_BASES", "").lower() in ("1", "true", "yes"):
        for image in (PYTHON_IMAGE, GO_IMAGE):
            with timed(f"pull {image}"):
                engine.run("pull", "--quiet", image, timeout_s=600)
        return
    ensure_go(engine, ensure_python(engine))


# The engine's life


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    return "(no log)"


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=5)
        self.path = path

    def connect(self) -> None:
        """Connect to the socket instead of an address."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self.path))


def answers(api: Path) -> bool:
    """Tell whether an engine answers on this socket."""
    connection = UnixConnection(api)
    try:
        connection.request("GET", "/_ping")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def current() -> Engine:
    """Return the engine of this machine, whether it runs or not."""
    return Engine(socket=RUN_DIR / "docker.sock", config_dir=cache_dir() / "docker", docker=docker_command())


def start(*, outlive: bool) -> Engine:
    """Start the engine and return it when it answers.

    Args:
        outlive: let it run on after this process; otherwise the kernel ends it with the calling thread, however that
            dies.

    Raises:
        EngineError: it ends or stays silent.

    """
    clear_leftovers()
    RUN_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = current()
    engine.config_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        "hosts": [engine.host],
        "data-root": str(cache_dir() / "data"),
        "exec-root": str(RUN_DIR / "exec"),
        "pidfile": str(RUN_DIR / "docker.pid"),
        "bridge": "none",
        "iptables": False,
        "ip6tables": False,
        "ip-forward": False,
        "ip-masq": False,
        "log-level": "warn",
        "builder": {"gc": {"enabled": True, "defaultKeepStorage": KEEP_BUILD_CACHE}},
    }
    config = RUN_DIR / "daemon.json"
    config.write_text(json.dumps(settings, indent=2))
    log = RUN_DIR / "dockerd.log"
    dockerd = shutil.which("dockerd") or "/usr/sbin/dockerd"
    command = [dockerd, "--config-file", str(config)]
    # Where the machine has a containerd, dockerd uses it: keep apart from the machine's own dockerd there.
    command += ["--containerd-namespace", "lloom-engine", "--containerd-plugins-namespace", "lloom-engine-plugins"]
    if not outlive:
        command = ["setpriv", "--pdeathsig", "TERM", *command]
    with timed("dockerd answers"), log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        except OSError as exc:
            raise EngineError(f"{dockerd} cannot be run: {exc}") from exc
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(engine.socket):
            try:
                code = process.wait(timeout=0.05)
            except subprocess.TimeoutExpired:
                code = None
            if code is not None or time.monotonic() > deadline:
                what = "stays silent" if code is None else f"ended with {code}"
                end_process(process.pid, "dockerd")
                raise EngineError(f"dockerd {what}: {tail(log)}")
    # The process is a child: without somebody who waits for it, its end would leave a zombie and `end_process` waiting.
    threading.Thread(target=process.wait, daemon=True, name="dockerd reaper").start()
    return engine


def command_line(pid: int) -> str:
    """Return a process's command line; empty when it is gone or a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def end_process(pid: int, name: str) -> None:
    """End one process of this engine: asked first, killed when it does not listen. Another process is never touched."""

    def lives() -> bool:
        line = command_line(pid)
        return name in line and str(RUN_DIR) in line

    for how, patience_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 10.0)):
        if not lives():
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
        deadline = time.monotonic() + patience_s
        pause = threading.Event()
        while lives() and time.monotonic() < deadline:
            pause.wait(0.02)


def clear_leftovers() -> None:
    """End what an interrupted run left behind, and remove its folder."""
    for name, file in (("dockerd", RUN_DIR / "docker.pid"), ("containerd", RUN_DIR / "exec/containerd/containerd.pid")):
        with contextlib.suppress(OSError, ValueError):
            end_process(int(file.read_text()), name)
    for shim in Path("/proc").glob("[0-9]*"):
        line = command_line(int(shim.name))
        if "containerd-shim" in line and str(RUN_DIR) in line:
            end_process(int(shim.name), "containerd-shim")
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in reversed([m for m in mounts if m.startswith((f"{RUN_DIR}/", f"{cache_dir()}/data/"))]):
        run(["umount", "--lazy", mount], check=False, timeout_s=30)
    shutil.rmtree(RUN_DIR, ignore_errors=True)


def stop(engine: Engine) -> None:
    """Remove all containers, volumes and networks, end the engine, and leave only the cache."""
    if answers(engine.socket):
        with contextlib.suppress(EngineError):
            containers = engine.run("ps", "-aq").split()
            if containers:
                engine.run("rm", "-fv", *containers)
            volumes = engine.run("volume", "ls", "-q").split()
            if volumes:
                engine.run("volume", "rm", "-f", *volumes)
            engine.run("network", "prune", "-f")
            engine.run("image", "prune", "-f")  # what earlier builds of the same name left
    with timed("engine ends"):
        clear_leftovers()


@contextlib.contextmanager
def machine_lock() -> Iterator[None]:
    """One engine at a time on a machine: they would share the cache.

    Raises:
        EngineError: another run holds it for longer than LOCK_TIMEOUT_S.

    """
    with LOCK_FILE.open("w") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        pause, waiting = threading.Event(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() > deadline:
                    raise EngineError(f"another test run has held the engine for {LOCK_TIMEOUT_S:.0f} s") from exc
                if not waiting:
                    say("waiting for another run's engine")
                    waiting = True
                pause.wait(0.5)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def prepare() -> None:
    """Install packages that are missing.

    Raises:
        EngineError: not root, or apt fails.

    """
    if os.geteuid() != 0:
        raise EngineError("a container engine needs root: run these tests as root, or without them: -m 'not docker'")
    run(["bash", str(HERE / "install.sh")], timeout_s=900)


def bring_up(*, outlive: bool) -> Engine:
    """Have everything: packages, plugin, engine, images."""
    prepare()
    ensure_compose(current().config_dir)
    engine = start(outlive=outlive)
    try:
        ensure_images(engine)
    except BaseException:
        stop(engine)
        raise
    return engine


@contextlib.contextmanager
def running_engine() -> Iterator[Engine]:
    """Yield an engine with the compose plugin and the base images; end it afterwards.

    One that `engine.py up` started is used as it is and left running, for a quick second look by hand.

    Raises:
        EngineError: it cannot be had; tests fail then, they do not skip.

    """
    with machine_lock():
        if (RUN_DIR / "keep").exists() and answers(RUN_DIR / "docker.sock"):
            yield current()
            return
        engine = bring_up(outlive=False)
        try:
            yield engine
        finally:
            stop(engine)


def main() -> int:
    """Start or end the engine by hand."""
    parser = argparse.ArgumentParser(description="A private container engine for tests. Needs root.")
    parser.add_argument("action", choices=("up", "down", "logs"))
    action = parser.parse_args().action
    try:
        if action == "logs":
            print(tail(RUN_DIR / "dockerd.log", 200))
            return 0
        with machine_lock():
            if action == "down":
                stop(current())
                return 0
            engine = current() if answers(RUN_DIR / "docker.sock") else bring_up(outlive=True)
            (RUN_DIR / "keep").touch()
    except EngineError as exc:
        say(str(exc))
        return 1
    for name, value in engine.variables().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

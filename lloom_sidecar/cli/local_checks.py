"""The checks of ``doctor`` that need no node: the home's files, the p2pd program, the ports. They change nothing."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import socket
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lloom_sidecar.admin.doctor import Finding, finding
from lloom_sidecar.config import Config, HostPort, load_config
from lloom_sidecar.errors import ConfigError, StartError
from lloom_sidecar.identity import IDENTITY_NAME
from lloom_sidecar.ids import Multiaddr

if TYPE_CHECKING:
    from lloom_sidecar.admin.view import Status

_OTHERS: Final = 0o077
_NO_ROLE: Final = "no role is given"
"""Usual: the role is a flag of `lloom-sidecar run`."""
_NO_NETWORK: Final = "belongs to no network"
_SERVES_NOTHING: Final = "an executor needs what it serves"


@dataclass(frozen=True, slots=True)
class LocalFacts:
    """The home, and the node that runs in it."""

    home: Path
    status: Status | None
    """None when none answers."""


def check_home_files(facts: LocalFacts) -> list[Finding]:
    """The folder and the two keys."""
    home = _home(facts.home)
    if not facts.home.is_dir():
        return [home, *(finding(name, "skipped", "there is no home") for name in ("identity", "network_key"))]
    return [home, _identity(facts), _network_key(facts)]


def _home(home: Path) -> Finding:
    try:
        info = home.stat()
    except FileNotFoundError:
        return finding("home", "error", f"{home} does not exist", f"Run `lloom-sidecar init --home {home}`.")
    except OSError as exc:
        return finding(
            "home", "error", f"{home} cannot be looked at ({_reason(exc)})", "Run doctor as the node's user."
        )
    if not stat.S_ISDIR(info.st_mode):
        return finding("home", "error", f"{home} is not a folder", "Name another with --home.")
    if info.st_uid != os.geteuid():
        text = f"{home} belongs to uid {info.st_uid}, and this is uid {os.geteuid()}"
        return finding("home", "error", text, "Run doctor, and the node, as that user.")
    if not os.access(home, os.R_OK | os.W_OK | os.X_OK):
        return finding("home", "error", f"{home} cannot be written", f"chmod 700 {home}; is the disk read-only?")
    if info.st_mode & _OTHERS:
        text = f"{home} is open to others (mode {stat.S_IMODE(info.st_mode):04o})"
        return finding("home", "warning", text, f"chmod 700 {home}")
    return finding("home", "ok", f"{home} is private")


def _identity(facts: LocalFacts) -> Finding:
    from lloom_sidecar.protocol.envelope import Signer

    path = facts.home / IDENTITY_NAME
    data, problem = _read_key("identity", path, f"Run `lloom-sidecar init --home {facts.home}`.")
    if problem is not None and data is None:
        return problem
    assert data is not None  # else there is a problem
    try:
        peer = str(Signer.from_marshalled(data).peer)
    except ConfigError as exc:
        remedy = "Restore it from a copy, or move it away and run `lloom-sidecar init` (the node gets another peer id)."
        return finding("identity", "error", f"{path} cannot be used: {exc.message}", remedy)
    if facts.status is not None and facts.status["peer"] != peer:
        text = f"{path} is of {peer[-8:]}, the running node is {facts.status['peer'][-8:]}"
        return finding(
            "identity", "error", text, "Restart the node if the key was changed; check --home if it was not."
        )
    return problem or finding("identity", "ok", peer)


def _network_key(facts: LocalFacts) -> Finding:
    from lloom_sidecar.protocol.network_key import parse_key_file

    status = facts.status
    path = facts.home / "network.key"
    if status is None and not path.exists():
        text = f"{path} does not exist: the home belongs to no network"
        remedy = (
            "Run `lloomctl network create`, or `lloomctl network join FILE`; fine with --network-key-file or --open."
        )
        return finding("network_key", "warning", text, remedy)
    if status is not None and not path.exists():
        if status["network"]["id"] is not None:
            return finding("network_key", "ok", "the node's key is elsewhere (--network-key-file)")
        return finding(
            "network_key", "info", "the node belongs to no network", "`lloomctl network join FILE`, restart."
        )
    data, problem = _read_key("network_key", path, "Run `lloomctl network create` or `lloomctl network join FILE`.")
    if data is None:
        assert problem is not None
        return problem
    try:
        network = parse_key_file(data).current.network_id.hex()
    except ConfigError as exc:
        remedy = "Restore it from a copy, or join again: `lloomctl network join FILE --replace`."
        return finding("network_key", "error", f"{path} cannot be used: {exc.message}", remedy)
    if status is not None and status["network"]["id"] not in (None, network):
        text = f"{path} is of network {network[:16]}, the running node of {(status['network']['id'] or '')[:16]}"
        return finding("network_key", "warning", text, "Restart the node, so that it takes the key in its home.")
    return problem or finding("network_key", "ok", f"network {network[:16]}...")


def _read_key(check: str, path: Path, missing: str) -> tuple[bytes | None, Finding | None]:
    """(its bytes, what is wrong with the file); a mode that is too wide is a warning, and the bytes are there."""
    try:
        info = path.stat()
        data = path.read_bytes()[: 64 * 1024]
    except FileNotFoundError:
        return None, finding(check, "error", f"{path} does not exist", missing)
    except OSError as exc:
        return None, finding(check, "error", f"{path} cannot be read ({_reason(exc)})", f"chown and chmod 600 {path}")
    if info.st_mode & _OTHERS:
        text = f"{path} can be read by others (mode {stat.S_IMODE(info.st_mode):04o})"
        return data, finding(check, "warning", text, f"chmod 600 {path}; if others had access, make a new key.")
    return data, None


def read_settings(home_option: str | None) -> tuple[Config | None, Finding]:
    """The settings as the next start would see them, without its flags; None when they cannot be used."""
    # What is usually a flag is filled in; the network key has a check of its own.
    for more in ({}, {"roles": ("validator",)}, {"roles": ("validator",), "open": True}):
        try:
            config = load_config({"home": home_option, **more})
        except ConfigError as exc:
            faults = [one for one in exc.faults if not one.startswith((_NO_ROLE, _SERVES_NOTHING))]
            faults = [one for one in faults if _NO_NETWORK not in one]
            if faults or "open" in more:
                text = "; ".join(faults[:3])
                return None, finding("settings", "error", text, "`lloomctl config check` lists every fault.")
        else:
            where = (
                f"{config.config_file} and the environment" if config.config_file else "defaults and the environment"
            )
            if config.warnings:
                text = "; ".join(config.warnings)
                return config, finding("settings", "warning", text, "`lloomctl config check` shows them.")
            return config, finding("settings", "ok", where)
    raise AssertionError("the loop returns")


def check_binary(config: Config | None) -> Finding:
    """The p2pd that a start would use. Runs it twice, with -help and -version."""
    import trio

    from lloom_sidecar import __version__
    from lloom_sidecar.node.daemon import find_p2pd
    from lloom_sidecar.p2p.launch import is_stock, probe_features, probe_version

    async def probe(path: Path) -> tuple[frozenset[str], str | None]:
        features = await probe_features(path)
        return features, await probe_version(path, features)

    if config is not None and config.is_attached:
        return finding("binary", "ok", f"p2pd is somebody else's, at {config.p2pd_control}")
    try:
        path = find_p2pd(None if config is None else config.p2pd)
        features, version = trio.run(probe, path)
    except StartError as exc:
        text, _, remedy = exc.message.partition(": ")
        return finding("binary", "error", text, remedy[:1].upper() + remedy[1:] or "Install lloom-sidecar again.")
    if is_stock(features):
        return finding("binary", "info", f"{path} is an unmodified p2pd", "Leave out --p2pd to use the package's.")
    if _is_older_than_sources(path):
        text = f"{path} was compiled from other sources than daemon/ holds now"
        return finding("binary", "warning", text, "Run `make install`, then restart the node.")
    number = re.search(r"\d+\.\d+\.\d+\S*", version or "")
    if number is not None and number[0] != __version__:
        text = f"{path} is version {number[0]}, lloom-sidecar {__version__}"
        return finding(
            "binary", "warning", text, "Install lloom-sidecar again: its wheel carries the p2pd that suits it."
        )
    return finding("binary", "ok", f"{path}: {(version or '').partition(' (')[0]}")


def _is_older_than_sources(binary: Path) -> bool:
    """In a checkout: the binary's stamp does not fit ``daemon/``. A wheel has no stamp."""
    root = binary.parent.parent.parent
    script = root / "hatch_build.py"
    if not binary.with_name("p2pd.sources").is_file() or not script.is_file():
        return False
    spec = importlib.util.spec_from_file_location("lloom_hatch_build", script)
    if spec is None or spec.loader is None:
        return False
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return not module.P2pdBuild(root).is_current()
    except (ImportError, AttributeError, OSError):
        return False


def check_ports(
    config: Config | None, *, binds: Callable[[int, str, int], OSError | None] | None = None
) -> list[Finding]:
    """Whether a start could listen where the settings say. Only sensible while no node runs."""
    if config is None:
        return [finding("ports", "skipped", "the settings cannot be used")]
    binds = binds or try_bind
    busy, tried = [], []
    for flag, kind, host, port in _places(config):
        if port == 0:
            continue
        name = f"{HostPort(host, port)}/{'tcp' if kind == socket.SOCK_STREAM else 'udp'}"
        problem = binds(kind, host, port)
        tried.append(name)
        if problem is not None:
            cause = "is taken" if problem.errno == errno.EADDRINUSE else f"cannot be used ({_reason(problem)})"
            remedy = f"End who listens there (`ss -lntup`), or choose another with {flag}."
            busy.append(finding("ports", "error", f"{name} {cause}", remedy))
    return busy or [finding("ports", "ok", f"free: {', '.join(dict.fromkeys(tried)) or 'any'}")]


def _places(config: Config) -> Iterable[tuple[str, int, str, int]]:
    if not config.is_attached:
        for addr in config.listen:
            yield from _place(addr)
    # A role that read_settings filled in says nothing: a client's port is looked at then.
    if config.is_client or config.sources.get("roles") == "flag":
        yield "--api", socket.SOCK_STREAM, config.api.host, config.api.port
    if config.probe is not None:
        yield "--probe", socket.SOCK_STREAM, config.probe.host, config.probe.port
    if config.page is not None:
        yield "--page", socket.SOCK_STREAM, config.page.host, config.page.port


def _place(addr: Multiaddr) -> Iterable[tuple[str, int, str, int]]:
    found = re.match(r"/ip[46]/([^/]+)/(tcp|udp)/(\d+)", str(addr))
    if found is not None:
        kind = socket.SOCK_STREAM if found[2] == "tcp" else socket.SOCK_DGRAM
        yield "--listen", kind, found[1], int(found[3])


def try_bind(kind: int, host: str, port: int) -> OSError | None:
    """Bind and let go; the error when that fails."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, kind) as one:
            if kind == socket.SOCK_STREAM:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port that was just left looks taken
            one.bind((host, port))
            if kind == socket.SOCK_STREAM:
                one.listen(1)
    except OSError as exc:
        return exc
    return None


def _reason(exc: OSError) -> str:
    return (exc.strerror or type(exc).__name__).lower()

"""How p2pd is started: its settings, what a binary can do, and the command line that follows from both."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

import trio

from lloom_sidecar.errors import ConfigError, StartError
from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.p2p.connector import check_socket_path, unix_multiaddr

FEATURE_STDIN_EOF: Final = "exitOnStdinEOF"
"""The flag that tells Lloom's own p2pd from a stock one: it ends with the process that started it."""
STOCK_MAX_STREAMS: Final = 48
"""Inbound streams per protocol and peer to promise with a stock p2pd. Source: its limit of 64, less margin."""
_NEEDED_FLAGS: Final = frozenset({"listen", "id", "hostAddrs", "dhtServer", "dhtClient", "pubsub", "noise"})
_PROBE_DEADLINE_S: Final = 10.0
"""``-help`` takes 12 ms; a busy machine may take a thousand times as long."""
_FLAG_LINE: Final = re.compile(r"^ {2}-(\w+)", re.MULTILINE)
_MAX_HELP_CHARS: Final = 200_000
_MAX_NOTE_BYTES: Final = 64 * 1024

DhtMode = Literal["server", "client", "auto", "off"]
Reachability = Literal["public", "private"]

DEFAULT_LISTEN: Final = (
    Multiaddr.parse("/ip4/0.0.0.0/tcp/4001"),
    Multiaddr.parse("/ip4/0.0.0.0/udp/4001/quic-v1"),
)


@dataclass(frozen=True)
class DaemonSettings:
    """What a managed p2pd is started with. Settings that a binary has no flag for are left out for it."""

    binary: Path
    """The p2pd to start."""
    run_dir: Path
    """Existing directory, 0700, for the control socket, the log and the process record."""
    identity_file: Path
    """The node's libp2p-marshalled private key."""
    listen: tuple[Multiaddr, ...] = DEFAULT_LISTEN
    """Addresses to accept connections at; empty = none. A stock p2pd gets those on TCP only."""
    announce: tuple[Multiaddr, ...] = ()
    """Addresses to tell others instead of the observed ones; empty = the observed ones."""
    dht_mode: DhtMode = "auto"
    """``server`` answers others' lookups, ``client`` only asks, ``auto`` follows reachability."""
    heartbeat_s: float = 10.0
    """Gossipsub's heartbeat. Source: the seed's setting."""
    gossip_degree: int | None = None
    """Peers that a gossipsub mesh is meant to have, up to twice as many are let in; None = the library's 6 and 12."""
    user_agent: str | None = None
    """Identify's agent version; None = the binary's own."""
    protocol_version: str | None = None
    """Identify's protocol version; None = the binary's own."""
    streams_per_protocol_peer: int | None = None
    """Limit of open streams per protocol and peer; None = the binary's own."""
    conns_per_ip: int | None = None
    """Limit of connections per IP address; None = the binary's own."""
    connmgr_lo: int | None = None
    """Connections that a trim leaves; None = no connection manager."""
    connmgr_hi: int | None = None
    """Connections above which p2pd trims by itself; None = no connection manager."""
    connmgr_grace_s: float = 120.0
    """Age below which a connection is not trimmed."""
    relay_service: bool = False
    """Relay for others (validators)."""
    static_relays: tuple[Multiaddr, ...] = ()
    """Relays to reserve a slot with when this node cannot be reached; each ends in ``/p2p``."""
    hole_punch: bool = True
    """Make relayed connections direct where NATs allow it."""
    nat_port_map: bool = False
    """Ask the router for a port."""
    autonat: bool = False
    """Answer other peers' questions about their reachability."""
    force_reachability: Reachability | None = None
    """Skip the measurement of this node's own reachability."""
    mdns: bool = False
    """Find peers on the local link."""
    mdns_service_tag: str | None = None
    """mDNS service tag; only peers with the same one find each other."""
    psk_file: Path | None = None
    """Pre-shared key of a private transport (TCP only)."""
    metrics_address: str | None = None
    """host:port of p2pd's own Prometheus page."""
    control_mode: int = 0o600
    """Permission of the control socket."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables added to the sidecar's own, e.g. GOMAXPROCS."""
    extra_args: tuple[str, ...] = ()
    """Appended to the command line as they are."""
    control_file: Path | None = None
    """The control socket, when it is not to lie in ``run_dir``."""
    ends_with_parent: bool = True
    """End when standard input ends, so that p2pd never outlives who started it. A stock one can't."""

    @property
    def control_path(self) -> Path:
        """The control socket."""
        return self.control_file or self.run_dir / "p2pd.sock"

    @property
    def record_path(self) -> Path:
        """Process id and start time of the p2pd that runs."""
        return self.run_dir / "p2pd.json"

    @property
    def log_path(self) -> Path:
        """p2pd's output of this run; ``.1`` is the run before."""
        return self.run_dir / "p2pd.log"

    @property
    def stock_config_path(self) -> Path:
        """The JSON document that only a stock p2pd gets."""
        return self.run_dir / "p2pd-stock.json"


STOCK_CONFIG: Final = json.dumps({"Relay": {"Enabled": False}})
"""A stock p2pd relays for everybody even with ``-relay=false``: its default configuration says so again, and only a
document of its own changes that. Source: go-libp2p-daemon v0.9.2, p2pd/main.go and config.NewDefaultConfig."""

_features: dict[tuple[str, int, int], frozenset[str]] = {}


async def probe_features(binary: Path) -> frozenset[str]:
    """The flags that a p2pd binary knows, asked by ``-help``. Remembered by path, time and size.

    Raises: StartError with cause and remedy when it is missing, cannot be executed, or is no p2pd.
    """
    remedy = "pass --p2pd PATH or set LLOOM_P2PD to a working one, or reinstall lloom-sidecar, whose wheel carries one"
    try:
        info = os.stat(binary)
    except OSError as exc:
        raise StartError(f"there is no p2pd at {binary} ({exc.strerror}): {remedy}") from exc
    key = (os.fspath(binary), info.st_mtime_ns, info.st_size)
    if key in _features:
        await trio.lowlevel.checkpoint()
        return _features[key]
    text = await _run_briefly(binary, "-help", remedy)
    flags = frozenset(_FLAG_LINE.findall(text))
    if not flags >= _NEEDED_FLAGS:
        raise StartError(f"{binary} is no libp2p daemon (its -help names none of p2pd's flags): {remedy}")
    _features[key] = flags
    return flags


async def probe_version(binary: Path, features: frozenset[str]) -> str | None:
    """The line that ``-version`` prints; None for a stock p2pd, which has no such flag. Raises: StartError."""
    if "version" not in features:
        await trio.lowlevel.checkpoint()
        return None
    lines = (await _run_briefly(binary, "-version", "reinstall it")).splitlines()
    return lines[0][:500] if lines else None


async def _run_briefly(binary: Path, flag: str, remedy: str) -> str:
    try:
        with trio.fail_after(_PROBE_DEADLINE_S):
            done = await trio.run_process(
                [os.fspath(binary), flag],
                stdin=b"",
                capture_stdout=True,
                stderr=subprocess.STDOUT,
                check=False,
            )
    except trio.TooSlowError as exc:
        raise StartError(f"{binary} {flag} did not end within {_PROBE_DEADLINE_S:g} s: {remedy}") from exc
    except PermissionError as exc:
        raise StartError(f"{binary} may not be executed: chmod +x it, or {remedy}") from exc
    except OSError as exc:
        if exc.errno == errno.ENOEXEC:
            machine = os.uname().machine
            raise StartError(f"{binary} is no program for this machine ({machine}): {remedy}") from exc
        raise StartError(f"{binary} cannot be started ({exc.strerror}): {remedy}") from exc
    return bytes(done.stdout or b"").decode(errors="replace")[:_MAX_HELP_CHARS]


def write_note(control: Path, features: frozenset[str], version: str | None) -> None:
    """Leave beside the control socket what the p2pd behind it can do, for whoever attaches to it. Raises OSError."""
    note = json.dumps({"features": sorted(features), "version": version})
    path = _note_path(control)
    path.with_name(f"{path.name}.new").write_text(note)
    path.with_name(f"{path.name}.new").replace(path)


def read_note(control: Path) -> tuple[frozenset[str], str | None]:
    """What ``write_note`` left; nothing known, as of somebody else's p2pd, when there is none or it is no such note."""
    try:
        with _note_path(control).open("rb") as file:
            note = json.loads(file.read(_MAX_NOTE_BYTES))
        version = note["version"]
        return frozenset(map(str, note["features"])), None if version is None else str(version)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset(), None


def _note_path(control: Path) -> Path:
    return control.with_name(f"{control.name}.json")


def is_stock(features: frozenset[str]) -> bool:
    """True for a p2pd that is not Lloom's own build."""
    return FEATURE_STDIN_EOF not in features


def build_argv(settings: DaemonSettings, features: frozenset[str]) -> list[str]:
    """The command line for a binary that knows ``features``. Pure; passes no flag that it lacks, and never ``-b``.

    Raises: ConfigError when the settings cannot be carried out: a socket path that is too long, a stock p2pd that
    would be left without an address, a private transport that the binary cannot make.
    """
    control = check_socket_path(settings.control_path, "p2pd's control socket")
    args = _Args(features)
    args.add("listen", str(unix_multiaddr(control)))
    args.add("id", os.fspath(settings.identity_file))
    args.add("controlMode", f"{settings.control_mode:04o}")
    _add_host(args, settings, features)
    _add_services(args, settings)
    if is_stock(features):
        # Unencrypted connections, an echo service and a relay for everybody are on by default there.
        args.add("plaintext", "false")
        args.add("echo", "false")
        if not settings.relay_service:
            args.add("relay", "false")
            args.add("f", os.fspath(settings.stock_config_path))
    else:
        args.add("holePunch", "true" if settings.hole_punch else None)
        args.add(FEATURE_STDIN_EOF, "true" if settings.ends_with_parent else None)
    return [os.fspath(settings.binary), *args.built, *settings.extra_args]


class _Args:
    def __init__(self, features: frozenset[str]) -> None:
        self.built: list[str] = []
        self._features = features

    def add(self, flag: str, value: str | None) -> None:
        if value is not None and flag in self._features:
            self.built.append(f"-{flag}={value}")


def _add_host(args: _Args, settings: DaemonSettings, features: frozenset[str]) -> None:
    listen = settings.listen
    if settings.psk_file is not None:
        if "psk" not in features:
            raise ConfigError(
                f"{settings.binary} has no transport with a pre-shared key: use the p2pd that lloom-sidecar brings"
            )
        args.add("psk", os.fspath(settings.psk_file))
    if is_stock(features) or settings.psk_file is not None:
        listen = tuple(addr for addr in listen if "/udp/" not in f"{addr}/")
        if settings.listen and not listen:
            raise ConfigError(
                f"no address is left to listen at ({_joined(settings.listen)} are all UDP, and this p2pd or a network "
                "with a pre-shared key speaks TCP only): add --listen /ip4/0.0.0.0/tcp/4001"
            )
    if listen:
        args.add("hostAddrs", _joined(listen))
    else:
        args.add("noListenAddrs", "true")
    args.add("announceAddrs", _joined(settings.announce) or None)
    args.add("noise", "true")
    args.add("muxer", "yamux")
    args.add("natPortMap", "true" if settings.nat_port_map else None)
    args.add("mdns", "true" if settings.mdns else None)
    args.add("mdnsServiceTag", settings.mdns_service_tag if settings.mdns else None)
    args.add("userAgent", settings.user_agent)
    args.add("protocolVersion", settings.protocol_version)
    args.add("streamsPerProtocolPeer", _number(settings.streams_per_protocol_peer))
    args.add("connsPerIP", _number(settings.conns_per_ip))
    args.add("metricsAddr", settings.metrics_address)


def _add_services(args: _Args, settings: DaemonSettings) -> None:
    mode = {"server": "dhtServer", "client": "dhtClient", "auto": "dht"}.get(settings.dht_mode)
    if mode is not None:
        args.add(mode, "true")
    args.add("pubsub", "true")
    args.add("pubsubRouter", "gossipsub")
    args.add("pubsubSign", "true")
    args.add("pubsubSignStrict", "true")
    args.add("gossipsubHeartbeatInterval", _duration(settings.heartbeat_s))
    args.add("gossipsubDegree", _number(settings.gossip_degree))
    if settings.connmgr_lo is not None and settings.connmgr_hi is not None:
        args.add("connManager", "true")
        args.add("connLo", str(settings.connmgr_lo))
        args.add("connHi", str(settings.connmgr_hi))
        args.add("connGrace", _duration(settings.connmgr_grace_s))
    args.add("autonat", "true" if settings.autonat else None)
    args.add("relayHop", "true" if settings.relay_service else None)
    args.add("staticRelays", _joined(settings.static_relays) or None)
    if settings.force_reachability is not None:
        args.add(f"forceReachability{settings.force_reachability.capitalize()}", "true")


def _joined(addrs: Sequence[Multiaddr]) -> str:
    return ",".join(str(addr) for addr in addrs)


def _number(value: int | None) -> str | None:
    return None if value is None else str(value)


def _duration(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"

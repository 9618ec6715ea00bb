"""Which p2pd this node uses, and how it is started."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

import trio

from lloom_sidecar import __version__
from lloom_sidecar.config import Config
from lloom_sidecar.errors import ConfigError, StartError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.launch import (
    STOCK_CONFIG,
    STOCK_MAX_STREAMS,
    DaemonSettings,
    build_argv,
    probe_features,
    probe_version,
    write_note,
)
from lloom_sidecar.p2p.launch import is_stock as is_stock_binary
from lloom_sidecar.p2p.supervisor import AttachedDaemon, DaemonSupervisor, OnDown, OnUp
from lloom_sidecar.protocol.names import IDENTIFY_PROTOCOL_VERSION, MDNS_SERVICE, agent_version

MAX_STREAMS: Final = 1024
"""Streams of one peer that our p2pd's limits leave room for."""

VALIDATOR_DEGREE: Final = 64
"""Peers in a validator's gossip meshes, up to twice as many for a while. Clients and nodes behind NAT may have no other
neighbour, and whom the library's mesh of 12 leaves out hears a part only. Source: docs/simulation.md, the hub."""

_PACKAGED: Final = Path(__file__).parent.parent / "_bin" / "p2pd"

Supervisor = DaemonSupervisor | AttachedDaemon


def find_p2pd(configured: Path | None) -> Path:
    """The configured one, else the one inside this package, else PATH's.

    Raises StartError, one sentence, when there is none.
    """
    if configured is not None:
        return configured
    if _PACKAGED.is_file() and os.access(_PACKAGED, os.X_OK):
        return _PACKAGED
    found = shutil.which("p2pd")
    if found is None:
        raise StartError(
            f"there is no p2pd: {_PACKAGED} does not exist and PATH has none; install the package again with "
            "`pip install .`, or name one with --p2pd PATH"
        )
    return Path(found)


def make_supervisor(config: Config, me: PeerId, *, on_up: OnUp, on_down: OnDown, rng: random.Random) -> Supervisor:
    """Managed or attached, as configured. Raises StartError when there is no p2pd to start."""
    if config.p2pd_control is not None:
        return AttachedDaemon(config.p2pd_control, expected_peer=me, on_up=on_up, on_down=on_down)
    return DaemonSupervisor(daemon_settings(config), expected_peer=me, on_up=on_up, on_down=on_down, rng=rng)


def daemon_settings(config: Config) -> DaemonSettings:
    """What a p2pd of this node is started with. Raises StartError when there is none."""
    return DaemonSettings(
        binary=find_p2pd(config.p2pd),
        run_dir=config.run_dir,
        identity_file=config.identity_file,
        listen=config.listen,
        announce=config.announce_addrs,
        dht_mode="server" if config.is_dht_server else "client",
        heartbeat_s=config.heartbeat_s,
        gossip_degree=VALIDATOR_DEGREE if config.is_validator else None,
        user_agent=agent_version(__version__),
        protocol_version=IDENTIFY_PROTOCOL_VERSION,
        connmgr_lo=config.connections_low,
        connmgr_hi=config.connections_high,
        relay_service=config.is_validator,
        static_relays=() if config.is_validator else config.bootstrap,
        autonat=config.is_validator,
        mdns=config.mdns,
        mdns_service_tag=MDNS_SERVICE,
    )


async def become_p2pd(config: Config) -> NoReturn:
    """Replace this process by the p2pd that the node would start, at ``p2pd_control`` and on its own.

    Raises StartError, ConfigError when it can't be started.
    """
    control = config.p2pd_control.unix_path if config.p2pd_control is not None else None
    if control is None:
        raise ConfigError("--p2pd-control says where the node will look for it: for instance /unix/run/lloom/p2pd.sock")
    settings = replace(daemon_settings(config), control_file=Path(control), ends_with_parent=False)
    features = await probe_features(settings.binary)
    argv = build_argv(settings, features)
    try:
        write_note(settings.control_path, features, await probe_version(settings.binary, features))
        if is_stock_binary(features):
            await trio.Path(settings.stock_config_path).write_text(STOCK_CONFIG)
        os.execv(argv[0], argv)  # no child: a container's first process should be p2pd itself
    except OSError as exc:
        raise StartError(f"p2pd cannot be started ({exc}): check {settings.control_path.parent} and --p2pd") from exc


def max_streams(supervisor: Supervisor) -> int:
    """Streams of one peer that this node's p2pd can hold. Nothing is known of an attached one: it counts as stock."""
    return STOCK_MAX_STREAMS if is_stock(supervisor) else MAX_STREAMS


def is_stock(supervisor: Supervisor) -> bool:
    """True when p2pd may be an unmodified one, with its lower limits."""
    return supervisor.is_stock

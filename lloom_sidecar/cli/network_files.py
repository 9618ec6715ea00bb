"""What ``lloomctl network`` does to the files of a home: network.key and bootstrap. Needs no node."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lloom_sidecar.config import BOOTSTRAP_FILE_NAME, NETWORK_KEY_NAME, read_bootstrap_file
from lloom_sidecar.errors import LloomError
from lloom_sidecar.identity import IDENTITY_NAME, load_network_keys, prepare_home, write_private_file
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.protocol.envelope import SEED_BYTES, Signer
from lloom_sidecar.protocol.network_key import (
    KEY_BYTES,
    Invite,
    NetworkKey,
    NetworkKeys,
    format_key_file,
    parse_key_file,
)

_BOOTSTRAP_HEAD: Final = (
    "# Validators that this node trusts, one multiaddr a line. Written by `lloomctl network join`.\n"
)
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MAX_KEEP_OLD_S: Final = 30 * 86400
MAX_GIVEN_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Joined:
    """What a join changed."""

    key: NetworkKey
    is_new: bool
    """False when the home had this key already."""
    added: tuple[Multiaddr, ...]
    """Validators that were not in the bootstrap file before."""


def network_key_path(home: Path) -> Path:
    """The key file of a home."""
    return home / NETWORK_KEY_NAME


def create_network(home: Path) -> NetworkKey:
    """Make a new network: a random key in HOME/network.key, mode 0600.

    Raises LloomError when there is a key already: it is never overwritten.
    """
    prepare_home(home)
    key = NetworkKey(os.urandom(KEY_BYTES))
    if not _write(network_key_path(home), format_key_file(key), replace=False):
        raise LloomError(
            f"{network_key_path(home)} exists: this home belongs to a network already; `lloomctl network rotate` "
            "changes its key, another --home starts another network"
        )
    return key


def join_network(home: Path, invite: Invite, *, replace: bool = False) -> Joined:
    """Take the invite's key and validators into the home. Joining the same network again only adds validators.

    With ``replace`` another network's key is overwritten, and its validators are trusted no more.
    Raises LloomError when there is another network's key and ``replace`` is False.
    """
    prepare_home(home)
    path = network_key_path(home)
    keys = load_network_keys(path) if path.exists() else None
    is_new = keys is None or keys.current != invite.key
    if keys is not None and is_new and not replace:
        raise LloomError(
            f"{path} holds the key of another network, or this network's before a rotation: "
            "--replace takes the invite's in its place"
        )
    known = () if keys is not None and is_new else read_bootstrap_file(home / BOOTSTRAP_FILE_NAME)
    added = tuple(addr for addr in invite.validators if addr not in known)
    # The validators first: a key without them would be a node that waits for nobody.
    if added or (keys is not None and is_new):
        write_bootstrap_file(home, (*known, *added))
    if is_new:
        _write(path, format_key_file(invite.key), replace=True)
    return Joined(invite.key, is_new, added)


def read_given(path: Path) -> bytes:
    """A file that somebody else prepared, such as one of a mounted Secret. Raises LloomError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_GIVEN_BYTES + 1)
    except OSError as exc:
        raise LloomError(f"{path} cannot be read: {(exc.strerror or type(exc).__name__).lower()}") from exc
    if len(data) > MAX_GIVEN_BYTES:
        raise LloomError(f"{path} is over {MAX_GIVEN_BYTES} bytes: this is another file")
    return data


def take_network(home: Path, folder: Path, me: PeerId) -> None:
    """Take ``network.key`` and ``bootstrap`` from a folder in the place of the home's; the node's own addresses are
    left out. Raises LloomError, ConfigError when one of them cannot be used."""
    key = read_given(folder / NETWORK_KEY_NAME)
    parse_key_file(key)
    validators = read_bootstrap_file(folder / BOOTSTRAP_FILE_NAME)
    write_bootstrap_file(home, (addr for addr in validators if addr.peer_id != me))
    _write(network_key_path(home), key, replace=True)


def share_with_p2pd(home: Path, folder: Path) -> None:
    """Make ``folder`` a home for ``lloom-sidecar p2pd``: the identity and the validators, and nothing else of ``home``.

    p2pd talks to strangers; in a container of its own it sees neither the network key nor the ledger.
    Raises LloomError, ConfigError.
    """
    prepare_home(folder)
    _write(folder / IDENTITY_NAME, read_given(home / IDENTITY_NAME), replace=True)
    write_bootstrap_file(folder, read_bootstrap_file(home / BOOTSTRAP_FILE_NAME))


def rotate_network(home: Path, *, keep_old_s: int, now_ms: int) -> NetworkKeys:
    """Make a new key and accept the old one for ``keep_old_s`` more (0 = not at all).

    Raises LloomError, and ConfigError when there is no key that can be used.
    """
    old = load_network_keys(network_key_path(home)).current
    new = NetworkKey(os.urandom(KEY_BYTES))
    until_ms = now_ms + keep_old_s * 1000 if keep_old_s > 0 else 0
    data = format_key_file(new, (old, until_ms) if until_ms else None)
    _write(network_key_path(home), data, replace=True)
    return NetworkKeys(new, old, until_ms) if until_ms else NetworkKeys(new)


def write_bootstrap_file(home: Path, addrs: Iterable[Multiaddr]) -> None:
    """Replace HOME/bootstrap."""
    lines = "".join(f"{addr}\n" for addr in addrs)
    _write(home / BOOTSTRAP_FILE_NAME, (_BOOTSTRAP_HEAD + lines).encode(), replace=True)


def reachable_addrs(addrs: Iterable[str]) -> tuple[Multiaddr, ...]:
    """Of a validator's own addresses those that suit an invite: not loopback ones, unless there are no others."""
    parsed = [Multiaddr.parse(text) for text in addrs]
    named = [addr for addr in parsed if addr.peer_id is not None and addr.unix_path is None]
    others = [addr for addr in named if addr.ip is None or not addr.ip.is_loopback]
    return tuple(others or named)


def is_dns_label(name: str) -> bool:
    """A name that is one part of a DNS name, with room for what the chart appends. Source: RFC 1123, 2.1."""
    return re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", name) is not None


def kubernetes_secrets(validators: int, release: str, namespace: str) -> dict[str, Any]:
    """A List of the Secrets that the chart wants: a new network key with the validators' addresses, and their new
    identities under the names of their pods, which are the StatefulSet's of deploy/helm."""
    signers = [Signer(os.urandom(SEED_BYTES)) for _ in range(validators)]
    host = f"{release}-validator"
    bootstrap = "".join(
        f"/dns4/{host}-{number}.{host}.{namespace}.svc/tcp/4001/p2p/{signer.peer}\n"
        for number, signer in enumerate(signers)
    )
    key = format_key_file(NetworkKey(os.urandom(KEY_BYTES)))
    identities = {f"{host}-{number}": signer.marshalled() for number, signer in enumerate(signers)}
    return {
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            _secret(f"{release}-network", namespace, {"network.key": key, "bootstrap": bootstrap.encode()}),
            _secret(f"{release}-validators", namespace, identities),
        ],
    }


def _secret(name: str, namespace: str, data: dict[str, bytes]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "type": "Opaque",
        "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
    }


def parse_duration(text: str) -> int:
    """Seconds of ``24h``, ``30m``, ``7d``, ``90s`` or ``0``. Raises ValueError with a sentence."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text)
    seconds = 0 if text == "0" else int(found[1]) * _UNITS_S[found[2]] if found is not None else -1
    if not 0 <= seconds <= MAX_KEEP_OLD_S:
        raise ValueError(f"{text!r} is not a time such as 24h, 30m, 7d or 0 (at most {MAX_KEEP_OLD_S // 86400}d)")
    return seconds


def _write(path: Path, data: bytes, *, replace: bool) -> bool:
    try:
        return write_private_file(path, data, replace=replace)
    except OSError as exc:
        raise LloomError(f"{path} cannot be written: {(exc.strerror or type(exc).__name__).lower()}") from exc

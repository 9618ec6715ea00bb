"""Secrets for a cluster: what `lloomctl network kubernetes` prints is what `lloom-sidecar init` takes."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lloom_sidecar.cli.lloomctl import root
from lloom_sidecar.cli.sidecar import main
from lloom_sidecar.config import read_bootstrap_file
from lloom_sidecar.identity import load_identity, load_network_keys


def secrets(*args: str) -> dict[str, dict[str, bytes]]:
    done = CliRunner().invoke(root, ["network", "kubernetes", *args])
    assert done.exit_code == 0, done.output
    items = json.loads(done.stdout)["items"]
    assert {item["kind"] for item in items} == {"Secret"}
    return {
        item["metadata"]["name"]: {key: base64.b64decode(value) for key, value in item["data"].items()}
        for item in items
    }


def mount(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def init(*args: str) -> str:
    done = CliRunner().invoke(main, ["init", *args])
    assert done.exit_code == 0, done.output
    return done.stdout.strip()


def test_validators_become_who_the_others_expect(tmp_path: Path) -> None:
    made = secrets("--validators", "2", "--release", "lab", "--namespace", "ns")
    network = mount(tmp_path / "network", made["lab-network"])
    identities = mount(tmp_path / "identities", made["lab-validators"])
    peers = []
    for number in range(2):
        home = tmp_path / f"v{number}"
        args = ["--home", str(home), "--network", str(network)]
        peers.append(init(*args, "--identity", str(identities / f"lab-validator-{number}")))
        assert str(load_identity(home).peer) == peers[number]
    client = tmp_path / "client"
    init("--home", str(client), "--network", str(network))
    assert [str(addr) for addr in read_bootstrap_file(client / "bootstrap")] == [
        f"/dns4/lab-validator-{number}.lab-validator.ns.svc/tcp/4001/p2p/{peer}" for number, peer in enumerate(peers)
    ]
    # A validator does not wait for itself.
    assert [str(addr.peer_id) for addr in read_bootstrap_file(tmp_path / "v0" / "bootstrap")] == [peers[1]]
    assert load_network_keys(client / "network.key").current == load_network_keys(tmp_path / "v0/network.key").current


def test_a_rotated_key_is_taken_at_the_next_start(tmp_path: Path) -> None:
    first, second = (mount(tmp_path / name, secrets()["lloom-network"]) for name in ("first", "second"))
    home = tmp_path / "home"
    init("--home", str(home), "--network", str(first))
    peer = load_identity(home).peer
    init("--home", str(home), "--network", str(second))
    assert (home / "network.key").read_bytes() == (second / "network.key").read_bytes()
    assert load_identity(home).peer == peer


@pytest.mark.parametrize("args", [("--release", "Upper"), ("--namespace", "a" * 41), ("--validators", "0")])
def test_names_that_kubernetes_would_refuse(args: tuple[str, str]) -> None:
    done = CliRunner().invoke(root, ["network", "kubernetes", *args])
    assert done.exit_code == 2
    assert args[0] in done.output


@pytest.mark.parametrize("files", [{}, {"network.key": b"nonsense"}, {"network.key": b"x" * 70_000}])
def test_a_mounted_network_that_cannot_be_used(tmp_path: Path, files: dict[str, bytes]) -> None:
    folder = mount(tmp_path / "network", files)
    done = CliRunner().invoke(main, ["init", "--home", str(tmp_path / "home"), "--network", str(folder)])
    assert done.exit_code != 0
    assert "Traceback" not in done.output
    assert not (tmp_path / "home" / "network.key").exists()


def test_p2pds_home_has_the_identity_and_nothing_that_p2pd_does_not_need(tmp_path: Path) -> None:
    network = mount(tmp_path / "network", secrets()["lloom-network"])
    home, p2pd = tmp_path / "home", tmp_path / "p2pd"
    for _ in range(2):
        peer = init("--home", str(home), "--network", str(network), "--p2pd-home", str(p2pd))
        assert str(load_identity(p2pd).peer) == peer
        assert sorted(path.name for path in p2pd.iterdir()) == ["bootstrap", "identity.key"]
        assert p2pd.stat().st_mode & 0o777 == 0o700

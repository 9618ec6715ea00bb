"""The home: its folder, identity, lock and network key."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lloom_sidecar.errors import ConfigError, StartError
from lloom_sidecar.identity import (
    HomeLock,
    init_home,
    load_identity,
    load_network_keys,
    prepare_home,
    write_private_file,
)
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.network_key import NetworkKey, format_key_file


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def init_in_child(home: Path) -> str:
    return str(init_home(home)[0].peer)


def test_init_makes_a_private_home_once(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "home"
    first, is_created = init_home(home)
    again, is_created_again = init_home(home)
    assert (is_created, is_created_again, again.peer) == (True, False, first.peer)
    assert (mode(home), mode(home / "identity.key")) == (0o700, 0o600)
    assert load_identity(home).peer == first.peer
    assert os.listdir(home) == ["identity.key"]


def test_two_processes_that_init_at_once_agree(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(init_in_child, [tmp_path / "home"] * 6, chunksize=1))) == 1


def test_a_wider_home_of_ours_is_narrowed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    init_home(home)
    home.chmod(0o755)
    (home / "identity.key").chmod(0o644)
    init_home(home)
    assert (mode(home), mode(home / "identity.key")) == (0o700, 0o600)
    made_for_a_config = tmp_path / "other"
    made_for_a_config.mkdir(mode=0o755)
    (made_for_a_config / "config.toml").touch()
    prepare_home(made_for_a_config)
    assert mode(made_for_a_config) == 0o700


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    tmp_path.chmod(0o755)
    with pytest.raises(ConfigError, match="other things in it"):
        init_home(tmp_path)
    assert mode(tmp_path) == 0o755
    file = tmp_path / "file"
    file.touch()
    for home in (file, file / "below"):
        with pytest.raises(ConfigError, match="is not a folder"):
            init_home(home)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder somebody else's")
def test_somebody_elses_home_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 4242, 4242)
    with pytest.raises(ConfigError, match="belongs to uid 4242 and this process runs as uid 0"):
        init_home(home)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_an_unreadable_identity_is_explained(tmp_path: Path) -> None:
    init_home(tmp_path / "home")
    (tmp_path / "home" / "identity.key").chmod(0)
    with pytest.raises(ConfigError, match="cannot be read by uid"):
        load_identity(tmp_path / "home")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a libp2p Ed25519 private key"),
        (b"x" * 68, "not a libp2p Ed25519 private key"),
        (Signer(bytes(32)).marshalled()[:-1], "not a libp2p Ed25519 private key"),
        (Signer(bytes(32)).marshalled()[:-1] + b"\0", "the file is damaged"),
        (b"x" * 70_000, "has more than"),
    ],
)
def test_a_damaged_identity_is_explained_and_kept(tmp_path: Path, content: bytes, text: str) -> None:
    home = tmp_path / "home"
    prepare_home(home)
    (home / "identity.key").write_bytes(content)
    with pytest.raises(ConfigError, match=text) as caught:
        init_home(home)
    assert "\n" not in caught.value.message
    assert (home / "identity.key").read_bytes() == content


def test_a_missing_and_an_unsafe_identity(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `lloom-sidecar init --home"):
        load_identity(tmp_path)
    (tmp_path / "identity.key").mkdir()
    with pytest.raises(ConfigError, match="is not a file"):
        load_identity(tmp_path)
    home = tmp_path / "home"
    init_home(home)
    (home / "identity.key").chmod(0o666)
    with pytest.raises(ConfigError, match="can be written by everybody"):
        load_identity(home)


def test_the_lock_names_its_holder(tmp_path: Path) -> None:
    with HomeLock(tmp_path) as lock:
        lock.acquire()
        with pytest.raises(StartError, match=f"process {os.getpid()} runs a node in {tmp_path} already"):
            HomeLock(tmp_path).acquire()
        assert mode(lock.path) == 0o600
    with HomeLock(tmp_path):
        pass
    lock.release()
    with pytest.raises(StartError, match="cannot be opened"):
        HomeLock(tmp_path / "none").acquire()


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = "import sys, pathlib\nfrom lloom_sidecar.identity import HomeLock\nHomeLock(pathlib.Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"  # noqa: E501
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(StartError, match=f"process {child.pid} runs"):
            HomeLock(tmp_path).acquire()
        child.kill()
        child.wait(10)
    with HomeLock(tmp_path):
        pass


def test_network_keys_are_read_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "network.key"
    with pytest.raises(ConfigError, match="run `lloomctl network create`"):
        load_network_keys(path)
    path.write_bytes(format_key_file(NetworkKey(bytes(32))))
    assert load_network_keys(path).current == NetworkKey(bytes(32))
    assert mode(path) == 0o600
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"network\.key cannot be used"):
        load_network_keys(path)


def test_a_private_file_is_whole_or_absent(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    assert write_private_file(path, b"one", replace=False)
    assert not write_private_file(path, b"two", replace=False)
    assert path.read_bytes() == b"one"
    assert write_private_file(path, b"three", replace=True)
    assert (path.read_bytes(), mode(path), os.listdir(tmp_path)) == (b"three", 0o600, ["secret"])


def test_an_identity_that_was_made_before_is_taken_once(tmp_path: Path) -> None:
    given, other = (Signer(bytes([number]) * 32) for number in (1, 2))
    signer, is_new = init_home(tmp_path / "home", given.marshalled())
    assert (signer.peer, is_new) == (given.peer, True)
    assert init_home(tmp_path / "home")[0].peer == given.peer
    assert init_home(tmp_path / "home", other.marshalled())[0].peer == given.peer, "a home keeps its identity"
    with pytest.raises(ConfigError, match="not a libp2p Ed25519 private key"):
        init_home(tmp_path / "another", b"nonsense")

"""``lloomctl support-bundle``: what is in it, and above all what is not."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from test_admin_fake_node import served

from lloom_sidecar.cli.ctl_support import REMOVED, Redactor, secrets_in
from lloom_sidecar.cli.lloomctl import root
from lloom_sidecar.cli.network_files import create_network
from lloom_sidecar.identity import init_home


def run(home: Path, *args: str) -> Result:
    clean = {"LLOOM_HOME": None, "LLOOM_NODE": None}
    return CliRunner(env=clean).invoke(root, ["--home", str(home), "support-bundle", *args], prog_name="lloomctl")


def texts(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        found = {}
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None
            found[member.name.partition("/")[2]] = file.read().decode()
        return found


def test_what_a_running_node_tells(tmp_path: Path) -> None:
    with served(tmp_path / "home") as node:
        done = run(node.home, "-o", str(tmp_path / "x.tar.gz"), "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["file"] == str(tmp_path / "x.tar.gz")
    assert (tmp_path / "x.tar.gz").stat().st_mode & 0o777 == 0o600
    found = texts(tmp_path / "x.tar.gz")
    assert json.loads(found["status.json"])["version"]
    assert json.loads(found["doctor.json"])["node_answers"] is True
    assert "lloom_" in found["metrics.txt"]
    assert all(name in found["README.txt"] for name in found if name != "README.txt")


def test_secrets_stay_at_home(tmp_path: Path) -> None:
    """They are planted where a fault would bring them: p2pd's log and the settings' file."""
    home = tmp_path / "home"
    init_home(home)
    create_network(home)
    identity, network = (home / "identity.key").read_bytes(), (home / "network.key").read_text()
    secret_lines = [
        line.strip() for line in network.splitlines() if line.strip() and not line.startswith(("#", "lloom-"))
    ]
    assert secret_lines
    (home / "run").mkdir()
    (home / "run" / "p2pd.log").write_text(f"started {identity.hex()}\n{network}\nBearer tok-123456789 fine\n")
    (home / "config.toml").write_text(
        'backend = "http://me:hunter22@192.0.2.7/v1"\n# lloom-invite-1:abcdefgh234567 sk-proj-ABCDEFGH12345\n'
    )
    done = run(home, "-o", str(tmp_path / "x.tar.gz"))
    assert done.exit_code == 0, done.output
    everything = "\n".join(texts(tmp_path / "x.tar.gz").values())
    for secret in (
        identity.hex(),
        *secret_lines,
        "hunter22",
        "abcdefgh234567",
        "tok-123456789",
        "sk-proj-ABCDEFGH12345",
    ):
        assert secret not in everything
    assert "started " in everything
    assert "192.0.2.7/v1" in everything
    assert REMOVED in everything


def test_without_a_node_the_files_tell(tmp_path: Path) -> None:
    init_home(tmp_path / "home")
    done = run(tmp_path / "home", "-o", str(tmp_path / "x.tar.gz"))
    assert done.exit_code == 0, done.output
    found = texts(tmp_path / "x.tar.gz")
    assert "error" in json.loads(found["status.json"])
    assert json.loads(found["doctor.json"])["node_answers"] is False
    assert "cannot be read" in found["p2pd.log"]


def test_an_archive_is_never_overwritten(tmp_path: Path) -> None:
    init_home(tmp_path / "home")
    (tmp_path / "x.tar.gz").write_text("mine")
    done = run(tmp_path / "home", "-o", str(tmp_path / "x.tar.gz"))
    assert done.exit_code == 1
    assert "is there already" in done.stderr
    assert (tmp_path / "x.tar.gz").read_text() == "mine"
    assert run(tmp_path / "home", "-o", str(tmp_path / "no" / "x.tar.gz")).exit_code == 1


@pytest.mark.parametrize(
    "text", ["nothing here", "http://127.0.0.1:8000/v1", "a@b", "sk-short", '"path": "/x/network.key"']
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Redactor(secrets_in(b"longsecretvalue\nab\n"))(text) == text


def test_a_secret_inside_another_leaves_nothing_of_it() -> None:
    clean = Redactor(["12345678", "0123456789"])
    assert clean("x 0123456789 y") == f"x {REMOVED} y"
    assert clean.count == 1

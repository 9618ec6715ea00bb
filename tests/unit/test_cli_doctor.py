"""lloomctl doctor: its own checks of files, program and ports; how the node's findings are shown; exit codes."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from test_admin_fake_node import Served, served
from test_cli_lloomctl import Terminal, create, run

from lloom_sidecar import __version__
from lloom_sidecar.admin.doctor import Finding, finding
from lloom_sidecar.cli import ctl_doctor
from lloom_sidecar.cli.lloomctl import root
from lloom_sidecar.cli.local_checks import (
    LocalFacts,
    check_binary,
    check_home_files,
    check_ports,
    read_settings,
    try_bind,
)
from lloom_sidecar.config import load_config
from lloom_sidecar.identity import init_home, load_network_keys


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home that is ready for a start."""
    home = tmp_path / "home"
    init_home(home)
    create(home)
    return home


@pytest.fixture
def node(home: Path) -> Iterator[Served]:
    with served(home) as one:
        one.node.network_id = load_network_keys(home / "network.key").current.network_id.hex()
        # The fake's own id is fixed: let the home's be the same.
        status = one.node.status
        peer = str(init_home(home)[0].peer)
        one.node.status = lambda: {**status(), "peer": peer, "version": __version__}  # type: ignore[method-assign]
        yield one


def report(home: Path, *args: str) -> tuple[int, dict[str, list[Finding]]]:
    done = run(home, "doctor", "--json", *args)
    by_check: dict[str, list[Finding]] = {}
    for one in json.loads(done.stdout)["findings"]:
        by_check.setdefault(one["check"], []).append(one)
    return done.exit_code, by_check


def severity(found: list[Finding], check: str) -> str:
    return next(one["severity"] for one in found if one["check"] == check)


def judge(home: Path, status: Any = None) -> dict[str, Finding]:
    return {one["check"]: one for one in check_home_files(LocalFacts(home, status))}


# --- the whole


def test_a_good_node_is_exit_0(node: Served) -> None:
    done = run(node.home, "doctor")
    assert done.exit_code == 0, done.output
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["ok", name] for name in ("home", "identity", "network_key", "settings", "binary", "node", "p2pd")
    ]
    assert done.stderr == "7 findings: 7 ok\n"
    assert run(node.home, "doctor", "--quiet").stdout == ""


@pytest.mark.parametrize(("name", "code"), [("error", 1), ("warning", 0), ("info", 0), ("skipped", 0)])
def test_only_an_error_is_exit_1(node: Served, name: Any, code: int) -> None:
    node.node.operations.findings = [finding("disk", name, "text \x1b[2J", "Do this.")]
    done = run(node.home, "doctor")
    assert done.exit_code == code
    shown = name.upper() if name == "error" else name
    assert f"{shown:8} disk             text \\x1b[2J\n{' ' * 26}-> Do this.\n" in done.stdout
    assert ("disk" in run(node.home, "doctor", "-q").stdout) == (name != "skipped")
    code, found = report(node.home)
    assert found["disk"] == [{"check": "disk", "severity": name, "text": "text \x1b[2J", "remedy": "Do this."}]


def test_without_a_node_the_local_checks_run_and_the_exit_is_3(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lloom_sidecar.cli.local_checks.try_bind", lambda kind, host, port: None)
    code, found = report(home)
    assert code == 3
    assert found["node"][0]["severity"] == "error"
    assert f"lloom-sidecar run --home {home} --role client" in found["node"][0]["remedy"]
    assert found["ports"][0]["text"] == (
        "free: 0.0.0.0:4001/tcp, 0.0.0.0:4001/udp, 127.0.0.1:4880/tcp, 127.0.0.1:4881/tcp, 127.0.0.1:4882/tcp"
    )
    for name in ("home", "identity", "network_key", "settings", "binary"):
        assert found[name][0]["severity"] == "ok", found[name]


def test_a_node_that_has_ended_is_explained(home: Path) -> None:
    (home / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(home / "run" / "admin.sock"))
    code, found = report(home)
    assert (code, "has ended" in found["node"][0]["text"]) == (3, True)


def test_with_node_only_the_node_is_asked(node: Served) -> None:
    env = {"LLOOM_HOME": None, "LLOOM_NODE": None}
    done: Result = CliRunner(env=env).invoke(
        root, ["--node", f"unix:{node.home}/run/admin.sock", "doctor", "--json"], prog_name="lloomctl"
    )
    assert [one["check"] for one in json.loads(done.stdout)["findings"]] == ["node", "p2pd"]


def test_a_node_of_another_version(node: Served) -> None:
    before = node.node.status
    node.node.status = lambda: {**before(), "version": "0.0.1"}  # type: ignore[method-assign]
    code, found = report(node.home)
    assert (code, found["node"][0]["severity"]) == (0, "warning")
    assert "Restart" in found["node"][0]["remedy"]
    node.node.status = lambda: {**before(), "draining": True}  # type: ignore[method-assign]
    assert "draining" in report(node.home)[1]["node"][0]["text"]


def test_an_older_node_that_cannot_examine_itself(node: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lloom_sidecar.admin.client.NodeClient.examine", lambda self: self._get("/v1/nothing"))
    code, found = report(node.home)
    assert code == 1
    assert [one["severity"] for one in found["node"]] == ["ok", "error"]


def test_long_texts_are_folded_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        ctl_doctor._print(finding("disk", "warning", "many words " * 12, "do this and that " * 8))
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("-> " in line for line in lines) == 1
    assert all(line.startswith(" " * 26) for line in lines[1:])


# --- the home


def test_a_home_that_is_not_there(tmp_path: Path) -> None:
    found = judge(tmp_path / "none")
    assert found["home"]["severity"] == "error"
    assert "lloom-sidecar init --home" in found["home"]["remedy"]
    assert found["identity"]["severity"] == found["network_key"]["severity"] == "skipped"


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "is not a folder" in judge(tmp_path / "file")["home"]["text"]


def test_modes_that_are_too_wide_are_told_and_left(home: Path) -> None:
    (home / "identity.key").chmod(0o644)
    (home / "network.key").chmod(0o640)
    home.chmod(0o755)
    found = judge(home)
    assert [found[name]["severity"] for name in ("home", "identity", "network_key")] == ["warning"] * 3
    assert "mode 0644" in found["identity"]["text"]
    assert "chmod 600" in found["identity"]["remedy"]
    assert (home / "identity.key").stat().st_mode & 0o777 == 0o644


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_key_that_cannot_be_read(home: Path) -> None:
    (home / "identity.key").chmod(0)
    assert "cannot be read" in judge(home)["identity"]["text"]


def test_keys_that_are_missing_or_damaged(home: Path) -> None:
    (home / "identity.key").write_bytes(b"x")
    (home / "network.key").write_bytes(b"x")
    found = judge(home)
    assert found["identity"]["severity"] == found["network_key"]["severity"] == "error"
    assert "another peer id" in found["identity"]["remedy"]
    assert "--replace" in found["network_key"]["remedy"]
    (home / "identity.key").unlink()
    (home / "network.key").unlink()
    found = judge(home)
    assert "lloom-sidecar init" in found["identity"]["remedy"]
    assert (found["network_key"]["severity"], "network join" in found["network_key"]["remedy"]) == ("warning", True)


def test_keys_that_are_not_the_running_nodes(node: Served, tmp_path: Path) -> None:
    status = node.node.status()
    assert {one["severity"] for one in judge(node.home, status).values()} == {"ok"}
    other = tmp_path / "other"
    init_home(other)
    create(other)
    found = judge(other, status)
    assert (found["identity"]["severity"], found["network_key"]["severity"]) == ("error", "warning")
    assert "Restart the node" in found["network_key"]["remedy"]
    (other / "network.key").unlink()
    assert "--network-key-file" in judge(other, status)["network_key"]["text"]
    status["network"]["id"] = None
    assert judge(other, status)["network_key"]["severity"] == "info"


# --- settings, program, ports


def test_settings_need_neither_role_nor_network_here(tmp_path: Path) -> None:
    config, found = read_settings(str(tmp_path))
    assert (config is not None, found["severity"]) == (True, "ok")
    (tmp_path / "config.toml").write_text('roles = ["executor"]\n')
    assert read_settings(str(tmp_path))[1]["severity"] == "ok"
    (tmp_path / "config.toml").write_text("min_pears = 1\n")
    config, found = read_settings(str(tmp_path))
    assert (config, found["severity"]) == (None, "error")
    assert "did you mean min_peers" in found["text"]


def test_the_program(tmp_path: Path) -> None:
    assert check_binary(None)["severity"] == "ok"
    broken = tmp_path / "p2pd"
    broken.write_text("#!/bin/sh\necho no flags\n")
    broken.chmod(0o755)
    config = load_config({"home": str(tmp_path), "roles": ("validator",), "open": True, "p2pd": str(broken)}, env={})
    found = check_binary(config)
    assert (found["severity"], "no libp2p daemon" in found["text"]) == ("error", True)
    assert "--p2pd PATH" in found["remedy"]
    stock = "  -listen x\n  -id x\n  -hostAddrs x\n  -dhtServer\n  -dhtClient\n  -pubsub\n  -noise\n"
    broken.write_text(f"#!/bin/sh\ncat <<EOF\n{stock}EOF\n")
    assert check_binary(config)["severity"] == "info"
    broken.write_text(f"#!/bin/sh\ncat <<EOF\nlloom-p2pd 0.0.1 (x)\n{stock}  -exitOnStdinEOF\n  -version\nEOF\n")
    found = check_binary(config)
    assert (found["severity"], "is version 0.0.1" in found["text"]) == ("warning", True)
    control = f"/unix{tmp_path}/c.sock"
    attached = load_config(
        {"home": str(tmp_path), "roles": ("validator",), "open": True, "p2pd_control": control}, env={}
    )
    assert "somebody else's" in check_binary(attached)["text"]


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    assert check_ports(None)[0]["severity"] == "skipped"
    config = load_config({"home": str(tmp_path), "roles": ("client",), "open": True}, env={})

    def binds(kind: int, host: str, port: int) -> OSError | None:
        if port == 4880:
            return OSError(errno.EADDRINUSE, "in use")
        return OSError(errno.EACCES, "Permission denied") if kind == socket.SOCK_DGRAM else None

    found = check_ports(config, binds=binds)
    assert [one["text"] for one in found] == [
        "0.0.0.0:4001/udp cannot be used (permission denied)",
        "127.0.0.1:4880/tcp is taken",
    ]
    assert "--api" in found[1]["remedy"]


def test_binding_a_port() -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as taken:
            taken.bind(("127.0.0.1", 0))
            if kind == socket.SOCK_STREAM:
                taken.listen(1)
            port = taken.getsockname()[1]
            problem = try_bind(kind, "127.0.0.1", port)
            assert problem is not None
            assert problem.errno == errno.EADDRINUSE
        assert try_bind(kind, "127.0.0.1", port) is None

"""The admin API on a loopback port, as another container of the pod uses it: a real node, real requests."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.harness import Network
from tests.harness.network import free_port
from tests.harness.waiting import wait_until

TOKEN = "token-of-the-pod"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Network, str, Path]]:
    """A network whose executor has the listener, its URL, and the token's file."""
    token_file = tmp_path_factory.mktemp("secret") / "token"
    token_file.write_text(f"{TOKEN}\n")
    port = free_port()
    with Network(validators=1, executors=0, clients=1) as network:
        flags = ["--admin", f"127.0.0.1:{port}", "--admin-token-file", str(token_file), "--grace", "20"]
        network.executors.append(network.add("executor", *flags))
        network.wait_known(network.client)
        yield network, f"http://127.0.0.1:{port}", token_file


def ctl(url: str, token_file: Path | str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lloom_sidecar.cli.lloomctl", "--node", url, "--token-file", str(token_file)]
    env = {key: value for key, value in os.environ.items() if not key.startswith("LLOOM_")}
    return subprocess.run([*command, *args], capture_output=True, text=True, timeout=60, env=env)


def test_without_the_token_nothing_is_told_or_done(served: tuple[Network, str, Path], tmp_path: Path) -> None:
    network, url, _ = served
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}):
        for method, path in (("GET", "/v1/status"), ("POST", "/v1/executor/drain"), ("GET", "/nowhere")):
            answer = httpx.request(method, url + path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_token")
    assert "executor_paused" not in network.executors[0].conditions()
    (tmp_path / "wrong").write_text("wrong")
    refused = ctl(url, tmp_path / "wrong", "status")
    assert refused.returncode == 1
    assert "needs its token" in refused.stderr
    assert "wrong" not in refused.stderr


def test_pages_and_other_names_are_refused_even_with_it(served: tuple[Network, str, Path]) -> None:
    _, url, _ = served
    known = {"authorization": f"Bearer {TOKEN}"}
    assert httpx.get(url + "/v1/status", headers=known).status_code == 200
    for more in ({"origin": "https://page.example"}, {"host": "rebound.example"}, {"sec-fetch-site": "cross-site"}):
        assert httpx.get(url + "/v1/status", headers=known | more).status_code == 403


def test_lloomctl_uses_it(served: tuple[Network, str, Path]) -> None:
    network, url, token_file = served
    done = ctl(url, token_file, "id")
    assert (done.returncode, done.stdout.strip()) == (0, network.executors[0].peer)
    elsewhere = ctl("http://192.0.2.1:4883", token_file, "id")
    assert elsewhere.returncode == 2
    assert "is not encrypted" in elsewhere.stderr
    assert ctl(url, "/none", "id").returncode == 1


def test_the_unix_socket_stays_the_owners(served: tuple[Network, str, Path]) -> None:
    home = served[0].executors[0].home
    assert stat.S_IMODE((home / "run" / "admin.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "run").stat().st_mode) == 0o700


def test_a_prestop_hook_waits_for_the_stream_that_runs(served: tuple[Network, str, Path]) -> None:
    network, url, _ = served
    node, known = network.executors[0], {"authorization": f"Bearer {TOKEN}"}
    drain = url + "/v1/executor/drain"
    assert httpx.post(drain + "?wait_s=nan", headers=known).status_code == 400
    with network.client.stream("chunks=40 delay_ms=50") as answer:
        lines = answer.iter_lines()
        next(lines)
        at_once = httpx.post(drain, headers=known)
        assert at_once.json() == {"paused": True, "requests": 1}
        # Content as wget --post-data= sends it.
        form = known | {"content-type": "application/x-www-form-urlencoded"}
        waited = httpx.post(drain + "?wait_s=60", headers=form, content=b"", timeout=70)
        assert waited.json() == {"paused": True, "requests": 0}
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert node.is_running
    assert httpx.post(url + "/v1/executor/resume", headers=known, json={}).json()["paused"] is False
    wait_until(lambda: "executor_paused" not in node.conditions(), "the pause to end")

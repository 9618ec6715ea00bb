"""What a foreign libp2p node sees of ours: a Go program that knows nothing of Lloom asks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lloom_sidecar import __version__
from lloom_sidecar.protocol.names import PROTOCOL_HELLO, PROTOCOL_REQUEST
from tests.harness import Network, Node
from tests.harness.go_tools import find_go_tool

PROBE_S = 60.0


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(validators=0, executors=1, clients=0) as network:
        yield network


@pytest.fixture(scope="module")
def probe() -> Path:
    return find_go_tool("probe")


def ask(probe: Path, node: Node, *args: str) -> dict[str, Any]:
    done = subprocess.run(
        [probe, "-addr", node.address, *args], capture_output=True, text=True, timeout=PROBE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_identify_says_who_and_which_version(network: Network, probe: Path) -> None:
    said = ask(probe, network.executors[0])
    assert said["agent"] == f"lloom/{__version__}"
    assert said["protocolVersion"] == "/lloom/1.0.0"
    protocols = set(said["protocols"])
    assert protocols >= {PROTOCOL_REQUEST, PROTOCOL_HELLO, "/ipfs/kad/1.0.0", "/ipfs/ping/1.0.0"}
    # Upstream's daemon serves an echo to everybody unless told otherwise; an executor relays for nobody.
    assert not any("echo" in one or "/circuit/relay/0.2.0/hop" in one for one in protocols)


def test_an_unencrypted_channel_is_refused(network: Network, probe: Path) -> None:
    said = ask(probe, network.executors[0], "-plaintext")
    assert said["refused"] is True
    assert said["said"][:1] == ["/multistream/1.0.0"]
    assert "/plaintext/2.0.0" not in said["said"]


@pytest.mark.parametrize("protocol", [PROTOCOL_HELLO, PROTOCOL_REQUEST])
@pytest.mark.parametrize("garbage", ["0568656c6c6f", "ffffff7f", "00"], ids=["frame", "huge", "empty"])
def test_garbage_gets_no_answer_and_ends_its_stream_only(
    network: Network, probe: Path, protocol: str, garbage: str
) -> None:
    (executor,) = network.executors
    pid = executor.pid_of("p2pd")
    said = ask(probe, executor, "-hello-garbage", protocol, garbage)
    assert said["answer"] == ""
    assert said["ended"] in ("eof", "reset")
    assert executor.is_running
    assert executor.pid_of("p2pd") == pid
    assert ask(probe, executor)["agent"] == f"lloom/{__version__}"

"""``lloomctl chat`` and ``top`` as a person uses them, on a real network; chat on a real terminal too."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Network
from tests.harness.waiting import wait_until

CTL = str(Path(sys.executable).with_name("lloomctl"))


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(executors=2) as network:
        yield network


def test_one_question(network: Network) -> None:
    done = network.client.ctl("chat", "scripted", "-q", "chunks=3")
    assert (done.returncode, done.stdout) == (0, " w0 w1 w2\n")
    assert "receipt verified" in done.stderr
    found = json.loads(network.client.ctl("chat", "-q", "chunks=3", "--json").stdout)
    assert found["answer"] == " w0 w1 w2"
    assert found["complete"]
    assert found["executor"] in {node.peer for node in network.executors}


def test_a_cut_answer_is_an_error(network: Network) -> None:
    done = network.client.ctl("chat", "-q", "chunks=9 delay_ms=100 cut=3")
    assert done.returncode == 1
    assert done.stdout == " w0 w1 w2\n"
    assert "the answer was cut" in done.stderr
    assert "receipt verified" not in done.stderr
    done = network.client.ctl("chat", "-q", "chunks=9 delay_ms=100 cut=3", "--json")
    assert done.returncode == 1
    assert not json.loads(done.stdout)["complete"]


def test_an_unknown_model_is_explained(network: Network) -> None:
    done = network.client.ctl("chat", "no-such", "-q", "Hello")
    assert done.returncode == 1
    assert "no-such" in done.stderr


def test_a_validator_has_no_api(network: Network) -> None:
    done = network.validators[0].ctl("chat", "-q", "Hello")
    assert done.returncode == 1
    assert "only one with --role client" in done.stderr


def test_a_conversation_on_a_terminal(network: Network) -> None:
    """Ctrl-C stops an answer and its backend, and the conversation goes on; Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "NO_COLOR": "1"}
    talk = subprocess.Popen(
        [CTL, "--home", str(network.client.home), "chat"],
        stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    seen = b""

    def says(text: str) -> bool:
        nonlocal seen
        try:
            seen += os.read(ours, 65536)
        except OSError:  # nothing more now, or the other end was closed
            select.select([ours], [], [], 0.05)
        return text.encode() in seen

    try:
        wait_until(lambda: says("> "), "the prompt")
        os.write(ours, b"chunks=3\n")
        wait_until(lambda: says("receipt verified"), "the first answer")
        os.write(ours, b"chunks=500 delay_ms=100\n")
        wait_until(lambda: says("w4"), "the long answer to begin")
        os.killpg(talk.pid, signal.SIGINT)
        wait_until(lambda: says("not the whole answer"), "the answer to stop")
        wait_until(lambda: network.client.status()["requests"]["in_flight"] == 0, "the request to end")
        os.write(ours, b"/model\n")
        wait_until(lambda: says("offered: scripted"), "the models")
        os.write(ours, b"\x04")
        assert talk.wait(20) == 0
    finally:
        talk.kill()
        talk.wait()
        os.close(ours)


def test_top_counts_what_happens(network: Network) -> None:
    client = network.client
    before = client.status()["tokens"]["received"]
    network.client.ctl("chat", "-q", "chunks=7")
    assert client.status()["tokens"]["received"] == before + 7
    assert sum(node.status()["tokens"]["generated"] for node in network.executors) >= before + 7
    found = json.loads(client.ctl("top", "--once", "--json").stdout)
    assert found["executors"] == 2
    assert found["sidecar_mib"] > 1
    assert found["p2pd_mib"] > 1
    assert found["served"] >= 1

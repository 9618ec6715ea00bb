"""Nodes and backends on the hosts of a Lan."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tests.harness
from tests.harness import Network, Node

from .lan import Host

PORT = 4001
_LOOPBACK = "/ip4/127.0.0.1/tcp/0"
_BACKEND = Path(tests.harness.__file__).with_name("scripted_backend.py")


def add_on(host: Host, network: Network, role: str, *flags: str, backend: str = "", in_network: bool = True) -> Node:
    """A node on ``host`` that listens on its Ethernet address; not started. An executor needs a ``backend`` there."""
    # An executor of the harness brings a backend on this machine's loopback, which no host reaches.
    node = network.add("client", *flags, start=False, bootstrap=False, in_network=in_network)
    node.name = f"{role} on {host.name}"
    node.prefix = host.prefix
    args = node.args
    args[args.index(_LOOPBACK)] = f"/ip4/{host.address}/tcp/{PORT}"
    args[args.index("--role") + 1] = role
    if role == "executor":
        args += ["--backend", backend]
    return node


def address_of(host: Host, node: Node) -> str:
    """Where others reach a node that ``add_on`` made."""
    return f"/ip4/{host.address}/tcp/{PORT}/p2p/{node.peer}"


@contextmanager
def backend_on(host: Host) -> Iterator[str]:
    """A scripted backend on the host's loopback; gives its URL."""
    process = subprocess.Popen(
        [*host.prefix, sys.executable, str(_BACKEND), "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


def chat_on(host: Host, node: Node, prompt: str) -> int:
    """One chat with a client's API, asked on its own host; the answer's HTTP status."""
    program = (
        "import httpx, sys; print(httpx.post(sys.argv[1] + '/v1/chat/completions', trust_env=False, timeout=30, "
        "json={'model': 'scripted', 'messages': [{'role': 'user', 'content': sys.argv[2]}]}).status_code)"
    )
    done = subprocess.run(
        [*host.prefix, sys.executable, "-c", program, node.api, prompt],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)

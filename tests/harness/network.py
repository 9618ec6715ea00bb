"""A network of real nodes on loopback."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import psutil

from lloom_sidecar.cli.network_files import create_network

from .backend import ScriptedBackend
from .node import Node
from .waiting import wait_until

LIVE: list[Network] = []
"""The networks that run now: a failed test prints their logs."""


class Network:
    """Validators, executors and clients of one network, each a process with its own p2pd.

    Args:
        backend: ``scripted`` (a ScriptedBackend per executor) or ``builtin`` (the embedded model).
        flags: more flags for every node.
        keeps_ports: every node listens on a port that it has again after a restart, as real nodes do.
    """

    def __init__(
        self,
        *,
        validators: int = 1,
        executors: int = 1,
        clients: int = 1,
        backend: str = "scripted",
        flags: list[str] | None = None,
        keeps_ports: bool = False,
    ) -> None:
        # Short: a unix socket's path has 107 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="lln-"))
        self.flags = flags or []
        self.keeps_ports = keeps_ports
        self.backend_kind = backend
        self.backends: list[ScriptedBackend] = []
        self.validators: list[Node] = []
        self.executors: list[Node] = []
        self.clients: list[Node] = []
        self._counts = (validators, executors, clients)
        self._stack = ExitStack()
        key_home = self.root / "key"
        key_home.mkdir(mode=0o700)
        create_network(key_home)
        self.key_file = key_home / "network.key"

    @property
    def client(self) -> Node:
        """The first client."""
        return self.clients[0]

    @property
    def nodes(self) -> list[Node]:
        """All of them."""
        return [*self.validators, *self.executors, *self.clients]

    def __enter__(self) -> Network:
        LIVE.append(self)
        try:
            self._start()
        except BaseException:
            for node in self.nodes:
                print(node.log_tail())
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self) -> None:
        validators, executors, clients = self._counts
        for _ in range(validators):
            self.validators.append(self.add("validator"))
        waiting = [self.add("executor", start=False) for _ in range(executors)]
        waiting += [self.add("client", start=False) for _ in range(clients)]
        for node in waiting:
            node.start(wait=False)
        for node in waiting:
            node.wait_up()
        self.executors += waiting[:executors]
        self.clients += waiting[executors:]
        for client in self.clients:
            self.wait_known(client)

    def add(
        self,
        role: str,
        *flags: str,
        start: bool = True,
        in_network: bool = True,
        bootstrap: bool = True,
        env: dict[str, str] | None = None,
    ) -> Node:
        """One more node, which the caller may put into a list of ours; ``in_network`` False: without our key."""
        number = len(list(self.root.glob("n*")))
        home = self.root / f"n{number}"
        home.mkdir(mode=0o700)
        port = free_port() if self.keeps_ports else 0
        args = [
            "--role",
            role,
            "--listen",
            f"/ip4/127.0.0.1/tcp/{port}",
            "--dht",
            "server",
            "--probe",
            "off",
            "--page",
            "off",
        ]
        if bootstrap:
            for validator in self.validators:
                args += ["--bootstrap", validator.address]
        if role == "executor":
            args += self._backend_flags()
        if role == "client":
            args += ["--api", "127.0.0.1:0"]
        if in_network:
            shutil.copy(self.key_file, home / "network.key")
        node = Node(f"{role} {home.name}", home, [*args, *self.flags, *flags], env=env)
        self._stack.callback(_end_node, node)
        return node.start() if start else node

    def _backend_flags(self) -> list[str]:
        if self.backend_kind == "builtin":
            return ["--model", "builtin"]
        journal = self.root / f"backend{len(self.backends)}.jsonl"
        backend = self._stack.enter_context(ScriptedBackend(journal=journal))
        self.backends.append(backend)
        return ["--backend", backend.url]

    def wait_known(self, client: Node, executors: list[Node] | None = None, timeout_s: float = 15.0) -> None:
        """Return when ``client`` knows every executor, fresh."""
        wanted = {node.peer for node in (self.executors if executors is None else executors)}
        wait_until(
            lambda: wanted <= {peer for peer, one in client.executors().items() if one["state"] == "fresh"},
            f"{client.name} to know its executors",
            timeout_s=timeout_s,
            explain=client.log_tail,
        )

    def node_of(self, peer: str) -> Node:
        """The node with this peer id."""
        return next(node for node in self.nodes if node.peer == peer)

    def backend_of(self, peer: str) -> ScriptedBackend:
        """The scripted backend of the executor with this peer id."""
        return self.backends[[node.peer for node in self.executors].index(peer)]

    def logs(self) -> str:
        """The end of every node's log."""
        return "\n".join(node.log_tail() for node in self.nodes)

    def _end(self) -> None:
        if self in LIVE:
            LIVE.remove(self)
        self._stack.close()
        shutil.rmtree(self.root, ignore_errors=True)


def free_port() -> int:
    """A port that nothing uses, below those that the kernel gives to outgoing connections."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _end_node(node: Node) -> None:
    if node.is_running:
        assert node.process is not None
        node.process.kill()
        node.process.wait()
    _end_leftover(node.home)
    if node.process is not None and node.process.stdin is not None:
        node.process.stdin.close()


def _end_leftover(home: Path) -> None:
    """A stock p2pd does not end with its sidecar; the record that the next start would read says which one it is."""
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        record = json.loads((home / "run" / "p2pd.json").read_text())
        process = psutil.Process(record["pid"])
        if any(str(home) in part for part in process.cmdline()):
            process.kill()
            process.wait(10)

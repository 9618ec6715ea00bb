"""Hosts on one Ethernet: a network namespace each, joined by a bridge."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

SUBNET = "10.77.0"
"""Inside namespaces of their own: it meets no address of this machine."""

CLONE_NEWNET = 0x40000000
"""Source: linux/sched.h."""
_libc = ctypes.CDLL(None, use_errno=True)


def run(*command: str) -> None:
    """Run a command; its words are in the error when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


class Host:
    """One namespace with ``eth0``."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.prefix = ("ip", "netns", "exec", name)
        """Before a command that is to run there."""
        self._etc = Path("/etc/netns") / name

    def set_hosts(self, names: dict[str, str]) -> None:
        """What /etc/hosts says there: name -> address. Programs that run there see a change."""
        text = "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items())
        self._etc.mkdir(parents=True, exist_ok=True)
        # Rewritten in place: a running program has this very file mounted over its /etc/hosts.
        with (self._etc / "hosts").open("w") as file:
            file.write(text)

    def block(self, other: Host) -> None:
        """No unicast to ``other`` leaves from here; multicast does. Open connections stay open and get no further."""
        run("ip", "-n", self.name, "route", "add", "unreachable", other.address)

    def unblock(self, other: Host) -> None:
        """Undo ``block``."""
        run("ip", "-n", self.name, "route", "del", "unreachable", other.address)

    def lose(self, share: float) -> None:
        """Drop this share of the packets that arrive here, each by chance."""
        rule = ("INPUT", "-i", "eth0", "-m", "statistic", "--mode", "random", "--probability", str(share), "-j", "DROP")
        run(*self.prefix, "iptables", "-A", *rule)

    def lost(self) -> int:
        """Packets that ``lose`` has dropped."""
        done = subprocess.run(
            [*self.prefix, "iptables", "-nvxL", "INPUT"], capture_output=True, text=True, timeout=20, check=True
        )
        return sum(int(line.split()[0]) for line in done.stdout.splitlines() if " DROP " in line)

    def connect(self, port: int) -> socket.socket:
        """A connection to a port on this host's loopback, for a program outside of it.

        A thread enters the namespace; a socket stays in the one that it was made in.
        """

        def make() -> socket.socket:
            with Path(f"/run/netns/{self.name}").open("rb") as namespace:
                if _libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                    raise OSError(ctypes.get_errno(), f"setns {self.name}")
            return socket.create_connection(("127.0.0.1", port), 10)

        # The thread ends with its pool, so that no other work is done in there.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(make).result()

    def remove(self) -> None:
        """Delete the namespace and its files."""
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True, timeout=20, check=False)
        shutil.rmtree(self._etc, ignore_errors=True)


class Lan:
    """``count`` hosts on a bridge in a namespace of its own: this machine's links stay as they are."""

    def __init__(self, count: int) -> None:
        tag = f"ll{os.getpid() % 100_000:x}{secrets.token_hex(2)}"
        self._switch = f"{tag}s"
        self.hosts = [Host(f"{tag}h{number}", f"{SUBNET}.{number}") for number in range(1, count + 1)]

    def __enter__(self) -> Lan:
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def _make(self) -> None:
        run("ip", "netns", "add", self._switch)
        in_switch = ("ip", "-n", self._switch)
        # Without snooping a bridge hands multicast to every port, as a plain switch does.
        run(*in_switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        run(*in_switch, "link", "set", "br0", "up")
        for number, host in enumerate(self.hosts, 1):
            host.set_hosts({})
            run("ip", "netns", "add", host.name)
            in_host = ("ip", "-n", host.name)
            run(*in_host, "link", "set", "lo", "up")
            run(*in_host, "link", "add", "eth0", "type", "veth", "peer", "name", f"p{number}", "netns", self._switch)
            run(*in_switch, "link", "set", f"p{number}", "master", "br0", "up")
            run(*in_host, "addr", "add", f"{host.address}/24", "dev", "eth0")
            run(*in_host, "link", "set", "eth0", "up")
            run(*in_host, "route", "add", "default", "via", f"{SUBNET}.254")

    @contextlib.contextmanager
    def unplugged(self, host: Host) -> Iterator[None]:
        """While the context lasts no packet passes between this host and the others, and nobody is told."""
        port = ("ip", "-n", self._switch, "link", "set", f"p{self.hosts.index(host) + 1}")
        run(*port, "down")
        try:
            yield
        finally:
            run(*port, "up")

    def cut(self, *away: Host) -> None:
        """Put these hosts on a switch of their own: they still reach each other, and nobody else. Links stay up."""
        run("ip", "-n", self._switch, "link", "add", "br1", "type", "bridge", "mcast_snooping", "0")
        run("ip", "-n", self._switch, "link", "set", "br1", "up")
        self._plug("br1", away)

    def heal(self, *away: Host) -> None:
        """Undo ``cut``."""
        self._plug("br0", away)
        run("ip", "-n", self._switch, "link", "del", "br1")

    def _plug(self, bridge: str, hosts: Iterable[Host]) -> None:
        for host in hosts:
            run("ip", "-n", self._switch, "link", "set", f"p{self.hosts.index(host) + 1}", "master", bridge)

    def remove(self) -> None:
        """Delete every namespace; the links between them go with them."""
        for host in self.hosts:
            host.remove()
        subprocess.run(["ip", "netns", "del", self._switch], capture_output=True, timeout=20, check=False)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.remove()

"""Nodes on one link find each other by multicast DNS, with no validator and no address configured."""

from __future__ import annotations

import time
from functools import partial

import pytest
from natlab import Lan, add_on, backend_on, chat_on

from tests.harness import Network, Node
from tests.harness.waiting import pause, wait_until

pytestmark = pytest.mark.root
FAST = ["--heartbeat", "1"]


def events_of(node: Node, kind: str) -> list[dict[str, object]]:
    with node.admin() as admin:
        return list(admin.events(follow=False, kinds=[kind]))


def is_member(node: Node, far: Node) -> bool:
    found = node.peers().get(far.peer)
    return found is not None and bool(found["member"])


def test_two_fresh_nodes_find_each_other_and_nobody_else() -> None:
    with (
        Lan(4) as lan,
        Network(validators=0, executors=0, clients=0, flags=FAST) as network,
        Network(validators=0, executors=0, clients=0, flags=FAST) as other_network,
        backend_on(lan.hosts[0]) as backend,
        backend_on(lan.hosts[3]) as other_backend,
    ):
        host, client_host, quiet_host, other_host = lan.hosts
        executor = add_on(host, network, "executor", "--mdns", backend=backend)
        client = add_on(client_host, network, "client", "--mdns")
        quiet = add_on(quiet_host, network, "client")
        other = add_on(other_host, other_network, "executor", "--mdns", backend=other_backend)
        network.executors.append(executor)
        network.clients += [client, quiet]
        nodes = (executor, client, quiet, other)
        for node in nodes:
            node.start(wait=False)
        for node in nodes:
            node.wait_up()
        began_at = time.monotonic()
        network.wait_known(client, timeout_s=30)
        print(f"found by mDNS {time.monotonic() - began_at:.2f} s after all were up")
        # Gossip may be first; the hello between the two follows.
        for one, far in ((client, executor), (executor, client)):
            wait_until(
                partial(is_member, one, far),
                f"{one.name} to have proof of {far.name}",
                timeout_s=30,
                explain=network.logs,
            )
        assert chat_on(client_host, client, "hello") == 200

        # One of another network is refused at hello, by whoever meets it, and not kept.
        def refused_by(node: Node) -> bool:
            closed = [event for event in events_of(node, "connection_closed") if event["peer"] == other.peer]
            return "not_member" in {event["cause"] for event in closed}

        for node in (executor, client):
            wait_until(partial(refused_by, node), f"{node.name} to refuse the stranger", timeout_s=30)
            codes = {event["code"] for event in events_of(node, "network_error") if event["peer"] == other.peer}
            assert codes == {"hello_not_member"}
            assert other.peer not in node.executors()
        assert other.executors() == {}
        # One that does not take part finds nobody and is not found.
        assert quiet.status()["connections"] == 0
        assert all(quiet.peer not in node.peers() for node in (executor, client, other))


def test_a_first_dial_that_fails_is_repeated() -> None:
    """Multicast tells of each peer once an hour: without the repetition the two would not meet before."""
    with (
        Lan(2) as lan,
        Network(validators=0, executors=0, clients=0, flags=FAST) as network,
        backend_on(lan.hosts[0]) as backend,
    ):
        host, client_host = lan.hosts
        host.block(client_host)
        client_host.block(host)
        executor = add_on(host, network, "executor", "--mdns", backend=backend)
        client = add_on(client_host, network, "client", "--mdns")
        network.executors.append(executor)
        network.clients.append(client)
        for node in network.nodes:
            node.start(wait=False)
        for node in network.nodes:
            node.wait_up()
        pause(5)
        assert client.status()["connections"] == 0
        host.unblock(client_host)
        client_host.unblock(host)
        began_at = time.monotonic()
        wait_until(partial(is_member, client, executor), "the two to meet", timeout_s=90, explain=network.logs)
        print(f"met {time.monotonic() - began_at:.2f} s after the link let them")

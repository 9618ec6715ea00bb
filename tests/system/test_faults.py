"""What breaks and comes back: a validator's p2pd, the link between two halves of a network; and what a trim takes."""

from __future__ import annotations

import statistics
import time
from functools import partial

import pytest
from natlab import Lan, add_on, address_of, backend_on, chat_on

from tests.contract.binaries import RealNode, find_ours
from tests.harness import Network, Node
from tests.harness.waiting import wait_until

FAST = ["--heartbeat", "1"]
LOW = 3
"""Connections that a trim leaves."""


def is_member(node: Node, far: Node) -> bool:
    """``node`` is connected to ``far`` and has proof that it is of the network."""
    found = node.peers().get(far.peer)
    return found is not None and bool(found["connected"]) and bool(found["member"])


def closings(node: Node, far: Node) -> int:
    """How often ``node`` has lost ``far``."""
    with node.admin() as admin:
        events = admin.events(follow=False, kinds=["connection_closed"])
        return sum(event["peer"] == far.peer for event in events)


def has_lost(node: Node, far: Node, before: int) -> bool:
    """``node`` has lost ``far`` more often than ``before``."""
    return closings(node, far) > before


# ---------------------------------------------------------------- p2pd
def test_the_peers_of_a_validator_whose_p2pd_was_killed_return_by_themselves() -> None:
    took: list[float] = []
    with Network(validators=1, executors=2, clients=1, flags=FAST, keeps_ports=True) as network:
        validator, others = network.validators[0], [*network.executors, *network.clients]
        for _ in range(3):
            for node in others:
                wait_until(partial(is_member, validator, node), f"{node.name} to be joined", timeout_s=30)
            lost = {node.name: closings(validator, node) for node in others}
            validator.kill("p2pd")
            killed_at = time.monotonic()
            # Running nodes work on without it.
            assert network.client.chat("hello").status_code == 200
            for node in others:
                # The others may not see it: it can be over between two of their looks at p2pd.
                wait_until(partial(has_lost, validator, node, lost[node.name]), "the loss to be seen", timeout_s=30)
            for node in others:
                for here, there in ((node, validator), (validator, node)):
                    wait_until(partial(is_member, here, there), f"{here.name} to have {there.name} back", timeout_s=60)
            took.append(time.monotonic() - killed_at)
            assert set(validator.executors()) == {one.peer for one in network.executors}
        assert network.client.chat("hello").status_code == 200
        print(f"all back {statistics.median(took):.2f} s after the kill (median of {[round(s, 2) for s in took]})")


# ---------------------------------------------------------------- a partition
@pytest.mark.root
@pytest.mark.soak
def test_both_halves_of_a_cut_network_go_on_and_agree_again() -> None:
    """A and B have an executor and a client each; the validator is in A's half."""
    with (
        Lan(5) as lan,
        Network(validators=0, executors=0, clients=0, flags=FAST) as network,
        backend_on(lan.hosts[1]) as backend_a,
        backend_on(lan.hosts[3]) as backend_b,
    ):
        hosts = lan.hosts
        validator = add_on(hosts[0], network, "validator")
        bootstrap = ("--bootstrap", address_of(hosts[0], validator))
        executor_a = add_on(hosts[1], network, "executor", *bootstrap, backend=backend_a)
        client_a = add_on(hosts[2], network, "client", *bootstrap)
        executor_b = add_on(hosts[3], network, "executor", *bootstrap, backend=backend_b)
        client_b = add_on(hosts[4], network, "client", *bootstrap)
        validator.start()
        network.validators.append(validator)
        network.executors += [executor_a, executor_b]
        network.clients += [client_a, client_b]
        for node in (executor_a, client_a, executor_b, client_b):
            node.start()
        for client in (client_a, client_b):
            network.wait_known(client, timeout_s=30)
        halves = {client_a: (hosts[2], executor_a), client_b: (hosts[4], executor_b)}

        def fresh(client: Node) -> set[str]:
            return {peer for peer, one in client.executors().items() if one["state"] == "fresh"}

        def answers(client: Node) -> bool:
            return chat_on(halves[client][0], client, "hello") == 200

        for client in halves:
            assert answers(client)
        lan.cut(hosts[3], hosts[4])
        cut_at = time.monotonic()
        served = dict.fromkeys(halves, 0)
        first = dict.fromkeys(halves, 0.0)
        while time.monotonic() - cut_at < 60:
            for client in halves:
                if answers(client):
                    served[client] += 1
                    first[client] = first[client] or time.monotonic() - cut_at
        for client, (_, executor) in halves.items():
            print(
                f"{client.name}: {served[client]} of its chats answered during the minute, the first "
                f"{first[client]:.1f} s after the cut; fresh there: {len(fresh(client))}"
            )
            assert served[client] > 0
            assert fresh(client) == {executor.peer}
            assert answers(client)
        lan.heal(hosts[3], hosts[4])
        healed_at = time.monotonic()
        for client in halves:
            network.wait_known(client, timeout_s=120)
        print(f"both clients have both executors again {time.monotonic() - healed_at:.1f} s after the healing")
        for node in (executor_b, client_b):
            wait_until(partial(is_member, validator, node), f"the validator to have {node.name}", timeout_s=60)
        wait_until(lambda: len(validator.executors()) == 2, "the validator to have both", timeout_s=60)
        print(f"the validator has everybody again {time.monotonic() - healed_at:.1f} s after the healing")
        for client in halves:
            assert answers(client)


# ---------------------------------------------------------------- the marks
@pytest.mark.soak
def test_over_the_marks_idle_connections_go_and_those_in_use_stay() -> None:
    """p2pd spares every connection for two minutes; then those that matter least go, down to the lower mark. Peers
    that it needs for the DHT are beside the count."""
    with Network(validators=1, executors=2, clients=0, flags=FAST) as network:
        client = network.add("client", "--connections-low", str(LOW), "--connections-high", str(LOW + 2))
        network.clients.append(client)
        network.wait_known(client)
        # DHT clients: the DHT protects some of its servers from trims.
        idle = [RealNode(find_ours(), dht_mode="client") for _ in range(8)]
        try:
            for one in idle:
                done = client.ctl("peer", "connect", f"{one.identity.addrs[0]}/p2p/{one.peer}")
                print(done.stdout, done.stderr)
            wait_until(lambda: client.status()["connections"] >= 9, "all of them to be connected", timeout_s=30)
            began_at = time.monotonic()
            with client.stream("chunks=2000 delay_ms=100") as answer:
                used = network.node_of(answer.headers["x-lloom-executor"])
                pieces = answer.iter_lines()
                next(pieces)

                def left() -> set[str]:
                    peers = {peer for peer, one in client.peers().items() if one["connected"]}
                    return peers & {str(one.peer) for one in idle}

                wait_until(lambda: len(left()) <= LOW, "idle ones to go", timeout_s=240, explain=left)
                print(f"{8 - len(left())} of 8 idle peers gone {time.monotonic() - began_at:.0f} s after they came")
                assert sum(1 for _, line in zip(range(20), pieces, strict=False) if line) > 5
            for node in (network.validators[0], used):
                assert closings(client, node) == 0
                assert is_member(client, node)
            assert client.chat("hello").status_code == 200
        finally:
            for one in idle:
                one.stop()

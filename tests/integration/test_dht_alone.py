"""With gossip off and no validator: the DHT alone leads to the executors, and records of the dead hold nobody up."""

from __future__ import annotations

from tests.harness import Network
from tests.harness.hand_peer import HandPeer
from tests.harness.waiting import wait_until


def test_a_client_finds_the_living_by_provider_records_alone() -> None:
    # The one address that all have is a p2pd without a sidecar: it has the DHT and knows nothing of this network.
    with HandPeer() as somebody, Network(validators=0, executors=0, clients=0, flags=["--gossip", "off"]) as network:
        alone = ("--bootstrap", somebody.address)
        executors = [network.add("executor", *alone, start=False) for _ in range(3)]
        for executor in executors:
            executor.start(wait=False)
        for executor in executors:
            executor.wait_up()
        first = executors[0]

        def providers() -> set[str]:
            with first.admin() as admin:
                found = admin.find_providers("/lloom/executor/1.0.0", count=20, timeout_s=10, at=str(somebody.peer))
            return {one["peer"] for one in found["providers"]}

        wait_until(lambda: len(providers()) == 3, "the executors' records", timeout_s=60, explain=first.log_tail)
        dead, *living = executors
        dead.kill()

        client = network.add("client", *alone)
        network.wait_known(client, living, timeout_s=60)
        known = client.peers()
        assert {known[one.peer]["source"] for one in living} == {"hello"}
        assert dead.peer not in client.executors()
        assert client.chat("chunks=1").status_code == 200
        with client.admin() as admin:
            assert admin.topics() == []
        assert "gossip" not in client.conditions()
        done = client.ctl("doctor", "--json")
        assert "off by the setting gossip" in done.stdout

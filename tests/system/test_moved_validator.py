"""A validator that is known by name is found again when the name leads elsewhere."""

from __future__ import annotations

import time

import pytest
from natlab import Lan, add_on

from tests.harness import Network
from tests.harness.waiting import wait_until

pytestmark = pytest.mark.root
NAME = "validator.test"


def test_a_validator_that_moved_behind_its_name_is_found_again() -> None:
    with Lan(3) as lan, Network(validators=0, executors=0, clients=0) as network:
        client_host, old_host, new_host = lan.hosts
        validator = add_on(old_host, network, "validator")
        validator.start()
        client_host.set_hosts({NAME: old_host.address})
        client = add_on(client_host, network, "client", "--bootstrap", f"/dns4/{NAME}/tcp/4001/p2p/{validator.peer}")
        client.start()
        network.validators.append(validator)
        network.clients.append(client)

        def joined() -> bool:
            return bool(client.status()["validators"][0]["connected"])

        wait_until(joined, "the client to join by name", timeout_s=20)
        validator.kill()
        wait_until(lambda: not joined(), "the loss to be noticed", timeout_s=60)
        validator.prefix = new_host.prefix
        validator.args = [arg.replace(old_host.address, new_host.address) for arg in validator.args]
        validator.start()
        client_host.set_hosts({NAME: new_host.address})
        moved_at = time.monotonic()
        wait_until(joined, "the client to find it again", timeout_s=90)
        print(f"found again {time.monotonic() - moved_at:.2f} s after the name led elsewhere")
        (connected,) = [one for one in client.peers().values() if one["peer"] == validator.peer]
        assert new_host.address in connected["addrs"][0]

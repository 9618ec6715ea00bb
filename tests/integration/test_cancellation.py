"""An application that leaves: whatever was being done for it stops, at whichever moment it leaves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.harness import Network
from tests.harness.cancelling import KINDS, occupied, queued_freed_after_ms

TAGS = itertools.count(1, 1000)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(validators=1, executors=2, clients=1, flags=["--heartbeat", "1"]) as network:
        yield network


@pytest.mark.parametrize("kind", KINDS)
def test_the_backend_stops(network: Network, kind: str) -> None:
    print(f"{kind}: {KINDS[kind](network, next(TAGS)):.1f} ms")


def test_a_place_in_the_queue_is_freed_and_the_backend_never_asked() -> None:
    with Network(validators=1, executors=0, clients=1) as network:
        executor = network.add("executor", "--slots", "1")
        network.executors.append(executor)
        network.wait_known(network.client)
        (backend,) = network.backends
        with occupied(network.client, backend, 1):
            print(f"queued: {queued_freed_after_ms(executor, network.client, 2):.1f} ms")
        assert [one["script"]["tag"] for one in backend.requests()] == [1]

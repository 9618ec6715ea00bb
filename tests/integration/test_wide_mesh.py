"""A validator's mesh has room for all who have no other neighbour."""

from __future__ import annotations

from lloom_sidecar.node.daemon import VALIDATOR_DEGREE
from tests.simulation.measure_gossip import measure_star


async def test_what_one_of_many_says_is_heard_by_all_through_a_validator_alone() -> None:
    # 16 leaves: with the library's mesh of at most 12 some hear it late or never.
    found = await measure_star(1.0, 16, VALIDATOR_DEGREE)
    assert found["heard_3_heartbeats_later"] == 1.0, found

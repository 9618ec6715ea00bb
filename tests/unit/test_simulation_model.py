"""The model of the network: it follows the rules that it stands for, and a seed gives the same figures."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from lloom_sidecar.protocol.offers import Kind
from tests.simulation.executor import SimulatedExecutor
from tests.simulation.figures import percentile
from tests.simulation.gossip import Hop, Mesh
from tests.simulation.parameters import FULL_EVERY_S, Death, Parameters
from tests.simulation.sizes import real_sizes
from tests.simulation.world import START_S, World, simulate

SMALL = Parameters(
    executors=12,
    warm_up_s=30.0,
    window_s=60.0,
    observers=3,
    lifetime_s=0.0,
    reannounces=False,
    refresh_catalogue_s=0.0,
)


@pytest.mark.parametrize(("values", "share", "expected"), [((3, 1, 2), 0.5, 2), ((5,), 0.99, 5), ((1, 2), 1.0, 2)])
def test_a_percentile_is_one_of_the_values(values: tuple[float, ...], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 0.5) is None


def test_a_mesh_is_connected_and_hops_count_edges() -> None:
    mesh = Mesh(200, random.Random(3))
    hops = mesh.hops_from(17)
    assert [place for place, count in enumerate(hops) if count == 0] == [17]
    for place, neighbours in enumerate(mesh.neighbours):
        assert 2 <= len(neighbours) <= 6
        assert min(hops[near] for near in neighbours) >= hops[place] - 1
    assert max(hops) <= 6


def test_a_hop_without_spread_takes_what_it_says() -> None:
    hop = Hop(ends_s=0.1, process_s=0.2, link_s=0.3, spread=0.0)
    assert hop.delay_s(4, random.Random(1)) == pytest.approx(2.1)
    assert hop.passes(4) == 1.0
    assert replace(hop, loss=0.5).passes(3) == 0.125


def test_sealed_announcements_keep_the_sizes_of_the_protocol() -> None:
    sizes = real_sizes()
    assert sizes.of(Kind.HEARTBEAT) == sizes.heartbeat < 512
    assert sizes.of(Kind.REMOVAL) == sizes.removal < 512
    assert sizes.of(Kind.INITIAL) == sizes.of(Kind.UPDATE) == sizes.full < 16 * 1024


def test_an_executor_announces_as_the_announcer_does() -> None:
    executor = SimulatedExecutor(1, 0, "m", 0.0, 0.0)
    interval_s = executor.next_interval_s(10, random.Random(1))
    assert 9.0 <= interval_s <= 10.0
    first = executor.announce(100.0)
    beat = executor.announce(110.0)
    assert (first.kind, beat.kind) == (Kind.INITIAL, Kind.HEARTBEAT)
    assert first.ttl_s == pytest.approx(3 * interval_s)
    assert beat.full_digest == first.digest
    assert beat.sequence > first.sequence
    assert executor.find(beat.raw) is beat
    assert executor.announce(100.0 + FULL_EVERY_S).kind == Kind.UPDATE
    assert executor.withdraw(800.0).kind == Kind.REMOVAL


def test_a_quiet_network_sends_a_heartbeat_each_interval_and_loses_nobody() -> None:
    figures = simulate(replace(SMALL, request_every_s=1e9))
    # Intervals of 9.5 s in the mean; a full one each 600 s.
    assert figures["messages_per_s"]["received_by_node"] == pytest.approx(12 / 9.5, rel=0.06)
    assert figures["catalogue_age_s"]["max"] < 11.0
    assert figures["false_deaths"] == 0
    assert figures["probes"]["by_cause"] == {}
    assert figures["missing_share"] == 0.0


def test_a_lease_tells_of_a_kill_and_nobody_asks_a_dead_one_again() -> None:
    figures = simulate(replace(SMALL, aimed_every_s=4.0, mesh_forms_s=(0.0, 0.0), request_every_s=2.0))
    known = figures["death_known_s"]
    assert known["users"]["count"] > 0
    assert known["users"]["max"] < 1.5
    assert known["others_dead"]["count"] > 0
    assert 17.0 < known["others_dead"]["p50"] <= known["others_dead"]["max"] < 32.0
    assert known["others_suspect"]["max"] < known["others_dead"]["max"]
    assert figures["removal_known_s"]["max"] < 1.0
    assert figures["requests"]["asked_after_failure"] == 0


def test_a_host_that_vanishes_is_noticed_later_than_a_process() -> None:
    parameters = replace(SMALL, aimed_every_s=4.0, mesh_forms_s=(0.0, 0.0), request_every_s=2.0)
    process, host = (simulate(replace(parameters, death=death)) for death in (Death.PROCESS, Death.HOST))
    assert host["death_known_s"]["users"]["p50"] > process["death_known_s"]["users"]["p50"]


def test_a_failed_request_is_enough_to_choose_others() -> None:
    # Connections to a host that vanished last for up to 40 s: only the requests tell.
    parameters = replace(SMALL, aimed_every_s=4.0, mesh_forms_s=(0.0, 0.0), request_every_s=0.5, death=Death.HOST)
    figures = simulate(parameters)
    assert figures["requests"]["failovers"] > 5
    assert figures["requests"]["asked_after_failure"] == 0


def test_lost_messages_make_suspects_which_probes_clear() -> None:
    figures = simulate(replace(SMALL, loss=0.3))
    assert figures["lost_on_the_way"] > 0
    assert figures["probes"]["by_cause"]["suspect_alive"] > 0


def test_a_message_before_the_mesh_has_formed_reaches_nobody() -> None:
    parameters = replace(SMALL, aimed_every_s=10.0, mesh_forms_s=(5.0, 5.0))
    late, introduced = (simulate(replace(parameters, introduces=on)) for on in (False, True))
    at_once = simulate(replace(parameters, mesh_forms_s=(0.0, 0.0)))
    assert late["published_before_mesh"] > 0
    assert at_once["published_before_mesh"] == 0
    # Then the first heartbeat makes everybody ask the newcomer itself.
    assert late["new_executor_known_s"]["p50"] > 8.0
    assert 5.0 < introduced["new_executor_known_s"]["p50"] <= introduced["new_executor_known_s"]["max"] < 6.0
    assert at_once["new_executor_known_s"]["p99"] < 1.0


def test_a_newcomer_reads_the_catalogue() -> None:
    figures = simulate(replace(SMALL, newcomer_every_s=10.0, mesh_forms_s=(0.0, 1.0)))
    assert figures["newcomer_first_read_share"] == 1.0
    assert figures["newcomer_complete_s"]["count"] >= 4
    assert figures["newcomer_complete_s"]["max"] < 2.0


def test_a_topic_peer_makes_an_executor_say_everything_again() -> None:
    parameters = replace(SMALL, request_every_s=2.0, idle_peer_s=5.0)
    quiet, loud = (simulate(replace(parameters, reannounces=on)) for on in (False, True))
    assert loud["messages_per_s"]["full_by_reason"]["topic_peer"] > 0
    assert "topic_peer" not in quiet["messages_per_s"]["full_by_reason"]


def test_validators_hints_make_suspects_at_once() -> None:
    parameters = replace(SMALL, aimed_every_s=4.0, request_every_s=1e9, hints_every_s=2.0)
    assert simulate(parameters)["death_known_s"]["others_suspect"]["max"] < 5.0


def test_a_refresh_of_the_catalogue_is_counted() -> None:
    figures = simulate(replace(SMALL, refresh_catalogue_s=10.0))
    assert figures["bytes_per_s"]["catalogue_refresh_in"] > 0


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    parameters = replace(SMALL, aimed_every_s=5.0, loss=0.05, lifetime_s=300.0, newcomer_every_s=15.0)
    first, again, other = (simulate(replace(parameters, seed=seed)) for seed in (1, 1, 2))
    assert json.dumps(first) == json.dumps(again)
    assert first["death_known_s"] != other["death_known_s"]


def test_the_interval_grows_with_the_network() -> None:
    assert World(replace(SMALL, executors=600)).interval_s == 12.0


def test_it_starts_with_everybody_known() -> None:
    world = World(SMALL)
    assert world.now == START_S
    assert all(len(observer.book) == SMALL.executors for observer in world.observers)

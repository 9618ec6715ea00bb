"""How often peers may ask."""

from __future__ import annotations

import pytest

from lloom_sidecar.errors import PeerBusyError
from lloom_sidecar.executor.load import LoadMeter
from lloom_sidecar.executor.rates import MAX_RETRY_AFTER_S, RequestRates
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.peers.addresses import groups_of

A, B = (PeerId.from_ed25519(bytes([i]) * 32) for i in (1, 2))


def passed(rates: RequestRates, peer: PeerId, addr: str | None, now: float, asked: int = 100) -> int:
    """How many of ``asked`` requests at once pass; ``addr`` None: of a member."""
    groups = None if addr is None else groups_of([Multiaddr.parse(addr)])
    count = 0
    for _ in range(asked):
        try:
            rates.take(peer, groups, now)
        except PeerBusyError:
            continue
        count += 1
    return count


def refusal(rates: RequestRates, now: float) -> PeerBusyError:
    with pytest.raises(PeerBusyError) as caught:
        rates.take(A, None, now)
    return caught.value


def test_each_member_has_its_own() -> None:
    rates = RequestRates(peer_per_s=5, subnet_per_s=1, global_per_s=0)
    assert passed(rates, A, None, 0) == 5
    assert passed(rates, B, None, 0) == 5
    error = refusal(rates, 0)
    assert (error.code, error.http_status, error.retryable) == ("peer_rate", 429, True)
    assert error.retry_after_s == pytest.approx(0.2)
    assert passed(rates, A, None, 0.2) == 1


def test_strangers_share_that_of_their_subnet() -> None:
    rates = RequestRates(peer_per_s=1, subnet_per_s=3, global_per_s=0)
    assert rates.limits_strangers
    assert passed(rates, A, "/ip4/192.0.2.1/tcp/1", 0) == 3
    assert passed(rates, B, "/ip4/192.0.2.200/udp/1/quic-v1", 0) == 0
    assert passed(rates, B, "/ip4/198.51.100.1/tcp/1", 0) == 3
    assert passed(rates, A, "/ip6/2001:db8:1:2::1/tcp/1", 0) == 3
    assert passed(rates, B, "/ip6/2001:db8:1:3::1/tcp/1", 0) == 0
    # Whoever shares a relay shares its bucket, which is not that of the relay's neighbours.
    relayed = "/ip4/192.0.2.9/tcp/1/p2p/" + str(B) + "/p2p-circuit"
    assert passed(rates, A, relayed, 0) == 3
    assert passed(rates, B, "/ip4/127.0.0.1/tcp/1", 0) == 100


def test_everybody_together() -> None:
    rates = RequestRates(peer_per_s=0, subnet_per_s=0, global_per_s=4)
    assert not rates.limits_strangers
    assert passed(rates, A, None, 0, 3) + passed(rates, B, "/ip4/192.0.2.1/tcp/1", 0, 3) == 4
    error = refusal(rates, 0)
    assert (error.code, error.http_status, error.retryable) == ("global_rate", 503, True)


def test_one_that_asks_too_often_takes_nothing_from_the_others() -> None:
    rates = RequestRates(peer_per_s=2, subnet_per_s=0, global_per_s=6)
    assert passed(rates, A, None, 0, 1000) == 2
    assert passed(rates, B, None, 0) == 2


def test_less_than_one_a_second() -> None:
    rates = RequestRates(peer_per_s=0.001, subnet_per_s=0, global_per_s=0)
    assert passed(rates, A, None, 0) == 1
    assert refusal(rates, 0).retry_after_s == MAX_RETRY_AFTER_S
    assert passed(rates, A, None, 1000) == 1


def test_no_limits() -> None:
    assert passed(RequestRates(peer_per_s=0, subnet_per_s=0, global_per_s=0), A, None, 0) == 100


def test_the_meter_smooths_and_leaves_out_what_tells_nothing() -> None:
    meter = LoadMeter()
    assert (meter.ttft_s, meter.tokens_per_s) == (0.0, 0.0)
    meter.streamed(1, 5.0)
    meter.streamed(5, 0.0)
    assert meter.tokens_per_s == 0.0
    meter.streamed(11, 1.0)
    meter.streamed(21, 1.0)
    assert meter.tokens_per_s == pytest.approx(11.0)
    meter.first_token(0.0)
    assert meter.ttft_s > 0

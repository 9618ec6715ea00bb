"""Which announced addresses are dialled."""

from __future__ import annotations

import ipaddress

import pytest

from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.peers.addresses import MAX_DIALLED_ADDRS, dialable, groups_of

RELAY = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
HOME = (ipaddress.ip_network("192.168.1.0/24"), ipaddress.ip_network("fd00::/64"))


@pytest.mark.parametrize(
    ("text", "is_dialled", "is_dialled_directly"),
    [
        ("/ip4/8.8.8.8/tcp/4001", True, True),
        ("/ip6/2600::1/udp/4001/quic-v1", True, True),
        ("/dns4/node.example.org/tcp/4001", True, True),
        ("/ip4/192.168.1.7/tcp/4001", True, True),
        ("/ip6/fd00::7/tcp/4001", True, True),
        ("/ip4/192.168.2.7/tcp/4001", False, True),
        ("/ip4/10.0.0.1/tcp/4001", False, True),
        ("/ip4/100.64.0.1/tcp/4001", False, True),
        ("/ip4/127.0.0.1/tcp/4001", False, True),
        ("/ip6/::1/tcp/4001", False, True),
        ("/ip6/::ffff:127.0.0.1/tcp/4001", False, True),
        ("/ip4/169.254.1.1/tcp/4001", False, True),
        ("/dns4/localhost/tcp/4001", False, True),
        ("/dns4/db.LOCALHOST./tcp/4001", False, True),
        (f"/ip4/10.0.0.1/tcp/4001/p2p/{RELAY}/p2p-circuit", False, True),
        ("/ip4/0.0.0.0/tcp/4001", False, False),
        ("/ip4/224.0.0.1/udp/4001", False, False),
        ("/ip4/240.0.0.1/tcp/4001", False, False),
        ("/unix/run/p2pd.sock", False, False),
    ],
)
def test_the_policy(text: str, is_dialled: bool, is_dialled_directly: bool) -> None:
    addr = Multiaddr.parse(text)
    assert bool(dialable([addr], own_networks=HOME, direct=False)) is is_dialled
    assert bool(dialable([addr], own_networks=HOME, direct=True)) is is_dialled_directly


def test_a_relayed_address_without_an_ip_is_judged_as_a_name() -> None:
    addr = Multiaddr.parse(f"/p2p/{RELAY}/p2p-circuit")
    assert dialable([addr], own_networks=(), direct=False) == (addr,)


def test_loopback_is_dialled_by_a_node_that_lists_it() -> None:
    addr = Multiaddr.parse("/ip4/127.0.0.1/tcp/4001")
    assert dialable([addr], own_networks=(ipaddress.ip_network("127.0.0.0/8"),), direct=False) == (addr,)


def test_direct_ones_come_first_each_once_and_at_most_eight() -> None:
    relayed = Multiaddr.parse(f"/ip4/8.8.8.8/tcp/1/p2p/{RELAY}/p2p-circuit")
    plain = [Multiaddr.parse(f"/ip4/8.8.8.{number}/tcp/1") for number in range(3)]
    assert dialable([relayed, *plain, plain[0]], own_networks=(), direct=False) == (*plain, relayed)
    many = [Multiaddr.parse(f"/ip4/8.8.4.{number}/tcp/1") for number in range(20)]
    assert len(dialable(many, own_networks=(), direct=False)) == MAX_DIALLED_ADDRS


def test_quota_groups() -> None:
    texts = [
        "/ip4/203.0.113.7/tcp/1",
        "/ip4/203.0.113.8/tcp/1",
        "/ip6/2001:db8:1:2::3/tcp/1",
        "/ip4/127.0.0.1/tcp/1",
        "/ip6/fe80::1/tcp/1",
        "/dns4/a.example/tcp/1",
        f"/ip4/203.0.113.9/tcp/1/p2p/{RELAY}/p2p-circuit",
    ]
    assert groups_of(map(Multiaddr.parse, texts)) == {
        ("subnet", "203.0.113.0/24"),
        ("subnet", "2001:db8:1::/48"),
        ("indirect", "name"),
        ("indirect", "203.0.113.0/24"),
    }

"""This machine's networks, and which of a node's addresses it tells others."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

import psutil

from lloom_sidecar.ids import Multiaddr

MAX_ANNOUNCED: Final = 8
"""Source: PROTOCOL.md, Announcement."""

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def own_networks() -> list[IpNetwork]:
    """The networks that this machine's interfaces are in, loopback included."""
    found: list[IpNetwork] = []
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family.name not in ("AF_INET", "AF_INET6") or not address.netmask:
                continue
            host = address.address.partition("%")[0]
            prefix = int(ipaddress.ip_address(address.netmask)).bit_count()
            found.append(ipaddress.ip_network(f"{host}/{prefix}", strict=False))
    return found


def announced(listening: Sequence[Multiaddr], configured: Sequence[Multiaddr]) -> tuple[Multiaddr, ...]:
    """What to announce, at most 8 addresses: the configured ones, else the public ones, else all, loopback last.

    Private addresses are of use in a network on one site only, and say something about that site: they are told when
    there is no public one.
    """
    if configured:
        return tuple(configured[:MAX_ANNOUNCED])
    public = [addr for addr in listening if addr.is_relayed or addr.ip is None or addr.ip.is_global]
    if any(not addr.is_relayed for addr in public):
        return tuple(public[:MAX_ANNOUNCED])
    local = [addr for addr in listening if addr not in public]
    local.sort(key=lambda addr: addr.ip is not None and addr.ip.is_loopback)
    return tuple([*local, *public][:MAX_ANNOUNCED])

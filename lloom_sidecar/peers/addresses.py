"""Which announced addresses may be dialled, and to which quota they count. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final

from lloom_sidecar.ids import IpAddress, Multiaddr

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_DIALLED_ADDRS: Final = 8
"""Addresses of one announcement that are used. Source: PROTOCOL.md, Announcement."""
IPV4_GROUP_BITS: Final = 24
IPV6_GROUP_BITS: Final = 48
"""What one site usually holds: a /24 of IPv4 and a /48 of IPv6. Source: RFC 6177, section 2."""

Group = tuple[str, str]
"""(kind, name) of what a quota counts: kind is source, subnet or indirect."""


def dialable(addrs: Iterable[Multiaddr], *, own_networks: Sequence[IpNetwork], direct: bool) -> tuple[Multiaddr, ...]:
    """The addresses of an announcement that this node may dial, direct ones before relayed ones, at most 8.

    Public addresses and names always; loopback, private, shared (RFC 6598) and link-local ones only when an interface
    of this node lies in the same range or the announcement came ``direct`` from the peer: else any announcement could
    make every node of the network knock at an address inside its own home. Sockets, multicast and unspecified
    addresses never. Of a relayed address it is the relay's IP that is judged.

    Args:
        own_networks: the networks of this node's interfaces; with loopback in it, loopback addresses are dialled,
            which is what several nodes on one host need.
        direct: the announcement was handed over by its signer on a connection to this node.
    """
    allowed: list[Multiaddr] = []
    for addr in dict.fromkeys(addrs):
        if _may_dial(addr, own_networks, direct):
            allowed.append(addr)
    allowed.sort(key=lambda addr: addr.is_relayed)
    return tuple(allowed[:MAX_DIALLED_ADDRS])


def _may_dial(addr: Multiaddr, own_networks: Sequence[IpNetwork], direct: bool) -> bool:
    if addr.unix_path is not None:
        return False
    ip = _unmapped(addr.ip)
    if ip is None:
        return direct or not _is_localhost_name(addr)
    if ip.is_multicast or ip.is_unspecified or (ip.is_reserved and not ip.is_loopback):
        return False
    return ip.is_global or direct or any(ip in network for network in own_networks)


def _is_localhost_name(addr: Multiaddr) -> bool:
    parts = str(addr).split("/")
    host = parts[2].rstrip(".").lower() if len(parts) > 2 else ""
    return host == "localhost" or host.endswith(".localhost")


def _unmapped(ip: IpAddress | None) -> IpAddress | None:
    # ::ffff:127.0.0.1 is loopback whatever its family says.
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def groups_of(addrs: Iterable[Multiaddr]) -> frozenset[Group]:
    """The quota groups that these addresses count to: none for loopback and link-local ones.

    A relayed address counts to its relay, apart from the relay's own subnet: one relay carries many honest nodes.
    Names and addresses without an IP share one group.
    """
    groups: set[Group] = set()
    for addr in addrs:
        ip = _unmapped(addr.ip)
        if ip is None:
            groups.add(("indirect", "name"))
        elif ip.is_loopback or ip.is_link_local:
            continue
        else:
            bits = IPV4_GROUP_BITS if ip.version == 4 else IPV6_GROUP_BITS
            network = str(ipaddress.ip_network((ip, bits), strict=False))
            groups.add(("indirect" if addr.is_relayed else "subnet", network))
    return frozenset(groups)

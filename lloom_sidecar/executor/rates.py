"""How often peers may ask: token buckets that are looked at before anything else of a REQUEST. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from lloom_sidecar.errors import PeerBusyError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.addresses import Group
from lloom_sidecar.peers.rate import RateLimiter

MAX_PEERS: Final = 20_000
"""Members whose rate is remembered; who asked longest ago is forgotten first."""
MAX_SUBNETS: Final = 20_000
MAX_RETRY_AFTER_S: Final = 60.0


class RequestRates:
    """The buckets of one executor. Each holds what its rate gives in a second, at least one request."""

    def __init__(self, *, peer_per_s: float, subnet_per_s: float, global_per_s: float) -> None:
        """Requests in a second of one member, of all strangers in one subnet, of everybody; 0 = no limit."""
        self._peers: RateLimiter[PeerId] | None = _limiter(peer_per_s, MAX_PEERS)
        self._subnets: RateLimiter[Group] | None = _limiter(subnet_per_s, MAX_SUBNETS)
        self._all: RateLimiter[None] | None = _limiter(global_per_s, 1)

    @property
    def limits_strangers(self) -> bool:
        """False when it does not matter where a stranger comes from."""
        return self._subnets is not None

    def take(self, peer: PeerId, groups: Iterable[Group] | None, now: float) -> None:
        """Count one request. ``groups``: where a stranger comes from (``groups_of``); None for a member.

        The bucket of everybody comes last, so that who asks too often does not empty it for the others.
        Raises PeerBusyError (peer_rate, subnet_rate: 429; global_rate: 503) with the time until the next one passes.
        """
        if groups is None:
            if self._peers is not None and not self._peers.take(peer, now):
                raise _too_many("this peer sends", "peer_rate", 429, self._peers.wait_s(peer, now))
        elif self._subnets is not None:
            for group in groups:
                if not self._subnets.take(group, now):
                    raise _too_many("this peer's network sends", "subnet_rate", 429, self._subnets.wait_s(group, now))
        if self._all is not None and not self._all.take(None, now):
            raise _too_many("all peers together send", "global_rate", 503, self._all.wait_s(None, now))


def _limiter(rate_per_s: float, max_keys: int) -> RateLimiter[Any] | None:
    if rate_per_s <= 0:
        return None
    return RateLimiter(rate_per_s=rate_per_s, burst=max(1.0, rate_per_s), max_keys=max_keys)


def _too_many(who: str, code: str, http_status: int, wait_s: float) -> PeerBusyError:
    return PeerBusyError(
        f"{who} more requests than this executor takes",
        code=code,
        http_status=http_status,
        retry_after_s=min(MAX_RETRY_AFTER_S, wait_s),
    )

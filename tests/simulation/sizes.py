"""How long real announcements are: sealed once with the real code, so that the model counts true bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.protocol.announcement import MAX_TTL_S, seal_announcement
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Kind, Load, ModelOffer, Price

_NOW_MS: Final = 1_795_000_000_000
SIGNER: Final = Signer(bytes(range(32)))
KEY: Final = NetworkKey(bytes(range(1, 33)))
_MODEL: Final = ModelOffer(
    id="meta-llama/Llama-3.3-70B-Instruct",
    family="llama",
    context_length=131_072,
    quantisation="fp8",
    features=frozenset({"chat", "completions", "tools", "json_schema"}),
    price=Price(300, 900, "USD"),
    slots=16,
)
_ADDRS: Final = tuple(
    Multiaddr.parse(text)
    for text in (
        "/ip4/203.0.113.7/tcp/4001",
        "/ip4/203.0.113.7/udp/4001/quic-v1",
        "/ip6/2001:db8::7/tcp/4001",
        "/ip6/2001:db8::7/udp/4001/quic-v1",
    )
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of the sealed envelope, by kind."""

    full: int
    heartbeat: int
    removal: int

    def of(self, kind: int) -> int:
        """Bytes of an announcement of ``kind``."""
        if kind in (Kind.INITIAL, Kind.UPDATE):
            return self.full
        return self.heartbeat if kind == Kind.HEARTBEAT else self.removal


def sealed(kind: int, *, full_digest: bytes = b"", ttl_s: float = 30.0) -> bytes:
    """A real announcement of an executor with one model, four addresses and some load."""
    is_full = kind in (Kind.INITIAL, Kind.UPDATE)
    return seal_announcement(
        signer=SIGNER,
        key=KEY,
        sequence=_NOW_MS + kind,
        issued_at_ms=_NOW_MS,
        ttl_s=ttl_s,
        kind=kind,
        addrs=_ADDRS if is_full else (),
        models=(_MODEL,) if is_full else (),
        load=Load() if kind == Kind.REMOVAL else Load(7, 1, 41.5, 0.35),
        software="lloom/0.1.0" if is_full else "",
        full_digest=full_digest,
    )


@lru_cache(maxsize=1)
def real_sizes() -> Sizes:
    """Sizes of a typical executor's announcements."""
    return Sizes(
        full=len(sealed(Kind.UPDATE)),
        heartbeat=len(sealed(Kind.HEARTBEAT, full_digest=bytes(32))),
        removal=len(sealed(Kind.REMOVAL, ttl_s=MAX_TTL_S)),
    )

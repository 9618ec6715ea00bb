"""What only a hostile peer does: executors that do not exist, gossip that p2pd itself would not publish."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Awaitable, Callable, Iterator, Sequence

from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.announcement import seal_announcement
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.hello import CatalogueAsked, HelloAnswerer
from lloom_sidecar.protocol.names import TOPIC_EXECUTORS
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Kind, ModelOffer
from lloom_sidecar.protocol.varint import encode_varint
from tests.harness.hand_peer import now_ms

GOSSIPSUB = "/meshsub/1.1.0"
SIGN_PREFIX = b"libp2p-pubsub:"
"""Source: libp2p's pubsub specification, Message Signing."""


def invented(count: int, key: NetworkKey, *, model: str = "scripted", ttl_s: float = 600) -> list[tuple[Signer, bytes]]:
    """Keys that nobody runs a node with, and an announcement by each: of public addresses in as many subnets."""
    found = []
    for number in range(count):
        signer = Signer(hashlib.sha256(b"invented %d" % number).digest())
        address = Multiaddr.parse(f"/ip4/{20 + number // 250}.{number % 250}.7.7/tcp/4001")
        raw = seal_announcement(
            signer=signer,
            key=key,
            sequence=1,
            issued_at_ms=now_ms(),
            ttl_s=ttl_s,
            kind=Kind.INITIAL,
            addrs=(address,),
            models=[ModelOffer(model)],
        )
        found.append((signer, raw))
    return found


def gossip(messages: Sequence[tuple[Signer, bytes]], *, per_rpc: int = 20) -> Iterator[bytes]:
    """The bytes of a gossipsub stream that publishes these as their authors' own, each signed by its author.

    Source: libp2p's pubsub specification, The RPC; field numbers of rpc.proto.
    """
    for start in range(0, len(messages), per_rpc):
        rpc = b""
        for number, (author, data) in enumerate(messages[start : start + per_rpc], start):
            body = _field(1, author.peer.raw) + _field(2, data) + _field(3, struct.pack(">Q", number + 1))
            body += _field(4, TOPIC_EXECUTORS.encode())
            rpc += _field(2, body + _field(5, author.sign(SIGN_PREFIX + body)))
        yield encode_varint(len(rpc)) + rpc


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + encode_varint(len(value)) + value


def lying_catalogue(
    make_answerer: Callable[[P2PStream], HelloAnswerer], entries: Sequence[bytes]
) -> Callable[[P2PStream], Awaitable[None]]:
    """A handler of the hello protocol that answers every query with these announcements."""

    async def answer(stream: P2PStream) -> None:
        answerer = make_answerer(stream)
        while data := await stream.receive_some():
            out, events = answerer.receive(data)
            if out:
                await stream.send_all(out)
            for event in events:
                if isinstance(event, CatalogueAsked):
                    for raw in entries:
                        await stream.send_all(answerer.catalogue_entry(raw, b"", 0))
                    await stream.send_all(answerer.catalogue_end(1, False))

    return answer

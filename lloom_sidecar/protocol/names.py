"""Every name on the wire: protocol ids, topics, service keys, signature domains, key-derivation labels. Only here.

Source: PROTOCOL.md, Names.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

VERSION_MAJOR: Final = 1
VERSION_MINOR: Final = 0
"""Peers of another major version are not used; a minor version only adds."""

PROTOCOL_REQUEST: Final = "/lloom/request/1.0.0"
PROTOCOL_HELLO: Final = "/lloom/hello/1.0.0"

PROTOCOL_KAD: Final = "/ipfs/kad/1.0.0"
"""The DHT's own, spoken to one peer to see which records it holds itself. Source: libp2p's kad-dht spec."""

TOPIC_EXECUTORS: Final = "/lloom/executors/1.0.0"
TOPIC_NETWORK: Final = "/lloom/network/1.0.0"

SERVICE_EXECUTOR: Final = "/lloom/executor/1.0.0"
SERVICE_VALIDATOR: Final = "/lloom/validator/1.0.0"
_SERVICE_MODEL_PREFIX: Final = "/lloom/model/1.0.0/"

MDNS_SERVICE: Final = "_lloom._udp"
"""Under which nodes find each other on a local link."""

IDENTIFY_PROTOCOL_VERSION: Final = "/lloom/1.0.0"

_CID_V1_RAW_SHA2_256: Final = bytes((0x01, 0x55, 0x12, 0x20))
"""CIDv1, codec raw, multihash sha2-256 of 32 bytes. Source: multiformats tables."""


def agent_version(version: str) -> str:
    """What identify shows as the agent, e.g. ``lloom/0.1.0``."""
    return f"lloom/{version}"


def service_model(model: str) -> str:
    """The service key of one model; the id's exact bytes follow the prefix."""
    return _SERVICE_MODEL_PREFIX + model


def service_cid(key: str) -> bytes:
    """The CID (36 bytes) under which providers of a service key are kept in the DHT."""
    return _CID_V1_RAW_SHA2_256 + hashlib.sha256(key.encode()).digest()


class EnvelopeKind(NamedTuple):
    """One kind of signed statement: the domain separates its signatures from every other kind's."""

    domain: str
    payload_type: bytes


KIND_REQUEST: Final = EnvelopeKind("lloom-request-1", b"/lloom/envelope/request/1")
KIND_RECEIPT: Final = EnvelopeKind("lloom-receipt-1", b"/lloom/envelope/receipt/1")
KIND_CHECKPOINT: Final = EnvelopeKind("lloom-checkpoint-1", b"/lloom/envelope/checkpoint/1")
KIND_ACK: Final = EnvelopeKind("lloom-ack-1", b"/lloom/envelope/ack/1")
KIND_QUOTE: Final = EnvelopeKind("lloom-quote-1", b"/lloom/envelope/quote/1")
KIND_ANNOUNCEMENT: Final = EnvelopeKind("lloom-announcement-1", b"/lloom/envelope/announcement/1")
KIND_STATUS: Final = EnvelopeKind("lloom-status-1", b"/lloom/envelope/status/1")
KIND_EVIDENCE: Final = EnvelopeKind("lloom-evidence-1", b"/lloom/envelope/evidence/1")

ALL_KINDS: Final = (
    KIND_REQUEST,
    KIND_RECEIPT,
    KIND_CHECKPOINT,
    KIND_ACK,
    KIND_QUOTE,
    KIND_ANNOUNCEMENT,
    KIND_STATUS,
    KIND_EVIDENCE,
)

HELLO_PROOF_LABEL: Final = b"lloom-hello-1"
HKDF_LABEL_HELLO: Final = b"lloom-network-hello-1"
HKDF_LABEL_ANNOUNCE: Final = b"lloom-network-announce-1"
HKDF_LABEL_PSK: Final = b"lloom-network-psk-1"
HKDF_LABEL_NETWORK_ID: Final = b"lloom-network-id-1"

"""Makes the golden files beside it; the tests compare them byte for byte.

``python tests/golden/golden_vectors.py write`` rewrites them: only together with PROTOCOL.md and a note of the version.
``python tests/golden/golden_vectors.py go-input`` prints what ``tests/golden/go/cmd/golden`` reads, which makes
``envelopes_go.json``::

    python tests/golden/golden_vectors.py go-input | (cd tests/golden/go && go run ./cmd/golden) > \\
        tests/golden/envelopes_go.json

All bytes are lower-case hex; messages are in protobuf's JSON form with the names of lloom.proto. The keys protect
nothing: Ed25519 seeds 00..1f (executor) and 20..3f (client), network keys of 32 bytes 4e and 4f.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.protocol import claims, names
from lloom_sidecar.protocol.announcement import seal_announcement
from lloom_sidecar.protocol.envelope import Signer, seal
from lloom_sidecar.protocol.evidence import CanaryAnswer, CanaryRound, Evidence, seal_evidence
from lloom_sidecar.protocol.framing import frame
from lloom_sidecar.protocol.hello import Event, HelloAnswerer, HelloOpener
from lloom_sidecar.protocol.network_key import Invite, NetworkKey, format_key_file
from lloom_sidecar.protocol.offers import Kind, Load, ModelOffer, Price
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.status import ModelStatus, NetworkStatus, seal_status

HERE = Path(__file__).parent
EXECUTOR = Signer(bytes(range(0x20)))
CLIENT = Signer(bytes(range(0x20, 0x40)))
NETWORK = NetworkKey(b"\x4e" * 32)
OLD_NETWORK = NetworkKey(b"\x4f" * 32)
NOW_MS = 1_790_000_000_000
CHALLENGE = bytes(range(0x50, 0x60))
SALT = bytes(range(0x60, 0x70))
BODY = b'{"model":"smollm2:135m","messages":[{"role":"user","content":"Hello"}]}'
ANSWER = b'{"id":"1","choices":[{"message":{"role":"assistant","content":"Hi"}}]}'
VALIDATOR_ADDRESS = Multiaddr.parse(f"/dns4/validator.example/tcp/4001/p2p/{EXECUTOR.peer}")
PRICE = pb.Price(prompt_per_million=150, completion_per_million=600, currency="EUR")
MODEL = ModelOffer(
    id="smollm2:135m",
    family="smollm2",
    context_length=2048,
    quantisation="Q4_K_M",
    features=frozenset({"chat", "completions"}),
    price=Price(150, 600, "EUR"),
    slots=4,
    digest=bytes(range(0xA0, 0xC0)),
)


def as_json(message: Message) -> dict[str, Any]:
    """protobuf's JSON form; bytes are base64 there."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def request_claims() -> pb.RequestClaims:
    return pb.RequestClaims(
        request_id=bytes(range(0x10)),
        executor=EXECUTOR.peer.raw,
        issued_at_ms=NOW_MS,
        challenge=CHALLENGE,
        exchange=1,
        deadline_ms=60_000,
        operation=pb.OPERATION_CHAT,
        model="smollm2:135m",
        body_digest=claims.salted_digest(SALT, BODY),
        max_price=PRICE,
        max_cost=100,
        max_cost_set=True,
        priority=-1,
        idempotency_key=b"key-1",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


REQUEST = claims.seal_request(request_claims(), CLIENT)


def receipt_claims(outcome: pb.Outcome) -> pb.ReceiptClaims:
    usage = pb.Usage(prompt_tokens=12, completion_tokens=345)
    return pb.ReceiptClaims(
        client=CLIENT.peer.raw,
        executor=EXECUTOR.peer.raw,
        request_digest=hashlib.sha256(REQUEST).digest(),
        answer_digest=claims.salted_digest(SALT, ANSWER),
        answer_bytes=len(ANSWER),
        model="smollm2:135m",
        usage=usage,
        usage_source=pb.USAGE_SOURCE_BACKEND,
        price=PRICE,
        cost=claims.cost_of(PRICE, usage),
        accepted_at_ms=NOW_MS + 5,
        first_at_ms=NOW_MS + 105,
        ended_at_ms=NOW_MS + 1005,
        outcome=outcome,
    )


RECEIPT = claims.seal_receipt(receipt_claims(pb.OUTCOME_COMPLETE), EXECUTOR)
ACK = claims.seal_ack(RECEIPT, CLIENT)
CHECKPOINT = seal(names.KIND_CHECKPOINT, receipt_claims(pb.OUTCOME_PARTIAL).SerializeToString(), EXECUTOR)
QUOTE_CLAIMS = pb.QuoteClaims(
    quote_id=bytes(range(0x70, 0x80)),
    client=CLIENT.peer.raw,
    executor=EXECUTOR.peer.raw,
    model="smollm2:135m",
    price=PRICE,
    issued_at_ms=NOW_MS,
    valid_until_ms=NOW_MS + 60_000,
)
INITIAL = seal_announcement(
    signer=EXECUTOR,
    key=NETWORK,
    sequence=NOW_MS,
    issued_at_ms=NOW_MS,
    ttl_s=30,
    kind=Kind.INITIAL,
    addrs=[
        Multiaddr.parse("/ip4/203.0.113.7/tcp/4001"),
        Multiaddr.parse(f"/dns4/relay.example/tcp/4001/p2p/{CLIENT.peer}/p2p-circuit/p2p/{EXECUTOR.peer}"),
    ],
    models=[MODEL],
    load=Load(in_flight=1, queued=2, tokens_per_s=12.5, ttft_s=0.25),
    software="lloom/0.1.0",
)
HEARTBEAT = seal_announcement(
    signer=EXECUTOR,
    key=NETWORK,
    sequence=NOW_MS + 10_000,
    issued_at_ms=NOW_MS + 10_000,
    ttl_s=30,
    kind=Kind.HEARTBEAT,
    load=Load(in_flight=3, queued=0, tokens_per_s=11.5, ttft_s=0.5),
    full_digest=hashlib.sha256(INITIAL).digest(),
)
REMOVAL = seal_announcement(
    signer=EXECUTOR,
    key=NETWORK,
    sequence=NOW_MS + 20_000,
    issued_at_ms=NOW_MS + 20_000,
    ttl_s=900,
    kind=Kind.REMOVAL,
)


def canary_round(number: int) -> CanaryRound:
    """Three executors, of which the first is unlike the others; the key that signs all else plays the validator."""
    answers = []
    for index in range(3):
        signer = Signer(bytes([0xC0 + index]) * 32)
        receipt = pb.ReceiptClaims(
            client=EXECUTOR.peer.raw, executor=signer.peer.raw, model="smollm2:135m", ended_at_ms=NOW_MS + number
        )
        answers.append(
            CanaryAnswer(
                signer.peer, claims.seal_receipt(receipt, signer), bytes([0xD0 + min(index, 1)]) * 32, index != 0
            )
        )
    return CanaryRound(bytes([0xE0 + number]) * 32, tuple(answers))


EVIDENCE = seal_evidence(
    signer=EXECUTOR,
    key=NETWORK,
    sequence=NOW_MS + 5,
    issued_at_ms=NOW_MS,
    ttl_s=900,
    evidence=Evidence(Signer(b"\xc0" * 32).peer, "smollm2:135m", MODEL.digest, (canary_round(0), canary_round(1))),
)
STATUS = seal_status(
    signer=EXECUTOR,
    key=NETWORK,
    sequence=NOW_MS + 30_000,
    issued_at_ms=NOW_MS + 30_000,
    ttl_s=90,
    status=NetworkStatus(
        executors=2,
        members=3,
        models_total=2,
        models=(
            ModelStatus("smollm2:135m", 2, 8, Price(150, 600, "EUR"), 1),
            ModelStatus("qwen3:8b \u00fc", 1, 4, Price(), 1),
        ),
        software=(("lloom/0.1.0", 3), ("lloom/0.0.9", 1)),
        in_flight=5,
        queued=1,
        slots=12,
    ),
)
STRANGER = seal_announcement(
    signer=CLIENT, key=None, sequence=1, issued_at_ms=NOW_MS, ttl_s=1, kind=Kind.UPDATE, models=[ModelOffer("m")]
)


def service_keys() -> list[str]:
    return [
        names.SERVICE_EXECUTOR,
        names.SERVICE_VALIDATOR,
        names.service_model("smollm2:135m"),
        names.service_model("meta-llama/Llama-3.1-8B-Instruct"),
        names.service_model("qwen3:8b \u00fc"),
    ]


def build_names() -> dict[str, Any]:
    keys = []
    for key in service_keys():
        cid = names.service_cid(key)
        text = "b" + base64.b32encode(cid).decode().rstrip("=").lower()
        keys.append({"key": key, "key_bytes": key.encode().hex(), "cid_bytes": cid.hex(), "cid": text})
    return {
        "protocols": [names.PROTOCOL_REQUEST, names.PROTOCOL_HELLO],
        "topics": [names.TOPIC_EXECUTORS, names.TOPIC_NETWORK],
        "identify": [names.IDENTIFY_PROTOCOL_VERSION, names.agent_version("0.1.0")],
        "service_keys": keys,
        "envelope_kinds": [
            {"domain": kind.domain, "payload_type": kind.payload_type.decode()} for kind in names.ALL_KINDS
        ],
    }


def frames() -> dict[str, pb.Frame]:
    """One of each kind on the request protocol."""
    error = pb.Error(
        code="price_changed",
        message="The price is higher now.",
        http_status=402,
        retryable=True,
        retry_after_ms=1500,
        body=b'{"error":{}}',
        price=PRICE,
    )
    return {
        "open": pb.Frame(open=pb.Open(version_major=1, version_minor=0)),
        "accept": pb.Frame(
            accept=pb.Accept(now_ms=NOW_MS, challenge=CHALLENGE, max_streams=64, max_body_bytes=32 * 1024 * 1024)
        ),
        "request": pb.Frame(request=pb.Request(envelope=REQUEST, salt=SALT, body_length=len(BODY))),
        "body": pb.Frame(body=BODY),
        "head": pb.Frame(head=pb.Head(content_type="application/json", encoding=pb.ENCODING_ZSTD, backend_us=100_000)),
        "data": pb.Frame(data=ANSWER),
        "checkpoint": pb.Frame(checkpoint=pb.Checkpoint(envelope=CHECKPOINT)),
        "end": pb.Frame(end=pb.End(receipt=RECEIPT)),
        "error": pb.Frame(error=error),
        "ack": pb.Frame(ack=pb.Ack(exchange=1, envelope=ACK)),
        "go_away": pb.Frame(go_away=pb.GoAway(reason="shutdown", retry_after_ms=5000)),
        "ping": pb.Frame(ping=pb.Ping(payload=7)),
        "pong": pb.Frame(pong=pb.Pong(payload=7)),
    }


def build_frames() -> dict[str, Any]:
    return {
        name: {"json": as_json(message), "bytes": frame(message.SerializeToString()).hex()}
        for name, message in frames().items()
    }


def envelopes() -> dict[str, tuple[names.EnvelopeKind, Message, Signer, bytes]]:
    """Name -> kind, claims, signer, sealed bytes."""
    quote = seal(names.KIND_QUOTE, QUOTE_CLAIMS.SerializeToString(), EXECUTOR)
    ack = pb.AckClaims(receipt_digest=hashlib.sha256(RECEIPT).digest())
    out: dict[str, tuple[names.EnvelopeKind, Message, Signer, bytes]] = {
        "request": (names.KIND_REQUEST, request_claims(), CLIENT, REQUEST),
        "receipt": (names.KIND_RECEIPT, receipt_claims(pb.OUTCOME_COMPLETE), EXECUTOR, RECEIPT),
        "checkpoint": (names.KIND_CHECKPOINT, receipt_claims(pb.OUTCOME_PARTIAL), EXECUTOR, CHECKPOINT),
        "ack": (names.KIND_ACK, ack, CLIENT, ACK),
        "quote": (names.KIND_QUOTE, QUOTE_CLAIMS, EXECUTOR, quote),
    }
    for name, raw, signer in (
        ("announcement_initial", INITIAL, EXECUTOR),
        ("announcement_heartbeat", HEARTBEAT, EXECUTOR),
        ("announcement_removal", REMOVAL, EXECUTOR),
        ("announcement_stranger", STRANGER, CLIENT),
    ):
        payload = pb.Envelope.FromString(raw).payload
        out[name] = (names.KIND_ANNOUNCEMENT, pb.AnnouncementClaims.FromString(payload), signer, raw)
    payload = pb.Envelope.FromString(EVIDENCE).payload
    out["evidence"] = (names.KIND_EVIDENCE, pb.EvidenceClaims.FromString(payload), EXECUTOR, EVIDENCE)
    payload = pb.Envelope.FromString(STATUS).payload
    out["status"] = (names.KIND_STATUS, pb.NetworkStatusClaims.FromString(payload), EXECUTOR, STATUS)
    return out


def build_envelopes() -> dict[str, Any]:
    return {
        "salt": SALT.hex(),
        "body": BODY.decode(),
        "answer": ANSWER.decode(),
        "keys": {
            name: {
                "private_key": signer.marshalled().hex(),
                "peer_id": str(signer.peer),
                "peer_id_bytes": signer.peer.raw.hex(),
            }
            for name, signer in (("executor", EXECUTOR), ("client", CLIENT))
        },
        "envelopes": {
            name: {
                "domain": kind.domain,
                "payload_type": kind.payload_type.decode(),
                "signer": str(signer.peer),
                "claims": as_json(message),
                "payload": message.SerializeToString().hex(),
                "envelope": raw.hex(),
                "digest": hashlib.sha256(raw).hexdigest(),
            }
            for name, (kind, message, signer, raw) in envelopes().items()
        },
    }


def go_records() -> list[tuple[names.EnvelopeKind, bytes]]:
    """Each kind's real payload, one of no meaning, and an empty one; the executor signs all."""
    records = [(kind, message.SerializeToString()) for kind, message, _signer, _raw in envelopes().values()]
    return [*records, (names.KIND_STATUS, b"status"), (names.KIND_STATUS, b"")]


def go_input() -> dict[str, Any]:
    return {
        "records": [
            {"domain": kind.domain, "payload_type": kind.payload_type.hex(), "payload": payload.hex()}
            for kind, payload in go_records()
        ],
        "service_keys": service_keys(),
    }


def build_network() -> dict[str, Any]:
    invite = Invite((VALIDATOR_ADDRESS,), NETWORK)
    return {
        "network_key": "4e" * 32,
        "k_hello": NETWORK.k_hello.hex(),
        "k_announce": NETWORK.k_announce.hex(),
        "k_psk": NETWORK.k_psk.hex(),
        "network_id": NETWORK.network_id.hex(),
        "announce_tag": {
            "signer": str(EXECUTOR.peer),
            "sequence": NOW_MS,
            "tag": NETWORK.announce_tag(EXECUTOR.peer, NOW_MS).hex(),
        },
        "key_file": format_key_file(NETWORK).decode(),
        "key_file_rotated": format_key_file(NETWORK, (OLD_NETWORK, NOW_MS)).decode(),
        "rotated": {"previous_key": "4f" * 32, "previous_until_ms": NOW_MS},
        "invite": invite.encode(),
        "invite_validators": [str(address) for address in invite.validators],
        "invite_without_validators": Invite((), NETWORK).encode(),
    }


def hello_pair(*, opener_keys: list[NetworkKey], answerer_keys: list[NetworkKey], is_open: bool) -> list[_Side]:
    opener = HelloOpener(
        me=CLIENT.peer,
        peer=EXECUTOR.peer,
        keys=opener_keys,
        is_open=is_open,
        node=pb.NodeInfo(roles=[pb.ROLE_CLIENT], features=["compression"], software="lloom/0.1.0", now_ms=NOW_MS),
        nonce=bytes(range(0x80, 0xA0)),
    )
    answerer = HelloAnswerer(
        me=EXECUTOR.peer,
        peer=CLIENT.peer,
        keys=answerer_keys,
        is_open=is_open,
        node=pb.NodeInfo(
            roles=[pb.ROLE_EXECUTOR, pb.ROLE_VALIDATOR],
            features=["compression", "resume"],
            max_streams=64,
            announcement=INITIAL,
            software="lloom/0.1.0",
            now_ms=NOW_MS + 1,
        ),
        nonce=bytes(range(0xC0, 0xE0)),
    )
    return [opener, answerer]


_Side = HelloOpener | HelloAnswerer
Transcript = list[tuple[str, bytes, list[Event]]]


def run_hello(sides: list[_Side]) -> Transcript:
    """Who sent what, and the events that it made at the other side."""
    opener, answerer = sides
    assert isinstance(opener, HelloOpener)
    transcript: Transcript = []
    data, turn = opener.start(), "opener"
    while data:
        receiver = answerer if turn == "opener" else opener
        answer, events = receiver.receive(data)
        transcript.append((turn, data, events))
        data, turn = answer, "answerer" if turn == "opener" else "opener"
    return transcript


def member_transcript() -> Transcript:
    sides = hello_pair(opener_keys=[NETWORK, OLD_NETWORK], answerer_keys=[NETWORK], is_open=False)
    transcript = run_hello(sides)
    opener, answerer = sides
    assert isinstance(opener, HelloOpener)
    assert isinstance(answerer, HelloAnswerer)
    query = opener.catalogue_query("smollm2:135m", 5)
    transcript.append(("opener", query, answerer.receive(query)[1]))
    for data in (answerer.catalogue_entry(INITIAL, HEARTBEAT, 1500), answerer.catalogue_end(6, False)):
        transcript.append(("answerer", data, opener.receive(data)[1]))
    return transcript


def transcripts() -> dict[str, Transcript]:
    return {
        "member": member_transcript(),
        "open": run_hello(hello_pair(opener_keys=[], answerer_keys=[NETWORK], is_open=True)),
        "not_member": run_hello(hello_pair(opener_keys=[OLD_NETWORK], answerer_keys=[NETWORK], is_open=False)),
    }


def build_hello() -> dict[str, Any]:
    out: dict[str, Any] = {
        "opener": str(CLIENT.peer),
        "answerer": str(EXECUTOR.peer),
        "nonce_opener": bytes(range(0x80, 0xA0)).hex(),
        "nonce_answerer": bytes(range(0xC0, 0xE0)).hex(),
    }
    for name, transcript in transcripts().items():
        out[name] = [
            {
                "from": sender,
                "json": as_json(pb.HelloFrame.FromString(data[2:] if data[0] >= 0x80 else data[1:])),
                "bytes": data.hex(),
            }
            for sender, data, _events in transcript
        ]
    return out


def build_compression() -> dict[str, Any]:
    """Made once: another version of a compressor may make other bytes of the same content. All must read these."""
    zstd = (
        "28b52ffd20d225020062840e1590391d96b5a2588736d26e80fd56e581215fffab046b586b0cb6135da2742e2732596ccdf61d2959d957"
    )
    zstd += "98f6909560f70e26e35c06b6095c0501004622a14214"
    gzip = "1f8b0800000000000003ab56ca4c51b2523254d2514acec8cf4c4e2d56b28aae56ca4d2d2e4e4c4f55b2aa562acacf01d24a89c5c5"
    gzip += "99c5258979252095f97925a94096959247a6526d6d6c6df520320500212f5c17d2000000"
    return {
        "content": (ANSWER * 3).hex(),
        "zstd": {"encoding": pb.ENCODING_ZSTD, "bytes": zstd},
        "gzip": {"encoding": pb.ENCODING_GZIP, "bytes": gzip},
    }


FILES = {
    "names.json": build_names,
    "frames.json": build_frames,
    "compression.json": build_compression,
    "envelopes.json": build_envelopes,
    "network.json": build_network,
    "hello.json": build_hello,
}


def text_of(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    if arguments == ["write"]:
        for name, build in FILES.items():
            (HERE / name).write_text(text_of(build()))
        return 0
    if arguments == ["go-input"]:
        print(json.dumps(go_input()))
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

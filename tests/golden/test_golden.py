"""The wire's bytes are those of the golden files: made, and read back. Changing one is a change of the protocol."""

from __future__ import annotations

import base64
import json
from typing import Any

import golden_vectors as golden
import pytest
from google.protobuf import json_format

from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.protocol import claims, names
from lloom_sidecar.protocol.announcement import open_announcement
from lloom_sidecar.protocol.compression import decompress
from lloom_sidecar.protocol.envelope import Signer, open_envelope, seal
from lloom_sidecar.protocol.evidence import open_evidence
from lloom_sidecar.protocol.framing import FrameCutter, frame
from lloom_sidecar.protocol.hello import (
    CatalogueAsked,
    CatalogueEnd,
    CatalogueEntry,
    HelloDone,
    HelloRefused,
    membership_proof,
)
from lloom_sidecar.protocol.network_key import Invite, NetworkKey, NetworkKeys, parse_key_file
from lloom_sidecar.protocol.offers import Kind
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.status import open_status


def load(name: str) -> Any:
    return json.loads((golden.HERE / name).read_text())


@pytest.mark.parametrize("name", golden.FILES)
def test_what_we_make_is_the_golden_file(name: str) -> None:
    assert golden.text_of(golden.FILES[name]()) == (golden.HERE / name).read_text()


@pytest.mark.parametrize("kind", golden.frames())
def test_a_golden_frame_reads_back(kind: str) -> None:
    entry = load("frames.json")[kind]
    (message,) = FrameCutter().feed(bytes.fromhex(entry["bytes"]))
    parsed = pb.Frame.FromString(message)
    assert parsed.WhichOneof("kind") == kind
    assert golden.as_json(parsed) == entry["json"]
    remade = json_format.ParseDict(entry["json"], pb.Frame()).SerializeToString()
    assert frame(remade).hex() == entry["bytes"]


def test_every_kind_of_frame_has_a_golden_one() -> None:
    assert set(load("frames.json")) == {field.name for field in pb.Frame.DESCRIPTOR.fields}


@pytest.mark.parametrize("name", ["zstd", "gzip"])
def test_golden_compressed_bytes_are_decompressed(name: str) -> None:
    document = load("compression.json")
    content = bytes.fromhex(document["content"])
    packed = bytes.fromhex(document[name]["bytes"])
    assert decompress(packed, document[name]["encoding"], len(content)) == content


@pytest.mark.parametrize("name", golden.envelopes())
def test_a_golden_envelope_opens_and_is_sealed_again(name: str) -> None:
    document = load("envelopes.json")
    entry = document["envelopes"][name]
    raw, payload = bytes.fromhex(entry["envelope"]), bytes.fromhex(entry["payload"])
    kind = names.EnvelopeKind(entry["domain"], entry["payload_type"].encode())
    opened = open_envelope(raw, kind, expected_signer=PeerId.parse(entry["signer"]))
    assert opened.payload == payload
    (private_key,) = [key["private_key"] for key in document["keys"].values() if key["peer_id"] == entry["signer"]]
    assert seal(kind, payload, Signer.from_marshalled(bytes.fromhex(private_key))) == raw


def test_every_kind_of_envelope_has_a_golden_one() -> None:
    kinds = {entry["domain"] for entry in load("envelopes.json")["envelopes"].values()}
    assert kinds == {kind.domain for kind in names.ALL_KINDS}


def test_the_golden_exchange_holds_together() -> None:
    document = load("envelopes.json")
    raw = {name: bytes.fromhex(entry["envelope"]) for name, entry in document["envelopes"].items()}
    client, executor = (PeerId.parse(document["keys"][name]["peer_id"]) for name in ("client", "executor"))
    salt = bytes.fromhex(document["salt"])
    checked = claims.check_request(
        raw["request"], sender=client, executor=executor, challenge=golden.CHALLENGE, exchange=1, now_ms=golden.NOW_MS
    )
    assert checked.claims.body_digest == claims.salted_digest(salt, document["body"].encode())
    answer = document["answer"].encode()
    receipt = claims.check_receipt(
        raw["receipt"],
        client=client,
        executor=executor,
        request_digest=checked.digest,
        request=checked.claims,
        answer_digest=claims.salted_digest(salt, answer),
        answer_bytes=len(answer),
    )
    assert receipt.cost == 1  # (12 x 150 + 345 x 600) / 1,000,000, rounded up
    claims.check_ack(raw["ack"], client=client, receipt=raw["receipt"])


def test_the_golden_announcements_open() -> None:
    raw = {name: bytes.fromhex(entry["envelope"]) for name, entry in load("envelopes.json")["envelopes"].items()}
    keys = (NetworkKey(bytes.fromhex(load("network.json")["network_key"])),)
    initial = open_announcement(raw["announcement_initial"], keys=keys, expected_signer=golden.EXECUTOR.peer)
    assert initial.is_member
    assert initial.is_full
    assert initial.models == (golden.MODEL,)
    assert [str(address) for address in initial.addrs] == [
        "/ip4/203.0.113.7/tcp/4001",
        f"/dns4/relay.example/tcp/4001/p2p/{golden.CLIENT.peer}/p2p-circuit/p2p/{golden.EXECUTOR.peer}",
    ]
    heartbeat = open_announcement(raw["announcement_heartbeat"], keys=keys, expected_signer=None)
    assert heartbeat.full_digest == initial.digest
    assert heartbeat.load.ttft_s == 0.5
    removal = open_announcement(raw["announcement_removal"], keys=keys, expected_signer=None)
    assert removal.kind == Kind.REMOVAL
    assert removal.ttl_s == 900
    stranger = open_announcement(raw["announcement_stranger"], keys=keys, expected_signer=None)
    assert not stranger.is_member


def test_the_golden_evidence_opens() -> None:
    raw = bytes.fromhex(load("envelopes.json")["envelopes"]["evidence"]["envelope"])
    signed = open_evidence(raw, keys=[golden.NETWORK], expected_signer=golden.EXECUTOR.peer)
    assert signed.is_member
    assert signed.evidence.model_digest == golden.MODEL.digest
    assert [[answer.agrees for answer in one.answers] for one in signed.evidence.rounds] == [[False, True, True]] * 2


def test_the_golden_status_opens() -> None:
    raw = bytes.fromhex(load("envelopes.json")["envelopes"]["status"]["envelope"])
    keys = (NetworkKey(bytes.fromhex(load("network.json")["network_key"])),)
    signed = open_status(raw, keys=keys, expected_signer=golden.EXECUTOR.peer)
    assert signed.is_member
    assert (signed.sequence, signed.ttl_s) == (golden.NOW_MS + 30_000, 90)
    assert signed.status.models[0].median_price == golden.MODEL.price
    assert signed.status.software == (("lloom/0.1.0", 3), ("lloom/0.0.9", 1))


class TestMadeByGoLibp2p:
    document = load("envelopes_go.json")

    def test_it_was_made_of_what_we_would_ask_for(self) -> None:
        asked = golden.go_input()
        made = [
            {key: record[key] for key in ("domain", "payload_type", "payload")} for record in self.document["records"]
        ]
        assert made == asked["records"]
        assert [entry["key"] for entry in self.document["service_keys"]] == asked["service_keys"]

    def test_the_key_is_marshalled_alike(self) -> None:
        key = self.document["key"]
        signer = Signer(bytes.fromhex(key["seed"]))
        assert signer.marshalled().hex() == key["private_key"]
        assert str(signer.peer) == key["peer_id"]
        assert signer.peer.raw.hex() == "0024" + key["public_key"]

    @pytest.mark.parametrize("index", range(len(golden.go_records())))
    def test_an_envelope_is_ours_byte_for_byte_and_opens(self, index: int) -> None:
        record = self.document["records"][index]
        kind = names.EnvelopeKind(record["domain"], bytes.fromhex(record["payload_type"]))
        payload, raw = bytes.fromhex(record["payload"]), bytes.fromhex(record["envelope"])
        assert seal(kind, payload, golden.EXECUTOR).hex() == record["envelope"]
        opened = open_envelope(raw, kind, expected_signer=PeerId.parse(self.document["key"]["peer_id"]))
        assert opened.payload == payload

    def test_every_kind_was_sealed(self) -> None:
        sealed = {(record["domain"], record["payload_type"]) for record in self.document["records"]}
        assert sealed == {(kind.domain, kind.payload_type.hex()) for kind in names.ALL_KINDS}

    def test_a_service_key_has_the_same_cid(self) -> None:
        for entry in self.document["service_keys"]:
            assert names.service_cid(entry["key"]).hex() == entry["cid_bytes"]


def test_golden_names() -> None:
    document = load("names.json")
    assert document["service_keys"][0]["cid"] == "bafkreie553kd6bmejw4fmfd7itnxp5insfchuvo3tsfef7evfrxxzq7bae"
    for entry in document["service_keys"]:
        padded = entry["cid"][1:].upper() + "=" * (-len(entry["cid"][1:]) % 8)
        assert base64.b32decode(padded) == names.service_cid(bytes.fromhex(entry["key_bytes"]).decode())


def test_golden_network() -> None:
    document = load("network.json")
    key = NetworkKey(bytes.fromhex(document["network_key"]))
    assert parse_key_file(document["key_file"].encode()) == NetworkKeys(key)
    rotated = document["rotated"]
    previous = NetworkKey(bytes.fromhex(rotated["previous_key"]))
    expected = NetworkKeys(key, previous, rotated["previous_until_ms"])
    assert parse_key_file(document["key_file_rotated"].encode()) == expected
    invite = Invite.decode(document["invite"])
    assert invite == Invite(tuple(map(Multiaddr.parse, document["invite_validators"])), key)
    assert Invite.decode(document["invite_without_validators"]) == Invite((), key)


class TestGoldenHello:
    document = load("hello.json")

    def test_a_member_is_welcomed_and_reads_the_catalogue(self) -> None:
        events = [event for _sender, _data, step in golden.transcripts()["member"] for event in step]
        network = golden.NETWORK.network_id
        answerer_done, opener_done, asked, entry, end = events
        assert isinstance(answerer_done, HelloDone)
        assert isinstance(opener_done, HelloDone)
        assert (answerer_done.is_member, answerer_done.network_id) == (True, network)
        assert answerer_done.node.roles == [pb.ROLE_CLIENT]
        assert (opener_done.is_member, opener_done.network_id) == (True, network)
        assert opener_done.node.announcement == golden.INITIAL
        assert asked == CatalogueAsked("smollm2:135m", 5)
        assert entry == CatalogueEntry(golden.INITIAL, golden.HEARTBEAT, 1500)
        assert end == CatalogueEnd(6, False)

    def test_the_proofs_are_those_of_the_specification(self) -> None:
        reply, prove = (step["json"] for step in self.document["member"][1:3])
        for by_opener, proof in ((False, reply["reply"]["proof"]), (True, prove["prove"]["proof"])):
            expected = membership_proof(
                golden.NETWORK,
                by_opener=by_opener,
                opener=PeerId.parse(self.document["opener"]),
                answerer=PeerId.parse(self.document["answerer"]),
                nonce_opener=bytes.fromhex(self.document["nonce_opener"]),
                nonce_answerer=bytes.fromhex(self.document["nonce_answerer"]),
            )
            assert base64.b64decode(proof) == expected

    def test_open_sides_are_strangers(self) -> None:
        events = [event for _sender, _data, step in golden.transcripts()["open"] for event in step]
        assert [(type(event), getattr(event, "is_member", None)) for event in events] == [(HelloDone, False)] * 2

    def test_another_network_is_refused(self) -> None:
        events = [event for _sender, _data, step in golden.transcripts()["not_member"] for event in step]
        message = events[0].message if isinstance(events[0], HelloRefused) else ""
        assert events == [HelloRefused("not_member", message, is_ours=is_ours) for is_ours in (True, False)]

    def test_every_kind_of_frame_occurs(self) -> None:
        kinds = {next(iter(step["json"])) for name in ("member", "open", "not_member") for step in self.document[name]}
        assert kinds == {field.name for field in pb.HelloFrame.DESCRIPTOR.fields}

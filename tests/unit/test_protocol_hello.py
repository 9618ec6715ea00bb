"""Hello as a dialogue: who proves what to whom, and what a stranger, a reflector and a relay learn (nothing)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lloom_sidecar.errors import LocalProtocolError, RemoteProtocolError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol import hello as hi
from lloom_sidecar.protocol.framing import MAX_FRAME_BYTES, FrameCutter, frame
from lloom_sidecar.protocol.hello import (
    CatalogueAsked,
    CatalogueEnd,
    CatalogueEntry,
    HelloAnswerer,
    HelloDone,
    HelloOpener,
    HelloRefused,
    HelloState,
    membership_proof,
)
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.varint import encode_varint

ALICE, BOB, MALLORY = (PeerId.from_ed25519(bytes([number]) * 32) for number in (1, 2, 3))
KEY, OLD, OTHER = (NetworkKey(letter * 32) for letter in (b"k", b"o", b"x"))
ALICE_NODE = pb.NodeInfo(roles=[pb.ROLE_CLIENT], features=["compression"], software="lloom/0.1.0 alice", now_ms=1)
BOB_NODE = pb.NodeInfo(
    roles=[pb.ROLE_EXECUTOR], features=["resume"], max_streams=8, announcement=b"a", software="lloom/0.1.0 bob"
)


def sent(**fields: object) -> bytes:
    return frame(pb.HelloFrame(**fields).SerializeToString())  # type: ignore[arg-type]


def read(data: bytes) -> pb.HelloFrame:
    (message,) = FrameCutter().feed(data)
    return pb.HelloFrame.FromString(message)


def opener(*keys: NetworkKey, is_open: bool = False, me: PeerId = ALICE, peer: PeerId = BOB) -> HelloOpener:
    return HelloOpener(me=me, peer=peer, keys=keys, is_open=is_open, node=ALICE_NODE, nonce=b"a" * 32)


def answerer(
    *keys: NetworkKey, is_open: bool = False, me: PeerId = BOB, peer: PeerId = ALICE, nonce: bytes = b"b" * 32
) -> HelloAnswerer:
    return HelloAnswerer(me=me, peer=peer, keys=keys, is_open=is_open, node=BOB_NODE, nonce=nonce)


def talk(alice: HelloOpener, bob: HelloAnswerer) -> tuple[list[hi.Event], list[hi.Event], bytes]:
    """The events at each side, and all bytes that went over."""
    heard_by_alice: list[hi.Event] = []
    heard_by_bob: list[hi.Event] = []
    wire = data = alice.start()
    while data:
        data, events = bob.receive(data)
        heard_by_bob += events
        wire += data
        data, events = alice.receive(data)
        heard_by_alice += events
        wire += data
    return heard_by_alice, heard_by_bob, wire


def done() -> tuple[HelloOpener, HelloAnswerer]:
    alice, bob = opener(KEY), answerer(KEY)
    talk(alice, bob)
    assert (alice.state, bob.state) == (HelloState.IDLE, HelloState.IDLE)
    return alice, bob


class TestMembers:
    @pytest.mark.parametrize(
        ("alices", "bobs", "shared"),
        [
            ((KEY,), (KEY,), KEY),
            ((KEY, OLD), (OLD,), OLD),
            ((OLD,), (KEY, OLD), OLD),
            ((KEY, OLD), (OLD, KEY), KEY),
            ((OTHER, KEY), (KEY, OLD), KEY),
        ],
    )
    @pytest.mark.parametrize("is_open", [False, True])
    def test_a_shared_key_makes_both_members(
        self, alices: Sequence[NetworkKey], bobs: Sequence[NetworkKey], shared: NetworkKey, is_open: bool
    ) -> None:
        at_alice, at_bob, _ = talk(opener(*alices, is_open=is_open), answerer(*bobs, is_open=is_open))
        assert at_alice == [HelloDone(True, shared.network_id, BOB_NODE)]
        assert at_bob == [HelloDone(True, shared.network_id, ALICE_NODE)]

    def test_nothing_is_done_before_the_proof(self) -> None:
        alice, bob = opener(KEY), answerer(KEY)
        reply, events = bob.receive(alice.start())
        assert events == []
        prove, events = alice.receive(reply)
        assert events == []
        welcome, events = bob.receive(prove)
        assert [type(event) for event in events] == [HelloDone]
        assert [type(event) for event in alice.receive(welcome)[1]] == [HelloDone]

    def test_unknown_roles_are_left_out_and_doubles_too(self) -> None:
        alice, bob = opener(KEY), answerer(KEY)
        prove = read(alice.receive(bob.receive(alice.start())[0])[0])
        prove.prove.node.roles.extend([9, pb.ROLE_UNSPECIFIED, pb.ROLE_CLIENT])  # type: ignore[list-item]
        prove.prove.node.features.extend(["compression", "telepathy"])
        (event,) = bob.receive(frame(prove.SerializeToString()))[1]
        assert isinstance(event, HelloDone)
        assert event.node.roles == [pb.ROLE_CLIENT]
        assert event.node.features == ["compression", "telepathy"]


class TestStrangers:
    def test_two_open_sides_meet_as_strangers(self) -> None:
        at_alice, at_bob, _ = talk(opener(KEY, is_open=True), answerer(OTHER, is_open=True))
        assert at_alice == [HelloDone(False, b"", BOB_NODE)]
        assert at_bob == [HelloDone(False, b"", ALICE_NODE)]

    @pytest.mark.parametrize("alice_open", [False, True])
    @pytest.mark.parametrize("bob_open", [False, True])
    @pytest.mark.parametrize("keys", [(), (KEY,)])
    def test_unless_both_are_open_nothing_is_disclosed(
        self, alice_open: bool, bob_open: bool, keys: tuple[NetworkKey, ...]
    ) -> None:
        if alice_open and bob_open:
            return
        at_alice, at_bob, wire = talk(opener(*keys, is_open=alice_open), answerer(OTHER, is_open=bob_open))
        for events in (at_alice, at_bob):
            assert [(type(event), getattr(event, "code", "")) for event in events] == [(HelloRefused, "not_member")]
        assert ALICE_NODE.software.encode() not in wire
        assert BOB_NODE.software.encode() not in wire
        assert OTHER.network_id not in wire

    def test_who_claims_a_network_without_its_key_learns_nothing(self) -> None:
        guess = NetworkKey(b"?" * 32)
        guess.network_id = KEY.network_id  # the public id is all that it knows
        thief = answerer(guess)
        alice = opener(KEY, is_open=True)
        refusal, events = alice.receive(thief.receive(alice.start())[0])
        assert [getattr(event, "code", "") for event in events] == ["bad_proof"]
        assert read(refusal).refuse.code == "bad_proof"
        assert thief.receive(refusal)[1] == [HelloRefused("bad_proof", read(refusal).refuse.message, is_ours=False)]

    @pytest.mark.parametrize("proof", [b"", b"p" * 32])
    def test_a_member_that_does_not_prove_it_is_refused(self, proof: bytes) -> None:
        bob = answerer(KEY, is_open=True)
        bob.receive(opener(KEY).start())
        data, events = bob.receive(sent(prove=pb.Prove(proof=proof, node=ALICE_NODE)))
        assert [(type(event), getattr(event, "code", "")) for event in events] == [(HelloRefused, "bad_proof")]
        assert BOB_NODE.software.encode() not in data

    def test_a_stranger_with_a_proof_is_refused(self) -> None:
        bob = answerer(KEY, is_open=True)
        bob.receive(opener(is_open=True).start())
        assert read(bob.receive(sent(prove=pb.Prove(proof=b"p" * 32)))[0]).refuse.code == "bad_proof"


class TestAttacks:
    def test_a_proof_reflected_is_no_proof(self) -> None:
        # Mallory lets Bob prove himself and gives the same proof back as her own.
        bob = answerer(KEY)
        reply = read(bob.receive(opener(KEY).start())[0])
        refusal, _ = bob.receive(sent(prove=pb.Prove(proof=reply.reply.proof, node=ALICE_NODE)))
        assert read(refusal).refuse.code == "bad_proof"

    def test_a_hello_relayed_by_hand_is_refused(self) -> None:
        # Mallory carries every byte between two members; each of them has a secured connection to HER.
        alice = opener(KEY, peer=MALLORY)
        bob = answerer(KEY, peer=MALLORY)
        refusal, events = alice.receive(bob.receive(alice.start())[0])
        assert [getattr(event, "code", "") for event in events] == ["bad_proof"]
        assert read(refusal).refuse.code == "bad_proof"

    def test_an_old_transcript_is_refused(self) -> None:
        alice, bob = opener(KEY), answerer(KEY)
        first = alice.start()
        prove, _ = alice.receive(bob.receive(first)[0])
        again = answerer(KEY, nonce=b"c" * 32)
        again.receive(first)
        assert read(again.receive(prove)[0]).refuse.code == "bad_proof"

    def test_every_field_is_bound(self) -> None:
        def proof(key: NetworkKey = KEY, **changes: Any) -> bytes:
            fields: dict[str, Any] = {
                "by_opener": True,
                "opener": ALICE,
                "answerer": BOB,
                "nonce_opener": b"a" * 32,
                "nonce_answerer": b"b" * 32,
            }
            return membership_proof(key, **(fields | changes))

        proofs = {
            proof(),
            proof(OLD),
            proof(by_opener=False),
            proof(opener=MALLORY),
            proof(answerer=MALLORY),
            proof(opener=BOB, answerer=ALICE),
            proof(nonce_opener=b"c" * 32),
            proof(nonce_answerer=b"c" * 32),
        }
        assert len(proofs) == 8


class TestVersions:
    def test_an_opener_of_another_major_is_told(self) -> None:
        data, events = answerer(KEY).receive(sent(hello=pb.Hello(version_major=2)))
        assert read(data).refuse.code == "version"
        assert "version 1" in read(data).refuse.message
        assert [(type(event), getattr(event, "is_ours", None)) for event in events] == [(HelloRefused, True)]

    def test_an_answerer_of_another_major_is_told(self) -> None:
        alice = opener(KEY)
        alice.start()
        data, _ = alice.receive(sent(reply=pb.Reply(version_major=2)))
        assert read(data).refuse.code == "version"

    def test_a_later_minor_is_welcome(self) -> None:
        data, events = answerer(KEY).receive(
            sent(hello=pb.Hello(version_major=1, version_minor=9, nonce=b"n" * 32, network_ids=[KEY.network_id]))
        )
        assert (read(data).WhichOneof("kind"), events) == ("reply", [])


class TestRefusal:
    def test_a_busy_answerer_says_so(self) -> None:
        alice, bob = opener(KEY), answerer(KEY)
        alice.start()
        _, events = alice.receive(bob.refuse("busy", "Too many hellos at once."))
        assert events == [HelloRefused("busy", "Too many hellos at once.", is_ours=False)]
        with pytest.raises(LocalProtocolError):
            bob.refuse("busy", "again")

    def test_what_follows_a_refusal_is_dropped(self) -> None:
        alice = opener(KEY)
        alice.start()
        refusal = sent(refuse=pb.Refuse(code="busy"))
        _, events = alice.receive(refusal + refusal)
        assert len(events) == 1
        assert alice.receive(b"\xff\xff") == (b"", [])
        alice.receive_eof()
        assert alice.state is HelloState.CLOSED

    @pytest.mark.parametrize(
        "refusal",
        [pb.Refuse(), pb.Refuse(code="No!"), pb.Refuse(code="x" * 41), pb.Refuse(code="busy", message="x" * 1001)],
    )
    def test_a_refusal_over_its_limits(self, refusal: pb.Refuse) -> None:
        alice = opener(KEY)
        alice.start()
        with pytest.raises(RemoteProtocolError) as caught:
            alice.receive(sent(refuse=refusal))
        assert caught.value.code == "bad_frame"


class TestCatalogue:
    def test_it_is_read_as_often_as_wanted(self) -> None:
        alice, bob = done()
        for model, since in (("", 0), ("org/model:7b", 2**63)):
            assert bob.receive(alice.catalogue_query(model, since)) == (b"", [CatalogueAsked(model, since)])
            data = bob.catalogue_entry(b"full", b"heartbeat", 2**40) + bob.catalogue_entry(b"other")
            assert alice.receive(data + bob.catalogue_end(9, True)) == (
                b"",
                [
                    CatalogueEntry(b"full", b"heartbeat", 2**32 - 1),
                    CatalogueEntry(b"other", b"", 0),
                    CatalogueEnd(9, True),
                ],
            )
        alice.receive_eof()
        bob.receive_eof()

    def test_a_misuse_of_ours(self) -> None:
        alice, bob = done()
        misuses: list[Callable[[], bytes]] = [
            lambda: opener(KEY).catalogue_query(),
            lambda: bob.catalogue_entry(b"x"),
            lambda: bob.catalogue_end(0, False),
        ]
        for misuse in misuses:
            with pytest.raises(LocalProtocolError):
                misuse()
        alice.catalogue_query()
        with pytest.raises(LocalProtocolError):
            alice.catalogue_query()

    def test_a_model_that_is_none(self) -> None:
        _, bob = done()
        with pytest.raises(RemoteProtocolError) as caught:
            bob.receive(sent(catalogue_query=pb.CatalogueQuery(model="a\nb")))
        assert caught.value.code == "bad_frame"

    def test_a_second_query_before_the_end(self) -> None:
        alice, bob = done()
        query = alice.catalogue_query()
        with pytest.raises(RemoteProtocolError):
            bob.receive(query + query)

    def test_ten_thousand_entries_and_not_one_more(self) -> None:
        alice, bob = done()
        bob.receive(alice.catalogue_query())
        entry = sent(catalogue_entry=pb.CatalogueEntry())
        for _ in range(hi.MAX_CATALOGUE_ENTRIES):
            bob.catalogue_entry(b"")
        assert bob.catalogue_entries_left == 0
        with pytest.raises(LocalProtocolError, match="over the limits"):
            bob.catalogue_entry(b"")
        assert len(alice.receive(entry * hi.MAX_CATALOGUE_ENTRIES)[1]) == hi.MAX_CATALOGUE_ENTRIES
        with pytest.raises(RemoteProtocolError) as caught:
            alice.receive(entry)
        assert caught.value.code == "oversize"

    def test_32_mib_and_not_one_more(self) -> None:
        alice, bob = done()
        bob.receive(alice.catalogue_query())
        entry = bob.catalogue_entry(b"x" * 60_000)
        used = hi.MAX_CATALOGUE_BYTES - bob.catalogue_bytes_left
        assert used == len(entry) - 3
        fitting = hi.MAX_CATALOGUE_BYTES // used
        for _ in range(fitting):
            alice.receive(entry)
        assert alice.catalogue_bytes_left == hi.MAX_CATALOGUE_BYTES - fitting * used
        with pytest.raises(RemoteProtocolError) as caught:
            alice.receive(entry)
        assert caught.value.code == "oversize"
        with pytest.raises(LocalProtocolError, match="over the limits"):
            bob.catalogue_entry(bytes(MAX_FRAME_BYTES))


FRAMES = {
    "hello": sent(hello=pb.Hello(version_major=1, nonce=b"n" * 32, network_ids=[KEY.network_id])),
    "reply": sent(reply=pb.Reply(version_major=1, nonce=b"n" * 32)),
    "prove": sent(prove=pb.Prove()),
    "welcome": sent(welcome=pb.Welcome()),
    "refuse": sent(refuse=pb.Refuse(code="busy")),
    "catalogue_query": sent(catalogue_query=pb.CatalogueQuery()),
    "catalogue_entry": sent(catalogue_entry=pb.CatalogueEntry()),
    "catalogue_end": sent(catalogue_end=pb.CatalogueEnd()),
    "nothing": frame(b""),
    "unknown": frame(b"\xf2\x01\x00"),
}


def opener_in(state: HelloState) -> HelloOpener:
    alice, bob = opener(KEY), answerer(KEY)
    if state in (HelloState.IDLE, HelloState.CATALOGUE):
        alice, bob = done()
        if state is HelloState.CATALOGUE:
            alice.catalogue_query()
    elif state is not HelloState.NEW:
        data = alice.start()
        if state is HelloState.PROVED:
            alice.receive(bob.receive(data)[0])
    return alice


def answerer_in(state: HelloState) -> HelloAnswerer:
    alice, bob = opener(KEY), answerer(KEY)
    if state in (HelloState.IDLE, HelloState.CATALOGUE):
        alice, bob = done()
        if state is HelloState.CATALOGUE:
            bob.receive(alice.catalogue_query())
    elif state is HelloState.GREETED:
        bob.receive(alice.start())
    return bob


OPENER_MAY_HEAR = {
    HelloState.NEW: {"refuse"},
    HelloState.GREETED: {"reply", "refuse"},
    HelloState.PROVED: {"welcome", "refuse"},
    HelloState.IDLE: set[str](),
    HelloState.CATALOGUE: {"catalogue_entry", "catalogue_end"},
}
ANSWERER_MAY_HEAR = {
    HelloState.NEW: {"hello", "refuse"},
    HelloState.GREETED: {"prove", "refuse"},
    HelloState.IDLE: {"catalogue_query"},
    HelloState.CATALOGUE: set[str](),
}
Side = HelloOpener | HelloAnswerer


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize(
    ("make", "state", "allowed"),
    [
        *((opener_in, state, allowed) for state, allowed in OPENER_MAY_HEAR.items()),
        *((answerer_in, state, allowed) for state, allowed in ANSWERER_MAY_HEAR.items()),
    ],
)
def test_each_frame_in_each_state(
    make: Callable[[HelloState], Side], state: HelloState, allowed: set[str], kind: str
) -> None:
    side = make(state)
    assert side.state is state
    if kind in allowed:
        side.receive(FRAMES[kind])
        return
    for _ in range(2):
        with pytest.raises(RemoteProtocolError) as caught:
            side.receive(FRAMES[kind])
        assert caught.value.code == "unexpected_frame"
        assert side.state is HelloState.BROKEN


@pytest.mark.parametrize(
    ("make", "state", "data", "code"),
    [
        (answerer_in, HelloState.NEW, sent(hello=pb.Hello(version_major=1, nonce=b"short")), "bad_frame"),
        (
            answerer_in,
            HelloState.NEW,
            sent(hello=pb.Hello(version_major=1, nonce=b"n" * 32, network_ids=[KEY.network_id] * 5)),
            "bad_frame",
        ),
        (
            answerer_in,
            HelloState.NEW,
            sent(hello=pb.Hello(version_major=1, nonce=b"n" * 32, network_ids=[b"short"])),
            "bad_frame",
        ),
        (opener_in, HelloState.GREETED, sent(reply=pb.Reply(version_major=1, nonce=b"short")), "bad_frame"),
        (
            opener_in,
            HelloState.GREETED,
            sent(reply=pb.Reply(version_major=1, nonce=b"n" * 32, network_id=OTHER.network_id)),
            "bad_frame",
        ),
        (opener_in, HelloState.PROVED, sent(welcome=pb.Welcome(node=pb.NodeInfo(software="\n"))), "bad_frame"),
        (opener_in, HelloState.GREETED, frame(b"\xff"), "bad_frame"),
        (opener_in, HelloState.GREETED, encode_varint(MAX_FRAME_BYTES + 1), "oversize"),
        (answerer_in, HelloState.NEW, encode_varint(MAX_FRAME_BYTES + 1), "oversize"),
    ],
)
def test_a_frame_that_breaks_its_own_rules(
    make: Callable[[HelloState], Side], state: HelloState, data: bytes, code: str
) -> None:
    side = make(state)
    with pytest.raises(RemoteProtocolError) as caught:
        side.receive(data)
    assert caught.value.code == code
    with pytest.raises(RemoteProtocolError, match="before it was complete"):
        side.receive_eof()


@pytest.mark.parametrize("state", [HelloState.NEW, HelloState.GREETED, HelloState.PROVED, HelloState.CATALOGUE])
def test_eof_in_the_middle_is_a_truncation(state: HelloState) -> None:
    side = opener_in(state)
    with pytest.raises(RemoteProtocolError, match=state.value) as caught:
        side.receive_eof()
    assert caught.value.code == "truncated"
    with pytest.raises(RemoteProtocolError):
        side.receive(b"")


def test_eof_in_the_middle_of_a_frame_is_a_truncation() -> None:
    _, bob = done()
    bob.receive(FRAMES["catalogue_query"][:1])
    with pytest.raises(RemoteProtocolError):
        bob.receive_eof()


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": b"short"},
        {"keys": [NetworkKey(bytes([number]) * 32) for number in range(5)]},
        {"node": pb.NodeInfo(features=["Not allowed"])},
        {"node": pb.NodeInfo(features=["f"] * 17)},
        {"node": pb.NodeInfo(roles=[pb.ROLE_CLIENT] * 9)},
        {"node": pb.NodeInfo(announcement=bytes(16 * 1024))},
        {"node": pb.NodeInfo(software="x" * 65)},
        {"node": pb.NodeInfo(now_ms=-1)},
    ],
)
def test_what_we_may_not_say_is_refused_at_once(changes: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "me": ALICE,
        "peer": BOB,
        "keys": [KEY],
        "is_open": False,
        "node": ALICE_NODE,
        "nonce": b"n" * 32,
    }
    for side in (HelloOpener, HelloAnswerer):
        with pytest.raises(LocalProtocolError):
            side(**(fields | changes))


def test_hello_starts_once() -> None:
    alice = opener(KEY)
    alice.start()
    with pytest.raises(LocalProtocolError):
        alice.start()


def test_the_shared_part_is_no_side_by_itself() -> None:
    side = hi._Hello(me=ALICE, peer=BOB, keys=(), is_open=False, node=ALICE_NODE, nonce=b"n" * 32)
    with pytest.raises(NotImplementedError):
        side.receive(FRAMES["hello"])

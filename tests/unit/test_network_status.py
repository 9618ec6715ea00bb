"""The network topic: what is kept of it, what a validator says, and when."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
import trio
from trio.testing import MockClock

from lloom_sidecar.errors import DaemonUnavailableError, LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.network.gossip import run_topic
from lloom_sidecar.network.status import INTERVAL_S, StatusBoard, run_publisher, summarise
from lloom_sidecar.p2p.daemon import TopicMessage
from lloom_sidecar.peers.peerbook import PeerBook
from lloom_sidecar.peers.rate import RateLimiter
from lloom_sidecar.protocol.announcement import open_announcement, seal_announcement
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.names import TOPIC_NETWORK
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.offers import Kind, Load, ModelOffer, Price
from lloom_sidecar.protocol.status import NetworkStatus, open_status, seal_status
from tests.fakes.fake_nodes import FakeNode, fake_nodes

KEY = NetworkKey(b"k" * 32)
NOW_MS = 1_790_000_000_000
SIGNERS = [Signer(bytes([number]) * 32) for number in range(1, 9)]
VALIDATOR, OTHER, ME = SIGNERS[0], SIGNERS[1], SIGNERS[7]


class Board:
    """A StatusBoard that notes what it reports."""

    def __init__(self, *, now_ms: int = NOW_MS) -> None:
        self.dropped: Counter[str] = Counter()
        self.offences: list[tuple[PeerId, str]] = []
        self.board = StatusBoard(
            validators={VALIDATOR.peer},
            keys=lambda: (KEY,),
            now_ms=lambda: now_ms,
            on_dropped=lambda reason: self.dropped.update([reason]),
            on_offence=lambda peer, reason: self.offences.append((peer, reason)),
        )

    def take(
        self,
        sequence: int = 1,
        *,
        signer: Signer = VALIDATOR,
        sender: Signer | None = None,
        key: NetworkKey | None = KEY,
        executors: int = 1,
    ) -> bool:
        raw = seal_status(
            signer=signer,
            key=key,
            sequence=sequence,
            issued_at_ms=NOW_MS,
            ttl_s=90,
            status=NetworkStatus(executors=executors),
        )
        return self.board.take(TopicMessage((sender or signer).peer, raw, 1, (TOPIC_NETWORK,)))


async def test_the_latest_of_a_configured_validator_is_kept(autojump_clock: MockClock) -> None:
    board = Board()
    assert board.take(1)
    await trio.sleep(10)
    assert board.take(2, executors=9)
    (heard,) = board.board.latest()
    assert (heard.peer, heard.sequence, heard.status.executors) == (VALIDATOR.peer, 2, 9)
    assert heard.heard_at == trio.current_time()
    assert heard.is_current(trio.current_time() + 89)
    assert not heard.is_current(trio.current_time() + 90)


async def test_an_older_one_is_dropped_and_the_same_again_is_no_offence() -> None:
    board = Board()
    board.take(5)
    assert not board.take(5)
    assert not board.dropped
    assert not board.take(4)
    assert board.dropped == {"sequence": 1}
    assert board.offences == []
    assert board.board.latest()[0].sequence == 5


async def test_others_are_counted_and_not_kept() -> None:
    board = Board()
    assert not board.take(signer=OTHER)
    assert not board.take(key=NetworkKey(b"x" * 32))
    assert not board.take(key=None)
    assert board.board.latest() == []
    assert board.board.others == 1
    assert board.dropped == {"network": 2}
    assert board.offences == []


async def test_what_no_honest_node_publishes_is_its_publishers_offence() -> None:
    board = Board()
    assert not board.take(sender=OTHER)
    assert not board.board.take(TopicMessage(OTHER.peer, b"garbage", 1, (TOPIC_NETWORK,)))
    assert board.offences == [(OTHER.peer, "publisher"), (OTHER.peer, "envelope")]


async def test_a_wrong_clock_is_dropped_and_no_offence() -> None:
    board = Board(now_ms=NOW_MS + 20 * 60_000)
    assert not board.take()
    assert board.dropped == {"clock": 1}
    assert board.offences == []


# ---------------------------------------------------------------- what a validator says
def book_of(offers: Mapping[Signer, Sequence[ModelOffer]], load: Load) -> PeerBook:
    book = PeerBook(me=ME.peer, is_open=False, allow_list=frozenset())
    for signer, models in offers.items():
        raw = seal_announcement(
            signer=signer,
            key=KEY,
            sequence=1,
            issued_at_ms=NOW_MS,
            ttl_s=30,
            kind=Kind.INITIAL,
            models=models,
            load=load,
            software="lloom/0.1.0",
        )
        opened = open_announcement(raw, keys=(KEY,), expected_signer=None)
        book.apply(opened, now=0.0, direct=True, source=signer.peer)
    return book


def test_a_summary_counts_and_takes_medians() -> None:
    prices = [Price(10, 100, "EUR"), Price(30, 50, "EUR"), Price(20, 70, "EUR"), Price(1, 1, "USD"), Price()]
    offers = {
        signer: [ModelOffer("m", price=price, slots=4)] for signer, price in zip(SIGNERS[1:6], prices, strict=True)
    }
    offers[SIGNERS[1]] = [*offers[SIGNERS[1]], ModelOffer("n", slots=6)]
    members = {ME.peer, SIGNERS[1].peer, SIGNERS[6].peer}
    software = {ME.peer: "lloom/0.2.0", SIGNERS[6].peer: "lloom/0.2.0"}
    status = summarise(book_of(offers, Load(2, 1)), members, lambda peer: software.get(peer, ""), 1.0)
    assert (status.executors, status.members, status.models_total) == (5, 3, 2)
    assert [(one.id, one.executors, one.slots) for one in status.models] == [("m", 5, 20), ("n", 1, 6)]
    assert status.models[0].median_price == Price(20, 70, "EUR")
    assert status.models[0].priced_executors == 3
    assert status.models[1].median_price == Price()
    assert (status.in_flight, status.queued) == (10, 5)
    assert status.slots == 4 * 4 + 6
    assert status.software == (("lloom/0.1.0", 5), ("lloom/0.2.0", 2))


def test_a_median_of_an_even_number_is_the_lower_one_and_ties_go_by_name() -> None:
    offers = {
        signer: [ModelOffer("m", price=price)]
        for signer, price in zip(
            SIGNERS[1:5], [Price(4, 4, "USD"), Price(2, 2, "USD"), Price(9, 9, "EUR"), Price(7, 8, "EUR")], strict=True
        )
    }
    (model,) = summarise(book_of(offers, Load()), set(), lambda peer: "", 1.0).models
    assert model.median_price == Price(7, 8, "EUR")


def test_a_lease_that_is_over_does_not_count() -> None:
    book = book_of({SIGNERS[1]: [ModelOffer("m")]}, Load(1, 1))
    assert summarise(book, set(), lambda peer: "", 31.0) == NetworkStatus()


# ---------------------------------------------------------------- when
class Topic:
    """What the publisher needs of p2pd."""

    def __init__(self) -> None:
        self.published: list[tuple[float, bytes]] = []
        self.peers: list[PeerId] = []
        self.is_up = True
        self.census = 0

    def get(self) -> Topic:
        if not self.is_up:
            raise DaemonUnavailableError("away")
        return self

    async def topic_peers(self, topic: str) -> list[PeerId]:
        assert topic == TOPIC_NETWORK
        return self.peers

    async def publish(self, topic: str, data: bytes) -> None:
        assert topic == TOPIC_NETWORK
        self.published.append((trio.current_time(), data))


@pytest.fixture
async def topic(autojump_clock: MockClock, nursery: trio.Nursery) -> Topic:
    topic = Topic()
    sequences = iter(range(1, 1000))

    async def next_sequence(now_ms: int) -> int:
        if topic.peers and topic.peers[0] == OTHER.peer:
            topic.peers = []
            raise LloomError("the disk is full")
        return next(sequences)

    nursery.start_soon(
        lambda: run_publisher(
            signer=VALIDATOR,
            key=lambda: KEY,
            summary=lambda: NetworkStatus(executors=len(topic.peers)),
            census=lambda: topic.census,
            get_daemon=topic.get,  # type: ignore[arg-type]  # the two methods that are used
            next_sequence=next_sequence,
            now_ms=lambda: NOW_MS,
            on_published=lambda sealed: None,
            rng=random.Random(1),
        )
    )
    return topic


async def test_a_status_goes_out_every_half_minute_with_jitter(topic: Topic, autojump_clock: MockClock) -> None:
    await trio.sleep(10 * INTERVAL_S)
    times = [at for at, _ in topic.published]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert all(0.9 * INTERVAL_S <= gap <= INTERVAL_S + 1 for gap in gaps)
    assert len(set(gaps)) > 1
    opened = [open_status(raw, keys=(KEY,), expected_signer=VALIDATOR.peer) for _, raw in topic.published]
    assert [one.sequence for one in opened] == list(range(1, len(opened) + 1))
    assert {one.ttl_s for one in opened} == {90}


async def test_a_peer_that_joins_the_topic_is_told_soon(topic: Topic, autojump_clock: MockClock) -> None:
    await trio.sleep(5)
    topic.peers = [SIGNERS[2].peer]
    await trio.sleep(2)
    assert len(topic.published) == 2
    topic.peers = [SIGNERS[2].peer, SIGNERS[3].peer]
    await trio.sleep(4)
    assert len(topic.published) == 3


async def test_changed_numbers_are_told_soon_but_not_each_time(topic: Topic, autojump_clock: MockClock) -> None:
    await trio.sleep(12.5)
    topic.census = 1
    await trio.sleep(1)
    assert len(topic.published) == 2
    for number in range(10):
        topic.census = 2 + number
        await trio.sleep(1)
    assert len(topic.published) == 4
    await trio.sleep(10)
    assert len(topic.published) == 4


async def test_it_goes_on_after_p2pd_was_away(topic: Topic, autojump_clock: MockClock) -> None:
    await trio.sleep(5)
    topic.is_up = False
    await trio.sleep(60)
    assert len(topic.published) == 1
    topic.is_up = True
    await trio.sleep(2)
    assert len(topic.published) == 2


async def test_one_that_cannot_be_made_is_tried_again_later(topic: Topic, autojump_clock: MockClock) -> None:
    await trio.sleep(5)
    topic.peers = [OTHER.peer]
    await trio.sleep(2)
    assert len(topic.published) == 1
    await trio.sleep(INTERVAL_S + 2)
    assert len(topic.published) == 2


# ---------------------------------------------------------------- the cheap checks of both topics
async def test_a_topics_checks_are_in_the_order_of_their_cost() -> None:
    handled: list[bytes] = []
    dropped: list[str] = []
    offences: list[str] = []
    banned: set[PeerId] = set()

    async def published(sender: FakeNode, *messages: bytes) -> None:
        before = len(handled) + len(dropped)
        for message in messages:
            await sender.daemon.publish(TOPIC_NETWORK, message)
        while len(handled) + len(dropped) < before + len(messages):
            await trio.sleep(0.01)

    with trio.fail_after(10):
        async with fake_nodes(2) as (me, other), trio.open_nursery() as nursery:
            await nursery.start(
                lambda task_status: run_topic(
                    TOPIC_NETWORK,
                    me=me.peer,
                    get_daemon=lambda: me.daemon,
                    rates=RateLimiter(rate_per_s=0.001, burst=2, max_keys=4),
                    on_message=lambda: None,
                    on_dropped=dropped.append,
                    handle=lambda message: handled.append(message.data),
                    is_banned=banned.__contains__,
                    on_offence=lambda peer, reason: offences.append(reason),
                    task_status=task_status,
                )
            )
            await me.daemon.publish(TOPIC_NETWORK, b"own")
            await published(other, b"1", b"x" * 16_385, b"2", b"3")
            assert handled == [b"1", b"2"]
            assert dropped == offences == ["size", "rate"]
            banned.add(other.peer)
            await published(other, b"x" * 16_385)
            assert dropped[-1] == "banned"
            assert len(offences) == 2
            nursery.cancel_scope.cancel()

"""The peer book: leases, sequences, quotas, hellos, catalogue. Each test reads as a dialogue on a clock of its own."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from lloom_sidecar.errors import AnnouncementError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.peers.executors import LeaseState
from lloom_sidecar.peers.peerbook import Change, PeerBook, PeerBookLimits
from lloom_sidecar.protocol.offers import Announcement, Kind, Load, ModelOffer, Price

TTL_S = 30.0
LOOPBACK = Multiaddr.parse("/ip4/127.0.0.1/tcp/4001")


def peer(number: int) -> PeerId:
    return PeerId.from_ed25519(number.to_bytes(32, "big"))


ME = peer(0)
A, B, C = peer(1), peer(2), peer(3)
VALIDATOR = peer(1000)


def sealed(announcement: Announcement) -> Announcement:
    """With bytes and digest of its own, as a signature would give it."""
    raw = repr(replace(announcement, raw=b"", digest=b"")).encode()
    return replace(announcement, raw=raw, digest=hashlib.sha256(raw).digest())


def full(
    who: PeerId,
    sequence: int,
    *models: str | ModelOffer,
    addrs: tuple[Multiaddr, ...] = (LOOPBACK,),
    is_member: bool = True,
    ttl_s: float = TTL_S,
) -> Announcement:
    offers = tuple(ModelOffer(id=model) if isinstance(model, str) else model for model in models or ("m",))
    return sealed(
        Announcement(
            who,
            sequence,
            0,
            ttl_s,
            Kind.UPDATE,
            b"",
            is_member,
            addrs,
            offers,
            Load(),
            "lloom/0",
            b"",
            b"",
            b"",
        )
    )


def beat(of: Announcement, sequence: int, *, load: Load | None = None, ttl_s: float = TTL_S) -> Announcement:
    return sealed(
        replace(
            of,
            sequence=sequence,
            kind=Kind.HEARTBEAT,
            addrs=(),
            models=(),
            load=load or Load(),
            full_digest=of.digest,
            ttl_s=ttl_s,
        )
    )


def removal(who: PeerId, sequence: int, *, is_member: bool = True) -> Announcement:
    return sealed(replace(full(who, sequence, is_member=is_member), kind=Kind.REMOVAL, addrs=(), models=()))


class Dialogue:
    """A book with a clock; what is heard comes by gossip unless said otherwise."""

    def __init__(
        self,
        *,
        is_open: bool = False,
        allow: frozenset[PeerId] = frozenset(),
        limits: PeerBookLimits | None = None,
    ) -> None:
        self.book = PeerBook(me=ME, is_open=is_open, allow_list=allow, limits=limits, validators=frozenset({VALIDATOR}))
        self.now = 1000.0

    def hear(
        self, announcement: Announcement, *, age_s: float = 0.0, direct: bool = False, source: PeerId | None = None
    ) -> Change:
        return self.book.apply(announcement, now=self.now, age_s=age_s, direct=direct, source=source)

    def refuses(self, reason: str, announcement: Announcement, **kwargs: object) -> None:
        before = self.book.snapshot(self.now)
        with pytest.raises(AnnouncementError) as caught:
            self.hear(announcement, **kwargs)  # type: ignore[arg-type]
        assert caught.value.reason == reason
        assert self.book.snapshot(self.now) == before

    def hello(self, who: PeerId, *, is_member: bool = True) -> None:
        self.book.on_hello(
            who,
            is_member=is_member,
            roles=frozenset({"validator"}),
            features=frozenset({"resume"}),
            max_streams=7,
            now=self.now,
        )

    def state(self, who: PeerId = A) -> LeaseState | None:
        view = self.book.known(who, self.now)
        return None if view is None else view.state

    def executors(self, model: str = "m") -> list[PeerId]:
        return sorted(view.peer for view in self.book.executors_of(model, self.now))


# ---------------------------------------------------------------- sequences
def test_a_full_announcement_enters_and_its_copy_is_no_offence() -> None:
    d = Dialogue()
    first = full(A, 5)
    assert d.hear(first) is Change.NEW
    assert d.hear(first) is Change.DUPLICATE
    assert d.executors() == [A]
    assert len(d.book) == 1


def test_lower_sequences_and_other_bytes_under_the_same_one_are_dropped() -> None:
    d = Dialogue()
    d.hear(full(A, 5))
    d.refuses("sequence", full(A, 4))
    d.refuses("sequence", full(A, 5, "other"))


def test_an_update_replaces_the_offer() -> None:
    d = Dialogue()
    d.hear(full(A, 5, "m", "n"))
    assert d.hear(full(A, 6, "n", "o", "o")) is Change.UPDATED
    assert (d.executors("m"), d.executors("n"), d.executors("o")) == ([], [A], [A])


def test_a_heartbeat_refreshes_the_lease_and_the_load() -> None:
    d = Dialogue()
    first = full(A, 5)
    d.hear(first)
    d.now += 20
    second = beat(first, 6, load=Load(in_flight=3))
    assert d.hear(second) is Change.REFRESHED
    assert d.hear(second) is Change.DUPLICATE
    d.refuses("sequence", beat(first, 6, load=Load(queued=9)))
    d.refuses("sequence", full(A, 6))
    d.now += 20
    assert d.state() is LeaseState.FRESH
    assert d.book.executors_of("m", d.now)[0].load == Load(in_flight=3)


def test_a_heartbeat_without_its_full_announcement_wants_it_once_and_then_counts() -> None:
    d = Dialogue()
    first = full(A, 5)
    heartbeat = beat(first, 9, load=Load(in_flight=2))
    assert d.hear(heartbeat) is Change.WANTS_FULL
    assert d.hear(heartbeat) is Change.DUPLICATE
    d.refuses("sequence", beat(first, 8))
    d.now += 1
    assert d.hear(first, direct=True) is Change.NEW
    assert d.book.executors_of("m", d.now)[0].load == Load(in_flight=2)
    d.refuses("sequence", beat(first, 9, load=Load(in_flight=3)))


def test_a_heartbeat_for_another_full_announcement_wants_that() -> None:
    d = Dialogue()
    d.hear(full(A, 5))
    second = full(A, 6, "n")
    assert d.hear(beat(second, 7)) is Change.WANTS_FULL
    assert d.hear(beat(second, 8)) is Change.WANTS_FULL
    assert d.hear(second) is Change.UPDATED
    d.refuses("sequence", beat(second, 8, load=Load(in_flight=1)))


def test_a_waiting_heartbeat_that_is_over_or_for_something_else_does_not_count() -> None:
    d = Dialogue()
    first, second = full(A, 5), full(A, 6, "n")
    d.hear(beat(first, 9))
    d.now += TTL_S
    d.hear(first)
    assert d.hear(beat(first, 9)) is Change.REFRESHED
    d.hear(beat(full(B, 1, "x"), 9))
    d.hear(full(B, 2))
    assert d.hear(beat(full(B, 2), 3)) is Change.REFRESHED
    d.hear(beat(second, 10))
    d.hear(full(A, 11, "z"))
    d.refuses("sequence", beat(second, 10))


def test_own_announcements_come_back_and_are_ignored() -> None:
    d = Dialogue()
    assert d.hear(full(ME, 5)) is Change.DUPLICATE
    assert len(d.book) == 0


# ---------------------------------------------------------------- removals
def test_a_removal_takes_out_and_its_sequence_is_remembered() -> None:
    d = Dialogue()
    first = full(A, 5)
    d.hear(first)
    d.refuses("sequence", removal(A, 5))
    view = d.book.index_of("m")[0]
    gone = removal(A, 7)
    assert d.hear(gone) is Change.REMOVED
    assert d.hear(gone) is Change.DUPLICATE
    assert view.state(d.now) is LeaseState.DEAD
    d.refuses("sequence", removal(A, 6))
    d.refuses("sequence", first)
    d.refuses("sequence", full(A, 7, "z"), direct=True)
    d.refuses("sequence", beat(first, 7))
    assert d.hear(full(A, 8)) is Change.NEW
    assert d.book.expire(d.now) == []


def test_no_waiting_heartbeat_helps_a_removed_announcement_back() -> None:
    d = Dialogue()
    first = full(A, 5)
    d.hear(removal(A, 6))
    d.hear(beat(first, 7))
    d.refuses("sequence", first, direct=True)
    d.hear(removal(A, 8))
    d.refuses("sequence", beat(first, 8))


def test_a_removal_leaves_a_later_heartbeat_waiting() -> None:
    d = Dialogue()
    again = full(A, 9)
    d.hear(beat(again, 10))
    assert d.hear(removal(A, 8)) is Change.REMOVED
    assert d.hear(again) is Change.NEW
    d.refuses("sequence", beat(again, 10, load=Load(in_flight=1)))


def test_a_removal_is_forgotten_after_the_longest_ttl() -> None:
    d = Dialogue()
    d.hear(removal(A, 7))
    d.now += 899
    d.book.expire(d.now)
    d.refuses("sequence", full(A, 5))
    d.now += 1
    assert d.hear(full(A, 5)) is Change.NEW
    d.hear(removal(B, 7))
    d.now += 900
    d.book.expire(d.now)
    assert d.hear(full(B, 5)) is Change.NEW


def test_strangers_cannot_flush_the_memory_of_members_that_left() -> None:
    d = Dialogue(is_open=True, limits=PeerBookLimits(max_tombstones=2))
    d.hear(full(A, 5))
    d.hear(removal(A, 6, is_member=False))
    for number in range(50, 60):
        d.hear(removal(peer(number), 1, is_member=False))
    d.refuses("sequence", full(A, 5))
    assert d.hear(full(peer(50), 1, is_member=False)) is Change.NEW
    d.refuses("sequence", full(peer(59), 1, is_member=False))


# ---------------------------------------------------------------- who may enter
def test_without_the_tag_only_open_or_allowed() -> None:
    d = Dialogue()
    d.refuses("tag", full(A, 1, is_member=False))
    d.refuses("tag", removal(A, 1, is_member=False))
    assert Dialogue(is_open=True).hear(full(A, 1, is_member=False)) is Change.NEW
    assert Dialogue(allow=frozenset({A})).hear(full(A, 1, is_member=False)) is Change.NEW


def test_who_is_in_may_take_itself_out_without_a_tag() -> None:
    d = Dialogue()
    d.hear(full(A, 1))
    assert d.hear(removal(A, 2, is_member=False)) is Change.REMOVED


# ---------------------------------------------------------------- leases
def test_one_missed_heartbeat_never_kills_silence_does() -> None:
    d = Dialogue()
    first = full(A, 1)
    d.hear(first)
    d.now += 20
    assert d.state() is LeaseState.FRESH
    d.now += 0.1
    assert d.state() is LeaseState.SUSPECT
    assert d.executors() == [A]
    d.now += 9.9
    assert d.state() is LeaseState.DEAD
    assert d.executors() == []
    assert d.book.models(d.now) == []
    assert d.book.expire(d.now) == [A]
    assert d.book.expire(d.now) == []
    assert d.state() is None
    assert len(d.book.index_of("m")) == 0


def test_a_lease_is_at_most_fifteen_minutes_less_the_stated_age() -> None:
    d = Dialogue()
    d.hear(full(A, 1, ttl_s=10_000), age_s=100)
    view = d.book.known(A, d.now)
    assert view is not None
    assert view.lease_left_s == pytest.approx(800)
    d.refuses("clock", full(B, 1), age_s=30)
    assert d.hear(full(C, 1), age_s=-5) is Change.NEW
    assert d.book.known(C, d.now).lease_left_s == TTL_S  # type: ignore[union-attr]


def test_a_catalogue_that_lies_about_age_does_not_shorten_a_lease() -> None:
    d = Dialogue()
    first = full(A, 1)
    d.hear(first)
    assert d.hear(beat(first, 2), age_s=29) is Change.REFRESHED
    assert d.state() is LeaseState.FRESH


def test_a_dead_one_comes_back_by_a_heartbeat_or_its_own_hand_not_by_a_replay() -> None:
    d = Dialogue()
    first = full(A, 1)
    d.hear(first)
    d.hear(beat(first, 4))
    d.now += TTL_S
    d.book.expire(d.now)
    d.refuses("sequence", first)
    d.refuses("sequence", beat(first, 4))
    assert d.hear(first, direct=True) is Change.NEW
    d.refuses("sequence", beat(first, 4))

    d.now += TTL_S
    d.book.expire(d.now)
    d.refuses("sequence", full(A, 0), direct=True)
    assert d.hear(beat(first, 5)) is Change.WANTS_FULL
    assert d.hear(first) is Change.NEW
    assert d.hear(beat(first, 6)) is Change.REFRESHED


def test_a_dead_one_that_was_not_expired_yet_is_revived_by_a_heartbeat() -> None:
    d = Dialogue()
    first = full(A, 1)
    d.hear(first)
    d.now += TTL_S + 1
    assert d.hear(beat(first, 2)) is Change.REFRESHED
    assert d.book.expire(d.now) == []


def test_the_same_announcement_from_its_own_hand_runs_the_lease_anew() -> None:
    d = Dialogue()
    first = full(A, 1)
    d.hear(first)
    d.now += 25
    assert d.hear(first) is Change.DUPLICATE
    assert d.state() is LeaseState.SUSPECT
    assert d.hear(first, direct=True) is Change.REFRESHED
    assert d.state() is LeaseState.FRESH
    assert d.book.index_of("m")[0].is_direct


def test_direct_holds_on_for_the_same_addresses_only() -> None:
    d = Dialogue()
    d.hear(full(A, 1), direct=True)
    d.hear(full(A, 2, "n"))
    assert d.book.index_of("n")[0].is_direct
    d.hear(full(A, 3, "n", addrs=(Multiaddr.parse("/ip4/10.0.0.1/tcp/1"),)))
    assert not d.book.index_of("n")[0].is_direct


def test_a_failure_makes_suspect_at_once_until_a_newer_heartbeat() -> None:
    d = Dialogue()
    first = full(A, 1)
    d.hear(first)
    d.now += 1
    d.book.mark_failed(A, d.now)
    assert d.state() is LeaseState.SUSPECT
    d.hear(beat(first, 2), age_s=5)
    assert d.state() is LeaseState.SUSPECT
    d.now += 1
    d.hear(beat(first, 3))
    assert d.state() is LeaseState.FRESH


def test_a_probe_that_succeeds_ends_the_suspicion_but_not_the_lease() -> None:
    d = Dialogue()
    d.hear(full(A, 1))
    d.book.mark_failed(A, d.now)
    d.book.mark_alive(A, d.now)
    assert d.state() is LeaseState.FRESH
    d.now += 25
    d.book.mark_alive(A, d.now)
    assert d.state() is LeaseState.FRESH
    d.now += 5
    assert d.state() is LeaseState.DEAD


def test_due_probes_are_the_suspects_each_every_five_seconds() -> None:
    d = Dialogue()
    for who in (A, B, C):
        d.hear(full(who, 1))
    d.book.mark_failed(A, d.now)
    d.book.mark_failed(B, d.now)
    assert d.book.due_probes(d.now, limit=1) == [A]
    assert d.book.due_probes(d.now) == [B]
    assert d.book.due_probes(d.now + 4.9) == []
    assert d.book.due_probes(d.now + 5) == [A, B]


def test_marks_of_unknown_peers_change_nothing() -> None:
    d = Dialogue()
    d.book.mark_failed(A, d.now)
    d.book.mark_alive(A, d.now)
    d.book.mark_served(A)
    d.book.note_path(A, is_relayed=True)
    d.book.on_disconnected(A)
    assert d.book.known(A, d.now) is None


# ---------------------------------------------------------------- hello
def test_membership_lasts_an_hour_or_until_the_last_connection_ends() -> None:
    d = Dialogue()
    d.hello(A)
    assert d.book.is_member(A, d.now)
    d.now += 3600
    assert not d.book.is_member(A, d.now)
    assert d.book.known(A, d.now) is None
    assert d.book.snapshot(d.now) == []
    d.book.expire(d.now)
    d.hello(A)
    d.book.on_disconnected(A)
    assert not d.book.is_member(A, d.now)
    d.hello(B, is_member=False)
    assert not d.book.is_member(B, d.now)


def test_a_feature_is_had_while_the_hello_that_stated_it_counts() -> None:
    d = Dialogue()
    assert not d.book.has_feature(A, "resume")
    d.hello(A)
    assert d.book.has_feature(A, "resume")
    assert not d.book.has_feature(A, "compression")
    d.book.on_disconnected(A)
    assert not d.book.has_feature(A, "resume")


def test_known_joins_what_hello_and_the_announcement_told() -> None:
    d = Dialogue()
    d.hello(A, is_member=False)
    d.hear(full(A, 1, "m", "n"), source=B)
    d.hello(VALIDATOR)
    view = d.book.known(A, d.now)
    assert view is not None
    assert view.roles == {"validator", "executor"}
    assert (view.models, view.source, view.is_member, view.max_streams) == (("m", "n"), B, False, 7)
    assert view.software == "lloom/0"
    assert [one.peer for one in d.book.snapshot(d.now)] == sorted([A, VALIDATOR])
    hello_only = d.book.known(VALIDATOR, d.now)
    assert hello_only is not None
    assert (hello_only.state, hello_only.is_member, hello_only.models) == (None, True, ())


def test_the_table_of_hellos_is_bounded() -> None:
    d = Dialogue(limits=PeerBookLimits(max_hellos=2))
    for who in (A, B, C):
        d.hello(who)
    assert [d.book.is_member(who, d.now) for who in (A, B, C)] == [False, True, True]


def test_the_path_in_use_counts_more_than_the_announced_addresses() -> None:
    d = Dialogue()
    relayed = Multiaddr.parse(f"/ip4/127.0.0.1/tcp/1/p2p/{VALIDATOR}/p2p-circuit")
    d.hear(full(A, 1, addrs=(relayed,)))
    d.hear(full(B, 1, addrs=()))
    view = d.book.index_of("m")[[one.peer for one in d.book.index_of("m")].index(A)]
    assert view.is_relayed
    d.book.note_path(A, is_relayed=False)
    assert not view.is_relayed
    d.book.on_disconnected(A)
    assert view.is_relayed
    assert view.addrs == (relayed,)
    assert view.software == "lloom/0"
    assert "m" in repr(view)
    assert [one.is_relayed for one in d.book.index_of("m") if one.peer == B] == [False]


# ---------------------------------------------------------------- quotas
def addrs_in(network: str, number: int) -> tuple[Multiaddr, ...]:
    return (Multiaddr.parse(f"/ip4/{network}.{number}/tcp/4001"),)


def test_one_source_may_tell_of_so_many_and_no_more() -> None:
    d = Dialogue(limits=PeerBookLimits(max_per_source=3))
    for number in range(10, 13):
        d.hear(full(peer(number), 1), source=B)
    d.refuses("quota", full(peer(13), 1), source=B)
    assert d.hear(full(peer(13), 1), source=C) is Change.NEW
    for number in range(20, 30):
        assert d.hear(full(peer(number), 1), source=VALIDATOR) is Change.NEW
    d.hear(removal(peer(10), 2), source=B)
    assert d.hear(full(peer(14), 1), source=B) is Change.NEW


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ("/ip4/203.0.113.{}/tcp/1", "/ip4/203.0.114.1/tcp/1"),
        ("/ip6/2001:db8:1:{}::1/tcp/1", "/ip6/2001:db8:2::1/tcp/1"),
        ("/dns4/host{}.example/tcp/1", "/ip4/203.0.113.1/tcp/1"),
    ],
)
def test_one_subnet_holds_so_many_that_never_said_hello(inside: str, outside: str) -> None:
    d = Dialogue(limits=PeerBookLimits(max_per_subnet=2, max_per_relay=2))
    d.hear(full(A, 1, addrs=(Multiaddr.parse(inside.format(1)),)))
    d.hear(full(B, 1, addrs=(Multiaddr.parse(inside.format(2)),)))
    d.refuses("quota", full(C, 1, addrs=(Multiaddr.parse(inside.format(3)),)))
    assert d.hear(full(C, 1, addrs=(Multiaddr.parse(outside),))) is Change.NEW
    d.refuses("quota", full(C, 2, addrs=(Multiaddr.parse(inside.format(3)),)))
    assert d.hear(full(A, 2, addrs=(Multiaddr.parse(inside.format(9)),))) is Change.UPDATED
    d.hello(A)
    assert d.hear(full(C, 2, addrs=(Multiaddr.parse(inside.format(3)),))) is Change.UPDATED
    assert d.hear(full(A, 3, addrs=(Multiaddr.parse(inside.format(4)),))) is Change.UPDATED
    d.hello(peer(9))
    assert d.hear(full(peer(9), 1, addrs=(Multiaddr.parse(inside.format(5)),))) is Change.NEW


def test_loopback_and_link_local_have_no_quota() -> None:
    d = Dialogue(limits=PeerBookLimits(max_per_subnet=1))
    for number in range(10, 20):
        addrs = (LOOPBACK, Multiaddr.parse("/ip6/fe80::1/tcp/1"), Multiaddr.parse("/ip4/169.254.0.1/tcp/1"))
        assert d.hear(full(peer(number), 1, addrs=addrs)) is Change.NEW


def test_a_flood_of_invented_executors_does_not_flush_honest_ones() -> None:
    d = Dialogue(is_open=True, limits=PeerBookLimits(max_executors=6, max_per_source=1000))
    honest = [peer(number) for number in range(10, 14)]
    d.hear(full(honest[0], 1, is_member=False))
    d.book.mark_served(honest[0])
    d.hear(full(honest[1], 1, is_member=False))
    d.hello(honest[1])
    for who in honest[2:]:
        d.hear(full(who, 1))
    for number in range(100, 200):
        stranger = full(peer(number), 1, is_member=False)
        if len(d.book) < 6:
            d.hear(stranger, source=C)
        else:
            d.refuses("quota", stranger, source=C)
    assert len(d.book) == 6
    assert set(honest) <= set(d.executors())
    # A member takes the place of a stranger, the oldest one; a member never that of a member.
    assert d.hear(full(A, 1)) is Change.NEW
    assert d.hear(full(B, 1)) is Change.NEW
    d.refuses("quota", full(C, 1))
    assert d.book.expire(d.now) == [peer(100), peer(101)]


def test_a_full_book_drops_the_dead_first() -> None:
    d = Dialogue(limits=PeerBookLimits(max_executors=1))
    d.hear(full(A, 1))
    d.refuses("quota", full(B, 1))
    d.now += TTL_S
    assert d.hear(full(B, 1)) is Change.NEW
    d.now += 0.5
    d.refuses("quota", full(C, 1))
    assert d.book.expire(d.now) == [A]


def test_one_that_is_back_before_its_loss_was_told_is_not_lost() -> None:
    d = Dialogue(limits=PeerBookLimits(max_executors=1))
    first = full(A, 1)
    d.hear(first)
    d.now += TTL_S
    d.hear(full(B, 1))
    d.now += TTL_S
    assert d.hear(first, direct=True) is Change.NEW
    assert d.book.expire(d.now) == [B]


def test_too_many_models_are_refused() -> None:
    d = Dialogue(limits=PeerBookLimits(max_models_per_peer=2))
    d.refuses("quota", full(A, 1, "a", "b", "c"))
    d.hear(full(A, 1, "a", "b"))
    d.refuses("quota", full(A, 2, "a", "b", "c"))


def test_what_waiting_heartbeats_refer_to_is_fetched_ever_more_seldom() -> None:
    d = Dialogue()
    first, second = full(A, 1), full(B, 1)
    d.hear(beat(first, 2))
    d.hear(beat(second, 2))
    assert d.book.due_fetches(d.now, limit=1) == [A]
    assert d.book.due_fetches(d.now, limit=0) == []
    assert d.book.due_fetches(d.now) == [B]
    due = []
    for _ in range(20):
        d.now += 1
        due += [(round(d.now - 1000), who) for who in d.book.due_fetches(d.now)]
    assert due == [(5, A), (5, B), (15, A), (15, B)]
    d.hear(beat(first, 3))
    assert d.book.due_fetches(d.now) == [A]
    d.hear(first, direct=True)
    d.now += TTL_S
    d.book.expire(d.now)
    assert d.book.due_fetches(d.now) == []


def test_waiting_heartbeats_are_bounded_and_forgotten() -> None:
    d = Dialogue(limits=PeerBookLimits(max_pending=1))
    first, second = full(A, 1), full(B, 1)
    d.hear(beat(first, 2))
    d.hear(beat(second, 2))
    assert d.hear(beat(first, 2)) is Change.WANTS_FULL
    d.now += 900
    d.book.expire(d.now)
    assert d.hear(beat(first, 2)) is Change.WANTS_FULL
    d.book.expire(d.now)
    assert d.hear(beat(first, 2)) is Change.DUPLICATE


# ---------------------------------------------------------------- models
def test_models_are_summed_up_over_their_executors() -> None:
    d = Dialogue()
    cheap, dear = ModelOffer("m", price=Price(1, 1, "EUR")), ModelOffer("m", price=Price(5, 5, "EUR"))
    d.hear(full(A, 1, dear))
    d.hear(full(B, 1, cheap, "n"))
    d.hear(full(C, 1, dear))
    d.book.mark_failed(C, d.now)
    m, n = d.book.models(d.now)
    assert (m.id, m.executors, m.fresh, m.offers) == ("m", 3, 2, (cheap, dear))
    assert (n.id, n.executors) == ("n", 1)


def test_a_model_is_seen_for_a_day_after_its_last_executor() -> None:
    d = Dialogue()
    assert not d.book.seen_model("m", d.now)
    d.hear(full(A, 1, ttl_s=60))
    assert d.book.seen_model("m", d.now)
    d.now += 60
    d.book.expire(d.now)
    d.now += 24 * 3600 - 1
    d.book.expire(d.now)
    assert d.book.seen_model("m", d.now)
    d.now += 1
    assert not d.book.seen_model("m", d.now)
    d.book.expire(d.now)
    assert not d.book.seen_model("m", d.now)


def test_models_remembered_are_bounded() -> None:
    d = Dialogue(limits=PeerBookLimits(max_models_remembered=1))
    d.hear(full(A, 1, "a", "b"))
    d.hear(removal(A, 2))
    assert (d.book.seen_model("a", d.now), d.book.seen_model("b", d.now)) == (False, True)


# ---------------------------------------------------------------- catalogue
def test_the_catalogue_tells_what_changed_since_a_cursor() -> None:
    d = Dialogue()
    a, b = full(A, 1), full(B, 1, "n")
    d.hear(a, age_s=3)
    d.hear(b)
    page = d.book.entries_since(0, now=d.now + 2)
    assert [(item.peer, item.full, item.heartbeat, item.age_s) for item in page.items] == [
        (A, a.raw, b"", 5.0),
        (B, b.raw, b"", 2.0),
    ]
    assert d.book.entries_since(page.cursor, now=d.now).items == ()
    # A heartbeat alone is no news, but it is told with what is.
    d.hear(beat(a, 2))
    d.hear(a, direct=True)
    assert d.book.entries_since(page.cursor, now=d.now).items == ()
    changed = full(A, 3, "m", "z")
    heartbeat = beat(changed, 4)
    d.hear(changed)
    d.hear(heartbeat)
    news = d.book.entries_since(page.cursor, now=d.now)
    assert [(item.peer, item.full, item.heartbeat) for item in news.items] == [(A, changed.raw, heartbeat.raw)]
    assert news.cursor > page.cursor
    assert [item.peer for item in d.book.entries_since(0, now=d.now, model="n").items] == [B]
    assert len(d.book.entries_since(10**9, now=d.now).items) == 2


def test_a_cut_page_goes_on_where_it_ended() -> None:
    d = Dialogue()
    for number in range(10, 15):
        d.hear(full(peer(number), 1))
    seen: list[PeerId] = []
    cursor, truncated = 0, True
    while truncated:
        page = d.book.entries_since(cursor, now=d.now, limit=2)
        cursor, truncated = page.cursor, page.truncated
        seen += [item.peer for item in page.items]
    assert seen == [peer(number) for number in range(10, 15)]
    nothing = d.book.entries_since(0, now=d.now, limit=0)
    assert (nothing.items, nothing.cursor, nothing.truncated) == ((), 0, True)


def test_the_dead_are_in_no_catalogue_and_a_restarted_node_goes_on_counting() -> None:
    d = Dialogue()
    d.hear(full(A, 1))
    d.now += TTL_S
    assert d.book.entries_since(0, now=d.now).items == ()
    restarted = PeerBook(me=ME, is_open=False, allow_list=frozenset(), first_cursor=5000)
    restarted.apply(full(A, 1), now=0.0, direct=False, source=None)
    assert [item.cursor for item in restarted.entries_since(d.book.entries_since(0, now=0).cursor, now=1).items] == [
        5001
    ]

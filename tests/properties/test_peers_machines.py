"""The peer book and the health book against models of themselves, over any order of events."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lloom_sidecar.errors import AnnouncementError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.peers.executors import LeaseState
from lloom_sidecar.peers.health import (
    FAILURES_TO_OPEN,
    MAX_BACKOFF_S,
    MAX_PENALTY_S,
    Circuit,
    HealthBook,
    HealthLimits,
    Outcome,
    Ticket,
    Verdict,
)
from lloom_sidecar.peers.peerbook import Change, PeerBook, PeerBookLimits
from lloom_sidecar.peers.rate import TokenBucket
from lloom_sidecar.peers.selection import Policy, Wanted, choose
from lloom_sidecar.protocol.offers import Announcement, Kind, Load, ModelOffer

TTL_S = 30.0
LONGEST_TTL_S = 900.0
LIMITS = PeerBookLimits(
    max_executors=5,
    max_per_source=3,
    max_per_subnet=2,
    max_per_relay=2,
    max_models_per_peer=2,
    max_models_remembered=3,
    max_tombstones=100,
    max_pending=3,
    max_hellos=4,
)
PEERS = [PeerId.from_ed25519(bytes([number]) * 32) for number in range(1, 10)]
ADDRS = [
    Multiaddr.parse(text)
    for text in ("/ip4/127.0.0.1/tcp/1", "/ip4/8.8.8.8/tcp/1", "/ip4/8.8.4.4/tcp/1", "/dns4/a.b/tcp/1")
]
MODELS = ("a", "b", "c", "d", "e")


class PeerBookMachine(RuleBasedStateMachine):
    """What no order of announcements, removals, silences and hellos may bring about."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.book = PeerBook(
            me=PeerId.from_ed25519(bytes(32)), is_open=True, allow_list=frozenset(), limits=LIMITS, first_cursor=7
        )
        self.said: dict[PeerId, list[Announcement]] = {peer: [] for peer in PEERS}
        self.sequence = 0
        self.removed: dict[PeerId, tuple[int, float]] = {}
        """Sequence of the last removal and when it was heard."""
        self.heard_until: dict[PeerId, float] = {}
        """Latest end of any lease that was ever granted."""
        self.served: set[PeerId] = set()
        self.cursor = 7

    def make(self, peer: PeerId, kind: int, **fields: object) -> Announcement:
        self.sequence += 1
        made = Announcement(peer, self.sequence, 0, TTL_S, kind, b"", True, (), (), Load(), "", b"", b"", b"")
        made = replace(made, **fields)  # type: ignore[arg-type]
        raw = repr(made).encode()
        made = replace(made, raw=raw, digest=hashlib.sha256(raw).digest())
        self.said[peer].append(made)
        return made

    def hear(self, announcement: Announcement, *, age_s: float, direct: bool, source: PeerId | None) -> None:
        peer = announcement.peer
        before = {view.peer for view in self.book.snapshot(self.now) if view.state is not None}
        was_removed = self.removed.get(peer)
        try:
            change = self.book.apply(announcement, now=self.now, age_s=age_s, direct=direct, source=source)
        except AnnouncementError as exc:
            reason: str | None = exc.reason
            change = None
        else:
            reason = None
        assert reason in (None, "sequence", "clock", "quota")
        if change in (Change.NEW, Change.UPDATED, Change.REFRESHED):
            granted = self.now + TTL_S - (0.0 if direct else age_s)
            self.heard_until[peer] = max(self.heard_until.get(peer, 0.0), granted)
        if change is Change.NEW:
            assert peer not in before
            if was_removed is not None and self.now < was_removed[1] + LONGEST_TTL_S:
                assert announcement.sequence > was_removed[0]
        if change is Change.REMOVED:
            assert announcement.kind == Kind.REMOVAL
            self.removed[peer] = (announcement.sequence, self.now)
            self.heard_until.pop(peer, None)
            self.served.discard(peer)
        # Strangers to this node never push out one that has served it.
        after = {view.peer for view in self.book.snapshot(self.now) if view.state is not None}
        for lost in (before - after) & self.served:
            assert lost == peer or self.heard_until[lost] <= self.now
            self.served.discard(lost)

    @rule(
        peer=st.sampled_from(PEERS),
        addrs=st.lists(st.sampled_from(ADDRS), max_size=2),
        models=st.lists(st.sampled_from(MODELS), min_size=1, max_size=3, unique=True),
        is_member=st.booleans(),
        source=st.sampled_from([None, *PEERS[:2]]),
        direct=st.booleans(),
        age_s=st.sampled_from([0.0, 5.0, 40.0]),
    )
    def announce(
        self,
        peer: PeerId,
        addrs: list[Multiaddr],
        models: list[str],
        is_member: bool,
        source: PeerId | None,
        direct: bool,
        age_s: float,
    ) -> None:
        made = self.make(
            peer,
            Kind.UPDATE,
            addrs=tuple(addrs),
            models=tuple(ModelOffer(model) for model in models),
            is_member=is_member,
        )
        self.hear(made, age_s=0.0 if direct else age_s, direct=direct, source=source)

    @rule(peer=st.sampled_from(PEERS), back=st.integers(0, 3), age_s=st.sampled_from([0.0, 5.0, 29.0]))
    def heartbeat(self, peer: PeerId, back: int, age_s: float) -> None:
        fulls = [one for one in self.said[peer] if one.is_full]
        if len(fulls) > back:
            made = self.make(peer, Kind.HEARTBEAT, full_digest=fulls[-1 - back].digest)
            self.hear(made, age_s=age_s, direct=False, source=None)

    @rule(peer=st.sampled_from(PEERS))
    def remove(self, peer: PeerId) -> None:
        self.hear(self.make(peer, Kind.REMOVAL), age_s=0.0, direct=False, source=None)
        assert self.book.known(peer, self.now) is None or self.book.known(peer, self.now).state is None  # type: ignore[union-attr]

    @rule(peer=st.sampled_from(PEERS), direct=st.booleans())
    def leave_and_be_replayed(self, peer: PeerId, direct: bool) -> None:
        """A removal, a heartbeat for what was removed, and that again."""
        fulls = [one for one in self.said[peer] if one.is_full]
        if fulls:
            self.remove(peer)
            self.heartbeat(peer, 0, 0.0)
            self.hear(fulls[-1], age_s=0.0, direct=direct, source=None)

    @rule(peer=st.sampled_from(PEERS), pick=st.integers(0, 10**6), direct=st.booleans())
    def replay(self, peer: PeerId, pick: int, direct: bool) -> None:
        if self.said[peer]:
            self.hear(self.said[peer][pick % len(self.said[peer])], age_s=0.0, direct=direct, source=None)

    @rule(seconds=st.sampled_from([0.1, 1.0, 9.0, 25.0, 300.0, 4000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def expire(self) -> None:
        self.book.expire(self.now)
        assert all(view.state is not LeaseState.DEAD for view in self.book.snapshot(self.now)), (
            "expire leaves no dead ones"
        )
        self.served = {peer for peer in self.served if self.book.known(peer, self.now) is not None}

    @rule(peer=st.sampled_from(PEERS), is_member=st.booleans())
    def hello(self, peer: PeerId, is_member: bool) -> None:
        self.book.on_hello(
            peer, is_member=is_member, roles=frozenset(), features=frozenset(), max_streams=1, now=self.now
        )
        assert self.book.is_member(peer, self.now) is is_member

    @rule(peer=st.sampled_from(PEERS))
    def disconnect(self, peer: PeerId) -> None:
        self.book.on_disconnected(peer)
        assert not self.book.is_member(peer, self.now)

    @rule(peer=st.sampled_from(PEERS))
    def fail(self, peer: PeerId) -> None:
        self.book.mark_failed(peer, self.now)
        view = self.book.known(peer, self.now)
        assert view is None or view.state is not LeaseState.FRESH

    @rule(peer=st.sampled_from(PEERS))
    def alive(self, peer: PeerId) -> None:
        left = {view.peer: view.lease_left_s for view in self.book.snapshot(self.now)}
        self.book.mark_alive(peer, self.now)
        assert {view.peer: view.lease_left_s for view in self.book.snapshot(self.now)} == left

    @rule(peer=st.sampled_from(PEERS))
    def serve(self, peer: PeerId) -> None:
        self.book.mark_served(peer)
        view = self.book.known(peer, self.now)
        if view is not None and view.has_served:
            self.served.add(peer)

    @rule()
    def probe(self) -> None:
        for peer in self.book.due_probes(self.now):
            assert self.book.known(peer, self.now).state is LeaseState.SUSPECT  # type: ignore[union-attr]

    @invariant()
    def limits_hold(self) -> None:
        book = self.book
        assert len(book) <= LIMITS.max_executors
        assert len(book._pending) <= LIMITS.max_pending
        assert len(book._hellos) <= LIMITS.max_hellos
        assert len(book._models_gone) <= LIMITS.max_models_remembered
        limits = {"source": LIMITS.max_per_source, "subnet": LIMITS.max_per_subnet, "indirect": LIMITS.max_per_relay}
        for group, count in book._quota.items():
            assert 0 < count <= limits[group[0]]
        charged = [group for executor in book._executors.values() for group in executor.groups]
        assert book._quota.total() == len(charged)

    @invariant()
    def leases_end(self) -> None:
        for view in self.book.snapshot(self.now):
            if view.state in (LeaseState.FRESH, LeaseState.SUSPECT):
                assert view.lease_left_s <= self.heard_until[view.peer] - self.now + 1e-6

    @invariant()
    def the_dead_and_the_removed_are_never_chosen(self) -> None:
        removed = {peer for peer in self.removed if self._is_gone(peer)}
        for model in MODELS:
            choice = choose(
                self.book.index_of(model),
                request=Wanted(model, race=9),
                policy=Policy.RACE,
                health=HealthBook(),
                now=self.now,
                rng=Random(1),
            )
            views = self.book.executors_of(model, self.now)
            assert set(choice.picks) <= set(views)
            assert not {view.peer for view in views} & removed
            states = [view.state(self.now) for view in choice.picks]
            if LeaseState.SUSPECT in states:
                assert LeaseState.FRESH not in states
            assert bool(views) <= self.book.seen_model(model, self.now)

    def _is_gone(self, peer: PeerId) -> bool:
        """It has said nothing new since its removal, which is not yet out of memory (from then on its clock tells)."""
        sequence, heard_at = self.removed[peer]
        is_remembered = self.now < heard_at + LONGEST_TTL_S
        return is_remembered and all(one.sequence <= sequence for one in self.said[peer])

    @invariant()
    def indexes_agree(self) -> None:
        book = self.book
        by_model = {(view.peer, view.offer.id) for index in book._by_model.values() for view in index}
        by_peer = {(peer, one.id) for peer, executor in book._executors.items() for one in executor.full.models}
        assert by_model == by_peer
        assert all(index._points == sorted(index._points) and len(index) for index in book._by_model.values())
        ranked = [peer for ranks in book._by_rank.values() for peer in ranks]
        assert sorted(ranked) == sorted(book._executors) == sorted(book._by_change)
        assert all(executor in book._by_rank[executor.rank].values() for executor in book._executors.values())

    @invariant()
    def the_cursor_only_grows_and_tells_everything(self) -> None:
        page = self.book.entries_since(0, now=self.now)
        assert page.cursor >= self.cursor
        self.cursor = page.cursor
        cursors = [item.cursor for item in page.items]
        assert cursors == sorted(set(cursors))
        assert all(item.age_s >= 0 for item in page.items)
        living = {
            view.peer for view in self.book.snapshot(self.now) if view.state in (LeaseState.FRESH, LeaseState.SUSPECT)
        }
        assert {item.peer for item in page.items} == living


class HealthMachine(RuleBasedStateMachine):
    """Circuits and counts over any order of attempts that begin and end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.limits = HealthLimits(max_records=2, max_models=1)
        self.health = HealthBook(self.limits)
        self.tickets: list[Ticket] = []

    def judge(self, peer: PeerId) -> Verdict | None:
        return self.health.judge(peer, "m", self.now).verdict

    @rule(peer=st.sampled_from(PEERS[:4]))
    def begin(self, peer: PeerId) -> None:
        before, circuit = self.health.judge(peer, "m", self.now), self.health.circuit(peer, "m", self.now)
        has_probe = any(one.is_probe and one.peer == peer for one in self.tickets)
        ticket = self.health.begin(peer, "m", self.now)
        if circuit is Circuit.HALF_OPEN:
            assert ticket.is_probe is not has_probe
        if before.is_due:
            assert ticket.is_probe
            assert before.verdict is None
        if ticket.is_probe:
            assert not has_probe
            # An open circuit is passed before its time when there is nobody else.
            assert before.verdict in (None, Verdict.NOT_BEFORE, Verdict.CIRCUIT_OPEN)
            assert not self.health.judge(peer, "m", self.now).is_due
        self.tickets.append(ticket)

    @precondition(lambda self: self.tickets)
    @rule(pick=st.integers(0, 10**6))
    def first_byte(self, pick: int) -> None:
        ticket = self.tickets[pick % len(self.tickets)]
        self.health.first_byte(ticket, self.now)
        assert ticket.has_first_byte
        assert not ticket.is_probe

    @precondition(lambda self: self.tickets)
    @rule(
        pick=st.integers(0, 10**6),
        outcome=st.sampled_from(Outcome),
        retry_after_s=st.one_of(st.none(), st.floats(-10, 1e6)),
    )
    def end(self, pick: int, outcome: Outcome, retry_after_s: float | None) -> None:
        ticket = self.tickets.pop(pick % len(self.tickets))
        before = self.health.judge(ticket.peer, "m", self.now)
        self.health.end(ticket, outcome, self.now, retry_after_s=retry_after_s)
        after = self.health.judge(ticket.peer, "m", self.now)
        assert after.in_flight == before.in_flight - 1
        if outcome in (Outcome.REFUSED, Outcome.FAILED, Outcome.TIMEOUT, Outcome.LOST):
            assert after.estimate_s >= before.estimate_s
        if retry_after_s is not None and retry_after_s > 0.001:
            assert after.verdict is not None
            assert after.wait_s >= min(300.0, retry_after_s) - 1e-6

    @rule(peer=st.sampled_from(PEERS[:4]))
    def fail_in_a_row(self, peer: PeerId) -> None:
        for _ in range(FAILURES_TO_OPEN):
            self.health.end(self.health.begin(peer, "m", self.now), Outcome.FAILED, self.now)
        # With a probe under way the others decide nothing, but nobody else is let through either.
        assert self.health.circuit(peer, "m", self.now) is not Circuit.CLOSED
        assert self.judge(peer) is not None

    @rule(peer=st.sampled_from(PEERS[:4]), attempts=st.integers(1, 3))
    def probe_after_failures(self, peer: PeerId, attempts: int) -> None:
        self.fail_in_a_row(peer)
        self.now += MAX_BACKOFF_S + 1
        for _ in range(attempts):
            self.begin(peer)

    @rule(seconds=st.sampled_from([0.001, 0.2, 1.0, 35.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(peer=st.sampled_from(PEERS[:4]))
    def everything_ends(self, peer: PeerId) -> None:
        """No verdict lasts: pauses and open circuits end, and a probe that is ended frees the next."""
        self.now += 301.0
        for ticket in self.tickets:
            self.health.end(ticket, Outcome.CANCELLED, self.now)
        self.tickets.clear()
        assert self.judge(peer) is None

    @rule(peer=st.sampled_from(PEERS[:4]))
    def one_good_attempt_later_all_is_forgiven(self, peer: PeerId) -> None:
        self.everything_ends(peer)
        ticket = self.health.begin(peer, "m", self.now)
        self.now += 0.1
        self.health.end(ticket, Outcome.OK, self.now)
        judged = self.health.judge(peer, "m", self.now)
        assert (judged.verdict, judged.is_due) == (None, False)
        assert judged.estimate_s == pytest.approx(0.1)

    @invariant()
    def counts_agree(self) -> None:
        for peer in PEERS[:4]:
            in_flight = sum(ticket.peer == peer for ticket in self.tickets)
            assert self.health.judge(peer, "m", self.now).in_flight == in_flight
        busy = len({ticket.peer for ticket in self.tickets})
        assert busy <= len(self.health) <= busy + self.limits.max_records

    @invariant()
    def figures_are_sane(self) -> None:
        for view in self.health.snapshot(self.now):
            assert math.isfinite(view.estimate_s)
            assert view.estimate_s >= 0
            assert view.in_flight >= 0
            assert 0 <= view.wait_s <= 300 + MAX_BACKOFF_S
            if view.circuit is Circuit.OPEN:
                assert view.wait_s > 0
        assert self.limits.budget_ceiling_s >= MAX_PENALTY_S
        budget_s = self.health.first_byte_budget_s("m")
        assert self.limits.budget_floor_s <= budget_s <= self.limits.budget_ceiling_s

    @invariant()
    def one_probe_at_a_time(self) -> None:
        for peer in PEERS[:4]:
            probes = [one for one in self.tickets if one.peer == peer and one.is_probe]
            assert len(probes) <= 1


class BucketMachine(RuleBasedStateMachine):
    """A bucket never gives more than its burst and its rate allow."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.bucket = TokenBucket(rate_per_s=2.0, burst=5.0, now=0.0)
        self.taken = 0.0

    @rule(seconds=st.floats(0, 10))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(tokens=st.floats(0.001, 6))
    def take(self, tokens: float) -> None:
        wait_s = self.bucket.wait_s(self.now, tokens)
        if self.bucket.take(self.now, tokens):
            assert wait_s == 0.0
            self.taken += tokens
        else:
            assert wait_s > 0

    @invariant()
    def never_too_much(self) -> None:
        assert self.taken <= 5.0 + 2.0 * self.now + 1e-6


QUICK = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestPeerBook = PeerBookMachine.TestCase
TestPeerBook.settings = QUICK
TestHealth = HealthMachine.TestCase
TestHealth.settings = QUICK
TestBucket = BucketMachine.TestCase
TestBucket.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)

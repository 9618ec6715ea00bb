"""Who is kept away, and until when."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.standing import FLOOD, FLOOD_BURST, FLOOD_PER_S, FORGED_BURST, KEEP_AWAY_S, Standing

PEERS = [PeerId.from_ed25519(bytes([number]) * 32) for number in range(1, 9)]
A, B = PEERS[:2]


def ban(standing: Standing, peer: PeerId, now: float = 0.0) -> None:
    while not standing.offend(peer, "signature", now):
        pass


def test_a_few_forged_messages_are_let_pass_then_it_is_banned_for_ten_minutes() -> None:
    standing = Standing()
    assert [standing.offend(A, "signature", 0.0) for _ in range(FORGED_BURST + 1)] == [False] * FORGED_BURST + [True]
    assert standing.ban_of(A, 0.0) == "signature"
    assert standing.ban_of(A, KEEP_AWAY_S - 0.1) == "signature"
    assert standing.ban_of(A, KEEP_AWAY_S) is None
    assert standing.ban_of(B, 0.0) is None


def test_it_is_banned_once_however_it_goes_on() -> None:
    standing = Standing()
    ban(standing, A)
    assert not any(standing.offend(A, "size", 1.0) for _ in range(100))
    assert standing.banned(1.0) == [A]
    assert standing.ban_of(A, KEEP_AWAY_S) is None


def test_an_offence_now_and_then_bans_nobody() -> None:
    standing = Standing()
    assert not any(standing.offend(A, "size", 30.0 * number) for number in range(1000))


def test_a_flood_is_let_pass_longer_than_a_forgery() -> None:
    standing = Standing()
    offences = [standing.offend(A, FLOOD, 0.0) for _ in range(FLOOD_BURST + 1)]
    assert offences == [False] * FLOOD_BURST + [True]
    assert not any(standing.offend(B, FLOOD, number / FLOOD_PER_S) for number in range(1000))


def test_a_refusal_is_remembered_until_a_hello_succeeds() -> None:
    standing = Standing()
    assert standing.refuse(A, "not_member", 0.0)
    assert not standing.refuse(A, "version", 1.0)
    assert standing.refusal_of(A, 1.0) == "version"
    assert standing.refused("version", 1.0) == [A]
    assert standing.refused("not_member", 1.0) == []
    assert standing.refused("version", 1.0 + KEEP_AWAY_S) == []
    standing.accept(A)
    standing.accept(A)
    assert standing.refusal_of(A, 1.0) is None
    assert standing.refuse(A, "not_member", 2.0)
    assert standing.refusal_of(A, 2.0 + KEEP_AWAY_S) is None
    assert standing.refuse(A, "not_member", 3.0 + KEEP_AWAY_S)


def test_what_keeps_away_is_a_ban_or_a_refusal() -> None:
    standing = Standing()
    assert standing.keeps_away(A, 0.0) is None
    standing.refuse(A, "not_member", 0.0)
    assert standing.keeps_away(A, 0.0) == "not_member"
    ban(standing, A)
    assert standing.keeps_away(A, 0.0) == "signature"


class StandingMachine(RuleBasedStateMachine):
    """Tables stay bounded, and a ban ends when it should, in any order of events."""

    LIMIT = 3

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.standing = Standing(max_peers=self.LIMIT)
        self.banned_at: dict[PeerId, float] = {}

    @rule(seconds=st.sampled_from([0.1, 10.0, 300.0, 600.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(peer=st.sampled_from(PEERS), reason=st.sampled_from(["size", FLOOD]), count=st.integers(1, 50))
    def offend(self, peer: PeerId, reason: str, count: int) -> None:
        for _ in range(count):
            if self.standing.offend(peer, reason, self.now):
                self.banned_at[peer] = self.now
                assert self.standing.ban_of(peer, self.now) == reason

    @rule(peer=st.sampled_from(PEERS))
    def refuse(self, peer: PeerId) -> None:
        self.standing.refuse(peer, "not_member", self.now)
        assert self.standing.refusal_of(peer, self.now) == "not_member"

    @rule(peer=st.sampled_from(PEERS))
    def accept(self, peer: PeerId) -> None:
        self.standing.accept(peer)
        assert self.standing.refusal_of(peer, self.now) is None

    @invariant()
    def bounded(self) -> None:
        assert len(self.standing.banned(self.now)) <= self.LIMIT
        assert len(self.standing.refused("not_member", self.now)) <= self.LIMIT

    @invariant()
    def no_ban_outlives_its_time(self) -> None:
        for peer in PEERS:
            is_over = self.now >= self.banned_at.get(peer, float("-inf")) + KEEP_AWAY_S
            assert self.standing.ban_of(peer, self.now) is None or not is_over


TestStanding = StandingMachine.TestCase

"""Doubts: they add up, fade, are bounded, and weigh in a choice."""

from __future__ import annotations

import pytest

from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.trust import DOUBTED_COST, HALF_LIFE_S, MAX_REASONS, TrustBook

PEERS = [PeerId.from_ed25519(bytes([i]) * 32) for i in range(1, 6)]
A, B = PEERS[:2]


def test_nobody_is_doubted_without_a_reason() -> None:
    book = TrustBook()
    assert (book.trust(A, 5.0), book.cost_factor(A, 5.0), book.doubts_of(A, 5.0), book.doubted(5.0)) == (
        1.0,
        1.0,
        (),
        [],
    )


def test_a_doubt_halves_and_is_forgotten() -> None:
    book = TrustBook()
    book.doubt(A, "numbers", 0.8, 100.0)
    assert book.trust(A, 100.0) == pytest.approx(0.2)
    assert book.trust(A, 100.0 + HALF_LIFE_S) == pytest.approx(0.6)
    assert book.cost_factor(A, 100.0 + HALF_LIFE_S) == pytest.approx(1 + DOUBTED_COST * 0.4)
    assert book.trust(A, 0.0) == pytest.approx(0.2)  # a clock that goes back makes nobody worse
    assert book.doubted(100.0 + 5 * HALF_LIFE_S) == [A]
    assert book.doubted(100.0 + 6 * HALF_LIFE_S) == []
    assert book.trust(A, 100.0) == 1.0


def test_the_same_source_adds_up_to_one() -> None:
    book = TrustBook()
    for _ in range(3):
        book.doubt(A, "numbers", 0.3, 0.0)
    assert book.trust(A, 0.0) == pytest.approx(0.1)
    for _ in range(3):
        book.doubt(A, "numbers", 0.3, 0.0)
    assert book.trust(A, 0.0) == 0.0
    assert book.cost_factor(A, 0.0) == 1 + DOUBTED_COST


def test_a_source_that_repeats_itself_counts_once() -> None:
    book = TrustBook()
    for at in (0.0, 60.0, 120.0):
        book.set_doubt(A, "audit", 0.5, at)
    assert book.trust(A, 120.0) == pytest.approx(0.5)
    (doubt,) = book.doubts_of(A, 130.0)
    assert (doubt.reason, doubt.said_s) == ("audit", 10.0)


def test_sources_add_up_and_the_strongest_is_named_first() -> None:
    book = TrustBook()
    book.doubt(A, "weak", 0.2, 0.0)
    book.doubt(A, "strong", 0.5, 0.0)
    assert book.trust(A, 0.0) == pytest.approx(0.3)
    assert [one.reason for one in book.doubts_of(A, 0.0)] == ["strong", "weak"]
    book.doubt(A, "more", 0.9, 0.0)
    assert book.trust(A, 0.0) == 0.0
    assert book.trust(B, 0.0) == 1.0
    # One fades before the other; what is left still counts.
    assert [one.reason for one in book.doubts_of(A, 0.0)] == ["more", "strong", "weak"]
    assert book.doubted(4 * HALF_LIFE_S) == [A]
    assert [one.reason for one in book.doubts_of(A, 4 * HALF_LIFE_S)] == ["more", "strong"]


def test_reasons_and_peers_are_bounded() -> None:
    book = TrustBook(max_peers=3)
    for number in range(MAX_REASONS):
        book.doubt(A, f"r{number}", 0.5 + number / 100, 0.0)
    book.doubt(A, "new and weak", 0.1, 0.0)
    reasons = {one.reason for one in book.doubts_of(A, 0.0)}
    assert len(reasons) == MAX_REASONS
    assert "new and weak" in reasons
    assert "r0" not in reasons
    for peer in PEERS[1:4]:
        book.doubt(peer, "x", 0.5, 0.0)
    assert book.trust(A, 0.0) == 1.0  # doubted longest ago
    assert book.doubted(0.0) == sorted(PEERS[1:4])

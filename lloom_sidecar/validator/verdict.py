"""Who answered unlike most of the others. Pure.

Greedy answers of the same weights are equal up to some token and then drift apart, because machines add numbers in
different orders; another model differs from the first words on. So texts are compared by what they begin with, and
leniently: an honest executor that drifts early must not be found, a dishonest one is asked again anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from lloom_sidecar.ids import PeerId

COMPARED_CHARACTERS: Final = 80
"""Most of a text's beginning that is looked at."""
ALIKE_SHARE: Final = 0.4
"""Two texts are alike when at least so much of the shorter one's beginning is the same."""
MIN_ANSWERS: Final = 3
"""Between two nobody can say who is wrong."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One round's outcome."""

    agreeing: frozenset[PeerId]
    """More than half of those that answered; empty when there are no such."""
    outliers: frozenset[PeerId]
    """The others; empty without a majority."""


NO_VERDICT: Final = Verdict(frozenset(), frozenset())


def are_alike(one: str, other: str) -> bool:
    """Whether two answers may come from the same weights."""
    a, b = (" ".join(text.split())[:COMPARED_CHARACTERS] for text in (one, other))
    shorter = min(len(a), len(b))
    if shorter == 0:
        return a == b
    same = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    return same >= ALIKE_SHARE * shorter


def judge(texts: Mapping[PeerId, str]) -> Verdict:
    """Compare the answers to one question. No verdict with fewer than three, or without a majority that is alike."""
    if len(texts) < MIN_ANSWERS:
        return NO_VERDICT
    alike = {
        peer: frozenset(other for other, theirs in texts.items() if are_alike(text, theirs))
        for peer, text in texts.items()
    }
    # The largest group around one answer; the smallest id decides between equals, so that every run says the same.
    agreeing = max((alike[peer] for peer in sorted(texts)), key=len)
    if 2 * len(agreeing) <= len(texts):
        return NO_VERDICT
    # Who is like anybody in the group has drifted, not lied.
    outliers = frozenset(peer for peer in texts if not alike[peer] & agreeing)
    return Verdict(frozenset(texts) - outliers, outliers)

"""Whose answer is unlike the others': a majority decides, leniently, or nobody is found."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lloom_sidecar.ids import PeerId
from lloom_sidecar.validator.verdict import NO_VERDICT, are_alike, judge

A, B, C, D, E = (PeerId.from_ed25519(bytes([i]) * 32) for i in range(1, 6))
TEXT = "Photosynthesis is the process by which green plants turn light into sugar, which they live from."
DRIFTED = "Photosynthesis is the process by which plants and algae make what they need out of light and air."
FALSE = "I think that you should look for it on the internet, there is a lot of material to be found there."


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        (TEXT, TEXT, True),
        (TEXT, DRIFTED, True),
        (TEXT, FALSE, False),
        (TEXT, TEXT[:30], True),
        (TEXT, "  Photosynthesis is\n the process", True),
        ("", "", True),
        ("", TEXT, False),
        (TEXT, "P", True),
        ("1234567890", "1234000000", True),
        ("1234567890", "123xxxxxxx", False),
    ],
)
def test_alike(one: str, other: str, alike: bool) -> None:
    assert are_alike(one, other) is alike
    assert are_alike(other, one) is alike


def test_one_of_three_lies() -> None:
    verdict = judge({A: TEXT, B: FALSE, C: DRIFTED})
    assert verdict.agreeing == {A, C}
    assert verdict.outliers == {B}


def test_two_of_five_lie_the_same_lie() -> None:
    verdict = judge({A: TEXT, B: FALSE, C: DRIFTED, D: FALSE, E: TEXT})
    assert verdict.outliers == {B, D}


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {A: TEXT, B: FALSE},
        {A: TEXT, B: FALSE, C: "Something else altogether."},
        {A: TEXT, B: TEXT, C: FALSE, D: FALSE},  # half is no majority
    ],
)
def test_no_verdict(texts: dict[PeerId, str]) -> None:
    assert judge(texts) == NO_VERDICT


def test_who_is_like_anybody_of_the_majority_is_no_outlier() -> None:
    """The middle one is like both ends, which are not like each other."""
    middle, left, right = "a" * 32 + "b" * 48, "a" * 32 + "c" * 48, "a" * 12 + "d" * 68
    longer = "a" * 32 + "b" * 16
    verdict = judge({A: middle, B: left, C: middle, D: longer, E: right})
    assert verdict.outliers == {E}


@given(st.dictionaries(st.sampled_from([A, B, C, D, E]), st.sampled_from([TEXT, DRIFTED, FALSE, "", "x"])))
def test_outliers_are_always_the_minority(texts: dict[PeerId, str]) -> None:
    verdict = judge(texts)
    assert not verdict.agreeing & verdict.outliers
    assert len(verdict.outliers) * 2 < max(1, len(texts))
    if verdict != NO_VERDICT:
        assert verdict.agreeing | verdict.outliers == set(texts)

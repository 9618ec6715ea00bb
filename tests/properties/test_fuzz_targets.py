"""The fuzzer's targets without the fuzzer: what it knows, what it found, and bytes that are nearly right."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.crashes import CRASHES
from tests.fuzz.seeds import SEEDS, inputs_of
from tests.fuzz.targets import TARGETS

NAMES = sorted(TARGETS)


def test_every_target_has_a_beginning() -> None:
    assert sorted(SEEDS) == NAMES
    assert all(SEEDS[name]() for name in NAMES)
    assert set(CRASHES) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known(name: str) -> None:
    for data in inputs_of(name):
        TARGETS[name](data)


@st.composite
def nearly(draw: st.DrawFn, name: str) -> bytes:
    """A known input with some bytes changed, left out, doubled, or another's behind it."""
    known = inputs_of(name)
    data = bytearray(draw(st.sampled_from(known)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 3)):
            case 0:
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=3))
            case 1:
                del data[place : place + draw(st.integers(1, 8))]
            case 2:
                data[place:place] = data[place : place + draw(st.integers(1, 16))]
            case _:
                data[place:] = draw(st.sampled_from(known))
    return bytes(data)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_nearly_right(name: str, data: st.DataObject) -> None:
    TARGETS[name](data.draw(st.one_of(nearly(name), st.binary(max_size=200))))

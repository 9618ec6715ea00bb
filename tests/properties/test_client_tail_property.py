"""However a stream is cut: an application gets the same bytes, and nothing of the end before it is released."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lloom_sidecar.client.openai import TailHolder


@st.composite
def events(draw: st.DrawFn, n: int) -> tuple[list[bytes], int]:
    """Events of a stream with ``n`` alternatives, and how many of them may pass before the release."""
    end = draw(st.sampled_from(["\n\n", "\r\n\r\n", "\r\r"]))
    colon = draw(st.sampled_from([": ", ":"]))

    def event(document: Any) -> bytes:
        text = document if isinstance(document, str) else json.dumps(document, indent=None)
        return f"data{colon}{text}{end}".encode()

    made: list[bytes] = []
    order = draw(st.permutations(range(n)))
    texts = st.text(max_size=6) | st.sampled_from(['"finish_reason":"x"', "[DONE]"])
    for index in order:
        for text in draw(st.lists(texts, max_size=3)):
            made.append(event({"choices": [{"index": index, "text": text, "finish_reason": None}]}))
            if draw(st.booleans()):
                made.append(f": comment{end}".encode())
        made.append(event({"choices": [{"index": index, "text": "", "finish_reason": "stop"}]}))
    passes = len(made) - 1
    if draw(st.booleans()):
        made.append(event({"choices": [], "usage": {"total_tokens": 1}}))
    if draw(st.booleans()):
        made.append(event("[DONE]"))
    return made, passes


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3), st.sampled_from([b"", b"data: half"]))
def test_any_cutting(data: st.DataObject, n: int, rest: bytes) -> None:
    made, passes = data.draw(events(n))
    whole = b"".join(made) + rest
    places = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    bounds = [0, *places, len(whole)]
    tail = TailHolder(n)
    fed = b"".join(tail.feed(whole[a:b]) for a, b in itertools.pairwise(bounds))
    assert fed == b"".join(made[:passes])
    assert fed + tail.release() == whole


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.binary(max_size=20) | st.sampled_from([b"data: [DONE]\n\n", b'"finish_reason":"s"\n\n']), max_size=8)
)
def test_any_bytes_come_out_as_they_went_in(pieces: list[bytes]) -> None:
    tail = TailHolder()
    assert b"".join([*(tail.feed(piece) for piece in pieces), tail.release()]) == b"".join(pieces)

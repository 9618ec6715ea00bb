"""A document that was cut into chunks anywhere comes out of the merger as it was; no chunk makes it fail otherwise."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lloom_sidecar.executor.aggregate import ChunkMerger

TEXT = st.text(max_size=12)
CALL = st.fixed_dictionaries(
    {"id": TEXT, "type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT, "arguments": TEXT})}
)
TOKEN = st.fixed_dictionaries({"token": TEXT, "logprob": st.floats(-9, 0)})


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    choices = []
    for index in range(draw(st.integers(1, 3))):
        message: dict[str, Any] = {"role": "assistant", "content": draw(st.none() | TEXT)}
        if draw(st.booleans()):
            message["tool_calls"] = draw(st.lists(CALL, min_size=1, max_size=3))
        if draw(st.booleans()):
            message["reasoning_content"] = draw(TEXT)
        logprobs = draw(st.none() | st.lists(TOKEN, max_size=4).map(lambda tokens: {"content": tokens}))
        finish = draw(st.sampled_from(["stop", "length", "tool_calls"]))
        choices.append({"index": index, "message": message, "finish_reason": finish, "logprobs": logprobs})
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": choices,
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        "x_unknown": draw(st.none() | TEXT),
    }


def cut(draw: st.DrawFn, text: str) -> list[str]:
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=3)))
    bounds = [0, *places, len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@st.composite
def streams(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A document, and chunks that say the same."""
    document = draw(documents())
    top = {key: document[key] for key in ("id", "created", "model", "x_unknown")}
    top["object"] = "chat.completion.chunk"
    queues: list[list[dict[str, Any]]] = []
    for one in document["choices"]:
        message, index = one["message"], one["index"]
        queue: list[dict[str, Any]] = []

        def say(delta: dict[str, Any], queue: list[dict[str, Any]] = queue, index: int = index, **more: Any) -> None:
            queue.append({**top, "choices": [{"index": index, "delta": delta, "finish_reason": None, **more}]})

        say({"role": "assistant", "content": None if message["content"] is None else ""})
        for name in ("content", "reasoning_content"):
            if message.get(name) is not None:
                for piece in cut(draw, message[name]):
                    say({name: piece})
        for number, call in enumerate(message.get("tool_calls", [])):
            function = call["function"]
            head = {"index": number, "id": call["id"], "type": "function", "function": {"name": function["name"]}}
            say({"tool_calls": [head]})
            for piece in cut(draw, function["arguments"]):
                say({"tool_calls": [{"index": number, "function": {"arguments": piece}}]})
        if one["logprobs"] is not None:
            say({}, logprobs={"content": []})
            for token in one["logprobs"]["content"]:
                say({}, logprobs={"content": [token]})
        say({})
        queue[-1]["choices"][0]["finish_reason"] = one["finish_reason"]
        queues.append(queue)
    chunks = []
    while any(queues):
        queue = draw(st.sampled_from([queue for queue in queues if queue]))
        chunks.append(queue.pop(0))
    chunks.append({**top, "choices": [], "usage": document["usage"]})
    return document, chunks


@settings(max_examples=80, deadline=None)
@given(streams())
def test_merging_a_split_document_gives_the_document(stream: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    document, chunks = stream
    merger = ChunkMerger(is_chat=True)
    for chunk in chunks:
        merger.feed(json.dumps(chunk).encode())
    assert json.loads(merger.document()) == document
    assert merger.has_finished


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=6), st.integers(1, 3))
def test_completions_too(pieces: list[str], n: int) -> None:
    merger = ChunkMerger(is_chat=False)
    for piece in pieces:
        for index in range(n):
            merger.feed(
                json.dumps({"object": "text_completion", "choices": [{"index": index, "text": piece}]}).encode()
            )
    assert [c["text"] for c in json.loads(merger.document())["choices"]] == ["".join(pieces)] * n


NOISE = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "index",
                    "delta",
                    "content",
                    "tool_calls",
                    "function",
                    "function_call",
                    "arguments",
                    "text",
                    "logprobs",
                    "tokens",
                    "usage",
                    "role",
                    "id",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)
CHUNK = st.fixed_dictionaries(
    {
        "choices": NOISE
        | st.lists(st.fixed_dictionaries({"index": st.integers(0, 1), "delta": NOISE, "text": NOISE}), max_size=2)
    }
)


@settings(max_examples=60, deadline=None)
@given(st.booleans(), st.lists(CHUNK, max_size=4))
def test_strange_chunks_are_merged_or_refused(is_chat: bool, chunks: list[dict[str, Any]]) -> None:
    merger = ChunkMerger(is_chat=is_chat)
    for chunk in chunks:
        try:
            merger.feed(json.dumps(chunk).encode())
        except ValueError:
            return
    json.loads(merger.document())

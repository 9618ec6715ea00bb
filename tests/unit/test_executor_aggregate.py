"""One document from many chunks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lloom_sidecar.executor.aggregate import ChunkMerger

TOP = {"id": "c-1", "object": "chat.completion.chunk", "created": 7, "model": "m"}


def merged(*chunks: dict[str, Any], is_chat: bool = True) -> dict[str, Any]:
    merger = ChunkMerger(is_chat=is_chat)
    for chunk in chunks:
        merger.feed(json.dumps(chunk).encode())
    document: dict[str, Any] = json.loads(merger.document())
    return document


def choice(delta: Any, finish: str | None = None, index: int = 0, **more: Any) -> dict[str, Any]:
    return {**TOP, "choices": [{"index": index, "delta": delta, "finish_reason": finish, **more}]}


def message(*chunks: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = merged(*chunks)["choices"][0]["message"]
    return found


def test_text_usage_and_unknown_fields() -> None:
    document = merged(
        choice({"role": "assistant", "content": ""}),
        choice({"content": "Hel"}, x_vendor={"a": 1}),
        choice({"content": "lo"}),
        choice({}, "stop"),
        {**TOP, "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}, "timings": {"ms": 3}},
    )
    assert document == {
        **TOP,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello"},
                "finish_reason": "stop",
                "logprobs": None,
                "x_vendor": {"a": 1},
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        "timings": {"ms": 3},
    }


def test_two_alternatives_in_any_order() -> None:
    document = merged(
        choice({"content": "b"}, index=1),
        choice({"content": "a"}),
        choice({"content": "B"}, "length", index=1),
        choice({"content": "A"}, "stop"),
    )
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in document["choices"]] == [
        (0, "aA", "stop"),
        (1, "bB", "length"),
    ]


def test_tool_calls_are_put_together_by_their_index() -> None:
    def call(index: int, **fields: Any) -> dict[str, Any]:
        return choice({"tool_calls": [{"index": index, **fields}]})

    assert message(
        choice({"role": "assistant", "content": None}),
        call(0, id="a", type="function", function={"name": "f", "arguments": ""}),
        call(0, function={"arguments": '{"x"'}),
        call(1, id="b", type="function", function={"name": "g", "arguments": "{}"}),
        call(0, function={"arguments": ":1}"}),
        choice({}, "tool_calls"),
    ) == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


@pytest.mark.parametrize(
    "first",
    [
        {"role": "assistant", "content": None, "tool_calls": None},
        {"tool_calls": [{"index": 0, "function": None}]},
        {"tool_calls": [{"index": 0, "function": {"name": None, "arguments": None}}]},
        None,
    ],
)
def test_a_field_that_was_null_first(first: Any) -> None:
    """Several servers write every field of the delta, null where nothing is said."""
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    found = message(choice(first), choice({"tool_calls": [call]}), choice({"content": "x"}), choice(None, "tool_calls"))
    assert found["tool_calls"] == [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]
    assert found["content"] == "x"


def test_the_older_function_call_is_put_together_too() -> None:
    found = message(
        choice({"function_call": {"name": "f", "arguments": "{"}}), choice({"function_call": {"arguments": "}"}})
    )
    assert found["function_call"] == {"name": "f", "arguments": "{}"}


def test_reasoning_and_refusal_are_text() -> None:
    found = message(
        choice({"reasoning_content": "a", "refusal": None}), choice({"reasoning_content": "b", "refusal": "no"})
    )
    assert (found["reasoning_content"], found["refusal"]) == ("ab", "no")


def test_logprobs_go_on() -> None:
    document = merged(
        choice({"content": "a"}, logprobs={"content": [{"token": "a"}], "refusal": None}),
        choice({"content": "b"}, logprobs={"content": [{"token": "b"}, {"token": "c"}], "refusal": None}),
        choice({}, "stop", logprobs=None),
    )
    assert document["choices"][0]["logprobs"] == {
        "content": [{"token": "a"}, {"token": "b"}, {"token": "c"}],
        "refusal": None,
    }


def test_completions() -> None:
    def chunk(text: Any, finish: str | None = None, **more: Any) -> dict[str, Any]:
        return {"object": "text_completion", "choices": [{"index": 0, "text": text, "finish_reason": finish, **more}]}

    logprobs = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}], "text_offset": [0]}
    document = merged(
        chunk(None), chunk("a", logprobs=logprobs), chunk("b", logprobs=logprobs), chunk("", "stop"), is_chat=False
    )
    assert document["object"] == "text_completion"
    assert document["choices"] == [
        {
            "index": 0,
            "text": "ab",
            "finish_reason": "stop",
            "logprobs": {key: value * 2 for key, value in logprobs.items()},  # type: ignore[operator]
        }
    ]


def test_progress() -> None:
    merger = ChunkMerger(is_chat=True)
    merger.feed(json.dumps(choice({"role": "assistant"})).encode())
    assert (merger.chunks, merger.has_finished) == (0, False)
    merger.feed(json.dumps(choice({"content": "x"})).encode())
    assert (merger.chunks, merger.has_finished) == (1, False)
    merger.feed(json.dumps(choice({}, "stop")).encode())
    assert (merger.chunks, merger.has_finished) == (1, True)
    assert merger.usage is None
    assert merger.document() == merger.document()


@pytest.mark.parametrize(
    "chunk",
    [
        b"{",
        b"[]",
        b"1",
        b'{"choices":1}',
        b'{"choices":{"index":0}}',
        b'{"choices":"ab"}',
        b'{"choices":[1]}',
        b'{"choices":[{"index":-1}]}',
        b'{"choices":[{"index":1024}]}',
        b'{"choices":[{"index":"0"}]}',
        b'{"choices":[{"index":null}]}',
        b'{"choices":[{"delta":{"tool_calls":[{"index":[]}]}}]}',
        b'{"choices":[{"delta":{"tool_calls":[{"index":null}, {"index":"a"}]}}]}',
        b"\xff",
        b'{"a":"\xff"}',
        b"[" * 100_000,
    ],
    ids=lambda chunk: repr(chunk[:40]),
)
def test_what_is_no_chunk_is_a_value_error(chunk: bytes) -> None:
    merger = ChunkMerger(is_chat=True)
    with pytest.raises(ValueError):
        merger.feed(chunk)

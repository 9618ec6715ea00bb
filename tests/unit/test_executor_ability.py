"""Whether a backend goes on with a given beginning: recognised when it does, and only then."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from lloom_sidecar.executor.ability import MAX_TOKENS, can_resume, goes_on, pieces_of

WORDS = ["one", ", two", ", three", ", four", ", five", ", six", ", seven", ", eight"]


def stream(pieces: list[str], *, more: bytes = b"") -> bytes:
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"role": "assistant", "content": None}}]}]
    chunks += [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    chunks += [{"choices": [{"delta": {}, "finish_reason": "length"}]}, {"choices": [], "usage": {}}]
    return b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in chunks) + more + b"data: [DONE]\n\n"


def rest(beginning: str, words: list[str] = WORDS) -> list[str]:
    whole = "".join(words)
    assert whole.startswith(beginning)
    return [whole[len(beginning) :]]


async def tried(answer: Callable[[str], bytes], words: list[str] = WORDS) -> tuple[bool, list[dict[str, Any]]]:
    """What is found of a backend that gives ``answer(beginning)``, and what it was asked."""
    asked: list[dict[str, Any]] = []

    async def ask(body: bytes) -> bytes:
        asked.append(json.loads(body))
        last = asked[-1]["messages"][-1]
        return answer(last["content"]) if last["role"] == "assistant" else stream(words)

    return await can_resume(ask, "real"), asked


class TestTryOut:
    async def test_one_that_goes_on(self) -> None:
        can, asked = await tried(lambda beginning: stream(rest(beginning)))
        assert can
        first, second = asked
        assert (first["model"], first["max_tokens"], first["temperature"]) == ("real", MAX_TOKENS, 0)
        assert second["messages"][:-1] == first["messages"]
        assert second["messages"][-1] == {"role": "assistant", "content": "one, two, three, four"}
        assert (second["continue_final_message"], second["add_generation_prompt"]) == (True, False)
        assert second["max_tokens"] == MAX_TOKENS - 4

    @pytest.mark.parametrize(
        "answer",
        [
            lambda beginning: stream(WORDS),  # begins again
            lambda beginning: stream([beginning, *rest(beginning)]),  # repeats the beginning
            lambda beginning: stream(["I see that you count."]),
            lambda beginning: stream([]),
            lambda beginning: stream(["ignored"], more=b"data: {no json\n\n"),
            lambda beginning: b'{"object":"chat.completion","choices":[]}',
            lambda beginning: stream([", fi"]),  # too little to tell
        ],
    )
    async def test_one_that_does_not(self, answer: Callable[[str], bytes]) -> None:
        can, asked = await tried(answer)
        assert not can
        assert len(asked) == 2

    async def test_an_answer_too_short_to_tell_ends_it(self) -> None:
        can, asked = await tried(lambda beginning: stream(["x"]), ["yes", "."])
        assert not can
        assert len(asked) == 1

    async def test_an_answer_that_repeats_itself_proves_nothing(self) -> None:
        words = ["one, "] * 8
        can, _ = await tried(lambda beginning: stream(rest(beginning, words)), words)
        assert not can


def test_the_ends_may_differ() -> None:
    assert goes_on(WORDS, 4, [", five", ", six", ", se"])
    assert goes_on(WORDS, 4, [", five, six, seven, eight", ", nine"])
    assert not goes_on(WORDS, 4, [", five, six, nine"])


def test_pieces() -> None:
    assert pieces_of(stream(["a", "", "b"])) == ["a", "b"]
    assert pieces_of(b"") == []
    assert pieces_of(b'data: {"choices":[{"delta":{"content":5}}]}\n\n') == []
    assert pieces_of(b"data: " + b"x" * 2_000_000 + b"\n\n") == []

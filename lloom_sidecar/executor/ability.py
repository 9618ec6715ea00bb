"""Whether a backend goes on with an answer whose beginning it is given: tried out, never assumed.

The backend answers a question, then the same question with the first half of that answer in front. Only a backend that
goes on comes to the same second half: one that ignores the beginning starts again, one that repeats it says it twice,
one that knows neither refuses. That holds for any model that answers the same question twice in the same words, which
temperature 0 makes sure of, mostly; where it does not, the ability stays unknown, which is the safe side.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from lloom_sidecar.http.errors import SseError
from lloom_sidecar.http.sse import SseCutter, data_of
from lloom_sidecar.protocol.continuation import continued
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

QUESTION: Final = "Count from one to thirty in words, separated by commas."
"""Long enough for 16 tokens, and its answer does not repeat itself."""
MAX_TOKENS: Final = 16
MIN_PIECES: Final = 4
"""Pieces of text that the answer must have: of fewer no half can be told from chance."""


async def can_resume(ask: Callable[[bytes], Awaitable[bytes]], model: str) -> bool:
    """Try it out. ``ask``: sends a chat body and returns the whole streamed answer; what it raises goes through."""
    question: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "seed": 1,
        "stream": True,
    }
    whole = pieces_of(await ask(msgspec.json.encode(question)))
    if len(whole) < MIN_PIECES:
        return False
    half = len(whole) // 2
    again = continued(question, pb.OPERATION_CHAT, "".join(whole[:half]))
    again["max_tokens"] = MAX_TOKENS - half
    return goes_on(whole, half, pieces_of(await ask(msgspec.json.encode(again))))


def goes_on(whole: list[str], half: int, rest: list[str]) -> bool:
    """Whether ``rest`` is what followed the first ``half`` pieces of ``whole``, and not the answer begun again.

    The end may differ by what a limit on tokens cuts; at least two pieces' worth of text has to be there.
    """
    expected = "".join(whole[half:])
    found = "".join(rest)
    common = min(len(expected), len(found))
    is_same = found[:common] == expected[:common] and common >= len("".join(whole[half : half + 2]))
    return is_same and not "".join(whole).startswith(found[:common])


def pieces_of(stream: bytes) -> list[str]:
    """The pieces of text in a streamed chat answer, without the empty ones; [] for anything else."""
    pieces: list[str] = []
    try:
        for event in SseCutter().feed(stream):
            data = data_of(event)
            if data and data != b"[DONE]":
                delta = msgspec.json.decode(data, type=_Chunk)
                pieces += [choice.delta.content for choice in delta.choices if choice.delta.content]
    except (msgspec.DecodeError, RecursionError, SseError):
        return []
    return pieces


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []

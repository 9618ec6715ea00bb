"""Canaries look like requests of applications, and their answers' texts are found again."""

from __future__ import annotations

import json
import random

import pytest

from lloom_sidecar.executor.body import BodyPolicy, prepare_body
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.validator.canary import MAX_TOKENS, MIN_TOKENS, make_canary, text_of


def test_a_canary_is_a_greedy_request_that_every_executor_takes() -> None:
    rng = random.Random(1)
    seen = set()
    for _ in range(300):
        canary = make_canary("m", rng)
        document = json.loads(canary.body)
        assert document["model"] == "m"
        assert (document["temperature"], document.get("stream", False)) == (0, canary.is_streamed)
        assert document["seed"] > 0
        assert MIN_TOKENS <= document["max_tokens"] <= MAX_TOKENS
        assert [m["role"] for m in document["messages"]] in (["user"], ["system", "user"])
        assert "{}" not in canary.body.decode()
        call = prepare_body(canary.body, operation=pb.OPERATION_CHAT, model="m", backend_model="m", policy=BodyPolicy())
        assert call.wants_stream is canary.is_streamed
        seen.add(canary.digest)
    assert len(seen) > 290


def test_the_same_draw_is_the_same_question() -> None:
    assert make_canary("m", random.Random(7)) == make_canary("m", random.Random(7))


def sse(*deltas: object) -> bytes:
    events = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"


def test_texts() -> None:
    document = {"choices": [{"message": {"role": "assistant", "content": "Hello there"}}]}
    assert text_of(json.dumps(document).encode(), is_streamed=False) == "Hello there"
    streamed = sse({"role": "assistant", "content": None}, {"content": "Hello"}, {"content": " there"}, {})
    assert text_of(b": comment\n\nevent: x\n" + streamed, is_streamed=True) == "Hello there"
    assert text_of(sse({"reasoning_content": "hm "}, {"content": "yes"}), is_streamed=True) == "hm yes"
    assert text_of(b'data: {"choices": []}\n\n', is_streamed=True) == ""
    assert text_of(b'{"choices": null}', is_streamed=False) == ""


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    "answer",
    [b"data: x\n\n", b"[]", b"data: []\n\n", b'data: {"choices":[1]}', b'{"choices":[{"message":1}]}', b"\xff"],
)
def test_what_is_no_chat_answer_has_no_text(answer: bytes, is_streamed: bool) -> None:
    if is_streamed and not answer.startswith(b"data:"):
        assert text_of(answer, is_streamed=True) == ""
    else:
        assert text_of(answer, is_streamed=is_streamed) is None

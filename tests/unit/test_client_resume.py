"""Whether a cut answer may go on, what is asked of the next executor, and what the application sees of the seam."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lloom_sidecar.client import part as part_module
from lloom_sidecar.client.part import Part, Progress
from lloom_sidecar.client.resume import MAX_RESUMPTIONS, MAX_STOPS, ResumedAnswer, is_loss, part_key, plan_of
from lloom_sidecar.client.router import MAX_ATTEMPTS
from lloom_sidecar.errors import (
    LloomError,
    PeerTimeoutError,
    PeerUnreachableError,
    ReceiptError,
    RefusedError,
    RemoteProtocolError,
    RequestError,
    StreamLostError,
)
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Exchange
from lloom_sidecar.peers.selection import Wanted
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

CHAT, COMPLETIONS = pb.OPERATION_CHAT, pb.OPERATION_COMPLETIONS
MESSAGES = [{"role": "user", "content": "hi"}]
DIGEST = b"d" * 32
LOST = StreamLostError("cut")


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document, separators=(",", ":")).encode() + b"\n\n"


def chunk(text: str | None = "", finish: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text, **delta}, "finish_reason": finish}
    return event({"id": "a", "created": 1, "choices": [choice]})


class TestPlan:
    @pytest.mark.parametrize(
        ("more", "obstacle"),
        [
            ({}, ""),
            ({"n": 1, "best_of": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}}, ""),
            ({"stop": "x", "max_tokens": 5, "temperature": 0.5, "reasoning_effort": "none"}, ""),
            ({"chat_template_kwargs": {"enable_thinking": False}}, ""),
            ({"n": 2}, "several_choices"),
            ({"best_of": 2}, "several_choices"),
            ({"use_beam_search": True}, "several_choices"),
            ({"tools": [{}]}, "tools"),
            ({"functions": [{}]}, "tools"),
            ({"logprobs": True}, "logprobs"),
            ({"prompt_logprobs": 0}, "logprobs"),
            ({"response_format": {"type": "json_object"}}, "response_format"),
            ({"guided_json": {}}, "response_format"),
            ({"grammar": "root ::= x"}, "response_format"),
            ({"reasoning_effort": "low"}, "reasoning"),
            ({"reasoning": {"effort": "low"}}, "reasoning"),
            ({"chat_template_kwargs": {"enable_thinking": True}}, "reasoning"),
            ({"max_tokens": 5.5}, "form"),
            ({"stop": 5}, "form"),
            ({"stop": ["a", ""]}, "form"),
            ({"stop": ["a"] * (MAX_STOPS + 1)}, "form"),
            ({"messages": []}, "form"),
            ({"messages": "hi"}, "form"),
            ({"messages": ["hi"]}, "form"),
            ({"messages": [*MESSAGES, {"role": "assistant", "content": "H"}]}, "form"),
            ({"continue_final_message": True}, "form"),
        ],
    )
    def test_a_chat(self, more: dict[str, Any], obstacle: str) -> None:
        body = json.dumps({"model": "m", "messages": MESSAGES, **more}).encode()
        assert plan_of(CHAT, body).obstacle == obstacle

    @pytest.mark.parametrize(
        ("more", "obstacle"),
        [
            ({}, ""),
            ({"prompt": ["Once"]}, ""),
            ({"prompt": ["Once", "Twice"]}, "form"),
            ({"prompt": [1, 2]}, "form"),
            ({"prompt": [[1, 2]]}, "form"),
            ({"suffix": "."}, "form"),
            ({"echo": True}, "form"),
            ({"logprobs": 0}, "logprobs"),
        ],
    )
    def test_a_text_completion(self, more: dict[str, Any], obstacle: str) -> None:
        body = json.dumps({"model": "m", "prompt": "Once", **more}).encode()
        assert plan_of(COMPLETIONS, body).obstacle == obstacle

    def test_others(self) -> None:
        assert plan_of(pb.OPERATION_EMBEDDINGS, b'{"model":"m"}').obstacle == "form"
        assert plan_of(CHAT, b"{").obstacle == "form"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LOST, True),
        (PeerUnreachableError("x"), True),
        (PeerTimeoutError("x"), True),
        (RefusedError("x", code="backend_unavailable", retryable=True), True),
        (RefusedError("x", code="deadline", retryable=True), False),
        (RefusedError("x", code="limit", retryable=False), False),
        (ReceiptError("x"), False),
        (RemoteProtocolError("x"), False),
        (RequestError("x"), False),
    ],
)
def test_what_counts_as_lost(error: LloomError, expected: bool) -> None:
    assert is_loss(error) is expected


class FakeExchange:
    def __init__(self, number: int = 1, cost: int | None = None) -> None:
        self.peer = PeerId.from_ed25519(bytes([number]) * 32)
        checkpoint = None if cost is None else SimpleNamespace(claims=SimpleNamespace(cost=cost))
        self.sent = SimpleNamespace(checkpoint=checkpoint)


class Answer:
    """A resumed answer with what the application got of it."""

    def __init__(self, operation: int = CHAT, max_cost: int | None = None, **more: Any) -> None:
        prompt = {"messages": MESSAGES} if operation == CHAT else {"prompt": "Once"}
        body = json.dumps({"model": "m", "stream": True, **prompt, **more}).encode()
        call = Call(bytes(16), operation, "m", body, 9000, idempotency_key=b"key", max_cost=max_cost)
        self.answer = ResumedAnswer(call, Wanted("m", features=frozenset({"chat"})))
        self.out = b""

    def cut(self, *events: bytes, error: LloomError = LOST, number: int = 1, **settings: Any) -> bytes:
        exchange = cast("Exchange", FakeExchange(number, settings.pop("cost", None)))
        part = self.answer.begin_part(exchange, settings.pop("digest", DIGEST))
        self.out += b"".join(map(part.feed, events))
        return self.answer.lose(error, exchange, settings.pop("attempts", 1), 5.0)

    def why(self, *events: bytes, error: LloomError = LOST, **settings: Any) -> str:
        with pytest.raises(LloomError) as caught:
            self.cut(*events, error=error, **settings)
        assert caught.value is error
        return str(error.details.pop("not_resumed"))

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.answer.call.body)
        return found


class TestWhatIsAsked:
    def test_a_chat(self) -> None:
        one = Answer(max_tokens=10, max_completion_tokens=9, min_tokens=1, stop="x")
        assert one.cut(chunk("a"), chunk("b")) == b""
        assert one.body() == {
            "model": "m",
            "stream": True,
            "messages": [*MESSAGES, {"role": "assistant", "content": "ab"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
            "max_tokens": 8,
            "max_completion_tokens": 7,
            "min_tokens": 0,
            "stop": "x",
        }
        call, wanted = one.answer.call, one.answer.wanted
        assert (call.deadline_ms, call.idempotency_key) == (5000, hashlib.sha256(b"key\x01").digest())
        assert wanted.digest == DIGEST
        assert wanted.features == {"chat", "resume"}
        assert wanted.excluded == {FakeExchange(1).peer}

    def test_a_text_completion_needs_no_ability(self) -> None:
        one = Answer(COMPLETIONS)
        one.cut(event({"choices": [{"index": 0, "text": " upon", "finish_reason": None}]}))
        assert one.body() == {"model": "m", "stream": True, "prompt": "Once upon"}
        assert one.answer.wanted.features == {"chat"}

    def test_before_the_first_text_the_question_itself(self) -> None:
        one = Answer()
        one.cut(chunk(None, role="assistant"))
        assert one.body() == {"model": "m", "stream": True, "messages": MESSAGES}
        assert one.answer.wanted.features == {"chat"}

    def test_once_more_everything_that_came(self) -> None:
        one = Answer(max_tokens=10)
        one.cut(chunk("a"), chunk("b"))
        one.cut(chunk("c"), number=2, digest=b"other")
        assert one.body()["messages"][-1]["content"] == "abc"
        assert one.body()["max_tokens"] == 7
        assert one.answer.wanted.excluded == {FakeExchange(2).peer}
        assert one.answer.wanted.digest == DIGEST
        assert one.answer.call.idempotency_key == part_key(b"key", 2)

    def test_what_the_backend_says_of_its_tokens_goes_before_counting_chunks(self) -> None:
        one = Answer(max_tokens=10)
        usage = {"prompt_tokens": 3, "completion_tokens": 4}
        one.cut(event({"choices": [{"index": 0, "delta": {"content": "abcd"}}], "usage": usage}))
        assert one.body()["max_tokens"] == 6

    def test_the_last_checkpoint_was_paid(self) -> None:
        one = Answer(max_cost=10)
        one.cut(chunk("a"), cost=4)
        assert one.answer.call.max_cost == 6
        assert one.why(chunk("b"), cost=6) == "max_cost"

    def test_only_the_end_is_missing(self) -> None:
        one = Answer(max_tokens=2, stop="bc")
        ending = one.cut(chunk("a"), chunk("b"))
        assert one.out == chunk("a")
        assert ending == (
            event(
                {"id": "a", "created": 1, "choices": [{"index": 0, "finish_reason": None, "delta": {"content": "b"}}]}
            )
            + event({"id": "a", "created": 1, "choices": [{"index": 0, "finish_reason": "length", "delta": {}}]})
            + b"data: [DONE]\n\n"
        )


class TestObstacles:
    def test_of_the_request(self) -> None:
        assert Answer(tools=[{}]).why(chunk("a")) == "tools"

    def test_of_the_loss(self) -> None:
        assert Answer().why(chunk("a"), error=ReceiptError("wrong")) == "not_lost"

    def test_weights(self) -> None:
        assert Answer().why(chunk("a"), digest=b"") == "weights_unknown"

    def test_too_often(self) -> None:
        assert Answer().why(chunk("a"), attempts=MAX_ATTEMPTS) == "too_often"
        one = Answer()
        for _ in range(MAX_RESUMPTIONS):
            one.cut(chunk("a"))
        assert one.why(chunk("a")) == "too_often"

    def test_nobody_to_go_on(self) -> None:
        one = Answer()
        with pytest.raises(RequestError):
            one.answer.lose(RequestError("nothing was sent yet"), None, 0, 1.0)
        first = StreamLostError("first")
        one.cut(chunk("a"), error=first)
        with pytest.raises(StreamLostError) as caught:
            one.answer.lose(LloomError("nobody"), None, 1, 1.0)
        assert caught.value is first
        assert first.details == {"not_resumed": "no_executor"}

    @pytest.mark.parametrize(
        ("seen", "obstacle"),
        [
            (chunk(None, tool_calls=[{"index": 0}]), "tools"),
            (chunk(None, reasoning_content="hm"), "reasoning"),
            (chunk(None, refusal="no"), "reasoning"),
            (event({"choices": [{"delta": {}}, {"delta": {}}]}), "several_choices"),
            (event({"choices": ["x"]}), "several_choices"),
            (event({"choices": None}), "form"),
            (event([1]), "form"),
            (event({"choices": [{"delta": {"content": [1]}}]}), "form"),
            (b"data: {no json\n\n", "form"),
        ],
    )
    def test_of_what_the_answer_holds(self, seen: bytes, obstacle: str) -> None:
        one = Answer()
        assert one.why(chunk("a"), seen, chunk("b")) == obstacle
        assert seen in one.out  # and the application gets it as it is

    def test_an_answer_too_long_to_keep(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(part_module, "MAX_TEXT_CHARACTERS", 3)
        assert Answer().why(chunk("ab"), chunk("cd"), chunk("e")) == "too_long"


KEPT = {"id": "a", "created": 1, "model": "m"}


class TestSeam:
    def second(self, text: str = "xy", held: str = "", stops: tuple[str, ...] = (), operation: int = CHAT) -> Part:
        return Part(operation, stops, Progress(text, held, 2, KEPT))

    def test_the_first_parts_fields_and_one_role(self) -> None:
        part = self.second()
        assert part.feed(chunk(None, role="assistant")) == b""
        got = json.loads(
            part.feed(event({"id": "b", "created": 9, "x": 1, "choices": [{"delta": {"content": "c"}}]}))[6:]
        )
        assert got == {**KEPT, "x": 1, "choices": [{"delta": {"content": "c"}}]}

    def test_usage_as_if_nothing_had_happened(self) -> None:
        part = self.second()
        usage = {"prompt_tokens": 12, "completion_tokens": 5, "total_tokens": 17, "details": {}}
        part.feed(chunk("", "stop"))
        part.feed(event({"choices": [], "usage": usage}))
        last = part.release().split(b"\n\n")[-2]
        assert json.loads(last[6:])["usage"] == {
            "prompt_tokens": 10,
            "completion_tokens": 7,
            "total_tokens": 17,
            "details": {},
        }
        strange = event({"choices": [], "usage": {"prompt_tokens": None}})
        assert b'"usage":{"prompt_tokens":null}' in self.second().feed(strange)

    def test_a_comment_and_an_unterminated_rest_pass(self) -> None:
        part = self.second()
        assert part.feed(b": x\n\n") == b": x\n\n"
        assert part.feed(b"data: ha") == b""
        assert part.release() == b"data: ha"

    @pytest.mark.parametrize("operation", [CHAT, COMPLETIONS])
    def test_a_stop_string_across_it(self, operation: int) -> None:
        def piece(text: str) -> bytes:
            inner = {"delta": {"content": text}} if operation == CHAT else {"text": text}
            return event({"id": "b", "choices": [{"index": 0, **inner, "finish_reason": None}]})

        part = self.second("ab<en", "<en", ("<end>", "zzzzzzzz"), operation)
        assert part.feed(piece("d")) == b""
        assert not part.is_whole
        assert part.feed(piece("> and more")) == b""
        assert part.is_whole
        assert part.feed(piece("never")) == b""
        end = part.release()
        assert end.endswith(b"data: [DONE]\n\n")
        choice = json.loads(end.split(b"\n\n")[0][6:])["choices"][0]
        assert choice["finish_reason"] == "stop"

    def test_what_was_held_and_was_none_comes(self) -> None:
        part = self.second("ab<en", "<en", ("<end>",))
        got = part.feed(chunk("chanted> <end")) + part.feed(b"data: [DONE]\n\n") + part.release()
        texts = [json.loads(e[6:])["choices"][0]["delta"]["content"] for e in got.split(b"\n\n")[:-2]]
        assert texts == ["<enchanted> ", "<end"]

    def test_one_that_the_released_end_completes(self) -> None:
        part = self.second("ab<en", "<en", ("<end>",))
        assert part.feed(chunk("d>!", "stop") + b"data: [DONE]\n\n") == b""
        end = part.release()
        assert b"<en" not in end
        assert b"!" not in end
        assert end.count(b"[DONE]") == 1
        assert end.count(b'"finish_reason":"stop"') == 1

    def test_a_delta_that_is_none(self) -> None:
        part = self.second("a<", "<", ("<x",))
        part.feed(event({"choices": [{"index": 0, "delta": None, "finish_reason": "length"}]}))
        assert b'"content":"<"' in part.release()

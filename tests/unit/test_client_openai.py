"""What an application is shown: bodies read, errors written, and the end of a stream held back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lloom_sidecar.client.openai import (
    MAX_HELD_BYTES,
    AskedFor,
    Attempt,
    TailHolder,
    error_document,
    error_event,
    error_type,
    model_object,
    read_body,
)
from lloom_sidecar.errors import LloomError, NoExecutorError, RefusedError, RemoteProtocolError, RequestError


class TestReadBody:
    @pytest.mark.parametrize(
        ("body", "asked"),
        [
            ({"model": "m"}, AskedFor("m", False, 1)),
            ({"model": "m", "stream": True, "n": 3, "x": [1]}, AskedFor("m", True, 3)),
            ({"model": "m", "stream": None, "n": None}, AskedFor("m", False, 1)),
            ({"model": "m", "n": 0}, AskedFor("m", False, 1)),
            ({"model": "m", "n": -4}, AskedFor("m", False, 1)),
            ({"model": "m", "prompt": "one", "n": 2}, AskedFor("m", False, 2)),
            ({"model": "m", "prompt": ["one"]}, AskedFor("m", False, 1)),
            ({"model": "m", "prompt": ["one", "two", "three"], "n": 2}, AskedFor("m", False, 6)),
            ({"model": "m", "prompt": [1, 2, 3]}, AskedFor("m", False, 1)),
            ({"model": "m", "prompt": [[1, 2], [3]]}, AskedFor("m", False, 2)),
            ({"model": "m", "prompt": []}, AskedFor("m", False, 1)),
        ],
    )
    def test_what_is_read(self, body: dict[str, Any], asked: AskedFor) -> None:
        assert read_body(json.dumps(body).encode()) == asked

    @pytest.mark.parametrize(
        ("body", "text"),
        [
            (b"", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b"\xff", "not valid JSON"),
            (b'{"model":"\xff"}', "not valid JSON"),
            (b'{"x":' + b"[" * 100_000, "not valid JSON"),
            (b"[]", "cannot be used"),
            (b'{"model":1}', "cannot be used"),
            (b'{"model":"m","stream":"yes"}', "cannot be used"),
            (b'{"model":"m","n":1.5}', "cannot be used"),
            (b"{}", "model parameter"),
            (b'{"model":""}', "model parameter"),
            (b'{"model":null}', "model parameter"),
        ],
    )
    def test_what_cannot_be(self, body: bytes, text: str) -> None:
        with pytest.raises(ValueError, match=text):
            read_body(body)


class TestErrors:
    def document(self, error: LloomError, *attempts: Attempt) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(error_document(error, attempts))["error"]
        return found

    def test_openais_shape_with_what_was_tried(self) -> None:
        attempts = (Attempt("p1", "open", "peer_unreachable", 12.345, "gone"), Attempt("p2", "answer", "x", 1.0))
        assert self.document(NoExecutorError("nobody"), *attempts) == {
            "message": "nobody",
            "type": "server_error",
            "param": None,
            "code": "no_executor",
            "lloom": {
                "code": "no_executor",
                "attempts": [
                    {"executor": "p1", "stage": "open", "reason": "peer_unreachable", "ms": 12.3, "message": "gone"},
                    {"executor": "p2", "stage": "answer", "reason": "x", "ms": 1.0, "message": ""},
                ],
            },
        }

    def test_a_backends_own_document_keeps_its_fields(self) -> None:
        body = b'{"error":{"message":"too long","type":"t","param":"messages","code":"context","x":1,"lloom":"?"}}'
        found = self.document(RefusedError("refused", code="backend_rejected", http_status=400, body=body))
        assert (found["message"], found["type"], found["param"], found["code"], found["x"]) == (
            "too long",
            "t",
            "messages",
            "context",
            1,
        )
        assert found["lloom"] == {"code": "backend_rejected", "attempts": []}

    @pytest.mark.parametrize(
        ("body", "message", "code"),
        [
            (b'{"error":{"message":"m","code":400}}', "m", "c"),
            (b'{"error":"plain"}', "plain", "c"),
            (b'{"message":"bare","code":"k"}', "bare", "k"),
            (b'{"error":{"code":"k"}}', "refused", "c"),
            (b'{"error":[1]}', "refused", "c"),
            (b"[1]", "refused", "c"),
            (b"not json", "refused", "c"),
            (b'{"error":"\xff"}', "refused", "c"),
            (b"[" * 30_000, "refused", "c"),
            (None, "refused", "c"),
        ],
    )
    def test_other_shapes_of_it(self, body: bytes | None, message: str, code: str) -> None:
        found = self.document(RefusedError("refused", code="c", http_status=422, body=body))
        assert (found["message"], found["code"]) == (message, code)
        assert found["type"] == "invalid_request_error"

    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, "invalid_request_error"),
            (401, "authentication_error"),
            (429, "rate_limit_error"),
            (418, "server_error"),
        ],
    )
    def test_types(self, status: int, kind: str) -> None:
        assert error_type(status) == kind

    def test_the_event(self) -> None:
        event = error_event(RequestError("no"))
        assert event.startswith(b"data: {")
        assert event.endswith(b"}\n\n")
        assert json.loads(event[6:])["error"]["code"] == "invalid_request"


def test_model_object() -> None:
    assert model_object("m", created=5, executors=2, context_length=0, features={"b", "a"}) == {
        "id": "m",
        "object": "model",
        "created": 5,
        "owned_by": "lloom",
        "lloom": {"executors": 2, "context_length": None, "features": ["a", "b"]},
    }


def event(document: Any) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def chunk(text: str = "", finish: str | None = None, index: int = 0) -> bytes:
    return event({"choices": [{"index": index, "delta": {"content": text}, "finish_reason": finish}]})


DONE = b"data: [DONE]\n\n"


class TestTailHolder:
    def test_text_passes_and_the_end_waits(self) -> None:
        tail = TailHolder()
        assert tail.feed(chunk("a")) == chunk("a")
        assert tail.feed(chunk("b") + chunk("", "stop")) == chunk("b")
        assert tail.feed(event({"choices": [], "usage": {}}) + DONE) == b""
        assert tail.release() == chunk("", "stop") + event({"choices": [], "usage": {}}) + DONE

    def test_done_alone_is_held(self) -> None:
        tail = TailHolder()
        assert tail.feed(chunk("a") + DONE) == chunk("a")
        assert tail.release() == DONE

    def test_a_finish_that_is_cut_anywhere_is_held(self) -> None:
        last = chunk("", "stop")
        for at in range(1, len(last)):
            tail = TailHolder()
            assert tail.feed(last[:at]) + tail.feed(last[at:]) == b""
            assert tail.release() == last

    def test_done_that_is_cut_anywhere_is_held(self) -> None:
        for at in range(1, len(DONE)):
            tail = TailHolder()
            assert tail.feed(DONE[:at]) + tail.feed(DONE[at:]) == b""

    @pytest.mark.parametrize(
        "done", [b"data:[DONE]\n\n", b"data: [DONE]\r\n\r\n", b"id: 1\rdata: [DONE]\r\r", b"event: x\ndata: [DONE]\n\n"]
    )
    def test_any_writing_of_done(self, done: bytes) -> None:
        assert TailHolder().feed(done) == b""

    def test_a_finish_over_several_data_lines(self) -> None:
        assert TailHolder().feed(b'data: {"choices":[{"finish_reason":\ndata: "stop"}]}\n\n') == b""

    def test_of_two_alternatives_the_last_ones_finish_is_held(self) -> None:
        tail = TailHolder(2)
        first = chunk("", "stop", index=1)
        assert tail.feed(first) == first
        assert tail.feed(chunk("x")) == chunk("x")
        assert tail.feed(chunk("", "length")) == b""
        tail = TailHolder(2)
        both = event({"choices": [{"finish_reason": "stop"}, {"finish_reason": "stop"}]})
        assert tail.feed(both) == b""

    def test_text_cannot_imitate_an_end(self) -> None:
        tail = TailHolder()
        for text in ('"finish_reason":"stop"', "[DONE]", "data: [DONE]\n\n"):
            assert tail.feed(chunk(text)) == chunk(text)
        assert tail.feed(event({"x": '\\"finish_reason\\": \\"stop\\"'})) != b""

    def test_an_unterminated_rest_comes_at_the_release(self) -> None:
        tail = TailHolder()
        assert tail.feed(chunk("a") + b"data: half") == chunk("a")
        assert tail.release() == b"data: half"

    def test_what_is_held_is_bounded(self) -> None:
        tail = TailHolder()
        tail.feed(DONE)
        piece = b"data: " + b"x" * 1_000_000 + b"\n\n"
        with pytest.raises(RemoteProtocolError) as caught:
            for _ in range(MAX_HELD_BYTES // len(piece) + 1):
                tail.feed(piece)
        assert caught.value.code == "oversize"

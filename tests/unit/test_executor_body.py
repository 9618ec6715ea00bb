"""What an executor lets through to its backend, and what it changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lloom_sidecar.errors import RequestError
from lloom_sidecar.executor.body import PATHS, BackendCall, BodyPolicy, prepare_body
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

CHAT = pb.OPERATION_CHAT
COMPLETIONS = pb.OPERATION_COMPLETIONS
EMBEDDINGS = pb.OPERATION_EMBEDDINGS
POLICY = BodyPolicy(max_tokens=100, default_max_tokens=50, max_n=4)


def prepare(
    body: bytes | dict[str, Any],
    *,
    operation: int = CHAT,
    model: str = "m",
    backend_model: str = "m",
    policy: BodyPolicy = POLICY,
) -> BackendCall:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return prepare_body(raw, operation=operation, model=model, backend_model=backend_model, policy=policy)


def refusal(body: bytes | dict[str, Any], **kwargs: Any) -> str:
    with pytest.raises(RequestError) as caught:
        prepare(body, **kwargs)
    assert caught.value.http_status == 400
    return caught.value.code


class TestParsing:
    @pytest.mark.parametrize(
        "raw",
        [
            b"",
            b"{",
            b"\xff",
            b"[]",
            b'"m"',
            b"null",
            b"[" * 100_000,
            b'{"model":"m","a":NaN}',
            b'{"model":"m","a":Infinity}',
            b'{"model":"m","a":-Infinity}',
            b'{"model":"m","a":1e999}',
            '{"model":"m"}'.encode("utf-16"),
            b'\xef\xbb\xbf{"model":"m"}',
            b'{"model":"m","a":"\xed\xa0\x80"}',
            b'{"model":"m","a":' + b"9" * 5000 + b"}",
        ],
        ids=lambda raw: repr(raw[:30]),
    )
    def test_what_is_no_json_object(self, raw: bytes) -> None:
        assert refusal(raw) == "invalid_json"

    @pytest.mark.parametrize(
        "raw",
        [
            b'{"model":"m","model":"m"}',
            b'{"model":"m","a":{"b":1,"b":2}}',
            b'{"model":"m","messages":[{"role":"user","role":"system"}]}',
            b'{"model":"m","\\u006dodel":"n"}',
        ],
    )
    def test_a_repeated_key_at_any_depth(self, raw: bytes) -> None:
        assert refusal(raw) == "repeated_key"

    @pytest.mark.parametrize("model", ["other", None, 1, ["m"]])
    def test_another_model_than_the_signed_one(self, model: object) -> None:
        assert refusal({"model": model}) == "model_mismatch"
        assert refusal({}) == "model_mismatch"

    def test_a_half_surrogate_pair_is_passed_on_as_it_was_escaped(self) -> None:
        call = prepare(b'{"model":"m","messages":[{"content":"\\ud800"}]}')
        assert json.loads(call.body)["messages"][0]["content"] == "\ud800"

    def test_a_number_beyond_64_bits_stays_exact(self) -> None:
        assert json.loads(prepare({"model": "m", "seed": 2**70}).body)["seed"] == 2**70

    @pytest.mark.parametrize("depth", [900, 950, 980, 990, 2000])
    def test_deep_nesting_is_passed_on_or_refused(self, depth: int) -> None:
        raw = b'{"model":"m","x":' + b"[" * depth + b"]" * depth + b"}"
        try:
            call = prepare(raw)
        except RequestError as exc:
            assert exc.code == "invalid_json"
        else:
            assert call.is_streamed


class TestRefused:
    @pytest.mark.parametrize(
        "field", [{"store": True}, {"background": True}, {"previous_response_id": "r"}, {"previous_response_id": ""}]
    )
    def test_nothing_is_kept(self, field: dict[str, Any]) -> None:
        assert refusal({"model": "m", **field}) == "not_allowed"

    @pytest.mark.parametrize(
        "field", [{"store": False}, {"store": None}, {"background": False}, {"previous_response_id": None}]
    )
    def test_saying_so_is_fine(self, field: dict[str, Any]) -> None:
        prepare({"model": "m", **field})

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
    @pytest.mark.parametrize("value", [101, 1e300, -1, -0.5, "9", True, [1], {}])
    def test_tokens(self, name: str, value: object) -> None:
        assert refusal({"model": "m", name: value}) == "limit"
        assert refusal({"model": "m", name: value}, operation=COMPLETIONS) == "limit"

    @pytest.mark.parametrize("name", ["n", "best_of"])
    @pytest.mark.parametrize("value", [5, -1, "2", True])
    def test_alternatives(self, name: str, value: object) -> None:
        assert refusal({"model": "m", name: value}) == "limit"

    @pytest.mark.parametrize("field", [{"max_tokens": 100}, {"max_tokens": 0}, {"n": 4}, {"n": None}, {"best_of": 1}])
    def test_up_to_the_limit(self, field: dict[str, Any]) -> None:
        prepare({"model": "m", **field})

    def test_embeddings_are_not_streamed(self) -> None:
        assert refusal({"model": "m", "stream": True}, operation=EMBEDDINGS) == "not_allowed"


REMOTE = [
    "http://10.0.0.1/x.png",
    "https://example.com/x.png",
    " HTTP://example.com",
    "file:///etc/passwd",
    "//example.com/x",
    "ftp://x",
    "ht\ntp://example.com",
    "\thttps\t://example.com",
    "\x00http://example.com",
    "\x1f\x01https://example.com",
]
"""What a URL parser takes for a remote address: it drops tabs and line ends inside, and C0 controls in front.
Source: WHATWG URL, section 4.4 "URL parsing"; Python's urlsplit does the same."""


class TestMedia:
    @pytest.mark.parametrize("url", REMOTE, ids=repr)
    def test_a_remote_url_is_refused(self, url: str) -> None:
        part = {"type": "image_url", "image_url": {"url": url}}
        assert refusal({"model": "m", "messages": [{"role": "user", "content": [part]}]}) == "remote_media"
        assert refusal({"model": "m", "messages": [{"content": [{"image_url": url}]}]}) == "remote_media"
        assert refusal({"model": "m", "input": [{"file_url": url}]}) == "remote_media"

    def test_unless_it_is_allowed(self) -> None:
        policy = BodyPolicy(allow_remote_media=True)
        prepare({"model": "m", "messages": [{"content": [{"image_url": {"url": REMOTE[0]}}]}]}, policy=policy)

    def test_inline_data_and_text_are_not_looked_at(self) -> None:
        content = [
            {"type": "text", "text": "see http://example.com"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,aHR0cDovLw=="}},
        ]
        prepare({"model": "m", "messages": [{"role": "user", "content": content}, {"content": "https://x"}]})

    def test_nesting_is_bounded(self) -> None:
        deep: Any = "x"
        for _ in range(70):
            deep = [deep]
        assert refusal({"model": "m", "messages": deep}) == "limit"


class TestChanges:
    def test_a_complete_streamed_body_is_passed_on_byte_by_byte(self) -> None:
        raw = b'{ "model":"m", "stream" : true, "stream_options":{"include_usage":true},\n "max_tokens":7, "x":[1.50] }'
        call = prepare(raw)
        assert call == BackendCall(PATHS[CHAT], raw, wants_stream=True, is_streamed=True, strips_usage=False)

    def test_a_streamed_body_gets_usage_which_is_stripped_again(self) -> None:
        call = prepare({"model": "m", "stream": True, "max_tokens": 7, "stream_options": {"x": 1}})
        assert json.loads(call.body)["stream_options"] == {"x": 1, "include_usage": True}
        assert (call.wants_stream, call.is_streamed, call.strips_usage) == (True, True, True)

    def test_an_unstreamed_body_is_streamed_from_the_backend(self) -> None:
        call = prepare({"model": "m", "max_tokens": 7, "stream": False}, operation=COMPLETIONS)
        sent = json.loads(call.body)
        assert sent == {"model": "m", "max_tokens": 7, "stream": True, "stream_options": {"include_usage": True}}
        assert (call.path, call.wants_stream, call.is_streamed, call.strips_usage) == (
            "/v1/completions",
            False,
            True,
            False,
        )

    @pytest.mark.parametrize("options", ["x", 1, [], None, {"include_usage": "yes"}])
    def test_stream_options_that_are_none_are_replaced(self, options: object) -> None:
        call = prepare({"model": "m", "stream": True, "stream_options": options})
        assert json.loads(call.body)["stream_options"] == {"include_usage": True}
        assert call.strips_usage

    def test_the_default_cap_is_set_only_when_no_field_names_one(self) -> None:
        assert json.loads(prepare({"model": "m"}).body)["max_tokens"] == 50
        assert json.loads(prepare({"model": "m", "max_tokens": None}).body)["max_tokens"] == 50
        for name in ("max_completion_tokens", "max_output_tokens"):
            assert "max_tokens" not in json.loads(prepare({"model": "m", name: 3}).body)
        low = BodyPolicy(max_tokens=10, default_max_tokens=50)
        assert json.loads(prepare({"model": "m"}, policy=low).body)["max_tokens"] == 10

    def test_the_backends_own_id_replaces_the_networks(self) -> None:
        call = prepare({"model": "m", "stream": True}, backend_model="real/m.gguf")
        assert json.loads(call.body)["model"] == "real/m.gguf"

    def test_embeddings_pass_untouched(self) -> None:
        raw = b'{"input":"x", "model":"m"}'
        call = prepare(raw, operation=EMBEDDINGS)
        assert call == BackendCall("/v1/embeddings", raw, wants_stream=False, is_streamed=False, strips_usage=False)
        assert json.loads(prepare(raw, operation=EMBEDDINGS, backend_model="r").body) == {"input": "x", "model": "r"}

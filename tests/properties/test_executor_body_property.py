"""Whatever else a body holds reaches the backend: the same bytes when nothing had to change, else the same meaning."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lloom_sidecar.errors import RequestError
from lloom_sidecar.executor.body import BodyPolicy, prepare_body
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

TOUCHED = ("model", "stream", "stream_options", "max_tokens")
RULED = {
    *TOUCHED,
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "best_of",
    "store",
    "background",
    "previous_response_id",
    "messages",
    "input",
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.dictionaries(st.text(max_size=8).filter(lambda name: name not in RULED), JSON, max_size=5)


def prepare(raw: bytes, operation: int, backend_model: str) -> Any:
    return prepare_body(raw, operation=operation, model="m", backend_model=backend_model, policy=BodyPolicy())


@settings(max_examples=80, deadline=None)
@given(FIELDS, st.booleans(), st.booleans(), st.sampled_from([None, 2, 8]))
def test_untouched_bytes_when_nothing_needs_a_change(
    fields: dict[str, Any], ascii_only: bool, spaced: bool, indent: int | None
) -> None:
    document = {**fields, "model": "m", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 5}
    separators = (" , ", " : ") if spaced else None
    text = json.dumps(document, ensure_ascii=ascii_only, separators=separators, indent=indent)
    raw = text.encode("utf-8", "surrogatepass")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return  # half a surrogate pair, not escaped: no UTF-8
    assert prepare(raw, pb.OPERATION_CHAT, "m").body == raw


@settings(max_examples=80, deadline=None)
@given(FIELDS, st.sampled_from(["m", "real"]), st.sampled_from([True, False, None]), st.sampled_from([None, 5]))
def test_the_same_meaning_otherwise(
    fields: dict[str, Any], backend_model: str, stream: bool | None, max_tokens: int | None
) -> None:
    raw = json.dumps({**fields, "model": "m", "stream": stream, "max_tokens": max_tokens}).encode()
    call = prepare(raw, pb.OPERATION_COMPLETIONS, backend_model)
    sent = json.loads(call.body)
    assert {key: value for key, value in sent.items() if key not in TOUCHED} == fields
    assert sent["model"] == backend_model
    assert sent["stream"] is True
    assert sent["stream_options"] == {"include_usage": True}
    assert sent["max_tokens"] == max_tokens or max_tokens is None


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_garbage_raises_nothing_else(raw: bytes) -> None:
    try:
        prepare(raw, pb.OPERATION_CHAT, "real")
    except RequestError as exc:
        assert exc.http_status == 400

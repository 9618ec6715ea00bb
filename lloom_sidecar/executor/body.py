"""What an executor does to a request's body before its backend sees it. Pure.

The backend is always asked to stream with usage: an unstreamed request goes on in most backends after its caller left,
a streamed one ends with its connection. Whoever asked for one document gets it merged from the chunks.
Source: PROTOCOL.md, Bodies.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from lloom_sidecar.errors import RequestError
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

MAX_TOKEN_FIELDS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_REMOTE_SCHEMES: Final = ("http:", "https:", "ftp:", "file:", "//")
_MEDIA_KEYS: Final = frozenset({"image_url", "video_url", "audio_url", "input_image", "file_url", "url"})
_DROPPED_IN_URLS: Final = dict.fromkeys(range(0x21))
MAX_JSON_DEPTH: Final = 64

PATHS: Final[dict[int, str]] = {
    pb.OPERATION_CHAT: "/v1/chat/completions",
    pb.OPERATION_COMPLETIONS: "/v1/completions",
    pb.OPERATION_EMBEDDINGS: "/v1/embeddings",
}
"""Operation -> path at the backend."""


@dataclass(frozen=True, slots=True)
class BodyPolicy:
    """What this executor allows in a body."""

    max_tokens: int = 8192
    """Most tokens that one answer may have."""
    default_max_tokens: int = 2048
    """Cap for a body that names none."""
    max_n: int = 8
    """Most alternatives (``n``, ``best_of``) of one request."""
    allow_remote_media: bool = False
    """Let bodies name media by URL, which the backend then fetches from wherever it says."""


@dataclass(frozen=True, slots=True)
class BackendCall:
    """What goes to the backend, and how its answer goes back."""

    path: str
    body: bytes
    wants_stream: bool
    """The requester wants SSE; else one document."""
    is_streamed: bool
    """The backend is asked for SSE."""
    strips_usage: bool
    """The usage chunk was added by us and is removed from a streamed answer."""
    choices: int = 1
    """Alternatives that were asked for."""
    paid_tokens: int | None = None
    """Most completion tokens, of all choices together, that the request pays for; None = no such limit."""
    is_shortened: bool = False
    """The limit on tokens that goes to the backend is lower than without ``paid_tokens``."""


def prepare_body(
    raw: bytes,
    *,
    operation: int,
    model: str,
    backend_model: str,
    policy: BodyPolicy,
    affordable_tokens: int | None = None,
) -> BackendCall:
    """Check a body against the signed request and this executor's policy, and make it the backend's.

    Bytes that need no change are passed on as they are; unknown fields always stay. ``affordable_tokens``: most
    completion tokens, of all choices together, that the request's max cost pays for; None = no such limit.

    Raises:
        RequestError: 400 with a sentence; codes invalid_json, repeated_key, model_mismatch, remote_media, not_allowed,
            limit.
    """
    document = _parse(raw)
    if document.get("model") != model:
        raise RequestError("the body's model differs from the signed request's", code="model_mismatch")
    _check_allowed(document, policy)
    changes: dict[str, Any] = {}
    if backend_model != model:
        changes["model"] = backend_model
    wants_stream = document.get("stream") is True
    if operation == pb.OPERATION_EMBEDDINGS:
        if wants_stream:
            raise RequestError("embeddings cannot be streamed", code="not_allowed")
        return BackendCall(PATHS[operation], _changed(raw, document, changes), False, False, False)
    choices = max(int(document.get("n") or 1), int(document.get("best_of") or 1))
    limits = _token_limits(document, policy, affordable_tokens, choices)
    is_shortened = affordable_tokens is not None and limits != _token_limits(document, policy, None, choices)
    changes |= limits
    if not wants_stream:
        changes["stream"] = True
    options = document.get("stream_options")
    has_usage = wants_stream and isinstance(options, dict) and options.get("include_usage") is True
    if not has_usage:
        changes["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    return BackendCall(
        PATHS[operation],
        _changed(raw, document, changes),
        wants_stream,
        True,
        wants_stream and not has_usage,
        choices,
        affordable_tokens,
        is_shortened,
    )


def _token_limits(
    document: dict[str, Any], policy: BodyPolicy, affordable_tokens: int | None, choices: int
) -> dict[str, int]:
    """The limits on the answer's tokens that the body has to get or to change."""
    limit = policy.max_tokens
    if affordable_tokens is not None:
        limit = min(limit, affordable_tokens // choices)
        if limit < 1:
            raise RequestError("the max cost does not pay for one token of each choice", code="limit", http_status=402)
    given = [name for name in MAX_TOKEN_FIELDS if document.get(name) is not None]
    if not given:
        return {"max_tokens": min(policy.default_max_tokens, limit)}
    return {name: limit for name in given if document[name] > limit}


def _changed(raw: bytes, document: dict[str, Any], changes: dict[str, Any]) -> bytes:
    if not changes:
        return raw
    document = {**document, **changes}
    try:
        return msgspec.json.encode(document)
    except UnicodeEncodeError:
        return json.dumps(document, separators=(",", ":")).encode()  # half a surrogate pair: only escaped can it travel
    except RecursionError as exc:
        raise RequestError("the body is nested too deeply", code="invalid_json") from exc


def _parse(raw: bytes) -> dict[str, Any]:
    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            # Two readers may each take another one of the two: the signed request must mean one thing.
            raise RequestError("the body repeats a JSON key", code="repeated_key")
        return fields

    try:
        document = json.loads(raw.decode(), object_pairs_hook=checked, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as exc:
        raise RequestError("the body is not JSON", code="invalid_json") from exc
    if not isinstance(document, dict):
        raise RequestError("the body is not a JSON object", code="invalid_json")
    return document


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is out of range")  # it would reach the backend as null
    return number


def _check_allowed(document: dict[str, Any], policy: BodyPolicy) -> None:
    for name in ("store", "background"):
        if document.get(name):
            raise RequestError(f"`{name}` is not served: nothing is kept after the answer", code="not_allowed")
    if document.get("previous_response_id") is not None:
        raise RequestError("`previous_response_id` is not served: nothing is kept after an answer", code="not_allowed")
    for name in MAX_TOKEN_FIELDS:
        _check_number(document, name, policy.max_tokens)
    for name in ("n", "best_of"):
        _check_number(document, name, policy.max_n)
    if not policy.allow_remote_media:
        _check_media(document.get("messages"), 0)
        _check_media(document.get("input"), 0)


def _check_number(document: dict[str, Any], name: str, limit: int) -> None:
    value = document.get(name)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise RequestError(f"`{name}` is not a number", code="limit")
    if value > limit:
        raise RequestError(f"`{name}` is {value}; this executor allows at most {limit}", code="limit")
    if value < 0:
        # Some backends take -1 for "no limit".
        raise RequestError(f"`{name}` is negative; this executor allows 0 to {limit}", code="limit")


def _check_media(value: Any, depth: int) -> None:
    """Refuse a URL that a backend would fetch; ``data:`` URLs stay. Text is never looked at."""
    if depth > MAX_JSON_DEPTH:
        raise RequestError("the body is nested too deeply", code="limit")
    if isinstance(value, list):
        for item in value:
            _check_media(item, depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in _MEDIA_KEYS and isinstance(item, str) and _is_remote(item):
                raise RequestError(
                    "media by remote URL is not served here; send it inline as a data: URL", code="remote_media"
                )
            _check_media(item, depth + 1)


def _is_remote(url: str) -> bool:
    # URL parsers drop tabs and line ends anywhere and control characters in front, so "ht\ntp:" is http to a backend.
    # Source: WHATWG URL, section 4.4; Python's urlsplit.
    if url[:5].lower() == "data:":
        return False
    return url.translate(_DROPPED_IN_URLS).lower().startswith(_REMOTE_SCHEMES)

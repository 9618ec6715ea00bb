"""The OpenAI API as data: error documents, model lists, and which bytes of a stream must wait for the receipt. Pure.

Source: OpenAI's API reference (errors, models, streaming); DESIGN notes in docs of this project.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from lloom_sidecar.errors import LloomError, RefusedError, RemoteProtocolError
from lloom_sidecar.http.sse import SseCutter, data_of
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

OPERATION_OF_PATH: Final = {
    "/v1/chat/completions": pb.OPERATION_CHAT,
    "/v1/completions": pb.OPERATION_COMPLETIONS,
    "/v1/embeddings": pb.OPERATION_EMBEDDINGS,
}
STREAMED_OPERATIONS: Final = frozenset({pb.OPERATION_CHAT, pb.OPERATION_COMPLETIONS})
DONE: Final = b"data: [DONE]\n\n"
MAX_EVENT_BYTES: Final = 4 * 1024 * 1024
MAX_HELD_BYTES: Final = 16 * 1024 * 1024
"""Most that an executor may send behind what looks like the end of its answer."""

_FINISH: Final = re.compile(rb'"finish_reason"\s*:\s*"')
"""A finish_reason that is set. Inside a JSON string its quotes would be escaped, so text cannot imitate it."""

_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


@dataclass(frozen=True, slots=True)
class Attempt:
    """One executor that was tried, for ``lloom.attempts``."""

    executor: str
    stage: str
    """open, first_byte, answer."""
    reason: str
    """An error code."""
    ms: float
    message: str = ""


@dataclass(frozen=True, slots=True)
class AskedFor:
    """What the client node reads of an application's body; the rest passes through unseen."""

    model: str
    stream: bool
    n: int
    """Alternatives in its answer: of each of a text completion's prompts as many as the body's ``n``."""


def read_body(body: bytes) -> AskedFor:
    """Find model, stream and n. Raises ValueError with a sentence for the application."""
    try:
        document = msgspec.json.decode(body, type=_Body)
    except msgspec.ValidationError as exc:
        raise ValueError(f"the body cannot be used: {exc}") from exc
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as exc:
        raise ValueError("the body is not valid JSON") from exc
    if not document.model:
        raise ValueError("you must provide a model parameter")
    prompt = document.prompt
    # A list of numbers is one prompt, as tokens.
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    return AskedFor(document.model, document.stream is True, max(1, document.n or 1) * prompts)


class _Body(msgspec.Struct):
    model: str | None = None
    stream: bool | None = None
    n: int | None = None
    prompt: Any = None


def error_type(status: int) -> str:
    """OpenAI's ``type`` for a status."""
    return _TYPES.get(status, "server_error")


def error_document(error: LloomError, attempts: Sequence[Attempt] = ()) -> bytes:
    """The JSON body of an error answer. A backend's own error document keeps its fields; ``lloom`` is added."""
    shown: dict[str, Any] = {}
    if isinstance(error, RefusedError) and error.body:
        shown = _backend_error(error.body)
    shown.setdefault("message", error.message)
    shown.setdefault("type", error_type(error.http_status))
    shown.setdefault("param", None)
    if not isinstance(shown.get("code"), str):
        # llama.cpp gives an integer; OpenAI's clients expect text.
        shown["code"] = error.code
    not_resumed = error.details.get("not_resumed")
    shown["lloom"] = {
        "code": error.code,
        **({} if not_resumed is None else {"not_resumed": not_resumed}),
        "attempts": [
            {"executor": a.executor, "stage": a.stage, "reason": a.reason, "ms": round(a.ms, 1), "message": a.message}
            for a in attempts
        ],
    }
    return msgspec.json.encode({"error": shown})


def is_context_error(error: LloomError) -> bool:
    """The backend says that the prompt is too long for its context: one with a longer context may serve it.

    Source: OpenAI (code context_length_exceeded), llama.cpp (type exceed_context_size_error), vLLM (message "This
    model's maximum context length is ...").
    """
    if not isinstance(error, RefusedError) or error.http_status != 400 or not error.body:
        return False
    shown = _backend_error(error.body)
    return (
        shown.get("code") == "context_length_exceeded"
        or shown.get("type") == "exceed_context_size_error"
        or "maximum context length" in str(shown.get("message"))
    )


def _backend_error(body: bytes) -> dict[str, Any]:
    try:
        document = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(document, dict):
        return {}
    inner = document.get("error", document)
    if isinstance(inner, str):
        return {"message": inner}
    return dict(inner) if isinstance(inner, dict) and isinstance(inner.get("message"), str) else {}


def error_event(error: LloomError, attempts: Sequence[Attempt] = ()) -> bytes:
    """The SSE event that tells a client of a streamed answer that it is cut. The connection is aborted behind it."""
    return b"data: " + error_document(error, attempts) + b"\n\n"


def model_object(
    model: str, *, created: int, executors: int, context_length: int, features: Iterable[str]
) -> dict[str, Any]:
    """One entry of ``/v1/models``."""
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "lloom",
        "lloom": {"executors": executors, "context_length": context_length or None, "features": sorted(features)},
    }


class TailHolder:
    """Holds back what would make a stream look finished, until the receipt was verified.

    Held from the chunk on that finishes the last of the ``n`` choices, or from ``[DONE]``: a client that got those
    would take a cut answer for a whole one. Everything before goes out as it came.
    """

    __slots__ = ("_cutter", "_finished", "_held", "_held_bytes", "_n")
    is_whole = False
    """The answer ends with its receipt, never before."""

    def __init__(self, n: int = 1) -> None:
        self._n = n
        self._finished = 0
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._cutter = SseCutter(MAX_EVENT_BYTES)

    def feed(self, data: bytes) -> bytes:
        """Bytes of the answer; returns those that may go to the application now.

        Raises:
            SseError: one event is over 4 MiB.
            RemoteProtocolError: what had to be held is over 16 MiB.
        """
        events = self._cutter.feed(data)
        if self._held:
            self._hold(events)
            return b""
        ready = events[0] if len(events) == 1 else b"".join(events)
        if b'"finish_reason"' not in ready and b"[DONE]" not in ready:
            return ready
        for index, event in enumerate(events):
            is_done = False
            if b'"finish_reason"' in event:
                self._finished += len(_FINISH.findall(data_of(event)))
            if b"[DONE]" in event:
                is_done = data_of(event).startswith(b"[DONE]")
            if is_done or self._finished >= self._n:
                self._hold(events[index:])
                return b"".join(events[:index])
        return ready

    def _hold(self, events: list[bytes]) -> None:
        self._held += events
        self._held_bytes += sum(map(len, events))
        if self._held_bytes > MAX_HELD_BYTES:
            raise RemoteProtocolError("an answer that goes on behind its end", code="oversize")

    def release(self) -> bytes:
        """The receipt holds: everything that was held, and an unterminated rest."""
        data = b"".join(self._held) + bytes(self._cutter.rest())
        self._held = []
        return data

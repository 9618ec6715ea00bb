"""The backend's answer on its way to the requester: which bytes go on, and what the receipt will say of them. Pure.

Source: PROTOCOL.md, Bodies and Receipt; OpenAI's streamed objects.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from typing import Any, Final

import msgspec

from lloom_sidecar.errors import BackendError, BackendRejectedError, BackendUnavailableError
from lloom_sidecar.http.sse import SseCutter, data_of
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .aggregate import ChunkMerger
from .body import BackendCall

MAX_EVENT_BYTES: Final = 4 * 1024 * 1024
"""Largest SSE event of a backend."""
MAX_DOCUMENT_BYTES: Final = 64 * 1024 * 1024
"""Largest unstreamed answer."""
_SCANNER: Final = msgspec.json.Decoder(msgspec.Raw)
_ENDS_FOR_LENGTH: Final = re.compile(rb'"finish_reason"\s*:\s*"length"')
_NO_USAGE: Final = re.compile(rb'"usage"\s*:\s*null')


class EventRelay:
    """A streamed backend answer: feed it what was read, it gives the events to pass on, in whole events."""

    def __init__(self, call: BackendCall, meter: AnswerMeter, *, is_chat: bool) -> None:
        self.is_done = False
        """``[DONE]`` came."""
        self.is_over_budget = False
        """More has come than the request pays for: the backend does not keep to the limit that it was given."""
        self._call = call
        self._first = b""
        """The first chunk's JSON: what one of our own is modelled on."""
        # Not every event is a token: a role comes first, a finish_reason last, for each choice.
        self._max_chunks = None if call.paid_tokens is None else call.paid_tokens + 2 * call.choices + 2
        self._meter = meter
        self._cutter = SseCutter(MAX_EVENT_BYTES)
        self._nothing: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        self._merger = ChunkMerger(is_chat=is_chat)
        self._merged_bytes = 0
        self._measured_at_bytes = MAX_DOCUMENT_BYTES
        meter.merger = self._merger

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the backend; returns what goes to the requester now, usage of our own asking left out.

        For a requester who wants one document nothing goes before ``document``, but the return value is not empty when
        the answer has begun.
        Raises BackendRejectedError for an error event, BackendUnavailableError for a chunk that cannot be read.
        """
        out: list[bytes] = []
        for event in self._cutter.feed(data):
            payload = data_of(event)
            if not payload:
                if event[:1] == b":":
                    continue  # a comment that keeps a connection alive: PING does that here
                out.append(event)
                continue
            if payload == b"[DONE]":
                self.is_done = True
                out.append(event)
                break
            if b'"error"' in payload and _is_error(payload):
                raise BackendRejectedError("the backend failed in the middle of its answer", status=502, body=payload)
            if not self._first:
                self._first = payload
            if self._call.is_shortened and _ENDS_FOR_LENGTH.search(payload) is not None:
                self._meter.is_stopped = True
            if not self._call.wants_stream:
                self._merge(payload)
            elif not _is_json_object(payload):
                raise BackendUnavailableError("the backend sent a chunk that cannot be read")
            elif b'"usage"' in payload and _NO_USAGE.search(payload) is None:
                is_usage_only = self._meter.note_usage(payload)
                if is_usage_only and self._call.strips_usage:
                    continue
            elif b'"finish_reason":"' in payload or b'"finish_reason": "' in payload:
                self._merger.has_finished = True
            self._meter.chunks += 1
            out.append(event)
            if self._max_chunks is not None and self._meter.chunks > self._max_chunks and not self._merger.has_finished:
                self.is_over_budget = True
                break
        return out[0] if len(out) == 1 else b"".join(out)

    def check_complete(self) -> None:
        """The backend's body has ended. Raises BackendUnavailableError when its answer has not."""
        if not self.is_done and (self._cutter.rest() or not self._merger.has_finished):
            raise BackendUnavailableError("the backend ended its answer in the middle")

    def stop(self) -> bytes:
        """End the answer here, every choice of it, for its length: the events that say so, ``[DONE]`` included."""
        self.is_done = True
        chunk: dict[str, Any] = {}
        with suppress(ValueError, RecursionError):
            first = msgspec.json.decode(self._first)
            if isinstance(first, dict):
                chunk = {key: first[key] for key in ("id", "object", "created", "model") if key in first}
        choices = [{"index": index, **self._nothing, "finish_reason": "length"} for index in range(self._call.choices)]
        payload = msgspec.json.encode({**chunk, "choices": choices})
        if not self._call.wants_stream:
            self._merge(payload)
        return b"data: " + payload + b"\n\ndata: [DONE]\n\n"

    def document(self) -> bytes:
        """The answer as one document. Raises BackendError when it is larger than 64 MiB."""
        document = self._merger.document()
        if len(document) > MAX_DOCUMENT_BYTES:
            raise BackendError("the backend's answer is larger than 64 MiB", code="answer_too_large")
        return document

    def _merge(self, payload: bytes) -> None:
        self._merged_bytes += len(payload)
        if self._merged_bytes > self._measured_at_bytes:
            # Much of what comes is not kept, so what is gets measured: when it could be over the bound at the earliest,
            # but not for every chunk.
            room = MAX_DOCUMENT_BYTES - len(self.document())
            self._measured_at_bytes = self._merged_bytes + max(room, MAX_DOCUMENT_BYTES // 16)
        try:
            self._merger.feed(payload)
        except (ValueError, msgspec.DecodeError) as exc:
            raise BackendUnavailableError("the backend sent a chunk that cannot be read") from exc


class AnswerMeter:
    """What the receipt states of an answer: its digest, size and usage."""

    def __init__(self, salt: bytes) -> None:
        self.digest = hashlib.sha256(salt)
        self.size = 0
        self.chunks = 0
        self.is_stopped = False
        """It ended because the request pays for no more."""
        self.is_query = False
        """Answered by the executor itself: no tokens, nothing to pay."""
        self.merger: ChunkMerger | None = None
        """Of a streamed answer."""
        self._usage: dict[str, Any] | None = None

    def add(self, data: bytes) -> None:
        """Bytes that go to the requester."""
        self.digest.update(data)
        self.size += len(data)

    def note_usage(self, payload: bytes) -> bool:
        """Remember the usage in a chunk or document. True when the chunk holds nothing else."""
        try:
            document = msgspec.json.decode(payload)
        except (ValueError, RecursionError):
            return False
        if not isinstance(document, dict) or not isinstance(document.get("usage"), dict):
            return False
        self._usage = document["usage"]
        choices = document.get("choices")
        has_finished = isinstance(choices, list) and any(
            isinstance(c, dict) and c.get("finish_reason") is not None for c in choices
        )
        if has_finished and self.merger is not None:
            self.merger.has_finished = True
        return not choices

    def usage(self) -> tuple[pb.Usage, pb.UsageSource]:
        """Token counts and who counted."""
        if self.is_query:
            return pb.Usage(), pb.USAGE_SOURCE_UNKNOWN
        merger = self.merger
        found = self._usage or (merger.usage if merger is not None else None)
        if found is not None:
            return (
                pb.Usage(
                    prompt_tokens=_count_of(found, "prompt_tokens"),
                    completion_tokens=_count_of(found, "completion_tokens"),
                ),
                pb.USAGE_SOURCE_BACKEND,
            )
        chunks = (merger.chunks if merger is not None else 0) or self.chunks
        return pb.Usage(completion_tokens=chunks), pb.USAGE_SOURCE_CHUNKS if chunks else pb.USAGE_SOURCE_UNKNOWN


def _is_json_object(payload: bytes) -> bool:
    """Whether a chunk is one whole JSON object; it is scanned, nothing is built (0.3 us for a usual chunk)."""
    try:
        _SCANNER.decode(payload)
    except (ValueError, RecursionError):
        return False
    return payload.lstrip()[:1] == b"{"


def _count_of(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and 0 <= value < 2**48 else 0


def _is_error(payload: bytes) -> bool:
    """Whether an event is an error document: ``{"error": ...}``, or vLLM's older ``{"object": "error", ...}``."""
    try:
        document = msgspec.json.decode(payload)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and (bool(document.get("error")) or document.get("object") == "error")

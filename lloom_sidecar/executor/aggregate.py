"""Merging the chunks of a streamed answer into the one document that an unstreamed request expects. Pure.

Known text fields are concatenated, tool calls are merged by their index, unknown fields are kept with their last value.
Source: OpenAI's chat completion and completion objects, chunked and whole.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

_CONCATENATED: Final = frozenset({"content", "reasoning_content", "reasoning", "refusal", "arguments", "text"})
_LISTED: Final = frozenset({"tokens", "token_logprobs", "top_logprobs", "text_offset", "content", "refusal"})
"""Inside ``logprobs``: lists that go on from chunk to chunk."""


class ChunkMerger:
    """Feed it each chunk's JSON; ``document`` is the whole answer."""

    def __init__(self, *, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self.has_finished = False
        """True when a chunk carried a finish_reason."""
        self.usage: dict[str, Any] | None = None
        self.chunks = 0
        """Chunks that carried text or a tool call."""

    def feed(self, data: bytes) -> None:
        """One event's data. Raises ValueError when it is not a JSON object."""
        try:
            self._merge(msgspec.json.decode(data))
        except RecursionError as exc:
            raise ValueError("a chunk that is nested too deeply") from exc

    def _merge(self, chunk: Any) -> None:
        if not isinstance(chunk, dict):
            raise ValueError("a chunk that is no JSON object")
        choices = chunk.pop("choices", None)
        if not isinstance(choices, list | None):
            raise ValueError("a chunk whose choices are no list")
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]
        for key, value in chunk.items():
            if value is not None or key not in self._top:
                self._top[key] = value
        for choice in choices or ():
            self._merge_choice(choice)

    def document(self) -> bytes:
        """The answer as JSON."""
        top = dict(self._top)
        if self._is_chat:
            top["object"] = "chat.completion"
        elif "object" in top:
            top["object"] = "text_completion"
        top["choices"] = [self._finished(self._choices[i]) for i in sorted(self._choices)]
        if self.usage is not None:
            top["usage"] = self.usage
        return msgspec.json.encode(top)

    def _finished(self, choice: dict[str, Any]) -> dict[str, Any]:
        done = dict(choice)
        if self._is_chat:
            message = dict(done.pop("delta", {}))
            message.setdefault("role", "assistant")
            message.setdefault("content", None)
            calls = message.get("tool_calls")
            if isinstance(calls, dict):
                message["tool_calls"] = [{k: v for k, v in calls[i].items() if k != "index"} for i in sorted(calls)]
            done["message"] = message
        else:
            done.setdefault("text", "")
        done.setdefault("finish_reason", None)
        done.setdefault("logprobs", None)
        return done

    def _merge_choice(self, choice: Any) -> None:
        if not isinstance(choice, dict):
            raise ValueError("a choice that is no JSON object")
        index = choice.get("index", 0)
        if not isinstance(index, int) or not 0 <= index < 1024:
            raise ValueError("a choice whose index is out of range")
        target = self._choices.setdefault(index, {"index": index})
        for key, value in choice.items():
            if key == "delta":
                if value is None:
                    continue
                if not isinstance(value, dict):
                    raise ValueError("a delta that is no JSON object")
                if any(value.get(k) for k in ("content", "reasoning_content", "reasoning", "tool_calls")):
                    self.chunks += 1
                _merge_delta(target.setdefault("delta", {}), value)
            elif key == "text" and value is not None:
                if not isinstance(value, str):
                    raise ValueError("a text that is none")
                self.chunks += bool(value)
                _append(target, key, value)
            elif key == "logprobs" and isinstance(value, dict):
                _merge_logprobs(target, value)
            elif value is not None or key not in target:
                target[key] = value
        if choice.get("finish_reason") is not None:
            self.has_finished = True


def _merge_delta(target: dict[str, Any], delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        if key == "tool_calls" and value is not None:
            if not isinstance(value, list):
                raise ValueError("tool calls that are no list")
            calls: dict[int, dict[str, Any]] = _dict_in(target, key)
            for position, call in enumerate(value):
                if not isinstance(call, dict):
                    raise ValueError("a tool call that is no JSON object")
                index = call.get("index")
                if not isinstance(index, int | None):
                    raise ValueError("a tool call whose index is no number")
                _merge_call(calls.setdefault(position if index is None else index, {}), call)
        elif key == "function_call" and isinstance(value, dict):
            _merge_call(_dict_in(target, key), value)
        elif key in _CONCATENATED and isinstance(value, str):
            _append(target, key, value)
        elif value is not None or key not in target:
            target[key] = value


def _merge_call(target: dict[str, Any], call: dict[str, Any]) -> None:
    for key, value in call.items():
        if isinstance(value, dict):
            _merge_call(_dict_in(target, key), value)
        elif key == "arguments" and isinstance(value, str):
            _append(target, key, value)
        elif value is not None or key not in target:
            target[key] = value


def _append(target: dict[str, Any], key: str, text: str) -> None:
    """Add to a text; many servers begin with null."""
    before = target.get(key)
    target[key] = before + text if isinstance(before, str) else text


def _dict_in(target: dict[str, Any], key: str) -> dict[Any, Any]:
    found = target.get(key)
    if not isinstance(found, dict):
        found = target[key] = {}
    return found


def _merge_logprobs(target: dict[str, Any], value: dict[str, Any]) -> None:
    merged = _dict_in(target, "logprobs")
    for key, item in value.items():
        if key in _LISTED and isinstance(item, list):
            before = merged.get(key)
            if isinstance(before, list):
                before.extend(item)
            else:
                merged[key] = item
        elif item is not None or key not in merged:
            merged[key] = item

"""One executor's part of a streamed answer that may go on elsewhere, on its way to the application. Pure.

The application sees one answer: the id and the time of the first part, no second role, usage as if nothing had
happened, and a text that ends where it would have ended. A stop string may lie across the seam between two parts, where
no backend can see it: so what may be the beginning of one is held back until it is not, and the first text behind the
seam is searched together with the last in front of it.

Source: OpenAI's chunk objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from lloom_sidecar.http.sse import data_of, last_boundary, split_events
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .openai import DONE, TailHolder

MAX_TEXT_CHARACTERS: Final = 4 * 1024 * 1024
"""Longest text that is kept to go on from; a longer answer cannot be resumed."""
_OTHER_OUTPUT: Final = ("tool_calls", "function_call", "reasoning_content", "reasoning", "refusal", "audio")
"""Of a delta: what is not the answer's text, so that the text alone is not all that was said."""
_KEPT: Final = ("id", "object", "created", "model")
"""Of the first chunk, for all that follow."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the answer is: what the parts that are over have given."""

    text: str = field(default="", repr=False)
    """All of it, what is held back included."""
    held: str = field(default="", repr=False)
    """The end of ``text`` that the application does not have: it may be the beginning of a stop string."""
    tokens: int = 0
    """Completion tokens: what a backend said, else the chunks with text, of which each is at least one token."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the first chunk that every later one repeats; empty before it."""
    obstacle: str = ""
    """What the answer has had that cannot go on."""


class Part:
    """One executor's part of an answer, as it goes to the application. The same calls as ``TailHolder``."""

    def __init__(self, operation: int, stops: tuple[str, ...], before: Progress) -> None:
        self.is_whole = False
        """A stop string was found across the seam: nothing more is needed; ``release`` gives the end."""
        self._is_chat = operation == pb.OPERATION_CHAT
        self._stops = stops
        self._before = before
        self._tail = TailHolder()
        self._pieces: list[str] = []
        self._characters = len(before.text)
        self._held = before.held
        self._chunks = 0
        self._said = 0
        """Completion tokens of this part, as the backend counted them."""
        self._kept = dict(before.kept)
        self._obstacle = before.obstacle
        longest = max(map(len, stops), default=1) - 1
        self._seam = before.text[-longest:] if longest else ""
        """The last characters in front of the seam, and what came behind it until no stop string can reach back."""
        self._seam_at = len(self._seam)

    @property
    def progress(self) -> Progress:
        """How far the answer is with this part, should it be cut now."""
        return Progress(
            text=self._before.text + "".join(self._pieces),
            held=self._held,
            tokens=self._before.tokens + max(self._chunks, self._said),
            kept=self._kept,
            obstacle=self._obstacle,
        )

    def feed(self, data: bytes) -> bytes:
        """Bytes of the answer; returns those that may go to the application now. Raises as ``TailHolder.feed``."""
        return self._pass(self._tail.feed(data))

    def release(self) -> bytes:
        """The receipt holds, or nothing more is needed: the end of the answer."""
        out = b""
        if not self.is_whole:
            data = self._tail.release()
            end = last_boundary(data)
            out = self._pass(data[:end])
            if not self.is_whole:
                return out + data[end:]
        return out + self.ending("stop")

    def ending(self, finish_reason: str) -> bytes:
        """The end of an answer that no backend ended: usage is left out, since nobody counted the prompt."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        choice["delta" if self._is_chat else "text"] = {} if self._is_chat else ""
        text = self._chunk_of(self._held) if self._held else b""
        return text + _event({**self._kept, "choices": [choice]}) + DONE

    def _pass(self, block: bytes) -> bytes:
        """Whole events of the backend -> those of the application."""
        out: list[bytes] = []
        for event in split_events(block):
            if self.is_whole:
                break
            out.append(self._event(event))
        return b"".join(out)

    def _event(self, event: bytes) -> bytes:
        data = data_of(event)
        if not data:
            return event
        if data == b"[DONE]":
            held, self._held = self._held, ""
            return (self._chunk_of(held) if held else b"") + event
        try:
            chunk = msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            chunk = None
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if chunk is None or not isinstance(choices, list):
            self._obstacle = self._obstacle or "form"
            return event
        changed = self._keep(chunk)
        if isinstance(chunk.get("usage"), dict):
            changed = self._sum(chunk) or changed
        if not choices:
            return _event(chunk) if changed else event
        if len(choices) > 1 or not isinstance(choices[0], dict):
            self._obstacle = self._obstacle or "several_choices"
            return event
        return self._choice(chunk, choices[0], event, changed)

    def _choice(self, chunk: dict[str, Any], choice: dict[str, Any], event: bytes, changed: bool) -> bytes:
        """The event of a chunk with one choice, as it came when nothing of it had to change."""
        holder = choice
        name = "text"
        if self._is_chat:
            if not isinstance(choice.get("delta"), dict):
                choice["delta"] = {}
            holder, name = choice["delta"], "content"
            if any(holder.get(other) for other in _OTHER_OUTPUT):
                self._obstacle = self._obstacle or ("tools" if holder.get("tool_calls") else "reasoning")
            if self._before.kept and "role" in holder:
                del holder["role"]
                changed = True
        text = holder.get(name) or ""
        if not isinstance(text, str):
            self._obstacle = self._obstacle or "form"
            return event
        is_end = choice.get("finish_reason") is not None
        shown = self._show(text, is_end=is_end)
        if self.is_whole:
            choice["finish_reason"] = None
            is_end = False
        if shown != text or self.is_whole:
            holder[name] = shown
            changed = True
        if not changed:
            return event
        if not shown and not is_end and not {*holder} - {name, "finish_reason", "index", "logprobs", "refusal"}:
            return b""  # nothing is left of it
        return _event(chunk)

    def _keep(self, chunk: dict[str, Any]) -> bool:
        """Give a later part's chunk the fields of the first. True when that changed it."""
        if not self._kept:
            self._kept = {name: chunk[name] for name in _KEPT if name in chunk}
        if not self._before.kept:
            return False
        chunk |= self._kept
        return True

    def _sum(self, chunk: dict[str, Any]) -> bool:
        """Count a backend's usage in. True when the chunk had to be changed: the parts before are in it then.

        A later part's prompt holds what the parts before have written, so both counts together are as they would have
        been without the cut. What each executor charges is in its own receipt.
        """
        usage = chunk["usage"]
        completion, prompt = usage.get("completion_tokens"), usage.get("prompt_tokens")
        if not isinstance(completion, int) or not isinstance(prompt, int):
            return False
        self._said = max(self._said, completion)
        if not self._before.kept:
            return False
        completion += self._before.tokens
        prompt = max(0, prompt - self._before.tokens)
        total = prompt + completion
        chunk["usage"] = {
            **usage,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": total,
        }
        return True

    def _show(self, text: str, *, is_end: bool) -> str:
        """What of the answer may be shown when ``text`` has come; the rest is held."""
        if text:
            self._chunks += 1
            self._characters += len(text)
            if self._characters > MAX_TEXT_CHARACTERS:
                self._obstacle = self._obstacle or "too_long"
                self._pieces.clear()
            else:
                self._pieces.append(text)
        all_held = self._held + text
        found_at = self._across_seam(text)
        if found_at is not None:
            self.is_whole = True
            shown, self._held = all_held[: len(all_held) - found_at], ""
            return shown
        hold = 0 if is_end else self._beginning_of_stop(all_held)
        self._held = all_held[len(all_held) - hold :]
        return all_held[: len(all_held) - hold]

    def _across_seam(self, text: str) -> int | None:
        """How many characters before the end of what has come a stop string begins that lies across the seam."""
        if not self._seam:
            return None
        window = self._seam + text
        ends: list[tuple[int, int]] = []
        for stop in self._stops:
            start = window.find(stop, max(0, self._seam_at - len(stop) + 1))
            if -1 < start < self._seam_at:
                ends.append((start + len(stop), start))
        if ends:
            return len(window) - min(ends)[1]
        reach = max(map(len, self._stops)) - 1
        self._seam = window if len(window) - self._seam_at < reach else ""
        return None

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins, but is not complete."""
        found = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), found, -1):
                if text.endswith(stop[:length]):
                    found = length
                    break
        return found

    def _chunk_of(self, text: str) -> bytes:
        choice: dict[str, Any] = {"index": 0, "finish_reason": None}
        choice |= {"delta": {"content": text}} if self._is_chat else {"text": text}
        return _event({**self._kept, "choices": [choice]})


def _event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(chunk) + b"\n\n"

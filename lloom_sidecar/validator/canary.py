"""Questions that look like anybody's and have one answer: greedy, with a fixed seed. Pure: draws from a given rng.

An executor that tells canaries from other requests answers the canaries well. So they are asked by the way of every
request, of a plain kind, at random times; what cannot be hidden is temperature 0, which applications use too.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

import msgspec

_ASKS: Final = (
    "Explain in two sentences what {} is.",
    "What is {}? Keep it short.",
    "Give me three facts about {}.",
    "Write one sentence about {} for a child.",
    "How would you describe {} to a colleague?",
    "Summarise the most important thing to know about {}.",
    "Name two advantages and two drawbacks of {}.",
    "What should I read first to learn about {}?",
)
_SUBJECTS: Final = (
    "photosynthesis", "compound interest", "the water cycle", "a binary search", "the French Revolution", "sourdough",
    "a heat pump", "plate tectonics", "unit testing", "the human heart", "supply and demand", "a suspension bridge",
    "vaccination", "the night sky in winter", "version control", "jazz", "a lighthouse", "inflation", "the Silk Road",
    "a solar eclipse", "yeast", "public key cryptography", "glaciers", "the printing press", "bicycle gears",
    "honey bees", "a tidal power plant", "chess openings", "the immune system", "rice cultivation", "radio waves",
    "urban planning",
)  # fmt: skip
_SYSTEMS: Final = (
    "",
    "",
    "You are a helpful assistant.",
    "Answer briefly and precisely.",
    "You are a patient teacher.",
)
MIN_TOKENS: Final = 24
MAX_TOKENS: Final = 64
"""Short: what differs between honest machines grows with every token."""


@dataclass(frozen=True, slots=True)
class Canary:
    """One question, the same bytes for everybody who is asked."""

    model: str
    body: bytes = field(repr=False)
    is_streamed: bool

    @property
    def digest(self) -> bytes:
        """SHA-256 of the body."""
        return hashlib.sha256(self.body).digest()


def make_canary(model: str, rng: Random) -> Canary:
    """A chat request for ``model``, as many applications send it."""
    messages = [{"role": "user", "content": rng.choice(_ASKS).format(rng.choice(_SUBJECTS))}]
    system = rng.choice(_SYSTEMS)
    if system:
        messages.insert(0, {"role": "system", "content": system})
    is_streamed = rng.random() < 0.5
    document: dict[str, Any] = {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "seed": rng.randrange(1, 10_000),
        "max_tokens": rng.randrange(MIN_TOKENS, MAX_TOKENS + 1),
    }
    if is_streamed:
        document["stream"] = True
    return Canary(model, msgspec.json.encode(document), is_streamed)


def text_of(answer: bytes, *, is_streamed: bool) -> str | None:
    """The text of a chat answer, server-sent events or a document; None when it cannot be read as one."""
    try:
        if not is_streamed:
            return _text_in(msgspec.json.decode(answer), "message")
        text = ""
        for line in answer.splitlines():
            if line.startswith(b"data:") and line[5:].strip() not in (b"", b"[DONE]"):
                text += _text_in(msgspec.json.decode(line[5:]), "delta")
        return text
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _text_in(document: Any, part: str) -> str:
    if not isinstance(document, dict):
        raise ValueError("no object")
    text = ""
    for choice in document.get("choices") or []:
        content = choice.get(part, {}) if isinstance(choice, dict) else None
        if not isinstance(content, dict):
            raise ValueError("no choice")
        for name in ("reasoning_content", "content"):
            piece = content.get(name)
            text += piece if isinstance(piece, str) else ""
    return text

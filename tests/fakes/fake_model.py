"""A language model that always says the same: a server of it as bytes, with everything that resuming relies on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where ``text`` ends because of a stop string: it is the first one to be complete. None when there is none."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


def generate(tokens: Sequence[str], before: str, stops: Sequence[str], limit: int | None) -> Iterator[tuple[str, str]]:
    """(text, finish reason or "") of each chunk of the answer that follows ``before``.

    As servers do it: what may be the beginning of a stop string is held back, and a stop string in front of which a
    request begins is not seen.
    """
    whole = "".join(tokens)
    assert whole.startswith(before), (whole, before)
    left = len(before)
    sent = text = ""
    count = 0
    for token in tokens:
        if left >= len(token):
            left -= len(token)
            continue
        token, left = token[left:], 0
        if count == limit:
            yield text[len(sent) :], "length"
            return
        count += 1
        text += token
        end = first_stop(text, stops)
        if end is not None:
            yield text[len(sent) : end], "stop"
            return
        held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        shown = text[: len(text) - held]
        if len(shown) > len(sent):
            yield shown[len(sent) :], ""
            sent = shown
    yield text[len(sent) :], "length" if count == limit else "stop"


def serve(tokens: Sequence[str], body: bytes, *, number: int = 0, show_until: int | None = None) -> list[bytes]:
    """The events of a streamed answer, chat or text completion by the form of ``body``.

    ``show_until``: a server that holds nothing back, and is cut in front of the token that brings the whole text to so
    many characters.
    """
    document: dict[str, Any] = json.loads(body)
    is_chat = "messages" in document
    before = ""
    if is_chat and document["messages"][-1]["role"] == "assistant":
        assert (document["continue_final_message"], document["add_generation_prompt"]) == (True, False)
        before = document["messages"][-1]["content"]
    elif not is_chat:
        before = document["prompt"].removeprefix("Q:")
    stop = document.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    limit = document.get("max_tokens")
    top = {"id": f"id-{number}", "created": number, "model": f"real-{number}"}
    top["object"] = "chat.completion.chunk" if is_chat else "text_completion"
    events: list[bytes] = []

    def add(choices: list[dict[str, Any]], **more: Any) -> None:
        chunk = {**top, "choices": choices, **more}
        events.append(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    if is_chat:
        add([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
    count = 0
    shown = len(before)
    for text, finish in generate(tokens, before, stops if show_until is None else (), limit):
        shown += len(text)
        if show_until is not None and (finish or shown >= show_until):
            return events
        count += bool(text)
        if text or not finish:
            piece: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
            add([{"index": 0, **piece, "finish_reason": None}])
        if finish:
            add([{"index": 0, **({"delta": {}} if is_chat else {"text": ""}), "finish_reason": finish}])
    if (document.get("stream_options") or {}).get("include_usage"):
        prompt = 10 + (len(before) and sum(1 for _ in generate(tokens, "", (), None)) - count)
        add([], usage={"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count})
    return [*events, b"data: [DONE]\n\n"]

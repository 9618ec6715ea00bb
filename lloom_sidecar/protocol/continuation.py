"""How a request asks for the rest of an answer whose beginning is given: one form for every backend.

Source: PROTOCOL.md, Continuation; the chat form is vLLM's and SGLang's, and llama.cpp goes on behind a last message of
the assistant whatever these two fields say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .pb import lloom_pb2 as pb


def continued(document: Mapping[str, Any], operation: int, text: str) -> dict[str, Any]:
    """The body that asks for what follows ``text``, the beginning of the answer to ``document``.

    ``document``: a body whose ``messages`` are a list (chat), or whose ``prompt`` is one text (completions). A text
    completion needs nothing of the backend: the answer so far is simply more of the prompt.
    """
    if operation == pb.OPERATION_COMPLETIONS:
        return {**document, "prompt": document["prompt"] + text}
    return {
        **document,
        "messages": [*document["messages"], {"role": "assistant", "content": text}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }

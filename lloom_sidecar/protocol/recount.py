"""What the numbers of a statement cannot be, seen from what was sent and received. Pure.

A client has no tokenizer of the executor's model, so it cannot say how many tokens an answer has. It can say how many
it cannot have. The bounds are wide on purpose: who passes one is wrong by far, not by a rounding.
"""

from __future__ import annotations

from typing import Final

from .pb import lloom_pb2 as pb

UNSEEN_TOKENS: Final = 1_024
"""Tokens that may be counted though nobody sees them: a chat template and a backend's own system prompt on the way in;
ends of turns on the way out."""
TOKENS_PER_CHUNK: Final = 64
"""Most tokens that one event of a stream may carry: servers that join tokens or speculate send some 2 to 16."""


def doubts_of(claims: pb.ReceiptClaims, *, body_bytes: int | None, chunks: int | None) -> tuple[str, ...]:
    """What does not fit: none, ``prompt_tokens`` or ``completion_tokens`` with the numbers, a phrase each.

    Args:
        body_bytes: of the request's body; a token of a prompt has at least one byte. None = not to be judged: it names
            media, and what those have in tokens no byte of the body shows.
        chunks: events of a streamed answer; None = not streamed, or not counted.
    """
    found = []
    prompt, completion = claims.usage.prompt_tokens, claims.usage.completion_tokens
    if body_bytes is not None and prompt > body_bytes + UNSEEN_TOKENS:
        found.append(f"prompt_tokens {prompt} of {body_bytes} bytes")
    if completion > claims.answer_bytes + UNSEEN_TOKENS:
        found.append(f"completion_tokens {completion} of {claims.answer_bytes} bytes")
    elif chunks is not None and completion > chunks * TOKENS_PER_CHUNK + UNSEEN_TOKENS:
        found.append(f"completion_tokens {completion} of {chunks} events")
    return tuple(found)

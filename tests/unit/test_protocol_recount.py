"""Numbers that cannot be, and those that can."""

from __future__ import annotations

import pytest

from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from lloom_sidecar.protocol.recount import TOKENS_PER_CHUNK, UNSEEN_TOKENS, doubts_of


@pytest.mark.parametrize(
    ("prompt", "completion", "body_bytes", "chunks", "expected"),
    [
        (0, 0, 0, None, ()),
        (UNSEEN_TOKENS, 50 + UNSEEN_TOKENS, 0, None, ()),
        (UNSEEN_TOKENS + 1, 0, 0, None, ("prompt_tokens 1025 of 0 bytes",)),
        (UNSEEN_TOKENS + 1, 0, None, None, ()),
        (0, 51 + UNSEEN_TOKENS, 0, None, ("completion_tokens 1075 of 50 bytes",)),
        (0, 51 + UNSEEN_TOKENS, 0, 100, ("completion_tokens 1075 of 50 bytes",)),
        (0, TOKENS_PER_CHUNK // 2 + UNSEEN_TOKENS, 0, 0, ("completion_tokens 1056 of 0 events",)),
        (0, TOKENS_PER_CHUNK // 2 + UNSEEN_TOKENS, 0, 1, ()),
    ],
)
def test_bounds(
    prompt: int, completion: int, body_bytes: int | None, chunks: int | None, expected: tuple[str, ...]
) -> None:
    claims = pb.ReceiptClaims(
        usage=pb.Usage(prompt_tokens=prompt, completion_tokens=completion), answer_bytes=50, model="m"
    )
    assert doubts_of(claims, body_bytes=body_bytes, chunks=chunks) == expected

"""What an executor signs for an answer: checkpoints on its way, a receipt at its end.

Source: PROTOCOL.md, Receipt and CHECKPOINT.
"""

from __future__ import annotations

from typing import Final

from lloom_sidecar.ids import PeerId
from lloom_sidecar.protocol.claims import CheckedRequest, owed_cost
from lloom_sidecar.protocol.pb import lloom_pb2 as pb

from .relay import AnswerMeter

CHECKPOINT_TOKENS: Final = 1024
"""Most completion tokens of a priced answer between two statements. Source: PROTOCOL.md."""
CHECKPOINT_S: Final = 5.0
"""Most time between two statements while the answer goes on. Source: PROTOCOL.md."""


class CheckpointPacer:
    """Says when the next checkpoint of one priced answer is due."""

    def __init__(self, now: float) -> None:
        self._chunks = 0
        self._at = now

    def is_due(self, chunks: int, now: float) -> bool:
        """Whether the ``chunks`` that were sent so far call for one; True counts as given."""
        if chunks == self._chunks:
            return False
        if chunks - self._chunks < CHECKPOINT_TOKENS and now - self._at < CHECKPOINT_S:
            return False
        self._chunks, self._at = chunks, now
        return True


def statement(
    *,
    client: PeerId,
    executor: PeerId,
    request: CheckedRequest,
    price: pb.Price,
    meter: AnswerMeter,
    outcome: pb.Outcome,
    accepted_at_ms: int,
    first_at_ms: int,
    now_ms: int,
) -> pb.ReceiptClaims:
    """The claims of a receipt or checkpoint for the answer's bytes that ``meter`` has seen."""
    usage, source = meter.usage()
    return pb.ReceiptClaims(
        client=client.raw,
        executor=executor.raw,
        request_digest=request.digest,
        answer_digest=meter.digest.digest(),
        answer_bytes=meter.size,
        model=request.claims.model,
        usage=usage,
        usage_source=source,
        price=price,
        cost=owed_cost(price, usage, request.claims),
        accepted_at_ms=accepted_at_ms,
        first_at_ms=first_at_ms,
        ended_at_ms=now_ms,
        outcome=outcome,
    )

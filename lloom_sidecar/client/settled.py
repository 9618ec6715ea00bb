"""What became of each REQUEST that this node sent: what it owes for, and why it does not owe for the rest.

Of the exchanges under one idempotency key exactly one is owed: the one whose answer the application got. The others
(an executor that failed, the loser of a hedge or of a race, a request that was cancelled) are settled too, with a
reason, so that a bill for them can be answered.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lloom_sidecar.errors import (
    LloomError,
    PeerBusyError,
    PeerTimeoutError,
    PeerUnreachableError,
    RefusedError,
    StreamLostError,
)
from lloom_sidecar.ids import PeerId
from lloom_sidecar.link.exchange import Call, Receipt, Sent


@dataclass(frozen=True, slots=True)
class Settled:
    """One exchange that is over. Made exactly once for every REQUEST that went out, or was about to."""

    peer: PeerId
    call: Call
    """As it was sent: with the price of that executor."""
    request: bytes = field(repr=False)
    """The REQUEST's envelope."""
    salt: bytes = field(repr=False)
    exchange: int
    """Number of the exchange on its stream."""
    is_owed: bool
    """The application got this answer and the executor signed for it: all by a receipt, a part by a checkpoint."""
    reason: str
    """Empty when the answer is complete and the application's. Else ``refused`` (ERROR came), ``lost`` (the stream
    ended, or went silent), ``failed`` (the executor broke the rules), ``stale`` (a reused stream that did not hold: the
    request went out once more on a fresh one), ``hedged`` or ``raced`` (another executor was first), ``cancelled`` (the
    application left, or the deadline passed)."""
    receipt: Receipt | None
    """What END brought, verified; also of an answer that is not owed."""
    checkpoint: Receipt | None
    """The last CHECKPOINT's."""


def settle(sent: Sent, call: Call, *, was_used: bool, reason: str) -> Settled:
    """The settlement of ``sent``. ``was_used``: the application got this answer, or the beginning of it."""
    return Settled(
        peer=sent.peer,
        call=call,
        request=sent.request,
        salt=sent.salt,
        exchange=sent.exchange,
        is_owed=was_used and (sent.receipt is not None or sent.checkpoint is not None),
        reason=reason,
        receipt=sent.receipt,
        checkpoint=sent.checkpoint,
    )


def reason_of(failure: LloomError) -> str:
    """The reason of an exchange that ended with ``failure``."""
    if isinstance(failure, RefusedError | PeerBusyError):
        return "refused"
    if isinstance(failure, StreamLostError | PeerUnreachableError | PeerTimeoutError):
        return "lost"
    return "failed"

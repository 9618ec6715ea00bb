"""What an executor tells its node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from lloom_sidecar.ids import PeerId


class ExecutorObserver(Protocol):
    """What the node wants to know of served requests; every method is quick and raises nothing."""

    def request_received(self, peer: PeerId, request_id: bytes, model: str) -> None:
        """A request passed every check; exactly one ``request_ended`` follows."""

    def request_ended(
        self,
        peer: PeerId,
        request_id: bytes,
        model: str,
        code: str,
        seconds: float,
        first_s: float | None,
        tokens: int,
    ) -> None:
        """It ended: ``ok``, ``cancelled`` or an error's code."""

    def slot_given(self, waited_s: float) -> None:
        """A request got its slot, ``waited_s`` after its body was complete."""

    def refused(self, code: str) -> None:
        """A request or a stream was refused, or a request failed, with this code."""

    def receipt_made(self, served: ServedReceipt) -> None:
        """An exchange got a statement: a checkpoint, a receipt, a countersignature; or it ended without a receipt."""


@dataclass(frozen=True, slots=True)
class ServedReceipt:
    """What this executor has signed for an exchange so far, and the client's countersignature once it came."""

    client: PeerId
    request_id: bytes
    exchange: int
    """Number of the exchange on its stream."""
    model: str
    request: bytes = field(repr=False)
    salt: bytes = field(repr=False)
    receipt: bytes | None = field(default=None, repr=False)
    """END's."""
    checkpoint: bytes | None = field(default=None, repr=False)
    """The last one: what is owed when no receipt came of it."""
    ack: bytes | None = field(default=None, repr=False)
    reason: str = ""
    """Why it ended without a receipt: ``cancelled`` or an error's code."""

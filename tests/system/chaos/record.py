"""What became of one request, as its application saw it. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import Enum


class Outcome(Enum):
    """How a request ended for its application."""

    COMPLETE = "complete"
    ERROR = "error"
    """An error document, or an error event behind which the connection broke off without HTTP's last chunk."""
    CANCELLED = "cancelled"
    """The application itself left."""
    SILENT = "silent"
    """It ended without a word, or a cut answer looks finished. Never allowed."""
    LOST = "lost"
    """It did not end. Never allowed."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of an application."""

    tag: int
    """Its number; every piece of its answer carries it."""
    chunks: int
    delay_ms: int
    streams: bool = True
    leave_after: int | None = None
    """The application leaves when it has so many pieces; None = it stays."""
    script: str = ""
    """More directives for the backend, see ``tests/harness/scripted_backend.py``."""

    @property
    def prompt(self) -> str:
        """The script of its answer."""
        return f"tag={self.tag} chunks={self.chunks} delay_ms={self.delay_ms} {self.script}".strip()

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(f" {self.tag}.{index}" for index in range(self.chunks))

    @property
    def nominal_s(self) -> float:
        """How long the backend takes for it."""
        return self.chunks * self.delay_ms / 1000


@dataclass(slots=True)
class Record:
    """One request and all that was seen of it. Instants: seconds of Unix time."""

    ask: Ask
    began_at: float
    status: int | None = None
    request_id: str = ""
    executor: str = ""
    """Who gave the answer, or its last part."""
    attempts: int = 0
    was_resumed: bool = False
    """The answer was put together of parts of several executors."""
    pieces: list[str] = field(default_factory=list)
    """The text of each chunk, in the order of arrival."""
    has_finish: bool = False
    """A finish_reason came."""
    has_done: bool = False
    """``[DONE]`` came."""
    has_end: bool = False
    """HTTP's own end of the body came."""
    error: str = ""
    """The code in the error document or event."""
    left: bool = False
    """The application closed the connection."""
    unread: str = ""
    """An event that is no JSON."""
    first_at: float | None = None
    ended_at: float | None = None
    longest_gap_s: float = 0.0

    @property
    def text(self) -> str:
        """What arrived."""
        return "".join(self.pieces)

    @property
    def outcome(self) -> Outcome:
        """Exactly one."""
        if self.ended_at is None:
            return Outcome.LOST
        if self.left:
            return Outcome.CANCELLED
        looks_finished = self.has_finish or self.has_done or (self.has_end and self.status == 200)
        if self.error:
            # After a 200 the error is an event, and nothing may look like an end.
            return Outcome.SILENT if looks_finished else Outcome.ERROR
        is_whole = self.has_finish and self.has_end and (self.has_done or not self.ask.streams)
        return Outcome.COMPLETE if self.status == 200 and is_whole else Outcome.SILENT

    @property
    def delay_s(self) -> float:
        """How much longer it took than its backend needs."""
        assert self.ended_at is not None
        return self.ended_at - self.began_at - self.ask.nominal_s


def make_ask(seed: int, tag: int, *, leavers: bool = True) -> Ask:
    """The request with this number: mostly short streams, some unstreamed, some whose application leaves."""
    rng = random.Random(f"{seed}/{tag}")
    chunks = rng.choice((5, 10, 20, 40))
    leave_after = None
    streams = rng.random() < 0.9
    if leavers and streams and chunks > 4 and rng.random() < 0.08:
        leave_after = rng.randrange(1, chunks - 2)
    return Ask(tag=tag, chunks=chunks, delay_ms=rng.choice((10, 20, 30)), streams=streams, leave_after=leave_after)

"""Trace context from the application to the backend, and spans for those who collect them.

This module knows nothing of OpenTelemetry: its ``Tracing`` hands a request's trace context on untouched and records
nothing. ``otel.py``, of the extra ``otel``, makes a span of each hop; it is imported only where spans have somewhere to
go. Spans hold names, sizes and codes, never prompts or answers.
Source: W3C Trace Context, Level 1; OpenTelemetry's semantic conventions for generative AI.
"""

from __future__ import annotations

import re
from typing import Final

_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def check_traceparent(text: str) -> str:
    """``text`` if it is a trace context, else empty: a wrong one is dropped, as the standard says, not refused.

    A later version is taken when it looks like version 00 and says no more than that.
    """
    return text if _TRACEPARENT.fullmatch(text) is not None else ""


class Span:
    """One hop of a request. This one records nothing."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent
        """What goes on to the next hop; empty when there is no trace."""

    def attempt(self, executor: str) -> Span:
        """A part of it: one executor is asked. ``executor``: its peer id."""
        return self

    def first_byte(self) -> None:
        """The answer has begun."""

    def end(self, code: str, *, input_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """It is over, with ``ok``, ``cancelled`` or an error's code. Called once, by whoever began it."""


class Tracing:
    """Begins spans. This one begins none."""

    def request(self, operation: int, model: str, traceparent: str) -> Span:
        """An application's request at the client. ``operation``: the wire's number."""
        return Span(traceparent)

    def served(self, operation: int, model: str, traceparent: str) -> Span:
        """A peer's request at the executor."""
        return Span(traceparent)

    def close(self) -> None:
        """Send what is left; takes up to some seconds, in a thread."""


NO_SPAN: Final = Span("")

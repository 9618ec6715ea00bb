"""Waiting for a condition, never for a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
_POLL = threading.Event()
POLL_S = 0.02


def pause(seconds: float) -> None:
    """Let time pass, where the test is about time."""
    _POLL.wait(seconds)


def wait_until(
    condition: Callable[[], T],
    what: str,
    *,
    timeout_s: float = 10.0,
    poll_s: float = POLL_S,
    explain: Callable[[], Any] | None = None,
) -> Any:
    """The condition's first true value. Fails the test with ``what`` and ``explain`` when it does not come in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            detail = f": {explain()}" if explain is not None else ""
            raise AssertionError(f"waited {timeout_s:g} s for {what}{detail}")
        pause(poll_s)

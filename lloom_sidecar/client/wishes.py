"""What an application asks of the routing by headers of its request; the body is the executor's. Pure.

| header | value |
|---|---|
| ``x-lloom-policy`` | adaptive, cheapest, fastest, round-robin, race |
| ``x-lloom-hedge`` | off, free, on |
| ``x-lloom-resume`` | off, on |
| ``x-lloom-pin-executor`` | peer ids, commas between |
| ``x-lloom-max-price`` | ``PROMPT/COMPLETION CURRENCY``, minor units per million tokens, or free |
| ``x-lloom-max-cost`` | minor units for the whole answer |
| ``x-lloom-priority`` | -10 to 10: which of this node's requests an executor takes first |
| ``x-lloom-timeout`` | seconds for the whole answer |

Each function returns None (or what is empty) when its header is missing, and raises RequestError, a sentence for the
application, when it cannot be read.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, TypeVar

from lloom_sidecar.errors import RequestError
from lloom_sidecar.http.server import Request
from lloom_sidecar.ids import PeerId
from lloom_sidecar.peers.hedging import Hedge
from lloom_sidecar.peers.selection import Policy
from lloom_sidecar.protocol.offers import Price

MAX_PINNED: Final = 16
MAX_PRIORITY: Final = 10
MIN_TIMEOUT_S: Final = 0.1

_Word = TypeVar("_Word", bound=Enum)


def policy(request: Request) -> Policy | None:
    """How to choose; ``round-robin`` and ``round_robin`` are the same."""
    return _word(request, "x-lloom-policy", Policy)


def hedge(request: Request) -> Hedge | None:
    """Whether several executors may be asked."""
    return _word(request, "x-lloom-hedge", Hedge)


def resume(request: Request) -> bool | None:
    """Whether a streamed answer that is cut may go on at another executor."""
    found = _word(request, "x-lloom-resume", _Switch)
    return None if found is None else found is _Switch.ON


class _Switch(Enum):
    OFF = "off"
    ON = "on"


def _word(request: Request, header: str, words: type[_Word]) -> _Word | None:
    text = request.header(header)
    if not text:
        return None
    try:
        return words(text.strip().lower().replace("-", "_"))
    except ValueError:
        known = ", ".join(word.value.replace("_", "-") for word in words)
        raise RequestError(f"{header}: {text[:40]!r} is none of {known}") from None


def pinned(request: Request) -> frozenset[PeerId]:
    """The only executors that may be asked; empty = all. At most 16 are read."""
    text = request.header("x-lloom-pin-executor")
    if not text:
        return frozenset()
    try:
        return frozenset(PeerId.parse(part.strip()) for part in text.split(",")[:MAX_PINNED])
    except ValueError as exc:
        raise RequestError(f"x-lloom-pin-executor: {exc}") from exc


def max_price(request: Request) -> Price | None:
    """The highest price."""
    text = request.header("x-lloom-max-price")
    if not text:
        return None
    try:
        return Price.parse(text)
    except ValueError as exc:
        raise RequestError(f"x-lloom-max-price: {exc}") from exc


def max_cost(request: Request) -> int | None:
    """The most that the answer may cost."""
    text = request.header("x-lloom-max-cost")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise RequestError(f"x-lloom-max-cost: {text[:40]!r} is not a whole number of minor units such as 25")
    return int(text)


def priority(request: Request) -> int:
    """Which of this node's requests goes first at an executor: the higher one; 0 when nothing is said."""
    text = request.header("x-lloom-priority")
    if not text:
        return 0
    if re.fullmatch(r"[+-]?\d{1,3}", text, re.ASCII) is None or abs(int(text)) > MAX_PRIORITY:
        raise RequestError(
            f"x-lloom-priority: {text[:40]!r} is not a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        )
    return int(text)


def timeout_s(request: Request) -> float | None:
    """How long the application waits for the whole answer."""
    text = request.header("x-lloom-timeout")
    if not text:
        return None
    if re.fullmatch(r"\d{1,6}(\.\d{1,3})?", text, re.ASCII) is None or float(text) < MIN_TIMEOUT_S:
        raise RequestError(f"x-lloom-timeout: {text[:40]!r} is not a number of seconds from {MIN_TIMEOUT_S} on")
    return float(text)

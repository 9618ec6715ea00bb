"""Events of a node: typed, published without waiting, kept in bounded buffers that say what they dropped.

``EventBus.publish`` never waits and never fails for a slow reader: each reader has a buffer of its own, loses the
oldest events when that is full, and is told how many. Belongs to one trio loop.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, ClassVar, Final, Literal

import trio

HISTORY_EVENTS: Final = 256
"""Events that a new reader can still see."""
READER_EVENTS: Final = 1024
"""Events that a reader may be behind before it loses the oldest."""
MAX_TEXT: Final = 500
"""Characters of a text field; what others send is cut there."""

Path = Literal["direct", "relayed", "none"]


@dataclass(frozen=True, slots=True)
class ConnectionEstablished:
    """A peer is connected."""

    kind: ClassVar[str] = "connection_established"
    peer: str
    """Peer id."""
    path: Path = "direct"
    """Whether the connection leads through a relay."""


@dataclass(frozen=True, slots=True)
class ConnectionClosed:
    """A peer's last connection ended."""

    kind: ClassVar[str] = "connection_closed"
    peer: str
    """Peer id."""
    cause: str = "unknown"
    """What a stream told about it, else ``unknown``."""


@dataclass(frozen=True, slots=True)
class ExecutorDiscovered:
    """An executor's announcement was believed for the first time, or again after it was lost."""

    kind: ClassVar[str] = "executor_discovered"
    peer: str
    """Peer id."""
    models: tuple[str, ...] = ()
    """Ids of the models that it offers."""
    source: str = ""
    """gossip, catalogue, hello or dht."""


@dataclass(frozen=True, slots=True)
class ExecutorLost:
    """An executor is not used any more."""

    kind: ClassVar[str] = "executor_lost"
    peer: str
    """Peer id."""
    reason: str = ""
    """lease, removal, unreachable, ..."""


@dataclass(frozen=True, slots=True)
class ValidatorDiscovered:
    """A validator is connected and proved the network, or was found."""

    kind: ClassVar[str] = "validator_discovered"
    peer: str
    """Peer id."""
    source: str = ""
    """bootstrap, invite, hello or dht."""


@dataclass(frozen=True, slots=True)
class RequestReceived:
    """A request came in: from an application (client) or from a peer (executor)."""

    kind: ClassVar[str] = "request_received"
    request_id: str
    model: str = ""
    role: Literal["client", "executor"] = "client"
    peer: str | None = None
    """Peer id of the client; None when it came from an application."""


@dataclass(frozen=True, slots=True)
class ResponseReceived:
    """An answer ended, well or not."""

    kind: ClassVar[str] = "response_received"
    request_id: str
    model: str = ""
    role: Literal["client", "executor"] = "client"
    peer: str | None = None
    """Peer id of the other side; None when no executor was found."""
    outcome: str = "ok"
    """ok, cancelled, or the error's code."""
    duration_s: float = 0.0
    """From the request to the end of the answer."""
    attempts: int = 1
    """Executors that were asked."""


@dataclass(frozen=True, slots=True)
class BootstrapComplete:
    """A round of bootstrap ended."""

    kind: ClassVar[str] = "bootstrap_complete"
    connected: int = 0
    """Validators that are connected now."""
    tried: int = 0
    """Validators that were dialled."""
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class NetworkError:
    """Something between nodes went wrong that concerns more than one request."""

    kind: ClassVar[str] = "network_error"
    code: str
    """An error code of the taxonomy."""
    text: str = ""
    """A sentence."""
    peer: str | None = None


Event = (
    ConnectionEstablished
    | ConnectionClosed
    | ExecutorDiscovered
    | ExecutorLost
    | ValidatorDiscovered
    | RequestReceived
    | ResponseReceived
    | BootstrapComplete
    | NetworkError
)

EVENT_KINDS: Final = tuple(
    one.kind
    for one in (
        ConnectionEstablished,
        ConnectionClosed,
        ExecutorDiscovered,
        ExecutorLost,
        ValidatorDiscovered,
        RequestReceived,
        ResponseReceived,
        BootstrapComplete,
        NetworkError,
    )
)
"""Every kind, as the JSON shape and ``--kind`` name it."""


@dataclass(frozen=True, slots=True)
class Stamped:
    """An event with its place and time."""

    sequence: int
    """Counts from 1 within a run of the node."""
    at: float
    """Seconds since the epoch."""
    event: Event

    def as_dict(self) -> dict[str, Any]:
        """JSON shape: ``{"event", "sequence", "at", ...the event's own fields}``; ``at`` in ISO 8601, UTC."""
        fields = {
            key: value[:MAX_TEXT] if isinstance(value, str) else value for key, value in asdict(self.event).items()
        }
        stamp = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {"event": self.event.kind, "sequence": self.sequence, "at": stamp, **fields}


@dataclass(frozen=True, slots=True)
class EventsDropped:
    """What a reader gets in place of the events that it was too slow for."""

    count: int

    def as_dict(self) -> dict[str, Any]:
        """JSON shape: ``{"event": "events_dropped", "count"}``."""
        return {"event": "events_dropped", "count": self.count}


class EventReader:
    """One reader's view of the bus: an async iterator, and a context manager that ends it."""

    def __init__(self, bus: EventBus, kinds: frozenset[str] | None, limit: int, backlog: Iterator[Stamped]) -> None:
        self._bus = bus
        self._kinds = kinds
        self._limit = limit
        self._buffer: deque[Stamped] = deque()
        self._dropped = 0
        self._wakeup = trio.Event()
        self._is_closed = False
        for one in backlog:
            self._offer(one)

    def _offer(self, stamped: Stamped) -> int:
        """Buffer an event that this reader wants; returns how many were lost for it."""
        if self._kinds is not None and stamped.event.kind not in self._kinds:
            return 0
        lost = 0
        if len(self._buffer) >= self._limit:
            self._buffer.popleft()
            self._dropped += 1
            lost = 1
        self._buffer.append(stamped)
        self._wakeup.set()
        return lost

    def receive_nowait(self) -> Stamped | EventsDropped:
        """The next event. Raises trio.WouldBlock when there is none, trio.EndOfChannel after the end."""
        if self._dropped:
            count, self._dropped = self._dropped, 0
            return EventsDropped(count)
        if self._buffer:
            return self._buffer.popleft()
        if self._is_closed:
            raise trio.EndOfChannel
        raise trio.WouldBlock

    async def receive(self) -> Stamped | EventsDropped:
        """Wait for the next event. Raises trio.EndOfChannel after the end. Cancellation loses nothing."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            try:
                found = self.receive_nowait()
            except trio.WouldBlock:
                self._wakeup = trio.Event()
                await self._wakeup.wait()
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return found

    def close(self) -> None:
        """End the reader: what is buffered can still be read. Idempotent."""
        self._is_closed = True
        self._wakeup.set()
        self._bus._readers.discard(self)

    def __enter__(self) -> EventReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> EventReader:
        return self

    async def __anext__(self) -> Stamped | EventsDropped:
        try:
            return await self.receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None


class EventBus:
    """Hands each event to every reader, and keeps the latest for readers that come later."""

    def __init__(
        self,
        *,
        wall_clock: Callable[[], float] = time.time,
        history: int = HISTORY_EVENTS,
        on_dropped: Callable[[int], None] | None = None,
    ) -> None:
        """``wall_clock``: seconds since the epoch; ``on_dropped(count)``: readers lost events, for a counter."""
        self._wall_clock = wall_clock
        self._history: deque[Stamped] = deque(maxlen=history)
        self._readers: set[EventReader] = set()
        self._sequence = 0
        self._on_dropped = on_dropped

    def publish(self, event: Event) -> Stamped:
        """Stamp the event and hand it to every reader. Never waits."""
        self._sequence += 1
        stamped = Stamped(self._sequence, self._wall_clock(), event)
        self._history.append(stamped)
        lost = 0
        for reader in self._readers:
            lost += reader._offer(stamped)
        if lost and self._on_dropped is not None:
            self._on_dropped(lost)
        return stamped

    def subscribe(
        self, *, kinds: Collection[str] | None = None, limit: int = READER_EVENTS, history: bool = False
    ) -> EventReader:
        """A new reader of ``kinds`` (None = all), which begins with what is kept when ``history`` is True.

        Use it as a context manager, or close it. Raises ValueError for an unknown kind.
        """
        unknown = set(kinds or ()) - set(EVENT_KINDS)
        if unknown:
            raise ValueError(f"no such event: {', '.join(sorted(unknown))} (there are {', '.join(EVENT_KINDS)})")
        backlog = iter(self._history if history else ())
        reader = EventReader(self, frozenset(kinds) if kinds else None, limit, backlog)
        self._readers.add(reader)
        return reader

    def recent(self, *, kinds: Collection[str] | None = None) -> list[Stamped]:
        """What is kept, the oldest first."""
        return [one for one in self._history if not kinds or one.event.kind in kinds]

    def close(self) -> None:
        """End every reader, for instance so that streams of the admin API end before the node does."""
        for reader in list(self._readers):
            reader.close()

    @property
    def readers(self) -> int:
        """How many readers there are."""
        return len(self._readers)

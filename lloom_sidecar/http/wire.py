"""One connection's bytes, and the two watches that cost nothing per request.

Three levers make a small request cheap: sockets are read and written directly and trio is asked only when the kernel
says "not now"; deadlines are a float that one task compares for all connections (a deadline set and reset on a cancel
scope costs 3.5 us, a scope 4.5 us); a hang-up is told by the kernel (EPOLLRDHUP), not by a reading task per request.
Source: measurements on Python 3.11, trio 0.35.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import ssl
import sys
from collections.abc import Callable
from typing import Final, Literal

import trio

from lloom_sidecar.http.limits import READ_BYTES

Phase = Literal["tls", "idle", "head", "body", "write", "linger", "connect", "first_byte", "between_bytes"]
"""What a connection waits for."""

MAX_STREAK: Final = 16
"""Reads or writes in a row that may succeed without the task yielding: bounds how long one busy connection can keep
the others waiting (16 writes of a small chunk take about 60 us)."""
MAX_TICK_S: Final = 0.5
"""Longest time between two looks at the deadlines: timeouts are late by at most this much."""
HANGUP_POLL_S: Final = 0.05
"""Where there is no epoll: time between two looks for hang-ups; half of the promised 100 ms."""


class WireClosedError(Exception):
    """The connection is gone: reset by the far side, closed by ours, or its deadline passed (``Wire.expired``).

    Never leaves this room: server and client translate it.
    """


class Wire:
    """A connected stream socket, plain or under TLS, with one deadline.

    Owner: one connection of the server or the client; one task reads and writes at a time. After a cancelled or failed
    ``send_all`` an unknown part has been sent: the owner closes it. A cancelled ``receive_some`` has taken nothing.
    """

    __slots__ = ("_streak", "_tls", "due_at", "expired", "is_closed", "on_expire", "phase", "sock", "write_timeout_s")

    def __init__(self, sock: socket.socket, write_timeout_s: float, on_expire: Callable[[], object] | None = None):
        """``sock``: connected; becomes non-blocking and the wire's own. ``on_expire``: default is ``close``."""
        sock.setblocking(False)
        self.sock = sock
        self.write_timeout_s = write_timeout_s
        self.due_at = math.inf
        """trio time at which the sweeper ends what is under way."""
        self.phase: Phase = "idle"
        self.expired: Phase | None = None
        """What was waited for when the deadline passed."""
        self.on_expire = on_expire or self.close
        self.is_closed = False
        self._streak = 0
        self._tls: trio.SSLStream[trio.SocketStream] | None = None

    async def start_tls(self, context: ssl.SSLContext, *, server_hostname: str | None, is_server: bool) -> None:
        """Shake hands. Raises WireClosedError when the connection ends or TLS is not agreed (``__cause__`` says which).

        Cancelled: the connection is of no further use.
        """
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(self.sock))
        tls = trio.SSLStream(
            stream, context, server_hostname=server_hostname, server_side=is_server, https_compatible=True
        )
        self._tls = tls
        try:
            await tls.do_handshake()
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, ssl.CertificateError) as exc:
            raise WireClosedError("no TLS") from exc

    def arm(self, phase: Phase, seconds: float) -> None:
        """From now on, wait for ``phase`` at most so many seconds."""
        self.phase = phase
        self.due_at = trio.current_time() + seconds

    def disarm(self) -> None:
        """There is no deadline any more."""
        self.due_at = math.inf

    def expire(self) -> None:
        """Called by the sweeper when ``due_at`` has passed."""
        self.expired = self.phase
        self.due_at = math.inf
        self.on_expire()

    async def receive_some(self, max_bytes: int = READ_BYTES, *, wait_first: bool = False) -> bytes:
        """1 to ``max_bytes`` bytes, or b"" at the far side's end.

        ``wait_first``: nothing can have arrived yet, so do not try before waiting. Yields at the latest at every 16th
        call. Raises WireClosedError.
        """
        if self._tls is not None:
            try:
                return bytes(await self._tls.receive_some(max_bytes))
            except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as exc:
                raise WireClosedError("connection lost") from exc
        if self.is_closed:
            raise WireClosedError("connection closed")
        sock = self.sock
        self._streak += 1
        if self._streak >= MAX_STREAK and not wait_first:
            self._streak = 0
            await trio.lowlevel.checkpoint()
        while True:
            if not wait_first:
                try:
                    return sock.recv(max_bytes)
                except (BlockingIOError, InterruptedError):
                    pass
                except OSError as exc:
                    raise WireClosedError("connection lost") from exc
            wait_first = False
            self._streak = 0
            try:
                await trio.lowlevel.wait_readable(sock)
            except (trio.ClosedResourceError, OSError, ValueError) as exc:
                raise WireClosedError("connection closed") from exc

    async def send_all(self, data: bytes) -> None:
        """Send everything. Each time that no byte moves for ``write_timeout_s`` is the end of the connection.

        Yields at the latest at every 16th call. Raises WireClosedError.
        """
        if self._tls is not None:
            await self._send_tls(data)
            return
        if self.is_closed:
            raise WireClosedError("connection closed")
        self._streak += 1
        if self._streak >= MAX_STREAK:
            self._streak = 0
            await trio.lowlevel.checkpoint()
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as exc:
            raise WireClosedError("connection lost") from exc
        if sent != len(data):
            await self._send_rest(memoryview(data)[sent:])

    async def _send_rest(self, data: memoryview) -> None:
        phase, due_at = self.phase, self.due_at
        sock = self.sock
        self._streak = 0
        try:
            while data:
                self.arm("write", self.write_timeout_s)
                await trio.lowlevel.wait_writable(sock)
                with contextlib.suppress(BlockingIOError, InterruptedError):
                    data = data[sock.send(data) :]
        except (trio.ClosedResourceError, OSError, ValueError) as exc:
            raise WireClosedError("connection lost") from exc
        finally:
            self.phase, self.due_at = phase, due_at

    async def _send_tls(self, data: bytes) -> None:
        assert self._tls is not None
        phase, due_at = self.phase, self.due_at
        try:
            view = memoryview(data)
            while view:
                self.arm("write", self.write_timeout_s)
                await self._tls.send_all(view[:READ_BYTES])
                view = view[READ_BYTES:]
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as exc:
            raise WireClosedError("connection lost") from exc
        finally:
            self.phase, self.due_at = phase, due_at

    def send_nowait(self, data: bytes) -> None:
        """Send as much as the kernel takes right now; failures are of no interest. For last words; not under TLS."""
        if self._tls is None and not self.is_closed:
            with contextlib.suppress(OSError):
                self.sock.send(data)

    async def send_eof(self) -> None:
        """Tell the far side that nothing more comes (under TLS: close_notify). Best effort, raises nothing."""
        if self.is_closed:
            return
        if self._tls is not None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
                await self._tls.unwrap()
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def is_quiet(self) -> bool:
        """Whether the far side has neither closed nor sent anything that was not read. Does not block."""
        if self.is_closed:
            return False
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False
        return False

    def close(self) -> None:
        """Close at once; a task that waits in it gets WireClosedError. Idempotent."""
        if not self.is_closed:
            self.is_closed = True
            self.due_at = math.inf
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()

    def reset(self) -> None:
        """Close with RST instead of FIN, so that the far side sees a failure where an end would look like success."""
        if not self.is_closed:
            if self.sock.family in (socket.AF_INET, socket.AF_INET6):
                with contextlib.suppress(OSError):
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.close()


class Sweeper:
    """Ends what waits too long: one task compares every wire's deadline with the clock."""

    def __init__(self, shortest_timeout_s: float) -> None:
        self.wires: set[Wire] = set()
        """The wires under watch; owners add and discard."""
        self.tick_s = min(MAX_TICK_S, shortest_timeout_s / 4)

    async def run(self, each_tick: Callable[[float], object] | None = None) -> None:
        """Until cancelled. ``each_tick`` is called with trio's time after each look."""
        while True:
            await trio.sleep(self.tick_s)
            now = trio.current_time()
            for wire in [wire for wire in self.wires if wire.due_at <= now]:
                wire.expire()
            if each_tick is not None:
                each_tick(now)


class HangupWatch:
    """Tells when a far side closes or resets, while nobody reads from it.

    On Linux the kernel reports it through one epoll instance for all connections (``EPOLLRDHUP``), even when unread
    data lies in front. A far side that sends more than the socket's receive buffer holds before it closes is noticed
    only when that was read. Elsewhere each socket is peeked at every 50 ms, which unread data hides.
    """

    def __init__(self, *, use_epoll: bool = True) -> None:
        """``use_epoll`` False: peek, even where epoll exists."""
        self._targets: dict[int, tuple[socket.socket, Callable[[], object]]] = {}
        self._epoll: select.epoll | None = None
        if sys.platform == "linux" and use_epoll:
            self._epoll = select.epoll()

    def add(self, sock: socket.socket, on_hangup: Callable[[], object]) -> None:
        """Call ``on_hangup`` once, from the watch's task, when the far side has gone."""
        fd = sock.fileno()
        self._targets[fd] = (sock, on_hangup)
        if sys.platform == "linux" and self._epoll is not None:
            self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def remove(self, sock: socket.socket) -> None:
        """Forget a socket; must be called before it is closed. Idempotent."""
        fd = sock.fileno()
        if self._targets.pop(fd, None) is not None and self._epoll is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    async def run(self) -> None:
        """Until cancelled."""
        if self._epoll is None:
            await self._run_peeking()
        else:
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for fd, _ in self._epoll.poll(0):
                    target = self._targets.get(fd)
                    if target is not None:
                        target[1]()

    async def _run_peeking(self) -> None:
        while True:
            await trio.sleep(HANGUP_POLL_S)
            for fd, (sock, on_hangup) in list(self._targets.items()):
                try:
                    gone = sock.recv(1, socket.MSG_PEEK) == b""
                except (BlockingIOError, InterruptedError):
                    gone = False
                except OSError:
                    gone = True
                if gone:
                    self._targets.pop(fd, None)
                    on_hangup()

    def close(self) -> None:
        """Release the kernel's part. Idempotent."""
        self._targets.clear()
        if self._epoll is not None:
            self._epoll.close()

"""HTTP/1.1 server on trio: one task per connection, no task, scope or deadline per request.

A handler is ``async def handler(request, response)``. It runs in its connection's task and cancel scope; when the
client goes away, the scope is cancelled. A client that only closes its sending side counts as gone, as with nginx: an
application that hung up must not keep a model busy. Pipelined requests wait, in the kernel's buffer or ours, and are
served in order. Whatever is not clean HTTP is refused and the connection closed (``heads.py``, ``chunked.py``).
Source: RFC 9110, RFC 9112.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Final, Literal

import trio

from lloom_sidecar.http.chunked import RequestDechunker
from lloom_sidecar.http.errors import (
    ClientDisconnectedError,
    HttpUsageError,
    RequestRefusedError,
    error_body,
)
from lloom_sidecar.http.guard import Refusal
from lloom_sidecar.http.heads import (
    CHUNKED,
    HEAD_END,
    Headers,
    RequestHead,
    early_fault,
    encode_fields,
    parse_request_head,
    wire_name,
)
from lloom_sidecar.http.limits import READ_BYTES, HttpLimits
from lloom_sidecar.http.listeners import Listener
from lloom_sidecar.http.wire import HangupWatch, Sweeper, Wire, WireClosedError

ClientAddress = tuple[str, int] | Literal["unix"]
"""(IP address, port) of the client, or ``unix``."""
Handler = Callable[["Request", "Response"], Awaitable[None]]
"""Answers one request."""
Guard = Callable[["Request"], Refusal | None]
"""Looks at a request's head before anything else is done with it."""
OnError = Callable[[BaseException, "Request | None"], object]
"""Told of a failure that no client caused; must not raise."""

LINGER_S: Final = 2.0
"""Seconds for which a refused request's remaining bytes are read and thrown away: a close with unread bytes is a
reset, which may destroy the answer on its way. Source: RFC 9112 section 9.6; nginx lingering_timeout is 5 s."""
LINGER_BYTES: Final = 1024 * 1024
"""Most bytes that are thrown away so."""
BODY_READ_BYTES: Final = 262_144
"""Most bytes of a body that one read takes: large bodies need fewer turns."""
JOIN_BYTES: Final = 65_536
"""Up to this size a body is joined to its head and sent by one system call; beyond, the copy costs more."""
ACCEPT_BATCH: Final = 64
"""Connections accepted in a row before the other tasks get a turn."""
ACCEPT_PAUSE_S: Final = 0.1
"""Seconds to wait when the process has no file descriptors left. Source: trio's serve_listeners."""

_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"
_JSON: Final = (b"content-type", b"application/json")
_FRAMING: Final = frozenset(
    {b"content-length", b"transfer-encoding", b"connection", b"keep-alive", b"upgrade", b"date"}
)
_STATUS_LINES: Final = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii") for status in HTTPStatus
}
_NO_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

_NEW, _STREAMING, _DONE, _ABORTED = range(4)

_logger = logging.getLogger(__name__)


class _Clock:
    """The Date header's line, made once a second."""

    second: int = -1
    line: bytes = b""

    @classmethod
    def date_line(cls) -> bytes:
        now = int(time.time())
        if now != cls.second:
            cls.second = now
            cls.line = b"date: %b\r\n" % formatdate(now, usegmt=True).encode("ascii")
        return cls.line


class Request:
    """One request. Its head is complete and checked; its body is read when asked for."""

    __slots__ = (
        "_body",
        "_connection",
        "_expects_continue",
        "by_name",
        "content_length",
        "headers",
        "host",
        "is_http11",
        "keep_alive",
        "method",
        "path",
        "query",
        "raw_path",
        "target",
    )

    def __init__(self, connection: _Connection, head: RequestHead) -> None:
        self._connection = connection
        self._body: bytes | None = None
        self.headers: Headers
        """In order of arrival: lowercase name, value."""
        self.by_name: dict[bytes, bytes]
        """By lowercase name; several of one name joined by ``, ``."""
        (
            self.method,
            self.target,
            self.raw_path,
            self.path,
            self.query,
            self.host,
            self.is_http11,
            self.keep_alive,
            self.content_length,
            self._expects_continue,
            self.headers,
            self.by_name,
        ) = head

    @property
    def client(self) -> ClientAddress:
        """Who sent it."""
        return self._connection.client

    @property
    def scheme(self) -> str:
        """``http`` or ``https``."""
        return self._connection.server.scheme

    @property
    def has_body(self) -> bool:
        """Whether the head announces a body of at least one byte, or a chunked one."""
        return self.content_length != 0

    def header(self, name: str) -> str | None:
        """A header's value, several joined by ``, ``; None when there is none. ``name`` without regard to case."""
        value = self.by_name.get(wire_name(name))
        return None if value is None else value.decode("latin-1")

    async def body(self) -> bytes:
        """The whole body; asked again, the same. At most ``max_body_bytes``; sends ``100 Continue`` if it is awaited.

        Raises RequestRefusedError (400 broken framing, 413 too large, 431 trailers too large), which the server
        answers if the handler lets it pass, and ClientDisconnectedError. Cancelled: what was read is kept, so that a
        second call goes on from there.
        """
        if self._body is None:
            connection = self._connection
            length = self.content_length
            rest = connection.rest
            if length == 0:
                self._body = b""
            elif 0 < length <= len(rest):
                self._body = rest if length == len(rest) else rest[:length]
                connection.rest = rest[length:]
            else:
                try:
                    if length == CHUNKED:
                        self._body = await self._read_chunked()
                    else:
                        self._body = await self._read_length()
                except WireClosedError as exc:
                    raise ClientDisconnectedError("The client closed its connection within the body.") from exc
        return self._body

    async def _read(self, max_bytes: int) -> bytes:
        wire = self._connection.wire
        if self._expects_continue:
            self._expects_continue = False
            if not self._connection.has_answered:
                await wire.send_all(_CONTINUE)
        wire.arm("body", self._connection.server.limits.body_timeout_s)
        try:
            data = await wire.receive_some(max_bytes)
        finally:
            wire.disarm()
        if not data:
            raise ClientDisconnectedError("The client closed its connection within the body.")
        return data

    async def _read_length(self) -> bytes:
        connection = self._connection
        parts = [connection.rest]
        missing = self.content_length - len(connection.rest)
        connection.rest = b""
        try:
            while missing:
                parts.append(await self._read(min(missing, BODY_READ_BYTES)))
                missing -= len(parts[-1])
        except BaseException:
            connection.rest = b"".join(parts)
            raise
        return b"".join(parts)

    async def _read_chunked(self) -> bytes:
        connection = self._connection
        limits = connection.server.limits
        dechunker = connection.dechunker
        if dechunker is None:
            dechunker = connection.dechunker = RequestDechunker(limits.max_body_bytes, limits.max_head_bytes)
        data, connection.rest = connection.rest, b""
        try:
            dechunker.feed(data)
            while not dechunker.done:
                dechunker.feed(await self._read(READ_BYTES))
        except RequestRefusedError:
            connection.is_spoilt = True
            raise
        connection.dechunker = None
        connection.rest = dechunker.rest
        return dechunker.body


class Response:
    """The answer to one request: ``send`` it whole, or ``start``, ``write`` and ``finish`` it.

    Headers are pairs of bytes, names lowercase; Content-Length, Transfer-Encoding, Connection and Date are the
    server's. For one task at a time. Every method that sends raises ClientDisconnectedError when the client has gone
    or stopped reading, HttpUsageError when called out of order or with headers that cannot be sent. When one of them
    is cancelled, the connection is closed, because an unknown part was sent.
    """

    __slots__ = ("_connection", "_is_bodiless", "_is_chunked", "_missing", "_request", "_state", "status")

    def __init__(self, connection: _Connection, request: Request) -> None:
        self._connection = connection
        self._request = request
        self._state = _NEW
        self._is_chunked = False
        self._is_bodiless = request.method == "HEAD"
        self._missing = -1  # bytes that a declared length still lacks; -1 = none was declared
        self.status = 0
        """The status that was sent; 0 before."""

    @property
    def started(self) -> bool:
        """Whether the status line was sent, so that no other answer can be given."""
        return self._state != _NEW

    @property
    def is_complete(self) -> bool:
        """Whether the whole answer was sent."""
        return self._state == _DONE

    @property
    def is_aborted(self) -> bool:
        """Whether the answer was cut, on purpose or by the client."""
        return self._state == _ABORTED

    async def send(self, status: int, headers: Sequence[tuple[bytes, bytes]] = (), body: bytes = b"") -> None:
        """The whole answer with its Content-Length. To a HEAD request the body is not sent."""
        head = self._head(status, headers, len(body))
        self._state = _DONE
        if self._is_bodiless:
            await self._send(head)
        elif len(body) <= JOIN_BYTES:
            await self._send(head + body)
        else:
            await self._send(head)
            await self._send(body)

    async def start(
        self,
        status: int,
        headers: Sequence[tuple[bytes, bytes]] = (),
        data: bytes = b"",
        *,
        content_length: int | None = None,
    ) -> None:
        """The head, and with it the first ``data``, in one system call.

        Without ``content_length`` the body is chunked (to an HTTP/1.0 client it ends with the connection).
        """
        head = self._head(status, headers, content_length)
        self._state = _STREAMING
        await self._send(head + self._framed(data) if data else head)

    async def write(self, data: bytes) -> None:
        """A part of the body, sent at once; b"" sends nothing."""
        if self._state != _STREAMING:
            raise HttpUsageError("write() belongs between start() and finish()")
        if data:
            await self._send(self._framed(data))

    async def finish(self, data: bytes = b"") -> None:
        """The body's last part and its end, in one system call."""
        if self._state != _STREAMING:
            raise HttpUsageError("finish() belongs behind start(), once")
        framed = self._framed(data) if data else b""
        if self._missing > 0:
            self.abort()
            raise HttpUsageError("the body is shorter than the declared content_length")
        self._state = _DONE
        if self._is_chunked and not self._is_bodiless:
            framed += b"0\r\n\r\n"
        if framed:
            await self._send(framed)

    def abort(self) -> None:
        """Close the connection now, WITHOUT the body's end: the client sees that the answer was cut. Idempotent."""
        if self._state != _ABORTED:
            # A body that ends with the connection would look whole: only a reset tells.
            is_until_close = self._state == _STREAMING and not self._is_chunked and self._missing < 0
            self._state = _ABORTED
            self._connection.close(reset=is_until_close)

    async def _send(self, data: bytes) -> None:
        try:
            await self._connection.wire.send_all(data)
        except WireClosedError as exc:
            self._state = _ABORTED
            raise ClientDisconnectedError("The client closed its connection, or stopped reading.") from exc
        except BaseException:
            self.abort()
            raise

    def _framed(self, data: bytes) -> bytes:
        if self._is_bodiless:
            return b""
        if self._is_chunked:
            return b"%x\r\n%b\r\n" % (len(data), data)
        if self._missing >= 0:
            if len(data) > self._missing:
                self.abort()
                raise HttpUsageError("the body is longer than the declared content_length")
            self._missing -= len(data)
        return data

    def _head(self, status: int, headers: Sequence[tuple[bytes, bytes]], content_length: int | None) -> bytes:
        if self._state != _NEW:
            raise HttpUsageError("the request was answered already")
        if not 200 <= status <= 999:
            raise HttpUsageError(f"{status} is not a final status")
        for name, _ in headers:
            if name in _FRAMING or name.lower() in _FRAMING:
                raise HttpUsageError(f"the header {name.decode('latin-1')} is the server's to set")
        try:
            fields = encode_fields(headers)
        except ValueError as exc:
            raise HttpUsageError(str(exc)) from exc
        connection = self._connection
        request = self._request
        if status in (204, 304):
            if content_length and status == 204:
                raise HttpUsageError("an answer with status 204 has no body")
            self._is_bodiless = True
            framing = b""
        elif content_length is not None:
            if not self._is_bodiless:
                self._missing = content_length
            framing = b"content-length: %d\r\n" % content_length
        elif request.is_http11:
            self._is_chunked = True
            framing = b"transfer-encoding: chunked\r\n"
        else:
            connection.keep_alive = False
            framing = b""
        self.status = status
        connection.has_answered = True
        if not connection.may_continue(request):
            framing += b"connection: close\r\n"
        elif not request.is_http11:
            framing += b"connection: keep-alive\r\n"
        line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        return b"%b%b%b%b\r\n" % (line, _Clock.date_line(), framing, fields)


class _Connection:
    """One accepted connection."""

    __slots__ = (
        "client",
        "dechunker",
        "has_answered",
        "is_handling",
        "is_idle",
        "is_spoilt",
        "keep_alive",
        "peer_closed",
        "rest",
        "scope",
        "served",
        "server",
        "wire",
    )

    def __init__(self, server: _Server, sock: socket.socket, client: ClientAddress) -> None:
        self.server = server
        self.client = client
        self.scope = trio.CancelScope()
        self.wire = Wire(sock, server.limits.write_timeout_s, self.scope.cancel)
        self.rest = b""  # read and not used yet
        self.dechunker: RequestDechunker | None = None
        self.served = 0
        self.keep_alive = True  # as far as this request's head and answer go
        self.has_answered = False
        self.is_handling = False
        self.is_idle = False
        self.is_spoilt = False  # where the next request begins is unknown
        self.peer_closed = False

    def on_hangup(self) -> None:
        self.peer_closed = True
        if self.is_handling:
            self.scope.cancel()

    def close(self, *, reset: bool = False) -> None:
        if not self.wire.is_closed:
            self.server.hangups.remove(self.wire.sock)
            if reset:
                self.wire.reset()
            else:
                self.wire.close()

    def may_continue(self, request: Request) -> bool:
        """Whether a further request can follow: decided when the answer's head is written."""
        if self.keep_alive and (self.server.is_closing or not self._is_body_at_hand(request)):
            self.keep_alive = False
        return self.keep_alive

    def _is_body_at_hand(self, request: Request) -> bool:
        if self.is_spoilt:
            return False
        return request.content_length == 0 or request._body is not None or 0 < request.content_length <= len(self.rest)

    async def run(self) -> None:
        server = self.server
        request: Request | None = None
        try:
            with self.scope:
                if server.ssl_context is not None:
                    self.wire.arm("tls", server.limits.head_timeout_s)
                    await self.wire.start_tls(server.ssl_context, server_hostname=None, is_server=True)
                try:
                    while (head := await self._next_head()) is not None:
                        request = await self._serve_one(parse_request_head(head, server.limits.max_headers))
                        if request is None:
                            break
                except RequestRefusedError as exc:
                    await self._refuse(exc)
                if self.rest or self.is_spoilt or not self.wire.is_quiet():
                    await self._linger()
            if self.wire.expired in ("head", "body") and not self.has_answered:
                self.wire.send_nowait(_refusal(RequestRefusedError(408, "timeout", "The request came too slowly.")))
        except WireClosedError:
            pass
        except Exception as exc:  # noqa: BLE001 - the task's end: one bad connection ends itself only
            server.report(exc, request)
        finally:
            self.close()
            server.forget(self)

    async def _next_head(self) -> bytes | None:
        """A complete head with its blank line; None when no further request comes. Raises RequestRefusedError."""
        limits = self.server.limits
        wire = self.wire
        self.has_answered = False
        if not self.rest:
            if self.server.is_closing:
                return None
            wire.arm("idle", limits.idle_timeout_s)
            self.is_idle = True
            self.rest = await wire.receive_some(READ_BYTES, wait_first=self.served > 0)
            self.is_idle = False
            if not self.rest:
                return None
        elif self.served:
            await trio.lowlevel.checkpoint()
        end = self.rest.find(HEAD_END)
        if end < 0:
            pending = bytearray(self.rest)
            judged = 0
            wire.arm("head", limits.head_timeout_s)
            while end < 0:
                fault = early_fault(pending, judged, limits.max_head_bytes)
                if fault is not None:
                    raise fault
                judged = len(pending)
                data = await wire.receive_some(READ_BYTES)
                if not data:
                    self.rest = b""
                    return None
                pending += data
                end = pending.find(HEAD_END, max(0, judged - 3))
            self.rest = bytes(pending)
        wire.disarm()
        end += 4
        head = self.rest[:end]
        if end > limits.max_head_bytes:
            fault = early_fault(head, 0, limits.max_head_bytes)
            assert fault is not None
            raise fault
        self.rest = self.rest[end:]
        return head

    async def _serve_one(self, head: RequestHead) -> Request | None:
        """Answer one request; None when the connection ends with it."""
        server = self.server
        request = Request(self, head)
        response = Response(self, request)
        self.keep_alive = request.keep_alive
        self.is_handling = True
        if self.peer_closed:
            return None
        try:
            refusal = None if server.guard is None else server.guard(request)
            if refusal is not None:
                await response.send(
                    refusal.status, [_JSON], error_body(refusal.status, refusal.message, None, refusal.code)
                )
            elif request.content_length > server.limits.max_body_bytes:
                limit = server.limits.max_body_bytes
                raise RequestRefusedError(413, "body_too_large", f"The body is larger than {limit} bytes.")
            else:
                await server.handler(request, response)
                if not response.started:
                    raise HttpUsageError("the handler returned without an answer")
                if not response.is_complete and not response.is_aborted:
                    response.abort()
                    server.report(HttpUsageError("the handler returned before the answer's end"), request)
        except Exception as exc:  # noqa: BLE001 - whatever the handler does ends its request only; it is reported
            await self._answer_failure(exc, request, response)
        self.is_handling = False
        self.served += 1
        if not self.keep_alive or not response.is_complete:
            if not self._is_body_at_hand(request):
                self.is_spoilt = True
            return None
        if request._body is None and request.content_length:
            self.rest = self.rest[request.content_length :]
        return request

    async def _answer_failure(self, exc: Exception, request: Request, response: Response) -> None:
        if _is_disconnect(exc):
            response.abort()
            return
        refused = exc
        if not isinstance(refused, RequestRefusedError):
            self.server.report(exc, request)
            refused = RequestRefusedError(500, "internal", "The node failed to answer this request.")
        if response.started:
            response.abort()
            return
        status = refused.http_status
        if status != 500:
            self.keep_alive = False
        try:
            await response.send(status, [_JSON], error_body(status, refused.message, None, refused.code))
        except ClientDisconnectedError:
            response.abort()

    async def _refuse(self, exc: RequestRefusedError) -> None:
        self.is_spoilt = True
        self.wire.disarm()
        await self.wire.send_all(_refusal(exc))

    async def _linger(self) -> None:
        wire = self.wire
        if wire.is_closed:
            return
        self.is_idle = True
        wire.arm("linger", LINGER_S)
        await wire.send_eof()
        budget = LINGER_BYTES
        while budget > 0:
            data = await wire.receive_some(READ_BYTES)
            if not data:
                break
            budget -= len(data)


class _Server:
    """What the connections of one ``serve`` call share."""

    def __init__(
        self,
        handler: Handler,
        limits: HttpLimits,
        guard: Guard | None,
        on_error: OnError | None,
        ssl_context: ssl.SSLContext | None,
    ) -> None:
        self.handler = handler
        self.limits = limits
        self.guard = guard
        self.on_error = on_error
        self.ssl_context = ssl_context
        self.scheme = "http" if ssl_context is None else "https"
        self.hangups = HangupWatch()
        self.sweeper = Sweeper(
            min(limits.head_timeout_s, limits.body_timeout_s, limits.idle_timeout_s, limits.write_timeout_s, LINGER_S)
        )
        self.connections: set[_Connection] = set()
        self.is_closing = False
        self.drained = trio.Event()

    def report(self, exc: BaseException, request: Request | None) -> None:
        if _is_disconnect(exc):
            return
        if self.on_error is not None:
            self.on_error(exc, request)
        else:
            _logger.error("http_handler_failed", exc_info=exc)

    def forget(self, connection: _Connection) -> None:
        self.connections.discard(connection)
        self.sweeper.wires.discard(connection.wire)
        if self.is_closing and not self.connections:
            self.drained.set()

    def admit(self, sock: socket.socket, address: object, is_unix: bool) -> _Connection | None:
        if len(self.connections) >= self.limits.max_connections:
            with sock:
                sock.setblocking(False)
                if self.ssl_context is None:
                    words = "Too many connections are open."
                    with contextlib.suppress(OSError):
                        sock.send(_refusal(RequestRefusedError(503, "too_many_connections", words)))
            return None
        client: ClientAddress = "unix"
        if not is_unix:
            assert isinstance(address, tuple)
            client = (address[0], address[1])
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(self, sock, client)
        self.connections.add(connection)
        self.sweeper.wires.add(connection.wire)
        self.hangups.add(sock, connection.on_hangup)
        return connection

    async def accept(self, listener: Listener, nursery: trio.Nursery) -> None:
        sock = listener.sock
        while True:
            await trio.lowlevel.wait_readable(sock)
            for _ in range(ACCEPT_BATCH):
                try:
                    accepted, address = sock.accept()
                except (BlockingIOError, InterruptedError):
                    break
                except OSError as exc:
                    if exc.errno in _NO_RESOURCES:
                        self.report(exc, None)
                        await trio.sleep(ACCEPT_PAUSE_S)
                        break
                    continue  # that one connection was gone before it was taken
                try:
                    connection = self.admit(accepted, address, listener.is_unix)
                except OSError:
                    accepted.close()
                    continue
                if connection is not None:
                    nursery.start_soon(connection.run)


def _refusal(exc: RequestRefusedError) -> bytes:
    status = exc.http_status
    body = error_body(status, exc.message, None, exc.code)
    return b"%b%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (
        _STATUS_LINES[status],
        _Clock.date_line(),
        len(body),
        body,
    )


def _is_disconnect(exc: BaseException) -> bool:
    if isinstance(exc, BaseExceptionGroup):
        return exc.split(ClientDisconnectedError)[1] is None
    return isinstance(exc, ClientDisconnectedError)


async def serve(
    listeners: Iterable[Listener],
    handler: Handler,
    *,
    limits: HttpLimits | None = None,
    guard: Guard | None = None,
    on_error: OnError | None = None,
    shutdown: trio.Event | None = None,
    grace_s: float = 30.0,
    ssl_context: ssl.SSLContext | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve ``listeners`` until ``shutdown`` is set, or the surrounding scope is cancelled.

    ``limits``: default ``HttpLimits()``. ``guard``: sees every request's head first; what it returns is the answer.
    ``on_error``: told of handlers' exceptions and of lacking file descriptors; without it they are logged. ``grace_s``:
    seconds that requests under way get after ``shutdown``; idle connections are closed at once, and when it has passed
    the rest is cut, whatever their clients do. ``task_status.started()`` means that connections are accepted.
    Returns after a shutdown. Raises nothing of its own. The listeners are this call's and closed when it ends;
    cancelled, it cuts every connection without grace.
    """
    listeners = list(listeners)
    server = _Server(handler, limits or HttpLimits(), guard, on_error, ssl_context)
    if shutdown is None:
        shutdown = trio.Event()
    try:
        async with trio.open_nursery() as watches:
            watches.start_soon(server.sweeper.run)
            watches.start_soon(server.hangups.run)
            async with trio.open_nursery() as nursery:
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(server.accept, listener, nursery)
                    task_status.started()
                    await shutdown.wait()
                    accepting.cancel_scope.cancel()
                server.is_closing = True
                for listener in listeners:
                    listener.close()
                for connection in list(server.connections):
                    if connection.is_idle:
                        connection.scope.cancel()
                if server.connections:
                    with trio.move_on_after(grace_s):
                        await server.drained.wait()
                for connection in list(server.connections):
                    connection.scope.cancel()
            watches.cancel_scope.cancel()
    finally:
        for listener in listeners:
            listener.close()
        server.hangups.close()

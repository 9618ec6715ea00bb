"""Pooled HTTP/1.1 client on trio for OpenAI-compatible backends.

A body is complete only when its framing says so; anything else raises. Leaving a response before its end closes the
connection at once: that is how a cancellation reaches the backend. The pool decides synchronously which connection a
request gets and what is closed; only connecting awaits.
Source: RFC 9112 sections 6 and 9; httpcore's connection pool.
"""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Final
from urllib.parse import unquote

import trio

from lloom_sidecar.http.chunked import ResponseDechunker
from lloom_sidecar.http.errors import (
    BadResponseError,
    BodyTooLargeError,
    HttpClientError,
    HttpConnectError,
    HttpTimeoutError,
    IncompleteBodyError,
    RemoteClosedError,
)
from lloom_sidecar.http.heads import (
    CHUNKED,
    HEAD_END,
    UNTIL_CLOSE,
    Headers,
    ResponseHead,
    encode_fields,
    parse_response_head,
    wire_name,
)
from lloom_sidecar.http.limits import READ_BYTES, ClientLimits
from lloom_sidecar.http.wire import Phase, Sweeper, Wire, WireClosedError

MAX_INTERIM_RESPONSES: Final = 16
"""1xx answers that are skipped before the final one."""
JOIN_BYTES: Final = 65_536
"""Up to this size a body is joined to its head and sent by one system call; beyond, the copy costs more."""

_BASE: Final = re.compile(
    r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~-]+)(?::([0-9]{1,5}))?(/[!-~]*)?", re.IGNORECASE
)
_TARGET: Final = re.compile(rb"/[!-\"$-~]*")
_METHOD: Final = re.compile(rb"[A-Z]+")
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding", b"connection", b"host"})


class _Address:
    """Where a base URL leads."""

    def __init__(self, base: str) -> None:
        """Raises ValueError with a sentence."""
        self.base = base
        self.unix_path: str | None = None
        self.is_tls = False
        self.host = "localhost"
        self.port = 0
        prefix = ""
        if base.startswith("unix:"):
            path = base.removeprefix("unix:")
            if path.startswith("//"):
                path = path[2:]
            if not path.startswith("/"):
                raise ValueError(f"{base!r} is no backend address: unix: is followed by an absolute path")
            self.unix_path = unquote(path)
            authority = "localhost"
        else:
            match = _BASE.fullmatch(base)
            if match is None or "?" in base or "#" in base:
                raise ValueError(
                    f"{base!r} is no backend address: write http://host:port, https://host:port or unix:/path"
                )
            self.is_tls = match[1].lower() == "https"
            self.host = match[2].strip("[]")
            default_port = 443 if self.is_tls else 80
            self.port = int(match[3]) if match[3] else default_port
            if not 0 < self.port < 65_536:
                raise ValueError(f"{base!r} is no backend address: the port is not between 1 and 65535")
            authority = match[2] if self.port == default_port else f"{match[2]}:{self.port}"
            prefix = (match[4] or "").rstrip("/")
        self.prefix = prefix.encode("ascii")
        self.host_line = b"host: %b\r\n" % authority.encode("ascii")


class _Connection:
    """One connection of the pool. Owner: a request, or the pool while it is idle."""

    __slots__ = ("idle_since", "served", "wire")

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.served = 0
        self.idle_since = 0.0


class HttpClient:
    """Sends requests to one base address. ``run`` must be running while it is used; see also ``open_client``."""

    def __init__(
        self, base: str, *, limits: ClientLimits | None = None, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        """``base``: ``http://host:port[/prefix]``, ``https://...`` or ``unix:/path``; ``ssl_context``: default is the
        system's trust. Raises ValueError with a sentence when ``base`` is none of these.
        """
        self.limits = limits or ClientLimits()
        self._address = _Address(base)
        self._ssl_context = ssl_context
        if self._address.is_tls and ssl_context is None:
            self._ssl_context = ssl.create_default_context()
        self._permits = trio.Semaphore(self.limits.max_connections)
        self._idle: list[_Connection] = []  # the one used last comes first out
        limits = self.limits
        self._sweeper = Sweeper(
            min(
                limits.idle_s,
                limits.connect_timeout_s,
                limits.write_timeout_s,
                limits.first_byte_timeout_s,
                limits.between_bytes_timeout_s,
            )
        )
        self._is_running = False

    @property
    def base(self) -> str:
        """The base address as it was given."""
        return self._address.base

    @property
    def idle_connections(self) -> int:
        """Connections that wait for a request."""
        return len(self._idle)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Enforces the deadlines and closes unused connections, until cancelled; then every connection is closed."""
        if self._is_running:
            raise RuntimeError("the client is running already")
        self._is_running = True
        task_status.started()
        try:
            await self._sweeper.run(self._drop_unused)
        finally:
            self._is_running = False
            self._idle.clear()
            for wire in list(self._sweeper.wires):
                wire.close()
            self._sweeper.wires.clear()

    def request(
        self,
        method: str,
        path: str | bytes,
        headers: Sequence[tuple[bytes, bytes]] = (),
        body: bytes = b"",
    ) -> ClientRequest:
        """An async context manager: ``async with client.request("POST", "/v1/models", ...) as response``.

        ``path`` is encoded already and may have a query; the base's prefix is put in front. ``headers``: pairs of
        bytes; Host, Content-Length, Transfer-Encoding and Connection are the client's. Raises ValueError when method,
        path or headers cannot be sent.

        Entering raises HttpTimeoutError, HttpConnectError, RemoteClosedError, BadResponseError. A connection from
        the pool that turns out dead before the answer's first byte is replaced by a fresh one, once. Cancelled, while
        entering or inside: the connection is closed.
        """
        name = method.encode("latin-1", "replace")
        target = self._address.prefix + (path.encode("latin-1", "replace") if isinstance(path, str) else path)
        if _METHOD.fullmatch(name) is None:
            raise ValueError(f"{method!r} is no method")
        if _TARGET.fullmatch(target) is None:
            raise ValueError(f"{path!r} is no encoded path")
        for field, _ in headers:
            if field.lower() in _FRAMING:
                raise ValueError(f"the header {field.decode('latin-1')} is the client's to set")
        fields = encode_fields(headers)
        length = b"content-length: %d\r\n" % len(body) if body or method in ("POST", "PUT", "PATCH") else b""
        head = b"%b %b HTTP/1.1\r\n%b%b%b\r\n" % (name, target, self._address.host_line, length, fields)
        return ClientRequest(self, head, body, method == "HEAD")

    def _drop_unused(self, now: float) -> None:
        oldest = now - self.limits.idle_s
        for connection in [connection for connection in self._idle if connection.idle_since <= oldest]:
            self._idle.remove(connection)
            self._close(connection)

    def _close(self, connection: _Connection) -> None:
        self._sweeper.wires.discard(connection.wire)
        connection.wire.close()

    def _take_idle(self) -> _Connection | None:
        """A living connection; dead ones that it meets are closed."""
        while self._idle:
            connection = self._idle.pop()
            if connection.wire.is_quiet():
                return connection
            self._close(connection)
        return None

    def _give_back(self, connection: _Connection, *, reusable: bool) -> None:
        if reusable and self._is_running:
            connection.wire.disarm()
            connection.served += 1
            connection.idle_since = trio.current_time()
            self._idle.append(connection)
        else:
            self._close(connection)
        self._permits.release()

    async def _acquire_permit(self) -> None:
        if not self._is_running:
            raise HttpClientError("The HTTP client is not running.")
        try:
            self._permits.acquire_nowait()
        except trio.WouldBlock:
            with trio.move_on_after(self.limits.pool_timeout_s) as scope:
                await self._permits.acquire()
            if scope.cancelled_caught:
                raise HttpTimeoutError(
                    f"No free connection to {self.base} within {self.limits.pool_timeout_s:g} s.", phase="pool"
                ) from None

    async def _connect(self) -> _Connection:
        address = self._address
        seconds = self.limits.connect_timeout_s
        wire: Wire | None = None
        is_connected = False
        try:
            with trio.move_on_after(seconds):
                if address.unix_path is not None:
                    stream = await trio.open_unix_socket(address.unix_path)
                else:
                    stream = await trio.open_tcp_stream(address.host, address.port)
                # The wire takes over the descriptor; trio's wrapper must not close it.
                sock = socket.socket(fileno=stream.socket.detach())
                wire = Wire(sock, self.limits.write_timeout_s)
                if address.unix_path is None:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._ssl_context is not None and address.is_tls:
                    await wire.start_tls(self._ssl_context, server_hostname=address.host, is_server=False)
                is_connected = True
        except (OSError, UnicodeError, WireClosedError) as exc:
            reason: BaseException = exc
            while reason.__cause__ is not None and not isinstance(reason, OSError):
                reason = reason.__cause__
            raise HttpConnectError(f"No connection to {self.base}: {reason}.") from exc
        finally:
            if wire is not None and not is_connected:
                wire.close()
        if wire is None or not is_connected:
            raise HttpTimeoutError(f"No connection to {self.base} within {seconds:g} s.", phase="connect")
        self._sweeper.wires.add(wire)
        return _Connection(wire)


class ClientRequest:
    """One request under way, made by ``HttpClient.request``; an async context manager, to be entered once."""

    __slots__ = ("_body", "_client", "_head", "_is_head", "_response")

    def __init__(self, client: HttpClient, head: bytes, body: bytes, is_head: bool) -> None:
        self._client = client
        self._head = head
        self._body = body
        self._is_head = is_head
        self._response: ClientResponse | None = None

    async def __aenter__(self) -> ClientResponse:
        client = self._client
        await client._acquire_permit()
        connection: _Connection | None = None
        try:
            connection = client._take_idle()
            if connection is not None:
                try:
                    self._response = await self._exchange(connection)
                except RemoteClosedError:
                    client._close(connection)
                    connection = None
                else:
                    return self._response
            connection = await client._connect()
            self._response = await self._exchange(connection)
            return self._response
        except BaseException:
            if connection is not None:
                client._close(connection)
            client._permits.release()
            raise

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        response = self._response
        if response is not None:
            self._response = None
            response._release()

    async def _exchange(self, connection: _Connection) -> ClientResponse:
        """Send, and read the answer's head. Raises RemoteClosedError only when not one byte of an answer came."""
        client = self._client
        limits = client.limits
        wire = connection.wire
        try:
            if len(self._body) <= JOIN_BYTES:
                await wire.send_all(self._head + self._body)
            else:
                await wire.send_all(self._head)
                await wire.send_all(self._body)
        except WireClosedError as exc:
            if wire.expired:
                raise _timeout(client.base, "write", limits.write_timeout_s) from exc
            # It may have answered before it closed, as with 413: the answer decides.
        data = b""
        wire.arm("first_byte", limits.first_byte_timeout_s)
        for _ in range(MAX_INTERIM_RESPONSES):
            head, data = await self._read_head(wire, data)
            if head.status == 101:
                raise BadResponseError("The server switched protocols without being asked.")
            if head.status >= 200:
                wire.disarm()
                return ClientResponse(client, connection, head, data)
        raise BadResponseError("The server sends one interim answer after the other.")

    async def _read_head(self, wire: Wire, data: bytes) -> tuple[ResponseHead, bytes]:
        client = self._client
        limits = client.limits
        end = data.find(HEAD_END)
        while end < 0:
            if len(data) >= limits.max_head_bytes:
                raise BadResponseError(f"The answer's head is larger than {limits.max_head_bytes} bytes.")
            try:
                more = await wire.receive_some(READ_BYTES, wait_first=not data)
            except WireClosedError as exc:
                if wire.expired:
                    raise _timeout(client.base, "first_byte", limits.first_byte_timeout_s) from exc
                if data:
                    raise BadResponseError("The connection broke within the answer's head.") from exc
                raise RemoteClosedError(f"{client.base} broke the connection before it answered.") from exc
            if not more:
                if data:
                    raise BadResponseError("The connection ended within the answer's head.")
                raise RemoteClosedError(f"{client.base} closed the connection before it answered.")
            searched = max(0, len(data) - 3)
            data = data + more if data else more
            end = data.find(HEAD_END, searched)
        end += 4
        if end > limits.max_head_bytes:
            raise BadResponseError(f"The answer's head is larger than {limits.max_head_bytes} bytes.")
        head = parse_response_head(data[:end], limits.max_headers, head_only=self._is_head)
        return head, data[end:]


class ClientResponse:
    """The answer to one request; valid inside the ``async with`` block that gave it, for one task."""

    __slots__ = (
        "_by_name",
        "_client",
        "_connection",
        "_dechunker",
        "_failure",
        "_has_surplus",
        "_keep_alive",
        "_missing",
        "_pending",
        "complete",
        "framed",
        "headers",
        "status",
    )

    def __init__(self, client: HttpClient, connection: _Connection, head: ResponseHead, data: bytes) -> None:
        self._client = client
        self._connection = connection
        self._keep_alive = head.keep_alive
        self._by_name = head.by_name
        self._pending = data  # read and not decoded yet
        self._missing = head.content_length
        self._dechunker = ResponseDechunker() if head.content_length == CHUNKED else None
        self._has_surplus = bool(data) and head.content_length == 0
        self._failure: HttpClientError | None = None
        self.status: int = head.status
        """200 to 999."""
        self.headers: Headers = head.headers
        """In order of arrival: lowercase name, value."""
        self.framed: bool = head.content_length != UNTIL_CLOSE
        """False: the body's end is the connection's, so that a cut cannot be told from an end."""
        self.complete: bool = head.content_length == 0
        """Whether the body's end was seen and verified: ``receive_some`` has nothing more to wait for."""

    def header(self, name: str) -> str | None:
        """A header's value, several joined by ``, ``; None when there is none. ``name`` without regard to case."""
        value = self._by_name.get(wire_name(name))
        return None if value is None else value.decode("latin-1")

    async def receive_some(self) -> bytes:
        """The next part of the body, without its framing, as it arrives; b"" at its verified end, and from then on.

        Raises IncompleteBodyError when the body was cut or its framing is broken, HttpTimeoutError when nothing came
        for ``between_bytes_timeout_s``; then for every further call too. Cancelled: nothing is lost.
        """
        while not self.complete:
            if self._failure is not None:
                raise self._failure
            data = self._pending
            if data:
                self._pending = b""
            else:
                data = await self._read()
            try:
                content = self._decode(data)
            except HttpClientError as exc:
                self._failure = exc
                raise
            if content:
                return content
        return b""

    async def read(self, max_bytes: int) -> bytes:
        """The rest of the body as a whole.

        Raises BodyTooLargeError when it is larger than ``max_bytes`` (from its Content-Length, before it is read, if
        it has one), and what ``receive_some`` raises.
        """
        if self._missing > max_bytes:
            raise BodyTooLargeError(f"The answer is larger than {max_bytes} bytes.")
        parts: list[bytes] = []
        size = 0
        while data := await self.receive_some():
            size += len(data)
            if size > max_bytes:
                raise BodyTooLargeError(f"The answer is larger than {max_bytes} bytes.")
            parts.append(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _read(self) -> bytes:
        client = self._client
        wire = self._connection.wire
        seconds = client.limits.between_bytes_timeout_s
        wire.arm("between_bytes", seconds)
        try:
            return await wire.receive_some(READ_BYTES)
        except WireClosedError as exc:
            if wire.expired:
                self._failure = _timeout(client.base, "between_bytes", seconds)
            else:
                self._failure = IncompleteBodyError("The connection broke within the answer's body.")
            raise self._failure from exc
        finally:
            wire.disarm()

    def _decode(self, data: bytes) -> bytes:
        dechunker = self._dechunker
        if dechunker is not None:
            if not data:
                raise IncompleteBodyError("The connection ended before the body's last chunk.")
            content = dechunker.feed(data)
            if dechunker.done:
                self.complete = True
                self._has_surplus = dechunker.has_surplus
            return content
        if self._missing == UNTIL_CLOSE:
            self.complete = not data
            return data
        if not data:
            raise IncompleteBodyError(f"The connection ended {self._missing} bytes before the body's end.")
        if len(data) > self._missing:
            self._has_surplus = True
            data = data[: self._missing]
        self._missing -= len(data)
        self.complete = self._missing == 0
        return data

    def _release(self) -> None:
        reusable = self.complete and self._keep_alive and self.framed and not self._has_surplus
        if not self.complete and self._failure is None:
            self._failure = IncompleteBodyError("The response was left before its end.")
        self._client._give_back(self._connection, reusable=reusable)


def _timeout(base: str, phase: Phase, seconds: float) -> HttpTimeoutError:
    what = {"write": "took no bytes", "first_byte": "did not answer", "between_bytes": "sent nothing"}[phase]
    return HttpTimeoutError(f"{base} {what} for {seconds:g} s.", phase=phase)


@asynccontextmanager
async def open_client(
    base: str, *, limits: ClientLimits | None = None, ssl_context: ssl.SSLContext | None = None
) -> AsyncIterator[HttpClient]:
    """A running HttpClient for the length of the block; leaving it closes every connection.

    Raises ValueError as HttpClient does.
    """
    client = HttpClient(base, limits=limits, ssl_context=ssl_context)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        try:
            yield client
        except Exception as exc:  # noqa: BLE001 - raised again below, so that no exception group is put around it
            failure = exc
        finally:
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure

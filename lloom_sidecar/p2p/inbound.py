"""Listener for the streams that p2pd hands over: it dials here, says who is calling in one StreamInfo, then pipes."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from lloom_sidecar.errors import ConfigError, DaemonUnavailableError, StartError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p import messages as m
from lloom_sidecar.p2p.connector import ControlConnection, check_socket_path, clear_stale_socket, unix_multiaddr
from lloom_sidecar.p2p.errors import DaemonProtocolError, InboundRefusedError
from lloom_sidecar.p2p.stream import P2PStream

STREAM_INFO_DEADLINE_S: Final = 10.0
"""p2pd writes StreamInfo right after it connects; whoever has not by then is not p2pd."""
MAX_STREAM_INFO_BYTES: Final = 16 * 1024
"""A peer id, an address and a protocol id are some hundred bytes; gossip and DHT ids may be longer."""
_BACKLOG: Final = 1024
_ACCEPT_PAUSE_S: Final = 0.1
"""Pause after the system refused to accept (no file descriptors left)."""
_TRANSIENT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Handler = Callable[[P2PStream], Awaitable[None]]
"""Serves one stream; the stream is closed when it returns or raises."""
OnInboundError = Callable[[Exception, P2PStream | None], None]
"""Told what ended a stream: a handler's exception with its stream, or InboundRefusedError with None."""


async def serve_inbound(
    where: Path | Multiaddr,
    handlers: Mapping[str, Handler],
    *,
    max_streams: int,
    on_error: OnInboundError | None = None,
    task_status: trio.TaskStatus[Multiaddr] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept inbound streams for ever and run ``handlers[protocol]`` on each, in a task of its own.

    ``where``: the path of a unix socket (made here, mode 0600, removed at the end), or an ``/ip4|ip6/.../tcp/...``
    address for a p2pd in another container; on TCP whoever reaches the port can claim to be any peer, so it has to be
    an address that only p2pd reaches. ``max_streams``: streams open at once; those above are closed at once, which the
    far side sees as an end without a word. ``task_status`` gets the address to register with p2pd, once it listens.

    One bad connection (empty, garbage, slow, an unknown protocol) ends itself only; so does a handler that raises.
    Cancelled: every handler is cancelled, every stream closed, the socket's file removed.
    Raises: StartError when somebody else listens there; ConfigError for a path too long or another kind of address.
    """
    path: Path | None = None
    if isinstance(where, Path):
        path = check_socket_path(where, "the socket for inbound streams")
        listener, address = await _listen_unix(path), unix_multiaddr(path)
    else:
        listener = await _listen_tcp(where)
        address = _bound_address(listener)
    server = _Server(handlers, max_streams, on_error)
    try:
        task_status.started(address)
        await server.run(listener)
    finally:
        trio.lowlevel.notify_closing(listener.fileno())
        listener.close()
        if path is not None:
            with suppress(FileNotFoundError):
                os.unlink(path)


class _Server:
    def __init__(self, handlers: Mapping[str, Handler], max_streams: int, on_error: OnInboundError | None) -> None:
        self._handlers = handlers
        self._max_streams = max_streams
        self._on_error = on_error
        self._open = 0

    async def run(self, listener: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(listener.fileno())
                # The whole queue in one turn: a wake-up per connection would cost one event-loop pass each.
                while (sock := await self._accept(listener)) is not None:
                    if self._open >= self._max_streams:
                        sock.close()
                        self._report(
                            InboundRefusedError("limit", f"{self._max_streams} inbound streams are open already"), None
                        )
                        continue
                    self._open += 1
                    nursery.start_soon(self._serve, sock)

    async def _accept(self, listener: socket.socket) -> socket.socket | None:
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return None
        except OSError as exc:
            if exc.errno not in _TRANSIENT:
                raise
            self._report(InboundRefusedError("accept", f"cannot accept a stream: {exc.strerror}"), None)
            await trio.sleep(_ACCEPT_PAUSE_S)
            return None
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    async def _serve(self, sock: socket.socket) -> None:
        stream: P2PStream | None = None
        try:
            stream, handler = await self._introduce(sock)
            await handler(stream)
        except Exception as exc:  # noqa: BLE001 (here a stream's task ends: reported, and that stream only)
            self._report(exc, stream)
        except BaseExceptionGroup as group:
            # A handler's nursery that was cancelled from outside while a child failed.
            failures, rest = group.split(Exception)
            if failures is not None:
                self._report(failures, stream)
            if rest is not None:
                raise rest from None
        finally:
            self._open -= 1
            if stream is not None:
                stream.close()

    async def _introduce(self, sock: socket.socket) -> tuple[P2PStream, Handler]:
        connection = ControlConnection(sock, max_frame_bytes=MAX_STREAM_INFO_BYTES)
        try:
            info, peer = await self._read_info(connection)
            handler = self._handlers.get(info.proto)
            if handler is None:
                raise InboundRefusedError("protocol", f"no handler for an inbound stream of {info.proto[:100]!r}")
            detached, surplus = connection.detach()
        finally:
            connection.close()
        return P2PStream(detached, peer, info.addr, info.proto, surplus), handler

    async def _read_info(self, connection: ControlConnection) -> tuple[m.StreamInfo, PeerId]:
        fault = f"it sent no StreamInfo within {STREAM_INFO_DEADLINE_S:g} s"
        with trio.move_on_after(STREAM_INFO_DEADLINE_S):
            try:
                info = m.parse(m.StreamInfo, await connection.receive())
                return info, PeerId(info.peer)
            except (DaemonUnavailableError, DaemonProtocolError, ValueError) as exc:
                fault = str(exc)
        raise InboundRefusedError("stream_info", f"a connection to the inbound listener was closed: {fault}")

    def _report(self, exc: Exception, stream: P2PStream | None) -> None:
        if self._on_error is not None:
            self._on_error(exc, stream)


async def _listen_unix(path: Path) -> socket.socket:
    await clear_stale_socket(path, "the socket for inbound streams")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.bind(os.fspath(path))
        # Before listen() nobody can connect, so there is no moment in which another user could.
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise StartError(f"cannot listen for inbound streams at {path}: {exc.strerror}") from exc
    return sock


async def _listen_tcp(where: Multiaddr) -> socket.socket:
    target = where.tcp_host_port
    if target is None or where.ip is None:
        raise ConfigError(f"{where} is no address for inbound streams: expected /ip4/<address>/tcp/<port>")
    sock = socket.socket(socket.AF_INET6 if where.ip.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(target)
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise StartError(f"cannot listen for inbound streams at {where}: {exc.strerror}") from exc
    await trio.lowlevel.checkpoint()
    return sock


def _bound_address(listener: socket.socket) -> Multiaddr:
    host, port = listener.getsockname()[:2]
    return Multiaddr.parse(f"/{'ip6' if ':' in host else 'ip4'}/{host}/tcp/{port}")

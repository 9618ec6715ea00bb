"""Opens control connections to p2pd and moves whole frames over them. Deadlines are the caller's, one per call."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from lloom_sidecar.errors import ConfigError, DaemonError, DaemonUnavailableError, StartError
from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.p2p.errors import DaemonProtocolError
from lloom_sidecar.p2p.framing import MAX_FRAME_BYTES, FrameReader, encode_frame

MAX_SOCKET_PATH_BYTES: Final = 103 if sys.platform == "darwin" else 107
"""Longest path of a unix socket without its terminating zero. Source: unix(7), sun_path[108]; Darwin has 104."""
_READ_BYTES: Final = 65536
_BUSY_RETRY_S: Final = 0.005
"""Pause before another try when a unix listener's queue is full; such a socket cannot be polled."""


def check_socket_path(path: Path, what: str) -> Path:
    """``path``, absolute, when a unix socket can have it. ``what`` names it in the fault: ``p2pd's control socket``.

    Raises: ConfigError with the remedy when it is too long.
    """
    full = Path(os.path.abspath(path))
    size = len(os.fsencode(full))
    if size > MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the path of {what} has {size} bytes, and the system allows {MAX_SOCKET_PATH_BYTES} for a socket: {full}; "
            "use a home with a shorter path (--home DIR or LLOOM_HOME)"
        )
    return full


def unix_multiaddr(path: Path) -> Multiaddr:
    """The ``/unix`` multiaddr of a socket's path, made absolute."""
    return Multiaddr.parse(f"/unix{os.path.abspath(path)}")


async def open_socket(address: Multiaddr) -> socket.socket:
    """A connected, non-blocking socket to a ``/unix/...`` or ``/ip4|ip6|dns.../tcp/...`` address.

    The caller sets the deadline and owns the socket; cancelled, nothing stays open.
    Raises: DaemonUnavailableError when nobody answers there; ConfigError for another kind of address.
    """
    try:
        if address.unix_path is not None:
            return await _open_unix(address.unix_path)
        if address.tcp_host_port is not None:
            return await _open_tcp(*address.tcp_host_port)
    except OSError as exc:
        raise DaemonUnavailableError(f"p2pd cannot be reached at {address} ({exc.strerror or exc})") from exc
    raise ConfigError(f"{address} is no control address: expected /unix/<path> or /ip4/<address>/tcp/<port>")


async def _open_unix(path: str) -> socket.socket:
    while True:
        sock = _new_socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except BlockingIOError:
            # EAGAIN: the listener's queue is full. Linux gives no event for that.
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
        await trio.sleep(_BUSY_RETRY_S)


async def _open_tcp(host: str, port: int) -> socket.socket:
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, where = found[0]
    sock = _new_socket(family)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        code = sock.connect_ex(where)
        if code == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock.fileno())
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise
    return sock


def _new_socket(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    return sock


class ControlConnection:
    """One connection to p2pd's control socket. Used by one task at a time; every failure closes it."""

    def __init__(self, sock: socket.socket, *, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        """``sock`` is connected and non-blocking; owned from now on."""
        self._sock: socket.socket | None = sock
        self._reader = FrameReader(max_bytes=max_frame_bytes)

    @classmethod
    async def open(cls, address: Multiaddr) -> ControlConnection:
        """See ``open_socket``."""
        return cls(await open_socket(address))

    @property
    def closed(self) -> bool:
        """True once it cannot be used any more."""
        return self._sock is None

    def limit_frames(self, max_bytes: int) -> None:
        """Longest frame accepted from here on."""
        self._reader.set_limit(max_bytes)

    def is_quiet(self) -> bool:
        """True when it may be used for another request: open, nothing buffered, nothing sent by p2pd unasked."""
        if self._sock is None or not self._reader.is_empty:
            return False
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    async def send(self, body: bytes) -> None:
        """Send one frame.

        Cancelled: the connection is closed.
        Raises: DaemonUnavailableError; FrameTooLargeError (nothing was sent, the connection stays usable).
        """
        frame = memoryview(encode_frame(body))
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            while frame:
                sock = self._open_socket()
                try:
                    frame = frame[sock.send(frame) :]
                except (BlockingIOError, InterruptedError):
                    await trio.lowlevel.wait_writable(sock.fileno())
        except (OSError, trio.ClosedResourceError) as exc:
            self.close()
            raise DaemonUnavailableError(f"p2pd closed the control connection ({exc})") from exc
        except BaseException:
            self.close()
            raise

    async def receive(self) -> bytes:
        """The next frame's body.

        Cancelled: the connection is closed, since an answer may be half read.
        Raises: DaemonUnavailableError at the end; FrameTooLargeError, DaemonProtocolError. Each closes the connection.
        """
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            return await self._receive()
        except BaseException:
            self.close()
            raise

    async def receive_resumable(self) -> bytes:
        """Like ``receive``, but a cancelled call takes nothing and the connection stays usable (for subscriptions)."""
        await trio.lowlevel.checkpoint()
        try:
            return await self._receive()
        except (DaemonUnavailableError, DaemonProtocolError):
            self.close()
            raise

    async def wait_readable(self) -> None:
        """Return when p2pd sent something or closed the connection; ``is_quiet`` is False then. Cancelled: no effect.

        Raises: DaemonUnavailableError when this side closes it meanwhile.
        """
        try:
            await trio.lowlevel.wait_readable(self._open_socket().fileno())
        except trio.ClosedResourceError as exc:
            raise DaemonUnavailableError("the control connection was closed") from exc

    def detach(self) -> tuple[socket.socket, bytes]:
        """Give the socket away, with the bytes received behind the last frame. The connection counts as closed."""
        sock = self._open_socket()
        self._sock = None
        return sock, self._reader.take_rest()

    def close(self) -> None:
        """Close now; idempotent. A task that waits on it gets DaemonUnavailableError."""
        sock, self._sock = self._sock, None
        if sock is not None:
            trio.lowlevel.notify_closing(sock.fileno())
            sock.close()

    async def _receive(self) -> bytes:
        while True:
            body = self._reader.next_frame()
            if body is not None:
                return body
            sock = self._open_socket()
            try:
                data = sock.recv(_READ_BYTES)
            except (BlockingIOError, InterruptedError):
                try:
                    await trio.lowlevel.wait_readable(sock.fileno())
                except trio.ClosedResourceError as exc:
                    raise DaemonUnavailableError("the control connection was closed") from exc
                continue
            except OSError as exc:
                raise DaemonUnavailableError(f"p2pd closed the control connection ({exc.strerror or exc})") from exc
            if not data:
                raise DaemonUnavailableError("p2pd closed the control connection")
            self._reader.feed(data)

    def _open_socket(self) -> socket.socket:
        if self._sock is None:
            raise DaemonUnavailableError("the control connection is closed")
        return self._sock


async def clear_stale_socket(path: Path, what: str, *, wait_s: float = 0.0) -> None:
    """Remove the file that a killed process left at ``path``. A socket that somebody answers on is left alone.

    ``what`` names it in the fault. ``wait_s``: how long an answering process may take to go away.
    Raises: StartError when somebody still answers, or when the file is no socket.
    """
    deadline = trio.current_time() + wait_s
    while True:
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise StartError(f"{path} is in the way of {what} and is no socket: move it elsewhere")
        if not await _is_answered(path):
            with suppress(FileNotFoundError):
                os.unlink(path)
            return
        if trio.current_time() >= deadline:
            raise StartError(
                f"another process answers on {what}, {path}: end it (it may be a second lloom-sidecar with this home), "
                "or use another home"
            )
        await trio.sleep(0.05)


async def _is_answered(path: Path) -> bool:
    try:
        with trio.fail_after(2):
            connection = await ControlConnection.open(unix_multiaddr(path))
    except trio.TooSlowError:
        return True
    except DaemonError:
        return False
    connection.close()
    return True

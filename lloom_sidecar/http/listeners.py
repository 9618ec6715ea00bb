"""Listening sockets, TCP and unix, opened so that a failure names the address."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import Final

import trio

from lloom_sidecar.http.errors import ListenError

BACKLOG: Final = 1024
"""Connections that may wait to be accepted; the kernel cuts it to net.core.somaxconn."""
MAX_UNIX_PATH_BYTES: Final = 107
"""Longest path of a unix socket. Source: unix(7), sun_path of 108 bytes with its NUL."""


class Listener:
    """A bound, listening, non-blocking socket. ``serve`` takes it over and closes it."""

    def __init__(self, sock: socket.socket, address: str, unix_path: str | None = None) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.address = address
        """For people: ``127.0.0.1:4880``, ``[::1]:4880``, ``unix:/run/admin.sock``."""
        self._unix_path = unix_path
        self._unix_inode = os.stat(unix_path).st_ino if unix_path is not None else -1

    @property
    def is_unix(self) -> bool:
        """Whether it is a unix socket."""
        return self._unix_path is not None

    @property
    def port(self) -> int:
        """The TCP port in use; 0 for a unix socket."""
        return 0 if self.is_unix else int(self.sock.getsockname()[1])

    def close(self) -> None:
        """Stop listening, and remove the unix socket's file if it is still ours. Idempotent."""
        if self.sock.fileno() >= 0:
            if self._unix_path is not None:
                with contextlib.suppress(OSError):
                    if os.stat(self._unix_path).st_ino == self._unix_inode:
                        os.unlink(self._unix_path)
            # Outside a trio run there is nobody to notify.
            with contextlib.suppress(RuntimeError):
                trio.lowlevel.notify_closing(self.sock)
            self.sock.close()


def _reason(exc: OSError) -> str:
    if exc.errno == errno.EADDRINUSE:
        return "the address is already in use"
    return (exc.strerror or str(exc)).lower()


async def open_tcp_listeners(host: str, port: int) -> list[Listener]:
    """Listen on every address that ``host`` (name, IPv4 or IPv6 address) stands for; port 0 = a free one, the same for
    all.

    Raises ListenError, which names the address. On failure or cancellation nothing stays open.
    """
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = await trio.socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
    except (OSError, UnicodeError) as exc:
        raise ListenError(f"cannot listen on {shown}: {exc}") from exc
    listeners: list[Listener] = []
    try:
        for family, kind, proto, _, sockaddr in found:
            bind_to: tuple[object, ...] = sockaddr
            if port == 0 and listeners:
                bind_to = (sockaddr[0], listeners[0].port, *sockaddr[2:])
            try:
                sock = socket.socket(family, kind, proto)
            except OSError as exc:
                if exc.errno == errno.EAFNOSUPPORT:
                    continue
                raise
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(bind_to)
                sock.listen(BACKLOG)
            except OSError as exc:
                sock.close()
                # A name such as localhost may stand for ::1 where IPv6 is off.
                if exc.errno == errno.EADDRNOTAVAIL and len(found) > 1:
                    continue
                raise
            bound = sock.getsockname()
            name = f"[{bound[0]}]:{bound[1]}" if family == socket.AF_INET6 else f"{bound[0]}:{bound[1]}"
            listeners.append(Listener(sock, name))
    except OSError as exc:
        for listener in listeners:
            listener.close()
        raise ListenError(exc.errno, f"cannot listen on {shown}: {_reason(exc)}") from exc
    if not listeners:
        raise ListenError(errno.EADDRNOTAVAIL, f"cannot listen on {shown}: this machine has no such address")
    return listeners


def _bind_unix(path: str, mode: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # bind() creates the file with the mode that the umask leaves: it is never wider than asked, not even for a moment.
    umask = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
    except OSError:
        sock.close()
        raise
    finally:
        os.umask(umask)
    try:
        os.chmod(path, mode)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        os.unlink(path)
        raise
    return sock


def _is_answered(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:
            return True  # a full backlog: somebody listens
        except (ConnectionRefusedError, FileNotFoundError):
            return False
    return True


def open_unix_listener(path: str, mode: int = 0o600) -> Listener:
    """Listen on a unix socket at ``path`` with permissions ``mode``.

    A socket file left over by a dead process is replaced; one that somebody answers on, and any other kind of file,
    is not touched. The folder must exist. Raises ListenError, which names the path.
    """
    path = os.fspath(path)
    shown = f"unix:{path}"
    if len(os.fsencode(path)) > MAX_UNIX_PATH_BYTES:
        raise ListenError(
            errno.ENAMETOOLONG, f"cannot listen on {shown}: the path is longer than {MAX_UNIX_PATH_BYTES} bytes"
        )
    try:
        try:
            sock = _bind_unix(path, mode)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                raise ListenError(errno.EEXIST, f"cannot listen on {shown}: there is a file that is no socket") from exc
            if _is_answered(path):
                raise ListenError(errno.EADDRINUSE, f"cannot listen on {shown}: another process answers there") from exc
            os.unlink(path)
            sock = _bind_unix(path, mode)
    except ListenError:
        raise
    except OSError as exc:
        raise ListenError(exc.errno, f"cannot listen on {shown}: {_reason(exc)}") from exc
    return Listener(sock, shown, path)

"""Listening sockets: who may reach them, what a busy address says."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from lloom_sidecar.http.errors import ListenError
from lloom_sidecar.http.listeners import open_tcp_listeners, open_unix_listener


async def test_a_busy_port_is_named() -> None:
    (first,) = await open_tcp_listeners("127.0.0.1", 0)
    with pytest.raises(ListenError, match=rf"127\.0\.0\.1:{first.port}: the address is already in use") as caught:
        await open_tcp_listeners("127.0.0.1", first.port)
    assert caught.value.errno == errno.EADDRINUSE
    first.close()
    first.close()
    (second,) = await open_tcp_listeners("127.0.0.1", first_port := int(first.address.rpartition(":")[2]))
    assert second.port == first_port
    second.close()


async def test_all_addresses_of_a_name_get_the_same_port() -> None:
    listeners = await open_tcp_listeners("localhost", 0)
    assert len({listener.port for listener in listeners}) == 1
    for listener in listeners:
        listener.close()


async def test_an_unknown_name_is_named() -> None:
    with pytest.raises(ListenError, match=r"no\.\.name:1"):
        await open_tcp_listeners("no..name", 1)
    with pytest.raises(ListenError):
        await open_tcp_listeners("192.0.2.1", 0)


@pytest.mark.parametrize("mode", [0o600, 0o660])
async def test_the_unix_socket_has_exactly_its_mode(tmp_path: Path, mode: int) -> None:
    path = str(tmp_path / "s")
    listener = open_unix_listener(path, mode)
    assert stat.S_IMODE(os.stat(path).st_mode) == mode
    assert (listener.address, listener.port, listener.is_unix) == (f"unix:{path}", 0, True)
    listener.close()
    assert not os.path.exists(path)


async def test_a_stale_unix_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.close()
    listener = open_unix_listener(path)
    with pytest.raises(ListenError, match="another process answers there"):
        open_unix_listener(path)
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    listener.close()


async def test_a_file_that_is_no_socket_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ListenError, match="no socket"):
        open_unix_listener(str(path))
    assert path.read_text() == "precious"


async def test_a_successors_socket_is_not_removed(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    first = open_unix_listener(path)
    os.rename(path, path + ".old")
    second = open_unix_listener(path)
    first.close()
    assert os.path.exists(path)
    second.close()


async def test_unusable_paths(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="longer than 107 bytes"):
        open_unix_listener("/" + "x" * 107)
    with pytest.raises(ListenError, match="no such file"):
        open_unix_listener(str(tmp_path / "missing" / "s"))

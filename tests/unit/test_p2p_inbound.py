"""The inbound listener: one bad connection ends itself only."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lloom_sidecar.errors import ConfigError, StartError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p import messages as m
from lloom_sidecar.p2p.connector import MAX_SOCKET_PATH_BYTES, open_socket, unix_multiaddr
from lloom_sidecar.p2p.errors import InboundRefusedError
from lloom_sidecar.p2p.framing import encode_frame
from lloom_sidecar.p2p.inbound import Handler, _Server, serve_inbound
from lloom_sidecar.p2p.stream import P2PStream

PEER = PeerId.from_ed25519(bytes(32))
ADDR = Multiaddr.parse("/ip4/10.0.0.1/tcp/4001")


def info(protocol: str = "/echo") -> bytes:
    return encode_frame(m.serialize(m.StreamInfo(peer=PEER.raw, addr=ADDR.raw, proto=protocol)))


async def echo(stream: P2PStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


class Listener:
    """A running listener, with what it reported."""

    def __init__(self, address: Multiaddr, errors: list[tuple[Exception, P2PStream | None]]) -> None:
        self.address = address
        self.errors = errors

    async def dial(self, first: bytes = b"") -> trio.SocketStream:
        raw = await open_socket(self.address)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(raw))
        if first:
            await stream.send_all(first)
        return stream

    async def echoes(self) -> None:
        async with await self.dial(info() + b"ping") as stream:
            assert await stream.receive_some() == b"ping"

    def reasons(self) -> list[str]:
        return [exc.reason for exc, stream in self.errors if isinstance(exc, InboundRefusedError) and stream is None]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lloom-") as name:
        yield Path(name)


async def listen(
    nursery: trio.Nursery, where: Path | Multiaddr, handlers: Mapping[str, Handler], max_streams: int = 8
) -> Listener:
    errors: list[tuple[Exception, P2PStream | None]] = []

    async def run(*, task_status: trio.TaskStatus[Multiaddr]) -> None:
        await serve_inbound(
            where,
            handlers,
            max_streams=max_streams,
            on_error=lambda exc, stream: errors.append((exc, stream)),
            task_status=task_status,
        )

    return Listener(await nursery.start(run), errors)


@pytest.fixture
async def listener(nursery: trio.Nursery, directory: Path) -> Listener:
    return await listen(nursery, directory / "in.sock", {"/echo": echo})


async def test_stream_info_and_first_bytes_in_one_piece_or_in_many(listener: Listener) -> None:
    await listener.echoes()
    async with await listener.dial() as stream:
        for byte in info() + b"p":
            await stream.send_all(bytes([byte]))
        assert await stream.receive_some() == b"p"
    assert listener.errors == []


@pytest.mark.parametrize(
    "first",
    [
        b"\xff" * 10,
        encode_frame(b"\xff\xff"),
        encode_frame(b""),
        b"\x81\x80\x01",
        encode_frame(m.serialize(m.StreamInfo(peer=b"nobody", addr=b"", proto="/echo"))),
    ],
)
async def test_garbage_ends_itself_only(listener: Listener, first: bytes) -> None:
    async with await listener.dial(first) as stream:
        assert await stream.receive_some() == b""
    assert listener.reasons() == ["stream_info"]
    await listener.echoes()


async def test_an_empty_connection_ends_itself_only(listener: Listener) -> None:
    await (await listener.dial()).aclose()
    await listener.echoes()
    assert listener.reasons() == ["stream_info"]


async def test_who_says_nothing_is_closed_at_the_deadline(
    listener: Listener, mock_clock: MockClock, directory: Path
) -> None:
    async with await listener.dial(info()[:3]) as stream:
        await wait_all_tasks_blocked(0.01)
        mock_clock.jump(9.9)
        await wait_all_tasks_blocked(0.01)
        assert listener.errors == []
        mock_clock.jump(0.2)
        assert await stream.receive_some() == b""
    assert "within 10 s" in str(listener.errors[0][0])


async def test_unknown_protocol(listener: Listener) -> None:
    async with await listener.dial(info("/other")) as stream:
        assert await stream.receive_some() == b""
    assert listener.reasons() == ["protocol"]


async def test_a_handlers_exception_is_reported_with_its_stream(nursery: trio.Nursery, directory: Path) -> None:
    async def broken(stream: P2PStream) -> None:
        raise RuntimeError("handler")

    async def broken_below(stream: P2PStream) -> None:
        async with trio.open_nursery() as children:
            children.start_soon(broken, stream)
            await trio.sleep_forever()

    listener = await listen(nursery, directory / "in.sock", {"/a": broken, "/b": broken_below, "/echo": echo})
    for protocol in ("/a", "/b"):
        async with await listener.dial(info(protocol)) as stream:
            assert await stream.receive_some() == b""
    (first, stream_a), (second, stream_b) = listener.errors
    assert isinstance(first, RuntimeError)
    assert isinstance(second, ExceptionGroup)
    assert stream_a is not None
    assert stream_a.closed
    assert stream_b is not None
    await listener.echoes()


async def test_a_failure_during_cancellation_is_reported_and_the_rest_goes_on(directory: Path) -> None:
    async def stubborn(stream: P2PStream) -> None:
        async with trio.open_nursery() as children:
            children.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise RuntimeError("at the end")

    async with trio.open_nursery() as nursery:
        listener = await listen(nursery, directory / "in.sock", {"/s": stubborn})
        stream = await listener.dial(info("/s"))
        await wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    assert len(listener.errors) == 1
    await stream.aclose()


async def test_over_the_limit(nursery: trio.Nursery, directory: Path) -> None:
    listener = await listen(nursery, directory / "in.sock", {"/echo": echo}, max_streams=1)
    async with await listener.dial(info() + b"x") as first:
        assert await first.receive_some() == b"x"
        async with await listener.dial() as second:
            assert await second.receive_some() == b""
        assert listener.reasons() == ["limit"]
    await wait_all_tasks_blocked(0.01)
    await listener.echoes()


async def test_cancelled_closes_streams_and_removes_the_socket(directory: Path) -> None:
    path = directory / "in.sock"
    async with trio.open_nursery() as nursery:
        listener = await listen(nursery, path, {"/echo": echo})
        stream = await listener.dial(info() + b"x")
        assert await stream.receive_some() == b"x"
        assert path.stat().st_mode & 0o777 == 0o600
        nursery.cancel_scope.cancel()
    assert await stream.receive_some() == b""
    assert not path.exists()
    await stream.aclose()


async def test_a_stale_socket_is_replaced(nursery: trio.Nursery, directory: Path) -> None:
    path = directory / "in.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(path))
    listener = await listen(nursery, path, {"/echo": echo})
    await listener.echoes()


async def test_a_socket_that_answers_is_left_alone(listener: Listener, directory: Path) -> None:
    with pytest.raises(StartError, match="another process answers"):
        await serve_inbound(directory / "in.sock", {}, max_streams=1)
    await listener.echoes()


async def test_a_file_in_the_way(directory: Path) -> None:
    path = directory / "in.sock"
    path.write_text("precious")
    with pytest.raises(StartError, match="is no socket"):
        await serve_inbound(path, {}, max_streams=1)
    assert path.read_text() == "precious"


async def test_no_directory(directory: Path) -> None:
    with pytest.raises(StartError, match="No such file"):
        await serve_inbound(directory / "none" / "in.sock", {}, max_streams=1)


async def test_a_path_too_long(directory: Path) -> None:
    path = directory / ("x" * MAX_SOCKET_PATH_BYTES)
    with pytest.raises(ConfigError, match=f"allows {MAX_SOCKET_PATH_BYTES}.*--home"):
        await serve_inbound(path, {}, max_streams=1)


@pytest.mark.parametrize("text", ["/ip4/127.0.0.1/tcp/0", "/ip6/::1/tcp/0"])
async def test_tcp(nursery: trio.Nursery, text: str) -> None:
    listener = await listen(nursery, Multiaddr.parse(text), {"/echo": echo})
    assert listener.address.tcp_host_port is not None
    await listener.echoes()


async def test_tcp_port_in_use(nursery: trio.Nursery) -> None:
    listener = await listen(nursery, Multiaddr.parse("/ip4/127.0.0.1/tcp/0"), {})
    with pytest.raises(StartError, match="in use"):
        await serve_inbound(listener.address, {}, max_streams=1)


async def test_no_address_for_a_listener() -> None:
    with pytest.raises(ConfigError):
        await serve_inbound(unix_multiaddr(Path("/x")), {}, max_streams=1)


class NoDescriptors:
    """A listening socket while the process has no file descriptors left."""

    def accept(self) -> None:
        raise OSError(errno.EMFILE, "Too many open files")


async def test_no_file_descriptors_left_is_reported_and_waited_out(autojump_clock: MockClock) -> None:
    errors: list[Exception] = []
    server = _Server({}, 1, lambda exc, stream: errors.append(exc))
    started = trio.current_time()
    assert await server._accept(cast("socket.socket", NoDescriptors())) is None
    assert trio.current_time() - started >= 0.1
    assert [getattr(exc, "reason", None) for exc in errors] == ["accept"]

"""P2PStream on a socket pair: ends, surplus, cancellation."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p.errors import StreamClosedError
from lloom_sidecar.p2p.stream import P2PStream

PEER = PeerId.from_ed25519(bytes(32))
ADDR = Multiaddr.parse("/ip4/10.0.0.1/tcp/4001")
RELAYED = Multiaddr.parse(f"/ip4/10.0.0.1/tcp/4001/p2p/{PEER}/p2p-circuit")

Pair = tuple[P2PStream, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)
    stream = P2PStream(near, PEER, ADDR.raw, "/test/1")
    yield stream, far
    near.close()
    far.close()


def with_surplus(surplus: bytes, raw_addr: bytes = ADDR.raw) -> Pair:
    near, far = socket.socketpair()
    near.setblocking(False)
    return P2PStream(near, PEER, raw_addr, "/test/1", surplus), far


class TestReceive:
    async def test_bytes_then_the_end(self, pair: Pair) -> None:
        stream, far = pair
        far.send(b"hello")
        assert await stream.receive_some() == b"hello"
        far.send(b"abc")
        assert await stream.receive_some(2) == b"ab"
        far.close()
        assert await stream.receive_some() == b"c"
        assert await stream.receive_some() == b""
        assert stream.receive_nowait() == b""

    async def test_waits_for_the_first_byte(self, pair: Pair) -> None:
        stream, far = pair
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                assert await stream.receive_some() == b"later"

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            far.send(b"later")

    async def test_nowait(self, pair: Pair) -> None:
        stream, far = pair
        assert stream.receive_nowait() is None
        far.send(b"x")
        assert stream.receive_nowait() == b"x"

    async def test_a_reset_is_the_end(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = socket.create_connection(server.getsockname())
            far, _ = server.accept()
        near.setblocking(False)
        stream = P2PStream(near, PEER, ADDR.raw, "/test/1")
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        far.close()
        assert await stream.receive_some() == b""
        with pytest.raises(StreamClosedError):
            await stream.send_all(b"x")
        assert stream.closed

    async def test_surplus_comes_first_in_any_portions(self) -> None:
        stream, far = with_surplus(b"surplus")
        far.send(b" and more")
        assert await stream.receive_some(4) == b"surp"
        assert stream.receive_nowait() == b"lus"
        assert await stream.receive_some() == b" and more"
        stream.close()
        far.close()

    async def test_cancelled_takes_nothing(self, pair: Pair) -> None:
        stream, far = pair
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.receive_some()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:

            async def cancelled_while_waiting() -> None:
                await stream.receive_some()

            nursery.start_soon(cancelled_while_waiting)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        far.send(b"kept")
        assert await stream.receive_some() == b"kept"
        assert not stream.closed

    async def test_a_stream_with_much_to_read_lets_others_run(self, pair: Pair) -> None:
        stream, far = pair
        far.send(bytes(1000))
        turns = []

        async def other() -> None:
            while True:
                turns.append(1)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(64):
                assert await stream.receive_some(1)
            nursery.cancel_scope.cancel()
        assert len(turns) >= 3


class TestSend:
    async def test_all_of_it_arrives_although_the_reader_is_slow(self, pair: Pair) -> None:
        stream, far = pair
        payload = bytes(range(256)) * 8000
        received = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, payload)
            while len(received) < len(payload):
                await trio.lowlevel.wait_readable(far.fileno())
                received += far.recv(50_000)
        assert received == payload

    async def test_nothing_is_sent_of_nothing(self, pair: Pair) -> None:
        stream, _ = pair
        await stream.send_all(b"")
        assert not stream.closed

    async def test_closed_there(self, pair: Pair) -> None:
        stream, far = pair
        far.close()
        with pytest.raises(StreamClosedError):
            await stream.send_all(b"x")
        with pytest.raises(StreamClosedError, match="this stream is closed"):
            await stream.send_all(b"x")

    async def test_cancelled_before_the_first_byte_changes_nothing(self, pair: Pair) -> None:
        stream, far = pair
        with trio.CancelScope() as scope:
            scope.cancel()
            await stream.send_all(b"x")
        assert not stream.closed
        with pytest.raises(BlockingIOError):
            far.recv(1)

    async def test_cancelled_in_mid_send_closes_the_stream(self, pair: Pair) -> None:
        stream, _ = pair
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(10_000_000))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert stream.closed

    async def test_cancelled_while_nothing_of_it_was_taken_keeps_the_stream(self, pair: Pair) -> None:
        stream, _ = pair
        while stream._send_nowait(bytes(10_000)):
            pass
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(10_000))
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert not stream.closed

    async def test_two_writers_are_a_bug(self, pair: Pair) -> None:
        stream, _ = pair
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(10_000_000))
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await stream.send_all(b"x")
            nursery.cancel_scope.cancel()


class TestSendNowait:
    async def test_all_at_once(self, pair: Pair) -> None:
        stream, far = pair
        assert stream.send_nowait(b"ping")
        assert far.recv(10) == b"ping"

    async def test_a_full_socket_keeps_the_stream(self, pair: Pair) -> None:
        stream, _ = pair
        while stream.send_nowait(bytes(10_000)):
            pass
        assert not stream.closed
        assert not stream.send_nowait(bytes(10_000))
        assert not stream.closed

    async def test_half_a_frame_closes_the_stream(self, pair: Pair) -> None:
        stream, _ = pair
        assert not stream.send_nowait(bytes(10_000_000))
        assert stream.closed

    async def test_closed_here_or_there(self, pair: Pair) -> None:
        stream, far = pair
        far.close()
        assert not stream.send_nowait(b"x")
        assert stream.closed
        assert not stream.send_nowait(b"x")

    async def test_another_task_is_sending(self, pair: Pair) -> None:
        stream, _ = pair
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, bytes(10_000_000))
            await wait_all_tasks_blocked()
            assert not stream.send_nowait(b"x")
            assert not stream.closed
            nursery.cancel_scope.cancel()


class TestClose:
    async def test_is_at_once_and_idempotent(self, pair: Pair) -> None:
        stream, far = pair
        assert stream.fileno() >= 0
        stream.close()
        stream.close()
        assert (stream.closed, stream.fileno()) == (True, -1)
        assert far.recv(1) == b""
        assert await stream.receive_some() == b""
        assert stream.receive_nowait() == b""

    async def test_forgets_the_surplus(self) -> None:
        stream, far = with_surplus(b"left")
        stream.close()
        far.close()
        assert await stream.receive_some() == b""

    async def test_wakes_a_reader_and_a_writer(self, pair: Pair) -> None:
        stream, _ = pair
        ends: list[object] = []

        async def read() -> None:
            ends.append(await stream.receive_some())

        async def write() -> None:
            with pytest.raises(StreamClosedError):
                await stream.send_all(bytes(10_000_000))
            ends.append("writer")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(write)
            await wait_all_tasks_blocked()
            stream.close()
        assert set(ends) == {b"", "writer"}


class TestWhoIsThere:
    async def test_address(self, pair: Pair) -> None:
        stream, _ = pair
        assert stream.addr == ADDR
        assert not stream.is_relayed
        assert PEER.short() in repr(stream)

    async def test_relayed(self) -> None:
        stream, far = with_surplus(b"", RELAYED.raw)
        assert stream.is_relayed
        stream.close()
        far.close()

    async def test_an_address_nobody_can_read(self) -> None:
        stream, far = with_surplus(b"", b"\xff\xff\x01")
        assert str(stream.addr) == "/unknown/ffff01"
        assert not stream.is_relayed
        stream.close()
        far.close()

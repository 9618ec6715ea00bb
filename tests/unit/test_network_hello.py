"""Hello and catalogue between two services, over fake daemons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lloom_sidecar.errors import DaemonUnavailableError, PeerTimeoutError, PeerUnreachableError, RemoteProtocolError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.network.hello import HELLO_TIMEOUT_S, LINGER_S, Greeted, HelloRefusedError, HelloService
from lloom_sidecar.p2p.daemon import Daemon
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.peers.peerbook import CatalogueItem, CataloguePage
from lloom_sidecar.protocol.hello import MAX_CATALOGUE_BYTES
from lloom_sidecar.protocol.names import PROTOCOL_HELLO
from lloom_sidecar.protocol.network_key import NetworkKey
from lloom_sidecar.protocol.pb import lloom_pb2 as pb
from tests.fakes.fake_nodes import FakeNode, fake_nodes

KEY, OTHER_KEY = NetworkKey(b"k" * 32), NetworkKey(b"o" * 32)
DAY_S = 86_400.0


class Side:
    """One node's service and what it was told."""

    def __init__(
        self,
        node: FakeNode,
        *,
        keys: Sequence[NetworkKey] = (KEY,),
        is_open: bool = False,
        catalogue: Any = None,
        **more: Any,
    ) -> None:
        self.node = node
        self.greeted: list[Greeted] = []
        self.refused: list[tuple[PeerId, str]] = []
        self.software = "lloom/test"
        self.daemon: Daemon | Exception = node.daemon
        self.service = HelloService(
            me=node.peer,
            keys=lambda: keys,
            is_open=is_open,
            node_info=lambda: pb.NodeInfo(roles=[pb.ROLE_EXECUTOR], software=self.software, max_streams=5),
            get_daemon=self._daemon,
            on_greeted=self.greeted.append,
            on_refused=lambda peer, code: self.refused.append((peer, code)),
            catalogue=catalogue,
            **more,
        )

    def _daemon(self) -> Daemon:
        if isinstance(self.daemon, Exception):
            raise self.daemon
        return self.daemon

    async def listen(self) -> None:
        await self.node.serve(PROTOCOL_HELLO, self.service.serve_stream)


class TestGreet:
    async def test_both_sides_know_each_other(self) -> None:
        async with fake_nodes(2) as (a, b):
            here, there = Side(a), Side(b)
            await there.listen()
            greeted = await here.service.greet(b.peer)
            await wait_all_tasks_blocked()
            assert here.greeted == [greeted]
            assert (greeted.peer, greeted.is_member, greeted.network_id) == (b.peer, True, KEY.network_id)
            assert greeted.node.software == "lloom/test"
            assert greeted.rtt_s is not None
            assert greeted.addr == b.p2pd.addr
            (seen,) = there.greeted
            assert (seen.peer, seen.is_member, seen.rtt_s) == (a.peer, True, None)

    @pytest.mark.parametrize("is_open", [(False, False), (True, False), (False, True)])
    async def test_another_network(self, is_open: tuple[bool, bool]) -> None:
        async with fake_nodes(2) as (a, b):
            here, there = Side(a, keys=[OTHER_KEY], is_open=is_open[0]), Side(b, is_open=is_open[1])
            await there.listen()
            with pytest.raises(HelloRefusedError) as caught:
                await here.service.greet(b.peer)
            await wait_all_tasks_blocked()
            assert caught.value.code == "hello_not_member"
            assert here.greeted == there.greeted == []
            assert [code for _, code in here.refused] == ["hello_not_member"]
            assert len(there.refused) == 1

    async def test_strangers_that_are_both_open(self) -> None:
        async with fake_nodes(2) as (a, b):
            here, there = Side(a, keys=[], is_open=True), Side(b, is_open=True)
            await there.listen()
            greeted = await here.service.greet(b.peer)
            assert (greeted.is_member, greeted.network_id) == (False, b"")

    async def test_many_at_once_share_one(self) -> None:
        async with fake_nodes(2) as (a, b):
            here, there = Side(a), Side(b)
            await there.listen()
            outcomes: list[Greeted] = []

            async def greet() -> None:
                outcomes.append(await here.service.greet(b.peer))

            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(greet)
            assert len(here.greeted) == 1
            assert outcomes == 5 * here.greeted
            # The next one is a hello of its own.
            await here.service.greet(b.peer)
            assert len(here.greeted) == 2

    async def test_and_its_failure(self) -> None:
        async with fake_nodes(2) as (a, b):
            here, there = Side(a), Side(b)
            hellos = 0

            async def flaky(stream: P2PStream) -> None:
                nonlocal hellos
                hellos += 1
                if hellos == 1:
                    await stream.receive_some()
                    return
                await there.service.serve_stream(stream)

            await b.serve(PROTOCOL_HELLO, flaky)
            failed = 0

            async def greet() -> None:
                nonlocal failed
                with pytest.raises(PeerUnreachableError):
                    await here.service.greet(b.peer)
                failed += 1

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(greet)
            assert (hellos, failed) == (1, 3)
            await here.service.greet(b.peer)

    async def test_one_that_is_cancelled_is_taken_over(self, autojump_clock: MockClock) -> None:
        async with fake_nodes(2) as (a, b):
            here, there = Side(a), Side(b)
            hellos = 0

            async def slow_at_first(stream: P2PStream) -> None:
                nonlocal hellos
                hellos += 1
                if hellos == 1:
                    await trio.sleep(DAY_S)
                await there.service.serve_stream(stream)

            await b.serve(PROTOCOL_HELLO, slow_at_first)

            async def give_up() -> None:
                with trio.move_on_after(1):
                    await here.service.greet(b.peer)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(give_up)
                await wait_all_tasks_blocked()
                with trio.fail_after(2):
                    await here.service.greet(b.peer)
            assert len(here.greeted) == 1


class TestFailures:
    async def test_a_far_side_that_says_nothing(self, autojump_clock: MockClock) -> None:
        async def mute(stream: P2PStream) -> None:
            await trio.sleep(DAY_S)

        async with fake_nodes(2) as (a, b):
            await b.serve(PROTOCOL_HELLO, mute)
            began_at = trio.current_time()
            with pytest.raises(PeerTimeoutError):
                await Side(a).service.greet(b.peer)
            assert trio.current_time() - began_at == pytest.approx(HELLO_TIMEOUT_S)

    async def test_a_far_side_that_speaks_something_else(self) -> None:
        async def garbage(stream: P2PStream) -> None:
            await stream.send_all(b"\xff" * 20)
            await stream.receive_some()

        async with fake_nodes(2) as (a, b):
            await b.serve(PROTOCOL_HELLO, garbage)
            with pytest.raises(RemoteProtocolError):
                await Side(a).service.greet(b.peer)

    async def test_nobody_there(self) -> None:
        async with fake_nodes(2) as (a, b):
            with pytest.raises(PeerUnreachableError):
                await Side(a).service.greet(b.peer)

    async def test_no_daemon(self) -> None:
        async with fake_nodes(2) as (a, b):
            here = Side(a)
            here.daemon = DaemonUnavailableError("away")
            with pytest.raises(DaemonUnavailableError):
                await here.service.greet(b.peer)

    async def test_cancelled_it_leaves_the_peer_free(self, autojump_clock: MockClock) -> None:
        async with fake_nodes(2) as (a, b):
            here, there = Side(a), Side(b)

            async def mute(stream: P2PStream) -> None:
                await trio.sleep(DAY_S)

            await b.serve(PROTOCOL_HELLO, mute)
            with trio.move_on_after(1):
                await here.service.greet(b.peer)
            await there.listen()
            with trio.fail_after(1):
                await here.service.greet(b.peer)

    async def test_an_opener_that_says_nothing_is_let_go(self, autojump_clock: MockClock) -> None:
        async with fake_nodes(2) as (a, b):
            there = Side(b)
            await there.listen()
            stream = await a.daemon.open_stream(b.peer, PROTOCOL_HELLO)
            began_at = trio.current_time()
            assert await stream.receive_some() == b""
            assert trio.current_time() - began_at == pytest.approx(HELLO_TIMEOUT_S, abs=0.1)
            stream.close()

    @pytest.mark.parametrize("data", [b"\xff" * 20, b"\x00"])
    async def test_an_opener_that_speaks_something_else_is_counted(self, data: bytes) -> None:
        async with fake_nodes(2) as (a, b):
            there = Side(b)
            await there.listen()
            stream = await a.daemon.open_stream(b.peer, PROTOCOL_HELLO)
            await stream.send_all(data)
            assert await stream.receive_some() == b""
            assert [peer for peer, _ in there.refused] == [a.peer]
            stream.close()

    async def test_after_hello_the_stream_stays_for_a_catalogue_but_not_for_ever(
        self, autojump_clock: MockClock
    ) -> None:
        async with fake_nodes(2) as (a, b):
            here, there = Side(a), Side(b)
            ended_at: list[float] = []

            async def serve(stream: P2PStream) -> None:
                await there.service.serve_stream(stream)
                ended_at.append(trio.current_time())

            await b.serve(PROTOCOL_HELLO, serve)
            began_at = trio.current_time()
            async with here.service._opened(b.peer):
                await trio.sleep(LINGER_S + 10)
            assert ended_at[0] - began_at == pytest.approx(LINGER_S, abs=0.1)


class Book:
    """Catalogue pages of numbered entries."""

    def __init__(self, count: int, size: int = 10, per_page: int = 10_000) -> None:
        self.items = [
            CatalogueItem(n, PeerId.from_ed25519(bytes(32)), b"f" * size, b"h", 1.5) for n in range(1, count + 1)
        ]
        self.per_page = per_page
        self.asked: list[tuple[str, int]] = []

    def __call__(self, model: str, since: int) -> CataloguePage:
        self.asked.append((model, since))
        items = [item for item in self.items if item.cursor > since]
        page = items[: self.per_page]
        truncated = len(items) > len(page)
        return CataloguePage(tuple(page), page[-1].cursor if truncated else len(self.items), truncated)


class TestCatalogue:
    async def test_entries_filter_and_cursor(self) -> None:
        async with fake_nodes(2) as (a, b):
            book = Book(3)
            here, there = Side(a), Side(b, catalogue=book)
            await there.listen()
            found = await here.service.read_catalogue(b.peer, model="m", since=1)
            assert book.asked == [("m", 1)]
            assert (len(found.entries), found.cursor, found.truncated) == (2, 3, False)
            entry = found.entries[0]
            assert (entry.announcement, entry.heartbeat, entry.age_ms) == (b"f" * 10, b"h", 1500)
            assert len(here.greeted) == 1

    async def test_a_node_without_one_answers_with_an_empty_one(self) -> None:
        async with fake_nodes(2) as (a, b):
            await Side(b).listen()
            found = await Side(a).service.read_catalogue(b.peer, since=7)
            assert (found.entries, found.cursor, found.truncated) == ([], 7, False)

    async def test_the_source_may_cut_it(self) -> None:
        async with fake_nodes(2) as (a, b):
            await Side(b, catalogue=Book(5, per_page=2)).listen()
            service = Side(a).service
            found = await service.read_catalogue(b.peer)
            assert (len(found.entries), found.cursor, found.truncated) == (2, 2, True)
            found = await service.read_catalogue(b.peer, since=4)
            assert (len(found.entries), found.cursor, found.truncated) == (1, 5, False)

    async def test_the_limit_of_bytes_cuts_it_where_it_can_go_on(self) -> None:
        size = 16_000
        count = MAX_CATALOGUE_BYTES // size + 10
        async with fake_nodes(2) as (a, b):
            await Side(b, catalogue=Book(count, size)).listen()
            service = Side(a).service
            found = await service.read_catalogue(b.peer)
            assert found.truncated
            assert len(found.entries) == found.cursor < count
            rest = await service.read_catalogue(b.peer, since=found.cursor)
            assert (len(rest.entries), rest.truncated) == (count - found.cursor, False)

    async def test_an_end_in_the_middle(self) -> None:
        async with fake_nodes(2) as (a, b):
            there = Side(b)

            class CutError(Exception):
                pass

            def cut(model: str, since: int) -> CataloguePage:
                raise CutError

            there = Side(b, catalogue=cut)
            await there.listen()
            with pytest.raises(PeerUnreachableError):
                await Side(a).service.read_catalogue(b.peer)

    async def test_one_that_never_ends(self, autojump_clock: MockClock) -> None:
        async with fake_nodes(2) as (a, b):
            there = Side(b)
            held = trio.Event()

            async def stall(answerer: Any, stream: P2PStream, asked: Any) -> None:
                await held.wait()

            there.service._send_catalogue = stall  # type: ignore[method-assign]
            await there.listen()
            with pytest.raises((PeerTimeoutError, PeerUnreachableError)):
                await Side(a).service.read_catalogue(b.peer)

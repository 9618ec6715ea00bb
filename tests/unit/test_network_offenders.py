"""Peers that are kept away: by intake, hello, dials, bootstrap and look-ups; and dead records, which cost little."""

from __future__ import annotations

import pytest
import trio
from test_network_services import Sidecar, announcement, sidecars
from trio.testing import MockClock

from lloom_sidecar.errors import PeerUnreachableError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.network.bootstrap import Bootstrap, Validator
from lloom_sidecar.network.connections import Connections
from lloom_sidecar.network.discovery import DEAD_S, Discovery
from lloom_sidecar.network.hello import HelloService
from lloom_sidecar.network.intake import Intake
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.protocol.announcement import MAX_FULL_BYTES
from lloom_sidecar.protocol.envelope import Signer
from lloom_sidecar.protocol.names import PROTOCOL_HELLO, SERVICE_EXECUTOR, service_cid, service_model
from lloom_sidecar.protocol.network_key import NetworkKey

A, B = Signer(b"a" * 32), Signer(b"b" * 32)
KEY = NetworkKey(b"k" * 32)
NOW_MS = 1_790_000_000_000


class TestIntake:
    offences: list[tuple[PeerId, str]]

    def intake(self, side: Sidecar) -> Intake:
        self.offences = []
        return Intake(
            me=side.node.peer,
            book=side.book,
            keys=lambda: [KEY],
            observer=side,
            now_ms=lambda: NOW_MS,
            on_offence=lambda peer, reason: self.offences.append((peer, reason)),
        )

    async def test_forgeries_fall_on_who_published_or_served_them(self) -> None:
        async with sidecars(1) as (side,):
            intake = self.intake(side)
            good = announcement(A)
            forged = good[:-1] + bytes([good[-1] ^ 1])
            intake.take(forged, found_by="gossip", source=None, expected_signer=A.peer)
            intake.take(good, found_by="gossip", source=None, expected_signer=B.peer)
            intake.take(forged, found_by="catalogue", source=B.peer)
            intake.take(b"x" * (MAX_FULL_BYTES + 1), found_by="catalogue", source=B.peer)
            intake.take(b"garbage", found_by="catalogue", source=None)
            assert self.offences == [
                (A.peer, "signature"),
                (B.peer, "publisher"),
                (B.peer, "signature"),
                (B.peer, "size"),
            ]

    async def test_what_an_honest_node_may_do_is_none(self) -> None:
        async with sidecars(1) as (side,):
            intake = self.intake(side)
            intake.take(announcement(A, 2), found_by="gossip", source=None, expected_signer=A.peer)
            for raw in (
                announcement(A, 1),  # reordered
                announcement(A, 3, issued_at_ms=NOW_MS - 20 * 60_000),  # a wrong clock
                announcement(A, 4, key=NetworkKey(b"o" * 32)),  # another network on the same topic
            ):
                assert intake.take(raw, found_by="gossip", source=None, expected_signer=A.peer) is None
            assert side.dropped == ["sequence", "clock", "tag"]
            assert self.offences == []


class TestKeptAway:
    async def test_the_banned_are_neither_greeted_nor_answered(self, autojump_clock: MockClock) -> None:
        async with sidecars(2) as (here, there):
            await there.listen()
            banned: dict[PeerId, str] = {}
            here.hello = HelloService(
                me=here.node.peer,
                keys=lambda: [KEY],
                is_open=False,
                node_info=here.hello._node_info,
                get_daemon=here.get_daemon,
                on_greeted=here.on_greeted,
                on_refused=lambda peer, code: None,
                catalogue=None,
                ban_of=banned.get,
            )
            await here.listen()
            await here.hello.greet(there.node.peer)
            await there.hello.greet(here.node.peer)
            banned[there.node.peer] = "signature"
            with pytest.raises(PeerUnreachableError, match="banned") as caught:
                await here.hello.greet(there.node.peer)
            assert caught.value.code == "kept_away"
            with pytest.raises(PeerUnreachableError, match="closed"):
                await there.hello.greet(here.node.peer)

    async def test_they_are_not_dialled(self) -> None:
        async with sidecars(2) as (here, there):
            connections = Connections(
                get_daemon=here.get_daemon, addrs_of=lambda peer: (), observer=here, keeps_away=lambda peer: "rate"
            )
            with pytest.raises(PeerUnreachableError, match="kept away") as caught:
                await connections.ensure(there.node.peer)
            assert caught.value.code == "kept_away"
            assert here.node.p2pd.requests["CONNECT"] == 0

    async def test_nor_as_validators(self, autojump_clock: MockClock, nursery: trio.Nursery) -> None:
        async with sidecars(2) as (here, there):
            banned = {there.node.peer: "rate"}
            bootstrap = Bootstrap(
                me=here.node.peer,
                validators=[Validator(there.node.peer, (there.node.p2pd.addr,))],
                get_daemon=here.get_daemon,
                connections=here.connections,
                hello=here.hello,
                intake=here.intake,
                observer=here,
                after_join=here.after_join,
                rng=here.bootstrap._rng,
                keeps_away=banned.get,
            )
            await there.listen()
            await nursery.start(bootstrap.run)
            await bootstrap.first_tried(timeout_s=5)
            assert bootstrap.validators[0].last_error.endswith("is kept away (rate)")
            assert here.node.p2pd.requests["CONNECT"] == 0
            banned.clear()
            await trio.sleep(60)
            assert len(here.joined) == 1


async def test_a_retry_does_not_wait_for_the_backoff(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    async with sidecars(2, connected=False) as (here, there):
        here = Sidecar(here.node, validators=[Validator(there.node.peer, (there.node.p2pd.addr,))])
        here.node.p2pd.refuse["CONNECT"] = "nobody there"
        await nursery.start(here.connections.run)
        await nursery.start(here.bootstrap.run)
        await trio.sleep(120)
        before = len(here.failures)
        await here.bootstrap.retry_all(timeout_s=5)
        assert len(here.failures) == before + 1
        assert here.bootstrap.joined == []
        await there.listen()
        here.node.p2pd.refuse.clear()
        began_at = trio.current_time()
        await here.bootstrap.retry_all(timeout_s=5)
        await here.connections.look()
        assert here.bootstrap.joined == [there.node.peer]
        assert trio.current_time() - began_at < 1
        # With every one joined there is nothing to wait for.
        await here.bootstrap.retry_all(timeout_s=5)
        assert trio.current_time() - began_at < 1
        here.node.p2pd.hold.add("CONNECT")
        here.node.p2pd.swarm.cut(here.node.peer, there.node.peer)
        await trio.sleep(3)
        began_at = trio.current_time()
        await here.bootstrap.retry_all(timeout_s=5)
        assert trio.current_time() - began_at == pytest.approx(5)
        nursery.cancel_scope.cancel()


class TestLookUps:
    def discovery(self, side: Sidecar, *, away: set[PeerId], keys: list[str], is_alone: bool = False) -> Discovery:
        return Discovery(
            me=side.node.peer,
            service_keys=lambda: keys,
            get_daemon=side.get_daemon,
            connections=side.connections,
            hello=side.hello,
            book=side.book,
            on_found=side.found_s.append,
            keeps_away=lambda peer: "refused" if peer in away else None,
            is_alone=lambda: is_alone,
        )

    async def test_dead_records_are_tried_once_a_minute_and_hold_nobody_up(self, autojump_clock: MockClock) -> None:
        async with sidecars(2) as (here, there):
            dead = [PeerId.from_ed25519(bytes([number]) * 32) for number in range(100, 115)]
            cid = service_cid(service_model("m"))
            here.node.p2pd.swarm.providers[cid] += dead
            there.mine = announcement(there.node.signer)
            await there.listen()
            await there.node.daemon.provide(cid)
            discovery = self.discovery(here, away=set(), keys=[])
            began_at = trio.current_time()
            await discovery.look_up("m")
            assert trio.current_time() - began_at < 1
            assert len(here.book) == 1
            await discovery._find(service_model("m"), 3.0, lambda: False)
            tried = here.node.p2pd.requests["CONNECT"]
            await discovery._find(service_model("m"), 3.0, lambda: False)
            assert here.node.p2pd.requests["CONNECT"] == tried
            await trio.sleep(DEAD_S + 1)
            await discovery._find(service_model("m"), 3.0, lambda: False)
            assert here.node.p2pd.requests["CONNECT"] == tried + len(dead)

    async def test_while_alone_it_searches_again_soon_then_ever_more_seldom(self, autojump_clock: MockClock) -> None:
        async with sidecars(2) as (here, there), trio.open_nursery() as nursery:
            there.mine = announcement(there.node.signer)
            await there.listen()
            discovery = self.discovery(here, away=set(), keys=[], is_alone=True)
            await nursery.start(lambda task_status: discovery.run(searches=True, task_status=task_status))
            await trio.sleep(5)
            assert here.node.p2pd.requests["DHT FIND_PROVIDERS"] == 3  # at 0, 2 and 4 s: nobody is known
            await there.node.daemon.provide(service_cid(SERVICE_EXECUTOR))
            await trio.sleep(2)
            assert len(here.book) == 1
            await trio.sleep(24)
            assert here.node.p2pd.requests["DHT FIND_PROVIDERS"] == 6  # 6, 10, 18 s
            await trio.sleep(240)
            assert here.node.p2pd.requests["DHT FIND_PROVIDERS"] in (10, 11)
            nursery.cancel_scope.cancel()

    async def test_those_kept_away_are_not_asked(self) -> None:
        async with sidecars(2) as (here, there):
            greeted: list[PeerId] = []

            async def note(stream: P2PStream) -> None:
                greeted.append(stream.peer)

            await there.node.serve(PROTOCOL_HELLO, note)
            await there.node.daemon.provide(service_cid(service_model("m")))
            await self.discovery(here, away={there.node.peer}, keys=[]).look_up("m", timeout_s=0.5)
            assert greeted == []

    async def test_without_a_validator_it_searches_though_it_knows_some(
        self, autojump_clock: MockClock, nursery: trio.Nursery
    ) -> None:
        async with sidecars(1) as (side,):
            side.intake.take(announcement(A, ttl_s=900), found_by="gossip", source=None)
            for is_alone, searches in ((False, 0), (True, 5)):
                side.node.p2pd.requests.clear()
                discovery = self.discovery(side, away=set(), keys=[], is_alone=is_alone)
                with trio.move_on_after(300):
                    await discovery.run(searches=True)
                assert side.node.p2pd.requests["DHT FIND_PROVIDERS"] >= searches
                assert bool(side.node.p2pd.requests["DHT FIND_PROVIDERS"]) is is_alone

    async def test_a_new_model_is_provided_at_once_though_another_record_hangs(
        self, autojump_clock: MockClock, nursery: trio.Nursery
    ) -> None:
        async with sidecars(2) as (here, _):
            keys = ["/old"]
            discovery = self.discovery(here, away=set(), keys=keys)
            here.node.p2pd.hold.add("DHT PROVIDE")
            nursery.start_soon(lambda: discovery.run(searches=False))
            await trio.sleep(5)
            here.node.p2pd.hold.clear()
            keys.append("/new")
            discovery.changed()
            await trio.sleep(1)
            assert here.node.p2pd.swarm.providers[service_cid("/new")] == [here.node.peer]
            assert service_cid("/old") not in here.node.p2pd.swarm.providers
            await trio.sleep(120)
            assert here.node.p2pd.swarm.providers[service_cid("/old")] == [here.node.peer]
            # One that went and came back is provided again.
            count = here.node.p2pd.requests["DHT PROVIDE"]
            keys.remove("/new")
            discovery.changed()
            await trio.sleep(1)
            keys.append("/new")
            discovery.changed()
            await trio.sleep(1)
            assert here.node.p2pd.requests["DHT PROVIDE"] == count + 1
            nursery.cancel_scope.cancel()

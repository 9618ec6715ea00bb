"""Supervised and attached daemons, on real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio
import trio.testing

from lloom_sidecar.errors import ConfigError, DaemonRejectedError, DaemonUnavailableError, StartError
from lloom_sidecar.ids import Multiaddr
from lloom_sidecar.p2p.connector import unix_multiaddr
from lloom_sidecar.p2p.daemon import Daemon, Identity
from lloom_sidecar.p2p.errors import SubscriptionClosedError
from lloom_sidecar.p2p.inbound import serve_inbound
from lloom_sidecar.p2p.leftover import start_time
from lloom_sidecar.p2p.stream import P2PStream
from lloom_sidecar.p2p.supervisor import AttachedDaemon, DaemonSettings, DaemonSupervisor, probe_features
from tests.contract.binaries import (
    Key,
    RealNode,
    free_port,
    make_key,
    p2pd_ours,
    p2pd_upstream,
    settings_for,
    short_dir,
)
from tests.fakes.fake_p2pd import FakeP2pd, FakeSwarm

__all__ = ["p2pd_ours", "p2pd_upstream", "short_dir"]


class Owner:
    """Records what the supervisor tells."""

    def __init__(self) -> None:
        self.ups: list[Identity] = []
        self.downs: list[str] = []
        self.then: Callable[[Daemon], Awaitable[None]] | None = None
        self._changed = trio.Event()

    async def on_up(self, daemon: Daemon, identity: Identity) -> None:
        self.ups.append(identity)
        if self.then is not None:
            await self.then(daemon)
        self._wake()

    def on_down(self, reason: str) -> None:
        self.downs.append(reason)
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, *, ups: int = 0, downs: int = 0) -> None:
        with trio.fail_after(20):
            while len(self.ups) < ups or len(self.downs) < downs:
                await self._changed.wait()


@pytest.fixture
def key(short_dir: Path) -> Key:
    return make_key(short_dir)


@pytest.fixture
def owner() -> Owner:
    return Owner()


@pytest.fixture
def neighbour(p2pd_ours: Path) -> Iterator[RealNode]:
    """Another node, its control socket on TCP."""
    node = RealNode(p2pd_ours, control=f"/ip4/127.0.0.1/tcp/{free_port()}")
    yield node
    node.stop()


def supervisor(settings: DaemonSettings, key: Key, owner: Owner) -> DaemonSupervisor:
    return DaemonSupervisor(settings, expected_peer=key.peer, on_up=owner.on_up, on_down=owner.on_down)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until_gone(pid: int) -> None:
    with trio.fail_after(10):
        while is_alive(pid):
            await trio.sleep(0.01)


async def start_fails(settings: DaemonSettings, key: Key, owner: Owner) -> StartError:
    with trio.fail_after(30), pytest.raises(StartError) as caught:
        await supervisor(settings, key, owner).run()
    assert owner.ups == []
    assert owner.downs == []
    return caught.value


def binary_of(which: str, request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"p2pd_{which}")
    return path


both = pytest.mark.parametrize("which", ["ours", "upstream"])


class TestManaged:
    @both
    async def test_up_then_ended_without_a_trace(
        self, which: str, request: pytest.FixtureRequest, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        settings = settings_for(binary_of(which, request), short_dir, key)
        managed = supervisor(settings, key, owner)
        async with trio.open_nursery() as nursery:
            daemon: Daemon = await nursery.start(managed.run)
            assert managed.daemon is daemon
            assert owner.ups == [managed.identity]
            assert (await daemon.identify()).peer == key.peer
            assert await daemon.missing_services() == ()
            assert managed.is_stock == (which == "upstream")
            assert (managed.version is None) == (which == "upstream")
            assert managed.last_error is None
            assert settings.control_path.stat().st_mode & 0o777 == 0o600
            pid = managed.pid
            assert pid is not None
            assert json.loads(settings.record_path.read_text())["pid"] == pid
            nursery.cancel_scope.cancel()
        assert not is_alive(pid)
        assert managed.pid is None
        assert not settings.control_path.exists()
        assert not settings.record_path.exists()
        assert settings.log_path.stat().st_size > 0
        assert owner.downs == []
        with pytest.raises(DaemonUnavailableError):
            await daemon.identify()

    @both
    async def test_killed_daemon_comes_back_with_its_handlers(
        self,
        which: str,
        request: pytest.FixtureRequest,
        short_dir: Path,
        key: Key,
        owner: Owner,
        neighbour: RealNode,
    ) -> None:
        managed = supervisor(settings_for(binary_of(which, request), short_dir, key), key, owner)
        far = Daemon(neighbour.control)

        async def answer(stream: P2PStream) -> None:
            await stream.send_all(b"hello")
            await stream.receive_some()

        try:
            async with trio.open_nursery() as nursery:
                address = await nursery.start(
                    lambda *, task_status: serve_inbound(
                        short_dir / "in.sock", {"/t": answer}, max_streams=9, task_status=task_status
                    )
                )

                async def register(daemon: Daemon) -> None:
                    await daemon.register_handler("/t", address)

                owner.then = register
                first: Daemon = await nursery.start(managed.run)
                for life in (1, 2):
                    identity = owner.ups[-1]
                    await far.disconnect(key.peer)
                    await far.connect(key.peer, identity.addrs)
                    stream = await far.open_stream(key.peer, "/t")
                    assert await stream.receive_some() == b"hello"
                    if life == 1:
                        assert managed.pid is not None
                        os.kill(managed.pid, signal.SIGKILL)
                        with trio.fail_after(10):
                            assert await stream.receive_some() == b""
                        await owner.until(ups=2, downs=1)
                    stream.close()
                assert owner.downs == ["p2pd was killed by signal 9"]
                assert managed.restarts_total == 1
                assert managed.daemon is not first
                with pytest.raises(DaemonUnavailableError):
                    await first.identify()
                nursery.cancel_scope.cancel()
        finally:
            far.close()

    @both
    async def test_a_daemon_that_hangs_is_replaced(
        self, which: str, request: pytest.FixtureRequest, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        managed = DaemonSupervisor(
            settings_for(binary_of(which, request), short_dir, key),
            expected_peer=key.peer,
            on_up=owner.on_up,
            on_down=owner.on_down,
            hung_s=0.5,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(managed.run)
            pid = managed.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            await owner.until(ups=2, downs=1)
            assert "did not answer within 0.5 s" in owner.downs[0]
            assert not is_alive(pid)
            nursery.cancel_scope.cancel()

    async def test_subscriptions_end_with_the_daemon(
        self, p2pd_ours: Path, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        managed = supervisor(settings_for(p2pd_ours, short_dir, key), key, owner)
        async with trio.open_nursery() as nursery:
            daemon: Daemon = await nursery.start(managed.run)
            async with daemon.subscribe("t") as subscription:
                assert managed.pid is not None
                os.kill(managed.pid, signal.SIGKILL)
                with trio.fail_after(10), pytest.raises(SubscriptionClosedError):
                    await subscription.receive()
            await owner.until(ups=2)
            nursery.cancel_scope.cancel()

    async def test_daemon_errors_of_the_owner_are_a_failed_start_then_a_restart(
        self, p2pd_ours: Path, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        async def refuse(daemon: Daemon) -> None:
            if len(owner.ups) == 2:
                await daemon.find_peer(key.peer, timeout_s=1)

        owner.then = refuse
        managed = supervisor(settings_for(p2pd_ours, short_dir, key), key, owner)
        async with trio.open_nursery() as nursery:
            await nursery.start(managed.run)
            assert managed.pid is not None
            os.kill(managed.pid, signal.SIGKILL)
            await owner.until(ups=3, downs=2)
            assert "FIND_PEER" in owner.downs[1]
            nursery.cancel_scope.cancel()

    async def test_an_owners_own_error_ends_the_supervisor(
        self, p2pd_ours: Path, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        async def fail(daemon: Daemon) -> None:
            raise KeyError("bug")

        owner.then = fail
        with trio.fail_after(20), pytest.raises(KeyError):
            await supervisor(settings_for(p2pd_ours, short_dir, key), key, owner).run()
        assert not (short_dir / "p2pd.sock").exists()

    async def test_the_log_is_rotated_at_each_start(
        self, p2pd_ours: Path, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        settings = settings_for(p2pd_ours, short_dir, key)
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                await nursery.start(supervisor(settings, key, owner).run)
                nursery.cancel_scope.cancel()
        assert settings.log_path.with_name("p2pd.log.1").exists()


class TestStartFailures:
    async def test_missing_binary(self, short_dir: Path, key: Key, owner: Owner) -> None:
        error = await start_fails(settings_for(short_dir / "none", short_dir, key), key, owner)
        assert "there is no p2pd at" in error.message

    async def test_a_binary_that_ends_at_once(self, p2pd_ours: Path, short_dir: Path, key: Key, owner: Owner) -> None:
        script = short_dir / "p2pd"
        script.write_text(
            f'#!/bin/sh\ncase "$1" in -help|-version) exec {p2pd_ours} "$1";; esac\n'
            "echo first; echo the disk is on fire >&2; exit 3\n"
        )
        script.chmod(0o755)
        error = await start_fails(settings_for(script, short_dir, key), key, owner)
        assert error.message == (
            "p2pd ended with exit code 3 at its start: the disk is on fire\n"
            "p2pd's last lines:\n  first\n  the disk is on fire"
        )
        assert error.details["last_lines"] == ["first", "the disk is on fire"]

    async def test_a_binary_that_never_answers(self, p2pd_ours: Path, short_dir: Path, key: Key, owner: Owner) -> None:
        script = short_dir / "p2pd"
        script.write_text(
            f'#!/bin/sh\ncase "$1" in -help|-version) exec {p2pd_ours} "$1";; esac\necho thinking; exec sleep 60\n'
        )
        script.chmod(0o755)
        managed = DaemonSupervisor(
            settings_for(script, short_dir, key),
            expected_peer=key.peer,
            on_up=owner.on_up,
            on_down=owner.on_down,
            ready_s=0.3,
        )
        with trio.fail_after(20), pytest.raises(StartError) as caught:
            await managed.run()
        assert caught.value.message == (
            "p2pd did not answer on its control socket within 0.3 s\np2pd's last lines:\n  thinking"
        )

    @both
    async def test_busy_port(
        self, which: str, request: pytest.FixtureRequest, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            listen = (Multiaddr.parse(f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"),)
            error = await start_fails(
                settings_for(binary_of(which, request), short_dir, key, listen=listen), key, owner
            )
        sentence = error.message.splitlines()[0]
        assert sentence.startswith(f"p2pd cannot listen at {listen[0]}: another program uses the port")
        assert "--listen" in sentence

    @both
    async def test_another_identity(
        self, which: str, request: pytest.FixtureRequest, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        (short_dir / "other").mkdir()
        wrong = make_key(short_dir / "other")
        error = await start_fails(settings_for(binary_of(which, request), short_dir, wrong), key, owner)
        assert str(key.peer) in error.message
        assert str(wrong.peer) in error.message
        assert "-id=" in error.message

    async def test_no_key(self, p2pd_ours: Path, short_dir: Path, key: Key, owner: Owner) -> None:
        key.path.unlink()
        error = await start_fails(settings_for(p2pd_ours, short_dir, key), key, owner)
        assert "identity.key" in error.message.splitlines()[0]

    async def test_socket_path_too_long(self, p2pd_ours: Path, short_dir: Path, key: Key, owner: Owner) -> None:
        deep = short_dir / ("d" * 100)
        deep.mkdir()
        with pytest.raises(ConfigError, match="use a home with a shorter path"):
            await supervisor(settings_for(p2pd_ours, deep, key), key, owner).run()

    async def test_a_second_sidecar_with_the_same_home(
        self, p2pd_ours: Path, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        settings = settings_for(p2pd_ours, short_dir, key)
        async with trio.open_nursery() as nursery:
            first = supervisor(settings, key, Owner())
            await nursery.start(first.run)
            settings.record_path.unlink()
            error = await start_fails(settings, key, owner)
            assert "another process answers on p2pd's control socket" in error.message
            assert first.daemon is not None
            assert (await first.daemon.identify()).peer == key.peer
            nursery.cancel_scope.cancel()


SIDECAR = textwrap.dedent(
    """
    import sys, trio
    from pathlib import Path
    from lloom_sidecar.ids import PeerId
    from lloom_sidecar.p2p.supervisor import DaemonSupervisor
    from tests.contract.binaries import Key, settings_for

    async def main(binary, home, peer):
        key = Key(Path(home) / "identity.key", PeerId.parse(peer))
        async def on_up(daemon, identity):
            print(supervisor.pid, flush=True)
        supervisor = DaemonSupervisor(
            settings_for(Path(binary), Path(home), key), expected_peer=key.peer, on_up=on_up, on_down=print)
        await supervisor.run()

    trio.run(main, *sys.argv[1:])
    """
)


async def killed_sidecar(binary: Path, home: Path, key: Key) -> int:
    """Run a sidecar in a process of its own, kill it with SIGKILL, and return its p2pd's pid."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", SIDECAR, str(binary), str(home), str(key.peer)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    text = b""
    with trio.fail_after(30):
        while not text.strip().isdigit():
            piece = await process.stdout.receive_some()
            assert piece, f"the sidecar ended: {text!r}"
            # The log goes to standard output as well; the pid stands on a line of its own.
            text = next((line for line in (text + piece).splitlines() if line.isdigit()), text + piece)
    process.kill()
    await process.wait()
    await process.stdout.aclose()
    return int(text)


class TestKilledSidecar:
    async def test_our_daemon_ends_with_it(self, p2pd_ours: Path, short_dir: Path, key: Key) -> None:
        pid = await killed_sidecar(p2pd_ours, short_dir, key)
        await until_gone(pid)

    async def test_a_stock_daemon_is_ended_at_the_next_start(
        self, p2pd_upstream: Path, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        pid = await killed_sidecar(p2pd_upstream, short_dir, key)
        assert is_alive(pid)
        managed = supervisor(settings_for(p2pd_upstream, short_dir, key), key, owner)
        async with trio.open_nursery() as nursery:
            await nursery.start(managed.run)
            assert not is_alive(pid)
            assert managed.pid != pid
            nursery.cancel_scope.cancel()

    async def test_a_stock_daemon_that_was_recycled_is_left_alone(
        self, p2pd_upstream: Path, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        pid = await killed_sidecar(p2pd_upstream, short_dir, key)
        settings = settings_for(p2pd_upstream, short_dir, key)
        try:
            record = {"pid": pid, "start_time_ticks": (start_time(pid) or 0) + 1}
            settings.record_path.write_text(json.dumps(record))
            error = await start_fails(settings, key, owner)
            assert "another process answers" in error.message
            assert is_alive(pid)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def test_a_stopped_sidecars_socket_file_does_not_hinder(
        self, p2pd_ours: Path, short_dir: Path, key: Key, owner: Owner
    ) -> None:
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(short_dir / "p2pd.sock"))
        async with trio.open_nursery() as nursery:
            await nursery.start(supervisor(settings_for(p2pd_ours, short_dir, key), key, owner).run)
            nursery.cancel_scope.cancel()


class TestAttached:
    def attached(self, control: Multiaddr, node: FakeP2pd, owner: Owner) -> AttachedDaemon:
        return AttachedDaemon(
            control,
            expected_peer=node.peer,
            on_up=owner.on_up,
            on_down=owner.on_down,
            poll_s=0.05,
            first_answer_s=1.0,
        )

    async def test_follows_a_daemon_that_goes_and_comes_back(self, short_dir: Path, owner: Owner) -> None:
        node = FakeP2pd(FakeSwarm(), control=short_dir / "p2pd.sock")
        follower = self.attached(unix_multiaddr(short_dir / "p2pd.sock"), node, owner)
        async with trio.open_nursery() as nursery:
            # The sidecar's container may start first.
            nursery.start_soon(follower.run)
            await trio.sleep(0.1)
            assert follower.daemon is None
            assert "cannot be reached" in (follower.last_error or "")
            await nursery.start(node.run)
            await owner.until(ups=1)
            await trio.testing.wait_all_tasks_blocked(0.01)
            first = follower.daemon
            assert first is not None
            node.kill()
            await owner.until(downs=1)
            assert "closed its control socket" in owner.downs[0]
            await nursery.start(node.run)
            await owner.until(ups=2)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert follower.daemon is not first
            assert follower.restarts_total == 1
            nursery.cancel_scope.cancel()

    async def test_a_daemon_replaced_at_once_is_noticed(self, short_dir: Path, owner: Owner) -> None:
        node = FakeP2pd(FakeSwarm(), control=short_dir / "p2pd.sock")
        follower = AttachedDaemon(
            unix_multiaddr(short_dir / "p2pd.sock"), expected_peer=node.peer, on_up=owner.on_up, on_down=owner.on_down
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(node.run)
            await nursery.start(follower.run)
            node.kill()
            await trio.testing.wait_all_tasks_blocked()
            await nursery.start(node.run)
            await owner.until(ups=2, downs=1)
            nursery.cancel_scope.cancel()

    async def test_another_identity(self, short_dir: Path, owner: Owner, key: Key) -> None:
        node = FakeP2pd(FakeSwarm(), control=short_dir / "p2pd.sock")
        async with trio.open_nursery() as nursery:
            control = await nursery.start(node.run)
            follower = AttachedDaemon(control, expected_peer=key.peer, on_up=owner.on_up, on_down=owner.on_down)
            with pytest.raises(StartError) as caught:
                await follower.run()
            assert str(key.peer) in caught.value.message
            assert str(node.peer) in caught.value.message
            nursery.cancel_scope.cancel()

    async def test_nobody_answers(self, short_dir: Path, owner: Owner) -> None:
        node = FakeP2pd(FakeSwarm())
        with pytest.raises(StartError, match=r"no usable p2pd at .* within 1 s \(p2pd cannot be reached.*-listen="):
            await self.attached(unix_multiaddr(short_dir / "p2pd.sock"), node, owner).run()

    async def test_a_daemon_without_pubsub(self, short_dir: Path, owner: Owner) -> None:
        node = FakeP2pd(FakeSwarm(), control=short_dir / "p2pd.sock", pubsub=False)
        async with trio.open_nursery() as nursery:
            control = await nursery.start(node.run)
            with pytest.raises(StartError, match="it runs without pubsub"):
                await self.attached(control, node, owner).run()
            nursery.cancel_scope.cancel()
        assert owner.ups == []

    async def test_an_owners_own_error_ends_it(self, short_dir: Path, owner: Owner) -> None:
        async def fail(daemon: Daemon) -> None:
            raise KeyError("bug")

        owner.then = fail
        node = FakeP2pd(FakeSwarm(), control=short_dir / "p2pd.sock")
        async with trio.open_nursery() as nursery:
            control = await nursery.start(node.run)
            with pytest.raises(KeyError):
                await self.attached(control, node, owner).run()
            nursery.cancel_scope.cancel()

    async def test_a_refusal_under_the_owner_is_tried_again(self, short_dir: Path, owner: Owner) -> None:
        async def refused_once(daemon: Daemon) -> None:
            if len(owner.ups) == 1:
                raise DaemonRejectedError("not yet")

        owner.then = refused_once
        node = FakeP2pd(FakeSwarm(), control=short_dir / "p2pd.sock")
        async with trio.open_nursery() as nursery:
            control = await nursery.start(node.run)
            await nursery.start(self.attached(control, node, owner).run)
            assert owner.downs == ["not yet"]
            nursery.cancel_scope.cancel()

    async def test_a_real_daemon_over_tcp(self, neighbour: RealNode, owner: Owner) -> None:
        follower = AttachedDaemon(
            neighbour.control, expected_peer=neighbour.peer, on_up=owner.on_up, on_down=owner.on_down
        )
        async with trio.open_nursery() as nursery:
            daemon: Daemon = await nursery.start(follower.run)
            assert (await daemon.identify()).peer == neighbour.peer
            neighbour.stop()
            await owner.until(downs=1)
            nursery.cancel_scope.cancel()


async def test_what_each_binary_can(p2pd_ours: Path, p2pd_upstream: Path) -> None:
    ours, upstream = await probe_features(p2pd_ours), await probe_features(p2pd_upstream)
    assert upstream < ours
    assert {"exitOnStdinEOF", "psk", "mdns", "holePunch", "streamsPerProtocolPeer", "userAgent"} <= ours - upstream

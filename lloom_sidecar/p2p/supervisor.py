"""Keeps one p2pd running, or follows one that somebody else runs, and tells the owner when it is up and when down."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog
import trio

from lloom_sidecar.errors import DaemonError, DaemonUnavailableError, StartError
from lloom_sidecar.ids import Multiaddr, PeerId
from lloom_sidecar.p2p import messages as m
from lloom_sidecar.p2p.connector import ControlConnection, clear_stale_socket, unix_multiaddr
from lloom_sidecar.p2p.daemon import Daemon, Identity
from lloom_sidecar.p2p.errors import DaemonProtocolError
from lloom_sidecar.p2p.launch import (
    STOCK_CONFIG,
    DaemonSettings,
    build_argv,
    is_stock,
    probe_features,
    probe_version,
    read_note,
)
from lloom_sidecar.p2p.leftover import end_leftover, remove_record, write_record
from lloom_sidecar.p2p.output import OutputTail

__all__ = ["AttachedDaemon", "DaemonSettings", "DaemonSupervisor", "OnDown", "OnUp", "build_argv", "probe_features"]

READY_DEADLINE_S: Final = 20.0
"""From the start of p2pd's process to its answer; it takes 0.1 s on an idle machine."""
BACKOFF_MIN_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
BACKOFF_RESET_S: Final = 60.0
"""Up so long, the next death counts as the first."""
ATTACH_POLL_S: Final = 1.0
"""How often an attached daemon is looked for, and asked whether it is still the same one."""
ATTACH_DEADLINE_S: Final = 60.0
"""How long the first answer of an attached daemon may take: in a pod the containers start in any order."""
_READY_POLL_S: Final = 0.02
_TERM_S: Final = 2.0
"""What p2pd gets between SIGTERM and SIGKILL."""
_WATCH_POLL_S: Final = 5.0
HUNG_S: Final = 30.0
"""A managed p2pd that answers nothing for so long is killed."""
_ANSWER_S: Final = 10.0
_MISSING_IN_ROW: Final = 5
"""So many answers without pubsub or DHT are no start-up any more but a setting."""
_OUTPUT_GRACE_S: Final = 0.5
"""After p2pd's end, for the rest of its output to arrive."""
_UMASK: Final = 0o077
"""p2pd makes its control socket with it, so that there is no moment in which another user can connect."""

_BUSY_PORT: Final = ("address already in use", "port is in use")
"""How a stock p2pd and Lloom's own say it."""

OnUp = Callable[[Daemon, Identity], Awaitable[None]]
"""Awaited at every (re)start, before anybody else learns of it: register handlers, subscribe, dial, announce."""
OnDown = Callable[[str], None]
"""Called with the reason whenever a daemon goes away for which ``OnUp`` was called."""

_log = structlog.get_logger("lloom.p2p")


class _WrongIdentityError(StartError):
    """Not to be retried: the same p2pd would answer the same id."""


class DaemonSupervisor:
    """Managed mode: the p2pd is this node's child."""

    def __init__(
        self,
        settings: DaemonSettings,
        *,
        expected_peer: PeerId,
        on_up: OnUp,
        on_down: OnDown,
        ready_s: float = READY_DEADLINE_S,
        hung_s: float = HUNG_S,
        rng: random.Random | None = None,
    ) -> None:
        """Does no IO. ``expected_peer``: the id of the key in ``settings.identity_file``. ``rng``: for the jitter.

        ``ready_s``: from the start of the process to its answer. ``hung_s``: silence after which it is killed.
        """
        self._settings = settings
        self._expected_peer = expected_peer
        self._on_up = on_up
        self._on_down = on_down
        self._ready_s = ready_s
        self._hung_s = hung_s
        self._rng = rng or random.Random()
        self._features: frozenset[str] = frozenset()
        self._version: str | None = None
        self._daemon: Daemon | None = None
        self._identity: Identity | None = None
        self._process: trio.Process | None = None
        self._tail = OutputTail(None)
        self._up_since: float | None = None
        self._has_been_up = False
        self._restarts = 0
        self._last_error: str | None = None

    @property
    def daemon(self) -> Daemon | None:
        """The running daemon, None while there is none."""
        return self._daemon

    @property
    def identity(self) -> Identity | None:
        """What it answered when it came up."""
        return self._identity

    @property
    def control(self) -> Multiaddr:
        """Where its control socket is."""
        return unix_multiaddr(self._settings.control_path)

    @property
    def features(self) -> frozenset[str]:
        """Flags that the binary knows; empty before ``run`` has asked."""
        return self._features

    @property
    def is_stock(self) -> bool:
        """True for a p2pd without Lloom's additions (NAT traversal, mDNS, raised limits)."""
        return is_stock(self._features)

    @property
    def version(self) -> str | None:
        """The binary's own version line; None for a stock one."""
        return self._version

    @property
    def pid(self) -> int | None:
        """Process id of the p2pd that runs, None while there is none."""
        return None if self._process is None or self._process.returncode is not None else self._process.pid

    @property
    def restarts_total(self) -> int:
        """How often it was started again."""
        return self._restarts

    @property
    def last_error(self) -> str | None:
        """Why it went away or failed to start last; None while all is well."""
        return self._last_error

    @property
    def last_lines(self) -> tuple[str, ...]:
        """p2pd's last lines of output."""
        return tuple(self._tail.lines)

    async def run(self, *, task_status: trio.TaskStatus[Daemon] = trio.TASK_STATUS_IGNORED) -> None:
        """Start p2pd and restart it whenever it dies, until cancelled. Started once the first ``on_up`` has returned.

        Cancelled: p2pd gets SIGTERM, after 2 s SIGKILL; its socket and record are removed.
        Raises: StartError when the first start fails (one sentence, then p2pd's last lines) and whenever the daemon
        answers another id than expected; ConfigError; what ``on_up`` raises, except DaemonErrors after the first start.
        """
        self._features = await probe_features(self._settings.binary)
        self._version = await probe_version(self._settings.binary, self._features)
        argv = build_argv(self._settings, self._features)
        ended = await end_leftover(self._settings.record_path, self._settings.control_path, self._expected_peer)
        if ended is not None:
            _log.warning("p2pd_leftover_ended", pid=ended)
        backoff_s = BACKOFF_MIN_S
        try:
            while True:
                reason = await self._run_once(argv, task_status)
                self._last_error = reason
                up_s = 0.0 if self._up_since is None else trio.current_time() - self._up_since
                self._up_since = None
                backoff_s = BACKOFF_MIN_S if up_s >= BACKOFF_RESET_S else backoff_s
                pause_s = backoff_s * self._rng.uniform(0.5, 1.0)
                _log.warning("p2pd_down", reason=reason, up_s=round(up_s, 1), restart_in_s=round(pause_s, 2))
                await trio.sleep(pause_s)
                backoff_s = min(BACKOFF_MAX_S, backoff_s * 2)
                self._restarts += 1
        finally:
            remove_record(self._settings.record_path)
            self._tail.close()

    async def _run_once(self, argv: list[str], task_status: trio.TaskStatus[Daemon]) -> str:
        """One life of p2pd; returns why it ended."""
        life = _Life()
        failure: Exception | None = None
        daemon = Daemon(self.control)
        self._process = None
        try:
            await clear_stale_socket(self._settings.control_path, "p2pd's control socket", wait_s=_TERM_S)
            self._process = process = await self._spawn(argv)
            async with trio.open_nursery() as nursery:
                drained = trio.Event()
                nursery.start_soon(self._drain, process, drained)
                nursery.start_soon(_cancel_at_exit, process, drained, nursery.cancel_scope)
                try:
                    await self._live(daemon, life, task_status)
                except Exception as exc:  # noqa: BLE001 (judged below, outside the nursery)
                    failure = exc
                nursery.cancel_scope.cancel()
        except ExceptionGroup as group:
            failure = group
        except StartError as exc:
            failure = exc
        finally:
            daemon.close()
            self._daemon = None
            life.exit_code = None if self._process is None else self._process.returncode
            await self._end_process()
        return self._judge(life, failure)

    async def _live(self, daemon: Daemon, life: _Life, task_status: trio.TaskStatus[Daemon]) -> None:
        """Runs until p2pd hangs; is cancelled when p2pd ends."""
        with trio.move_on_after(self._ready_s):
            life.identity = await self._wait_ready(daemon)
        if life.identity is None:
            return
        _check_identity(life.identity, self._expected_peer, f"the key in {self._settings.identity_file}")
        with suppress(OSError):
            os.chmod(self._settings.control_path, self._settings.control_mode)
        life.is_announced = True
        await self._on_up(daemon, life.identity)
        self._daemon = daemon
        self._identity = life.identity
        self._up_since = trio.current_time()
        self._last_error = None
        if not self._has_been_up:
            self._has_been_up = True
            task_status.started(daemon)
        _log.info("p2pd_up", pid=self.pid, peer=str(life.identity.peer), stock=self.is_stock)
        life.hung_reason = await _watch(
            self.control, self._expected_peer, poll_s=min(_WATCH_POLL_S, self._hung_s), answer_s=self._hung_s
        )
        # A closed control connection is how a dying p2pd looks from here: its exit says more.
        await trio.sleep(1)

    async def _wait_ready(self, daemon: Daemon) -> Identity:
        while True:
            try:
                identity = await daemon.identify(timeout_s=_ANSWER_S)
                # A starting p2pd answers IDENTIFY before its pubsub is there.
                if "pubsub" not in await daemon.missing_services():
                    return identity
            except DaemonUnavailableError:
                pass
            await trio.sleep(_READY_POLL_S)

    def _judge(self, life: _Life, failure: Exception | None) -> str:
        """The reason for the end of one life, or the exception that ends the supervisor. Calls ``on_down``."""
        reason = _explain_end(life, self.last_lines, self._settings, self._ready_s)
        if failure is not None and not isinstance(failure, ExceptionGroup):
            reason = str(failure) if not isinstance(failure, DaemonUnavailableError) else reason
        if life.is_announced:
            self._on_down(reason)
        if failure is not None and not _is_retryable(failure):
            raise _unwrapped(failure)
        if not self._has_been_up:
            raise StartError(
                _with_lines(reason, self.last_lines), details={"last_lines": list(self.last_lines)}
            ) from failure
        return reason

    async def _spawn(self, argv: list[str]) -> trio.Process:
        if is_stock(self._features):
            self._settings.stock_config_path.write_text(STOCK_CONFIG, encoding="ascii")
        self._tail.close()
        self._tail = OutputTail(self._settings.log_path)
        try:
            process = await trio.lowlevel.open_process(
                argv,
                stdin=subprocess.DEVNULL if is_stock(self._features) else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._settings.environment},
                # Ctrl-C in a terminal is for the sidecar, which drains before it ends p2pd.
                start_new_session=True,
                umask=_UMASK,
            )
        except OSError as exc:
            raise StartError(f"p2pd cannot be started ({exc.strerror}): {self._settings.binary}") from exc
        write_record(self._settings.record_path, process.pid)
        return process

    async def _drain(self, process: trio.Process, drained: trio.Event) -> None:
        assert process.stdout is not None
        try:
            async for data in process.stdout:
                self._tail.feed(bytes(data))
            self._tail.feed(b"")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            drained.set()

    async def _end_process(self) -> None:
        process = self._process
        if process is None:
            return
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:
                if process.returncode is None:
                    # Somebody has to read: a stock p2pd logs without end while it closes.
                    nursery.start_soon(self._drain, process, trio.Event())
                    process.terminate()
                    with trio.move_on_after(_TERM_S):
                        await process.wait()
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
                nursery.cancel_scope.cancel()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    await pipe.aclose()
        with suppress(OSError):
            self._settings.control_path.unlink()


class AttachedDaemon:
    """Attached mode: somebody else runs p2pd (another container); this follows it."""

    def __init__(
        self,
        control: Multiaddr,
        *,
        expected_peer: PeerId,
        on_up: OnUp,
        on_down: OnDown,
        poll_s: float = ATTACH_POLL_S,
        first_answer_s: float = ATTACH_DEADLINE_S,
    ) -> None:
        """Does no IO. ``poll_s``: how often it is asked; ``first_answer_s``: deadline of the first answer."""
        self._control = control
        self._expected_peer = expected_peer
        self._on_up = on_up
        self._on_down = on_down
        self._poll_s = poll_s
        self._first_answer_s = first_answer_s
        self._daemon: Daemon | None = None
        self._identity: Identity | None = None
        self._features: frozenset[str] = frozenset()
        self._version: str | None = None
        self._has_been_up = False
        self._missing_in_row = 0
        self._reconnects = -1
        self._last_error: str | None = None

    @property
    def daemon(self) -> Daemon | None:
        """The daemon while it answers, None otherwise."""
        return self._daemon

    @property
    def identity(self) -> Identity | None:
        """What it answered when it came up last."""
        return self._identity

    @property
    def control(self) -> Multiaddr:
        """Where its control socket is."""
        return self._control

    @property
    def features(self) -> frozenset[str]:
        """Its flags, when ``lloom-sidecar p2pd`` started it and said so beside its socket; else empty."""
        return self._features

    @property
    def is_stock(self) -> bool:
        """True for an unknown daemon too: it is trusted with a stock one's limits only."""
        return is_stock(self._features)

    @property
    def version(self) -> str | None:
        """Its version, when it is known as ``features`` are."""
        return self._version

    @property
    def pid(self) -> int | None:
        """None: it is somebody else's process."""
        return None

    @property
    def restarts_total(self) -> int:
        """How often it came back."""
        return max(0, self._reconnects)

    @property
    def last_error(self) -> str | None:
        """Why it went away last; None while all is well."""
        return self._last_error

    @property
    def last_lines(self) -> tuple[str, ...]:
        """Empty: its output goes elsewhere."""
        return ()

    async def run(self, *, task_status: trio.TaskStatus[Daemon] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the daemon until cancelled. Started once the first ``on_up`` has returned.

        Cancelled: the daemon runs on; this node's control connections are closed.
        Raises: StartError when nobody answers within ``first_answer_s`` at first, when it runs without pubsub or DHT
        at first, and whenever it answers another id than expected; what ``on_up`` raises, except DaemonErrors.
        """
        give_up_at = trio.current_time() + self._first_answer_s
        while True:
            reason = await self._follow(task_status)
            if reason != self._last_error:
                _log.warning("p2pd_down", reason=reason, control=str(self._control))
            self._last_error = reason
            is_hopeless = self._missing_in_row >= _MISSING_IN_ROW or trio.current_time() >= give_up_at
            if not self._has_been_up and is_hopeless:
                raise StartError(
                    f"no usable p2pd at {self._control} within {self._first_answer_s:g} s ({reason}): start it with "
                    f"-listen={self._control} -pubsub -dhtServer and the same identity, or leave --p2pd-control out"
                )
            await trio.sleep(self._poll_s)

    async def _follow(self, task_status: trio.TaskStatus[Daemon]) -> str:
        """One connection to the daemon, from its first answer to its last; returns why it ended."""
        daemon = Daemon(self._control)
        reason = ""
        failure: Exception | None = None
        is_announced = False
        try:
            identity = await daemon.identify()
            _check_identity(identity, self._expected_peer, "this node's own key")
            missing = await daemon.missing_services()
            self._missing_in_row = self._missing_in_row + 1 if missing else 0
            if missing:
                return f"it runs without {' and '.join(missing)}"
            if self._control.unix_path is not None:
                note = await trio.to_thread.run_sync(read_note, Path(self._control.unix_path))
                self._features, self._version = note
            is_announced = True
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    nonlocal reason
                    reason = await _watch(self._control, self._expected_peer, poll_s=self._poll_s, answer_s=_ANSWER_S)
                    nursery.cancel_scope.cancel()

                # Watched from before on_up: what on_up registers must be lost on nobody's watch.
                nursery.start_soon(watch)
                try:
                    await self._on_up(daemon, identity)
                    self._come_up(daemon, identity, task_status)
                except Exception as exc:  # noqa: BLE001 (judged below, outside the nursery)
                    failure = exc
                    nursery.cancel_scope.cancel()
        except ExceptionGroup as group:
            failure = group
        except DaemonError as exc:
            failure = exc
        finally:
            daemon.close()
            self._daemon = None
            if is_announced:
                self._on_down(reason or str(failure or "it went away"))
        if failure is not None and not _is_retryable(failure):
            raise _unwrapped(failure)
        return reason or str(failure)

    def _come_up(self, daemon: Daemon, identity: Identity, task_status: trio.TaskStatus[Daemon]) -> None:
        self._daemon = daemon
        self._identity = identity
        self._last_error = None
        self._reconnects += 1
        _log.info("p2pd_up", control=str(self._control), peer=str(identity.peer))
        if not self._has_been_up:
            self._has_been_up = True
            task_status.started(daemon)


class _Life:
    """What is known about one life of p2pd."""

    def __init__(self) -> None:
        self.identity: Identity | None = None
        self.is_announced = False
        self.hung_reason: str | None = None
        self.exit_code: int | None = None
        """None when it had to be ended."""


async def _cancel_at_exit(process: trio.Process, drained: trio.Event, scope: trio.CancelScope) -> None:
    await process.wait()
    with trio.move_on_after(_OUTPUT_GRACE_S):
        await drained.wait()
    scope.cancel()


async def _watch(control: Multiaddr, expected: PeerId, *, poll_s: float, answer_s: float) -> str:
    """Ask IDENTIFY over one connection of its own until that fails; returns the reason.

    One connection, so that a daemon which was replaced between two questions is noticed by its closing.
    Raises: StartError when the answer is another id.
    """
    try:
        with trio.fail_after(answer_s):
            connection = await ControlConnection.open(control)
    except (trio.TooSlowError, DaemonUnavailableError):
        return f"p2pd cannot be reached at {control}"
    question = m.serialize(m.Request(type=m.Request.IDENTIFY))
    try:
        while True:
            with trio.fail_after(answer_s):
                await connection.send(question)
                response = m.parse(m.Response, await connection.receive())
            peer = PeerId(response.identify.id)
            _check_identity(Identity(peer, ()), expected, "this node's own key")
            with trio.move_on_after(poll_s):
                await connection.wait_readable()
                return f"p2pd at {control} closed its control socket"
    except trio.TooSlowError:
        return f"p2pd at {control} did not answer within {answer_s:g} s"
    except (DaemonUnavailableError, DaemonProtocolError, ValueError) as exc:
        return f"p2pd at {control} went away ({exc})"
    finally:
        connection.close()


def _check_identity(identity: Identity, expected: PeerId, whose: str) -> None:
    if identity.peer != expected:
        raise _WrongIdentityError(
            f"p2pd is {identity.peer}, but {whose} is {expected}: start p2pd with -id=<the node's identity.key>, or "
            "give this node the home that belongs to that p2pd",
            details={"daemon": str(identity.peer), "expected": str(expected)},
        )


def _leaves(failure: BaseException) -> list[BaseException]:
    if isinstance(failure, BaseExceptionGroup):
        return [leaf for child in failure.exceptions for leaf in _leaves(child)]
    return [failure]


def _is_retryable(failure: Exception) -> bool:
    """True for what another start of p2pd may cure."""
    return all(
        isinstance(leaf, (DaemonError, StartError)) and not isinstance(leaf, _WrongIdentityError)
        for leaf in _leaves(failure)
    )


def _unwrapped(failure: Exception) -> Exception:
    """The one exception in nested groups of one, so that callers see StartError and not a group around it."""
    leaves = _leaves(failure)
    only = leaves[0]
    return only if len(leaves) == 1 and isinstance(only, Exception) else failure


def _explain_end(life: _Life, lines: Sequence[str], settings: DaemonSettings, ready_s: float) -> str:
    """One sentence on why p2pd is not there."""
    text = " ".join(lines)
    code = life.exit_code
    if code is None:
        if life.identity is None:
            return f"p2pd did not answer on its control socket within {ready_s:g} s"
        return life.hung_reason or "p2pd was ended"
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if life.identity is not None:
        return f"p2pd {how}"
    if any(words in text for words in _BUSY_PORT):
        where = ", ".join(str(addr) for addr in settings.listen)
        return (
            f"p2pd cannot listen at {where}: another program uses the port (perhaps a second node on this machine); "
            "end it or choose another port with --listen"
        )
    last = lines[-1] if lines else "it printed nothing"
    return f"p2pd {how} at its start: {last}"


def _with_lines(sentence: str, lines: Sequence[str]) -> str:
    if not lines:
        return sentence
    return "\n  ".join((f"{sentence}\np2pd's last lines:", *lines))

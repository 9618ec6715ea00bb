"""A p2pd that outlived a killed sidecar: recorded while it runs, ended at the next start. Linux only (needs /proc)."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

from lloom_sidecar.errors import LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.p2p.connector import unix_multiaddr
from lloom_sidecar.p2p.daemon import Daemon

_IDENTIFY_DEADLINE_S: Final = 5.0
_TERM_S: Final = 2.0
"""What a p2pd gets between SIGTERM and SIGKILL."""
_MAX_RECORD_BYTES: Final = 4096


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with the pid it names one process for ever. None = not known.

    Source: proc(5), /proc/PID/stat field 22; field 2 may hold spaces and brackets, hence the search from the right.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def write_record(path: Path, pid: int) -> None:
    """Note which p2pd runs. Failing is no fault: the record only helps after a crash."""
    started = start_time(pid)
    if started is None:
        return
    with suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            json.dump({"pid": pid, "start_time_ticks": started}, file)


def remove_record(path: Path) -> None:
    """Forget it; fine when there is none."""
    with suppress(OSError):
        path.unlink()


async def end_leftover(record: Path, control: Path, own_id: PeerId) -> int | None:
    """End the p2pd of an earlier run of this home, if it still runs. Returns its pid, None when there was none.

    It is ended only if the recorded process is the same one (pid and start time) and IDENTIFY on the control socket
    answers this node's own id. SIGTERM, then SIGKILL after 2 s. Cancelled: it may be left running.
    """
    found = _read_record(record)
    if found is None:
        await trio.lowlevel.checkpoint()
        return None
    pid, started = found
    try:
        # The descriptor pins the process: from here on the pid cannot be taken over by another one.
        pidfd = os.pidfd_open(pid)
    except (OSError, AttributeError):
        remove_record(record)
        return None
    try:
        if start_time(pid) != started or not await _is_ours(control, own_id):
            return None
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            with trio.move_on_after(_TERM_S):
                await trio.lowlevel.wait_readable(pidfd)
                break
        remove_record(record)
        return pid
    finally:
        os.close(pidfd)


async def _is_ours(control: Path, own_id: PeerId) -> bool:
    daemon = Daemon(unix_multiaddr(control))
    try:
        return (await daemon.identify(timeout_s=_IDENTIFY_DEADLINE_S)).peer == own_id
    except LloomError:
        return False
    finally:
        daemon.close()


def _read_record(path: Path) -> tuple[int, int] | None:
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(_MAX_RECORD_BYTES))
        pid, started = record["pid"], record["start_time_ticks"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(pid, int) or not isinstance(started, int) or pid <= 1:
        return None
    return pid, started

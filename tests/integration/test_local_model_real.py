"""The embedded LLM for real: the built-in model, fetched once into the user's cache, behind llama.cpp's server.

Its answers are poor, so nothing here looks at their text.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import trio

from lloom_sidecar.executor.local_model import LocalModelError, run_local_model
from lloom_sidecar.executor.model_fetch import BUILTIN_MODEL, ensure_builtin_model

pytest.importorskip("xllamacpp", reason="the extra `local` is not installed")

ALIAS = BUILTIN_MODEL.alias
DEADLINE_S = 60


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lloom-") as folder:  # a socket's path has at most 107 bytes
        yield Path(folder)


@pytest.fixture
async def model_path() -> Path:
    return await ensure_builtin_model()


@pytest.fixture
async def client(model_path: Path, short_folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    socket_path = short_folder / "llm.sock"
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as services:
            await services.start(
                lambda task_status: run_local_model(
                    model_path, alias=ALIAS, socket_path=socket_path, task_status=task_status
                )
            )
            assert socket_path.stat().st_mode & 0o777 == 0o600
            transport = httpx.AsyncHTTPTransport(uds=str(socket_path))
            async with httpx.AsyncClient(transport=transport, base_url="http://llm", timeout=30) as http:
                yield http
            services.cancel_scope.cancel()
    assert not socket_path.exists()


async def test_models_metrics_and_embeddings(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()
    assert [entry["id"] for entry in models["data"]] == [ALIAS]
    assert models["data"][0]["meta"]["n_ctx"] == 2048
    metrics = (await client.get("/metrics")).text
    assert "llamacpp:requests_processing 0" in metrics
    assert "llamacpp:requests_deferred 0" in metrics
    slots = (await client.get("/slots")).json()
    assert [slot["n_ctx"] for slot in slots] == [2048] * 4
    answer = (await client.post("/v1/embeddings", json={"model": ALIAS, "input": ["one", "two"]})).json()
    assert [len(entry["embedding"]) for entry in answer["data"]] == [576, 576]


async def test_a_streamed_answer(client: httpx.AsyncClient) -> None:
    body = {
        "model": ALIAS,
        "messages": [{"role": "user", "content": "Say hello."}],
        "max_tokens": 16,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    events: list[str] = []
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert 0 < chunks[-1]["usage"]["completion_tokens"] <= 16


async def test_a_client_that_leaves_frees_its_slot(client: httpx.AsyncClient, short_folder: Path) -> None:
    fields = {"model": ALIAS, "messages": [{"role": "user", "content": "Count to a thousand."}], "stream": True}
    body = json.dumps(fields | {"max_tokens": 1500, "ignore_eos": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: llm\r\ncontent-length: {len(body)}\r\n"
    async with await trio.open_unix_socket(str(short_folder / "llm.sock")) as stream:
        await stream.send_all(head.encode() + b"content-type: application/json\r\n\r\n" + body)
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200 ")
        assert "llamacpp:requests_processing 1" in (await client.get("/metrics")).text
    with trio.fail_after(5):
        while "llamacpp:requests_processing 0" not in (await client.get("/metrics")).text:
            await trio.sleep(0.01)


async def test_a_cut_file_is_refused_with_a_reason(model_path: Path, short_folder: Path) -> None:
    cut = short_folder / "cut.gguf"
    cut.write_bytes(model_path.read_bytes()[:1_000_000])
    with trio.fail_after(DEADLINE_S), pytest.raises(LocalModelError, match="cannot load") as caught:
        await run_local_model(cut, alias="x", socket_path=short_folder / "s.sock")
    assert caught.value.cause == "load_failed"
    assert caught.value.stderr


PARENT = """
import sys, trio
from pathlib import Path
from lloom_sidecar.executor.local_model import run_local_model

async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: run_local_model(
            Path(sys.argv[1]), alias="x", socket_path=Path(sys.argv[2]), task_status=task_status))
        print("up", flush=True)
trio.run(main)
"""


async def test_the_child_ends_with_a_killed_parent(model_path: Path, short_folder: Path) -> None:
    socket_path = short_folder / "s.sock"
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", PARENT, str(model_path), str(socket_path)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        with trio.fail_after(DEADLINE_S):
            output = b""
            while b"\nup" not in b"\n" + output:
                chunk = await process.stdout.receive_some()
                assert chunk, "the parent ended early"
                output += chunk
        children = children_of(process.pid)
        assert len(children) == 1
        process.send_signal(signal.SIGKILL)
        await process.wait()
        with trio.fail_after(2):
            while is_running(children[0]) or socket_path.exists():
                await trio.sleep(0.005)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await process.stdout.aclose()


def children_of(pid: int) -> list[int]:
    """Return the processes that a process's threads have started and that run now."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [child for child in map(int, {pid for pids in lists for pid in pids}) if is_running(child)]


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_ctrl_c_for_the_whole_group_leaves_the_child_alone(client: httpx.AsyncClient) -> None:
    # Other tests' networks may have processes of this one too.
    (pid,) = (pid for pid in children_of(os.getpid()) if b"_llama_child" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert (await client.get("/health")).status_code == 200

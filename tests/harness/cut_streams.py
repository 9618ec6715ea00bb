"""Streams that are cut in the middle and go on elsewhere: applications that read them, and the text they must get."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from .network import Network
from .node import Node
from .scripted_backend import shown_of, word
from .waiting import wait_until


def wait_can_resume(network: Network, executors: list[Node]) -> None:
    """Until the client knows that these have tried out their backends."""

    def can() -> bool:
        with network.client.admin() as admin:
            offers = [offer for model in admin.models() for offer in model["executors"]]
        able = {offer["peer"] for offer in offers if "resume" in offer["features"]}
        return {node.peer for node in executors} <= able

    wait_until(can, "the executors to have tried out their backends", explain=network.logs)


@dataclass
class Read:
    """A stream as an application read it."""

    text: str = ""
    finish: str = ""
    has_ended: bool = False
    is_cut: bool = False
    error: dict[str, Any] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    usage: dict[str, int] = field(default_factory=dict)
    resumed_at: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)


def read(
    client: Node,
    prompt: str,
    *,
    path: str = "/v1/chat/completions",
    resume: str | None = "on",
    pin: str | None = None,
    max_price: str | None = None,
    **more: Any,
) -> Read:
    """Ask and read to the end, whatever that is."""
    asked = {"messages": [{"role": "user", "content": prompt}]} if "chat" in path else {"prompt": prompt}
    body = {"model": "scripted", "stream": True, **asked, **more}
    found = Read()
    given = {"x-lloom-resume": resume, "x-lloom-pin-executor": pin, "x-lloom-max-price": max_price}
    headers = {name: value for name, value in given.items() if value is not None}
    with (
        httpx.Client(timeout=60, trust_env=False) as http,
        http.stream("POST", f"{client.api}{path}", json=body, headers=headers) as answer,
    ):
        found.headers = dict(answer.headers)
        if answer.status_code != 200:
            found.error = json.loads(answer.read())["error"]
            return found
        try:
            for line in answer.iter_lines():
                if line.startswith(": lloom resumed at "):
                    found.resumed_at.append(line.split()[-1])
                if line == "data: [DONE]":
                    found.has_ended = True
                elif line.startswith("data: "):
                    note(found, json.loads(line[6:]))
        except httpx.RemoteProtocolError:
            found.is_cut = True
    return found


def note(found: Read, chunk: dict[str, Any]) -> None:
    if "error" in chunk:
        found.error = chunk["error"]
        return
    found.ids.add(f"{chunk['id']} {chunk['created']} {chunk['model']}")
    found.usage = chunk.get("usage") or found.usage
    for choice in chunk["choices"]:
        found.text += choice.get("delta", {}).get("content") or choice.get("text") or ""
        found.finish = choice["finish_reason"] or found.finish


def text_of(seed: int, chunks: int, limit: int | None = None, stops: list[str] | None = None) -> str:
    """What the model says without a cut."""
    whole = "".join(word({"seed": seed}, i) for i in range(min(chunks, limit or chunks)))
    shown, has_stopped = shown_of(whole, stops or [])
    return shown if has_stopped else whole


def one_stream(client: Node, rng: random.Random) -> Read:
    """A stream with one or two cuts at random pieces; asserts that its text is the uncut one."""
    seed, chunks = rng.randrange(10**6), rng.randint(2, 60)
    first = rng.randrange(1, chunks)
    prompt = f"seed={seed} chunks={chunks} cut={first} delay_ms={rng.choice([0, 0, 2])}"
    more: dict[str, Any] = {"stream_options": {"include_usage": True}}
    limit = None
    stops: list[str] = []
    match rng.randrange(4):
        case 0:
            limit = more["max_tokens"] = rng.randint(1, chunks + 5)
        case 1 if first + 1 < chunks:
            prompt += f" cut2={rng.randrange(first + 1, chunks)}"
        case 2:
            whole = text_of(seed, chunks)
            at = rng.randrange(len(whole))
            stops = more["stop"] = rng.choice([["<stop>"], [whole[at : at + 5]], [whole[at : at + 2], "[DONE]"]])
    path = rng.choice(["/v1/chat/completions", "/v1/completions"])
    found = read(client, prompt, path=path, **more)
    wanted = text_of(seed, chunks, limit, stops)
    assert (found.text, found.error) == (wanted, {}), (prompt, more, path, found)
    assert found.has_ended
    assert not found.is_cut
    assert len(found.ids) == 1
    if limit is not None and found.usage:
        assert found.usage["completion_tokens"] == min(limit, chunks)
    assert found.headers["x-lloom-executor"] not in found.resumed_at[:1]
    return found


def cut_at_random(client: Node, streams: int, seed: int = 1) -> list[Read]:
    """So many of them, a few at once."""
    with ThreadPoolExecutor(4) as threads:
        rngs = [random.Random(seed * 10_007 + i) for i in range(streams)]
        return list(threads.map(lambda rng: one_stream(client, rng), rngs))

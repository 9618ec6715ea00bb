"""An executor at four times its capacity for a minute: ``make soak ARGS='-k overload'``; prints its figures.

The backend takes a second a request whatever else runs, so that capacity is a plain number: slots a second. Three
clients send four times that without waiting for answers; a fourth, on the operator's list, asks one after the other.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import trio

from tests.harness import Network, Node
from tests.harness.scripted_backend import script_of

SLOTS = 8
QUEUE_LIMIT = 64
OVERLOAD = 4
SECONDS = 60.0
FIRST_MS, CHUNKS, DELAY_MS = 200, 8, 100
SERVICE_S = (FIRST_MS + CHUNKS * DELAY_MS) / 1000
PROMPT = f"first_ms={FIRST_MS} chunks={CHUNKS} delay_ms={DELAY_MS}"
THINK_S = 0.25
"""Between two requests of the priority client."""
UNLOADED = 30


@dataclass
class Asked:
    """One request of an application, and its only outcome."""

    began_at: float
    number: int = 0
    """In the operator's prompts, so that its way can be followed; 0 = one of the crowd's."""
    asked_at: float = 0.0
    """As the backend's log counts."""
    code: str = ""
    first_s: float = 0.0
    ended_at: float = 0.0
    has_advice: bool = False
    attempts: list[dict[str, Any]] = field(default_factory=list)


class Application:
    """Asks one client node."""

    def __init__(self, node: Node) -> None:
        self._url = f"{node.api}/v1/chat/completions"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        self._http = httpx.AsyncClient(timeout=120, trust_env=False, limits=limits)
        self.asked: list[Asked] = []

    async def ask(self, number: int = 0) -> Asked:
        """One streamed chat, to its end."""
        one = Asked(trio.current_time(), number, time.time())
        self.asked.append(one)
        prompt = f"{PROMPT} number={number}"
        body = {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": prompt}]}
        async with self._http.stream("POST", self._url, json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                error = answer.json()["error"]
                one.code = error["code"]
                one.attempts = error["lloom"]["attempts"]
                one.has_advice = "retry-after" in answer.headers
            else:
                last = ""
                async for line in answer.aiter_lines():
                    if line.startswith("data:"):
                        one.first_s = one.first_s or trio.current_time() - one.began_at
                        last = line
                one.code = "ok" if last == "data: [DONE]" else "cut"
        one.ended_at = trio.current_time()
        return one

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def ask_in_turn(self, count: float, until: float = float("inf")) -> list[Asked]:
        """One after the other."""
        found: list[Asked] = []
        while len(found) < count and trio.current_time() < until:
            found.append(await self.ask(len(self.asked) + 1))
            await trio.sleep(THINK_S)
        return found

    async def ask_at_rate(self, per_s: float, until: float) -> None:
        """At equal intervals, whatever becomes of them; returns when all have ended."""
        async with trio.open_nursery() as nursery:
            due_at = trio.current_time()
            while due_at < until:
                await trio.sleep_until(due_at)
                nursery.start_soon(self.ask)
                due_at += 1 / per_s


def quantile(values: list[float], part: float) -> float:
    """Of sorted or unsorted values, none = nan."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else float("nan")


def to_backend(part: list[Asked], log: list[dict[str, Any]]) -> str:
    """The time from the application to the backend, in words."""
    began = {script_of(one["body"]).get("number", 0): one["began_at"] for one in log}
    took = [(began[one.number] - one.asked_at) * 1000 for one in part]
    return f"p50 {quantile(took, 0.5):.0f} ms, p95 {quantile(took, 0.95):.0f} ms"


def most_at_once(log: list[dict[str, Any]]) -> int:
    """How many calls the backend had under way at most."""
    steps = sorted([(one["began_at"], 1) for one in log] + [(one["ended_at"], -1) for one in log])
    most = now = 0
    for _, step in steps:
        now += step
        most = max(most, now)
    return most


async def watch_queue(node: Node, depths: list[int], task_status: trio.TaskStatus[None]) -> None:
    task_status.started()
    while True:
        status = await trio.to_thread.run_sync(node.status)
        depths.append(status["requests"]["queued"])
        await trio.sleep(0.5)


@pytest.mark.soak
def test_overload() -> None:
    with Network(validators=1, executors=0, clients=4) as network:
        preferred = network.clients[3]
        flags = ["--slots", str(SLOTS), "--queue-limit", str(QUEUE_LIMIT), "--priority-peer", preferred.peer]
        executor = network.add("executor", *flags)
        for client in network.clients:
            network.wait_known(client, [executor])
        backend = network.backends[0]
        crowd = [Application(client) for client in network.clients[:3]]
        operator = Application(preferred)
        depths: list[int] = []
        unloaded: list[Asked] = []
        loaded: list[Asked] = []
        window: list[float] = []

        async def main() -> None:
            unloaded.extend(await operator.ask_in_turn(UNLOADED))
            async with trio.open_nursery() as nursery:
                await nursery.start(watch_queue, executor, depths)
                began_at = trio.current_time()
                window.extend((began_at, began_at + SECONDS))

                async def own() -> None:
                    loaded.extend(await operator.ask_in_turn(float("inf"), began_at + SECONDS))

                async with trio.open_nursery() as load:
                    load.start_soon(own)
                    for application in crowd:
                        load.start_soon(application.ask_at_rate, OVERLOAD * SLOTS / SERVICE_S / 3, began_at + SECONDS)
                nursery.cancel_scope.cancel()
            for application in (*crowd, operator):
                await application.close()

        trio.run(main)
        crowds = [one for application in crowd for one in application.asked]
        everybody = [*crowds, *loaded]
        codes = Counter(one.code for one in everybody)
        done = sum(one.code == "ok" and window[0] <= one.ended_at < window[1] for one in everybody)
        # The first answers of the minute end a service time after its begin.
        capacity = SLOTS * (SECONDS - SERVICE_S) / SERVICE_S
        refusals = [float(a["ms"]) for one in crowds for a in one.attempts if a["reason"] == "busy"]
        firsts = [[one.first_s for one in part if one.code == "ok"] for part in (unloaded, loaded)]
        p95 = [quantile(part, 0.95) for part in firsts]
        shares = [sum(one.code == "ok" for one in application.asked) for application in crowd]
        refused_there = executor.metric("lloom_refused_total", code="busy")
        log = backend.wait_ended(len(backend.requests()))

        print(
            f"\n{SLOTS} slots, {SERVICE_S:g} s a request, queue of {QUEUE_LIMIT}; {len(crowds)} asked in {SECONDS:g} s"
        )
        print(
            f"goodput       {done / SECONDS:.2f}/s of {SLOTS / SERVICE_S:.2f}/s: {done / capacity:.1%} of the maximum"
        )
        print(f"outcomes      {dict(codes)}; each crowd client's answers: {shares}")
        print(f"queue         at most {max(depths)}, median {quantile([float(d) for d in depths], 0.5):.0f}")
        print(
            f"refusals      {refused_there:.0f} at the executor; those that applications were told of took the client"
        )
        print(f"              p50 {quantile(refusals, 0.5):.1f} ms, p99 {quantile(refusals, 0.99):.1f} ms a try")
        print(
            f"first token   of the priority client, p95: {p95[0] * 1000:.0f} ms unloaded ({len(firsts[0])}), ", end=""
        )
        print(f"{p95[1] * 1000:.0f} ms loaded ({len(firsts[1])}): {p95[1] / p95[0]:.2f} times")
        print(f"              of that until the backend has it: {to_backend(unloaded, log)}; {to_backend(loaded, log)}")
        print(f"backend       at most {most_at_once(log)} at once")

        assert all(one.code for one in everybody), "a request without an outcome"
        assert "cut" not in codes
        assert {one.code for one in [*unloaded, *loaded]} == {"ok"}, "the priority client was refused"
        assert codes["ok"] < len(everybody), "no overload"
        assert all(one.has_advice for one in crowds if one.code == "busy"), "a refusal without Retry-After"
        assert max(depths) <= QUEUE_LIMIT + SLOTS
        assert most_at_once(log) <= SLOTS
        assert done >= 0.9 * capacity

"""A network of real processes, applications that ask it, and what breaks meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import trio
from natlab import Host

from lloom_sidecar.admin.client import NodeUnreachableError
from tests.harness import Network, Node
from tests.harness.waiting import wait_until

from . import invariants
from .app import App
from .faults import Kill, Outage, Plan
from .ledgers import Entry, Work, read_journal, read_ledger
from .record import Ask, Outcome, Record

ANSWER_TIMEOUT_S = 120.0
"""After this a request counts as lost. The API's own deadline is given to the client below it."""
BACK_S = 60.0
"""Longest that an executor may take to be back."""


LOOK_S = 1.2
"""A little more than between two looks of a node at its connections. Source: network/connections.py."""


class World:
    """One validator, some executors with scripted backends, one client node."""

    def __init__(self, network: Network, *, seed: int, resume: bool = False, host: Host | None = None) -> None:
        """``host``: where the client node and its applications are; None = here."""
        self.network = network
        self.host = host
        self.seed = seed
        self.rng = random.Random(seed)
        self.resume = resume
        self.active: frozenset[Kill] = frozenset()
        """What is dead now, or not back yet."""
        self.outages: list[Outage] = []
        """What was, in the order of return."""
        self.records: list[Record] = []

    # ------------------------------------------------------------ applications
    def app(self) -> App:
        """An application at the client's API."""
        host, _, port = self.network.client.api.removeprefix("http://").partition(":")
        return App(partial(self._connect, host, int(port)), resume=self.resume)

    async def _connect(self, host: str, port: int) -> trio.SocketStream:
        if self.host is None:
            return await trio.open_tcp_stream(host, port)
        plain = await trio.to_thread.run_sync(self.host.connect, port)
        return trio.SocketStream(trio.socket.from_stdlib_socket(plain))

    async def ask_all(self, asks: Iterable[Ask], *, apps: int) -> list[Record]:
        """Have the requests made by so many applications, each one after the other; their records."""
        waiting = iter(asks)
        records: list[Record] = []

        async def ask_on(app: App) -> None:
            for ask in waiting:
                records.append(await app.ask(ask, ANSWER_TIMEOUT_S))

        async with trio.open_nursery() as nursery:
            for _ in range(apps):
                nursery.start_soon(ask_on, self.app())
        self.records += records
        return records

    # ------------------------------------------------------------ faults
    async def kill_until(self, over: trio.Event, plan: Plan, every_s: float) -> None:
        """Until ``over`` something dies at every tick, and is brought back. Returns when all of it is back again."""
        began_at = trio.current_time()
        tick = 0
        async with trio.open_nursery() as repairs:
            while not over.is_set():
                kill = plan.next(self.active)
                if kill is not None:
                    await repairs.start(self._strike, kill)
                tick += 1
                with trio.move_on_at(began_at + tick * every_s):
                    await over.wait()

    async def _strike(self, kill: Kill, *, task_status: trio.TaskStatus[None]) -> None:
        """``started`` when it is dead; returns when it is back."""
        began_at = time.time()
        self.active |= {kill}
        try:
            if kill.executor is None:
                await self._strike_validator(task_status)
            else:
                await self._strike_executor(kill.part, kill.executor, task_status)
        finally:
            self.active -= {kill}
            self.outages.append(Outage(kill, began_at, time.time()))

    async def _strike_validator(self, task_status: trio.TaskStatus[None]) -> None:
        validator = self.network.validators[0]
        dead = validator.pid_of("p2pd")
        await _in_thread(partial(validator.kill, "p2pd"))
        task_status.started()
        await _in_thread(lambda: _wait_p2pd(validator, dead))

    async def _strike_executor(self, part: str, number: int, task_status: trio.TaskStatus[None]) -> None:
        victim, backend = self.network.executors[number], self.network.backends[number]
        dead = victim.pid_of("p2pd") if part == "p2pd" else 0
        await _in_thread(backend.kill if part == "backend" else partial(victim.kill, part))
        task_status.started()
        if part == "sidecar":
            await _in_thread(victim.start)
        elif part == "backend":
            await _in_thread(backend.start)
        else:
            await _in_thread(lambda: _wait_p2pd(victim, dead))
        await self.wait_back(victim)
        # The client looks at its connections each second: what it says may be of before.
        await trio.sleep(LOOK_S)
        await self.wait_back(victim)

    async def wait_back(self, victim: Node) -> None:
        """Until the executor serves again as far as it and the client know."""
        client = self.network.client

        def is_back() -> bool:
            try:
                status = victim.status()
            except NodeUnreachableError:
                return False
            if not status["p2pd"]["up"] or any(one["code"] == "backend_down" for one in status["conditions"]):
                return False
            seen = client.executors().get(victim.peer)
            return seen is not None and seen["state"] == "fresh" and seen["connected"] and seen["member"]

        await _in_thread(
            lambda: wait_until(
                is_back, f"{victim.name} to be back", timeout_s=BACK_S, poll_s=0.2, explain=victim.log_tail
            )
        )

    # ------------------------------------------------------------ afterwards
    def journals(self) -> list[Work]:
        """What the backends worked on."""
        return [work for backend in self.network.backends if backend.journal for work in read_journal(backend.journal)]

    def client_ledger(self) -> list[Entry]:
        """The client's side."""
        return read_ledger(self.network.client.home, "client")

    def executor_ledgers(self) -> list[Entry]:
        """The executors' side."""
        return [entry for node in self.network.executors for entry in read_ledger(node.home, "executor")]

    def violations(self) -> list[str]:
        """Everything that must hold of what was recorded, and does not. Waits for what is written a little later."""
        client = self.network.client
        wait_until(lambda: client.metric("lloom_requests_in_flight", role="client") == 0, "the client to be idle")
        completes = sum(record.outcome is Outcome.COMPLETE for record in self.records)
        wait_until(
            lambda: sum(entry.is_owed for entry in self.client_ledger()) >= completes, "the ledger", timeout_s=5.0
        )
        return [
            *invariants.outcomes(self.records),
            *invariants.texts(self.records),
            *invariants.work(self.records, self.journals()),
            *invariants.receipts(self.records, self.client_ledger(), self.executor_ledgers(), self.was_killed),
        ]

    def was_killed(self, record: Record) -> bool:
        """The sidecar that gave this answer was killed when it had just given it."""
        assert record.ended_at is not None
        executors = [node.peer for node in self.network.executors]
        return any(
            one.kill.part == "sidecar"
            and executors[one.kill.executor or 0] == record.executor
            and 0 <= one.began_at - record.ended_at + 0.5 <= invariants.COMMIT_S
            for one in self.outages
        )


def _wait_p2pd(node: Node, dead: int) -> None:
    """Until the node has another p2pd than the ``dead`` one, which for a moment it takes for alive."""

    def has_another() -> bool:
        with suppress(AssertionError, NodeUnreachableError):
            return node.pid_of("p2pd") != dead and bool(node.status()["p2pd"]["up"])
        return False

    wait_until(has_another, f"another p2pd of {node.name}", timeout_s=BACK_S, explain=node.log_tail)


async def _in_thread(call: Callable[[], object]) -> None:
    await trio.to_thread.run_sync(call)

"""Gathers what ``doctor`` judges, from inside a running node. Every look at others has a deadline.

Nothing is changed but a sequence number in the database.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog
import trio

from lloom_sidecar.admin.doctor import (
    Dialogue,
    Finding,
    RecordFacts,
    ValidatorFacts,
    finding,
    in_order,
    judge_clock,
    judge_conditions,
    judge_descriptors,
    judge_dialogue,
    judge_disk,
    judge_features,
    judge_gossip,
    judge_ledger,
    judge_open_settings,
    judge_p2pd,
    judge_public_network,
    judge_reachability,
    judge_records,
    judge_stale,
    judge_validators,
)
from lloom_sidecar.errors import DaemonError, LloomError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.network.bootstrap import DIAL_BACKOFF, Validator
from lloom_sidecar.network.dht_peer import ask_providers
from lloom_sidecar.network.security_dialogue import accepted_security
from lloom_sidecar.protocol.names import TOPIC_EXECUTORS, TOPIC_NETWORK

from .dht_keys import EMPTY_TABLE, provider_key
from .receipts import now_ms

if TYPE_CHECKING:
    from .node import Node

CHECK_TIMEOUT_S: Final = 20.0
"""For one check, whatever it waits for."""
DIAL_TIMEOUT_S: Final = 5.0
WALK_TIMEOUT_S: Final = 8.0
ASK_TIMEOUT_S: Final = 4.0
MAX_ASKED: Final = 8
"""Peers that are asked whether they hold a record; the nearest ones."""
MAX_KEYS: Final = 8
"""Service keys that are looked at; an executor may have one for each of many models."""
MAX_VALIDATORS: Final = 16

log = structlog.get_logger("lloom.doctor")

Check = Callable[[], Awaitable[list[Finding]]]


class Doctor:
    """The checks of one node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def examine(self) -> list[Finding]:
        """All checks, in the order of a report. Those that need p2pd are skipped while it is away."""
        is_up = self._node.supervisor.daemon is not None
        found = [*self._p2pd(), *self._settings(), *self._machine(), *judge_conditions(self._node.health.as_dicts())]
        checks: dict[str, Check] = {"ledger": self._ledger}
        of_p2pd: dict[str, Check] = {
            "listening": self._listening,
            "validators": self._validators,
            "provider_record": self._records,
            "gossip": self._gossip,
        }
        if is_up:
            checks |= of_p2pd
            found.append(self._reachability())
        else:
            skipped = (*of_p2pd, "plaintext", "reachability", "clock", "public_network")
            found += [finding(name, "skipped", "p2pd does not answer") for name in skipped]
        async with trio.open_nursery() as nursery:
            for name, check in checks.items():
                nursery.start_soon(_run, name, check, found)
        return in_order(found)

    # ------------------------------------------------------------ p2pd
    def _p2pd(self) -> list[Finding]:
        supervisor, config = self._node.supervisor, self._node.config
        pid = supervisor.pid
        found = [
            judge_p2pd(
                is_up=supervisor.daemon is not None,
                is_attached=config.is_attached,
                restarts=supervisor.restarts_total,
                last_error=(supervisor.last_error or "").partition("\n")[0],
                version=supervisor.version,
            ),
            judge_features(supervisor.features, is_attached=config.is_attached),
            judge_stale(is_replaced=None if pid is None else _is_replaced(pid)),
        ]
        if supervisor.daemon is not None:
            found.append(judge_public_network(map(str, self._node.control.connections), has_flag=_has_public_flag(pid)))
        return found

    async def _listening(self) -> list[Finding]:
        where = self._own_listener()
        if where is None:
            return judge_dialogue(Dialogue(""))
        host, port = where
        address = f"{host}:{port}"
        try:
            accepted = await accepted_security(host, port)
        except LloomError as exc:
            return judge_dialogue(Dialogue(address, error=exc.message))
        return judge_dialogue(Dialogue(address, accepted=accepted))

    def _own_listener(self) -> tuple[str, int] | None:
        """An address of p2pd's TCP listener: by the settings, or one that p2pd tells, loopback before others."""
        node = self._node
        configured = () if node.config.is_attached else node.config.listen
        found: list[tuple[int, str, int]] = []
        for addr in (*configured, *(node.identity.addrs if node.identity else ())):
            place = addr.tcp_host_port
            if place is None or addr.ip is None or addr.is_relayed or place[1] == 0 or "/ws" in str(addr):
                continue
            host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(place[0], place[0])
            found.append((0 if host in ("127.0.0.1", "::1") else 1 if addr.ip.is_private else 2, host, place[1]))
        return min(found)[1:] if found else None

    def _reachability(self) -> Finding:
        addrs = self._node.identity.addrs if self._node.identity else ()
        return judge_reachability([str(addr) for addr in addrs], is_validator=self._node.config.is_validator)

    # ------------------------------------------------------------ others
    async def _validators(self) -> list[Finding]:
        facts: list[ValidatorFacts] = []
        config = self._node.config

        async def ask(validator: Validator) -> None:
            facts.append(await self._ask_validator(validator))

        async with trio.open_nursery() as nursery:
            for validator in self._node.control.bootstrap.validators[:MAX_VALIDATORS]:
                nursery.start_soon(ask, validator)
        facts.sort(key=lambda one: one.name)
        judged = judge_validators(facts, is_validator=config.is_validator, is_open=config.open)
        return [*judged, judge_clock(facts)]

    async def _ask_validator(self, validator: Validator) -> ValidatorFacts:
        control = self._node.control
        name, address = validator.peer.short(), str(validator.addrs[0].without_peer())
        try:
            with trio.fail_after(2 * DIAL_TIMEOUT_S):
                await control.connections.ensure(validator.peer, timeout_s=DIAL_TIMEOUT_S, addrs=validator.addrs)
                greeted = await control.hello.greet(validator.peer)
        except trio.TooSlowError:
            return ValidatorFacts(name, address, code="peer_timeout", error="it does not answer in time")
        except LloomError as exc:
            # p2pd does not dial again so soon; what the last real attempt met is the cause.
            error = validator.last_error if DIAL_BACKOFF in exc.message and validator.last_error else exc.message
            return ValidatorFacts(name, address, code=exc.code, error=error)
        rtt_s = greeted.rtt_s or 0.0
        return ValidatorFacts(
            name,
            address,
            rtt_ms=rtt_s * 1000,
            is_member=greeted.is_member,
            clock_ahead_ms=now_ms() - greeted.node.now_ms - round(rtt_s * 500),
        )

    async def _records(self) -> list[Finding]:
        facts = []
        for key in self._node.service_keys()[:MAX_KEYS]:
            try:
                facts.append(await self._ask_holders(key))
            except DaemonError as exc:
                return judge_records((), error=exc.message[:200])
        return judge_records(facts)

    async def _ask_holders(self, key: str) -> RecordFacts:
        """Ask the peers that a record of ``key`` is put at, one by one, what they hold: p2pd's own search would also
        answer from this node's own store."""
        daemon, me = self._node.daemon(), self._node.me
        multihash = provider_key(key).multihash
        try:
            nearest = await daemon.get_closest_peers(multihash, timeout_s=WALK_TIMEOUT_S)
        except DaemonError as exc:
            if EMPTY_TABLE in exc.message:
                return RecordFacts(key, holders=0, asked=0)
            raise
        answers: list[bool] = []

        async def ask(peer: PeerId) -> None:
            try:
                held = await ask_providers(daemon, peer, multihash, timeout_s=ASK_TIMEOUT_S)
            except LloomError as exc:
                log.debug("holder_not_asked", peer=str(peer), code=exc.code)
            else:
                answers.append(any(provider == me for provider, _ in held))

        async with trio.open_nursery() as nursery:
            for peer in [one for one in nearest if one != me][:MAX_ASKED]:
                nursery.start_soon(ask, peer)
        return RecordFacts(key, holders=sum(answers), asked=len(answers))

    async def _gossip(self) -> list[Finding]:
        if not self._node.config.has_gossip:
            return [finding("gossip", "info", "off by the setting gossip: changes in the network are seen late")]
        daemon = self._node.daemon()
        topics = {topic: len(await daemon.topic_peers(topic)) for topic in await daemon.topics()}
        wanted = (TOPIC_EXECUTORS, TOPIC_NETWORK)
        return [judge_gossip(topics, wanted=wanted, members=self._node.control.members())]

    # ------------------------------------------------------------ this machine
    def _settings(self) -> list[Finding]:
        config = self._node.config
        return judge_open_settings(
            is_open=config.open,
            is_api_open=config.is_client and config.api_open,
            api=str(config.api),
            allows_media=config.is_executor and config.allow_remote_media,
        )

    def _machine(self) -> list[Finding]:
        found = [judge_disk(shutil.disk_usage(self._node.config.home).free)]
        found.append(
            judge_descriptors("the sidecar", _open_files("self"), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        )
        pid = self._node.supervisor.pid
        if pid is not None and hasattr(resource, "prlimit"):
            try:
                limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)[0]
            except OSError:
                return found
            found.append(judge_descriptors("p2pd", _open_files(str(pid)), limit))
        return found

    async def _ledger(self) -> list[Finding]:
        try:
            await self._node.prove_writable()
        except LloomError as exc:
            return [judge_ledger(exc.message)]
        return [judge_ledger("")]


async def _run(name: str, check: Check, found: list[Finding]) -> None:
    try:
        with trio.fail_after(CHECK_TIMEOUT_S):
            found += await check()
    except trio.TooSlowError:
        found.append(finding(name, "skipped", f"it did not end within {CHECK_TIMEOUT_S:.0f} s"))
    except LloomError as exc:
        found.append(finding(name, "skipped", exc.message))


def _open_files(pid: str) -> int:
    """Open descriptors of a process; 0 where that cannot be seen."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def _is_replaced(pid: int) -> bool | None:
    """Whether the file of a running program is another one by now; None = cannot be told."""
    try:
        target = os.readlink(f"/proc/{pid}/exe")
        if target.endswith(" (deleted)"):
            return True
        return not os.path.samestat(os.stat(target), os.stat(f"/proc/{pid}/exe"))
    except OSError:
        return None


def _has_public_flag(pid: int | None) -> bool:
    """Whether a p2pd of this machine was started with ``-b`` and no bootstrap peers of its own."""
    if pid is None:
        return False
    try:
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    flags = {part.lstrip(b"-").partition(b"=")[0] for part in argv[1:] if part.startswith(b"-")}
    return b"b" in flags and b"bootstrapPeers" not in flags

"""Health conditions: what an operator should know now, each with its remedy. Pure.

A condition is set by the room that notices it and cleared by the same; the table below is the whole vocabulary, so that
it can be documented, alerted on, and never depends on a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final


class Severity(StrEnum):
    """How much a condition matters."""

    INFO = "info"
    """Worth knowing; nothing is wrong."""
    WARNING = "warning"
    """The node works, but less well or less safely than it could."""
    ERROR = "error"
    """Something the node is for does not work."""


_ORDER: Final = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}


@dataclass(frozen=True, slots=True)
class ConditionKind:
    """One entry of the vocabulary."""

    code: str
    """Stable identifier, ``[a-z_]{1,40}``; a label of ``lloom_health_condition``."""
    title: str
    """A few words, for a table or an alert."""
    severity: Severity
    remedy: str
    """A sentence: what to do. Empty when there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition that holds now."""

    code: str
    """Stable identifier."""
    title: str
    """A few words."""
    severity: Severity
    text: str
    """A sentence with the facts of this case; no secrets."""
    remedy: str
    """A sentence: what to do."""

    def as_dict(self) -> dict[str, Any]:
        """JSON shape: the fields, as text."""
        return {key: str(value) for key, value in asdict(self).items()}


CONDITION_KINDS: Final = (
    ConditionKind("p2pd_down", "p2pd does not answer", Severity.ERROR, "See the log for p2pd's last lines."),
    ConditionKind(
        "p2pd_restarting",
        "p2pd keeps ending",
        Severity.ERROR,
        "See the log for p2pd's last lines; a busy port and a wrong listen address are the usual causes.",
    ),
    ConditionKind(
        "p2pd_stock",
        "p2pd lacks Lloom's additions",
        Severity.INFO,
        "Use the p2pd inside the package (leave out --p2pd) for NAT traversal, mDNS and raised limits.",
    ),
    ConditionKind(
        "no_validator",
        "no validator is connected",
        Severity.WARNING,
        "Check the bootstrap addresses with `lloomctl config show`, and that their port is reachable from here.",
    ),
    ConditionKind(
        "no_bootstrap",
        "no validator is configured",
        Severity.INFO,
        "Join a network with `lloomctl network join FILE`, or give --bootstrap MULTIADDR.",
    ),
    ConditionKind(
        "few_peers",
        "fewer peers than wanted",
        Severity.WARNING,
        "Check that this machine reaches the network; min_peers is the wanted number.",
    ),
    ConditionKind(
        "other_version",
        "peers of another major version",
        Severity.WARNING,
        "Upgrade the older side: peers of different major versions do not deal with each other.",
    ),
    ConditionKind(
        "certificate",
        "the API's certificate needs a look",
        Severity.WARNING,
        "Put a new pair at api_tls_cert_file and api_tls_key_file: it is taken into use within seconds.",
    ),
    ConditionKind(
        "clock_skew",
        "the clock is off",
        Severity.WARNING,
        "Set the clock, for instance with `timedatectl set-ntp true`: others drop what it announces.",
    ),
    ConditionKind(
        "open_network",
        "deals with any network",
        Severity.WARNING,
        "Leave out --open and join a network with `lloomctl network join FILE`.",
    ),
    ConditionKind(
        "api_open",
        "the API needs no key",
        Severity.WARNING,
        "Give --api-key-file FILE instead of --api-open, or listen on a loopback address.",
    ),
    ConditionKind(
        "backend_down",
        "the backend does not answer",
        Severity.ERROR,
        "Check that the LLM server runs and that --backend names it; the models are not offered meanwhile.",
    ),
    ConditionKind(
        "no_executor",
        "no executor is known",
        Severity.WARNING,
        "Start one: `lloom-sidecar run --role executor --model builtin`; `lloomctl peer list` shows who is here.",
    ),
    ConditionKind(
        "previous_key",
        "the previous network key is still accepted",
        Severity.INFO,
        "Nothing to do: it ends by itself; hand out new invites before.",
    ),
    ConditionKind(
        "config_warning",
        "a setting has no effect",
        Severity.WARNING,
        "Compare with `lloomctl config show`.",
    ),
    ConditionKind(
        "ledger_full",
        "exchanges cannot be written down",
        Severity.ERROR,
        "Free disk space where the home is; free work goes on meanwhile, nothing that costs is begun.",
    ),
    ConditionKind(
        "numbers_doubtful",
        "an executor signed numbers that cannot be",
        Severity.WARNING,
        "Look at `lloomctl receipt list --doubtful`; ask its operator, or pin others.",
    ),
    ConditionKind(
        "executor_paused",
        "this executor takes no work",
        Severity.INFO,
        "`lloomctl executor resume` lets it take work again.",
    ),
    ConditionKind(
        "executor_doubted",
        "executors are doubted",
        Severity.WARNING,
        "`lloomctl executor show PEER` says why; --avoid-doubted sends them nothing, a pin goes past it.",
    ),
    ConditionKind("draining", "the node is draining", Severity.INFO, "It ends when its requests have ended."),
)
"""Every condition that a node can have."""


class HealthConditions:
    """The conditions that hold now. Methods are synchronous; nothing here waits."""

    def __init__(
        self,
        kinds: Iterable[ConditionKind] = CONDITION_KINDS,
        *,
        on_change: Callable[[Condition, bool], None] | None = None,
    ) -> None:
        """``on_change(condition, holds)`` is called when one begins (or its text changes) and when it ends."""
        self._kinds = {kind.code: kind for kind in kinds}
        self._current: dict[str, Condition] = {}
        self._on_change = on_change

    def set(self, code: str, text: str) -> None:
        """The condition holds, with the facts ``text``. Raises KeyError when ``code`` is not in the vocabulary."""
        kind = self._kinds[code]
        condition = Condition(code, kind.title, kind.severity, text, kind.remedy)
        if self._current.get(code) == condition:
            return
        self._current[code] = condition
        if self._on_change is not None:
            self._on_change(condition, True)

    def clear(self, code: str) -> None:
        """The condition holds no more; without effect when it did not. Raises KeyError for an unknown ``code``."""
        self._kinds[code]
        condition = self._current.pop(code, None)
        if condition is not None and self._on_change is not None:
            self._on_change(condition, False)

    def update(self, code: str, text: str | None) -> None:
        """``set`` with a text, ``clear`` with None."""
        if text is None:
            self.clear(code)
        else:
            self.set(code, text)

    def __contains__(self, code: str) -> bool:
        return code in self._current

    def current(self) -> tuple[Condition, ...]:
        """The worst first, then by code."""
        return tuple(sorted(self._current.values(), key=lambda one: (_ORDER[one.severity], one.code)))

    def as_dicts(self) -> list[dict[str, Any]]:
        """``current`` in its JSON shape: [{code, title, severity, text, remedy}]."""
        return [one.as_dict() for one in self.current()]

"""The node's Prometheus metrics: one class, one registry a node, typed methods instead of names and labels.

No label ever holds a peer, a session, a request or a foreign model. Labels whose words come from other nodes (error
codes, drop reasons) are bounded: after ``MAX_LABEL_VALUES`` different ones further ones count as ``other``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from .health import HealthConditions

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
MAX_LABEL_VALUES: Final = 64
OTHER: Final = "other"

DURATION_BUCKETS: Final = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Seconds: an LLM's answer takes from milliseconds (embeddings) to minutes."""
FIRST_TOKEN_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0)
QUEUE_WAIT_BUCKETS: Final = (0.001, 0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
DISCOVERY_BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Role = Literal["client", "executor"]
"""Which side of an exchange this node was: it asked, or it answered."""
MessageKind = Literal["request", "announcement", "status", "evidence", "hello"]


class _Words:
    """Keeps a label's vocabulary small, however many words other nodes invent."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def bounded(self, word: str) -> str:
        if word in self._seen:
            return word
        if len(self._seen) >= MAX_LABEL_VALUES or re.fullmatch(r"[a-z0-9_]{1,40}", word) is None:
            return OTHER
        self._seen.add(word)
        return word


class Metrics:
    """Everything that a node counts. Methods never raise and never wait, so any room may call them anywhere."""

    def __init__(self, *, version: str, health: HealthConditions | None = None, with_process: bool = True) -> None:
        """``health``: its conditions become a gauge; ``with_process``: CPU, memory and descriptors of this process."""
        self.registry = CollectorRegistry(auto_describe=False)
        """This node's own: several nodes can live in one process."""
        reg = self.registry
        self._codes, self._reasons, self._refusals = _Words(), _Words(), _Words()
        self._outcomes = {"client": _Words(), "executor": _Words()}
        Gauge("lloom_build_info", "1, with the version as a label.", ("version",), registry=reg).labels(version).set(1)

        self._connected = Gauge("lloom_connected_peers", "Peers with an open connection.", registry=reg)
        self._members = Gauge("lloom_member_peers", "Connected peers that proved our network.", registry=reg)
        self._executors = Gauge("lloom_known_executors", "Executors whose lease holds.", registry=reg)
        self._models = Gauge("lloom_known_models", "Different models that those executors offer.", registry=reg)
        self._sent = Counter("lloom_messages_sent", "Messages sent to peers.", ("kind",), registry=reg)
        self._received = Counter("lloom_messages_received", "Messages received from peers.", ("kind",), registry=reg)
        self._discovery = Histogram(
            "lloom_discovery_latency_seconds",
            "From the start of a search to the first usable executor.",
            buckets=DISCOVERY_BUCKETS,
            registry=reg,
        )
        self._duration = Histogram(
            "lloom_request_duration_seconds",
            "From a request to the end of its answer.",
            ("role",),
            buckets=DURATION_BUCKETS,
            registry=reg,
        )
        self._first_token = Histogram(
            "lloom_time_to_first_token_seconds",
            "From a request to the first byte of its answer's content.",
            ("role",),
            buckets=FIRST_TOKEN_BUCKETS,
            registry=reg,
        )
        self._requests = Counter(
            "lloom_requests",
            "Requests that ended, by outcome: ok, cancelled, or the error's code.",
            ("role", "outcome"),
            registry=reg,
        )
        self._attempts_failed = Counter(
            "lloom_attempts_failed", "Attempts at an executor that failed, by code.", ("code",), registry=reg
        )
        self._refused = Counter(
            "lloom_refused", "Requests of peers that were refused, by code.", ("code",), registry=reg
        )
        self._dropped = Counter(
            "lloom_announcements_dropped", "Announcements that were not believed, by reason.", ("reason",), registry=reg
        )
        self._status_dropped = Counter(
            "lloom_statuses_dropped", "Network statuses that were not believed, by reason.", ("reason",), registry=reg
        )
        self._banned = Counter(
            "lloom_peers_banned",
            "Peers kept away for ten minutes for their gossip, by reason.",
            ("reason",),
            registry=reg,
        )
        self._doubtful = Counter(
            "lloom_doubtful_receipts", "Receipts whose numbers cannot be, though they are signed.", registry=reg
        )
        self._ledger_failed = Gauge(
            "lloom_ledger_failed_writes", "Exchanges that could not be written into the ledger.", registry=reg
        )
        self._in_flight = Gauge("lloom_requests_in_flight", "Requests under way.", ("role",), registry=reg)
        self._queued = Gauge("lloom_queued_requests", "Requests of peers that wait for a slot.", registry=reg)
        self._queue_wait = Histogram(
            "lloom_queue_wait_seconds",
            "From the complete body of a peer's request to its slot.",
            buckets=QUEUE_WAIT_BUCKETS,
            registry=reg,
        )
        self._slots = Gauge("lloom_slots", "Requests that the backend works on at once.", registry=reg)
        tokens = Counter(
            "lloom_tokens",
            "Completion tokens: received by applications, as receipts say, and generated by this node's backend.",
            ("kind",),
            registry=reg,
        )
        self._tokens_of = {kind: (tokens.labels(kind), [0]) for kind in ("received", "generated")}
        self._p2pd_up = Gauge("lloom_p2pd_up", "1 while p2pd answers.", registry=reg)
        self._p2pd_restarts = Counter("lloom_p2pd_restarts", "Times that p2pd was started again.", registry=reg)
        self._http_refusals = Counter(
            "lloom_http_refusals", "HTTP requests refused before routing, by reason.", ("reason",), registry=reg
        )
        self._events_dropped = Counter("lloom_events_dropped", "Events that slow readers missed.", registry=reg)
        if health is not None:
            reg.register(_HealthCollector(health))
        if with_process:
            ProcessCollector(registry=reg)
        # Labelled children are looked up once: labels() costs microseconds in the request path.
        self._duration_of = {role: self._duration.labels(role) for role in ("client", "executor")}
        self._first_token_of = {role: self._first_token.labels(role) for role in ("client", "executor")}
        self._in_flight_of = {role: self._in_flight.labels(role) for role in ("client", "executor")}
        self._sent_of = {kind: self._sent.labels(kind) for kind in get_args(MessageKind)}
        self._received_of = {kind: self._received.labels(kind) for kind in self._sent_of}

    def set_tokens(self, *, received: int, generated: int) -> None:
        """The totals since the node started; they never go down."""
        for kind, total in (("received", received), ("generated", generated)):
            counter, last = self._tokens_of[kind]
            counter.inc(total - last[0])
            last[0] = total

    # --- the network

    def set_peers(self, connected: int, members: int) -> None:
        """How many peers are connected now, and how many of them proved our network."""
        self._connected.set(connected)
        self._members.set(members)

    def set_known(self, executors: int, models: int) -> None:
        """How many executors have a lease that holds, and how many different models they offer."""
        self._executors.set(executors)
        self._models.set(models)

    def message_sent(self, kind: MessageKind, count: int = 1) -> None:
        """Messages of ``kind`` went out."""
        self._sent_of[kind].inc(count)

    def message_received(self, kind: MessageKind, count: int = 1) -> None:
        """Messages of ``kind`` came in, believed or not."""
        self._received_of[kind].inc(count)

    def discovery_finished(self, seconds: float) -> None:
        """A search found its first usable executor after ``seconds``."""
        self._discovery.observe(seconds)

    def announcement_dropped(self, reason: str) -> None:
        """An announcement was not believed; ``reason`` is ``AnnouncementError.reason``."""
        self._dropped.labels(self._reasons.bounded(reason)).inc()

    def status_dropped(self, reason: str) -> None:
        """A network status was not believed; ``reason`` as for announcements, or ``network``: another one's."""
        self._status_dropped.labels(self._reasons.bounded(reason)).inc()

    def peer_banned(self, reason: str) -> None:
        """A peer is kept away for what it published: ``rate``, ``size``, ``signature``, ..."""
        self._banned.labels(self._reasons.bounded(reason)).inc()

    # --- requests

    def request_started(self, role: Role) -> None:
        """A request began; exactly one ``request_finished`` follows."""
        self._in_flight_of[role].inc()

    def first_token(self, role: Role, seconds: float) -> None:
        """The first byte of an answer's content came ``seconds`` after the request."""
        self._first_token_of[role].observe(seconds)

    def request_finished(self, role: Role, outcome: str, seconds: float) -> None:
        """A request ended: ``ok``, ``cancelled``, or the error's code."""
        self._in_flight_of[role].dec()
        self._duration_of[role].observe(seconds)
        self._requests.labels(role, self._outcomes[role].bounded(outcome)).inc()

    def attempt_failed(self, code: str) -> None:
        """An attempt at an executor failed, whether or not another one served the request."""
        self._attempts_failed.labels(self._codes.bounded(code)).inc()

    def refused(self, code: str) -> None:
        """A peer's request was refused: ``busy``, ``rate``, ``hello_required``, ..."""
        self._refused.labels(self._codes.bounded(code)).inc()

    def receipt_doubtful(self) -> None:
        """An executor signed for more tokens than there can be."""
        self._doubtful.inc()

    def set_ledger(self, failed_writes: int) -> None:
        """How many exchanges could not be written down since the start."""
        self._ledger_failed.set(failed_writes)

    def slot_given(self, waited_s: float) -> None:
        """A peer's request got a slot, ``waited_s`` after it could have used one."""
        self._queue_wait.observe(waited_s)

    def set_capacity(self, slots: int, queued: int) -> None:
        """An executor's slots, and how many requests wait for one now."""
        self._slots.set(slots)
        self._queued.set(queued)

    def http_refused(self, reason: str) -> None:
        """The HTTP server refused a request: ``host``, ``origin``, ``key``, ``content_type``, ``size``, ..."""
        self._http_refusals.labels(self._refusals.bounded(reason)).inc()

    # --- the node itself

    def p2pd_up(self, is_up: bool) -> None:
        """Whether p2pd answers now."""
        self._p2pd_up.set(1 if is_up else 0)

    def p2pd_restarted(self) -> None:
        """p2pd was started again after it had ended."""
        self._p2pd_restarts.inc()

    def events_dropped(self, count: int) -> None:
        """A reader of the events missed ``count`` of them."""
        self._events_dropped.inc(count)

    def set_callback(
        self, name: Literal["connected", "in_flight_executor", "queued"], read: Callable[[], float]
    ) -> None:
        """Read a gauge when it is scraped instead of setting it."""
        gauge = {
            "connected": self._connected,
            "in_flight_executor": self._in_flight_of["executor"],
            "queued": self._queued,
        }[name]
        gauge.set_function(read)

    def render(self) -> bytes:
        """The text that Prometheus scrapes, of type ``CONTENT_TYPE``."""
        return generate_latest(_WithoutCreated(self.registry))


class _HealthCollector(Collector):
    """``lloom_health_condition{code,severity} 1`` for each condition that holds."""

    def __init__(self, health: HealthConditions) -> None:
        self._health = health

    def collect(self) -> Iterable[Metric]:
        metric = Metric("lloom_health_condition", "1 for each health condition that holds.", "gauge")
        for one in self._health.current():
            metric.add_sample("lloom_health_condition", {"code": one.code, "severity": one.severity.value}, 1)
        return (metric,)


class _WithoutCreated:
    """A registry's metrics without their ``_created`` samples, which double the text and tell little."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            metric.samples = [one for one in metric.samples if not one.name.endswith("_created")]
            yield metric

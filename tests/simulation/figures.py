"""What a run counts, and the figures that come out of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lloom_sidecar.protocol.offers import Kind

from .gossip import COPIES, COPY_OVERHEAD_BYTES
from .parameters import Parameters
from .sizes import real_sizes

KIND_NAMES = {Kind.INITIAL: "full", Kind.UPDATE: "full", Kind.HEARTBEAT: "heartbeat", Kind.REMOVAL: "removal"}


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that ``share`` of all do not exceed; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.499999) - 1))]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Median, 99th percentile, maximum and how many."""
    return {
        "p50": _rounded(percentile(values, 0.5)),
        "p99": _rounded(percentile(values, 0.99)),
        "max": _rounded(max(values, default=None)),
        "count": len(values),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


@dataclass
class Tally:
    """Counted while the window is open, over all observers unless it says otherwise."""

    published: Counter[str] = field(default_factory=Counter)
    """Announcements of the whole network, by kind."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why a full announcement was made: start, introduction, age, topic_peer."""
    received: Counter[str] = field(default_factory=Counter)
    missed: int = 0
    """Lost on the way to one observer."""
    unheard: int = 0
    """Published before the mesh had formed: reached nobody."""
    dropped: Counter[str] = field(default_factory=Counter)
    """By the book, by reason."""
    probes: Counter[str] = field(default_factory=Counter)
    """By cause (suspect, wanted_full) and outcome (alive, dead)."""
    dials: Counter[str] = field(default_factory=Counter)
    """New connections, by cause."""
    catalogue_entries: int = 0
    """Read in refreshes."""
    catalogue_bytes: int = 0
    false_deaths: int = 0
    """Executors dropped that lived."""
    false_suspects: int = 0
    """Of ``looks``, how many showed a living executor as suspect."""
    looks: int = 0
    settled: int = 0
    """Executors that lived for over 15 s whenever a book was looked at."""
    missing: int = 0
    """How many of them were not in it."""
    requests: int = 0
    failovers: int = 0
    requests_failed: int = 0
    asked_after_failure: int = 0
    """Requests to a dead executor after this node's first failure with it, though others were there."""
    deaths: int = 0
    leaves: int = 0
    joins: int = 0
    user_known_s: list[float] = field(default_factory=list)
    """From death until an observer with a connection to it chooses others."""
    other_suspect_s: list[float] = field(default_factory=list)
    """From death until an observer without one takes it for suspect: from then on others are chosen."""
    other_dead_s: list[float] = field(default_factory=list)
    """... until it is out of the book."""
    removed_s: list[float] = field(default_factory=list)
    """From a removal until it is out of the book."""
    ages_s: list[float] = field(default_factory=list)
    """Of the newest announcement held, over observers and living executors."""
    known_s: list[float] = field(default_factory=list)
    """From the start of a new executor until an observer has it."""
    newcomer_s: list[float] = field(default_factory=list)
    """From a client's first dial until its book has everybody that was there."""
    newcomer_first_read_s: list[float] = field(default_factory=list)
    """... until it has taken in the first catalogue."""
    newcomer_first_read_share: list[float] = field(default_factory=list)
    """Of those that were there, how many the first catalogue had."""
    newcomers_incomplete: int = 0
    hops: list[float] = field(default_factory=list)


def summarise(parameters: Parameters, tally: Tally, interval_s: float, ttl_s: float) -> dict[str, Any]:
    """All figures of a run, ready for JSON."""
    window_s, observers = parameters.window_s, parameters.observers
    sizes = real_sizes()
    by_kind = {"full": sizes.full, "heartbeat": sizes.heartbeat, "removal": sizes.removal}
    received = {kind: tally.received[kind] / window_s / observers for kind in by_kind}
    rate = sum(received.values())
    copies = min(COPIES, max(1.0, float(parameters.executors)))
    copy_bytes = {kind: received[kind] * copies * (by_kind[kind] + COPY_OVERHEAD_BYTES) for kind in by_kind}
    network_full = tally.published["full"] / window_s
    published = sum(tally.published.values()) / window_s
    all_dials = sum(tally.dials.values()) / window_s / observers
    answered = sum(count for name, count in tally.probes.items() if name.endswith("_alive")) / window_s / observers
    in_vain = sum(count for name, count in tally.probes.items() if name.endswith("_dead")) / window_s / observers
    per_node = parameters.clients / max(1, parameters.executors)
    refresh_bytes = tally.catalogue_bytes / window_s / observers
    return {
        "parameters": {
            "executors": parameters.executors,
            "seed": parameters.seed,
            "loss": parameters.loss,
            "death": parameters.death.value,
            "link_s": parameters.hop.link_s,
            "window_s": window_s,
            "observers": observers,
            "clients": parameters.clients,
            "lifetime_s": parameters.lifetime_s,
            "reannounces": parameters.reannounces,
            "refresh_catalogue_s": parameters.refresh_catalogue_s,
            "fixed_interval_s": parameters.interval_s,
            "hints_every_s": parameters.hints_every_s,
        },
        "interval_s": round(interval_s, 2),
        "ttl_s": round(ttl_s, 2),
        "hops": spread(tally.hops),
        "messages_per_s": {
            "published_by_network": round(published, 3),
            "published_by_executor": round(published / parameters.executors, 5),
            "received_by_node": round(rate, 3),
            "received_copies_by_node": round(rate * copies, 2),
            "forwarded_copies_by_node": round(rate * copies, 2),
            "received_by_kind": {kind: round(value, 3) for kind, value in received.items()},
            "full_by_reason": {reason: round(count / window_s, 3) for reason, count in sorted(tally.reasons.items())},
            "full_share": round(network_full / published, 3) if published else 0.0,
        },
        "bytes_per_s": {
            "gossip_in_by_kind": {kind: round(value) for kind, value in copy_bytes.items()},
            "gossip_in": round(sum(copy_bytes.values())),
            "catalogue_refresh_in": round(refresh_bytes),
            "catalogue_out_of_validators": round(refresh_bytes * parameters.clients),
        },
        "probes": {
            "answered_per_client_s": round(answered, 4),
            "in_vain_per_client_s": round(in_vain, 4),
            "received_by_executor_per_s": round(answered * per_node, 4),
            "by_cause": dict(sorted(tally.probes.items())),
            "dials_by_client_per_s": round(all_dials, 4),
            "dials_by_cause": dict(sorted(tally.dials.items())),
        },
        "catalogue_age_s": spread(tally.ages_s),
        "death_known_s": {
            "users": spread(tally.user_known_s),
            "others_suspect": spread(tally.other_suspect_s),
            "others_dead": spread(tally.other_dead_s),
        },
        "removal_known_s": spread(tally.removed_s),
        "new_executor_known_s": spread(tally.known_s),
        "newcomer_complete_s": spread(tally.newcomer_s),
        "newcomer_first_read_s": spread(tally.newcomer_first_read_s),
        "newcomer_first_read_share": _rounded(percentile(tally.newcomer_first_read_share, 0.5)),
        "newcomers_incomplete": tally.newcomers_incomplete,
        "false_deaths_per_executor_hour": round(
            tally.false_deaths / observers / parameters.executors / window_s * 3600, 5
        ),
        "false_deaths": tally.false_deaths,
        "false_suspect_share": round(tally.false_suspects / tally.looks, 6) if tally.looks else 0.0,
        "missing_share": round(tally.missing / max(1, tally.settled), 6),
        "churn": {"deaths": tally.deaths, "leaves": tally.leaves, "joins": tally.joins},
        "requests": {
            "made": tally.requests,
            "failovers": tally.failovers,
            "failed": tally.requests_failed,
            "asked_after_failure": tally.asked_after_failure,
        },
        "dropped": dict(sorted(tally.dropped.items())),
        "lost_on_the_way": tally.missed,
        "published_before_mesh": tally.unheard,
    }

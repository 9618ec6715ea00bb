"""What is known of other peers: pure state, every instant is an argument.

Imports: errors, ids, protocol.offers. Methods are synchronous, so under trio each update is atomic without a lock.
"""

from __future__ import annotations

from .addresses import IpNetwork, dialable
from .executors import ExecutorView, LeaseState, ModelIndex
from .health import Circuit, HealthBook, HealthLimits, Outcome, Ticket
from .peerbook import (
    CatalogueItem,
    CataloguePage,
    Change,
    ModelSummary,
    PeerBook,
    PeerBookLimits,
    PeerView,
)
from .rate import RateLimiter, TokenBucket
from .selection import Choice, Considered, Filtered, Policy, Rule, Wanted, choose

__all__ = [
    "CatalogueItem",
    "CataloguePage",
    "Change",
    "Choice",
    "Circuit",
    "Considered",
    "ExecutorView",
    "Filtered",
    "HealthBook",
    "HealthLimits",
    "IpNetwork",
    "LeaseState",
    "ModelIndex",
    "ModelSummary",
    "Outcome",
    "PeerBook",
    "PeerBookLimits",
    "PeerView",
    "Policy",
    "RateLimiter",
    "Rule",
    "Ticket",
    "TokenBucket",
    "Wanted",
    "choose",
    "dialable",
]

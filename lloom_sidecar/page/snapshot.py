"""What the status page shows, as one JSON object: a node's own snapshots, cut to what a page can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypedDict

from lloom_sidecar.admin.explaining import RequestInfo
from lloom_sidecar.admin.view import ExecutorInfo, ModelInfo, NodeView, PeerInfo, Status
from lloom_sidecar.errors import LloomError

MAX_PEERS: Final = 300
"""Connected ones come first in the view, so they are what stays."""
MAX_MODELS: Final = 200
MAX_EXECUTORS: Final = 300
MAX_REQUESTS: Final = 20


class Snapshot(TypedDict):
    """GET /snapshot.json, and each ``snapshot`` event of /live."""

    status: Status
    peers: list[PeerInfo]
    """At most 300, connected ones first."""
    peers_total: int
    executors: list[ExecutorInfo]
    models: list[ModelInfo]
    models_total: int
    requests: list[RequestInfo]
    """The last 20 of this node's applications, newest first; empty when it has no API."""


def take_snapshot(view: NodeView) -> Snapshot:
    """The node now. Synchronous, and so of one moment."""
    peers, models = view.peers(), view.models()
    return Snapshot(
        status=view.status(),
        peers=peers[:MAX_PEERS],
        peers_total=len(peers),
        executors=view.executors()[:MAX_EXECUTORS],
        models=models[:MAX_MODELS],
        models_total=len(models),
        requests=_requests(view.operations.requests)[:MAX_REQUESTS],
    )


def _requests(ask: Callable[[], list[RequestInfo]]) -> list[RequestInfo]:
    try:
        return ask()
    except LloomError:  # this node has no API, so there are none
        return []

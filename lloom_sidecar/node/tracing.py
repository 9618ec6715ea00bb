"""Whether and where this node's spans go."""

from __future__ import annotations

import os
from typing import Final

import structlog

from lloom_sidecar.config import Config
from lloom_sidecar.errors import ConfigError
from lloom_sidecar.ids import PeerId
from lloom_sidecar.tracing import Tracing

_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
"""OpenTelemetry's own way to say it. Source: its specification of environment variables."""
_HINT: Final = "pip install 'lloom-sidecar[otel]'"

log = structlog.get_logger("lloom.tracing")


def make_tracing(config: Config, me: PeerId, *, version: str) -> Tracing:
    """Tracing as configured; without a receiver nothing of OpenTelemetry is imported.

    Raises ConfigError when a receiver is configured and the extra is missing. Where only OpenTelemetry's variables name
    one, which an operator sets for every pod, that is a warning.
    """
    is_set = config.otlp_endpoint is not None
    if not is_set and not any(os.environ.get(name) for name in _VARIABLES):
        return Tracing()
    try:
        from lloom_sidecar.tracing.otel import exporting

        return exporting(config.otlp_endpoint, version=version, instance=str(me))
    except ImportError as exc:
        if is_set:
            raise ConfigError(f"otlp_endpoint needs OpenTelemetry: {_HINT}") from exc
        log.warning("no_traces", reason=f"OpenTelemetry is not installed: {_HINT}")
        return Tracing()

"""An OpenTelemetry SDK in the roles that make spans (gateway and engine), if the standard variables ask for one.

Each of these processes sets it up for itself: an SDK has threads, and what starts as one process with them must not
fork. So `opentelemetry-instrument` around `elastic serve` is refused, which would hang otherwise.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import structlog

from membership.base.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENV = "OTEL_TRACES_EXPORTER"  # OpenTelemetry's own: otlp, console, or any exporter that is installed
ROLES = ("gateway", "engine")
ALIASES = {"otlp": "otlp_proto_http"}
LAST_EXPORT_S = 2.0  # at the end, for what is not exported yet

log = structlog.get_logger(__name__)


def require_no_sdk() -> None:
    """ConfigError if this process, which forks others, has an SDK already."""
    sdk = sys.modules.get("opentelemetry.sdk.trace")
    if sdk is None:
        return
    from opentelemetry import trace

    if isinstance(trace.get_tracer_provider(), sdk.TracerProvider):
        message = "an OpenTelemetry SDK is set up in this process, whose threads no fork of it would survive"
        raise ConfigError(message, hint=f"start it without opentelemetry-instrument; the roles obey {ENV}=otlp")


@contextmanager
def exported(role: str) -> Iterator[None]:
    """Within the block spans of this process are exported, if it is a role that makes any and the environment asks."""
    name = os.environ.get(ENV, "")
    if role not in ROLES or name in ("", "none"):
        yield
        return
    from opentelemetry import trace

    provider = _provider(role, name)
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        _shut_down(provider)


def _provider(role: str, name: str) -> TracerProvider:
    found = next(iter(entry_points(group="opentelemetry_traces_exporter", name=ALIASES.get(name, name))), None)
    if found is None:
        raise ConfigError(f"{ENV}={name}: no such exporter is installed", hint="pip install 'elastic-ep[traces]'")
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: f"elastic-ep-{role}"}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(found.load()()))
    return provider


def _shut_down(provider: TracerProvider) -> None:
    """Export the rest. A collector that does not answer keeps no role from ending."""
    last = threading.Thread(target=provider.shutdown, name="last-export", daemon=True)
    last.start()
    last.join(LAST_EXPORT_S)
    if last.is_alive():
        log.warning("spans_not_exported", waited_s=LAST_EXPORT_S)

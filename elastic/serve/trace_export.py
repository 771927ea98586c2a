"""An OpenTelemetry SDK in the roles that make spans (gateway and engine), if the standard variables ask for one.

Each of these processes sets it up for itself: an SDK has threads, and what starts as one process with them must not
fork. So `opentelemetry-instrument` around `elastic serve` is refused, which would hang otherwise.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator
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
    names = {name.strip() for name in os.environ.get(ENV, "").split(",")} - {"", "none"}
    provider = _provider(role, names) if role in ROLES and names else None
    if provider is None:
        yield
        return
    from opentelemetry import trace

    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        _shut_down(provider)


def _provider(role: str, names: Iterable[str]) -> TracerProvider | None:
    """None without any of these exporters: a variable that others set for all of their programs stops no service."""
    found = []
    for name in sorted(names):
        there = list(entry_points(group="opentelemetry_traces_exporter", name=ALIASES.get(name, name)))[:1]
        found += there
        if not there:
            log.warning("traces_not_exported", exporter=name, hint="pip install 'elastic-ep[traces]', or set none")
    if not found:
        return None
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: f"elastic-ep-{role}"}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    for exporter in found:
        provider.add_span_processor(BatchSpanProcessor(exporter.load()()))
    return provider


def _shut_down(provider: TracerProvider) -> None:
    """Export the rest. A collector that does not answer keeps no role from ending."""
    last = threading.Thread(target=provider.shutdown, name="last-export", daemon=True)
    last.start()
    last.join(LAST_EXPORT_S)
    if last.is_alive():
        log.warning("spans_not_exported", waited_s=LAST_EXPORT_S)

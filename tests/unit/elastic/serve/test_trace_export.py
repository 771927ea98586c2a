"""The SDK that gateway and engine set up for themselves: if asked for, with its exporter, and until the end."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from elastic.serve import trace_export
from elastic.serve.trace_export import ENV, exported, require_no_sdk
from membership.base.errors import ConfigError

pytestmark = pytest.mark.unit


class Kept(SpanExporter):
    names: list[str]

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        Kept.names += [f"{span.name} of {span.resource.attributes['service.name']}" for span in spans]
        return SpanExportResult.SUCCESS


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Those that would have become this process's, of exporters that are called `kept`."""
    made: list[Any] = []
    Kept.names = []
    monkeypatch.setattr(trace, "set_tracer_provider", made.append)
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    there = [SimpleNamespace(load=lambda: Kept)]
    monkeypatch.setattr(trace_export, "entry_points", lambda group, name: there if name == "kept" else [])
    return made


@pytest.mark.parametrize(
    ("role", "asked"), [("engine", ""), ("engine", "none"), ("agent", "kept"), ("controller", "x")]
)
def test_who_makes_no_spans_or_is_not_asked_for_any_has_no_sdk(
    providers: list[Any], monkeypatch: pytest.MonkeyPatch, role: str, asked: str
) -> None:
    monkeypatch.setenv(ENV, asked)
    with exported(role):
        assert providers == []


def test_what_has_ended_is_exported_at_the_end(providers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, "kept")
    with exported("engine"):
        (provider,) = providers
        provider.get_tracer("t").start_span("a").end()
    assert Kept.names == ["a of elastic-ep-engine"]


def test_an_exporter_that_is_not_installed_stops_no_service(
    providers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever runs many programs may have set it for all of them."""
    monkeypatch.setenv(ENV, "otlp")
    with structlog.testing.capture_logs() as logs, exported("gateway"):
        assert providers == []
    assert [(line["exporter"], "elastic-ep[traces]" in line["hint"]) for line in logs] == [("otlp", True)]
    monkeypatch.setenv(ENV, "otlp, kept")
    with exported("gateway"):
        assert len(providers) == 1, "the other one of the list is used"


def test_a_process_with_an_sdk_forks_no_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    require_no_sdk()
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: TracerProvider(shutdown_on_exit=False))
    with pytest.raises(ConfigError, match="no fork of it") as refused:
        require_no_sdk()
    assert "opentelemetry-instrument" in refused.value.hint

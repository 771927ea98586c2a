"""Spans of traced requests: what they say of each way that a request can go, and that others cost nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_span_id, format_trace_id

from elastic.engine.migration import Moved
from elastic.engine.traces import MAX_STEPS, Traces
from elastic.protocol import Rejected, Submit, Tokens
from membership.base.events import Event
from tests.support.spans import PARENT, SAMPLED, TRACE, kept_spans
from workers.protocol.messages import Sampling, SeqChunk, StepBatch, StepResult, StepStatus, TracedResult, TracedStep

pytestmark = pytest.mark.unit
TOKEN = 3
MASKED = Event(
    ts=2.5, role="engine", kind="rank_masked", epoch=4, rank=1, fields={"source": "futex", "request_ids": []}
)


class Told:
    """Traces under a clock of ours."""

    def __init__(self, kept: InMemorySpanExporter) -> None:
        self.now, self.kept = 1.0, kept
        self.traces = Traces(lambda: self.now)

    def submit(self, name: str = "a", seq: int = 1, trace: str = SAMPLED, **more: Any) -> None:
        self.traces.admitted(Submit(name, [1, 2, 3], Sampling(), 9, trace=trace, **more), seq)

    def step(self, rank: int, *seqs: int, tokens: int = 1) -> StepBatch:
        chunks = [SeqChunk(seq, 0, [7] * tokens, [0]) for seq in seqs]
        return self.traces.begun(StepBatch(TOKEN, 4, 11, 0, [], {rank: chunks}))

    def answer(self, rank: int, took_s: float = 0.0) -> None:
        plain = StepResult(rank, 10 + rank, TOKEN, 4, 11, 0, StepStatus.OK)
        self.now += 0.25
        self.traces.answered(TracedResult.of(plain, took_s, took_s / 2))

    def put(self, index: int, reason: str = "", name: str = "a") -> None:
        self.traces.put([Tokens(TOKEN, name, index, [5], finish_reason=reason)])

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.kept.get_finished_spans()}

    def said(self, name: str) -> dict[str, Any]:
        return {k.removeprefix("elastic_ep."): v for k, v in (self.spans()[name].attributes or {}).items()}


@pytest.fixture
def told() -> Iterator[Told]:
    with kept_spans() as kept:
        yield Told(kept)


def times(span: ReadableSpan) -> tuple[float, float]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time / 1e9, span.end_time / 1e9


def test_phases_and_steps_are_children_of_the_gateways_span(told: Told) -> None:
    told.submit()
    told.now = 2.0
    assert isinstance(told.step(1, 1, tokens=3), TracedStep)
    told.answer(1, took_s=0.125)
    told.put(0)
    told.step(1, 1)
    told.answer(1, took_s=9.0)  # longer than the step, by a rank's own clock: the span stays within the step
    told.put(1, "length")
    spans = told.spans()
    root = spans["engine"]
    assert root.parent is not None
    assert (format_trace_id(root.context.trace_id), format_span_id(root.parent.span_id)) == (TRACE, PARENT)
    assert {name for name, span in spans.items() if span.parent and span.parent.span_id == root.context.span_id} == {
        "queued", "prefill", "decode", "step",
    }  # fmt: skip
    assert [times(spans[name]) for name in ("engine", "queued", "prefill", "decode")] == [
        (1.0, 2.5), (1.0, 2.0), (2.0, 2.25), (2.25, 2.5),
    ]  # fmt: skip
    steps = [span for span in told.kept.get_finished_spans() if span.name == "step"]
    assert [times(step) for step in steps] == [(2.125, 2.25), (2.25, 2.5)]
    assert told.said("step") == {
        "rank": 1, "incarnation": 11, "epoch": 4, "step": 11, "tokens": 1, "took_s": 9.0, "exchange_s": 4.5,
        "retried_rows": 0,
    }  # fmt: skip
    assert told.said("prefill") == {"rank": 1, "cached_tokens": 0, "steps": 1, "rank_s": 0.125, "exchange_s": 0.0625}
    root_says = told.said("engine")
    assert (root_says["gen_ai.usage.output_tokens"], root_says["finish_reason"]) == (2, "length")


def test_a_recovery_names_the_event_of_the_history(told: Told) -> None:
    told.submit()
    told.submit("b", 2, trace="")
    told.step(1, 1, 2)
    told.answer(1)
    told.put(0)
    told.now = 3.0
    told.traces.lost(["a", "b"], 0.5, MASKED, 4)
    told.step(0, 1)
    told.answer(0)
    told.put(1)
    recovery = told.spans()["recovery"]
    assert times(recovery) == (2.5, 3.25)
    assert told.said("recovery") == {"rank": 1, "epoch": 4, "target_rank": 0}
    (event,) = recovery.events
    assert (event.name, event.timestamp) == ("rank_masked", 2_500_000_000)
    assert dict(event.attributes or {}) == {
        "elastic_ep.event.ts": 2.5, "elastic_ep.epoch": 4, "elastic_ep.rank": 1, "elastic_ep.source": "futex",
    }  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [("request_moved", "migration"), ("request_salvaged", "salvage")])
def test_a_request_that_keeps_what_was_computed_says_from_where(told: Told, kind: str, name: str) -> None:
    told.submit()
    told.now = 3.0
    told.traces.moved(Moved("a", 0, 2, 64, 500.0), Event(ts=3.0, role="engine", kind=kind, epoch=5, rank=2))
    told.traces.moved(Moved("b", 0, 2, 64, 500.0), Event(ts=3.0, role="engine", kind=kind, epoch=5, rank=2))
    assert told.said(name) == {"rank": 0, "target_rank": 2, "epoch": 5, "tokens": 64}
    assert times(told.spans()[name]) == (2.5, 3.0)
    assert [event.name for event in told.spans()[name].events] == [kind]


def test_every_end_ends_the_spans(told: Told) -> None:
    for name in ("refused", "gone", "cut off", "again"):
        told.submit(name, emitted=[7])
    told.traces.put([Rejected(TOKEN, "refused", 429, "overloaded")])
    told.traces.dropped("gone")
    told.submit("again")
    told.traces.close()
    ends = [
        (
            span.attributes["elastic_ep.request_id"],
            span.attributes.get("elastic_ep.finish_reason"),
            span.status.description,
        )
        for span in told.kept.get_finished_spans()
        if span.name == "engine" and span.attributes
    ]
    stood_down = "the engine stood down"
    assert ends == [
        ("refused", None, "429 overloaded"), ("gone", "abort", None), ("again", "abort", None),
        ("cut off", None, stood_down), ("again", None, stood_down),
    ]  # fmt: skip
    assert len(told.kept.get_finished_spans()) == 2 * len(ends), "each was queued"


def test_a_long_answer_has_no_more_spans_than_can_be_read(told: Told) -> None:
    told.submit()
    for index in range(MAX_STEPS + 5):
        told.step(0, 1)
        told.answer(0, took_s=0.125)
        told.put(index)
    told.traces.close()
    assert sum(span.name == "step" for span in told.kept.get_finished_spans()) == MAX_STEPS
    assert told.said("decode")["steps"] == MAX_STEPS + 4


def test_what_nobody_traces_costs_nothing(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.startswith("opentelemetry")]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    told.submit(trace="")
    batch = told.step(0, 1)
    assert type(batch) is StepBatch
    told.put(0, "stop")
    told.traces.close()
    assert told.kept.get_finished_spans() == ()


def test_without_an_sdk_a_sampled_request_is_not_traced() -> None:
    traces = Traces(lambda: 1.0)
    traces.admitted(Submit("a", [1], Sampling(), 9, trace=SAMPLED), 1)
    batch = StepBatch(TOKEN, 4, 11, 0, [], {0: [SeqChunk(1, 0, [7], [0])]})
    assert traces.begun(batch) is batch

"""Where the time of a traced request went, as OpenTelemetry spans: queued, prefill, decode, recoveries, moves, and its
steps on ranks.

A request is traced if its gateway's span is sampled (`Submit.trace`), and this process has an OpenTelemetry SDK that
takes it. While none is, nothing is imported, and steps carry nothing for it. Ranks have no exporter: they answer with
durations, of which spans are made here, on this host's clock alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastic.engine.migration import Moved
from elastic.protocol import Rejected, Submit, Tokens
from membership.base.events import Event
from workers.protocol.messages import StepBatch, StepResult, TracedResult, TracedStep

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span, Tracer

MAX_STEPS = 256  # spans of steps per request; `steps` of its phases counts all
QUEUED, PREFILL, DECODE = "queued", "prefill", "decode"
PREFIX = "elastic_ep."
Attribute = str | int | float | bool


@dataclass(eq=False)
class _Traced:
    """A request under way, and its open spans."""

    seq: int
    tracer: Tracer
    root: Span
    context: Context  # of the root
    phase_name: str
    phase: Span
    recovery: Span | None = None
    rank: int = -1  # of its last step
    tokens: int = 0  # of its chunk there
    steps: int = 0  # in this phase
    shown_steps: int = 0
    rank_s: float = 0.0  # in this phase
    exchange_s: float = 0.0


class Traces:
    """The traced requests of one engine. `wall` tells the time of day, in seconds."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._open: dict[str, _Traced] = {}
        self._step_began = 0.0

    # ---- the request

    def admitted(self, request: Submit, seq: int) -> None:
        """A request has come. `seq`: its number in steps."""
        self.dropped(request.request_id)
        if not request.trace or "opentelemetry.sdk.trace" not in sys.modules:  # a client may send one all the same
            return
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        tracer, now = trace.get_tracer("elastic_ep.engine"), self._wall()
        parent = TraceContextTextMapPropagator().extract({"traceparent": request.trace})
        root = tracer.start_span(
            "engine",
            parent,
            attributes={
                PREFIX + "request_id": request.request_id,
                PREFIX + "resumed_tokens": len(request.emitted),  # emitted by an engine before this one
                "gen_ai.request.max_tokens": request.max_tokens,
                "gen_ai.usage.input_tokens": len(request.prompt),
            },
            start_time=_ns(now),
        )
        if root.is_recording():
            context = trace.set_span_in_context(root)
            queued = tracer.start_span(QUEUED, context, start_time=_ns(now))
            self._open[request.request_id] = _Traced(seq, tracer, root, context, QUEUED, queued)

    def put(self, outputs: Iterable[Tokens | Rejected]) -> None:
        """Tokens, or an end, have come of requests."""
        if not self._open:
            return
        now = self._wall()
        for output in outputs:
            traced = self._open.get(output.request_id)
            if traced is None:
                continue
            if isinstance(output, Rejected):
                self._fail(traced, f"{output.status} {output.message}")
                self._end(output.request_id, now)
                continue
            if traced.recovery is not None:
                traced.recovery.set_attribute(PREFIX + "target_rank", traced.rank)
                traced.recovery.end(_ns(now))
                traced.recovery = None
            if traced.phase_name != DECODE:
                self._enter(traced, DECODE, now)
            if output.finish_reason:
                traced.root.set_attribute("gen_ai.usage.output_tokens", output.index + len(output.tokens))
                traced.root.set_attribute(PREFIX + "finish_reason", output.finish_reason)
                self._end(output.request_id, now)

    def dropped(self, request_id: str) -> None:
        """Its client, or its gateway, has given it up; or it comes again."""
        if request_id in self._open:
            self._open[request_id].root.set_attribute(PREFIX + "finish_reason", "abort")
            self._end(request_id, self._wall())

    def close(self) -> None:
        """This engine ends: what is under way goes on in another one."""
        for request_id, traced in list(self._open.items()):
            self._fail(traced, "the engine stood down")
            self._end(request_id, self._wall())

    # ---- its steps

    def begun(self, batch: StepBatch) -> StepBatch:
        """A step begins; what to send to the ranks for it."""
        if not self._open:
            return batch
        now = self._step_began = self._wall()
        by_seq = {traced.seq: traced for traced in self._open.values()}
        found: list[int] = []
        for rank, chunks in batch.ranks.items():
            for chunk in chunks:
                if traced := by_seq.get(chunk.seq):
                    traced.rank, traced.tokens = rank, len(chunk.tokens)
                    if traced.phase_name == QUEUED:
                        self._enter(traced, PREFILL, now)
                        traced.phase.set_attribute(PREFIX + "cached_tokens", chunk.start)
                    found.append(chunk.seq)
        for traced in self._open.values():
            if traced.seq not in found:
                traced.tokens = 0
        return TracedStep.of(batch, found) if found else batch

    def answered(self, result: StepResult) -> None:
        """A rank has answered the step."""
        if not isinstance(result, TracedResult):
            return
        now = self._wall()
        began = max(self._step_began, now - result.took_s)
        for traced in self._open.values():
            if traced.rank != result.rank or not traced.tokens:
                continue
            traced.steps += 1
            traced.rank_s += result.took_s
            traced.exchange_s += result.exchange_s
            if traced.shown_steps < MAX_STEPS:
                traced.shown_steps += 1
                said: dict[str, Attribute] = {
                    "rank": result.rank, "incarnation": result.incarnation, "epoch": result.epoch,
                    "step": result.step, "tokens": traced.tokens, "took_s": result.took_s,
                    "exchange_s": result.exchange_s, "retried_rows": result.retried_rows,
                }  # fmt: skip
                self._span(traced, "step", began, said).end(_ns(now))

    # ---- what befalls it

    def lost(self, request_ids: Iterable[str], ago_s: float, event: Event | None, epoch: int) -> None:
        """These have lost their home, so long ago. `event`: the history's, of the rank; None: it is not in the view."""
        for request_id in request_ids if self._open else ():
            traced = self._open.get(request_id)
            if traced is None:
                continue
            if traced.recovery is None:
                traced.recovery = self._span(
                    traced, "recovery", self._wall() - ago_s, {"rank": traced.rank, "epoch": epoch}
                )
            if event is not None:
                _note(traced.recovery, event)

    def moved(self, move: Moved, event: Event) -> None:
        """It has another home with what was computed, alive (`request_moved`) or left by a dead rank."""
        if traced := self._open.get(move.request_id):
            name = "migration" if event.kind == "request_moved" else "salvage"
            said: dict[str, Attribute] = {
                "rank": move.source, "target_rank": move.target, "epoch": event.epoch, "tokens": move.tokens,
            }  # fmt: skip
            span = self._span(traced, name, self._wall() - move.ms / 1000, said)
            _note(span, event)
            span.end(_ns(self._wall()))

    # ---- spans

    def _span(self, traced: _Traced, name: str, began: float, said: dict[str, Attribute]) -> Span:
        attributes = {PREFIX + key: value for key, value in said.items()}
        return traced.tracer.start_span(name, traced.context, attributes=attributes, start_time=_ns(began))

    def _enter(self, traced: _Traced, phase: str, now: float) -> None:
        self._leave(traced, now)
        traced.phase_name, traced.phase = phase, self._span(traced, phase, now, {"rank": traced.rank})

    def _leave(self, traced: _Traced, now: float) -> None:
        if traced.steps:
            said = {"steps": traced.steps, "rank_s": traced.rank_s, "exchange_s": traced.exchange_s}
            traced.phase.set_attributes({PREFIX + key: value for key, value in said.items()})
        traced.steps, traced.rank_s, traced.exchange_s = 0, 0.0, 0.0
        traced.phase.end(_ns(now))

    def _fail(self, traced: _Traced, why: str) -> None:
        from opentelemetry.trace import Status, StatusCode

        traced.root.set_status(Status(StatusCode.ERROR, why))

    def _end(self, request_id: str, now: float) -> None:
        traced = self._open.pop(request_id)
        self._leave(traced, now)
        if traced.recovery is not None:
            traced.recovery.end(_ns(now))
        traced.root.end(_ns(now))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


def _note(span: Span, event: Event) -> None:
    """Name the event of the cluster's history: `ts` and kind find it there."""
    said: dict[str, Attribute] = {PREFIX + "event.ts": event.ts, PREFIX + "epoch": event.epoch}
    if event.rank is not None:
        said[PREFIX + "rank"] = event.rank
    plain = {PREFIX + key: value for key, value in event.fields.items() if isinstance(value, Attribute)}
    span.add_event(event.kind, {**plain, **said}, _ns(event.ts))

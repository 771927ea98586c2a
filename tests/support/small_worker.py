"""A worker without a model, for tests of what is around a worker. `config.model` names its faults, comma-separated."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import ModuleType
from typing import Any

from membership.base.errors import CoverageLost, Fenced, WaitTimeout
from membership.planning.identity import KERNELS
from membership.store.records import View
from workers.protocol.identity import Identity
from workers.protocol.messages import CopyBlocks, SampledToken, StepBatch, StepResult, StepStatus
from workers.rank.worker_api import WorkerContext


def trace_to_file() -> None:
    """For the forkserver: have each rank write the names of its spans into its diary."""
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    class Diary(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            with open(os.path.join(os.environ["SMALL_WORKER_DIARY"], "spans"), "a") as diary:
                diary.writelines(f"{span.name}\n" for span in spans)
            return SpanExportResult.SUCCESS

    provider = TracerProvider(resource=Resource.get_empty())  # looking for resources takes threads
    provider.add_span_processor(SimpleSpanProcessor(Diary()))
    trace.set_tracer_provider(provider)


def pretend_groups() -> None:
    """For the forkserver: a torch.distributed with a group, without torch."""

    class Groups(ModuleType):
        def is_available(self) -> bool:
            return True

        def is_initialized(self) -> bool:
            return True

        def destroy_process_group(self) -> None:
            with open(os.path.join(os.environ["SMALL_WORKER_DIARY"], "groups"), "w") as diary:
                diary.write("destroyed")

    sys.modules["torch.distributed"] = Groups("torch.distributed")


class Preparing:
    """An output that is there after a while."""

    def __init__(self, after_s: float, error: Exception | None = None, value: Any = 0) -> None:
        self._at = time.monotonic() + after_s
        self._error = error
        self._value = value

    def get_output(self, timeout_s: float) -> Any:
        left = self._at - time.monotonic()
        time.sleep(max(0.0, min(left, timeout_s)))
        if left > timeout_s:
            raise WaitTimeout("still preparing")
        if self._error is not None:
            raise self._error
        return self._value


class Awaited:
    """An output that is there once a test has made this file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def get_output(self, timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        while not os.path.exists(self._path):
            if time.monotonic() > deadline:
                raise WaitTimeout(f"there is no {self._path}")
            time.sleep(0.01)
        return "there"


class SmallWorker:
    def __init__(self, ctx: WorkerContext) -> None:
        self.ctx = ctx
        self.calls: list[str] = []
        self.prepared: dict[int, dict[int, tuple[int, bytes]]] = {}
        self.epoch = 0
        self.mask = b""
        self.polls = 0
        self.faults = set(ctx.config.model.split(","))
        if "hang-at-start" in self.faults:
            threading.Event().wait(60)
        if f"fail-at-start-{ctx.rank}" in self.faults:
            raise ValueError("this worker fails at its start")

    def init_device(self) -> None:
        self.calls.append("init_device")

    def load_model(self) -> None:
        self.calls.append("load_model")
        if "fail-load" in self.faults:
            raise ValueError("no such checkpoint")
        if "piecemeal" in self.faults:
            self._load_bytes_of_a_pipe()

    def _load_bytes_of_a_pipe(self) -> None:
        """Four bytes in all, as a test writes them."""
        self.ctx.progress.expect(4)
        with open(os.path.join(self.ctx.environ["SMALL_WORKER_DIARY"], "bytes"), "rb", buffering=0) as pipe:
            while pipe.read(1):
                self.ctx.progress.add(1)

    def identity(self) -> Identity:
        weights = self._diary("model")
        return Identity({KERNELS: "small"} | ({"weights": weights} if weights else {}))

    def _diary(self, name: str) -> str:
        """What a test has written there for us."""
        with suppress(OSError, KeyError), open(os.path.join(self.ctx.environ["SMALL_WORKER_DIARY"], name)) as diary:
            return diary.read()
        return ""

    def prepare_epoch(self, view: View, peers: dict[int, tuple[int, bytes]]) -> Preparing:
        self.calls.append(f"prepare-{view.epoch}")
        self.prepared[view.epoch] = peers
        fails = "fail-prepare" in self.faults and self.ctx.rank == 0
        digests = self._diary("experts").encode()
        return Preparing(0.05, ValueError("no room for experts") if fails else None, {"expert_digests": (digests,)})

    def commit_epoch(self, epoch: int) -> None:
        if epoch not in self.prepared:
            raise Fenced(f"epoch {epoch} was not prepared")
        self.epoch = epoch
        self.calls.append(f"commit-{epoch}")

    def retire_epoch(self, epoch: int) -> None:
        self.calls.append(f"retire-{epoch}")

    def execute_model(self, batch: StepBatch) -> StepResult | Preparing | None:
        chunks = batch.ranks.get(self.ctx.rank)
        if not chunks:
            return None
        if chunks[0].tokens == [13]:
            raise CoverageLost("expert 13 has no owner")
        if chunks[0].tokens == [14]:
            raise ValueError("bad chunk")
        result = StepResult(
            self.ctx.rank, self.ctx.incarnation, batch.engine_token, batch.epoch, batch.step, batch.attempt,
            StepStatus.OK, [SampledToken(chunk.seq, sum(chunk.tokens)) for chunk in chunks],
        )  # fmt: skip
        return Preparing(0.05, value=result) if chunks[0].tokens == [15] else result

    def copy_blocks(self, order: CopyBlocks) -> int:
        if order.blocks == [13]:
            raise ValueError("block 13 cannot be copied")
        return len(order.blocks)

    def post_blocks(self, order: CopyBlocks, then: Callable[[], None]) -> None:
        then()

    def poll(self) -> None:
        self.polls += 1
        if "fail-on-demand" in self.faults and os.path.exists(f"{self.ctx.environ['SMALL_WORKER_DIARY']}/fail"):
            raise ValueError("this worker fails while it serves")

    def pending(self) -> bool:
        return False

    def become(self, rank: int, incarnation: int) -> None:
        if "fail-become" in self.faults:
            raise ValueError("this worker stays what it is")
        self.ctx = replace(self.ctx, rank=rank, incarnation=incarnation)

    def exchange_handle(self) -> bytes:
        return b"exchange-%d-%d" % (self.ctx.rank, self.ctx.incarnation)

    def evicted(self) -> bool:
        return False

    def attach_mask(self, handle: bytes) -> None:
        self.mask = handle

    def shutdown(self) -> None:
        if directory := self.ctx.environ.get("SMALL_WORKER_DIARY"):
            with open(os.path.join(directory, f"{self.ctx.rank}.{self.ctx.incarnation}"), "w") as diary:
                diary.write("shutdown")

    # --- for tests

    def echo(self, value: Any) -> Any:
        return (self.ctx.rank, value)

    def fail(self, on_rank: int) -> str:
        if self.ctx.rank == on_rank:
            raise ValueError(f"rank {on_rank} was asked to fail")
        time.sleep(1.0)
        return "fine"

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    def later(self, seconds: float, value: Any = "later") -> Preparing:
        return Preparing(seconds, value=value)

    def once_there_is(self, path: str) -> Awaited:
        return Awaited(path)

    def unpicklable(self) -> Any:
        return threading.Lock()

    def all_calls(self) -> list[str]:
        return self.calls

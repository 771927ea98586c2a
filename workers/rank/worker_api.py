"""What a rank process expects of the worker that it hosts, and what it gives it. Light: no torch.

To run another engine's worker under our supervision, write a class of this shape and name it as "module:Class";
`workers/rank/worker.py` is ours.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from membership.base.errors import ConfigError
from membership.base.network import Network
from membership.store.records import ClusterConfig, View
from workers.protocol.device_note import DeviceNotes
from workers.protocol.identity import Identity
from workers.protocol.load_progress import LoadProgress
from workers.protocol.messages import CopyBlocks, StepBatch, StepResult

if TYPE_CHECKING:
    from workers.ipc.doorbell import Doorbell


@dataclass(frozen=True)
class WorkerContext:
    """The surroundings of one worker. `environ` is frozen: what a rank reads of its environment cannot change later."""

    rank: int
    incarnation: int
    node: str
    config: ClusterConfig
    doorbell: Doorbell
    environ: Mapping[str, str]
    host_lock: AbstractContextManager[object]  # held by at most one worker of this host; freed if its holder dies
    weights: bytes = b""  # handle of this host's weight store (`workers/agent/weight_store.py`); empty if there is none
    pools: bytes = b""  # handle of this host's KV pools (`workers/agent/kv_pools.py`); empty if there are none
    windows: bytes = b""  # handle of this host's GPU windows (`workers/agent/gpu_windows.py`); empty if there are none
    experts: bytes = b""  # handle of this host's memory of experts on GPUs, likewise
    called_off_at: int = 0  # where the engine calls off what runs on GPUs (`LivenessPage`)
    pool_fd: int = -1  # this rank's own: an empty memfd for its KV cache
    notes: DeviceNotes = field(default_factory=DeviceNotes)  # where it says what it uses of its device
    progress: LoadProgress = field(default_factory=LoadProgress)  # where the worker counts what it has loaded
    network: Network | None = None  # how ranks on other hosts are reached
    look_ahead: Callable[[], None] = lambda: None  # call it amid a step, if `copy_blocks` may read a pool beside that


@runtime_checkable
class AsyncOutput(Protocol):
    """A result that is still being made; the rank's output thread waits for it while the rank goes on stepping."""

    def get_output(self, timeout_s: float) -> Any:
        """The result, or the error that stopped it; WaitTimeout when `timeout_s` has passed first."""


class Worker(Protocol):
    """One rank's engine. All calls but `load_model` come from the rank's main thread."""

    def __init__(self, ctx: WorkerContext) -> None: ...

    def init_device(self) -> None:
        """Take the device."""

    def load_model(self) -> None:
        """Load everything but the experts. In a thread of its own, while the main thread answers: count in
        `WorkerContext.progress`, as a load that makes no progress is ended."""

    def identity(self) -> Identity:
        """What it has loaded: everything that decides a bit of its output."""

    def prepare_epoch(self, view: View, peers: dict[int, tuple[int, bytes]]) -> AsyncOutput | None:
        """Load the experts that `view` adds to this rank and link to all `peers`, in the background.

        The output is a dict; `expert_digests` in it is as `RankRecord` has them.
        """

    def commit_epoch(self, epoch: int) -> None:
        """Use a prepared view from the next step on."""

    def retire_epoch(self, epoch: int) -> None:
        """Drop what the view of `epoch`, which all ranks now use, does not need."""

    def execute_model(self, batch: StepBatch) -> StepResult | AsyncOutput | None:
        """This rank's part of a step; None if it has none."""

    def copy_blocks(self, order: CopyBlocks) -> int:
        """This rank's half of a move of KV blocks, between two steps; how many of them, from the first, it did.

        Where `order.there` names blocks, it reads those from the pool that the source has left (`WorkerContext.pools`);
        this may be in another thread, amid a step that calls `WorkerContext.look_ahead`.
        """

    def post_blocks(self, order: CopyBlocks, then: Callable[[], None]) -> None:
        """Send what `copy_blocks` has written out for another rank. `then` is called once that rank can take it in:
        at once, or by another thread, and the doorbell is rung; never if the link with it ends.
        """

    def poll(self) -> None:
        """Serve peers; called whenever the doorbell rang."""

    def pending(self) -> bool:
        """Whether `poll` would find something. Cheap: asked before every sleep."""

    def become(self, rank: int, incarnation: int) -> None:
        """A spare, which no peer or engine knows, is this rank from now on."""

    def exchange_handle(self) -> bytes:
        """Where peers reach this rank."""

    def attach_mask(self, handle: bytes) -> None:
        """Use this engine's live mask from now on."""

    def evicted(self) -> bool:
        """Whether the engine has given this incarnation up, by its live mask. Asked when the engine has dropped us."""

    def shutdown(self) -> None:
        """Free everything."""


def load_worker_class(spec: str) -> type[Worker]:
    """The class named by "module:Class"."""
    module, colon, name = spec.partition(":")
    if not colon:
        raise ConfigError(f"worker class {spec!r} is not of the form module:Class")
    found = getattr(importlib.import_module(module), name, None)
    if not isinstance(found, type):
        raise ConfigError(f"worker class {spec!r}: module {module} has no class {name}")
    return cast("type[Worker]", found)

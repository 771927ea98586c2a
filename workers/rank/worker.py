"""The worker that a rank process hosts: one rank of the expert-parallel model.

It loads what the placement gives it, runs its own requests' tokens, computes experts for its peers, and changes views
only at step boundaries. What an epoch needs is prepared by a background thread while steps go on.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from membership.base import failpoints
from membership.base.enums import Exactness
from membership.base.errors import CalledOff, ConfigError, CoverageLost, DeviceLost, Fenced
from membership.base.rank_id import NO_SLOT, RankId
from membership.planning.identity import KERNELS, THREADS
from membership.store.records import View
from workers.ipc.cpu_priority import usable_cores
from workers.protocol import step_fence
from workers.protocol.bandwidth import Brake
from workers.protocol.far_link import FarLink
from workers.protocol.identity import Identity
from workers.protocol.load_progress import LoadProgress
from workers.protocol.messages import CopyBlocks, StepBatch, StepResult, StepStatus, TracedResult, TracedStep
from workers.rank.device_health import DeviceHealth
from workers.rank.expert_pieces import open_room
from workers.rank.gpu_exchange import Apart, GpuExchange
from workers.rank.gpu_report import GpuReport
from workers.rank.kv_copies import copied
from workers.rank.left_pools import LeftPools, keep_pool, map_on
from workers.rank.load_turns import LoadTurns
from workers.rank.preparation import Preparation, experts_of
from workers.rank.step_clock import StepClock
from workers.rank.worker_api import WorkerContext

if TYPE_CHECKING:
    from workers.exchange.loop import Exchange
    from workers.model.backend import Backend
    from workers.model.expert_bank import LocalExpertBank
    from workers.model.runner import ModelRunner
    from workers.protocol.live_mask import LiveMask
    from workers.protocol.messages import SampledToken, SeqChunk

log = structlog.get_logger(__name__)

SHUTDOWN_S = 5.0
LOADED_IN = "weights_s", "checks_s", "grammars_s", "warm_up_s", "pool_s"  # parts of a load, as they follow


def _members(view: View) -> set[RankId]:
    return {member.id for member in view.members}


class EPWorker:
    """One expert-parallel rank."""

    def __init__(self, ctx: WorkerContext) -> None:
        from workers.model.expert_bank import LocalExpertBank

        if ctx.config.exactness not in set(Exactness):
            raise ConfigError(f"unknown exactness {ctx.config.exactness!r}", hint="use invariant or stock")
        self._ctx = ctx
        self.rank = ctx.rank
        self.bank: LocalExpertBank = LocalExpertBank()
        self._mask: LiveMask | None = None
        self.exchange = self.make_exchange()
        self._gpu_exchange = GpuExchange(ctx) if ctx.config.gpu_exchange else None
        self._pools = LeftPools(ctx.pools, map_on(0))
        self._backend: Backend | None = None
        self._runner: ModelRunner | None = None
        self._view = View(epoch=0)
        self._preparing: dict[int, Preparation] = {}  # by epoch, later than the view in use
        self._latest: Preparation | None = None
        self._engine_token = 0
        self._load_turns = LoadTurns()
        self._gpu_report = GpuReport(ctx.notes, ctx.config.gpu_exchange_reason, after=self.after)
        self._health = DeviceHealth()
        self._left: set[RankId] = set()  # members of earlier views since the last retire_epoch

    def make_exchange(self) -> Exchange:
        """The link to the other ranks; tests put another one here."""
        from workers.exchange.loop import Exchange
        from workers.exchange.transports import between_hosts

        ctx = self._ctx
        me = RankId(ctx.rank, ctx.incarnation)
        return Exchange(
            me, self.bank, ctx.doorbell, between_hosts(ctx.network), self.masked, look_ahead=self._look_ahead
        )

    def _look_ahead(self) -> None:
        """In each layer of a step. A GPU's copies are queued behind what it computes: there a read waits its turn."""
        if self._backend is not None and self._backend.device.type == "cpu":
            self._ctx.look_ahead()

    def masked(self) -> int:
        """The engine's live mask as bits."""
        return self._mask.masked() if self._mask is not None else 0

    def init_device(self) -> None:
        """Take the device; one compute thread, as ranks outnumber cores."""
        began = time.monotonic()
        import torch

        from workers.model.devices import open_backend

        ctx = self._ctx
        with self._looked_at():
            self._backend = open_backend(ctx.config.device, ctx.incarnation if ctx.rank == NO_SLOT else ctx.rank)
        self._backend.pool_fd = self._ctx.pool_fd
        self._pools = LeftPools(self._ctx.pools, map_on(self._backend.device.index or 0))
        torch.set_num_threads(1)
        self.exchange.device, self.exchange.failed = self._backend.device, partial(self._health.refused, self._backend)
        log.info(
            "device_taken", rank=self.rank, device=str(self._backend.device), took_s=round(time.monotonic() - began, 3)
        )

    def enter_thread(self) -> None:
        """Called first in each other thread that loads."""
        if self._backend is not None:
            self._backend.enter_thread()

    def load_model(self) -> None:
        """Load everything but the experts. In any thread."""
        with self._looked_at():
            self._load_model()

    def _load_model(self) -> None:
        import torch

        from workers.model.grammar import TOKENIZER_FILE, Grammars
        from workers.model.load import load_model
        from workers.model.peer_weights import OtherHosts
        from workers.model.runner import ModelRunner
        from workers.protocol.weight_client import WeightClient

        if self._backend is None:
            raise ConfigError("load_model before init_device")
        self._backend.enter_thread()
        config = self._ctx.config
        started = time.monotonic()
        torch.get_num_threads()  # this thread's own number of compute threads: as in the main thread
        store = WeightClient(self._ctx.weights) if self._ctx.weights else None
        others = OtherHosts(self._ctx.network, config.load_stall_s / 2) if self._ctx.network is not None else None
        loaded = load_model(config.model, config.dtype, self._backend, store, self.progress, others)
        weights_at = time.monotonic()
        runner = ModelRunner(
            loaded,
            self.bank,
            config.exactness,
            kv_blocks=config.kv_blocks,
            block_size=config.block_size,
            max_len=config.max_model_len,
            progress=self.progress,
        )
        made_at = time.monotonic()
        runner.grammars = grammars = Grammars(
            Path(config.model) / TOKENIZER_FILE, loaded.info.eos_token_ids, dict(config.files).get(TOKENIZER_FILE, "")
        )
        grammars.read()
        runner.attach(self.exchange)
        grammars_at = time.monotonic()
        runner.warm_up()
        warm_at = time.monotonic()
        keep_pool(runner, self._ctx.pools, self._ctx.rank, self._ctx.incarnation)
        runner.on_launched = lambda: failpoints.hit("rank.launched", self.rank)  # not while it warms up
        self._runner = runner  # only now: the main thread looks at it meanwhile
        times = started, weights_at, made_at, grammars_at, warm_at, time.monotonic()
        parts = dict(zip(LOADED_IN, (round(b - a, 3) for a, b in pairwise(times)), strict=True))
        log.info("model_loaded", rank=self.rank, took_s=round(times[-1] - started, 3), **parts)

    def identity(self) -> Identity:
        """Everything that decides a bit of this rank's output; ranks of one view must agree."""
        import torch

        from workers.model.code import code_version
        from workers.model.content import CONFIG_FILE
        from workers.model.devices import taken_in_turn

        if self._runner is None:
            raise ConfigError("identity before load_model")
        loaded = self._runner.loaded
        parts = {
            CONFIG_FILE: loaded.config_digest,
            "weights": loaded.dense_digest,
            "code": code_version(),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "exactness": str(self._ctx.config.exactness),
            THREADS: str(torch.get_num_threads()),
            KERNELS: self._runner.fingerprint(),
        }
        return Identity(parts, loaded.replaced, taken_in_turn(self._ctx.config.device))

    def open_gpu_exchange(self) -> None:
        """If it is wanted, and not there yet; in the thread that prepares, once this rank has experts."""
        if self._gpu_exchange is not None and self._runner is not None:
            self._gpu_exchange.open(self._runner)

    @contextmanager
    def expert_room(self) -> Iterator[None]:
        """While experts are loaded: they go where they outlive this rank, if there is such a place."""
        source = self._runner.loaded.source if self._runner is not None else None
        if source is not None and source.room is None and self._runner is not None:
            source.room = open_room(self._ctx.experts, self.rank, self._runner)
        try:
            yield
        finally:
            if source is not None and source.room is not None:
                source.room.rest()

    def expert_digests(self) -> tuple[bytes, ...]:
        """Of the experts that it holds, by content."""
        config = self._ctx.config
        return self.bank.digests(config.moe_layers, config.experts)

    def prepare_epoch(self, view: View, peers: dict[int, tuple[int, bytes]]) -> Preparation:
        """Load the experts that `view` adds and link to all peers, in the background; replaces what was under way."""
        if self._runner is None:
            raise ConfigError("prepare_epoch before load_model")
        older = None
        for epoch, preparation in list(self._preparing.items()):
            if preparation.running:
                (older := preparation).stop()
            if not preparation.ready or epoch == view.epoch:
                del self._preparing[epoch]
        others = {rank: peer for rank, peer in peers.items() if rank != self.rank}
        self._preparing[view.epoch] = self._latest = Preparation(self, view, others, older)
        return self._latest

    def brake(self, view: View, wait: Callable[[float], object]) -> Callable[[], object] | None:
        """What to call before an expert is read for this view, so that its host's ranks keep to their bandwidth."""
        config = self._ctx.config
        shared = self._runner.loaded.shared if self._runner is not None else None
        if not config.load_bytes_per_s or view.urgent or shared is None:
            return None
        return Brake(partial(shared.book, config.expert_bytes), wait, config.load_stall_s / 2, self.progress.mark)

    @property
    def progress(self) -> LoadProgress:
        """Where it counts what it loads."""
        return self._ctx.progress

    @property
    def connect_timeout_s(self) -> float:
        """How long peers may take to answer."""
        return self._ctx.config.launch_deadline_s

    @property
    def stall_timeout_s(self) -> float:
        """How long a load may make no progress."""
        return self._ctx.config.load_stall_s

    def commit_epoch(self, epoch: int) -> None:
        """Use the prepared view of `epoch` from now on."""
        if not step_fence.must_commit(self._view.epoch, epoch):
            return
        found = self._preparing.get(epoch)
        if found is None or not found.ready:
            raise Fenced(f"rank {self.rank} is in epoch {self._view.epoch} and has not prepared epoch {epoch}")
        self._left |= _members(self._view)
        self._view = found.view
        self._preparing = {e: p for e, p in self._preparing.items() if e > epoch}

    def retire_epoch(self, epoch: int) -> None:
        """All ranks use `epoch` now and no view is staged: drop the experts that its view does not need, and the links
        with ranks that have left for good.

        Later views that were prepared are aborted by now: the agent follows the order of the store's changes. Links
        with ranks that no view had yet stay: a new rank may have connected for the next view, and connects once.
        """
        found = self._preparing.get(epoch)
        current = self._view if found is None else found.view
        if current.epoch < epoch:
            raise Fenced(f"rank {self.rank} is in epoch {current.epoch} and does not know epoch {epoch}")
        for later in [e for e in self._preparing if e > epoch]:
            self._preparing.pop(later).stop()
        self.bank.drop(experts_of(current, self.rank))
        self.exchange.disconnect((self._left | _members(self._view)) - _members(current))
        self._left.clear()

    def execute_model(self, batch: StepBatch) -> StepResult | None:
        """This rank's part of a step; None if it has none. Errors become statuses: the engine decides what follows."""
        stale = self._refuse(batch)
        chunks = batch.ranks.get(self.rank)
        if chunks is None or not (chunks or batch.together):
            return None
        if stale:
            return self._result(batch, StepStatus.STALE, error=stale)
        runner = self._runner
        if runner is None:
            return self._result(batch, StepStatus.FAILED, error="no model is loaded")
        self._begin(batch)
        watched = isinstance(batch, TracedStep) and any(chunk.seq in batch.traced for chunk in chunks)
        clock = StepClock(self.exchange) if watched else None
        try:
            self._use_cores(self._idle_cores(batch))
            tokens = self._run(runner, batch, chunks, clock)
        except Apart as error:
            return self._result(batch, StepStatus.APART, error=str(error))
        except CalledOff as error:
            return self._result(batch, StepStatus.CALLED_OFF, error=str(error))
        except CoverageLost as error:
            return self._result(batch, StepStatus.COVERAGE_LOST, error=str(error))
        except DeviceLost:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, it is reported to the engine and the rank serves on
            self._health.in_step(self._backend, error)
            log.error("step_failed", rank=self.rank, step=batch.step, error=traceback.format_exc())
            return self._result(batch, StepStatus.FAILED, error=f"{type(error).__name__}: {error}")
        finally:
            self._use_cores(1)
        self._health.step_done()
        result = self._result(batch, StepStatus.OK)
        result.tokens.extend(tokens)
        return result if clock is None else TracedResult.of(result, clock.took_s, clock.exchange_s)

    def _run(
        self, runner: ModelRunner, batch: StepBatch, chunks: list[SeqChunk], clock: StepClock | None
    ) -> list[SampledToken]:
        together = bool(batch.together)
        if together:
            if self._gpu_exchange is None:
                raise Apart(f"rank {self.rank} has no exchange between GPUs")
            shared = self._gpu_exchange.begin(self._view, batch)
            if not chunks:
                shared.serve()
                return []
        if clock is not None:
            return clock.run(runner, chunks, together=together)
        return runner.run(chunks, together=together)

    def after(self, error: BaseException) -> None:
        """Work beside a step has failed with this. If the device has, `poll` says so: the process has to end."""
        prepared = any(each.ready for each in list(self._preparing.values()))  # the view in use is one till a step
        self._health.beside(self._backend, error, serving=prepared or self._view.epoch > 0)

    @contextmanager
    def _looked_at(self) -> Iterator[None]:
        """Work beside a step."""
        try:
            yield
        except Exception as error:
            self.after(error)
            self._health.require()  # whose call it is learns the reason, which the end of the process may not tell it
            raise

    def _idle_cores(self, batch: StepBatch) -> int:
        """How many cores this rank may take in a step: others of its host compute beside it, or compute for it."""
        if not self.exchange.stays():
            return 1
        nodes = {member.rank: member.node for member in self._view.members}
        busy = sum(bool(chunks) and nodes.get(rank) == nodes.get(self.rank) for rank, chunks in batch.ranks.items())
        return usable_cores() // max(1, busy)

    def _use_cores(self, count: int) -> None:
        if self._backend is not None:
            self._backend.use_cores(count)

    def copy_blocks(self, order: CopyBlocks) -> int:
        """Write out KV blocks for a peer, or take in those that it has written or left for us; how many."""
        if self._runner is None:
            raise ConfigError("copy_blocks before load_model")
        with self._looked_at():
            return copied(order, self._runner, self.exchange, self._pools)

    def post_blocks(self, order: CopyBlocks, then: Callable[[], None]) -> None:
        """`then` is called once the target can read what `copy_blocks` has written out, maybe by another thread."""
        self.exchange.post(order.target, then)

    def _refuse(self, batch: StepBatch) -> str:
        """Why this batch must have no effect, else empty. Flips to the batch's epoch if that is prepared."""
        try:
            self._engine_token = step_fence.follow(self._engine_token, batch.engine_token)
            self.commit_epoch(batch.epoch)
        except Fenced as error:
            return str(error)
        return ""

    def _begin(self, batch: StepBatch) -> None:
        from workers.exchange.model_side import StepContext

        masked = sum(1 << rank for rank in set(batch.masked))
        self.exchange.begin_step(StepContext(self._view, batch.engine_token, batch.step, batch.attempt, masked))

    def _result(self, batch: StepBatch, status: StepStatus, error: str = "") -> StepResult:
        return StepResult(
            rank=self.rank,
            incarnation=self._ctx.incarnation,
            engine_token=batch.engine_token,
            epoch=batch.epoch,
            step=batch.step,
            attempt=batch.attempt,
            status=status,
            tokens=[],
            error=error,
            suspects=sorted(self.exchange.suspects),
            retried_rows=self.exchange.retried_rows,
            load=self._load() if status is StepStatus.OK else b"",
            retried_at=self.exchange.retried_at,
            unlinked=self.exchange.unlinked(),
            fills_host=self._fills_host(),
        )

    def _fills_host(self) -> bool:
        """Whether it would use all cores of its host if no other rank there computed. Two ranks would read most experts
        twice, for half of the rows each."""
        if self._runner is None or self._backend is None or not self.exchange.everywhere:
            return False
        weights = self._ctx.config.expert_bytes // self._runner.dtype.itemsize
        return self._backend.fills(usable_cores(), weights)

    def _load(self) -> bytes:
        """What to report of the experts' load, if it is our turn."""
        if self._runner is None or not self._load_turns.due(time.monotonic(), self.rank, len(self._view.members)):
            return b""
        return self._runner.take_load()

    def pending(self) -> bool:
        """Whether a peer has asked for something."""
        return self.exchange.pending()

    def poll(self) -> None:
        """Compute what peers have asked for, and let go of what is not read any more. DeviceLost."""
        try:
            self._pools.rest()
            self._gpu_report.rest(self._backend, self._gpu_exchange, self._view)
            if self.exchange.pending():
                self._health.answering()
                self.exchange.serve()
                self._health.answered()
        except Exception as error:
            self.after(error)
            self._health.require()
            raise
        self._health.require()

    def become(self, rank: int, incarnation: int) -> None:
        """A spare is this rank from now on. Its exchange, which has no links, gives way to one of the rank's name."""
        self._ctx, self.rank = replace(self._ctx, rank=rank, incarnation=incarnation), rank
        self.exchange.close()
        self.exchange = self.make_exchange()
        self._gpu_exchange = GpuExchange(self._ctx) if self._ctx.config.gpu_exchange else None
        if self._backend is not None:
            refused = partial(self._health.refused, self._backend)
            self.exchange.device, self.exchange.failed = self._backend.device, refused
        if self._runner is not None:
            self._runner.attach(self.exchange)
            self._runner.loaded.source.room = None  # that of the rank's slot, once it loads

    def exchange_handle(self) -> bytes:
        """Where peers reach this rank."""
        return self.exchange.handle()

    def far_links(self) -> dict[RankId, FarLink]:
        """What is known of the links with ranks of other hosts."""
        return dict(self.exchange.far_links())

    def attach_mask(self, handle: bytes) -> None:
        """Use this engine's live mask from now on."""
        from workers.protocol.live_mask import LiveMask

        old, self._mask = self._mask, LiveMask.attach(handle)
        if old is not None:
            old.close()

    def evicted(self) -> bool:
        """Whether the engine has given this incarnation up."""
        return self._mask is not None and self._mask.evicted(self.rank, self._ctx.incarnation)

    def shutdown(self) -> None:
        """Stop the background thread, drop links, memory and files."""
        if self._latest is not None:
            self._latest.stop()
        self.exchange.close()
        if self._latest is not None:
            self._latest.join(SHUTDOWN_S)
        self._pools.close()
        if self._mask is not None:
            self._mask.close()
            self._mask = None
        if self._runner is not None:
            self._runner.close()
            self._runner = None
        if self._backend is not None:
            self._backend.close()

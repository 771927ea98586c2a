"""Ranks' GPUs: what a rank launches runs beside its process, and ends with it only some ms later.

A step of all ranks together (`--gpu-exchange`) is planned, called off, refused and answered by the shipped code. Here
are only the kernels: they write numbers into the windows of slots, wait for those of their peers or the word that calls
them off, and fill the rank's KV pool. They do not stop with their process, and run on for a while when it is killed.
`windows` stand for an agent's descriptors; who may have one is decided by the shipped `Owners`. No row is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from chaos.simulation.invariants import Violation, require
from membership.base.errors import CalledOff, ModelError
from membership.base.timing import TOGETHER_S, WINDOW_TIMEOUT_S
from membership.store.records import View
from workers.agent.gpu_windows import Owners, Processes
from workers.exchange.cuda.window import BANKS
from workers.protocol.messages import SeqChunk, StepBatch
from workers.rank.gpu_exchange import Apart, GpuExchange
from workers.rank.worker_api import WorkerContext

if TYPE_CHECKING:
    from chaos.simulation.rank import RankProcess

SLOTS = 5  # with windows: ranks in later ones make their views' steps go over host memory
RUN_ON_S = 0.012  # measured: kernels of a killed process
LAYER_S = (0.002, 0.015)
NOTICED_S = 0.0001  # until the process knows that its kernels have ended
ASK_AGAIN_S = 0.02
WRONG = 1000  # what is computed from nothing is so far off

Step = tuple[int, int, int]
"""(engine token, number, attempt)"""


class Word(NamedTuple):
    """What a rank has written into a window, and which step it is of."""

    number: int = 0
    step: Step = (0, 0, 0)


class Windows:
    """GPU memory of one agent's slots. It stays until the agent has ended, whatever rank has written there."""

    def __init__(self) -> None:
        self.words: dict[tuple[int, int, int], Word] = {}  # by slot, bank and the slot of the writer
        self.kernels: dict[int, Kernels] = {}  # the last ones of each process, by its id
        self._ranks: dict[int, RankProcess] = {}  # that have asked for their slot's, likewise
        self._owners: dict[int, Owners] = {}
        self._processes = Processes(lambda pid: pid, lambda pid: self._ranks[pid].over, lambda pid: None)

    def claimed(self, rank: RankProcess) -> bool:
        """Whether the rank has the window of its slot; else it asks again."""
        self._ranks[rank.pid] = rank
        owners = self._owners.setdefault(rank.key.rank, Owners(self._processes))
        if owners.claimed_by(rank.pid):
            return False
        for other in self._ranks.values():
            writes = other is not rank and other.key.rank == rank.key.rank and not other.over
            require(not writes, f"rank {rank.key} has the window of its slot, where {other.key} may still write")
        return True


class Kernels:
    """What one rank has launched for one step: a call for each layer."""

    def __init__(self, rank: RankProcess, batch: StepBatch) -> None:
        self.batch, self.failure = batch, ""
        self.ended = self._asked = False
        self._rank, self._layer = rank, 0
        self._step = batch.engine_token, batch.step, batch.attempt
        self._peers = [slot for slot in batch.ranks if slot != rank.key.rank]
        self.limit = rank.clock.now + TOGETHER_S
        rank.windows.kernels[rank.pid] = self
        self._write_chunks()
        self._compute()

    @property
    def _number(self) -> int:
        return self.batch.together + self._layer

    @property
    def _chunks(self) -> Sequence[SeqChunk]:
        return self.batch.ranks[self._rank.key.rank]

    def _write_chunks(self, wrong: int = 0) -> None:
        for chunk in self._chunks:
            self._rank.cluster.kv.write(*self._rank.key, chunk, wrong)

    def _compute(self) -> None:
        """Not by way of the process, which may be stopped."""
        self._asked = False
        self._rank.clock.after(self._rank.random.uniform(*LAYER_S) * self._rank.slow, self._ask)

    def _ask(self) -> None:
        """Tell all peers that their rows are there, if they have any."""
        if self._still_runs():
            rank = self._rank
            for peer in self._peers:
                rank.windows.words[peer, self._number % BANKS, rank.key.rank] = Word(self._number, self._step)
            self._asked = True
            for kernels in rank.windows.kernels.values():
                kernels.look()

    def look(self) -> None:
        """See what peers and the host have written, and go on if it is there."""
        if not self._still_runs() or not self._asked:
            return
        rank, bank = self._rank, self._number % BANKS
        found = [rank.windows.words.get((rank.key.rank, bank, peer), Word()) for peer in self._peers]
        if any(word.number > self._number for word in found):
            self._end("a peer is in a later call")
        elif all(word.number == self._number for word in found):
            for slot, word in zip(self._peers, found, strict=True):
                require(word.step == self._step, f"{rank.name} reads rows of slot {slot} of {word}, not {self._step}")
            self._layer += 1
            if self._layer == rank.cluster.config.moe_layers:
                self._end("")
            else:
                self._compute()

    def _still_runs(self) -> bool:
        """False once it has ended, and it ends once it must."""
        if self.ended:
            return False
        if self._rank.over:
            self.ended = True  # its context is gone: nothing is written any more
        elif self._rank.called_off > self._number:
            self._end("called off")
        elif self._rank.clock.now >= self.limit:
            self._end("too late")
        return not self.ended

    def _end(self, failure: str) -> None:
        """A failed one has run to its end on whatever was there, and written that."""
        self.ended, self.failure = True, failure
        if failure:
            self._write_chunks(WRONG)
        self._rank.after(NOTICED_S, self._rank.go_on)


class Shared:
    """In place of `workers/model/cuda/shared_experts.py`."""

    def __init__(self, rank: RankProcess) -> None:
        self._rank = rank
        self._holders: Sequence[Sequence[int | None]] = ()

    def place(self, holders: Sequence[Sequence[int | None]]) -> None:
        """See `SharedExperts`."""
        self._holders = holders

    def follow(self, base: int, masked: int, rows: int) -> None:
        """Kernels are launched with the batch, which says the same."""

    def serve(self) -> None:
        """See `SharedExperts`."""
        self.check()

    def check(self) -> None:
        """What came of the step that was just run. CalledOff, ModelError."""
        kernels = self._rank.kernels
        if kernels is None or not kernels.ended or kernels.batch is not self._rank.worker.runner.batch:
            raise Violation(f"{self._rank.name} answers, and has not run this step")
        failure = kernels.failure
        if failure.startswith("a peer"):
            raise ModelError(f"a step of all ranks together went wrong: {failure}")
        if failure:
            raise CalledOff(f"a step of all ranks together was given up: {failure}")

    def require_held(self, wanted: Sequence[tuple[int, int]]) -> None:
        """Violation unless each holder that was asked for these (layer, expert) has them."""
        view, ranks = self._rank.worker._view, self._rank.cluster.ranks
        members = {member.rank: member.id for member in view.members}
        for layer, expert in wanted:
            holder = self._holders[layer][expert]
            require(holder is not None, f"{self._rank.name} asks no rank for expert {expert} of layer {layer}")
            found = ranks.get(members[holder]) if holder is not None else None
            held = found is None or (layer, expert) in found.worker.names.held  # one that has died since has answered
            require(held, f"rank {holder} is asked for expert {expert} of layer {layer}, and lacks it")


class SimGpuExchange(GpuExchange):
    """As shipped, without a GPU."""

    def __init__(self, ctx: WorkerContext, rank: RankProcess) -> None:
        super().__init__(ctx)
        self._rank = rank
        self._ask_until = -1.0
        self._watches = False  # whether a look at the limit is due

    @property
    def shared(self) -> Shared:
        """Once it is opened."""
        return cast(Shared, self._shared)

    def opened(self) -> bool:
        """Whether it is there, or why not is known; else it is asked again in a while."""
        rank, now = self._rank, self._rank.clock.now
        if self._shared is not None:
            return True
        if rank.key.rank >= SLOTS:
            self._refusal = f"rank {rank.key.rank} has no window"
            return True
        self._ask_until = self._ask_until if self._ask_until >= 0 else now + WINDOW_TIMEOUT_S
        if rank.windows.claimed(rank):
            self._shared = cast(Any, Shared(rank))
            return True
        if now < self._ask_until:
            return False
        self._refusal, self._ask_until = f"who had slot {rank.key.rank} before still runs", -1.0
        return True

    def launch(self, view: View, batch: StepBatch) -> Kernels | None:
        """What runs for this step; None where the shipped code has refused it."""
        try:
            self.begin(view, batch)
        except Apart:
            return None
        if not self._watches:
            self._watches = True
            self._rank.clock.after(TOGETHER_S, self._watch)
        return Kernels(self._rank, batch)

    def _watch(self) -> None:
        """One look in that time at most: few kernels wait as long."""
        kernels = self._rank.kernels
        if kernels is not None:
            kernels.look()
        self._watches = kernels is not None and not kernels.ended
        if kernels is not None and self._watches:
            self._rank.clock.after(max(NOTICED_S, kernels.limit - self._rank.clock.now), self._watch)

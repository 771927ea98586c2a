"""What one view needs of this rank, made ready by a background thread while steps go on: links, experts, windows."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import structlog

from membership.base import failpoints
from membership.base.errors import Fenced, WaitTimeout
from membership.base.rank_id import RankId
from membership.store.records import View
from workers.rank.environment import give_memory_back

if TYPE_CHECKING:
    from workers.rank.worker import EPWorker

log = structlog.get_logger(__name__)


class Preparation:
    """Getting ready for one view in a background thread, after an `older` one has ended."""

    def __init__(
        self, worker: EPWorker, view: View, peers: dict[int, tuple[int, bytes]], older: Preparation | None
    ) -> None:
        self.view = view
        self.bytes_loaded = 0  # read from the checkpoint
        self.bytes_mapped = 0  # found in the host's weight store
        self._room_s = 0.0  # until memory of experts was there: of a slot whose last rank may not be over yet
        self._worker = worker
        self._peers = peers
        self._older = older
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"prepare-epoch-{view.epoch}", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether it still may load or link."""
        return not self._ended.is_set()

    @property
    def ready(self) -> bool:
        """Whether the view may be used."""
        return self._ended.is_set() and self._error is None and not self._stopped.is_set()

    def get_output(self, timeout_s: float) -> dict[str, Any]:
        """How many bytes of expert weights were loaded and mapped, and all digests, once everything is ready."""
        if not self._ended.wait(timeout_s):
            raise WaitTimeout(f"rank {self._worker.rank} still loads for epoch {self.view.epoch} after {timeout_s} s")
        if self._error is not None:
            raise self._error
        if self._stopped.is_set():
            raise Fenced(f"epoch {self.view.epoch} was replaced while rank {self._worker.rank} prepared it")
        digests = self._worker.expert_digests()
        return {"bytes_loaded": self.bytes_loaded, "bytes_mapped": self.bytes_mapped, "expert_digests": digests}

    def stop(self) -> None:
        """Have it give up before the next expert, or while peers keep it waiting. Does not wait."""
        self._stopped.set()
        self._worker.exchange.stir()

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise WaitTimeout(f"rank {self._worker.rank} did not stop preparing epoch {self.view.epoch}")

    def _run(self) -> None:
        try:
            if self._older is not None:
                self._older.join(self._worker.stall_timeout_s)
                self._older = None
            failpoints.hit("rank.before.prepare", self._worker.rank)
            self._worker.enter_thread()
            began = time.monotonic()
            peers = {RankId(rank, incarnation): handle for rank, (incarnation, handle) in self._peers.items()}
            # First: all peers prepare at this moment, and each of them may load for as long as it takes.
            self._worker.exchange.connect(peers, self._worker.connect_timeout_s, self._stopped.is_set)
            linked_at = time.monotonic()
            self._load(sorted(experts_of(self.view, self._worker.rank)))
            loaded_at = time.monotonic()
            self._worker.open_gpu_exchange()
            took = {
                "connect_s": linked_at - began,
                "room_s": self._room_s,
                "load_s": loaded_at - linked_at - self._room_s,
                "open_s": time.monotonic() - loaded_at,
            }
            log.info(
                "view_prepared",
                rank=self._worker.rank,
                epoch=self.view.epoch,
                **{k: round(v, 3) for k, v in took.items()},
            )
            failpoints.hit("rank.prepared", self._worker.rank)
        except BaseException as error:  # noqa: BLE001 - raised by get_output
            self._error = error
            self._worker.after(error)
        finally:
            self._ended.set()

    def _load(self, wanted: list[tuple[int, int]]) -> None:
        bank, mapped = self._worker.bank, self._worker.bank.bytes_mapped
        brake = self._worker.brake(self.view, self._stopped.wait)
        began = time.monotonic()
        with self._worker.progress.loading(), self._worker.expert_room():
            self._room_s = time.monotonic() - began
            self.bytes_loaded = bank.load_all(wanted, self._stopped.is_set, brake)
        self.bytes_mapped = bank.bytes_mapped - mapped
        if self.bytes_loaded:  # else it is what the next step wants: after a death nothing is loaded as a rule
            give_memory_back()


def experts_of(view: View, rank: int) -> frozenset[tuple[int, int]]:
    """The (MoE layer, expert) pairs that `view` gives to `rank`."""
    layers = view.placement.get(rank, ())
    return frozenset((layer, expert) for layer, experts in enumerate(layers) for expert in experts)

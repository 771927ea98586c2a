"""This rank's way to the memory of experts on its host's GPUs: pieces of slots, whose descriptors its agent keeps.

The agent's side is `workers/agent/gpu_windows.py`, as for windows: who takes a slot gets its pieces once those that had
it before are over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import structlog

from membership.base.errors import ElasticError
from workers.protocol.window_client import PIECES, WindowAsked, slots_of, window_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from workers.exchange.cuda.driver import Mapping
    from workers.model.backend import Reached
    from workers.model.cuda.expert_room import ExpertRoom, RoomShape
    from workers.model.runner import ModelRunner

log = structlog.get_logger(__name__)


class _NoSuchPiece(Exception):
    """It was only asked for."""


class SlotPieces:
    """Satisfies `Pieces`. What it maps of its own slot stays for the life of this process: graphs know where it is."""

    def __init__(self, handle: bytes, slot: int, shape: RoomShape, device: torch.device) -> None:
        self._handle, self._slot, self._shape, self._device = handle, slot, shape, device
        self._own: list[Mapping] = []
        self._others: list[Mapping] = []

    def own(self, number: int, *, make: bool) -> Tensor | None:
        """See `Pieces`. HandoverRefused, QueueClosed, WaitTimeout; RankFailed of CUDA."""
        from workers.exchange.cuda.driver import Mapping
        from workers.model.cuda.kv_memory import over

        asked = WindowAsked(self._slot * PIECES + number, self._layout(self._slot), own=True)
        try:
            with window_of(self._handle, asked, self._new if make else self._none) as (fd, nbytes):
                mapping = Mapping(fd, nbytes, self._gpu)
        except _NoSuchPiece:
            return None
        self._own.append(mapping)
        return over(mapping.address, self._shape.piece_bytes, self._device)

    def others(self) -> Sequence[Reached]:
        """See `Pieces`. What this GPU cannot reach is left out."""
        from workers.exchange.cuda.driver import Mapping

        self.let_go()
        for key in slots_of(self._handle):
            slot = key // PIECES
            if slot == self._slot:
                continue
            try:
                with window_of(self._handle, WindowAsked(key, self._layout(slot), own=False), self._none) as (
                    fd,
                    nbytes,
                ):
                    self._others.append(Mapping(fd, nbytes, self._gpu))
            except _NoSuchPiece:
                continue
            except ElasticError as error:
                log.info("experts_of_a_slot_not_reached", slot=slot, reason=str(error))
        return self._others

    def let_go(self) -> None:
        """See `Pieces`."""
        while self._others:
            self._others.pop().close()

    @property
    def _gpu(self) -> int:
        return int(self._device.index or 0)

    def _layout(self, slot: int) -> str:
        """What decides where things are in its pieces, and on which GPU they are."""
        import torch

        return f"{self._shape} on GPU {slot % torch.cuda.device_count()}"

    def _new(self) -> tuple[int, int]:
        from workers.rank.gpu_exchange import new_window

        return new_window(self._gpu, self._shape.piece_bytes, self._gpu)

    @staticmethod
    def _none() -> tuple[int, int]:
        raise _NoSuchPiece


def open_room(handle: bytes, slot: int, runner: ModelRunner) -> ExpertRoom | None:
    """Where this rank's experts are to lie. None, with the reason in the log: in memory that ends with it."""
    import torch

    loaded = runner.loaded
    device, info = loaded.backend.device, loaded.info
    if device.type != "cuda" or not info.expert_width:
        return None
    from workers.model.cuda.expert_room import ExpertRoom, RoomShape

    inner, hidden = info.expert_width, info.hidden
    shape = RoomShape(((2 * inner, hidden), (hidden, inner)), loaded.dtype, info.moe_layers * info.experts)
    try:
        room = ExpertRoom(shape, SlotPieces(handle, slot, shape, torch.device("cuda", device.index or 0)), device)
    except (ElasticError, ImportError) as error:
        log.warning("experts_end_with_their_rank", slot=slot, reason=str(error))
        return None
    return room

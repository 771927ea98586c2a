"""Where a rank's KV cache lies on its GPU: memory whose descriptor may be given away, so that it outlives the rank."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog
import torch
from torch import Tensor

from membership.base.errors import RankFailed
from membership.base.timing import KV_ROOM_S
from workers.model.backend import Lasting

FULL = "OUT_OF_MEMORY"
LOOK_S = 0.05
log = structlog.get_logger(__name__)


class KvMemory(NamedTuple):
    """Zeroed memory."""

    room: Tensor  # bytes
    lasting: Lasting = Lasting()  # the same, and somewhat more at its end
    mapping: object = None  # keeps it


class _Raw:
    """Memory at an address, as torch takes it."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


def over(address: int, nbytes: int, device: torch.device) -> Tensor:
    """The bytes at an address of this GPU; who mapped them keeps them."""
    made: Tensor = torch.as_tensor(_Raw(address, nbytes), device=device)
    return made


def own_memory(nbytes: int, device: torch.device) -> KvMemory:
    """Memory that no other process reaches."""
    return KvMemory(torch.zeros(nbytes, dtype=torch.uint8, device=device))


def lasting_memory(nbytes: int, device: torch.device) -> KvMemory:
    """Memory by descriptor; our own where that cannot be had, which is said in the log.

    Where there is no room yet it waits: for a moment the cache of the rank that was here before may still be read.
    """
    try:
        from workers.exchange.cuda.driver import Mapping, make_memory

        gpu = int(device.index or 0)
        fd, size = _once_there_is_room(lambda: make_memory(gpu, nbytes))
        try:
            mapping = Mapping(fd, size, gpu)
        except BaseException:
            os.close(fd)
            raise
    except (ImportError, RankFailed) as error:
        log.warning("kv_cache_ends_with_its_rank", reason=str(error))
        return own_memory(nbytes, device)
    mapping.clear()
    return KvMemory(over(mapping.address, nbytes, device), Lasting(fd, size), mapping)


def _once_there_is_room(
    make: Callable[[], tuple[int, int]],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> tuple[int, int]:
    """What is made; RankFailed if that fails for another reason than a lack of memory, or for too long."""
    deadline = clock() + KV_ROOM_S
    while True:
        try:
            return make()
        except RankFailed as error:
            if FULL not in str(error) or clock() > deadline:
                raise
        sleep(LOOK_S)  # nothing says when another process has let go of a GPU's memory

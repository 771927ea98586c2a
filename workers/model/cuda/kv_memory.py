"""Where a rank's KV cache lies on its GPU: memory whose descriptor may be given away, so that it outlives the rank."""

from __future__ import annotations

from typing import NamedTuple

import structlog
import torch
from torch import Tensor

from membership.base.errors import RankFailed
from workers.model.backend import Lasting

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
    """Memory by descriptor; our own where that cannot be had, which is said in the log."""
    try:
        from workers.exchange.cuda.driver import Mapping, make_memory

        gpu = int(device.index or 0)
        fd, size = make_memory(gpu, nbytes)
        mapping = Mapping(fd, size, gpu)
    except (ImportError, RankFailed) as error:
        log.warning("kv_cache_ends_with_its_rank", reason=str(error))
        return own_memory(nbytes, device)
    mapping.clear()
    return KvMemory(over(mapping.address, nbytes, device), Lasting(fd, size), mapping)

"""What we need of CUDA's driver: memory that is handed on by descriptor, host words for kernels, and launches.

Memory belongs to its descriptors: as long as a process holds one, also one without CUDA, it stays, whatever becomes of
the process that made it. Who maps it from a descriptor cannot export it again: the descriptor itself is passed on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from cuda.bindings import driver

from membership.base.errors import RankFailed

FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def done(result: Sequence[Any]) -> Any:
    """The value of a call of the driver. RankFailed if it did not succeed."""
    code, *values = result
    if code != driver.CUresult.CUDA_SUCCESS:
        raise RankFailed(f"CUDA's driver: {code.name}")
    return values[0] if values else None


def make_memory(gpu: int, nbytes: int) -> tuple[int, int]:
    """A descriptor of new memory on a GPU, which is the caller's to close, and its size: `nbytes` or somewhat more."""
    done(driver.cuInit(0))
    wanted = driver.CUmemAllocationProp()
    wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    wanted.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    wanted.location.id = gpu
    wanted.requestedHandleTypes = FD
    recommended = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    grain = done(driver.cuMemGetAllocationGranularity(wanted, recommended))
    size = -(-nbytes // grain) * grain
    handle = done(driver.cuMemCreate(size, wanted, 0))
    try:
        return int(done(driver.cuMemExportToShareableHandle(handle, FD, 0))), size
    finally:
        done(driver.cuMemRelease(handle))


class Mapping:
    """Memory of a descriptor where kernels of one GPU reach it, wherever it lies. The descriptor is not kept."""

    def __init__(self, fd: int, size: int, gpu: int) -> None:
        self.size = size
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = gpu
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        with ExitStack() as undo:
            handle = done(driver.cuMemImportFromShareableHandle(fd, FD))
            try:
                self.address = int(done(driver.cuMemAddressReserve(size, 0, 0, 0)))
                undo.callback(driver.cuMemAddressFree, self.address, size)
                done(driver.cuMemMap(self.address, size, 0, handle, 0))
            finally:
                done(driver.cuMemRelease(handle))  # the mapping keeps it
            undo.callback(driver.cuMemUnmap, self.address, size)
            done(driver.cuMemSetAccess(self.address, size, [access], 1))
            undo.pop_all()

    def clear(self) -> None:
        """Zeros everywhere; waits for them."""
        done(driver.cuMemsetD8(self.address, 0, self.size))
        done(driver.cuCtxSynchronize())

    def close(self) -> None:
        """Waits for all kernels of this process: one may use it."""
        done(driver.cuCtxSynchronize())
        done(driver.cuMemUnmap(self.address, self.size))
        done(driver.cuMemAddressFree(self.address, self.size))


def host_words(address: int, nbytes: int) -> int:
    """Where this process's kernels find a page of host memory. Once per page; it is forgotten with the process."""
    flags = driver.CU_MEMHOSTREGISTER_DEVICEMAP | driver.CU_MEMHOSTREGISTER_PORTABLE
    done(driver.cuMemHostRegister(address, nbytes, flags))
    return int(done(driver.cuMemHostGetDevicePointer(address, 0)))


Launch = Callable[[int, int, int, bytes], None]
"""Blocks, threads of each, stream, and the kernel's one argument, a struct."""


def launcher(cubin: bytes, name: str) -> Launch:
    """A kernel of a cubin, loaded into the current context, where it stays. Loaded now: later that may have to wait for
    kernels that run, which may wait for this one."""
    kernel = done(driver.cuModuleGetFunction(done(driver.cuModuleLoadData(cubin)), name.encode()))
    done(driver.cuFuncLoad(kernel))

    def launch(blocks: int, threads: int, stream: int, argument: bytes) -> None:
        held = ctypes.create_string_buffer(argument, len(argument))
        places = (ctypes.c_void_p * 1)(ctypes.addressof(held))
        done(driver.cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(places), 0))

    return launch

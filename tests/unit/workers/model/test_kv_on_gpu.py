"""On GPUs: a KV cache whose mapping is gone is read through its descriptor, by the same GPU and by another one."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("cuda.bindings")

from workers.model.cuda.kv_cache import CudaKVCache
from workers.model.cuda.kv_memory import lasting_memory
from workers.model.kv_transfer import fetch_in
from workers.rank.left_pools import map_on

pytestmark = [pytest.mark.unit, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

LAYERS, BLOCKS, SIZE, SHAPE = 3, 6, 16, (4, 128)


def filled(gpu: int, seed: int) -> CudaKVCache:
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)
    cache = CudaKVCache(LAYERS, BLOCKS, SIZE, torch.bfloat16, lasting_memory)
    draw = torch.Generator(device).manual_seed(seed)
    cells = torch.arange(BLOCKS * SIZE, device=device)
    for layer in cache.layers:
        keys, values = (torch.randn(BLOCKS * SIZE, *SHAPE, generator=draw, device=device) for _ in range(2))
        layer.write(cells, keys, values)
    torch.cuda.synchronize()
    return cache


def outlives(there: int) -> None:
    source = filled(there, 1)
    wanted = [part[[4, 0]].cpu() for layer in source.layers for part in (layer.keys, layer.values)]
    fd, nbytes = source.hand_over()
    source._memory.mapping.close()  # type: ignore[attr-defined]
    target = filled(0, 2)
    os.close(target.hand_over().fd)
    pool = map_on(0)(fd, nbytes)
    os.close(fd)
    assert fetch_in(target, [1, 3], pool, [4, 0]) == 2
    pool.close()
    found = [part[[1, 3]].cpu() for layer in target.layers for part in (layer.keys, layer.values)]
    assert all(map(torch.equal, found, wanted))


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Files and threads that CUDA and Triton open once are none that a test has left behind."""
    for gpu in range(torch.cuda.device_count()):
        outlives(gpu)


@pytest.mark.parametrize("there", range(max(1, torch.cuda.device_count())))
def test_it_outlives_its_mapping(there: int) -> None:
    outlives(there)

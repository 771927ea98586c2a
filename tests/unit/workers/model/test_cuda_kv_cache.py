"""The KV cache of a GPU, in Triton's interpreter: blocks come out of another rank's memory as they were, all layers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from membership.base.errors import ModelError, RankError, RankFailed
from membership.base.timing import KV_ROOM_S

pytest.importorskip("triton")

from workers.model.backend import Lasting
from workers.model.cuda.kv_cache import CudaKVCache
from workers.model.cuda.kv_memory import KvMemory, _once_there_is_room, lasting_memory
from workers.model.kv_transfer import fetch_in

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(torch.cuda.is_available(), reason="addresses of the CPU's memory are no GPU's"),
]

CPU, LAYERS, BLOCKS, SIZE, MORE = torch.device("cpu"), 3, 6, 4, 512
SHAPES = {"alike": ((2, 8), (2, 8)), "latent": ((1, 20), (1, 12))}


@dataclass(frozen=True)
class Reached:
    """A cache's memory, where another one reaches it."""

    address: int
    size: int


def take(nbytes: int, device: torch.device) -> KvMemory:
    """Memory whose descriptor, if it had one, would be of somewhat more."""
    return KvMemory(torch.zeros(nbytes, dtype=torch.uint8, device=device), Lasting(-1, nbytes + MORE))


class Filled:
    """A cache with random content, and what is in each layer's blocks."""

    def __init__(
        self, seed: int, shapes: tuple[tuple[int, int], ...], dtype: torch.dtype, layers: int = LAYERS
    ) -> None:
        self.memory: list[KvMemory] = []
        self.cache = CudaKVCache(layers, BLOCKS, SIZE, dtype, self._take)
        draw = torch.Generator().manual_seed(seed)
        cells = torch.arange(BLOCKS * SIZE)
        for layer in self.cache.layers:
            keys, values = (torch.randn(BLOCKS * SIZE, *shape, generator=draw) for shape in shapes)
            layer.write(cells, keys, values)

    def _take(self, nbytes: int, device: torch.device) -> KvMemory:
        self.memory.append(take(nbytes, device))
        return self.memory[-1]

    @property
    def reached(self) -> Reached:
        (memory,) = self.memory
        return Reached(memory.room.data_ptr(), memory.lasting.nbytes)

    def blocks(self, numbers: list[int]) -> list[Tensor]:
        return [part[numbers].clone() for layer in self.cache.layers for part in (layer.keys, layer.values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
def test_blocks_of_another_rank_arrive_bit_for_bit_and_nothing_else_changes(
    shapes: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    source, target = Filled(1, shapes, dtype), Filled(2, shapes, dtype)
    wanted, untouched = source.blocks([4, 0, 5]), target.blocks([0, 3, 5])
    assert fetch_in(target.cache, [1, 2, 4], source.reached, [4, 0, 5]) == 3
    assert all(map(torch.equal, target.blocks([1, 2, 4]), wanted))
    assert all(map(torch.equal, target.blocks([0, 3, 5]), untouched))
    assert all(map(torch.equal, source.blocks([4, 0, 5]), wanted))


def test_memory_of_another_size_is_refused() -> None:
    source, target = (Filled(n, SHAPES["alike"], torch.float16, layers=n) for n in (1, 2))
    before = target.blocks([1])
    with pytest.raises(RankError, match="does not fit"):
        fetch_in(target.cache, [1], source.reached, [1])
    assert all(map(torch.equal, target.blocks([1]), before))


def test_a_cache_that_ends_with_its_rank_neither_gives_nor_takes() -> None:
    cache = CudaKVCache(1, BLOCKS, SIZE, torch.float16)
    ones = torch.ones(1, 2, 8)
    cache.layers[0].write(torch.zeros(1, dtype=torch.int64), ones, ones)
    assert cache.hand_over() == Lasting()
    with pytest.raises(RankError):
        fetch_in(cache, [1], Reached(0, 0), [1])


def test_memory_is_handed_over_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CudaKVCache(1, BLOCKS, SIZE, torch.float16, lambda n, d: take(n, d)._replace(lasting=Lasting(7, 4096)))
    ones = torch.ones(1, 2, 8)
    cache.layers[0].write(torch.zeros(1, dtype=torch.int64), ones, ones)
    assert [cache.hand_over(), cache.hand_over()] == [Lasting(7, 4096), Lasting()]


def test_layers_of_two_shapes_are_refused() -> None:
    cache = CudaKVCache(2, BLOCKS, SIZE, torch.float16)
    cache.layers[0].write(torch.zeros(1, dtype=torch.int64), *torch.ones(2, 1, 2, 8))
    with pytest.raises(ModelError, match="two shapes"):
        cache.layers[1].write(torch.zeros(1, dtype=torch.int64), *torch.ones(2, 1, 2, 16))


def test_a_device_without_such_memory_serves_with_its_own() -> None:
    memory = lasting_memory(512, CPU)
    assert (memory.room.numel(), memory.lasting) == (512, Lasting())


class Gpu:
    """Has room from some time on; time passes by sleeping."""

    def __init__(self, room_at: float, error: str = "CUDA's driver: CUDA_ERROR_OUT_OF_MEMORY") -> None:
        self.now, self._room_at, self._error = 0.0, room_at, error

    def make(self) -> tuple[int, int]:
        if self.now < self._room_at:
            raise RankFailed(self._error)
        return 7, 512

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def asked(self) -> tuple[int, int]:
        return _once_there_is_room(self.make, lambda: self.now, self.sleep)


def test_a_cache_waits_for_the_room_of_the_one_before() -> None:
    assert Gpu(KV_ROOM_S / 2).asked() == (7, 512)


@pytest.mark.parametrize(
    ("gpu", "waited"), [(Gpu(1000.0), True), (Gpu(1.0, "CUDA_ERROR_INVALID_DEVICE"), False)], ids=["full", "broken"]
)
def test_but_not_for_ever_and_not_for_anything_else(gpu: Gpu, waited: bool) -> None:
    with pytest.raises(RankFailed):
        gpu.asked()
    assert (gpu.now > KV_ROOM_S) == waited

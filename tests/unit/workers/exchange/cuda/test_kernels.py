"""The kernels: that they compile for each kind of GPU, for which none is needed, and on a GPU what they do.

Two ranks share one GPU here, each with a stream of its own; `benchmarks.gpu_exchange` has a GPU and a process for each.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from membership.base.errors import ConfigError
from workers.exchange.combine import ascending, combine
from workers.exchange.cuda.window import WindowShape

pytest.importorskip("cuda.bindings", reason="kernels are compiled with cuda-bindings and nvidia-cuda-nvrtc")
try:
    from cuda.bindings import nvrtc

    nvrtc.nvrtcVersion()
except RuntimeError as error:  # of the library that looks for it
    pytest.skip(f"no NVRTC (nvidia-cuda-nvrtc): {str(error)[:60]}", allow_module_level=True)

from workers.exchange.cuda import compiler

pytestmark = pytest.mark.unit

RANKS, EXPERTS, ROWS, HIDDEN, TOP_K = 2, 8, 16, 512, 4
SHARE = EXPERTS // RANKS
SHAPE = WindowShape(RANKS, SHARE, ROWS, HIDDEN, TOP_K)
LIMIT_S = 20.0
EVERY_CALL = (1 << 64) - 1
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a", "sm_100a"])
@pytest.mark.parametrize("shape", [SHAPE, WindowShape(8, 64, 256, 7168, 8)], ids=["small", "large"])
def test_they_compile(architecture: str, shape: WindowShape) -> None:
    cubin = compiler.compiled(shape, architecture)
    assert cubin.startswith(b"\x7fELF")
    assert all(name.encode() in cubin for name in compiler.NAMES)


def test_what_the_compiler_says_is_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WindowShape, "definitions", lambda _: {"RANKS": 2})
    with pytest.raises(ConfigError, match='"TOP_K" is undefined'):
        compiler.compiled(SHAPE, "sm_80")


class Pair:
    """Two ranks, each holding half of the experts. Expert e multiplies by 1 + e / 8, which bf16 has exactly."""

    def __init__(self, called_off: int, limit_s: float = LIMIT_S) -> None:
        from workers.exchange.cuda.calls import DeviceCalls, Reach

        self.windows = [torch.zeros(SHAPE.offsets["bytes"], dtype=torch.uint8, device="cuda") for _ in range(RANKS)]
        reach = Reach([window.data_ptr() for window in self.windows], called_off)
        self.ranks = [DeviceCalls(SHAPE, rank, EXPERTS, reach, limit_s) for rank in range(RANKS)]
        self.streams = [torch.cuda.Stream() for _ in range(RANKS)]
        self.scales = (1 + torch.arange(EXPERTS, device="cuda") / 8).bfloat16()
        self.base = 1
        held = [list(range(rank * SHARE, (rank + 1) * SHARE)) for rank in range(RANKS)]
        for calls in self.ranks:
            calls.place(held, [divmod(expert, SHARE) for expert in range(EXPERTS)])
        self.begin([0, 0], masked=3)
        for rank in range(RANKS):  # torch's kernels are loaded, without any waiting
            self.call(rank, 0, self.draw(0))
        torch.cuda.synchronize()

    def draw(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        hidden = torch.randn(ROWS, HIDDEN, device="cuda", generator=generator).bfloat16()
        ids = torch.rand(ROWS, EXPERTS, device="cuda", generator=generator).topk(TOP_K).indices
        return hidden, ids, torch.rand(ROWS, TOP_K, device="cuda", generator=generator)

    def begin(self, rows: list[int], masked: int = 0) -> None:
        self.base += 100
        for calls, real in zip(self.ranks, rows, strict=True):
            calls.begin(self.base, real, masked)
        torch.cuda.synchronize()

    def call(self, rank: int, layer: int, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        mine = self.scales[rank * SHARE : (rank + 1) * SHARE]
        number = torch.arange(SHAPE.room, device="cuda", dtype=torch.int32)

        def compute(packed: Tensor, ends: Tensor) -> Tensor:
            group = torch.bucketize(number, ends[1:], right=True).clamp_max_(SHARE - 1)
            return packed * mine[group].unsqueeze(-1)

        with torch.cuda.stream(self.streams[rank]):
            return self.ranks[rank].call(layer, *given, compute)

    def expected(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        ids, weights = ascending(ids, weights)
        return combine(hidden.unsqueeze(1) * self.scales[ids].unsqueeze(-1), weights, hidden.dtype)

    def failures(self) -> list[int]:
        torch.cuda.synchronize()
        return [int(calls.failure()) for calls in self.ranks]


class CalledOff:
    """The word below which calls are over, in host memory. A page can be registered once."""

    def __init__(self) -> None:
        from workers.exchange.cuda.driver import host_words

        torch.zeros(1, device="cuda")
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self.word = ctypes.c_uint64.from_buffer(self._memory)
        self.address = host_words(ctypes.addressof(self.word), mmap.PAGESIZE)


@pytest.fixture(scope="module")
def registered() -> CalledOff:
    return CalledOff()


@pytest.fixture
def word(registered: CalledOff) -> Iterator[CalledOff]:
    registered.word.value = 0
    yield registered
    registered.word.value = EVERY_CALL  # no kernel waits on
    torch.cuda.synchronize()


@on_gpu
@pytest.mark.parametrize("rows", [(16, 16), (1, 16), (0, 7), (5, 0), (0, 0)])
def test_sums_are_those_of_a_loop(word: CalledOff, rows: tuple[int, int]) -> None:
    """To the last bit, with padding, and where a rank is ahead as it has no rows for the other."""
    pair = Pair(word.address)
    pair.begin([*rows])
    word.word.value = pair.base  # an attempt before this one was called off
    given = [pair.draw(rank + 1) for rank in range(RANKS)]
    outs = [[pair.call(rank, layer, given[rank]) for rank in range(RANKS)] for layer in range(20)]
    assert pair.failures() == [0, 0]
    for rank, real in enumerate(rows):
        wanted = pair.expected(*given[rank])
        wanted[real:] = 0
        assert all(torch.equal(out[rank], wanted) for out in outs)


@on_gpu
def test_a_masked_rank_is_not_waited_for(word: CalledOff) -> None:
    pair = Pair(word.address)
    hidden, ids, weights = pair.draw(3)
    pair.begin([ROWS, 0], masked=2)
    own = torch.arange(TOP_K, device="cuda").expand_as(ids).contiguous()
    out = pair.call(0, 0, (hidden, own, weights))
    assert pair.failures()[0] == 0
    assert torch.equal(out, pair.expected(hidden, own, weights))


@on_gpu
def test_calling_off_ends_a_wait(word: CalledOff) -> None:
    pair = Pair(word.address)
    pair.begin([ROWS, ROWS])
    out = [pair.call(0, layer, pair.draw(4)) for layer in range(5)]  # the other rank does not call
    word.word.value = pair.base + 5
    assert pair.failures() == [1, 0]
    assert not any(each.any() for each in out)


@on_gpu
def test_what_is_called_off_is_right_or_has_failed(word: CalledOff) -> None:
    """Also where no block waits for a peer: each of them may find itself off before it has done its part."""
    pair = Pair(word.address)
    hidden, ids, weights = pair.draw(3)
    own = torch.arange(TOP_K, device="cuda").expand_as(ids).contiguous()
    wanted = pair.expected(hidden, own, weights)
    for _ in range(20):
        pair.begin([ROWS, 0], masked=2)
        word.word.value = pair.base + 50
        outs = [pair.call(0, layer, (hidden, own, weights)) for layer in range(50)]
        assert pair.failures()[0] == 1 or all(torch.equal(out, wanted) for out in outs)


@on_gpu
def test_loads_are_counted_where_rows_are_computed(word: CalledOff) -> None:
    pair = Pair(word.address)
    given = [pair.draw(rank + 1) for rank in range(RANKS)]
    pair.begin([ROWS, 3])
    for rank in range(RANKS):
        pair.call(rank, 0, given[rank])
    assert pair.failures() == [0, 0]
    ids = torch.cat((given[0][1], given[1][1][:3])).flatten()
    found = torch.cat([calls.take_loads()[0] for calls in pair.ranks])
    assert torch.equal(found, torch.bincount(ids.cpu(), minlength=EXPERTS))
    assert not any(calls.take_loads().any() for calls in pair.ranks)


@on_gpu
def test_a_wait_has_a_limit(word: CalledOff) -> None:
    pair = Pair(word.address, limit_s=0.05)
    pair.begin([ROWS, ROWS])
    pair.call(0, 0, pair.draw(4))
    assert pair.failures() == [2, 0]


@on_gpu
def test_a_later_number_fails_the_call(word: CalledOff) -> None:
    pair = Pair(word.address)
    pair.begin([ROWS, ROWS])
    words = pair.windows[0][: SHAPE.offsets["answered"]].view(torch.int64)
    words.fill_((pair.base + 2) << 16)
    torch.cuda.synchronize()
    pair.call(0, 0, pair.draw(4))
    assert pair.failures()[0] == 4


@on_gpu
def test_an_expert_that_no_rank_holds_fails_the_call(word: CalledOff) -> None:
    pair = Pair(word.address)
    pair.begin([ROWS, 0])
    pair.ranks[0].place([[0, 1, 2, 3], [-1] * SHARE], [(0, e) if e < SHARE else None for e in range(EXPERTS)])
    torch.cuda.synchronize()
    for rank in range(RANKS):
        pair.call(rank, 0, pair.draw(4))
    assert pair.failures() == [8, 0]


@on_gpu
def test_garbage_keeps_kernels_in_their_buffers(word: CalledOff) -> None:
    """They end, and the GPU has no error. Where they write is seen by compute-sanitizer alone (docs/gpu.md)."""
    pair = Pair(word.address, limit_s=0.01)
    generator = torch.Generator(device="cuda").manual_seed(5)
    for number in range(30):
        small = number % 2 == 0  # half of them are so small that they may be valid
        pair.begin([ROWS, ROWS], masked=number % 4)

        def spoil(numbers: Tensor, small: bool = small) -> None:
            low, high = (-2, 12) if small else (-(1 << 31), (1 << 31) - 1)
            numbers.copy_(torch.randint(low, high, numbers.shape, device="cuda", generator=generator))

        for calls, window in zip(pair.ranks, pair.windows, strict=True):
            for numbers in (window.view(torch.int32), calls._where, calls._held, calls._real, calls._row_of):
                spoil(numbers)
            calls._words[0, 0] = number % 3
        given = pair.draw(number)
        spoil(given[1])
        given[0].view(torch.int16).random_(generator=generator)
        torch.cuda.synchronize()
        for layer in range(3):
            for rank in range(RANKS):
                pair.call(rank, layer, given)
        assert all(0 <= failure < 32 for failure in pair.failures())

"""The GPU's kernels in Triton's interpreter, on sizes that it can bear: what they compute, and that it is exact.

On a GPU `test_backend.py` asks the same of the compiled kernels on larger sizes; the interpreter cannot multiply bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import DeepseekV2Config, Glm4MoeConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, MixtralTopKRouter
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe

from membership.base.enums import Exactness
from membership.base.errors import ConfigError, ModelError
from tests.support.filled_bank import INNER, FilledBank, gated
from tests.support.local_exchange import LocalExchange
from workers.model import row_tiles
from workers.model.attention_plan import plan_step
from workers.model.backend import Activation, AttentionSpec
from workers.model.calibrations import Calibrations
from workers.model.devices import open_backend
from workers.model.expert_source import ExpertWeights
from workers.protocol.messages import SeqChunk

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from workers.model.cuda import attention as cuda_attention
from workers.model.cuda import attention_check, expert_products, local_experts
from workers.model.cuda import backend as cuda_backend
from workers.model.cuda.attention import Layout, tokens_at_once
from workers.model.cuda.backend import CudaBackend
from workers.model.cuda.expert_products import FEW, MANY, Picked, _on_device, addresses_of, multiply
from workers.model.cuda.router import _choice

pytestmark = [
    pytest.mark.unit,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled here: test_backend.py asks them"),
]

PAGE, BLOCKS, LENGTH = 4, 16, 24
SHAPES = {  # key/value heads, query heads per key/value head, width of keys, of values
    "grouped heads": (1, 2, 16, 16),
    "latent": (2, 1, 20, 12),
}


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> CudaBackend:
    """With splits so small that short sequences have several, and so little room that a prompt's rows take turns."""
    monkeypatch.setattr(cuda_attention, "SPLIT", 16)
    monkeypatch.setattr(cuda_attention, "PARTIAL_BYTES", 1)
    monkeypatch.setattr(cuda_attention, "CELLS", 16)
    monkeypatch.setattr(cuda_attention, "HIGHEST", ((1 << 10, 8),))
    monkeypatch.setattr(cuda_backend, "agree", lambda spec, tokens, device: True)  # takes half a minute here
    return CudaBackend(torch.device("cpu"))


class Layer:
    """One attention layer and three sequences; keeps what came out for each (sequence, position)."""

    def __init__(self, backend: CudaBackend, shape: tuple[int, int, int, int], blocks: Sequence[int]) -> None:
        heads, self.group, width, value_width = shape
        spec = AttentionSpec(1, self.group, width, value_width, LENGTH, BLOCKS, PAGE, torch.float32)
        self.attention = backend.attention(spec, Exactness.INVARIANT, Calibrations())
        assert self.attention.tokens == 8 // self.group
        generator = torch.Generator().manual_seed(3)
        self.queries = torch.randn(3, heads * self.group, LENGTH, width, generator=generator)
        self.keys = torch.randn(3, heads, LENGTH, width, generator=generator)
        self.values = torch.randn(3, heads, LENGTH, value_width, generator=generator)
        self.tables = [list(blocks[6 * seq : 6 * seq + 6]) for seq in range(2)] + [list(blocks[12:])]
        self.found: dict[tuple[int, int], Tensor] = {}

    def step(self, *parts: tuple[int, int, int], padding: int = 0, window: int | None = None) -> None:
        """Run (sequence, first position, tokens) together."""
        chunks = [SeqChunk(seq, start, [0] * count, self.tables[seq]) for seq, start, count in parts]
        rows = sum(count for _, _, count in parts)
        self.attention.plan = plan_step(chunks, PAGE, rows + padding, torch.device("cpu"), tiled=False)
        packed = []
        for kept in (self.queries, self.keys, self.values):
            cut = torch.cat([kept[seq, :, start : start + count] for seq, start, count in parts], 1)
            packed.append(torch.nn.functional.pad(cut, (0, 0, 0, padding), value=9.0)[None])
        out = self.attention.forward(0, packed[0], packed[1], packed[2], 0.25, window)
        assert out.shape[1] == rows + padding
        assert out[0, rows:].isfinite().all()
        places = [(seq, start + i) for seq, start, count in parts for i in range(count)]
        self.found |= {place: out[0, row] for row, place in enumerate(places)}

    def expected(self, seq: int, position: int, window: int | None) -> Tensor:
        first = 0 if window is None else max(0, position + 1 - window)
        keys, values = (
            kept[seq, :, first : position + 1].double().repeat_interleave(self.group, 0)
            for kept in (self.keys, self.values)
        )
        weights = torch.softmax((self.queries[seq, :, position, None].double() * keys).sum(-1) * 0.25, -1)
        return (weights[..., None] * values).sum(1)


@pytest.mark.parametrize("exactness", Exactness)
@pytest.mark.parametrize("by", [0.0, 1e-5, None])
def test_several_tokens_at_once_are_used_where_each_has_the_bits_that_it_has_alone(
    backend: CudaBackend, monkeypatch: pytest.MonkeyPatch, by: float | None, exactness: Exactness
) -> None:
    """Sums are a stand-in's: what is made of a row, and for several tokens `by` more, or too little shared memory."""

    def sums(layout: Layout, _: slice, given: Tensor, *rest: Any) -> None:
        tokens, (partial, sizes) = rest[2:]
        if tokens > 1 and by is None:
            raise OutOfResources(100864, 65536, "shared memory")
        sizes += given.sum(-1, keepdim=True)
        partial += sizes[..., None] + (by if tokens > 1 and by else 0.0)

    monkeypatch.setattr(attention_check, "add_splits", sums)
    monkeypatch.setattr(cuda_backend, "agree", attention_check.agree)
    spec = AttentionSpec(1, 2, 16, 16, LENGTH, BLOCKS, PAGE, torch.float32)
    assert backend.attention(spec, exactness, Calibrations()).tokens == (4 if by == 0.0 else 1)


def test_a_tile_for_several_tokens_is_as_high_as_memory_allows() -> None:
    assert [tokens_at_once(8, head) for head in (256, 512, 1152)] == [16, 8, 1]
    assert [tokens_at_once(group, 256) for group in (1, 3, 128)] == [128, 32, 1]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_what_its_definition_says(backend: CudaBackend, shape: str, window: int | None) -> None:
    layer = Layer(backend, SHAPES[shape], range(BLOCKS))
    layer.step((0, 0, 20), (1, 0, 2), window=window)
    layer.step((1, 2, 1), (0, 20, 2), padding=3, window=window)
    assert len(layer.found) == 25
    for (seq, position), found in layer.found.items():
        assert (found - layer.expected(seq, position, window)).abs().max() < 1e-5, (seq, position)


def test_attention_is_exact_in_any_company(backend: CudaBackend) -> None:
    alone = Layer(backend, SHAPES["grouped heads"], range(BLOCKS))
    alone.step((0, 0, 21))
    together = Layer(backend, SHAPES["grouped heads"], list(reversed(range(BLOCKS))))
    together.step((1, 0, 22), (0, 0, 5), (2, 0, 1), padding=4)
    together.step((0, 5, 15), (1, 22, 1))
    together.step((2, 1, 1), (0, 20, 1))
    for place, found in alone.found.items():
        assert torch.equal(found, together.found[place]), place


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's maximum
@pytest.mark.parametrize(
    ("shape", "part", "wrong", "window"),
    [
        ("latent", "values", torch.inf, None), ("grouped heads", "values", torch.nan, 5),
        ("grouped heads", "keys", torch.nan, None),
    ],
)  # fmt: skip
def test_what_is_not_finite_concerns_only_those_who_see_it(
    backend: CudaBackend, shape: str, part: str, wrong: float, window: int | None
) -> None:
    """Not another request in the same tile, nor earlier tokens of its own prompt, nor another head; and it is not lost
    where later splits of a row are finite.
    """

    def found(layer: Layer) -> dict[tuple[int, int], Tensor]:
        layer.step((0, 0, 5), (1, 0, 20), window=window)
        layer.step((0, 5, 1), (1, 20, 1), window=window)
        return layer.found

    layers = [Layer(backend, SHAPES[shape], range(BLOCKS)) for _ in range(2)]
    getattr(layers[1], part)[1, 0, 2, 3] = wrong
    right, other = (found(layer) for layer in layers)
    for (seq, position), one in other.items():
        sees = seq == 1 and 2 <= position < 2 + (window or LENGTH)
        group = layers[1].group
        assert bool(one[:group].isnan().all()) == sees, (seq, position)
        kept = slice(group if sees else 0, None)
        assert torch.equal(one[kept], right[seq, position][kept]), (seq, position)


def test_copied_blocks_are_the_same_tokens(backend: CudaBackend) -> None:
    source, target = (Layer(backend, SHAPES["latent"], range(BLOCKS)) for _ in range(2))
    assert source.attention.cache.block_bytes == 0
    source.step((0, 0, 18))
    target.step((1, 0, 2))
    used = source.tables[0]
    room = memoryview(bytearray(len(used) * source.attention.cache.block_bytes + 8))
    source.attention.cache.copy_out(used, room)
    target.tables[0] = [11, 5, 4, 3, 2, 12]
    target.attention.cache.copy_in(target.tables[0], room)
    for layer in (source, target):
        layer.step((0, 18, 1))
    assert torch.equal(source.found[0, 18], target.found[0, 18])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_experts_products_are_right_and_exact(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    matrices = [(torch.randn(80, 72, generator=generator) * 0.1).to(dtype).t() for _ in range(3)]
    rows = torch.randn(40, 72, generator=generator).to(dtype)
    found = product(rows, matrices, [0, 3, 3, 40])
    for matrix, first, last in ((matrices[0], 0, 3), (matrices[2], 3, 40)):
        expected = rows[first:last].double() @ matrix.double()
        assert (found[first:last].double() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 5e-3)
    again = product(rows.flip(0)[:30], [matrices[2]], [0, 30]).flip(0)
    assert torch.equal(again, found[10:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_activation_within_the_product_gives_what_it_gives_after_it(dtype: torch.dtype) -> None:
    """Rounded where it was rounded when both halves were kept: so the bits do not depend on which way is taken."""
    generator = torch.Generator().manual_seed(5)
    matrices = [(torch.randn(2 * 40, 72, generator=generator) * 0.1).to(dtype).t() for _ in range(2)]
    rows = torch.randn(21, 72, generator=generator).to(dtype)
    order = torch.randint(42, (25,), generator=generator, dtype=torch.int32)
    ends, addresses = _on_device([0, 17, 25], addresses_of(matrices), device=rows.device)
    found = multiply(rows, matrices[0], addresses, ends, Picked(order, 2), gated=True)
    gate, up = multiply(rows, matrices[0], addresses, ends, Picked(order, 2)).chunk(2, dim=1)
    assert torch.allclose(found, functional.silu(gate) * up, 1e-6, 1e-6)
    if dtype == torch.float16:
        assert (found == functional.silu(gate) * up).double().mean() > 0.99


@pytest.mark.parametrize("gate", [gated, lambda both: functional.gelu(both[:, :INNER]) * both[:, INNER:]])
def test_another_activation_stays_as_it_is(backend: CudaBackend, gate: Activation) -> None:
    weights = FilledBank(backend, 1, 1, 24).weights(0, 0)
    rows = torch.randn(5, 24, generator=torch.Generator().manual_seed(3))
    products = backend.expert_products(gate, Exactness.STOCK, Calibrations())
    found = products.compute([weights], [5], rows)
    assert torch.allclose(found, gate(rows @ weights.gate_up) @ weights.down, 1e-5, 1e-5)
    assert products.kernels._gated == (gate is gated)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_wide_tiles_compute_large_groups_alone_and_give_the_same_bits(gate: bool, ordered: bool) -> None:
    """With whole numbers, whose sums are exact: on a GPU `calibrate` asks it of others, of which the interpreter tells
    nothing. 150 columns, 35 and 70 rows fill no kind of tile."""
    generator = torch.Generator().manual_seed(5)
    matrices = [torch.randint(-1, 2, (300, 72), generator=generator).half().t() for _ in range(4)]
    rows = torch.randint(-1, 2, (140, 72), generator=generator).half()
    order = torch.randint(280, (280,), generator=generator, dtype=torch.int32)
    picked = Picked(order, 2) if ordered else None
    ends, addresses = _on_device([0, 35, 35, 38, 108], addresses_of(matrices), device=rows.device)
    narrow, wide = (multiply(rows, matrices[0], addresses, ends, picked, gated=gate, few=few) for few in (MANY, 32))
    assert torch.equal(narrow[:108], wide[:108])
    assert narrow[:108].abs().sum() > 1000
    alone = multiply(rows, matrices[0], addresses, ends, picked, gated=gate, few=0)
    assert torch.equal(alone[:108], wide[:108]), "small groups, too"


@pytest.mark.parametrize("kind", ["WIDE", "HIGH"])
def test_tiles_that_round_otherwise_are_not_used(
    backend: CudaBackend, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = FilledBank(backend, 1, 1, 24).weights(0, 0)
    for module in (expert_products, row_tiles):  # few sizes: the interpreter is slow
        monkeypatch.setattr(module, "CANDIDATES", (16, 64, 128))

    def used() -> bool:
        products = backend.expert_products(gated, Exactness.INVARIANT, Calibrations())
        assert products.kernels.few(1000, 2) == MANY, "not before it has been seen"
        products.calibrate(weights)
        return products.kernels.few(1000, 2) == FEW

    assert used()
    tile = getattr(expert_products, kind)
    monkeypatch.setattr(expert_products, kind, replace(tile, piece_bytes=64))  # sums 16 numbers at a time
    assert not used()


@pytest.mark.parametrize("exactness", Exactness)
def test_tiles_that_do_not_fit_into_a_gpu_are_not_used(
    backend: CudaBackend, exactness: Exactness, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = FilledBank(backend, 1, 1, 24).weights(0, 0)
    for module in (expert_products, row_tiles):
        monkeypatch.setattr(module, "CANDIDATES", (16,))
    real, most = multiply, {"rows": 1 << 20}

    def of_a_small_gpu(rows: Tensor, *given: Any, few: int = MANY, **more: Any) -> Tensor:
        if few < MANY and len(rows) > most["rows"]:
            raise OutOfResources(98304, 65536, "shared memory")
        return real(rows, *given, few=few, **more)

    monkeypatch.setattr(expert_products, "multiply", of_a_small_gpu)
    for most["rows"], expected in ((1 << 20, FEW), (FEW, MANY), (0, MANY)):
        products = backend.expert_products(gated, exactness, Calibrations())
        products.calibrate(weights)
        assert products.kernels.few(1000, 2) == expected


def product(rows: Tensor, matrices: Sequence[Tensor], ends: list[int]) -> Tensor:
    there, addresses = _on_device(ends, addresses_of(matrices), device=rows.device)
    return multiply(rows, matrices[0], addresses, there)


@pytest.mark.parametrize("at_once", [8, 1024])
def test_experts_that_are_all_here_give_the_bits_of_the_exchange(
    backend: CudaBackend, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_experts, "PAIRS", at_once)
    held = FilledBank(backend, 2, 5, 24)
    local = backend.local_experts(held, gated, (2, 5))
    exchange = LocalExchange(held)
    generator = torch.Generator().manual_seed(6)
    load = torch.zeros(2, 5, dtype=torch.int64)
    for rows, padding in ((1, 0), (7, 3), (20, 4)):
        assert local.begin(rows)
        for layer in range(2):
            hidden = torch.randn(rows + padding, 24, generator=generator)
            ids = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(rows + padding)])
            weights = torch.rand(rows + padding, 3, generator=generator)
            ids[0, 1], weights[0, 1] = ids[0, 0], weights[0, 0]  # no model does that, but it is defined
            found = local.compute(layer, hidden, ids, weights)
            assert torch.equal(
                found[:rows], exchange.dispatch_combine(layer, hidden[:rows], ids[:rows], weights[:rows])
            )
            assert not found[rows:].any()
            load[layer] += ids[:rows].flatten().bincount(minlength=5)
    assert local.take_load().tolist() == load.tolist()
    assert not local.take_load().any()


class Shifted(nn.Module):
    """A norm whose weight is what it adds to 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.variance_epsilon = 1e-5

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return ((1.0 + self.weight) * normed).to(hidden.dtype)


@torch.inference_mode()
def test_a_norm_of_another_definition_stays_as_it_is(backend: CudaBackend) -> None:
    usual, shifted = MixtralRMSNorm(72, eps=1e-5), Shifted(72)
    usual.weight.data.uniform_(0.5, 1.5)
    rows = torch.randn(1, 9, 72)
    before = usual(rows), shifted(rows)
    backend.fuse(nn.ModuleList([usual, shifted]))
    assert "forward" in vars(usual)
    assert "forward" not in vars(shifted)
    assert torch.allclose(usual(rows), before[0], 1e-5, 1e-5)
    assert torch.equal(shifted(rows), before[1])
    assert torch.equal(usual(rows[:, 4:5]), usual(rows)[:, 4:5])
    assert usual(rows.to(torch.float16)).dtype == torch.float32, "the wider type, as torch has it"


class Late(MixtralRMSNorm):
    """Rounds once, after it has multiplied by its weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * normed).to(hidden.dtype)


@torch.inference_mode()
def test_a_norm_that_rounds_elsewhere_stays_as_it_is(backend: CudaBackend) -> None:
    """In fp32 there is no difference."""
    usual, late = MixtralRMSNorm(72), Late(72)
    for each in (usual, late):
        each.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(7))
        each.to(torch.float16)
    backend.fuse(nn.ModuleList([usual, late]))
    assert ["forward" in vars(each) for each in (usual, late)] == [True, False]
    rows = torch.randn(1, 9, 72, generator=torch.Generator().manual_seed(8)).half()
    assert torch.allclose(usual(rows), MixtralRMSNorm.forward(usual, rows), 1e-3, 1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("normed", [True, False])
def test_a_router_chooses_by_one_kernel_what_it_chose(backend: CudaBackend, normed: bool) -> None:
    config = Qwen3MoeConfig(num_experts=24, num_experts_per_tok=5, norm_topk_prob=normed, hidden_size=40)
    router = qwen3_moe.Qwen3MoeTopKRouter(config)
    router.weight.data.normal_(std=0.2)
    rows = torch.randn(19, 40)
    before = router(rows)
    backend.fuse(nn.ModuleList([router]))
    assert "forward" in vars(router)
    logits, weights, ids = router(rows)
    assert torch.equal(logits, before[0])
    assert torch.equal(ids, before[2])
    assert torch.allclose(weights, before[1], 1e-5, 1e-5)
    assert torch.equal(_choice(logits[7:8], 5, normed, torch.float32)[1], weights[7:8])
    other = functional_call(router, {"weight": 2 * router.weight.data}, (rows,))
    assert torch.equal(other[0], 2 * logits), "as products are measured"
    router.weight.data[3:9] = router.weight.data[3]
    assert router(100 * router.weight.data[3:4])[2].tolist() == [[3, 4, 5, 6, 7]], "of equal ones the first"


def mixtral() -> nn.Module:
    return MixtralTopKRouter(MixtralConfig(num_local_experts=24, num_experts_per_tok=5, hidden_size=40))


def qwen3() -> nn.Module:
    return qwen3_moe.Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=24, num_experts_per_tok=5, hidden_size=40))


@torch.inference_mode()
@pytest.mark.parametrize("family", [mixtral, qwen3])
def test_a_fused_router_rounds_where_its_module_does(backend: CudaBackend, family: Callable[[], nn.Module]) -> None:
    """Mixtral's weights stay fp32 in a narrower model, those of others do not. (The interpreter cuts bf16 off.)"""
    router = family()
    router.weight = nn.Parameter((torch.randn(24, 40, generator=torch.Generator().manual_seed(5)) / 5).half())
    rows = torch.randn(19, 40, generator=torch.Generator().manual_seed(6)).half()
    before = router(rows)
    backend.fuse(nn.ModuleList([router]))
    assert "forward" in vars(router)
    found = router(rows)
    assert [each.dtype for each in found] == [each.dtype for each in before]
    assert torch.equal(found[0], before[0])
    near = 1e-5 if before[1].dtype == torch.float32 else torch.finfo(before[1].dtype).eps
    assert torch.allclose(found[1], before[1], near, near)


class _Narrow(nn.Module):
    """Its softmax is of its rows' type, and so is the sum that it divides by."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.weight = 5, nn.Parameter(torch.empty(24, 40))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden, self.weight)
        weights, ids = torch.topk(torch.softmax(logits, -1), self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), ids


def deepseek_v2() -> nn.Module:
    return DeepseekV2TopkRouter(
        DeepseekV2Config(
            n_routed_experts=24,
            num_experts_per_tok=1,
            hidden_size=64,
            topk_method="greedy",
            routed_scaling_factor=1.0,
        )
    )


@torch.inference_mode()
@pytest.mark.parametrize("family", [_Narrow, deepseek_v2])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16])
def test_a_router_that_computes_in_another_type_stays_as_it_is(
    backend: CudaBackend, family: Callable[[], nn.Module], kept: torch.dtype
) -> None:
    """In fp32 there is no difference, but DeepSeek's takes rows of bf16 then as well."""
    router = family()
    router.weight = nn.Parameter(torch.randn_like(router.weight).to(kept))
    backend.fuse(nn.ModuleList([router]))
    assert ("forward" in vars(router)) == (family is _Narrow and kept is torch.float32)


@torch.inference_mode()
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normed", [True, False])
def test_of_logits_that_are_no_numbers_experts_are_chosen_that_exist(wrong: float, normed: bool) -> None:
    """An id beyond them would be an address beyond their memory. Which tokens are wrong can still be seen."""
    logits = torch.randn(3, 24)
    logits[1, 7 if wrong != -torch.inf else slice(None)] = wrong
    _, weights, ids = _choice(logits, 5, normed, torch.float32)
    assert ids[1].tolist() == [0, 1, 2, 3, 4]
    assert weights.isnan().all(1).tolist() == [False, True, False]


@torch.inference_mode()
def test_a_router_of_another_definition_stays_as_it_is(backend: CudaBackend) -> None:
    config = Glm4MoeConfig(n_routed_experts=24, num_experts_per_tok=5, hidden_size=40, n_group=1, topk_group=1)
    router = Glm4MoeTopkRouter(config)
    router.weight.data.normal_()
    backend.fuse(nn.ModuleList([router]))
    assert "forward" not in vars(router), "a sigmoid, and no softmax"


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_queries_and_keys_are_turned_by_one_kernel(
    backend: CudaBackend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = qwen3_moe.apply_rotary_pos_emb
    monkeypatch.setattr(qwen3_moe, "apply_rotary_pos_emb", plain)  # put back afterwards
    config = Qwen3MoeConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=24)
    backend.fuse(qwen3_moe.Qwen3MoeAttention(config, 0).to(dtype))
    fused = qwen3_moe.apply_rotary_pos_emb
    assert fused is not plain
    queries, keys = (torch.randn(1, 7, heads, 24).to(dtype).transpose(1, 2) for heads in (4, 2))
    angles = torch.randn(2, 1, 7, 24).to(dtype)
    found, expected = fused(queries, keys, *angles), plain(queries, keys, *angles)
    assert all(map(torch.equal, found, expected))
    assert found[0].transpose(1, 2).is_contiguous()
    wide = fused(queries.double(), keys.double(), *angles.double())
    assert all(map(torch.equal, wide, plain(queries.double(), keys.double(), *angles.double()))), (
        "not what was compared"
    )


@torch.inference_mode()
def test_a_rotary_function_of_another_definition_stays(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return q.flip(-1), k.flip(-1)

    monkeypatch.setattr(qwen3_moe, "apply_rotary_pos_emb", interleaved)
    backend.fuse(qwen3_moe.Qwen3MoeAttention(Qwen3MoeConfig(hidden_size=64), 0))
    assert qwen3_moe.apply_rotary_pos_emb is interleaved


def test_experts_come_and_go(backend: CudaBackend) -> None:
    held = FilledBank(backend, 1, 2, 24)
    local = backend.local_experts(held, gated, (1, 2))
    hidden, ids, weights = torch.ones(1, 24), torch.tensor([[1]]), torch.ones(1, 1)
    assert local.begin(1)
    old = local.compute(0, hidden, ids, weights)
    was = held.weights(0, 1)
    held.drop(frozenset({(0, 0)}))
    assert not local.begin(1)
    held.put(0, 0, was)
    held.put(0, 1, ExpertWeights(was.gate_up * 2, was.down))
    assert local.begin(1)
    assert not torch.equal(local.compute(0, hidden, ids, weights), old)


def test_experts_of_one_call_have_one_layout() -> None:
    with pytest.raises(ModelError, match="laid out differently"):
        product(torch.ones(2, 4), [torch.ones(4, 4), torch.ones(4, 4).t()], [0, 1, 2])


def test_experts_are_checked_on_the_device_that_computes(backend: CudaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def gated_relu(both: Tensor) -> Tensor:
        return torch.relu(both[:, :4]) * both[:, 4:]

    weights = ExpertWeights(torch.ones(4, 8), torch.ones(4, 4))
    products = backend.expert_products(gated_relu, Exactness.INVARIANT, Calibrations())
    monkeypatch.setattr("workers.model.cuda.expert_products._agreeing", lambda matrix, few, gated: (16,))
    with pytest.raises(ModelError, match="depends on its batch on this GPU"):
        products.calibrate(weights)
    backend.expert_products(gated_relu, Exactness.STOCK, Calibrations()).calibrate(weights)


def test_ranks_of_a_host_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for slot in (0, 1, 2):
        open_backend("cuda", slot)
    open_backend("cuda:1", 4)
    assert [device.index for device in taken] == [0, 1, 0, 1]


def test_a_gpu_without_triton_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(__import__("sys").modules, "workers.model.cuda.backend", None)
    with pytest.raises(ConfigError, match="needs Triton"):
        open_backend("cuda:0")

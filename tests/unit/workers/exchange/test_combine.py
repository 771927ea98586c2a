"""Sums of experts' outputs have the same bits however many there are, and whatever their type is."""

from __future__ import annotations

import pytest
import torch

from workers.exchange import combine as module
from workers.exchange.combine import combine

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 7), (3, 2, 16), (5, 8, 33)])
def test_both_ways_to_sum_round_each_product_and_each_sum(
    dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(1)
    outputs = torch.randn(shape, generator=g).to(dtype)
    weights = torch.rand(shape[:2], generator=g)
    wanted = torch.zeros(shape[0], shape[2])
    for k in range(shape[1]):  # fp32 by promotion
        product = outputs[:, k] * weights[:, k, None]
        wanted = product if k == 0 else wanted + product
    before = outputs.clone()
    for small in (0, outputs.numel()):
        monkeypatch.setattr(module, "SMALL", small)
        found = combine(outputs, weights, dtype)
        assert torch.equal(found, wanted.to(dtype))
        assert found.is_contiguous()
        assert found.untyped_storage().nbytes() == found.nbytes, "the products are not kept"
    assert torch.equal(outputs, before), "they are a peer's memory, or the caller's"


def test_the_weights_may_need_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, weights = torch.ones(2, 3, 4), torch.rand(2, 3, requires_grad=True)
    for small in (0, outputs.numel()):
        monkeypatch.setattr(module, "SMALL", small)
        (slope,) = torch.autograd.grad(combine(outputs, weights, torch.float32).sum(), weights)
        assert slope.tolist() == [[4.0] * 3] * 2

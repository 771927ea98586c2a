"""The usual router's choice of experts in one launch, instead of a softmax, a sort and what follows."""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import triton
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from workers.model.cuda.kernels import choose

ROWS = 16  # in the check
TOLERANCE = 1e-5  # of fp32

Routed = tuple[Tensor, Tensor, Tensor]


def fuse_routers(model: nn.Module) -> None:
    """Have each router of `model` that takes the largest of a softmax choose by one kernel. One that is defined in
    another way stays as it is: each is compared with its module first.
    """
    for module in model.modules():
        weight, k = module._parameters.get("weight"), getattr(module, "top_k", None)
        if weight is None or weight.dim() != 2 or not isinstance(k, int) or "bias" in module._parameters:
            continue
        fused = next(
            (way for normed in (True, False) if _agrees(module, way := partial(_routed, module, k, normed))), None
        )
        if fused is not None:
            module.forward = fused


def _agrees(module: nn.Module, fused: partial[Routed]) -> bool:
    """In fp32 and with small logits, where hardly two experts are equal."""
    generator = torch.Generator().manual_seed(0)
    weight = module.get_parameter("weight")
    matrix = torch.randn(weight.shape, generator=generator).to(weight.device) / weight.shape[1] ** 0.5
    rows = torch.randn(ROWS, weight.shape[1], generator=generator).to(weight.device)
    expected = functional_call(module, {"weight": matrix}, (rows,))
    if not isinstance(expected, tuple) or len(expected) != 3 or not all(isinstance(each, Tensor) for each in expected):
        return False
    found = _choice(functional.linear(rows, matrix), *fused.args[1:])
    return (
        [each.shape for each in found] == [each.shape for each in expected]
        and torch.equal(found[2], expected[2])
        and torch.allclose(found[1], expected[1], TOLERANCE, TOLERANCE)
        and torch.equal(found[0], expected[0])
    )


def _routed(module: nn.Module, k: int, normed: bool, hidden: Tensor) -> Routed:
    """hidden [..., H] -> logits [T, experts], weights [T, k] of the same type, ids [T, k]."""
    weight = cast("Tensor", module.weight)  # no parameter while its products are measured
    return _choice(functional.linear(hidden.reshape(-1, weight.shape[1]), weight), k, normed)


def _choice(logits: Tensor, k: int, normed: bool) -> Routed:
    logits = logits.contiguous()
    tokens, experts = logits.shape
    ids = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, k, dtype=logits.dtype, device=logits.device)
    choose[(tokens,)](
        logits, ids, weights, EXPERTS=experts, K=k, NORMED=normed,
        WIDE=triton.next_power_of_2(experts), WIDE_K=triton.next_power_of_2(k),
    )  # fmt: skip
    return logits, weights, ids

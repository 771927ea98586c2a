"""The usual router's choice of experts in one launch, instead of a softmax, a sort and what follows."""

from __future__ import annotations

from collections.abc import Callable
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
MOSTLY = 0.95  # of the weights in a narrower type: some lie between two of its numbers, and are rounded the other way

Routed = tuple[Tensor, Tensor, Tensor]
Product = Callable[[Tensor, Tensor], Tensor]
"""rows [T, K], weight [N, K] -> [T, N]"""


def fuse_routers(model: nn.Module) -> None:
    """Have each router of `model` that takes the largest of a softmax choose by one kernel. One that is defined in
    another way stays as it is: each is compared with its module first.
    """
    for module in model.modules():
        weight, k = module._parameters.get("weight"), getattr(module, "top_k", None)
        if weight is None or weight.dim() != 2 or not isinstance(k, int) or "bias" in module._parameters:
            continue
        kind = _type_of_weights(module, weight.dtype)
        if kind is None:
            continue
        for normed in (True, False):
            if _agrees(module, k, normed, torch.float32, torch.float32) and _agrees(
                module, k, normed, weight.dtype, kind
            ):
                module.forward = partial(_routed, module, k, normed, kind)
                break


def _type_of_weights(module: nn.Module, dtype: torch.dtype) -> torch.dtype | None:
    """What its weights are of where all else is of `dtype`: that, or fp32. None: it is no router of the usual kind, or
    computes in another type than its rows are of.
    """
    expected = _expected(module, *_sample(module, dtype))
    if expected is None or expected[0].dtype != dtype or _converts(module):
        return None
    return expected[1].dtype


def _converts(module: nn.Module) -> bool:
    rows, matrix = _sample(module, torch.float32)
    try:
        _expected(module, rows.to(torch.bfloat16), matrix)
    except RuntimeError:  # torch multiplies no two types
        return False
    return True


def _sample(module: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and a matrix that give small logits, where in fp32 hardly two experts are equal."""
    generator = torch.Generator().manual_seed(0)
    weight = module.get_parameter("weight")
    matrix = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
    rows = torch.randn(ROWS, weight.shape[1], generator=generator)
    return rows.to(weight.device, dtype), matrix.to(weight.device, dtype)


def _expected(module: nn.Module, rows: Tensor, matrix: Tensor) -> Routed | None:
    found = functional_call(module, {"weight": matrix}, (rows,))
    if not isinstance(found, tuple) or len(found) != 3 or not all(isinstance(each, Tensor) for each in found):
        return None
    return cast("Routed", found)


def _agrees(module: nn.Module, k: int, normed: bool, dtype: torch.dtype, kind: torch.dtype) -> bool:
    """Whether the kernel gives what the module gives. In narrow types logits may be equal: then not by expert."""
    rows, matrix = _sample(module, dtype)
    expected, found = _expected(module, rows, matrix), _choice(functional.linear(rows, matrix), k, normed, kind)
    if expected is None or any(
        (one.shape, one.dtype) != (other.shape, other.dtype) for one, other in zip(found, expected, strict=True)
    ):
        return False
    near = torch.isclose(found[1], expected[1], TOLERANCE, TOLERANCE)
    if dtype != torch.float32:
        return bool(torch.equal(found[0], expected[0]) and near.float().mean() >= MOSTLY)
    return torch.equal(found[2], expected[2]) and bool(near.all()) and torch.equal(found[0], expected[0])


def with_product(module: nn.Module, product: Product) -> Callable[[Tensor], Routed] | None:
    """A fused router whose logits are another product's; None if this is none."""
    forward = module.forward
    return partial(forward, product=product) if isinstance(forward, partial) and forward.func is _routed else None


def _routed(
    module: nn.Module, k: int, normed: bool, kind: torch.dtype, hidden: Tensor, product: Product = functional.linear
) -> Routed:
    """hidden [..., H] -> logits [T, experts], weights [T, k] of that type, ids [T, k]."""
    weight = cast("Tensor", module.weight)  # no parameter while its products are measured
    return _choice(product(hidden.reshape(-1, weight.shape[1]), weight), k, normed, kind)


def _choice(logits: Tensor, k: int, normed: bool, kind: torch.dtype) -> Routed:
    logits = logits.contiguous()
    tokens, experts = logits.shape
    ids = torch.empty(tokens, k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, k, dtype=kind, device=logits.device)
    choose[(tokens,)](
        logits, ids, weights, EXPERTS=experts, K=k, NORMED=normed,
        WIDE=triton.next_power_of_2(experts), WIDE_K=triton.next_power_of_2(k),
    )  # fmt: skip
    return logits, weights, ids

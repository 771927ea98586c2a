"""Norms of a model in one launch each, instead of six operations of torch."""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor, nn

from workers.model.cuda.kernels import rms_norm

ROWS = 4  # in the check
TOLERANCE = 1e-5  # of fp32
MOSTLY = 0.95  # of a narrower type: some lie between two of its numbers, and are rounded the other way


def fuse_norms(model: nn.Module) -> None:
    """Have every RMS norm of `model` computed by one kernel. A norm that is defined in another way stays as it is:
    each is compared with its module first.
    """
    for module in model.modules():
        weight, epsilon = module._parameters.get("weight"), getattr(module, "variance_epsilon", None)
        if weight is None or weight.dim() != 1 or not isinstance(epsilon, float):
            continue
        fused = partial(_normed, module, epsilon)
        if _agrees(module, fused, torch.float32) and _agrees(module, fused, weight.dtype):
            module.forward = fused


def _agrees(module: nn.Module, fused: partial[Tensor], dtype: torch.dtype) -> bool:
    """For rows of that type: only in the model's own can be seen where it rounds."""
    weight = module.get_parameter("weight")
    sample = torch.randn(ROWS, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    found, expected = fused(sample), module(sample)
    near = torch.isclose(found, expected.to(found.dtype), TOLERANCE, TOLERANCE).float().mean()
    return found.dtype == expected.dtype and bool(near >= (1.0 if dtype == torch.float32 else MOSTLY))


def _normed(module: nn.Module, epsilon: float, hidden: Tensor) -> Tensor:
    """hidden [..., width] -> the same shape, of the wider of the types of `hidden` and the weight."""
    weight, width = module.get_parameter("weight"), hidden.shape[-1]
    out = torch.empty(hidden.shape, dtype=torch.promote_types(hidden.dtype, weight.dtype), device=hidden.device)
    rms_norm[(hidden.numel() // width,)](
        hidden.contiguous(), weight, out, epsilon, WIDTH=width, WIDE=triton.next_power_of_2(width)
    )
    return out

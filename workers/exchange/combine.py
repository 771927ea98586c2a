"""The one way to sum a token's expert outputs: in fp32, by ascending expert, on the token's owner.

Every exchange uses it, so the bits of the sum do not depend on which ranks hold the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ascending(topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's experts and weights, reordered by ascending logical expert id; weights in fp32."""
    ids, order = topk_ids.sort(dim=-1)
    return ids, topk_weights.gather(-1, order).float()


SMALL = 256 * 1024
"""Elements up to which one large product is faster; above, its memory is mapped and faulted in again at each call."""


def combine(outputs: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weighted sum [T, H] of `outputs` [T, K, H], which are in ascending expert order as `weights` [T, K] are.

    Each product and each sum is rounded by itself, so that both ways give the same bits.
    """
    weights = weights.unsqueeze(-1)
    if outputs.numel() <= SMALL:
        total, *others = _weighted(outputs, weights).unbind(1)
        if others:
            total = total + others[0]  # new memory: the products are not kept
        for each in others[1:]:
            total.add_(each)
    else:
        total = _weighted(outputs[:, 0], weights[:, 0])
        for k in range(1, outputs.shape[1]):
            total += _weighted(outputs[:, k], weights[:, k])
    return total.to(dtype)


def _weighted(outputs: Tensor, weights: Tensor) -> Tensor:
    """The products, in fp32. A product of two types would convert both piece by piece, at up to five times the time."""
    return outputs * weights if outputs.dtype == torch.float32 else outputs.float().mul_(weights)

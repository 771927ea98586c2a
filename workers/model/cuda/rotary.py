"""Rotary embeddings of queries and keys in one launch, instead of ten.

transformers' attention modules call a function of their file by its name, so that is where ours is put: once per
process, with the same bits, and the other one for whatever ours is not made for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor, nn

from workers.model.cuda.kernels import rotate

NAME = "apply_rotary_pos_emb"
MARK = "elastic_ep_fused"
HEADS, KEY_HEADS, ROWS, WIDTH = 4, 2, 5, 32  # in the check
Rotated = tuple[Tensor, Tensor]
Rotary = Callable[..., Rotated]


def fuse_rotary(attention_modules: Sequence[nn.Module], device: torch.device) -> None:
    """Have the attention of these modules turn queries and keys by one kernel, where it gives the same bits."""
    for file, dtype in {(type(module).__module__, _dtype(module)) for module in attention_modules}:
        source: Any = sys.modules[file]
        plain = getattr(source, NAME, None)
        if plain is not None and not hasattr(plain, MARK) and _agrees(plain, dtype, device):
            setattr(source, NAME, _fused(plain, dtype, device.type))


def _dtype(module: nn.Module) -> torch.dtype:
    return next((each.dtype for each in module.parameters()), torch.float32)


def _agrees(plain: Rotary, dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    sizes = (1, HEADS, ROWS, WIDTH), (1, KEY_HEADS, ROWS, WIDTH), (1, ROWS, WIDTH), (1, ROWS, WIDTH)
    given = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    try:
        expected = plain(*given)
    except (TypeError, RuntimeError, IndexError):  # another function of that name
        return False
    return all(map(torch.equal, _turned(*given), expected))


def _fused(plain: Rotary, dtype: torch.dtype, kind: str) -> Rotary:
    @wraps(plain)
    def fused(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **named: Any) -> Rotated:
        usual = (
            q.device.type == kind
            and q.dtype == dtype
            and q.dim() == 4
            and len(q) == 1
            and cos.shape == (1, q.shape[2], q.shape[3])
        )
        if (
            not usual
            or others
            or named
            or not q.dtype == k.dtype == cos.dtype == sin.dtype
            or q.stride(3) != 1
            or k.stride(3) != 1
        ):
            return plain(q, k, cos, sin, *others, **named)
        return _turned(q, k, cos, sin)

    setattr(fused, MARK, True)
    return fused


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Rotated:
    """q [1, heads, T, width] and k [1, fewer heads, T, width], cos and sin [1, T, width] -> q and k, turned."""
    (heads, rows, width), key_heads = q.shape[1:], k.shape[1]
    queries = torch.empty(1, rows, heads, width, dtype=q.dtype, device=q.device)
    keys = torch.empty(1, rows, key_heads, width, dtype=k.dtype, device=k.device)
    rotate[(rows, heads + key_heads)](
        q, k, cos.contiguous(), sin.contiguous(), queries, keys, *q.stride()[1:3], *k.stride()[1:3],
        QUERY_HEADS=heads, KEY_HEADS=key_heads, WIDTH=width, WIDE=triton.next_power_of_2(width), enable_fp_fusion=False,
    )  # fmt: skip
    return queries.transpose(1, 2), keys.transpose(1, 2)

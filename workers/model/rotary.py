"""Rotary embeddings from a table: looked up by position instead of computed in every step.

Faster, and exact: the table is computed once, so its bits cannot depend on how many positions a step asks for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def tabulate(model: nn.Module, positions: int, dtype: torch.dtype, device: torch.device) -> int:
    """Replace the forward of every rotary module of `model`; how many there were."""
    found = [m for m in model.modules() if "inv_freq" in m._buffers]
    for module in found:
        probe = torch.zeros(1, 1, 1, dtype=dtype, device=device)
        table = module(probe, position_ids=torch.arange(positions, device=device)[None])
        module.forward = _lookup(table)
    return len(found)


def _lookup(table: Any) -> Any:
    """A forward that picks rows [1, T, ...] of the table (a tensor, or a tuple of cosines and sines)."""
    parts: tuple[Tensor, ...] = table if isinstance(table, tuple) else (table,)
    flat = tuple(part[0].contiguous() for part in parts)

    def forward(x: Tensor, position_ids: Tensor, **_: Any) -> Any:
        rows = position_ids[0]
        picked = tuple(part.index_select(0, rows)[None] for part in flat)
        return picked if isinstance(table, tuple) else picked[0]

    return forward

"""Rows as a transport moves them: the bits of a float type as integers of its width, which numpy can copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Rows = npt.NDArray[Any]  # [R, H]

DTYPES: tuple[tuple[torch.dtype, Any], ...] = (
    (torch.float32, np.int32),
    (torch.bfloat16, np.int16),
    (torch.float16, np.int16),
)
"""By dtype code: the type of the model, and the type of its rows here."""
DTYPE_CODES = {dtype: code for code, (dtype, _) in enumerate(DTYPES)}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def bits(tensor: torch.Tensor) -> Rows:
    """The same memory as integers."""
    return tensor.view(BITS[tensor.dtype]).numpy()

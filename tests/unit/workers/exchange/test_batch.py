"""Experts' rows on their way to the device and back: what fails there is refused, not the rank's end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from workers.exchange.batch import ExpertFailed, Work, run

pytestmark = pytest.mark.unit


class Bank:
    """Doubles rows."""

    def padded(self, count: int) -> int:
        return count

    def compute_many(self, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor) -> Tensor:
        return rows * 2


def test_rows_that_do_not_get_to_the_device_are_refused() -> None:
    """The device is absent, which fails as a lack of its memory does: in the copy."""
    work = Work([3, 5], [1, 1], np.array([0, 1]), np.zeros((2, 4), np.float32))
    with pytest.raises(ExpertFailed, match="layer 7, expert 3") as raised:
        run(cast("Any", Bank()), 7, [work], 0, torch.device("cuda:99"))
    assert raised.value.__cause__ is not None
    assert run(cast("Any", Bank()), 7, [work], 0, torch.device("cpu")).rows.tolist() == np.zeros((2, 4)).tolist()

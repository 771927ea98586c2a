"""A few steps of `demo-model --retrain`: writes a complete checkpoint, the same one each time, and learns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from elastic.demo.model import FILES
from elastic.demo.training import train
from workers.model.families import read_model_info

pytestmark = pytest.mark.integration


def test_short_training_is_reproducible(tmp_path: Path) -> None:
    lines: list[str] = []
    for name in ("a", "b"):
        train(tmp_path / name, lines.append, steps=3)
    assert read_model_info(tmp_path / "a").experts == 8
    for file in FILES:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    held_out = [float(m.group(1)) for line in lines if (m := re.search(r"held-out loss ([\d.]+)", line))]
    assert len(held_out) == 2
    assert held_out[0] < 7.05  # ln(1024) = 6.93 is what knowing nothing gives

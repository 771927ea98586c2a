"""What happens to a checkpoint's files under a running cluster: replaced by another model's, put back, overwritten."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"


def replace_weights(directory: Path, changed: Callable[[str], bool] = lambda name: True, file: str = WEIGHTS) -> Path:
    """Another model's file in this one's place: same names and shapes, other values. Returns where the old one is."""
    old, new = directory / f"{file}.old", directory / f"{file}.new"
    os.link(directory / file, old)
    save_file(other_values(load_file(directory / file), changed), new, metadata={"format": "pt"})
    os.replace(new, directory / file)
    return old


def other_values(tensors: dict[str, Tensor], changed: Callable[[str], bool]) -> dict[str, Tensor]:
    return {name: tensor.flip(0).contiguous() if changed(name) else tensor for name, tensor in tensors.items()}


def is_expert(name: str) -> bool:
    return ".experts." in name


def replace_text(directory: Path, file: str, edit: Callable[[str], str]) -> Path:
    """The same for a text file."""
    old, new = directory / f"{file}.old", directory / f"{file}.new"
    os.link(directory / file, old)
    new.write_text(edit((directory / file).read_text(encoding="utf-8")), encoding="utf-8")
    os.replace(new, directory / file)
    return old


def put_back(old: Path, *, as_copy: bool = False) -> None:
    """`as_copy`: another file with the old content."""
    if as_copy:
        shutil.copyfile(old, old.with_suffix(".copy"))
        old.unlink()
        old = old.with_suffix(".copy")
    os.replace(old, old.with_suffix(""))

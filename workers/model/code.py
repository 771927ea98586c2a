"""The code that a rank computes with: another one may round differently, so it is a part of the rank's identity."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOMS = ("model", "exchange")  # of `workers`: all code that touches a tensor
KINDS = ("*.py", "*.cu")
MEASURED = ("attention_plan.py", "packing.py", "row_tiles.py")  # of `model`, and all of the folders below
FOLDERS = {"cpu": ("cpu",), "cuda": ("cpu", "cuda")}  # a GPU's dense products are tiled by `cpu/`


@cache
def code_version() -> str:
    """Versions of the libraries, and a digest of our own source. The forkserver asks first, for all its ranks."""
    root = Path(__file__).resolve().parents[1]
    files = [file for room in ROOMS for kind in KINDS for file in (root / room).rglob(kind)]
    return f"{_versions('transformers', 'torch', 'llguidance')}, {_digest(files)[:8]}"


@cache
def measured_code(device: str) -> str:
    """The part of it that decides what a measurement of such a device yields: its kernels, and what measures them.

    Measurements are kept by it: an edit anywhere else leaves them as they are.
    """
    return f"{_versions('transformers', 'torch')}, {_digest(measured_files(device))}"


def measured_files(device: str) -> list[Path]:
    """The files of it."""
    room = Path(__file__).resolve().parent
    folders = (file for folder in FOLDERS[device] for file in (room / folder).glob("*.py"))
    return sorted([*folders, *(room / name for name in MEASURED)])


def _versions(*names: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in names)


def _digest(files: Iterable[Path]) -> str:
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()

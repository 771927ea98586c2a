"""Measurements of this host's kernels on disk, so that the next start need not measure: that takes seconds to minutes.

By CPU, libraries with their settings, the code of kernels and of measuring (`code.py`), threads and the model's
config: what was measured for anything else is another file, and no edit elsewhere has it measured again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec
import torch

from membership.base.kept_files import KeptFiles

FOLDER = "calibrations"
CPU_LINES = ("vendor_id", "model name", "stepping", "microcode", "flags", "CPU implementer", "CPU part", "Features")
SETTINGS = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_")  # of the environment: which kernels the libraries choose
Known = dict[str, tuple[int, ...]]


@cache
def cpu() -> str:
    """The kind of this machine's first processor, with its features."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        return "\n".join(line for line in first.splitlines() if line.split("\t")[0].strip() in CPU_LINES)
    return ""


def libraries() -> str:
    """What computes: the libraries that torch was built with, and how the environment has them choose their kernels."""
    set_here = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(SETTINGS))
    return "\n".join((torch.__config__.show(), *set_here))


class KeptCalibrations:
    """What is known for `key`."""

    def __init__(self, key: str, directory: Path | None = None) -> None:
        self._key = f"{cpu()}\n{libraries()}\n{key}".encode()
        self._files = KeptFiles(FOLDER, directory)

    def load(self) -> Known:
        """What was measured before; empty if that is unknown or not to be trusted."""
        found = self._files.load(self._key)
        return {} if found is None else msgspec.json.decode(found, type=Known)

    def save(self, known: Mapping[str, tuple[int, ...]]) -> None:
        """Keep this too."""
        self._files.save(self._key, msgspec.json.encode({**self.load(), **known}))

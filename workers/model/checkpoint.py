"""The weight files of a checkpoint: opened once, read by slices."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from workers.model.families import ModelInfo, weight_files


class Checkpoint:
    """Reads tensors by name. Safe to use from several threads."""

    def __init__(self, info: ModelInfo) -> None:
        self._root = Path(info.path)
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self.bytes_read = 0

    @cached_property
    def _file_of(self) -> dict[str, str]:
        return weight_files(self._root)

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return sorted(self._file_of)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A private copy of a tensor, or of entry `index` along its first axis."""
        file = self._file_of[name]
        with self._lock:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(str(self._root / file), framework="pt"))
            handle = self._open[file]
            tensor: Tensor = handle.get_tensor(name) if index is None else handle.get_slice(name)[index]
            self.bytes_read += tensor.nbytes
        return tensor.clone()

    def close(self) -> None:
        """Unmap the files."""
        with self._lock:
            self._open.clear()
            self._stack.close()

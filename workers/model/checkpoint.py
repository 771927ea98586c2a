"""The weight files of a checkpoint: opened once, read by slices.

All files are opened at once, as long as they are what their stamps say: files that are replaced later are read from all
the same, as they were. One that is overwritten in place is noticed before and after each read (by size and time of
change). What is not noticed: an overwritten file whose time was set back; and a file that is cut short while a tensor
is copied from it ends the rank by SIGBUS. Neither serves wrong rows: weights are compared by content afterwards.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from workers.model.content import FileStamp, Stamps, changed
from workers.model.families import INDEX_FILE, SINGLE_FILE, weight_files
from workers.protocol.load_progress import LoadProgress


class Checkpoint:
    """Reads tensors by name, of files in the state that `stamps` describe. Safe to use from several threads."""

    def __init__(self, root: str | Path, stamps: Stamps, progress: LoadProgress | None = None) -> None:
        self._progress = progress or LoadProgress()
        self._root, self._stamps = Path(root), stamps
        self._fds: dict[str, int] = {}
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self.bytes_read = 0
        for file in stamps:
            if file.endswith(".safetensors"):
                self._keep(file)

    def _keep(self, file: str) -> None:
        with suppress(OSError):  # it is gone: reading from it reports that
            self._fds[file] = fd = os.open(self._root / file, os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, fd)

    @cached_property
    def _file_of(self) -> dict[str, str]:
        if INDEX_FILE not in self._stamps:
            with self._lock:
                return dict.fromkeys(self._handle(SINGLE_FILE).keys(), SINGLE_FILE)
        found = weight_files(self._root)
        with suppress(OSError):
            if FileStamp.of((self._root / INDEX_FILE).stat()) == self._stamps[INDEX_FILE]:
                return found
        raise changed(self._root, [INDEX_FILE])

    @property
    def names(self) -> list[str]:
        """All tensors."""
        return sorted(self._file_of)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A private copy of a tensor, or of entry `index` along its first axis. ModelError: its file has changed."""
        file = self._file_of[name]
        with self._lock:
            handle = self._handle(file)
            tensor: Tensor = handle.get_tensor(name) if index is None else handle.get_slice(name)[index]
            self.bytes_read += tensor.nbytes
            copy = tensor.clone()
        self._progress.mark()
        self._require(file)
        return copy

    def _handle(self, file: str) -> Any:
        self._require(file)
        if file not in self._open:
            path = f"/proc/self/fd/{self._fds[file]}"  # this very file, whatever has its name now
            self._open[file] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[file]

    def _require(self, file: str) -> None:
        fd = self._fds.get(file)
        if fd is None or FileStamp.of(os.fstat(fd)) != self._stamps[file]:
            raise changed(self._root, [file])

    def close(self) -> None:
        """Unmap and close the files."""
        with self._lock:
            self._open.clear()
            self._fds.clear()
            self._stack.close()

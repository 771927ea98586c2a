"""A damaged checkpoint: one that was cut short, or one with a bit flipped in a tensor. Only ever a copy of a model.

A model that has no file `chaos-copy` in its directory is not touched: `copy_model` makes one that has it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import time
from abc import ABC, abstractmethod
from pathlib import Path

import msgspec

from chaos.faults.base import Injected, NotInjected, Site
from chaos.faults.fault import Fault, Params

MARK = "chaos-copy"


def copy_model(model: Path, to: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(model, to)
    (to / MARK).touch()
    return to


class Damage(ABC):
    """Base: one safetensors file of a copy is changed, and restored from what was kept of it."""

    name = ""

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        self.victim, self.folder = victim, Path(str(params["folder"]))
        self._kept: tuple[Path, bytes, tuple[int, int]] | None = None

    def inject(self) -> Injected:
        """Damage it, and read back that it is damaged."""
        if not (self.folder / MARK).exists():
            raise NotInjected(f"{self.folder} is not a copy made to be damaged", hint="use checkpoint.copy_model")
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise NotInjected(f"there is no safetensors file in {self.folder}")
        path, at = files[0], time.time()
        before = path.stat()
        whole = path.read_bytes()
        self._kept = path, whole, (before.st_atime_ns, before.st_mtime_ns)
        try:
            proof = self._damage(path, whole)
        except BaseException:
            self.heal()
            raise
        return Injected(fault=self.name, victim=self.victim, at=at, seen_at=time.time(), proof=f"{path.name}: {proof}")

    def heal(self) -> None:
        """As it was, its time of change too; NotInjected if it does not read back so."""
        if self._kept is None:
            return
        path, whole, times = self._kept
        _replace(path, whole)
        os.utime(path, ns=times)
        if path.read_bytes() != whole:
            raise NotInjected(f"{path} was not restored")
        self._kept = None

    @abstractmethod
    def _damage(self, path: Path, whole: bytes) -> str:
        """Deal it; the proof that it happened, in words."""


class Truncated(Damage):
    """The last tenth of the file is missing, as after a copy that broke off."""

    name = "checkpoint-truncated"

    def _damage(self, path: Path, whole: bytes) -> str:
        _replace(path, whole[: len(whole) * 9 // 10])
        wanted, found = _data_start(whole) + _data_size(whole), path.stat().st_size
        if found >= wanted:
            raise NotInjected(f"{path} still has {found} of {wanted} bytes")
        return f"{found} bytes, its header promises {wanted}"


class WrongHash(Damage):
    """One bit of one tensor is flipped: size, names and shapes are as before."""

    name = "checkpoint-wrong-hash"

    def _damage(self, path: Path, whole: bytes) -> str:
        at = _data_start(whole) + _data_size(whole) // 2
        changed = bytearray(whole)
        changed[at] ^= 0x40
        _replace(path, bytes(changed))
        found = path.read_bytes()
        before, after = (hashlib.sha256(each).hexdigest() for each in (whole, found))
        if before == after or len(found) != len(whole):
            raise NotInjected(f"{path} reads back as it was")
        return f"sha256 {after[:12]} instead of {before[:12]}, of the same size"


def _replace(path: Path, data: bytes) -> None:
    """A new file in place of the old: who has mapped the old one keeps it whole."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(data)
    draft.replace(path)


def _data_start(whole: bytes) -> int:
    return 8 + int(struct.unpack_from("<Q", whole)[0])


def _data_size(whole: bytes) -> int:
    header = msgspec.json.decode(whole[8 : _data_start(whole)], type=dict[str, dict[str, object]])
    ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]  # type: ignore[index]
    return max(int(end) for end in ends)


FAULTS = {
    "checkpoint-truncated": Fault(
        about="the last tenth of a checkpoint file is missing", victims=("checkpoint",), heals=True, make=Truncated,
        params={"folder": ""},
    ),
    "checkpoint-wrong-hash": Fault(
        about="one bit of a tensor in a checkpoint is flipped", victims=("checkpoint",), heals=True, make=WrongHash,
        params={"folder": ""},
    ),
}  # fmt: skip

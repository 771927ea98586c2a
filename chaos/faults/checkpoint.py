"""A damaged checkpoint: one that was cut short, or one with a flipped bit in a tensor. Only copies are damaged.

A model without a file `chaos-copy` in its directory is not touched: `copy_model` makes a copy that has it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from abc import abstractmethod
from pathlib import Path

import msgspec

from chaos.faults.base import Faults, NotInjected, Params, Site, SiteInjector

MARK = "chaos-copy"

FAULTS = Faults()


def copy_model(model: Path, to: Path) -> Path:
    """A copy that may be damaged."""
    shutil.copytree(model, to)
    (to / MARK).touch()
    return to


class Damage(SiteInjector):
    """Changes the first safetensors file of a copy; healing restores it with its times."""

    _path, _whole, _times = Path(), b"", (0, 0)  # the file, its bytes, and its access and change times in ns

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        super().__init__(site, victim, params)
        self.folder = Path(str(params["folder"]))

    def _prepare(self) -> None:
        if not (self.folder / MARK).exists():
            raise NotInjected(f"{self.folder} is not a copy made to be damaged", hint="use checkpoint.copy_model")
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise NotInjected(f"there is no safetensors file in {self.folder}")
        self._path = files[0]
        before = self._path.stat()
        self._whole, self._times = self._path.read_bytes(), (before.st_atime_ns, before.st_mtime_ns)

    def _inject(self) -> str:
        return f"{self._path.name}: {self._damage(self._path, self._whole)}"

    def _heal(self) -> None:
        _replace(self._path, self._whole)
        os.utime(self._path, ns=self._times)
        if self._path.read_bytes() != self._whole:
            raise NotInjected(f"{self._path} was not restored")

    @abstractmethod
    def _damage(self, path: Path, whole: bytes) -> str:
        """Damage the file and read back that it is damaged; returns the proof."""


@FAULTS.entry(
    "checkpoint-truncated", "the last tenth of a checkpoint file is missing", victims=("checkpoint",), heals=True,
    params={"folder": ""},
)  # fmt: skip
class Truncated(Damage):
    """The last tenth of the file is missing, as after an interrupted copy."""

    def _damage(self, path: Path, whole: bytes) -> str:
        _replace(path, whole[: len(whole) * 9 // 10])
        wanted, found = _data_start(whole) + _data_size(whole), path.stat().st_size
        if found >= wanted:
            raise NotInjected(f"{path} still has {found} of {wanted} bytes")
        return f"{found} bytes, its header promises {wanted}"


@FAULTS.entry(
    "checkpoint-wrong-hash", "one bit of a tensor in a checkpoint is flipped", victims=("checkpoint",), heals=True,
    params={"folder": ""},
)  # fmt: skip
class WrongHash(Damage):
    """One bit of one tensor is flipped; size, names and shapes stay."""

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
    """Put a new file in place of the old one; processes that have mapped the old one keep it."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(data)
    draft.replace(path)


def _data_start(whole: bytes) -> int:
    return 8 + int(struct.unpack_from("<Q", whole)[0])


def _data_size(whole: bytes) -> int:
    header = msgspec.json.decode(whole[8 : _data_start(whole)], type=dict[str, dict[str, object]])
    ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]  # type: ignore[index]
    return max(int(end) for end in ends)

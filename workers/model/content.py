"""The identity of a checkpoint's files, by content and, to notice a change at once, by size and time. Light.

By content: the small files as a whole (here), weights when they are loaded (`weight_digests.py`), so that no file is
read twice. A stamp only says whether a file may have changed. Two hosts with copies of one checkpoint have other
stamps and the same content.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from membership.base.errors import ModelError
from membership.planning.identity import HINT
from workers.model.families import INDEX_FILE
from workers.protocol.weight_peers import small_file_digest

CONFIG_FILE = "config.json"
SMALL_FILES = (  # all that a gateway reads, and what decides when an answer ends
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)


class FileStamp(NamedTuple):
    """Tells two states of a file apart. Its inode is left out, which some network file systems make up anew, and its
    change time, which moves when a link to it goes, too.
    """

    size: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileStamp:
        """The stamp of a file as it is now."""
        return cls(found.st_size, found.st_mtime_ns)


Stamps = dict[str, FileStamp]
"""By the file's name in the checkpoint's directory."""


def stamp_files(path: str | Path) -> Stamps:
    """Stamps of everything that a rank reads."""
    root = Path(path).resolve()
    found = [*root.glob("*.safetensors"), root / CONFIG_FILE, root / INDEX_FILE]
    return {file.name: FileStamp.of(file.stat()) for file in sorted(found) if file.is_file()}


def changed_files(before: Stamps, now: Stamps) -> list[str]:
    """Names of files that may be others than before, are new, or are gone."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def name_of(stamps: Stamps) -> str:
    """A name for files in this very state, within one host."""
    return hashlib.sha256(repr(sorted(stamps.items())).encode()).hexdigest()[:24]


def file_digest(path: Path) -> str:
    """By content. ModelError if it cannot be read."""
    try:
        return small_file_digest(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def small_files(path: str | Path) -> dict[str, str]:
    """Digest of each small file that decides a token, as far as they are there."""
    root = Path(path)
    found = sorted(file for pattern in SMALL_FILES for file in root.glob(pattern) if file.is_file())
    return {str(file.relative_to(root)): file_digest(file) for file in found}


def changed(path: str | Path, names: list[str]) -> ModelError:
    """The error of who needs a file that is no longer what the cluster has loaded."""
    return ModelError(f"{', '.join(names)} in {path} changed since the cluster loaded the model", hint=HINT)

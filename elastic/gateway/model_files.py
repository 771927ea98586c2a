"""The tokenizer and chat template that a gateway works with: those that the cluster serves, by content.

A gateway keeps a copy of them in its state directory, so that it can start again after the checkpoint's own files were
replaced. One that has only other files does not start: two gateways would read the same prompt differently.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import structlog

from elastic.serve.state_dir import MODEL_FILES
from membership.store.records import ClusterConfig
from workers.model.content import changed, small_files

log = structlog.get_logger(__name__)


def kept_files(config: ClusterConfig, state_dir: Path) -> Path:
    """A directory with the files that the cluster's config names; ModelError names those that are other ones by now."""
    wanted, own, copy = dict(config.files), Path(config.model), state_dir / MODEL_FILES
    if not wanted:
        return own
    if small_files(copy) == wanted:
        return copy
    try:
        _copy(wanted, own, copy)
    except OSError as error:  # no room, or read-only: it starts all the same
        log.warning("model_files_not_kept", error=str(error))
        _require(wanted, own, own)
        return own
    return copy


def _copy(wanted: dict[str, str], own: Path, copy: Path) -> None:
    """Atomically, for other gateways may do the same."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".model-files-", dir=copy.parent) as made:
        draft = Path(made) / "new"
        draft.mkdir()
        for name in wanted:
            if (own / name).is_file():
                (draft / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(own / name, draft / name)
        _require(wanted, draft, own)
        if copy.exists():
            copy.rename(Path(made) / "old")  # of another model
        draft.rename(copy)


def _require(wanted: dict[str, str], directory: Path, own: Path) -> None:
    found = small_files(directory)
    if differing := sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name)):
        raise changed(own, differing)

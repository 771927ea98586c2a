"""A copy of the four packages with one bug in it, made of links: it costs milliseconds and no disk.

The bug is an exact replacement of text that must be there exactly once: who moves or rewrites a guard hears of it here,
instead of believing for good that it is still proven.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.mutants.bug import Bug
from membership.base.errors import ConfigError

PACKAGES = ("membership", "workers", "elastic", "chaos")
ROOT = Path(__file__).parents[2]


def buggy(bug: Bug, root: Path = ROOT) -> str:
    """The source of the bug's file with the bug in it. ConfigError names the bug if its guard is not there once."""
    text = (root / bug.file).read_text()
    found = text.count(bug.before)
    if found != 1:
        raise ConfigError(
            f"planted bug {bug.name!r}: its guard stands {found} times in {bug.file}, not once",
            hint="the guard has moved: bring `before` and `after` in chaos/mutants/bugs.py up to date",
        )
    return text.replace(bug.before, bug.after)


@contextmanager
def planted(bug: Bug | None, root: Path = ROOT) -> Iterator[Path]:
    """A tree to put first on PYTHONPATH, with this bug in it; None: as it is."""
    source = buggy(bug, root) if bug is not None else ""
    with tempfile.TemporaryDirectory(prefix="elastic-ep-planted-") as folder:
        tree = Path(folder)
        for package in PACKAGES:
            _link(root / package, tree / package)
        if bug is not None:
            file = tree / bug.file
            file.unlink()
            for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
                compiled.unlink()
            file.write_text(source)
        yield tree


def _link(source: Path, target: Path) -> None:
    """A folder of links to the files of another one, what Python compiled included: it need not do so again."""
    target.mkdir()
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _link(Path(entry.path), target / entry.name)
            else:
                (target / entry.name).symlink_to(entry.path)

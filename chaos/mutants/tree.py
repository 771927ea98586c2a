"""A copy of the repository's packages and tests with one mutant in it. It is made of links: milliseconds, no disk.

A mutant is an exact replacement of text that its file must contain exactly once. Moving or rewriting a guard fails here
first, instead of being believed to be still covered.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.mutants.mutant import Mutant
from membership.base.errors import ConfigError

PACKAGES = ("membership", "workers", "elastic", "chaos")
TESTS = "tests"
PYTEST_CONFIG = "pyproject.toml"
ROOT = Path(__file__).parents[2]


def mutated_source(mutant: Mutant, root: Path = ROOT) -> str:
    """The source of the mutant's file. ConfigError names the mutant if its guard is not there exactly once."""
    text = (root / mutant.file).read_text(encoding="utf-8")
    found = text.count(mutant.before)
    if found != 1:
        raise ConfigError(
            f"mutant {mutant.name!r}: its guard stands {found} times in {mutant.file}, not once",
            hint="the guard has moved: bring `before` and `after` in chaos/mutants/ up to date",
        )
    return text.replace(mutant.before, mutant.after)


def require_tests(root: Path = ROOT) -> None:
    """ConfigError where the tests are missing that mutants name, as in an installed wheel."""
    if not (root / TESTS / "conftest.py").is_file():
        raise ConfigError(
            f"there are no tests in {root / TESTS}, and mutants are caught by tests",
            hint="run this command in a checkout of the repository: the wheel contains no tests",
        )


@contextmanager
def planted(mutant: Mutant | None, root: Path = ROOT) -> Iterator[Path]:
    """A tree to put first on PYTHONPATH, with this mutant in it; None: the product as it is."""
    source = mutated_source(mutant, root) if mutant is not None else ""
    with tempfile.TemporaryDirectory(prefix="elastic-ep-mutant-") as folder:
        tree = Path(folder)
        for package in (*PACKAGES, TESTS):
            if (root / package).is_dir():
                _link(root / package, tree / package)
        if (root / PYTEST_CONFIG).is_file():
            (tree / PYTEST_CONFIG).symlink_to(root / PYTEST_CONFIG)
        if mutant is not None:
            file = tree / mutant.file
            file.unlink()
            for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*"):
                compiled.unlink()
            file.write_text(source, encoding="utf-8")
        yield tree


def _link(source: Path, target: Path) -> None:
    """Link all files of a folder, compiled ones included: Python need not compile them again."""
    target.mkdir()
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _link(Path(entry.path), target / entry.name)
            else:
                (target / entry.name).symlink_to(entry.path)

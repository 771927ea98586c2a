"""The tree's own Python files, parsed once: what the tidy tests look at."""

from __future__ import annotations

import ast
import gc
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property

from tests.support import ROOT

PRODUCT = ("membership", "workers", "elastic", "chaos")
EVERYTHING = (*PRODUCT, "tests", "benchmarks", "docs")


@dataclass(frozen=True)
class Source:
    """One file: its path from the root of the tree, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """Its dotted name; a package's is that of its folder."""
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@cache
def tracked() -> tuple[str, ...]:
    """The files that git knows, and new ones it does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    return tuple(sorted(name for name in set(listed.splitlines()) if (ROOT / name).is_file()))


@cache
def _parsed() -> tuple[Source, ...]:
    """Without the collector, which would look at all trees so far again and again, and later at all of them."""
    gc.disable()
    found = tuple(Source(path, (ROOT / path).read_text()) for path in tracked() if path.endswith(".py"))
    for source in found:
        _ = source.tree
    gc.enable()
    gc.freeze()
    return found


def sources(*folders: str) -> Iterator[Source]:
    """The Python files below these folders."""
    yield from (source for source in _parsed() if source.path.split("/")[0] in folders)

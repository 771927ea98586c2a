"""The tree keeps its rules: rooms, import contracts, no unused file, no undeclared dependency."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

from tests.support import ROOT
from tests.support.sources import EVERYTHING, PRODUCT, Source, sources, tracked

pytestmark = pytest.mark.unit

MAX_LOOSE_FILES = 14  # of the product, in no room
TIERS = ("tests/unit/", "tests/contract/", "tests/integration/")
# Files that nothing in the product names, and what they are for. An entry that is no longer needed fails the test.
NAMED_BY_NOTHING = {
    "chaos/faults/clockwork/sitecustomize.py": "the interpreter imports it, where the clock fault puts it on the path",
    "chaos/__main__.py": "python -m chaos",
    "elastic/__main__.py": "python -m elastic",
    "elastic/cli/__main__.py": "python -m elastic.cli",
    "workers/worker_proc.py": "both halves of WorkerProc under one name, for whom that name is known from vLLM",
    "workers/agent/cross_host.py": "ranks of several hosts under one parent: tested, not yet wired into the agent",
}
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tool(name: str, *arguments: str) -> str:
    """Run a program that stands beside this interpreter; what it said if it failed, else ""."""
    command = [str(Path(sys.executable).with_name(name)), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_import_contracts() -> None:
    assert tool("lint-imports", "pyproject.toml") == ""


def test_dependencies_are_those_that_are_declared() -> None:
    assert tool("deptry", ".") == ""


def test_files_are_in_rooms() -> None:
    loose = [s.path for s in sources("membership", "workers", "elastic") if s.path.count("/") == 1]
    assert len(loose) <= MAX_LOOSE_FILES, loose


def test_rooms_say_what_is_in_them() -> None:
    """The first line, then what a room of the product may import and where to start reading."""
    texts = {s.path: ast.get_docstring(s.tree) or "" for s in sources(*PRODUCT) if s.path.endswith("__init__.py")}
    silent = [path for path, text in texts.items() if not text]
    assert not silent, silent
    rooms = [p for p in texts if p.count("/") == 2 and not p.startswith("chaos")]
    mute = [path for path in rooms if not re.search(r"Imports .*Start with", texts[path], re.DOTALL)]
    assert not mute, mute


def test_tests_mirror_the_rooms() -> None:
    """tests/<tier>/<package>/<room>/: each such folder is a room of that name."""
    folders = {
        PurePosixPath(path).parent for path in tracked() if re.match(r"tests/(unit|contract|integration)/", path)
    }
    rooms = ["/".join(folder.parts[2:]) for folder in folders if folder.parts[2:3] and folder.parts[2] in PRODUCT]
    homeless = [room for room in rooms if not (ROOT / room).is_dir()]
    assert not homeless, homeless


def test_each_test_has_the_marker_of_its_tier() -> None:
    wrong = [
        source.path
        for source in sources("tests")
        if PurePosixPath(source.path).name.startswith("test_")
        and not re.search(rf"pytest\.mark\.{source.path.split('/')[1]}\b", source.text)
    ]
    assert not wrong, wrong


def test_no_file_is_dead() -> None:
    """Each is imported by another one, named in a string (`python -m`, a worker class), or listed with its reason.

    What only tests or benchmarks use is no part of the product.
    """
    dead = {source.path for source in sources(*EVERYTHING) if not _used(source)}
    assert dead - NAMED_BY_NOTHING.keys() == set()
    assert NAMED_BY_NOTHING.keys() - dead == set(), "stale entries"


def _used(source: Source) -> bool:
    name = PurePosixPath(source.path).name
    if name in ("__init__.py", "conftest.py") or name.startswith("test_") or source.path.startswith("benchmarks/"):
        return True
    users = _users().get(source.module, set()) - {source.path}
    return any(not path.startswith(("tests/", "benchmarks/")) or source.path.startswith("tests/") for path in users)


@cache
def _users() -> dict[str, set[str]]:
    """Dotted name -> the files that import it or have it in a string; entry points and make targets count too."""
    named = {source.path: _names_in(source.tree) for source in sources(*EVERYTHING)}
    named |= {file: _dotted((ROOT / file).read_text()) for file in ("pyproject.toml", "Makefile")}
    users: dict[str, set[str]] = {}
    for path, names in named.items():
        for name in names:
            users.setdefault(name, set()).add(path)
    return users


def _names_in(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= _dotted(node.value)
    return found


def _dotted(text: str) -> set[str]:
    return set(re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)+", text))


def test_allow_lists_of_the_tools_are_not_stale() -> None:
    """Files and modules that pyproject.toml excepts from a rule exist."""
    files = SETTINGS["tool"]["ruff"]["lint"]["per-file-ignores"]
    assert [pattern for pattern in files if not any(ROOT.glob(pattern.removesuffix("/**")))] == []
    modules = {source.module for source in sources(*PRODUCT)}
    excepted = [
        side.strip().removesuffix(".*")
        for contract in SETTINGS["tool"]["importlinter"]["contracts"]
        for entry in contract.get("ignore_imports", ())
        for side in entry.split("->")
    ]
    assert [name for name in excepted if name not in modules] == []

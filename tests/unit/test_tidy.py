"""The house rules that a linter does not know: file and function length, waits without a deadline, pickle, print."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.unit

PRODUCT = ("membership", "workers", "elastic", "chaos")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
UNTIMED = ("join", "get", "recv", "wait", "result", "acquire")
PICKLE_ALLOWED = {
    "workers/queue/message_queue.py",
    "workers/queue/codec.py",
    "workers/rank/worker_proc.py",
    "workers/rank/call_port.py",
    "workers/agent/executor.py",
}


def sources(*folders: str) -> Iterator[tuple[str, str, ast.Module]]:
    for folder in folders:
        yield from parsed(folder)


@cache
def parsed(folder: str) -> tuple[tuple[str, str, ast.Module], ...]:
    texts = {path: path.read_text() for path in sorted((ROOT / folder).rglob("*.py"))}
    return tuple((str(path.relative_to(ROOT)), text, ast.parse(text)) for path, text in texts.items())


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, str]]:
    """Each call with the object and the attribute it is made on ("" for a plain name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node, ast.unparse(node.func.value), node.func.attr
            elif isinstance(node.func, ast.Name):
                yield node, "", node.func.id


def test_files_are_short() -> None:
    long = [name for name, text, _ in sources(*PRODUCT, "tests", "benchmarks") if text.count("\n") > MAX_FILE_LINES]
    assert not long, long


def test_functions_are_short() -> None:
    long = [
        f"{name}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, _, tree in sources(*PRODUCT, "tests", "benchmarks")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long, long


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        name for name, _, tree in sources(*PRODUCT, "tests", "benchmarks") if tree.body and not ast.get_docstring(tree)
    ]
    assert not silent, silent


def test_no_swallowed_exceptions() -> None:
    swallowed = [
        f"{name}:{node.lineno}"
        for name, _, tree in sources(*PRODUCT)
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler)
        and len(node.body) == 1
        and isinstance(node.body[0], ast.Pass)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    assert not swallowed, swallowed


def test_no_wait_without_a_deadline() -> None:
    untimed = [
        f"{name}:{call.lineno} {obj}.{attribute}()"
        for name, _, tree in sources(*PRODUCT)
        for call, obj, attribute in calls(tree)
        if obj and attribute in UNTIMED and not call.args and not call.keywords and not obj.endswith(("lock", "path"))
    ]
    assert not untimed, untimed


def test_no_print_and_no_assert_in_the_product() -> None:
    found = []
    for name, _, tree in sources(*PRODUCT):
        found += [f"{name}:{call.lineno} print" for call, obj, called in calls(tree) if not obj and called == "print"]
        found += [f"{name}:{node.lineno} assert" for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    assert not found, found


def test_pickle_stays_on_local_queues() -> None:
    found = [
        f"{name}:{call.lineno} {obj}.loads"
        for name, _, tree in sources(*PRODUCT)
        for call, obj, attribute in calls(tree)
        if attribute in ("loads", "load", "Unpickler")
        and obj in ("pickle", "cloudpickle")
        and name not in PICKLE_ALLOWED
    ]
    assert not found, found


def test_import_law() -> None:
    outcome = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--config", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert outcome.returncode == 0, outcome.stdout

"""The house rules that a linter does not know: length of files, waits without a deadline, pickle, print."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.sources import EVERYTHING, PRODUCT, sources

pytestmark = pytest.mark.unit

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
UNTIMED = ("join", "get", "recv", "wait", "result", "acquire")
ASKING = ("get", "post", "put", "delete", "request", "stream", "Client", "AsyncClient")
PROXIED_MODULES = ("urllib.request", "requests", "aiohttp")
PICKLE_ALLOWED = {"workers/queue/codec.py", "workers/rank/worker_proc.py", "workers/rank/call_port.py"}


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str, str]]:
    """Each call with the object and the attribute it is made on ("" for a plain name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node, ast.unparse(node.func.value), node.func.attr
            elif isinstance(node.func, ast.Name):
                yield node, "", node.func.id


def awaited(tree: ast.AST) -> set[ast.expr]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Await)}


def test_files_are_short() -> None:
    long = [source.path for source in sources(*EVERYTHING) if source.text.count("\n") > MAX_FILE_LINES]
    assert not long, long


def test_functions_are_short() -> None:
    long = [
        f"{source.path}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for source in sources(*EVERYTHING)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long, long


def test_signatures_are_formatted() -> None:
    """A signature is laid out by the formatter. Tables of data may be laid out by hand (`# fmt: skip` behind them)."""
    by_hand = [
        f"{source.path}:{node.lineno} {node.name}"
        for source in sources(*EVERYTHING)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and any("fmt: skip" in line for line in source.text.splitlines()[node.lineno - 1 : node.body[0].lineno - 1])
    ]
    assert not by_hand, by_hand


def test_every_module_says_what_it_is_for() -> None:
    silent = [s.path for s in sources(*EVERYTHING) if s.tree.body and not ast.get_docstring(s.tree)]
    assert not silent, silent


def test_no_swallowed_exceptions() -> None:
    swallowed = [
        f"{source.path}:{node.lineno}"
        for source in sources(*PRODUCT)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ExceptHandler)
        and len(node.body) == 1
        and isinstance(node.body[0], ast.Pass)
        and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException"))
    ]
    assert not swallowed, swallowed


def test_no_wait_without_a_deadline() -> None:
    """Of a thread, that is: a coroutine that waits (`await`) is cancelled by its owner."""
    untimed = [
        f"{source.path}:{call.lineno} {obj}.{attribute}()"
        for source in sources(*PRODUCT)
        for call, obj, attribute in calls(source.tree)
        if obj
        and attribute in UNTIMED
        and not call.args
        and not call.keywords
        and not obj.endswith(("lock", "path"))
        and call not in awaited(source.tree)
    ]
    assert not untimed, untimed


def test_no_print_and_no_assert_in_the_product() -> None:
    found = []
    for source in sources(*PRODUCT):
        at = source.path
        found += [f"{at}:{call.lineno} print" for call, obj, name in calls(source.tree) if (obj, name) == ("", "print")]
        found += [f"{at}:{node.lineno} assert" for node in ast.walk(source.tree) if isinstance(node, ast.Assert)]
    assert not found, found


def test_pickle_stays_on_local_queues() -> None:
    """Exactly the files that are allowed to unpickle do: nothing is unpickled that came over a network."""
    found = {
        source.path
        for source in sources(*PRODUCT)
        for _, obj, attribute in calls(source.tree)
        if attribute in ("loads", "load", "Unpickler") and obj in ("pickle", "cloudpickle")
    }
    assert found == PICKLE_ALLOWED


def test_text_files_are_utf_8_in_every_locale() -> None:
    """Whoever opens text says so: without it, the locale decides how a checkpoint's or a program's words are read."""
    found = [
        f"{source.path}:{call.lineno} {ast.unparse(call)}"
        for source in sources(*PRODUCT, "benchmarks", "docs")
        for call, obj, name in calls(source.tree)
        if is_text(call, obj, name) and "encoding" not in {keyword.arg for keyword in call.keywords}
    ]
    assert not found, found


def is_text(call: ast.Call, obj: str, name: str) -> bool:
    """Whether text goes through it: a file that is not opened as binary, a process whose words are not bytes."""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    modes = [given["mode"]] if "mode" in given else call.args[obj == "" :][:1]
    mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else None if modes else "r"
    if name == "open":
        return obj != "os" and isinstance(mode, str) and "b" not in mode
    return name in ("read_text", "write_text") or "text" in given or "universal_newlines" in given


def test_http_clients_of_our_own_addresses_ask_no_proxy() -> None:
    """HTTP_PROXY in the environment of `elastic serve` must not keep it from its own gateway."""
    proxied = [
        f"{source.path}:{call.lineno} httpx.{name}"
        for source in sources(*PRODUCT, "benchmarks")
        for call, obj, name in calls(source.tree)
        if obj == "httpx" and name in ASKING and "trust_env=False" not in map(ast.unparse, call.keywords)
    ]
    others = [
        f"{source.path} {module}"
        for source in sources(*PRODUCT, "benchmarks")
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in (node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name,)
        if module in PROXIED_MODULES
    ]
    assert not proxied + others

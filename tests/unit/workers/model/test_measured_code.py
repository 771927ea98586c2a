"""What keeps a measurement: the code that decides its result, all of it, and no more."""

from __future__ import annotations

import ast
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import workers
from workers.model.code import FOLDERS, measured_files

pytestmark = pytest.mark.unit
ROOT = Path(workers.__file__).parent
# What measured files import of ours without any bit depending on it: types, errors, where it is kept, device memory.
NOT_MEASURED = {
    "workers.exchange.cuda.calls",
    "workers.exchange.cuda.driver",
    "workers.exchange.cuda.window",
    "workers.ipc.shared_memory",
    "workers.model.backend",
    "workers.model.calibrations",
    "workers.model.expert_source",
    "workers.protocol.messages",
}


def _module_of(file: Path) -> str:
    return ".".join(("workers", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def _imports(file: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if (ROOT.parent / name.replace(".", "/")).with_suffix(".py").is_file()}
            found |= modules or {node.module}
    return found


@pytest.mark.parametrize("device", FOLDERS)
def test_no_measured_file_computes_with_one_that_is_not(device: str) -> None:
    files = measured_files(device)
    measured = {_module_of(file) for file in files}
    used = {name for file in files for name in _imports(file) if name.startswith("workers.")}
    assert used <= measured | NOT_MEASURED
    assert {"workers.model.cpu.linear", "workers.model.row_tiles", "workers.model.packing"} <= measured


Edited = Callable[[str], ModuleType]


@pytest.fixture
def edited(tmp_path: Path) -> Edited:
    """The module over a copy of the code in which one file has another line."""

    def made(name: str) -> ModuleType:
        copy = tmp_path / name.replace("/", "_") / "workers"
        for room in ("model", "exchange"):
            shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
        with (copy / name).open("a", encoding="utf-8") as file:
            file.write("# one more line\n")
        spec = importlib.util.spec_from_file_location("code_of_the_copy", copy / "model" / "code.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return made


@pytest.mark.parametrize(
    ("file", "cpu", "cuda"),
    [
        ("model/sampler.py", False, False),
        ("model/runner.py", False, False),
        ("exchange/loop.py", False, False),
        ("exchange/cuda/kernels.cu", False, False),
        ("model/row_tiles.py", True, True),
        ("model/cpu/linear.py", True, True),
        ("model/cpu/attention.py", True, True),
        ("model/cuda/kernels.py", False, True),
    ],
)
def test_only_an_edit_of_kernels_or_of_the_measuring_is_another_code(
    edited: Edited, file: str, cpu: bool, cuda: bool
) -> None:
    plain, other = edited("model/load.py"), edited(file)
    assert plain.code_version() != other.code_version()
    assert (plain.measured_code("cpu") != other.measured_code("cpu")) == cpu
    assert (plain.measured_code("cuda") != other.measured_code("cuda")) == cuda

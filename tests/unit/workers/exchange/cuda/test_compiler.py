"""Kernels are compiled once per all that they depend on; the compiler itself is in `test_kernels.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from membership.base.errors import ConfigError
from membership.base.kept_files import KeptFiles
from workers.exchange.cuda.compiler import FOLDER, compiled
from workers.exchange.cuda.window import WindowShape

pytestmark = pytest.mark.unit

SHAPE = WindowShape(ranks=2, held=4, rows=16, hidden=512, top_k=4)


class CountingCompiler:
    """Satisfies `Compiler`: each of its cubins is another."""

    def __init__(self, version: str = "13.0") -> None:
        self._version = version
        self.asked: list[Sequence[str]] = []

    def version(self) -> str:
        return self._version

    def compile(self, source: bytes, flags: Sequence[str]) -> bytes:
        assert b"dispatch" in source
        self.asked.append(flags)
        if "-arch=sm_0" in flags:
            raise ConfigError("no such GPU")
        return f"{self._version} {len(self.asked)}".encode()


@pytest.fixture
def kept(tmp_path: Path) -> KeptFiles:
    return KeptFiles(FOLDER, tmp_path)


def test_the_next_start_compiles_nothing(tmp_path: Path, kept: KeptFiles) -> None:
    first, second = CountingCompiler(), CountingCompiler()
    assert compiled(SHAPE, "sm_90a", first, kept) == b"13.0 1"
    assert compiled(SHAPE, "sm_90a", second, KeptFiles(FOLDER, tmp_path)) == b"13.0 1"
    assert (len(first.asked), len(second.asked)) == (1, 0)


def test_what_the_cubin_depends_on_has_a_file_of_its_own(kept: KeptFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = CountingCompiler()
    compiled(SHAPE, "sm_90a", compiler, kept)
    assert compiled(SHAPE, "sm_100a", compiler, kept) == b"13.0 2"
    assert compiled(replace(SHAPE, rows=32), "sm_90a", compiler, kept) == b"13.0 3"
    assert compiled(SHAPE, "sm_90a", CountingCompiler("13.1"), kept) == b"13.1 1"
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"// changed")
    assert compiled(SHAPE, "sm_90a", compiler, kept) == b"13.0 4"


def test_a_damaged_file_is_compiled_again_and_replaced(tmp_path: Path, kept: KeptFiles) -> None:
    compiled(SHAPE, "sm_90a", CountingCompiler(), kept)
    (file,) = (tmp_path / FOLDER).iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"9")
    compiler = CountingCompiler("13.0")
    assert compiled(SHAPE, "sm_90a", compiler, kept) == b"13.0 1"
    assert compiled(SHAPE, "sm_90a", compiler, kept) == b"13.0 1"
    assert len(compiler.asked) == 1


def test_what_cannot_be_compiled_is_not_kept(tmp_path: Path, kept: KeptFiles) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError, match="no such GPU"):
            compiled(SHAPE, "sm_0", CountingCompiler(), kept)
    assert not list((tmp_path / FOLDER).iterdir())

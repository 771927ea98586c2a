"""The kernels for one shape of window and one kind of GPU, compiled at the first start: it takes 1-2 s and no toolkit.

Sizes are constants of the kernels, so that offsets and loops are known when they are compiled. What was compiled is on
disk for the next start, by all that it depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any, Protocol

import msgspec

from membership.base.errors import ConfigError
from membership.base.kept_files import KeptFiles
from workers.exchange.cuda.window import WindowShape

LAYOUT = ("kernels.cu", "window.py")  # files that decide what ranks find in one another's windows
NAMES = ("dispatch", "collect", "reply", "combine")
FOLDER = "kernels"
PACKAGES = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")


class Compiler(Protocol):
    """Source and flags -> a cubin."""

    def version(self) -> str:
        """Other versions may compile the same source otherwise."""

    def compile(self, source: bytes, flags: Sequence[str]) -> bytes:
        """ConfigError, with what the compiler said, if it cannot be had."""


class Nvrtc:
    """Satisfies `Compiler`."""

    def version(self) -> str:
        """That of the library, and of its package where it is from one: the library does not tell its patch level."""
        from cuda.bindings import nvrtc

        code, *numbers = nvrtc.nvrtcVersion()
        found = [_done([code, ".".join(map(str, numbers))])]
        for package in PACKAGES:
            with suppress(PackageNotFoundError):
                found.append(f"{package} {version(package)}")
        return ", ".join(found)

    def compile(self, source: bytes, flags: Sequence[str]) -> bytes:
        """See `Compiler`."""
        from cuda.bindings import nvrtc

        program = _done(nvrtc.nvrtcCreateProgram(source, b"kernels.cu", 0, [], []))
        try:
            given = [flag.encode() for flag in flags]
            (code,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
            if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                said = bytes(_done(nvrtc.nvrtcGetProgramLogSize(program)))
                _done(nvrtc.nvrtcGetProgramLog(program, said))
                raise ConfigError(f"kernels by {' '.join(flags)}: {said.decode(errors='replace').strip(chr(0))}")
            made = bytes(_done(nvrtc.nvrtcGetCUBINSize(program)))
            _done(nvrtc.nvrtcGetCUBIN(program, made))
            return made
        finally:
            _done(nvrtc.nvrtcDestroyProgram(program))


def compiled(
    shape: WindowShape, architecture: str, compiler: Compiler | None = None, kept: KeptFiles | None = None
) -> bytes:
    """A cubin for a GPU such as "sm_90a". ConfigError, with what the compiler said, if it cannot be had."""
    compiler, kept = compiler or Nvrtc(), kept or KeptFiles(FOLDER)
    source = files(__package__).joinpath("kernels.cu").read_bytes()
    flags = [f"-arch={architecture}", "-std=c++17", *(f"-D{k}={v}" for k, v in shape.definitions().items())]
    key = msgspec.json.encode([compiler.version(), flags]) + source
    found = kept.load(key)
    if found is None:
        found = compiler.compile(source, flags)
        kept.save(key, found)
    return found


def layout(shape: WindowShape) -> str:
    """What decides where things lie in windows of this shape: equal on all ranks that use one another's.

    By the files as they are now. Ranks that were started before an upgrade have older ones.
    """
    digest = hashlib.sha256()
    for name in LAYOUT:
        digest.update(files(__package__).joinpath(name).read_bytes())
    return f"{shape!r}, code {digest.hexdigest()[:16]}"


def _done(result: Sequence[Any]) -> Any:
    code, *values = result
    if int(code) != 0:
        raise ConfigError(f"the compiler of kernels: {code.name}")
    return values[0] if values else None

"""The kernels for one shape of window and one kind of GPU, compiled at start: it takes a second and needs no toolkit.

Sizes are constants of the kernels, so that offsets and loops are known when they are compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from membership.base.errors import ConfigError
from workers.exchange.cuda.window import WindowShape

NAMES = ("dispatch", "collect", "reply", "combine")


def compiled(shape: WindowShape, architecture: str) -> bytes:
    """A cubin for a GPU such as "sm_90a". ConfigError, with what the compiler said, if it cannot be had."""
    from cuda.bindings import nvrtc

    source = files(__package__).joinpath("kernels.cu").read_bytes()
    flags = [f"-arch={architecture}", "-std=c++17", *(f"-D{k}={v}" for k, v in shape.definitions().items())]
    program = _done(nvrtc.nvrtcCreateProgram(source, b"kernels.cu", 0, [], []))
    try:
        given = [flag.encode() for flag in flags]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            said = bytes(_done(nvrtc.nvrtcGetProgramLogSize(program)))
            _done(nvrtc.nvrtcGetProgramLog(program, said))
            raise ConfigError(f"kernels for {architecture}: {said.decode(errors='replace').strip(chr(0))}")
        made = bytes(_done(nvrtc.nvrtcGetCUBINSize(program)))
        _done(nvrtc.nvrtcGetCUBIN(program, made))
        return made
    finally:
        _done(nvrtc.nvrtcDestroyProgram(program))


def _done(result: Sequence[Any]) -> Any:
    code, *values = result
    if int(code) != 0:
        raise ConfigError(f"the compiler of kernels: {code.name}")
    return values[0] if values else None

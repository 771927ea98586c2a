"""Which backend computes on which device: the one place to name a new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from membership.base.enums import Device
from membership.base.errors import ConfigError
from workers.model.backend import Backend
from workers.model.cpu.backend import CpuBackend


def _cuda(device: torch.device) -> Backend:
    """ConfigError without Triton, which torch's CUDA builds for Linux bring along."""
    try:
        from workers.model.cuda.backend import CudaBackend
    except ImportError as error:
        raise ConfigError(f"device cuda needs Triton: {error}", hint="pip install triton") from error
    return CudaBackend(device)


BACKENDS: Mapping[Device, Callable[[torch.device], Backend]] = {Device.CPU: CpuBackend, Device.CUDA: _cuda}


def taken_in_turn(wanted: str) -> int:
    """How many devices the ranks of a host share out for a `--device`."""
    name = _resolved(wanted)
    return torch.cuda.device_count() if name == Device.CUDA else 1


def _resolved(wanted: str) -> str:
    if wanted != Device.AUTO:
        return wanted
    return Device.CUDA if torch.cuda.is_available() else Device.CPU


def open_backend(wanted: str, slot: int = 0) -> Backend:
    """The backend for a `--device`, or for one GPU of several ("cuda:1"). ConfigError if it is unknown or absent.

    "cuda" alone: the ranks of a host, by their slots, take its GPUs in turn.
    """
    name = _resolved(wanted)
    kind = name.partition(":")[0]
    if kind not in BACKENDS:
        raise ConfigError(f"unknown device {wanted!r}", hint=f"use auto, {' or '.join(BACKENDS)}")
    if kind == Device.CUDA and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but there is none", hint="use --device cpu")
    if name == Device.CUDA:
        name = f"cuda:{slot % taken_in_turn(wanted)}"
    return BACKENDS[Device(kind)](torch.device(name))

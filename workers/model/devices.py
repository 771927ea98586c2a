"""Which backend computes on which device: the one place to name a new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from membership.base.enums import Device
from membership.base.errors import ConfigError
from workers.model.backend import Backend
from workers.model.cpu.backend import CpuBackend

BACKENDS: Mapping[Device, Callable[[torch.device], Backend]] = {
    Device.CPU: CpuBackend,
    Device.CUDA: CpuBackend,  # the same torch operations on the GPU: it has no kernels of its own
}


def open_backend(wanted: str) -> Backend:
    """The backend for a `--device`, or for one GPU of several ("cuda:1"). ConfigError if it is unknown or absent."""
    name = wanted
    if name == Device.AUTO:
        name = Device.CUDA if torch.cuda.is_available() else Device.CPU
    kind = name.partition(":")[0]
    if kind not in BACKENDS:
        raise ConfigError(f"unknown device {wanted!r}", hint=f"use auto, {' or '.join(BACKENDS)}")
    if kind == Device.CUDA and not torch.cuda.is_available():
        raise ConfigError("device cuda was asked for, but there is none", hint="use --device cpu")
    return BACKENDS[Device(kind)](torch.device(name))

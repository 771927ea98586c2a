"""The kernel fingerprint: ranks whose CPUs or libraries round differently must not share a view.

It hashes the very bits that typical kernels give on fixed inputs, together with the torch build. Two ranks with equal
fingerprints compute alike, as far as these samples show.
"""

from __future__ import annotations

import hashlib
from functools import cache

import torch
from torch.nn import functional


@cache
@torch.inference_mode()
def kernel_fingerprint(dtype: torch.dtype, device: torch.device) -> str:
    """A short hex string; equal on ranks that compute alike."""
    digest = hashlib.sha256(f"{torch.__version__} {device.type} {dtype}".encode())
    if device.type == "cpu":
        digest.update(torch.backends.cpu.get_cpu_capability().encode())
    else:
        digest.update(torch.cuda.get_device_name(device).encode())
    generator = torch.Generator().manual_seed(7)
    for rows, width, out in ((16, 128, 256), (16, 1024, 64), (32, 512, 512)):
        x = torch.randn(rows, width, generator=generator).to(device, dtype)
        w = (torch.randn(out, width, generator=generator) * width**-0.5).to(device, dtype)
        y = functional.linear(x, w)
        wide = y.float()
        for result in (y, functional.silu(y), torch.softmax(wide, -1), wide.pow(2).mean(-1).rsqrt(), wide.cos()):
            digest.update(result.float().cpu().contiguous().numpy().tobytes())
        batch = torch.bmm(wide.unsqueeze(0), wide.unsqueeze(0).transpose(1, 2))
        digest.update(batch.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

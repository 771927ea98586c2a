"""The code that a rank computes with: another one may round differently, so it is a part of the rank's identity."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

ROOMS = ("model", "exchange")  # of `workers`: all code that touches a tensor


@cache
def code_version() -> str:
    """Versions of the libraries, and a digest of our own source. The forkserver asks first, for all its ranks."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(file for room in ROOMS for file in (root / room).rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "llguidance"))
    return f"{libraries}, {digest.hexdigest()[:8]}"

"""Memory that takes a process some time to give back when it is killed."""

from __future__ import annotations

BYTES = 400 << 20

_held = bytearray()


def grow() -> None:
    """Hold it, all of it written to."""
    _held.extend(b"x" * BYTES)

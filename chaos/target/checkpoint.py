"""The checkpoint that a cluster of our own serves: the one that was named, if it can be served, or the shipped one."""

from __future__ import annotations

from pathlib import Path

from elastic.demo.model import write_demo_model
from elastic.serve.etcd_server import find_binary
from elastic.serve.model_check import require_model


def checkpoint(named: Path | None, folder: Path) -> Path:
    """Its directory; the shipped one is written into `folder`. ModelError if it cannot be served.

    Nor can any without etcd (ConfigError). `elastic serve` would say both after a start of its own.
    """
    find_binary()
    if named is not None:
        require_model(named)
        return named
    written = folder / "demo-moe"
    write_demo_model(written)
    return written

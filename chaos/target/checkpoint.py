"""The checkpoint that a cluster of our own serves: the one that was named, if it can be served, or the shipped one."""

from __future__ import annotations

from pathlib import Path


def checkpoint(named: Path | None, folder: Path) -> Path:
    """Its directory; the shipped one is written into `folder`. ModelError before any process is started."""
    if named is not None:
        from workers.model.families import read_model_info

        read_model_info(named)
        return named
    from elastic.demo.model import write_demo_model

    written = folder / "demo-moe"
    write_demo_model(written)
    return written

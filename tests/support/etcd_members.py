"""An etcd of three members on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.faults.members import EtcdMembers, Member

__all__ = ["Member", "three_members"]


@contextmanager
def three_members(folder: Path) -> Iterator[list[Member]]:
    """Start them; whatever is left of them is killed at the end."""
    with EtcdMembers(folder) as etcd:
        yield etcd.members

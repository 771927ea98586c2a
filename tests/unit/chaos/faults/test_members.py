"""The members of an etcd: one per place. Nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.faults.members import EtcdMembers, Here

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("number", [1, 3])
def test_there_is_a_member_for_each_place(number: int, tmp_path: Path) -> None:
    """A soak over hosts has an etcd of one member on a host of its own, or one on each host."""
    etcd = EtcdMembers(tmp_path, places=[Here() for _ in range(number)])
    assert [member.name for member in etcd.members] == [f"m{n}" for n in range(number)]

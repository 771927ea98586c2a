"""Which versions of etcd may acknowledge a write that they have not written."""

from __future__ import annotations

import pytest

from membership.store.durability import acknowledges_early

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("version", ["3.5.0", "3.5.1", "3.5.4", "3.4.20", "3.3.27", "3.5.4-rc.1", "", "unknown"])
def test_versions_that_answer_before_they_have_written(version: str) -> None:
    assert acknowledges_early(version)


@pytest.mark.parametrize("version", ["3.5.5", "3.5.16", "3.4.21", "3.4.34", "3.6.0", "3.6.0-alpha.0", "4.0.1"])
def test_versions_that_write_first(version: str) -> None:
    assert not acknowledges_early(version)

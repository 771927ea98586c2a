"""The matrix of roles and faults: it leaves nothing out, and forgives a dead gateway only what it must."""

from __future__ import annotations

import pytest

from chaos.campaigns.matrix import misfits
from chaos.campaigns.role_matrix import EVERYWHERE, ROLES, all_cells
from chaos.faults.catalogue import FAULTS
from chaos.workload.history import RequestRecord

pytestmark = pytest.mark.unit

WHOLE = RequestRecord(prompt=0, started=0.0, tokens=("a", "b", "c"), finish_reason="length")


def record(tokens: str, error: str = "", finish_reason: str = "") -> RequestRecord:
    return RequestRecord(prompt=0, started=1.0, tokens=tuple(tokens), error=error, finish_reason=finish_reason)


def test_every_role_has_every_process_fault_and_those_that_end_the_cluster_come_last() -> None:
    cells = all_cells()
    assert {(role, fault) for role in ROLES for fault in EVERYWHERE} <= {(cell.role, cell.fault) for cell in cells}
    assert all(FAULTS[cell.fault].fits(cell.role) for cell in cells)
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.fatal for cell in cells] == sorted(cell.fatal for cell in cells)
    assert {cell.name for cell in cells if cell.fatal} == {"supervisor/kill", "supervisor/segv", "supervisor/oom"}


def test_a_broken_stream_is_forgiven_only_if_its_gateway_had_the_fault_and_it_was_right_so_far() -> None:
    history = [
        record("abc", finish_reason="length"),
        record("ab", error="ReadError: "),
        record("", error="ConnectError: "),
    ]
    assert misfits(history, {0: WHOLE}, lambda record: True) == ([], 2)
    wrong, broken = misfits(history, {0: WHOLE}, lambda record: False)
    assert (len(wrong), broken) == (2, 0)
    wrong, broken = misfits(
        [record("ax", error="ReadError: "), record("ab", finish_reason="length")], {0: WHOLE}, lambda record: True
    )
    assert (len(wrong), broken) == (2, 0)

"""The table of phases: forward only, abort only before commit, and every change leaves its time."""

from __future__ import annotations

import pytest

from membership.base.enums import OperationKind
from membership.base.errors import IllegalPhase
from membership.store.phases import ORDER, TRANSITIONS, advance, before_commit
from membership.store.records import Operation, Phase

pytestmark = pytest.mark.unit


def operation(phase: Phase = Phase.PROPOSED) -> Operation:
    return Operation(id="a", kind=OperationKind.SCALE, target=6, phase=phase)


def test_every_phase_has_a_row_and_only_leads_forward() -> None:
    assert set(TRANSITIONS) == set(Phase)
    for source, targets in TRANSITIONS.items():
        for target in targets - {Phase.ABORTED}:
            assert ORDER.index(source) < ORDER.index(target)


def test_phases_in_order_record_when() -> None:
    op = operation()
    for at, phase in enumerate(ORDER[1:], start=1):
        op = advance(op, phase, now=float(at))
    assert op.phase is Phase.DONE
    assert op.progress == 1.0
    assert op.finished == 7.0
    assert op.phase_times == {phase.value: float(at) for at, phase in enumerate(ORDER[1:], start=1)}


@pytest.mark.parametrize("phase", [Phase.COMMITTED, Phase.RETIRING, Phase.DONE, Phase.ABORTED])
def test_what_is_committed_or_over_cannot_abort(phase: Phase) -> None:
    assert not before_commit(operation(phase))
    with pytest.raises(IllegalPhase, match=f"operation a cannot go from {phase}"):
        advance(operation(phase), Phase.ABORTED, now=1.0)


@pytest.mark.parametrize("phase", ORDER[:5])
def test_before_commit_it_can_abort(phase: Phase) -> None:
    assert before_commit(operation(phase))
    op = advance(operation(phase), Phase.ABORTED, now=2.0, error="rank 4 died")
    assert (op.active, op.finished, op.error) == (False, 2.0, "rank 4 died")


def test_no_way_back() -> None:
    with pytest.raises(IllegalPhase):
        advance(operation(Phase.LOADING), Phase.SPAWNING, now=1.0)

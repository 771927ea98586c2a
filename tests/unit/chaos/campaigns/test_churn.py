"""The churn's pure parts: which changes are possible, and the check."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.campaigns.churn import Churn, draw
from chaos.workload.history import RequestRecord
from membership.base.enums import OperationKind
from membership.store.records import Operation, Phase

pytestmark = pytest.mark.unit

WHOLE = RequestRecord(prompt=0, started=0.0, tokens=("a", "b"), token_times=(0.1, 0.2), finish_reason="length")


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(0, 3))
def test_every_change_is_possible_and_changes_something(seed: int, size: int, out: int) -> None:
    slots, drained = tuple(range(size)), tuple(range(10, 10 + out))
    request = draw(random.Random(seed), slots, drained, 6)
    if request.kind == "scale":
        assert request.target != size
        assert 1 <= request.target <= 6
    elif request.kind == "drain":
        assert set(request.ranks) < set(slots)
    else:
        assert size < 6
        assert set(request.ranks) <= set(drained)


def finished(phase: Phase = Phase.DONE, *, cancelled: bool = False, changes: int = 1) -> Churn:
    operation = Operation(
        id="x", kind=OperationKind.SCALE, target=3, started=1.0, finished=1.5, pause_ms=7.0, phase=phase
    )
    churn = Churn(seed=1, ranks=4, changes=changes, most=6, operations=[operation], oracle={0: WHOLE}, history=[WHOLE])
    churn.cancelled = {"x"} if cancelled else set()
    return churn


def test_a_clean_churn_holds() -> None:
    receipt = finished().receipt()
    assert (receipt.ok, receipt.took_p50_ms, receipt.pause_p99_ms) == (True, 500.0, 7.0)
    assert finished(Phase.ABORTED, cancelled=True).receipt().ok


@pytest.mark.parametrize(
    ("churn", "said"),
    [
        (finished(Phase.ABORTED), "operation x ended aborted"),
        (finished(Phase.DONE, cancelled=True), "cancelled operation x ended done"),
    ],
)
def test_what_broke_is_said(churn: Churn, said: str) -> None:
    receipt = churn.receipt()
    assert not receipt.ok
    assert said in receipt.broken[0]


def test_too_few_changes_and_a_lost_request_break_it() -> None:
    churn = finished(changes=2)
    churn.history.append(RequestRecord(prompt=0, started=0.0, tokens=("a",), token_times=(0.1,), error="cut"))
    receipt = churn.receipt()
    assert (receipt.lost, len(receipt.broken)) == (1, 2)

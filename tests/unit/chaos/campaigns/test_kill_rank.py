"""The receipt must not call a run good in which the kill went unnoticed or the epochs jumped."""

from __future__ import annotations

import pytest

from chaos.campaigns.kill_rank import KillRank
from chaos.faults import Killed
from chaos.workload.history import RequestRecord
from membership.base.events import Event

pytestmark = pytest.mark.unit

RECORD = RequestRecord(prompt=0, started=0.0, tokens=("a",), token_times=(0.1,), finish_reason="stop")
COMMITS = [Event(ts=ts, role="controller", kind="epoch_committed", epoch=ts) for ts in (1, 2, 3)]
NOTICED = [Event(ts=10.5, role="engine", kind=kind, rank=2) for kind in ("rank_masked", "rank_recovered")]


def run() -> KillRank:
    killed = Killed(pid=1, sent_at=10.0, gone_at=10.1)
    return KillRank(seed=7, oracle={0: RECORD}, history=[RECORD], victim=2, killed=killed, restored_at=12.0)


def test_a_good_run() -> None:
    found = run().receipt([*COMMITS, *NOTICED])
    assert (found.ok, found.broken, found.epochs) == (True, (), (1, 2, 3))
    assert (found.detected_ms, found.recovered_ms, found.restored_ms) == (500.0, 500.0, 2000.0)


@pytest.mark.parametrize(
    ("events", "says"),
    [
        (NOTICED, "epochs do not rise"),
        ([COMMITS[0], COMMITS[2], *NOTICED], "epochs do not rise"),
        (COMMITS, "did not notice"),
        ([*COMMITS, NOTICED[0]], "did not recover"),
        ([*COMMITS, *(Event(ts=e.ts, role=e.role, kind=e.kind, rank=3) for e in NOTICED)], "death of rank 2"),
    ],
)
def test_a_run_that_proves_too_little(events: list[Event], says: str) -> None:
    found = run().receipt(events)
    assert not found.ok
    assert says in " ".join(found.broken)


def test_a_run_without_a_kill() -> None:
    assert "no rank was killed" in KillRank(seed=7, oracle={0: RECORD}, history=[RECORD]).receipt(COMMITS).broken

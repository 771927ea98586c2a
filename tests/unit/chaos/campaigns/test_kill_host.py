"""The receipt of `elastic demo --hosts`: no run is good in which a death went unnoticed, or no stream saw it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec.structs import replace

from chaos.campaigns.demo import DemoOptions, on_hosts
from chaos.campaigns.kill_host import KillHost
from chaos.workload.history import RequestRecord
from elastic.cli.flags import Output
from membership.base.events import Event

pytestmark = pytest.mark.unit

RECORD = RequestRecord(
    prompt=0, started=0.0, ended=9.0, tokens=("a", "b", "c"), token_times=(0.1, 3.0, 7.5), finish_reason="stop"
)
COMMITS = [Event(ts=ts, role="controller", kind="epoch_committed", epoch=ts) for ts in (1, 2, 3)]
ELECTED = [Event(ts=ts, role="engine", kind="engine_elected") for ts in (1.0, 12.5)]


def run(*history: RequestRecord) -> KillHost:
    return KillHost(
        seed=7, oracle={0: RECORD}, history=list(history or [RECORD]), hosts=3, killed_host="a", killed_processes=9,
        killed_at=10.0, killed=5.0, restored_at=18.0,
    )  # fmt: skip


def test_a_good_run() -> None:
    found = run().receipt([*COMMITS, *ELECTED])
    assert (found.ok, found.broken, found.epochs) == (True, (), (1, 2, 3))
    assert (found.hosts, found.killed_host, found.killed_processes) == (3, "a", 9)
    assert (found.detected_ms, found.recovered_ms, found.restored_ms) == (2500.0, 2500.0, 8000.0)


@pytest.mark.parametrize(
    ("history", "events", "says"),
    [
        ([RECORD], [*COMMITS, ELECTED[0]], "no host noticed the death of host a"),
        ([replace(RECORD, ended=4.0)], [*COMMITS, *ELECTED], "or no stream was under way"),
        ([replace(RECORD, tokens=("a",), token_times=(0.1,))], [*COMMITS, *ELECTED], "no stream was under way"),
        ([RECORD], [COMMITS[0], COMMITS[2], *ELECTED], "epochs do not rise"),
        ([replace(RECORD, tokens=("a", "b", "x"))], [*COMMITS, *ELECTED], "token 2"),
    ],
)
def test_a_run_that_proves_too_little(history: list[RequestRecord], events: list[Event], says: str) -> None:
    found = run(*history).receipt(events)
    assert not found.ok
    assert says in " ".join(found.broken)


def test_a_run_without_a_kill() -> None:
    found = KillHost(seed=7, oracle={0: RECORD}, history=[RECORD]).receipt(COMMITS)
    assert {"no host was killed", "the cluster did not come back to full strength"} <= set(found.broken)
    assert (found.detected_ms, found.recovered_ms, found.restored_ms) == (-1.0, -1.0, -1.0)


def test_where_no_hosts_can_be_made_the_demo_says_why_and_nothing_broke(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    on_hosts(DemoOptions(hosts=3), Output.JSON)
    said = capsys.readouterr()
    assert said.err.startswith("skipped: network namespaces cannot be made here")
    assert "namespaces cannot be made here" in json.loads(said.out)["skipped"]

"""A short run of the real thing, recorded: a kill and a scale under load, checked from the record by the command."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from chaos.check.evidence import Evidence
from chaos.check.faults import aftermaths
from chaos.cli.main import app
from chaos.faults import kill
from chaos.faults.base import Injected
from chaos.record.record import read
from chaos.record.recorder import Recorder
from chaos.workload.streams import Load, Workload
from tests.e2e.conftest import Serve
from tests.support.helpers import eventually
from tests.support.served import streaming

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

VICTIM = 1


def test_a_recorded_run_is_checked_from_its_file(serve: Serve, demo_model: Path, tmp_path: Path) -> None:
    cluster = serve(demo_model, 2, flags=("--max-ranks", "3"))
    cluster.wait_serving(2)
    oracle = Workload(cluster.url, cluster.model_name(), Load(prompts=6, max_tokens=32)).run_once()
    load = Workload(cluster.url, cluster.model_name(), Load(prompts=6, streams=3, max_tokens=32))
    began, cpu = time.monotonic(), psutil.Process().cpu_times()
    with Recorder.of(cluster, what="a kill and a scale", seed=1) as recorder:
        load.start()
        eventually(lambda: streaming(load), 60.0, "streams for the fault to meet")
        victim = next(r for r in cluster.status()["ranks"] if r["rank"] == VICTIM)
        killed = kill(victim["pid"])
        fault = Injected(
            fault="kill", victim=f"rank {VICTIM}", at=killed.sent_at, seen_at=killed.gone_at, proof="pidfd says gone",
            pid=killed.pid,
        )  # fmt: skip
        recorder.injected(fault)
        eventually(
            lambda: any(
                r["rank"] == VICTIM and r["incarnation"] > victim["incarnation"] for r in cluster.status()["ranks"]
            ),
            60.0, "the victim's successor",
        )  # fmt: skip
        cluster.wait_serving(2)
        cluster.scale(3)
        cluster.wait_serving(3)
        recorder.expected(oracle)
        recorder.answered(load.stop())
    used = psutil.Process().cpu_times()
    print(f"CPU {used.user + used.system - cpu.user - cpu.system:.2f} s of {time.monotonic() - began:.1f} s")
    path = tmp_path / "record.jsonl"
    recorder.write(path)

    outcome = CliRunner().invoke(app, ["check", str(path), "-o", "json"])
    assert outcome.exit_code == 0, CliRunner().invoke(app, ["check", str(path)]).output
    rows = {row["title"]: row for row in json.loads(outcome.stdout)["outcomes"]}
    assert all(row["judged"] for row in rows.values()), rows
    assert rows["commits"]["figures"]["epochs"] >= 4  # as it was, without the victim, with its successor, with three
    assert rows["coverage"]["figures"]["losses"] == 1
    assert rows["linearizable"]["figures"]["clients"] == 3
    assert rows["watch"]["figures"]["gaps"] == 0
    after = aftermaths(Evidence(read(path)))[0]
    assert 0 <= after.noticed_ms <= min(after.recovered_ms, after.restored_ms)  # of these two either may be first
    assert after.pause_ms > 0

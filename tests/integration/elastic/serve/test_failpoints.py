"""Failpoints in processes: kill kills, hang hangs, and a limit holds over restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from chaos.faults.base import NotInjected
from chaos.faults.site import ServedSite
from chaos.target.cluster import ServedCluster
from elastic.cli.client import AdminClient
from elastic.serve import chaos_mode
from elastic.serve.state_dir import StateDir
from membership.base import failpoints
from membership.base.errors import ConfigError
from membership.base.events import EventLog
from membership.base.failpoints import ENV, arm, write
from membership.base.process_stats import threads
from tests.support import ROOT
from tests.support.gateway_cluster import TOKEN, GatewayCluster
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration

PROGRAM = (
    "import sys; from membership.base.failpoints import arm, hit; arm('test', sys.argv[1]); hit('rank.prepared', 2)"
)

TICKING = """
import sys, threading, time
def tick():
    while True:
        with open(sys.argv[2], "a") as file: file.write(".")
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
"""


def started(history: Path, faults: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(history)], env={**os.environ, ENV: faults})


def test_the_first_one_dies_and_the_next_does_not(tmp_path: Path) -> None:
    history = tmp_path / "events.jsonl"
    ends = [started(history, "rank.prepared=1*kill").wait(timeout=60.0) for _ in range(2)]
    assert ends == [-signal.SIGKILL, 0]
    assert [event.fields["action"] for event in EventLog.read(history)] == ["kill"]


def test_who_hangs_does_so_until_it_is_killed(tmp_path: Path) -> None:
    history = tmp_path / "events.jsonl"
    process = started(history, "rank.prepared@2=hang")
    event = next(iter(EventLog.follow(history, threading.Event())))
    assert event.fields["pid"] == process.pid
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=60.0) == -signal.SIGTERM


@pytest.mark.parametrize(("action", "others_run"), [("hang", True), ("hang-gil", False)])
def test_a_native_hang_ends_when_it_is_disarmed(tmp_path: Path, action: str, others_run: bool) -> None:
    history, armed, ticker = tmp_path / "events.jsonl", tmp_path / "failpoints", tmp_path / "ticks"
    write(armed, f"rank.prepared@2=1*{action}")
    process = subprocess.Popen(
        [sys.executable, "-c", TICKING + PROGRAM, str(history), str(ticker)],
        env={**os.environ, ENV: f"@{armed}"}, cwd=ROOT,
    )  # fmt: skip
    assert next(iter(EventLog.follow(history, threading.Event()))).fields["action"] == action
    eventually(lambda: threads(process.pid).state == "S", 30.0, "its main thread to sleep")
    ticks = "its other thread to go on" if others_run else "its other thread to stand still"
    eventually(lambda: goes_on(ticker) == others_run, 30.0, ticks)  # it may hang a moment later than it sleeps
    assert process.poll() is None
    write(armed, "")
    assert process.wait(timeout=60.0) == 0


def goes_on(file: Path) -> bool:
    """Whether it grows."""
    before = file.stat().st_size
    time.sleep(0.3)
    return file.stat().st_size > before


def test_it_may_die_of_a_bad_address(tmp_path: Path) -> None:
    assert started(tmp_path / "events.jsonl", "rank.prepared=segv").wait(timeout=60.0) == -signal.SIGSEGV


def test_what_there_is_not_ends_it_at_the_start(tmp_path: Path) -> None:
    assert started(tmp_path / "events.jsonl", "rank.nowhere=kill").wait(timeout=60.0) == 1


def test_the_admin_api_arms_them_in_chaos_mode_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, armed = GatewayCluster(tmp_path), tmp_path / "failpoints"
    monkeypatch.setattr(failpoints, "_armed", None)
    with cluster.gateway() as gateway, closing(AdminClient(gateway.admin_url, TOKEN)) as client:
        for refused in (client.failpoints, lambda: client.arm("rank.step=hang")):
            with pytest.raises(ConfigError, match="--chaos"):
                refused()
        arm("test", str(tmp_path / "events.jsonl"), environ={ENV: f"@{armed}"})
        answer = client.failpoints()
        assert answer["failpoints"] == ""
        assert "rank.step" in answer["points"]
        assert "hang-gil" in answer["actions"]
        assert client.arm("rank.step@1=hang")["failpoints"] == armed.read_text() == "rank.step@1=hang"
        with pytest.raises(ConfigError, match=r"no failpoint 'rank\.nowhere'.*rank\.prepared"):
            client.arm("rank.nowhere=hang")
        with pytest.raises(ConfigError, match="failpoints"):
            client._call("PUT", "failpoints", json={})
        assert armed.read_text() == "rank.step@1=hang"
        assert client.arm("")["failpoints"] == ""


@pytest.mark.parametrize("chaos", [True, False])
def test_what_serving_with_chaos_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chaos: bool) -> None:
    monkeypatch.setenv(ENV, "rank.step=hang")
    state = StateDir(tmp_path)
    state.failpoints.write_text("of an earlier run")
    asked = chaos_mode.begin(state, chaos)
    assert asked == ({ENV: f"@{state.failpoints}"} if chaos else {})
    assert failpoints.read(state.failpoints) == ("rank.step=hang" if chaos else "")
    site = ServedSite(ServedCluster(tmp_path, 1, state_dir=tmp_path))
    if chaos:
        site.arm("rank.copy=raise")
        assert failpoints.read(state.failpoints) == "rank.copy=raise"
    else:
        with pytest.raises(NotInjected) as refused:
            site.arm("rank.copy=raise")
        assert "--chaos" in refused.value.hint
    monkeypatch.setenv(ENV, "@/elsewhere")
    chaos_mode.check(chaos=False)
    with pytest.raises(ConfigError):
        chaos_mode.check(chaos=True)

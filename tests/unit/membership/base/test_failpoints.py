"""Failpoints: what may be asked for, what happens, how often, and that each one is passed somewhere in the product."""

from __future__ import annotations

import ast
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from membership.base import failpoints
from membership.base.errors import ConfigError
from membership.base.events import Event, EventLog
from membership.base.failpoint_catalogue import EDGES, POINTS
from membership.base.failpoints import ENV, Fault, FaultInjected, arm, hit, parse
from membership.planning.controller import edge
from tests.support import ROOT
from tests.support.world import World

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where failpoints write; whatever a test arms is forgotten afterwards."""
    monkeypatch.setattr(failpoints, "_armed", None)
    monkeypatch.setenv(failpoints.HISTORY_ENV, str(tmp_path / "events.jsonl"))
    return tmp_path / "events.jsonl"


def armed(faults: str) -> None:
    arm("test", environ={**os.environ, ENV: faults})


def fired(history: Path) -> list[Event]:
    return [event for event in EventLog.read(history) if event.kind == "failpoint"]


def test_what_may_be_asked_for() -> None:
    assert parse("") == ()
    assert parse(" rank.prepared@2=1*hang; engine.after.flip=wait:/a=b;") == (
        Fault(name="rank.prepared", action="hang", rank=2, limit=1),
        Fault(name="engine.after.flip", action="wait", file="/a=b"),
    )
    faults = "rank.step=hang-gil;rank.step=segv;rank.step=delay:5;rank.launched=lose-device;rank.launched=fill-device"
    assert [f.action for f in parse(faults)] == [
        "hang-gil", "segv", "delay", "lose-device", "fill-device",
    ]  # fmt: skip
    assert parse("rank.step=delay:50")[0].ms == 50


@pytest.mark.parametrize(
    ("text", "words"),
    [("rank.nowhere=kill", "rank.prepared"), ("rank.prepared=explode", "wait:FILE"), ("rank.prepared", "kill"),
     ("rank.prepared=wait:", "wait:FILE"), ("rank.prepared=delay:soon", "delay:MS"),
     ("rank.prepared@x=kill", "kill"), ("rank.prepared=0x1*kill", "kill")],
)  # fmt: skip
def test_what_there_is_not_is_refused_with_a_list(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        armed(f"rank.prepared=raise;{text}")
    assert text.split("=")[0] in str(refused.value)
    assert words in refused.value.hint
    hit("rank.prepared")  # nothing was armed


def test_without_a_history_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="history"):
        arm("test", environ={ENV: "rank.prepared=raise"})


def test_nothing_happens_unless_asked_for(history: Path) -> None:
    arm("test", str(history), environ={})
    armed("")
    hit("rank.prepared", 2)
    assert not history.exists()


def test_it_happens_there_and_to_that_rank_only(history: Path) -> None:
    armed("rank.prepared@2=raise")
    hit("rank.prepared", 1)
    hit("rank.before.prepare", 2)
    assert fired(history) == []
    for _ in range(2):
        with pytest.raises(FaultInjected, match=r"rank\.prepared"):
            hit("rank.prepared", 2)
    assert [(e.role, e.rank, e.fields["name"], e.fields["action"]) for e in fired(history)] == [
        ("test", 2, "rank.prepared", "raise")
    ] * 2


def test_so_many_times_over_all_processes(history: Path) -> None:
    for _ in range(2):
        armed("rank.prepared=2*raise")  # as another process does
        with pytest.raises(FaultInjected):
            hit("rank.prepared")
    hit("rank.prepared")
    assert len(fired(history)) == 2


def test_it_waits_for_a_file(history: Path, tmp_path: Path) -> None:
    armed(f"rank.prepared=wait:{tmp_path / 'go'}")
    passed = threading.Thread(target=hit, args=("rank.prepared",))
    passed.start()
    stop = threading.Event()
    next(event for event in EventLog.follow(history, stop) if event.kind == "failpoint")
    assert passed.is_alive()
    (tmp_path / "go").touch()
    passed.join(timeout=60.0)
    assert not passed.is_alive()
    hit("rank.prepared")
    assert len(fired(history)) == 1, "a point that does not have to wait says nothing"


def armed_by_file(path: Path, faults: str) -> None:
    failpoints.write(path, faults)
    arm("test", environ={**os.environ, ENV: f"@{path}"})


def test_a_file_may_change_while_the_process_runs(history: Path, tmp_path: Path) -> None:
    path = tmp_path / "failpoints"
    arm("test", environ={**os.environ, ENV: f"@{path}"})
    assert failpoints.source() == path
    hit("rank.prepared")  # there is no such file yet
    failpoints.write(path, "rank.prepared=raise")
    with pytest.raises(FaultInjected):
        hit("rank.prepared")
    assert failpoints.read(path) == "rank.prepared=raise"
    failpoints.write(path, "")
    hit("rank.prepared")
    path.unlink()
    hit("rank.prepared")
    assert len(fired(history)) == 1
    with pytest.raises(ConfigError):
        failpoints.write(path, "rank.nowhere=raise")
    path.write_text("rank.prepared=nonsense")  # spoiled by hand: nothing is armed
    hit("rank.prepared")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.jsonl", "failpoints"], "no draft is left"


def test_so_many_times_since_it_was_armed(history: Path, tmp_path: Path) -> None:
    path = tmp_path / "failpoints"
    for _ in range(2):
        armed_by_file(path, "rank.prepared=1*raise")
        with pytest.raises(FaultInjected):
            hit("rank.prepared", 3)
        hit("rank.prepared")
        arm("test", environ={**os.environ, ENV: f"@{path}"})  # as another process does
        hit("rank.prepared")
    first, second = fired(history)
    assert first.fields["armed"] < second.fields["armed"]
    assert first.rank == 3


def test_each_rank_is_counted_by_itself(history: Path) -> None:
    armed("rank.prepared@1=1*raise;rank.prepared@2=1*raise")
    for rank in (1, 2):
        with pytest.raises(FaultInjected):
            hit("rank.prepared", rank)
        hit("rank.prepared", rank)


@pytest.mark.parametrize("action", ["hang", "wait:/nowhere", "delay:60000"])
def test_what_lasts_ends_when_it_is_disarmed(action: str, history: Path, tmp_path: Path) -> None:
    path = tmp_path / "failpoints"
    armed_by_file(path, f"rank.step={action}")
    passed = threading.Thread(target=hit, args=("rank.step",))
    passed.start()
    stop = threading.Event()
    next(event for event in EventLog.follow(history, stop) if event.kind == "failpoint")
    failpoints.write(path, f"rank.prepared=raise;rank.step={action}")  # it is still armed
    passed.join(timeout=0.05)
    assert passed.is_alive()
    failpoints.write(path, "rank.prepared=raise")
    passed.join(timeout=60.0)
    assert not passed.is_alive()


def calls() -> Iterator[tuple[str, ast.expr]]:
    """Each name that the product passes, with the file."""
    for folder in ("membership", "workers", "elastic"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoints.hit":
                    yield path.name, node.args[0]


def test_each_is_passed_somewhere_and_no_other() -> None:
    names = [(file, ast.literal_eval(name)) for file, name in calls() if isinstance(name, ast.Constant)]
    made = {(file, ast.unparse(name)) for file, name in calls() if not isinstance(name, ast.Constant)}
    assert made == {
        ("controller.py", "f'controller.before.{edge(effect)}'"),  # see the next test
        ("controller.py", "f'controller.after.{edge(effect)}'"),
        ("executor.py", "f'agent.before.{name}'"),  # the agent's calls to ranks, and the ranks' side of them
        ("worker_proc.py", "f'rank.{call.method!s}'"),
    }
    edges = [f"controller.{when}.{edge}" for edge in EDGES for when in ("before", "after")]
    called = [f"{side}.{rpc}" for rpc in agents_calls() for side in ("agent.before", "rank")]
    assert sorted(POINTS) == sorted([*edges, *called, *{name for _, name in names}])


def agents_calls() -> set[str]:
    """What an agent asks of its ranks: the names that it gives to its executor."""
    found = set()
    for file in ("agent.py", "spares.py", "executor.py"):
        for node in ast.walk(ast.parse((ROOT / "workers" / "agent" / file).read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
                "submit",
                "_call",
                "_call_load",
            ):
                found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return found


def test_the_controller_passes_its_own_as_its_effects_say() -> None:
    world = World()
    world.settle()
    world.scale(6)
    world.settle()
    world.kill(1)
    world.settle()
    world.bad = {4}
    world.scale(2)
    world.settle()
    world.scale(5)
    world.settle()
    passed = {edge(effect) for effect in world.effects}
    assert passed == {
        "spawning", "handshaking", "loading", "committed", "retiring", "done", "aborted", "staged", "assigned",
    }  # fmt: skip
    assert passed | {"unstaged"} == set(EDGES)
    assert edge(replace(world.effects[0], operation=None, commit=None, stage=None, unstage=True)) == "unstaged"

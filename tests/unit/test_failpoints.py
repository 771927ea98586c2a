"""Failpoints: what may be asked for, what happens, how often, and that each one is passed somewhere in the product."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from chaos.simulation.world import World
from membership import failpoints
from membership.controller import edge
from membership.errors import ConfigError
from membership.events import Event, EventLog
from membership.failpoints import ENV, POINTS, Fault, FaultInjected, arm, hit, parse

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where failpoints write; whatever a test arms is forgotten afterwards."""
    monkeypatch.setattr(failpoints, "_armed", None)
    monkeypatch.setenv(failpoints.HISTORY_ENV, str(tmp_path / "events.jsonl"))
    return tmp_path / "events.jsonl"


def armed(faults: str) -> None:
    arm("test", environ={**os.environ, ENV: faults})


def blows(history: Path) -> list[Event]:
    return [event for event in EventLog.read(history) if event.kind == "failpoint"]


def test_what_may_be_asked_for() -> None:
    assert parse("") == ()
    assert parse(" rank.prepared@2=1*hang; engine.after.flip=wait:/a=b;") == (
        Fault(name="rank.prepared", action="hang", rank=2, limit=1),
        Fault(name="engine.after.flip", action="wait", file="/a=b"),
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [("rank.nowhere=kill", "rank.prepared"), ("rank.prepared=explode", "wait:FILE"), ("rank.prepared", "kill"),
     ("rank.prepared=wait:", "wait:FILE"), ("rank.prepared@x=kill", "kill"), ("rank.prepared=0x1*kill", "kill")],
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
    assert blows(history) == []
    for _ in range(2):
        with pytest.raises(FaultInjected, match=r"rank\.prepared"):
            hit("rank.prepared", 2)
    assert [(e.role, e.rank, e.fields["name"], e.fields["action"]) for e in blows(history)] == [
        ("test", 2, "rank.prepared", "raise")
    ] * 2


def test_so_many_times_over_all_processes(history: Path) -> None:
    for _ in range(2):
        armed("rank.prepared=2*raise")  # as another process does
        with pytest.raises(FaultInjected):
            hit("rank.prepared")
    hit("rank.prepared")
    assert len(blows(history)) == 2


def test_it_waits_for_a_file(history: Path, tmp_path: Path) -> None:
    armed(f"rank.prepared=wait:{tmp_path / 'go'}")
    passed = threading.Thread(target=hit, args=("rank.prepared",))
    passed.start()
    stop = threading.Event()
    next(event for event in EventLog.follow(history, stop) if event.kind == "failpoint")
    assert passed.is_alive()
    (tmp_path / "go").touch()
    passed.join(timeout=10.0)
    assert not passed.is_alive()
    hit("rank.prepared")
    assert len(blows(history)) == 1, "whoever does not have to wait says nothing"


def test_each_is_passed_somewhere() -> None:
    product = [
        path.read_text() for folder in ("membership", "workers", "elastic") for path in (ROOT / folder).rglob("*.py")
    ]
    passed = {name for text in product for name in re.findall(r'failpoints\.hit\("([a-z.]+)"', text)}
    assert passed == {name for name in POINTS if not name.startswith("controller.")}


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
    assert {f"controller.before.{name}" for name in passed} <= set(POINTS)
    assert edge(replace(world.effects[0], operation=None, commit=None, stage=None, unstage=True)) == "unstaged"

"""The whole suite: each part is a command of `elastic-chaos` in its own process; its receipt is held against goals.

Parts of one stage run side by side: those that wait more than they compute. A part that does not end in time, or
leaves no receipt, has failed. Nothing here knows how a part works.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from chaos.campaigns.campaign import Notify

Receipt = Mapping[str, Any]
KILL_GRACE_S = 30.0


class Goal(msgspec.Struct, frozen=True):
    """Something that a part must reach, and what it reached."""

    what: str
    wanted: str
    reached: str
    ok: bool


@dataclass(frozen=True)
class Part:
    """One command, and the goals of its receipt. Pure data."""

    name: str
    about: str
    arguments: tuple[str, ...]
    goals: Callable[[Receipt], Iterator[Goal]]
    limit_s: float


Stages = Sequence[Sequence[Part]]
"""Stages one after the other, the parts of each side by side."""


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a part."""

    name: str
    about: str
    ok: bool
    seconds: float
    goals: tuple[Goal, ...]
    said: str = ""  # the end of its output, if it failed


class SuiteReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What came of the suite."""

    ok: bool
    seed: int
    seconds: float
    parts: tuple[Outcome, ...]


def at_least(what: str, wanted: int, reached: int) -> Goal:
    """This number, or more."""
    return Goal(what, f"≥ {wanted:,}", f"{reached:,}", reached >= wanted)


def at_most(what: str, wanted: float, reached: float) -> Goal:
    """This number, or fewer."""
    return Goal(what, f"≤ {wanted:g}", f"{reached:g}", reached <= wanted)


def none_of(what: str, reached: int) -> Goal:
    """None."""
    return Goal(what, "0", f"{reached:,}", reached == 0)


def all_of(what: str, total: int, reached: int) -> Goal:
    """All of them, and at least one."""
    return Goal(what, f"all of {total:,}", f"{reached:,}", reached == total > 0)


def run_suite(stages: Stages, seed: int, folder: Path, notify: Notify) -> SuiteReceipt:
    """Stage by stage; each part's stderr goes to a log in `folder`, its receipt to a file beside it."""
    began = time.monotonic()

    def done(part: Part) -> Outcome:
        notify(f"{part.name}: {part.about}")
        outcome = _run(part, folder)
        notify(f"{part.name}: {'held' if outcome.ok else 'BROKEN'} after {outcome.seconds:.0f} s")
        return outcome

    outcomes: list[Outcome] = []
    for stage in filter(None, stages):
        with ThreadPoolExecutor(len(stage)) as side_by_side:
            outcomes += side_by_side.map(done, stage)
    return SuiteReceipt(
        ok=all(outcome.ok for outcome in outcomes),
        seed=seed,
        seconds=round(time.monotonic() - began, 1),
        parts=tuple(outcomes),
    )


def _run(part: Part, folder: Path) -> Outcome:
    began, log = time.monotonic(), folder / f"{part.name}.log"
    with log.open("wb") as errors:
        command = [sys.executable, "-c", "from chaos.cli.main import main; main()", *part.arguments]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process:
            try:
                output, _ = process.communicate(timeout=part.limit_s)
                said = ""
            except subprocess.TimeoutExpired:
                said = f"not done within {part.limit_s:.0f} s"
                process.terminate()  # it stops its cluster
                output = _last(process)
    receipt = _receipt(output)
    goals = tuple(part.goals(receipt)) if receipt else ()
    if receipt:
        (folder / f"{part.name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(receipt)))
    ok = not said and process.returncode == 0 and bool(goals) and all(goal.ok for goal in goals)
    if not ok:
        said = " | ".join([said, *log.read_text(errors="replace", encoding="utf-8").splitlines()[-3:]]).strip(" |")
    return Outcome(
        name=part.name, about=part.about, ok=ok, seconds=round(time.monotonic() - began, 1), goals=goals, said=said
    )


def _last(process: subprocess.Popen[bytes]) -> bytes:
    """The rest of the output of a process that was asked to end; it is killed if it does not."""
    try:
        return process.communicate(timeout=KILL_GRACE_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate(timeout=KILL_GRACE_S)[0]


def _receipt(output: bytes) -> Receipt | None:
    """The last line of a part's output; None if that is no receipt."""
    lines = output.splitlines()
    try:
        found = msgspec.json.decode(lines[-1]) if lines else None
    except msgspec.DecodeError:
        return None
    return found if isinstance(found, dict) else None

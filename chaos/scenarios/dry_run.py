"""The dry run of a scenario: each step with its victims, what it needs, and why it would be refused. Pure.

The random choices are those of the run with the same seed, as long as the ranks are the ones that are expected here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from chaos.faults.base import NotInjected
from chaos.scenarios.blast_radius import Limits, too_much
from chaos.scenarios.script import BACK, Change, Heal, Inject, Release, Scenario, Step, Wait
from chaos.scenarios.victims import Chooser, Sight, number_of
from membership.store.records import Placement


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One step. `needs`: of the machine or of the cluster. `refused`: why it will not be done."""

    step: str  # "2.1": the first step in the second round
    does: str
    victims: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    refused: str = ""


class DryRun(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run."""

    scenario: str
    seed: int
    steps: tuple[Planned, ...]

    @property
    def refused(self) -> tuple[Planned, ...]:
        """What will not be done."""
        return tuple(step for step in self.steps if step.refused)

    @property
    def changes(self) -> bool:
        """Whether anything would be done to the cluster."""
        return any(step.victims or step.does.startswith(("scale", "drain", "undrain")) for step in self.steps)


@dataclass
class Expected:
    """The cluster as it is expected to be. Without limits (a cluster of its own) every fault is allowed."""

    ranks: list[int]
    placement: Placement = field(default_factory=dict)
    limits: Limits | None = None
    unable: Callable[[Inject, str], str] = lambda step, victim: ""  # why this fault cannot be injected there
    drained: list[int] = field(default_factory=list)
    down: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._first = len(self.ranks)

    def resized(self, change: Change) -> None:
        """After a scale: the free slots with the lowest numbers come, the highest go."""
        wanted = change.size_from(len(self.ranks), self._first)
        taken = {*self.ranks, *self.drained}
        free = (slot for slot in range(len(taken) + wanted) if slot not in taken)
        while len(self.ranks) < wanted:
            self.ranks.append(next(free))
        self.ranks = sorted(self.ranks)[:wanted]


def dry_run(scenario: Scenario, seed: int, expected: Expected) -> DryRun:
    """What a run with this seed would do, step by step."""
    chooser = Chooser(random.Random(seed))
    steps: list[Planned] = []
    for turn in range(1, scenario.repeat + 1):
        chooser.next_round()
        for name, step in scenario.numbered(turn):
            try:
                steps.append(_planned(name, step, chooser, expected))
            except NotInjected as error:
                steps.append(Planned(step=name, does=step.words, refused=str(error)))
    return DryRun(scenario=scenario.name, seed=seed, steps=tuple(steps))


def _planned(name: str, step: Step, chooser: Chooser, expected: Expected) -> Planned:
    match step:
        case Inject():
            return _inject(name, step, chooser, expected)
        case Wait():
            if step.state == "whole":
                expected.down.clear()
            return Planned(step=name, does=step.words)
        case Change():
            return _change(name, step, chooser, expected)
        case Release():
            return Planned(step=name, does=step.words, victims=chooser.choose(step.victim, Sight(expected.ranks)))
        case Heal():
            return Planned(step=name, does=step.words)


def _inject(name: str, step: Inject, chooser: Chooser, expected: Expected) -> Planned:
    sight = Sight(expected.ranks, placement=expected.placement)
    victims = tuple(each for victim in step.victims for each in chooser.choose(victim, sight))
    refused = next((why for each in victims if (why := expected.unable(step, each))), "")
    if not refused and expected.limits is not None:
        refused = too_much(victims, expected.down, expected.placement, expected.limits)
    expected.down |= _numbers(victims)
    return Planned(step=name, does=step.words, victims=victims, needs=step.needs, refused=refused)


def _change(name: str, change: Change, chooser: Chooser, expected: Expected) -> Planned:
    victims: tuple[str, ...]
    if change.victims == (BACK,):
        expected.ranks, expected.drained = sorted(expected.ranks + expected.drained), []
        victims = change.victims
    else:
        victims = tuple(each for v in change.victims for each in chooser.choose(v, Sight(expected.ranks)))
    if change.kind == "scale":
        expected.resized(change)
    elif change.kind == "drain":
        expected.ranks = [rank for rank in expected.ranks if rank not in _numbers(victims)]
        expected.drained += sorted(_numbers(victims))
    faults = [_inject(name, fault, chooser, expected) for fault in change.faults]
    return Planned(
        step=name,
        does=change.words,
        victims=(*victims, *(victim for fault in faults for victim in fault.victims)),
        needs=tuple(dict.fromkeys(need for fault in faults for need in fault.needs)),
        refused=next((fault.refused for fault in faults if fault.refused), ""),
    )


def _numbers(victims: tuple[str, ...]) -> set[int]:
    """The ranks among them that are known beforehand."""
    return {number for victim in victims if (number := number_of(victim)) is not None}

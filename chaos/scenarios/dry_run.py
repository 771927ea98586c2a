"""A scenario as it would go: each step with its victims, what it needs, and why it would be refused. Pure.

The random choices are those of the run with the same seed, as long as the ranks are the ones that are expected here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from chaos.faults.base import NotInjected
from chaos.faults.catalogue import FAULTS
from chaos.scenarios.blast_radius import Limits, too_much
from chaos.scenarios.script import BACK, Blow, Change, Heal, Release, Scenario, Step, Wait
from chaos.scenarios.victims import Chooser, Sight
from membership.store.records import Placement

CHAOS = "--chaos"


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """One step. `needs`: of the machine or of the cluster. `refused`: why it will not be done."""

    step: str  # "2.1": the first step in the second round
    does: str
    victims: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    refused: str = ""


class Rehearsal(msgspec.Struct, frozen=True, kw_only=True):
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
class Scene:
    """The cluster as it is expected to be. Without limits (a cluster of its own) nothing is too much."""

    ranks: list[int]
    placement: Placement = field(default_factory=dict)
    limits: Limits | None = None
    unable: Callable[[Blow, str], str] = lambda blow, victim: ""  # why this fault cannot be dealt there
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


def rehearse(scenario: Scenario, seed: int, scene: Scene) -> Rehearsal:
    """What a run with this seed would do, step by step."""
    chooser = Chooser(random.Random(seed))
    steps: list[Planned] = []
    for turn in range(1, scenario.repeat + 1):
        chooser.next_round()
        for number, step in enumerate(scenario.steps, start=1):
            name = f"{turn}.{number}" if scenario.repeat > 1 else str(number)
            try:
                steps.append(_planned(name, step, chooser, scene))
            except NotInjected as error:
                steps.append(Planned(step=name, does=step.words, refused=str(error)))
    return Rehearsal(scenario=scenario.name, seed=seed, steps=tuple(steps))


def _planned(name: str, step: Step, chooser: Chooser, scene: Scene) -> Planned:
    match step:
        case Blow():
            return _blow(name, step, chooser, scene)
        case Wait():
            if step.state == "whole":
                scene.down.clear()
            return Planned(step=name, does=step.words)
        case Change():
            return _change(name, step, chooser, scene)
        case Release():
            return Planned(step=name, does=step.words, victims=chooser.choose(step.victim, Sight(scene.ranks)))
        case Heal():
            return Planned(step=name, does=step.words)


def _blow(name: str, blow: Blow, chooser: Chooser, scene: Scene) -> Planned:
    sight = Sight(scene.ranks, placement=scene.placement)
    victims = tuple(each for victim in blow.victims for each in chooser.choose(victim, sight))
    refused = next((why for each in victims if (why := scene.unable(blow, each))), "")
    if not refused and scene.limits is not None:
        refused = too_much(victims, scene.down, scene.placement, scene.limits)
    scene.down |= {int(each.split()[1]) for each in victims if each.startswith("rank ") and each.split()[1].isdigit()}
    return Planned(step=name, does=blow.words, victims=victims, needs=needs_of(blow), refused=refused)


def _change(name: str, change: Change, chooser: Chooser, scene: Scene) -> Planned:
    victims: tuple[str, ...]
    if change.victims == (BACK,):
        scene.ranks, scene.drained = sorted(scene.ranks + scene.drained), []
        victims = change.victims
    else:
        victims = tuple(each for v in change.victims for each in chooser.choose(v, Sight(scene.ranks)))
    slots = [int(each.split()[1]) for each in victims if each.startswith("rank ") and each.split()[1].isdigit()]
    if change.kind == "scale":
        scene.resized(change)
    elif change.kind == "drain":
        scene.ranks = [rank for rank in scene.ranks if rank not in slots]
        scene.drained += slots
    strikes = [_blow(name, strike, chooser, scene) for strike in change.strikes]
    return Planned(
        step=name,
        does=change.words,
        victims=(*victims, *(victim for strike in strikes for victim in strike.victims)),
        needs=tuple(dict.fromkeys(need for strike in strikes for need in strike.needs)),
        refused=next((strike.refused for strike in strikes if strike.refused), ""),
    )


def needs_of(blow: Blow) -> tuple[str, ...]:
    """What a fault needs of the machine or the cluster."""
    return tuple(dict.fromkeys((*((CHAOS,) if blow.at else ()), *FAULTS[blow.fault].needs)))

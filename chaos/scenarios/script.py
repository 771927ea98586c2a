"""What a scenario is: steps, and what must hold in the end. What exists is valid: ConfigError says what is not.

The vocabulary is small: faults are those of the catalogue (`chaos/faults/catalogue.py`), victims are roles or ranks
by name or by rule (`victims.py`), changes are those of `elastic scale|drain|undrain|unquarantine`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Literal

import msgspec

from chaos.faults.catalogue import FAULTS
from chaos.scenarios.victims import RULES, is_rank
from chaos.workload.streams import Load, Positive
from membership.base.errors import ConfigError
from membership.base.failpoint_catalogue import POINTS
from membership.store.records import Phase

STATES = {
    "serving": "requests are answered",
    "whole": "every rank that is wanted serves, and nothing else goes on",
    "streaming": "every stream has brought a token since the wait began",
    "degraded": "a rank is missing, no expert is",
    "uncovered": "an expert has no live replica",
}
PHASES = tuple(phase.value for phase in Phase if phase not in (Phase.PROPOSED, Phase.READY))
ENDS = ("done", "aborted", "any")
SIZE = re.compile(r"\d+( more| fewer)?|back")
BACK = "back"  # to the size that the cluster had, or of what this run has drained
CHAOS = "--chaos"  # the flag of `elastic serve` without which no failpoint can be armed
WAIT_S = 60.0
CHANGE_S = 90.0

Text = Annotated[str, msgspec.Meta(min_length=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]


def near(word: str, allowed: Iterable[str]) -> str:
    """What was probably meant, and what there is."""
    choices = tuple(allowed)
    close = get_close_matches(word, choices, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"there are: {', '.join(choices)}"


def require(found: str, allowed: Iterable[str], what: str) -> None:
    """ConfigError unless `found` is one of the allowed words."""
    choices = tuple(allowed)
    if found not in choices:
        raise ConfigError(f"{what} cannot be {found!r}", hint=near(found, choices))


def require_rank(victim: str) -> None:
    """ConfigError unless it is a rank, by number or by rule."""
    if not is_rank(victim):
        raise ConfigError(f"{victim!r} is no rank", hint=near(victim, (f"rank {rule}" for rule in ("N", *RULES))))


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of everything in a scenario."""


class Inject(Part, frozen=True, kw_only=True, tag="inject"):
    """One fault for each of its victims, one right after the other."""

    fault: str
    victims: tuple[str, ...]
    params: dict[str, Any] = msgspec.field(name="with", default_factory=dict)
    for_s: float = msgspec.field(name="for", default=0.0)  # then it is healed; 0: by a later `heal`, or at the end
    at: str = ""  # a failpoint: a process that comes there waits until the fault is injected

    def __post_init__(self) -> None:
        entry = FAULTS[self.fault]
        rules = tuple(f"rank {rule}" for rule in ("N", *RULES)) if "rank" in entry.victims else ()
        known = (*rules, *(each for each in entry.victims if each != "rank"))
        if not self.victims:
            raise ConfigError(f"{self.fault} has no victim", hint=near("", known))
        for victim in self.victims:
            if not ((is_rank(victim) and rules) or (victim in entry.victims and victim != "rank")):
                raise ConfigError(f"{self.fault} cannot happen to {victim!r}", hint=near(victim, known))
        for name in self.params:
            if name not in entry.params:
                raise ConfigError(f"`with` of {self.fault} has no {name!r}", hint=near(name, entry.params))
        name, _, rank = self.at.partition("@")
        if name:
            require(name, (*PHASES, *POINTS), "at")
        if rank and not rank.isdigit():
            raise ConfigError(f"at {self.at!r}: a rank is a number", hint="like rank.prepared@2")

    @property
    def needs(self) -> tuple[str, ...]:
        """What it needs of the machine or the cluster."""
        return tuple(dict.fromkeys((*((CHAOS,) if self.at else ()), *FAULTS[self.fault].needs)))

    @property
    def words(self) -> str:
        """For people."""
        given = "".join(f" {name}={value}" for name, value in self.params.items())
        lasting = f" for {self.for_s:g} s" if self.for_s else ""
        return f"{f'at {self.at}: ' if self.at else ''}{self.fault} {', '.join(self.victims)}{given}{lasting}"


class Wait(Part, frozen=True, kw_only=True, tag="wait"):
    """Until a state, until an event of the cluster's history that came after the last action, or for some seconds."""

    state: str = ""
    event: str = ""
    fields: dict[str, Any] = {}  # which the event must have; `rank` may be "same"
    seconds: float = 0.0
    within_s: float = msgspec.field(name="within", default=WAIT_S)

    @property
    def words(self) -> str:
        """For people."""
        if self.seconds:
            return f"wait {self.seconds:g} s"
        wanted = "".join(f" {name}={value}" for name, value in self.fields.items())
        return f"wait until {self.state}" if self.state else f"wait for {self.event}{wanted}"


class Change(Part, frozen=True, kw_only=True, tag="change"):
    """An operation, followed to its end, perhaps with faults on its way."""

    kind: Literal["scale", "drain", "undrain"]
    size: str = ""  # of a scale: "6", "2 more", "1 fewer", "back"
    victims: tuple[str, ...] = ()  # of a drain or undrain
    faults: tuple[Inject, ...] = ()
    ends: str = "done"
    within_s: float = msgspec.field(name="within", default=CHANGE_S)

    def __post_init__(self) -> None:
        if self.kind == "scale" and not SIZE.fullmatch(self.size):
            raise ConfigError(f"scale cannot be to {self.size!r}", hint="write a number, `N more`, `N fewer` or back")
        for victim in self.victims:
            if not (self.kind == "undrain" and self.victims == (BACK,)):
                require_rank(victim)
        require(self.ends, ENDS, "ends")

    @property
    def words(self) -> str:
        """For people."""
        what = f"{self.kind} {self.size or ', '.join(self.victims)}"
        return "; ".join((what, *(fault.words for fault in self.faults)))

    def size_from(self, now: int, first: int) -> int:
        """How many ranks a scale is to, with `now` ranks wanted, and `first` at the start of the run."""
        number, _, how = self.size.partition(" ")
        if number == BACK:
            return first
        return now + int(number) if how == "more" else now - int(number) if how else int(number)


class Release(Part, frozen=True, kw_only=True, tag="unquarantine"):
    """End a quarantine."""

    victim: str

    def __post_init__(self) -> None:
        require_rank(self.victim)

    @property
    def words(self) -> str:
        """For people."""
        return f"unquarantine {self.victim}"


class Heal(Part, frozen=True, kw_only=True, tag="heal"):
    """Take back what can be taken back: one fault, or all."""

    fault: str = "all"

    def __post_init__(self) -> None:
        require(self.fault, ("all", *FAULTS), "heal")

    @property
    def words(self) -> str:
        """For people."""
        return f"heal {self.fault}"


Step = Inject | Wait | Change | Release | Heal


class Environment(Part, frozen=True, kw_only=True):
    """The cluster that a scenario starts for itself."""

    ranks: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    redundancy: Annotated[float, msgspec.Meta(ge=1)] = 2.0
    flags: tuple[str | int | float, ...] = ()  # more, of `elastic serve`


class Expect(Part, frozen=True, kw_only=True):
    """The number of requests that this may happen to, at most."""

    lost: Count | Literal["any"] = 0  # admitted, and not answered to the end
    duplicated: Count | Literal["any"] = 0
    altered: Count | Literal["any"] = 0
    non_2xx: Count | Literal["any"] = 0  # refused


class Scenario(Part, frozen=True, kw_only=True):
    """A whole file."""

    name: Text
    about: Text
    steps: tuple[Step, ...]
    cluster: Environment = Environment()
    load: Load = Load()
    seed: Count = 0
    expect: Expect = Expect()
    repeat: Positive = 1

    @property
    def faults(self) -> tuple[Inject, ...]:
        """All faults, also those on the way of changes."""
        of_steps = (step.faults if isinstance(step, Change) else (step,) for step in self.steps)
        return tuple(fault for some in of_steps for fault in some if isinstance(fault, Inject))

    def numbered(self, turn: int) -> Iterable[tuple[str, Step]]:
        """The steps of one round, each with its name: "2", or "3.2" in the third of several rounds."""
        prefix = f"{turn}." if self.repeat > 1 else ""
        return ((f"{prefix}{number}", step) for number, step in enumerate(self.steps, start=1))

"""What a scenario is, once its file is read (`reading.py`): steps, and what must hold in the end.

The vocabulary is small: faults are those of the catalogue (`chaos/faults/catalogue.py`), victims are roles or ranks
by name or by rule (`victims.py`), changes are those of `elastic scale|drain|undrain|unquarantine`.
"""

from __future__ import annotations

from typing import Any

import msgspec

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
BACK = "back"  # to the size that the cluster had, or of what this run has drained
WAIT_S = 60.0
CHANGE_S = 90.0


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything in a scenario."""


class Blow(Part, frozen=True, kw_only=True):
    """One fault for each of its victims, dealt one right after the other."""

    fault: str
    victims: tuple[str, ...]
    params: dict[str, Any] = {}
    for_s: float = 0.0  # then it is taken back; 0: by a later `heal`, or at the end
    at: str = ""  # a failpoint: whoever comes there waits until the blow has fallen

    @property
    def words(self) -> str:
        """For people."""
        given = "".join(f" {name}={value}" for name, value in self.params.items())
        lasting = f" for {self.for_s:g} s" if self.for_s else ""
        return f"{f'at {self.at}: ' if self.at else ''}{self.fault} {', '.join(self.victims)}{given}{lasting}"


class Wait(Part, frozen=True, kw_only=True):
    """Until a state, until an event of the cluster's history that came after the last deed, or for some seconds."""

    state: str = ""
    event: str = ""
    fields: dict[str, Any] = {}  # which the event must have; `rank` may be a victim's name
    seconds: float = 0.0
    within_s: float = WAIT_S

    @property
    def words(self) -> str:
        """For people."""
        if self.seconds:
            return f"wait {self.seconds:g} s"
        wanted = "".join(f" {name}={value}" for name, value in self.fields.items())
        return f"wait until {self.state}" if self.state else f"wait for {self.event}{wanted}"


class Change(Part, frozen=True, kw_only=True):
    """An operation, followed to its end, perhaps with faults on its way."""

    kind: str  # scale | drain | undrain
    size: str = ""  # of a scale: "6", "2 more", "1 fewer", "back"
    victims: tuple[str, ...] = ()  # of a drain or undrain
    strikes: tuple[Blow, ...] = ()
    ends: str = "done"
    within_s: float = CHANGE_S

    @property
    def words(self) -> str:
        """For people."""
        what = f"{self.kind} {self.size or ', '.join(self.victims)}"
        return "; ".join((what, *(strike.words for strike in self.strikes)))

    def size_from(self, now: int, first: int) -> int:
        """How many ranks a scale is to, from so many now and so many at first."""
        number, _, how = self.size.partition(" ")
        if number == BACK:
            return first
        return now + int(number) if how == "more" else now - int(number) if how else int(number)


class Release(Part, frozen=True, kw_only=True):
    """End a quarantine."""

    victim: str

    @property
    def words(self) -> str:
        """For people."""
        return f"unquarantine {self.victim}"


class Heal(Part, frozen=True, kw_only=True):
    """Take back what can be taken back: one fault, or all."""

    fault: str = "all"

    @property
    def words(self) -> str:
        """For people."""
        return f"heal {self.fault}"


Step = Blow | Wait | Change | Release | Heal


class Bed(Part, frozen=True, kw_only=True):
    """The cluster that a scenario starts for itself."""

    ranks: int = 4
    redundancy: float = 2.0
    flags: tuple[str, ...] = ()  # more, of `elastic serve`


class Load(Part, frozen=True, kw_only=True):
    """Requests under way at a time, how long their answers are, and of how many prompts they are."""

    streams: int = 8
    max_tokens: int = 64
    prompts: int = 8


class Expect(Part, frozen=True, kw_only=True):
    """At most so many requests; None: any number."""

    lost: int | None = 0  # admitted, and not answered to the end
    duplicated: int | None = 0
    altered: int | None = 0
    non_2xx: int | None = 0  # refused


class Scenario(Part, frozen=True, kw_only=True):
    """A whole file."""

    name: str
    about: str
    steps: tuple[Step, ...]
    cluster: Bed = Bed()
    load: Load = Load()
    seed: int = 0
    expect: Expect = Expect()
    repeat: int = 1

    @property
    def blows(self) -> tuple[Blow, ...]:
        """All faults, also those on the way of changes."""
        strikes = (step.strikes if isinstance(step, Change) else (step,) for step in self.steps)
        return tuple(blow for some in strikes for blow in some if isinstance(blow, Blow))

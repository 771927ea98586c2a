"""From a YAML file to a scenario. Whatever is wrong is said with the file, the step, and what there is instead."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer
import yaml

from chaos.faults.catalogue import FAULTS, Fault
from chaos.scenarios.script import (
    BACK,
    CHANGE_S,
    ENDS,
    PHASES,
    STATES,
    WAIT_S,
    Bed,
    Blow,
    Change,
    Expect,
    Heal,
    Load,
    Release,
    Scenario,
    Step,
    Wait,
)
from chaos.scenarios.victims import RULES
from elastic.cli.flags import seconds
from membership.base.errors import ConfigError
from membership.base.failpoint_catalogue import POINTS

LIBRARY = Path(__file__).parent
CHANGES = ("scale", "drain", "undrain")
VERBS = ("wait", *CHANGES, "unquarantine", "heal")
SIZE = re.compile(r"\d+( more| fewer)?|back")
MOST_RANKS = 64


def library() -> tuple[Scenario, ...]:
    """The scenarios that come with the suite, by name."""
    return tuple(read(path) for path in sorted(LIBRARY.glob("*.yaml")))


def find(name: str) -> Scenario:
    """The scenario of the library with this name, or the one in this file."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return read(path)
    known = [each.stem for each in sorted(LIBRARY.glob("*.yaml"))]
    if name not in known:
        raise ConfigError(f"there is no scenario {name!r}", hint=f"{_near(name, known)}; or name a .yaml file")
    return read(LIBRARY / f"{name}.yaml")


def read(path: Path) -> Scenario:
    """The scenario in a file; ConfigError says what is wrong with it, and where."""
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint="see: elastic-chaos scenarios") from error
    return parse(text, path.name)


def parse(text: str, name: str) -> Scenario:
    """The scenario in a text; `name` is for errors."""
    at = _Place(name)
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise at.wrong(f"is no YAML: {' '.join(str(error).split())}") from error
    top = at.mapping(found, ("name", "about", "cluster", "load", "seed", "steps", "expect", "repeat"))
    for needed in ("name", "about", "steps"):
        if needed not in top:
            raise at.wrong(f"{needed!r} is missing")
    steps = top["steps"]
    if not isinstance(steps, list) or not steps:
        raise at.wrong("'steps' must be a list of at least one step")
    return Scenario(
        name=at.text(top["name"], "name"),
        about=at.text(top["about"], "about"),
        cluster=_bed(at, top.get("cluster", {})),
        load=_load(at, top.get("load", {})),
        seed=at.number(top.get("seed", 0), "seed"),
        steps=tuple(_step(_Place(f"{name}: step {number}"), step) for number, step in enumerate(steps, start=1)),
        expect=_expect(at, top.get("expect", {})),
        repeat=at.number(top.get("repeat", 1), "repeat", least=1),
    )


@dataclass(frozen=True)
class _Place:
    """Where in the file we are."""

    where: str

    def wrong(self, message: str, hint: str = "") -> ConfigError:
        return ConfigError(f"{self.where}: {message}", hint=hint)

    def mapping(self, found: Any, allowed: Collection[str], what: str = "a scenario") -> Mapping[str, Any]:
        if not isinstance(found, dict):
            raise self.wrong(f"{what} must be a mapping, not {found!r}", f"keys: {', '.join(allowed)}")
        for key in found:
            if key not in allowed:
                raise self.wrong(f"{what} has no {key!r}", _near(str(key), allowed))
        return found

    def text(self, found: Any, what: str) -> str:
        if not isinstance(found, str) or not found.strip():
            raise self.wrong(f"{what} must be a text, not {found!r}")
        return " ".join(found.split())

    def number(self, found: Any, what: str, least: int = 0) -> int:
        if not isinstance(found, int) or isinstance(found, bool) or found < least:
            raise self.wrong(f"{what} must be a whole number of at least {least}, not {found!r}")
        return found

    def seconds(self, found: Any, what: str) -> float:
        try:
            length = seconds(str(found))
        except typer.BadParameter as error:
            raise self.wrong(f"{what}: {error.message}") from error
        if not length:
            raise self.wrong(f"{what} must be longer than 0")
        return length

    def one_of(self, found: Any, allowed: Iterable[str], what: str) -> str:
        choices = tuple(allowed)
        if found not in choices:
            raise self.wrong(f"{what} cannot be {found!r}", _near(str(found), choices))
        return str(found)


def _near(word: str, allowed: Iterable[str]) -> str:
    """What was probably meant, and what there is."""
    choices = tuple(allowed)
    close = get_close_matches(word, choices, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"there are: {', '.join(choices)}"


def _bed(at: _Place, found: Any) -> Bed:
    given = at.mapping(found, ("ranks", "redundancy", "flags"), "cluster")
    redundancy = given.get("redundancy", 2.0)
    if not isinstance(redundancy, int | float) or redundancy < 1:
        raise at.wrong(f"redundancy must be a number of at least 1, not {redundancy!r}")
    flags = given.get("flags", [])
    if not isinstance(flags, list):
        raise at.wrong(f"flags must be a list of words, not {flags!r}", 'like ["--spares", 1]')
    ranks = at.number(given.get("ranks", 4), "ranks", least=1)
    if ranks > MOST_RANKS:
        raise at.wrong(f"ranks cannot be more than {MOST_RANKS}")
    return Bed(ranks=ranks, redundancy=float(redundancy), flags=tuple(str(flag) for flag in flags))


def _load(at: _Place, found: Any) -> Load:
    given = at.mapping(found, Load.__struct_fields__, "load")
    return Load(**{name: at.number(value, name, least=1) for name, value in given.items()})


def _expect(at: _Place, found: Any) -> Expect:
    given = at.mapping(found, Expect.__struct_fields__, "expect")
    return Expect(**{n: None if value == "any" else at.number(value, n) for n, value in given.items()})


def _step(at: _Place, found: Any) -> Step:
    verbs = (*VERBS, *FAULTS)
    if not isinstance(found, dict):
        raise at.wrong(f"a step is a mapping, like `kill: rank any`, not {found!r}")
    named = [key for key in found if key in verbs]
    if len(named) != 1:
        extra = [str(key) for key in found if key not in verbs]
        if named or not extra:
            raise at.wrong(f"a step does one thing, not {', '.join(named) or 'nothing'}", "write one step for each")
        raise at.wrong(f"there is nothing called {extra[0]!r} to do", _near(extra[0], verbs))
    (verb,) = named
    if verb in FAULTS:
        return _blow(at, verb, found)
    if verb in CHANGES:
        return _change(at, verb, found)
    given = at.mapping(found, (verb, "within") if verb == "wait" else (verb,), verb)
    if verb == "wait":
        return _wait(at, given)
    if verb == "heal":
        return Heal(fault=at.one_of(given[verb], ("all", *FAULTS), verb))
    return Release(victim=_rank(at, given[verb]))


def _blow(at: _Place, fault: str, found: Any) -> Blow:
    given = at.mapping(found, (fault, "with", "for", "at"), fault)
    entry = FAULTS[fault]
    params = at.mapping(given.get("with", {}), tuple(entry.params), f"`with` of {fault}")
    named = given[fault] if isinstance(given[fault], list) else [given[fault]]
    if not named:
        raise at.wrong(f"{fault} has no victim", _near("", _victims(entry)))
    point = given.get("at", "")
    if point:
        name, _, rank = str(point).partition("@")
        points = (*PHASES, *POINTS)
        at.one_of(name, points, "at")
        if rank and not rank.isdigit():
            raise at.wrong(f"at {point!r}: a rank is a number", "like rank.prepared@2")
    return Blow(
        fault=fault,
        victims=tuple(_victim(at, fault, entry, victim) for victim in named),
        params=dict(params),
        for_s=at.seconds(given["for"], "for") if "for" in given else 0.0,
        at=f"controller.after.{point}" if point in PHASES else str(point),
    )


def _victims(entry: Fault) -> tuple[str, ...]:
    """All that can be written as a victim of this fault."""
    rules = tuple(f"rank {rule}" for rule in ("N", *RULES)) if "rank" in entry.victims else ()
    return (*rules, *(each for each in entry.victims if each != "rank"))


def _victim(at: _Place, fault: str, entry: Fault, found: Any) -> str:
    known = _victims(entry)
    if isinstance(found, str) and (
        (found in known and found in entry.victims) or ("rank" in entry.victims and _is_rank(found))
    ):
        return found
    raise at.wrong(f"{fault} cannot befall {found!r}", _near(str(found), known))


def _is_rank(text: str) -> bool:
    kind, _, which = text.partition(" ")
    return kind == "rank" and (which in RULES or which.isdigit())


def _rank(at: _Place, found: Any) -> str:
    if isinstance(found, str) and _is_rank(found):
        return found
    raise at.wrong(f"{found!r} is no rank", _near(str(found), (f"rank {rule}" for rule in ("N", *RULES))))


def _change(at: _Place, kind: str, found: Any) -> Change:
    given = at.mapping(found, (kind, "strike", "ends", "within"), kind)
    strikes = given.get("strike", [])
    size, victims = "", tuple[str, ...]()
    if kind == "scale":
        size = str(given[kind])
        if not SIZE.fullmatch(size):
            raise at.wrong(f"scale cannot be to {given[kind]!r}", "write a number, `N more`, `N fewer` or back")
    elif kind == "undrain" and given[kind] == BACK:
        victims = (BACK,)
    else:
        named = given[kind] if isinstance(given[kind], list) else [given[kind]]
        victims = tuple(_rank(at, victim) for victim in named)
    return Change(
        kind=kind,
        size=size,
        victims=victims,
        strikes=tuple(_strike(at, each) for each in (strikes if isinstance(strikes, list) else [strikes])),
        ends=at.one_of(given.get("ends", "any" if strikes else "done"), ENDS, "ends"),
        within_s=at.seconds(given.get("within", CHANGE_S), "within"),
    )


def _strike(at: _Place, found: Any) -> Blow:
    if not isinstance(found, dict) or "at" not in found:
        raise at.wrong(f"a strike needs to say `at` which phase or failpoint, not {found!r}", _near("", PHASES))
    step = _step(at, found)
    if not isinstance(step, Blow):
        raise at.wrong(f"a strike is a fault, not {step.words!r}", _near("", FAULTS))
    return step


def _wait(at: _Place, given: Mapping[str, Any]) -> Wait:
    wanted = given["wait"]
    within_s = at.seconds(given.get("within", WAIT_S), "within")
    if isinstance(wanted, dict):
        if not isinstance(wanted.get("event"), str):
            raise at.wrong("a wait that is a mapping must name its `event`", "like {event: rank_masked, rank: same}")
        fields = {str(name): value for name, value in wanted.items() if name != "event"}
        return Wait(event=wanted["event"], fields=fields, within_s=within_s)
    if wanted in STATES:
        return Wait(state=str(wanted), within_s=within_s)
    if isinstance(wanted, str) and not wanted[:1].isdigit():
        raise at.wrong(f"nobody can wait for {wanted!r}", _near(wanted, (*STATES, "{event: …}", "2s")))
    return Wait(seconds=at.seconds(wanted, "wait"))

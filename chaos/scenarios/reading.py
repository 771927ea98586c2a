"""From a YAML file to a scenario. Whatever is wrong is said with the file, the step, the field, and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import typer

from chaos.faults.catalogue import FAULTS
from chaos.scenarios.script import PHASES, STATES, Environment, Expect, Scenario, Step, near
from chaos.workload.streams import Load
from elastic.cli.flags import seconds
from membership.base.errors import ConfigError

LIBRARY = Path(__file__).parent
CHANGES = ("scale", "drain", "undrain")
RENAMED = {"strike": "faults"}  # keys of older scenario files -> their names now
VERBS = {  # what a step may do -> its other keys; every fault is one, too
    "wait": ("within",),
    **dict.fromkeys(CHANGES, ("faults", "ends", "within")),
    "unquarantine": (),
    "heal": (),
    **dict.fromkeys(FAULTS, ("with", "for", "at")),
}
SECTIONS: dict[str, type[msgspec.Struct]] = {"cluster": Environment, "load": Load, "expect": Expect}


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
        raise ConfigError(f"there is no scenario {name!r}", hint=f"{near(name, known)}; or name a .yaml file")
    return read(LIBRARY / f"{name}.yaml")


def read(path: Path) -> Scenario:
    """The scenario in a file; ConfigError says what is wrong with it, and where."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint="see: elastic-chaos scenarios") from error
    return parse(text, path.name)


def parse(text: str, name: str) -> Scenario:
    """The scenario in a text; `name` is for errors."""
    with _placed(name):
        top = _top(text)
        steps = top.pop("steps", None)
        scenario = msgspec.convert({**top, "steps": ()}, Scenario)
        if not isinstance(steps, list) or not steps:
            raise ConfigError("`steps` must be a list of at least one step")
    return msgspec.structs.replace(
        scenario, steps=tuple(_step(f"{name}: step {number}", step) for number, step in enumerate(steps, start=1))
    )


def _top(text: str) -> dict[str, Any]:
    try:
        found = msgspec.yaml.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigError(f"is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"a scenario must be a mapping, not {found!r}", hint=_keys(Scenario))
    return {key: " ".join(value.split()) if isinstance(value, str) else value for key, value in found.items()}


@contextmanager
def _placed(where: str) -> Iterator[None]:
    """Say where in the file an error is."""
    try:
        yield
    except msgspec.ValidationError as error:
        raise _in_words(where, str(error)) from error
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}", hint=error.hint) from error


def _in_words(where: str, error: str) -> ConfigError:
    """What msgspec says (message - at `$.section.field`), with the field first and the keys that there are."""
    message, _, at = error.partition(" - at ")
    path = at.strip("`").removeprefix("$").removeprefix(".")
    if unknown := re.search(r"unknown field `(.*)`", message):
        section = SECTIONS.get(path, Scenario)
        return ConfigError(f"{where}: {path or 'a scenario'} has no {unknown[1]!r}", hint=_keys(section, unknown[1]))
    return ConfigError(f"{where}: {path}{': ' if path else ''}{message[0].lower()}{message[1:]}")


def _keys(section: type[msgspec.Struct], word: str = "") -> str:
    return near(word, section.__struct_encode_fields__)


# --- steps: a mapping whose one verb says which struct it is


def _step(where: str, found: Any) -> Step:
    with _placed(where):
        step: Step = msgspec.convert(_tagged(found), Step)
        return step


def _tagged(found: Any) -> dict[str, Any]:
    """A step as written -> the same with the tag of its struct and the fields of its verb."""
    if not isinstance(found, dict):
        raise ConfigError(f"a step is a mapping, like `kill: rank any`, not {found!r}")
    named = [key for key in found if key in VERBS]
    if len(named) != 1:
        extra = [str(key) for key in found if key not in VERBS]
        if named or not extra:
            said = ", ".join(named) or "nothing"
            raise ConfigError(f"a step does one thing, not {said}", hint="write one step for each")
        raise ConfigError(f"there is nothing called {extra[0]!r} to do", hint=near(extra[0], VERBS))
    (verb,) = named
    options: dict[Any, Any] = {RENAMED.get(key, key): value for key, value in found.items() if key != verb}
    for key in options:
        if key not in VERBS[verb]:
            raise ConfigError(f"{verb} has no {key!r}", hint=near(str(key), (verb, *VERBS[verb])))
    for key in {"for", "within"} & options.keys():
        options[key] = _seconds(options[key], key)
    if verb in CHANGES:
        return _change(verb, found[verb], options)
    if verb in FAULTS:
        at = options.get("at")
        options |= {"at": f"controller.after.{at}"} if at in PHASES else {}
        return {"type": "inject", "fault": verb, "victims": _listed(found[verb]), **options}
    if verb == "wait":
        return {"type": "wait", **_wait(found[verb]), **options}
    return {"type": verb, "fault" if verb == "heal" else "victim": found[verb]}


def _change(kind: str, found: Any, options: dict[str, Any]) -> dict[str, Any]:
    faults = _listed(options.pop("faults", []))
    for fault in faults:
        if not isinstance(fault, dict) or "at" not in fault:
            raise ConfigError(
                f"a fault of a change needs `at`, a phase or a failpoint: {fault!r}", hint=near("", PHASES)
            )
        if not FAULTS.keys() & fault.keys():
            raise ConfigError(f"a change can only have faults, not {fault!r}", hint=near("", FAULTS))
    what = {"size": str(found)} if kind == "scale" else {"victims": _listed(found)}
    ends = "any" if faults else "done"
    return {
        "type": "change",
        "kind": kind,
        "ends": ends,
        "faults": [_tagged(each) for each in faults],
        **what,
        **options,
    }


def _wait(wanted: Any) -> dict[str, Any]:
    if isinstance(wanted, dict):
        if not isinstance(wanted.get("event"), str):
            hint = "like {event: rank_masked, rank: same}"
            raise ConfigError("a wait that is a mapping must name its `event`", hint=hint)
        return {"event": wanted["event"], "fields": {key: value for key, value in wanted.items() if key != "event"}}
    if wanted in STATES:
        return {"state": wanted}
    if isinstance(wanted, str) and not wanted[:1].isdigit():
        raise ConfigError(f"no step can wait for {wanted!r}", hint=near(wanted, (*STATES, "{event: …}", "2s")))
    return {"seconds": _seconds(wanted, "wait")}


def _seconds(found: Any, what: str) -> float:
    try:
        length = seconds(str(found))
    except typer.BadParameter as error:
        raise ConfigError(f"{what}: {error.message}") from error
    if not length:
        raise ConfigError(f"{what} must be longer than 0")
    return length


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]

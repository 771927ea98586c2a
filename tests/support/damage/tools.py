"""What damages are made of: finding a line of the record and changing it, and the table that they stand in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from chaos.record.record import AnyLine, Changed, Happened, Read
from tests.support.recorded_run import changed

Lines = list[AnyLine]
Damage = Callable[[Lines], object]
DAMAGES: dict[str, tuple[Damage, str, str, str]] = {}


def damage(title: str, what: str, quoted: str = "") -> Callable[[Damage], Damage]:
    """Registers a way to damage the run: the check that must see it, its words, and what a quoted line must say."""

    def register(function: Damage) -> Damage:
        DAMAGES[function.__name__] = (function, title, what, quoted)
        return function

    return register


def at(lines: Lines, name: str, **wanted: Any) -> int:
    """Index of the first change of a key whose value has these fields (or that deletes it, for `deleted=True`)."""

    def fits(line: Changed) -> bool:
        if line.deleted or wanted.get("deleted"):
            return line.deleted == bool(wanted.get("deleted"))
        return all(line.value.get(field) == value for field, value in wanted.items())

    return changed(lines, name, fits)[0]


def put(lines: Lines, where: int, /, **fields: Any) -> None:
    """Change fields of a line's value."""
    line = lines[where]
    assert isinstance(line, Changed)
    lines[where] = replace(line, value={**line.value, **fields})


def put_view(lines: Lines, epoch: int, /, **fields: Any) -> None:
    """Change a view as it was staged and as it was committed."""
    put(lines, at(lines, "next", epoch=epoch), **fields)
    put(lines, at(lines, "view", epoch=epoch), **fields)


def put_operation(lines: Lines, name: str, **fields: Any) -> None:
    """Change an operation in every line about it."""
    for where in changed(lines, f"ops/{name}"):
        put(lines, where, **fields)


def view_of(lines: Lines, epoch: int) -> Any:
    line = lines[at(lines, "view", epoch=epoch)]
    assert isinstance(line, Changed)
    return line.value


def event(lines: Lines, kind: str, number: int = 0) -> int:
    return [i for i, line in enumerate(lines) if isinstance(line, Happened) and line.event.kind == kind][number]


def reads(lines: Lines) -> list[int]:
    return [i for i, line in enumerate(lines) if isinstance(line, Read)]

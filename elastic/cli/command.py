"""How a command is made: dataclasses of options become flags, and errors become one line on stderr.

A command takes an options dataclass (see `elastic/serve/options.py`) as if it were one parameter:

    @command
    def agent(options: AgentOptions) -> None: ...

Its flags are the dataclass's fields. Typer reads them from the signature that `command` puts together.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from elastic.cli.flags import seconds, size
from elastic.http_errors import message_of
from elastic.serve.options import Kind, Option, Stated, options_of
from membership.base.errors import ElasticError


def urls(text: str) -> tuple[str, ...]:
    """A comma-separated list; nothing given is an empty one."""
    return tuple(text.split(",")) if text else ()


def path(text: str) -> Path:
    """A path. One without a name is refused: it would be the current directory, as after an unset variable."""
    if not text:
        raise typer.BadParameter("it is empty; for the current directory, write .")
    return Path(text)


PARSERS: dict[Kind, Callable[[str], Any]] = {Kind.DURATION: seconds, Kind.SIZE: size, Kind.URLS: urls}
WaitTimeoutFlag = Annotated[float, Option(help="Maximum time to wait.")]


def as_text(kind: Kind | None, value: Any) -> Any:
    """A default as it would be written on the command line: the inverse of the parsers. None: there is none."""
    if value is None or value in ("", ()):
        return None
    if kind is Kind.DURATION:
        return f"{value / 60:g}m" if value >= 120 and value % 60 == 0 else f"{value:g}s"
    if kind is Kind.SIZE:
        unit = next((unit for unit in (40, 30, 20, 10) if value and value % (1 << unit) == 0), 0)
        return f"{value >> unit}{dict(zip((0, 10, 20, 30, 40), ('', 'kiB', 'MiB', 'GiB', 'TiB'), strict=True))[unit]}"
    return value


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a Typer command. Its flags come from options dataclasses, and from parameters annotated with an `Option`.

    They are checked; an ElasticError becomes one line on stderr.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, tuple[type[Any], tuple[Stated, ...]]] = {}
    single: list[Stated] = []
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        option = next((each for each in getattr(kind, "__metadata__", ()) if isinstance(each, Option)), None)
        if option is not None:
            single.append(Stated(parameter.name, kind.__origin__, parameter.default, False, option))
            parameters.append(_parameter(single[-1], None))
        elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
            groups[parameter.name] = kind, tuple(options_of(kind))
            panel = getattr(kind, "PANEL", None)
            parameters += [_parameter(stated, panel) for stated in groups[parameter.name][1]]
        else:
            by_name = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(annotation=kind, kind=by_name))

    @wraps(function)
    def run(**given: Any) -> None:
        try:
            for each in single:
                given[each.field] = each.checked(given[each.field])
            for name, (kind, stated) in groups.items():
                values = {each.field: given.pop(each.field) for each in stated}
                stated_values = {e.field: e.checked(values[e.field]) for e in stated if values[e.field] is not None}
                given[name] = kind(**stated_values)
            function(**given)
        except ElasticError as error:
            typer.echo(f"error: {message_of(error)}".replace("\n", " "), err=True)
            raise typer.Exit(1) from None

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def _parameter(stated: Stated, panel: str | None) -> inspect.Parameter:
    """An option as a parameter that Typer understands, in a panel of the help page."""
    option = stated.option
    metavar = "|".join(stated.choices) or stated.kind
    settings: dict[str, Any] = {"help": option.help, "envvar": option.env or None, "metavar": metavar}
    settings["rich_help_panel"] = panel
    if stated.kind is not None:
        settings["parser"] = PARSERS[stated.kind]
    elif stated.type in (Path, Path | None):
        settings.update(parser=path, metavar="PATH")
    flags = [f"{stated.flags[0]}/{option.off}"] if option.off else stated.flags
    info = typer.Argument(**settings) if option.argument else typer.Option(*flags, **settings)
    default = inspect.Parameter.empty if stated.required else as_text(stated.kind, stated.default)
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    plain = str if stated.kind is not None or stated.choices else stated.type
    plain = list[str] if plain == tuple[str, ...] else plain  # may be given several times
    return inspect.Parameter(stated.field, keyword_only, default=default, annotation=Annotated[plain, info])

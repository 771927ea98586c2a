"""A command takes a dataclass of options: each field is a flag, what is not given has the dataclass's default."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from elastic.cli.command import command
from elastic.serve.options import Kind, Option, check_options, option
from membership.base.enums import Dtype
from membership.base.errors import ConfigError

pytestmark = pytest.mark.unit


@dataclass(frozen=True, kw_only=True)
class Base:
    endpoints: tuple[str, ...] = option((), "Where.", kind=Kind.URLS, env="ELASTIC_TEST_URLS")


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    path: Path = field(metadata={"option": Option(argument=True, help="What.")})
    wait_s: float = option(90.0, "How long.")
    budget: int = option(1 << 20, "How much.", kind=Kind.SIZE, minimum=1)
    dtype: Dtype = option(Dtype.AUTO, "Of what type.")
    node: str = field(default_factory=lambda: "computed", metadata={"option": Option(help="On which node.")})
    name: tuple[str, ...] = option((), "Under which names.", env="ELASTIC_TEST_NAMES")
    port: int = option(0, "At which port.", minimum=0, maximum=65_535)
    secret: str = "not an option"


def run(*arguments: str, environment: dict[str, str] | None = None) -> tuple[int, list[Options], str]:
    got: list[Options] = []
    app = typer.Typer()

    @app.command()
    @command
    def go(options: Options, fail: Annotated[bool, typer.Option("--fail")] = False) -> None:
        got.append(options)
        if fail:
            raise ConfigError("no good", hint="do better")

    outcome = CliRunner().invoke(app, list(arguments), env=environment)
    return outcome.exit_code, got, outcome.output


def test_what_is_not_given_has_its_default() -> None:
    assert run("model") == (0, [Options(path=Path("model"))], "")


def test_what_is_given_is_parsed() -> None:
    code, got, _ = run(
        "m", "--wait", "2m", "--budget", "1GiB", "--endpoints", "a,b", "--node", "n", "--dtype", "float32"
    )
    wanted = Options(path=Path("m"), wait_s=120.0, budget=1 << 30, endpoints=("a", "b"), node="n", dtype=Dtype.FLOAT32)
    assert (code, got) == (0, [wanted])
    assert isinstance(got[0].dtype, Dtype)


def test_the_environment_stands_in_for_a_flag() -> None:
    assert run("m", environment={"ELASTIC_TEST_URLS": "a"})[1][0].endpoints == ("a",)


def test_a_flag_that_may_be_repeated() -> None:
    assert run("m", "--name", "a", "--name", "b,c")[1][0].name == ("a", "b,c")
    assert run("m", environment={"ELASTIC_TEST_NAMES": "a b"})[1][0].name == ("a", "b")
    assert run("m", "--name", "c", environment={"ELASTIC_TEST_NAMES": "a b"})[1][0].name == ("c",)


def test_help_shows_defaults_as_they_are_typed() -> None:
    _, _, shown = run("--help")
    assert "90s" in shown
    assert "1MiB" in shown
    assert "not an option" not in shown


@pytest.mark.parametrize("wrong", [("--wait", "soon"), ("--budget", "much"), ("--nope",)])
def test_what_cannot_be_read_is_a_usage_error(wrong: tuple[str, ...]) -> None:
    assert run("m", *wrong)[:2] == (2, [])


def test_an_error_is_one_line_and_exit_status_1() -> None:
    code, _, shown = run("m", "--fail")
    assert (code, shown) == (1, "error: no good (do better)\n")


def test_a_value_out_of_its_limits_is_refused_before_the_command_runs() -> None:
    assert run("m", "--budget", "0") == (1, [], "error: --budget 0: it must be at least 1\n")
    assert run("m", "--port", "70000") == (1, [], "error: --port 70000: it must be from 0 to 65535\n")
    choice = "error: --dtype int3: there is no such choice (choose one of "
    assert run("m", "--dtype", "int3")[2].startswith(choice)


def test_a_parameter_may_be_an_option_of_its_own() -> None:
    got: list[float] = []

    @command
    def go(ttl_s: Annotated[float, Option(help="How long.")] = 60.0) -> None:
        got.append(ttl_s)

    app = typer.Typer()
    app.command()(go)
    assert [CliRunner().invoke(app, each).exit_code for each in ([], ["--ttl", "2m"], ["--ttl", "soon"])] == [0, 0, 2]
    assert got == [60.0, 120.0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(path=Path("m"), budget=0), "--budget 0: it must be at least 1"),
        (Options(path=Path("m"), dtype="int3"), "--dtype int3"),  # type: ignore[arg-type]
    ],
)
def test_limits_are_checked(options: Options, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_options(options)
    check_options(Options(path=Path("m")))

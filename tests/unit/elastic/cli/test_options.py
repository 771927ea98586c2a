"""An option is stated once: command line, checks, stored defaults, Helm chart and docs agree with its definition."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest
import yaml

from docs.reference import (
    PAGE,
    SCHEMA,
    SECTIONS,
    VALUES,
    chart_options,
    chart_schema,
    chart_values,
    options_page,
    plain_default,
)
from elastic.cli.command import PARSERS, as_text
from elastic.cli.connection import Connection
from elastic.cli.main import app
from elastic.serve.options import AgentOptions, GatewayOptions, RoleOptions, ServeOptions, Stated, options_of
from membership.store.records import ClusterConfig
from tests.support import ROOT

pytestmark = pytest.mark.unit

ALL = [(kind, stated) for _, kind in SECTIONS for stated in options_of(kind)]


def test_the_page_of_options_is_as_written() -> None:
    assert (ROOT / PAGE).read_text() == options_page(), "run: make docs"


def test_the_chart_is_as_written() -> None:
    values, schema = (ROOT / VALUES).read_text(), (ROOT / SCHEMA).read_text()
    assert values == chart_values(values), "run: make docs"
    assert schema == chart_schema(schema), "run: make docs"


@pytest.mark.parametrize("stated", chart_options(), ids=lambda each: each.option.helm)
def test_a_value_of_the_chart_has_the_options_default_and_reaches_its_flag(stated: Stated) -> None:
    value: Any = yaml.safe_load((ROOT / VALUES).read_text())
    for key in stated.option.helm.split("."):
        value = value[key]
    assert stated.required or value == plain_default(stated)
    folder = ROOT / "helm" / "elastic-ep" / "templates"
    templates = "".join(path.read_text() for path in (folder / "statefulset.yaml", folder / "_pod.tpl"))
    assert f".Values.{stated.option.helm}" in templates
    assert stated.option.argument or f"{stated.flags[0]}=" in templates


@pytest.mark.parametrize(("kind", "stated"), ALL, ids=lambda each: getattr(each, "field", None))
def test_a_default_is_within_its_limits_and_can_be_typed(kind: type[Any], stated: Stated) -> None:
    if stated.required or stated.default is None:
        return
    stated.checked(stated.default)
    text = as_text(stated.kind, stated.default)
    if stated.kind is not None and text is not None:
        assert PARSERS[stated.kind](text) == stated.default


def test_what_is_stored_has_the_same_defaults() -> None:
    stored = {each.name: each.default for each in msgspec.structs.fields(ClusterConfig)}
    shared = [stated for stated in options_of(ServeOptions) if stated.field in stored and not stated.required]
    assert {"kv_blocks", "redundancy", "rebalance_bytes", "coverage_deadline_s"} <= {each.field for each in shared}
    differ = {each.field: each.default for each in shared if each.default != stored[each.field]}
    derived = {
        "cluster": "", "served_model_name": (), "max_model_len": None, "max_ranks": None, "gpu_exchange": None,
    }  # fmt: skip
    assert differ == derived, "only these depend on the model, on --ranks or on the GPUs"


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("serve", ServeOptions),
        ("agent", AgentOptions),
        ("engine", RoleOptions),
        ("controller", RoleOptions),
        ("gateway", GatewayOptions),
        ("status", Connection),
        ("scale", Connection),
        ("unquarantine", Connection),
    ],
)
def test_a_command_has_every_option_of_its_kind(command: str, kind: type[Any]) -> None:
    import typer.main

    parameters = typer.main.get_group(app).commands[command].params
    by_flag = {flag: each for each in parameters for flag in each.opts}
    for stated in options_of(kind):
        found = by_flag["model" if stated.option.argument else stated.flags[0]]
        assert found.envvar == (stated.option.env or None)
        assert stated.option.argument or getattr(found, "help", "") == stated.option.help


def test_the_page_does_not_speak_of_flags_that_are_not_there() -> None:
    flags = {flag for _, stated in ALL for flag in (*stated.flags, stated.option.off)}
    assert set(re.findall(r"--[a-z][a-z-]+", options_page())) <= flags

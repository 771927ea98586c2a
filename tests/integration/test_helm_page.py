"""The commands of docs/KUBERNETES.md: each is in the page's table with tests that are there, names objects that the
chart makes, and is rendered or parsed as it is written.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
import pytest
import typer.main

from elastic.cli.main import app
from tests.support import ROOT
from tests.support.chart import KUBERNETES, documents, helm, manifests, render_many

pytestmark = pytest.mark.integration

PAGE = (ROOT / "docs" / "KUBERNETES.md").read_text(encoding="utf-8")
RELEASE = "my-moe"
PROGRAMS = ("helm", "kubectl", "skopeo", "helm/image/build.sh")
MORE = "…"  # in the table: and what follows
OBJECTS = re.compile(rf"\b(statefulset|deployment|deploy|job|secret|pod)[ /]({RELEASE}[-a-z0-9]*)")
KINDS = {"deploy": "deployment", "secret": "Secret"}
BLOCK = re.compile(r"^```\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands() -> set[str]:
    """Those of the blocks, and those in the text that name something of the release or a node."""
    blocks = [line for block in BLOCK.findall(PAGE) for line in block.replace("\\\n", " ").splitlines()]
    rest = [line for line in BLOCK.sub("", PAGE).splitlines() if "|---" not in line and not line.startswith("| ")]
    inline = re.findall(r"`([^`]+)`", "\n".join(rest))
    named = [each for each in inline if re.search(rf"\b({RELEASE}|NODE)\b", each)]
    cells = re.findall(r"`([^`]+)`", "\n".join(line for line in PAGE.splitlines() if line.startswith("| `")))
    found = (" ".join(each.partition(" #")[0].split()) for each in (*blocks, *named, *cells))
    return {each for each in found if each.split(" ")[0] in PROGRAMS and len(each.split()) > 2}


def table() -> dict[str, str]:
    """Command, or how it begins, and by what it is tested."""
    [section] = re.findall(r"^## Each command of this page.*?^## ", PAGE, re.DOTALL | re.MULTILINE)
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {cells[-3].strip("`"): cells[-1] for cells in rows if cells[-3].startswith("`")}


def in_table(command: str) -> list[str]:
    beginnings = (each.removesuffix(MORE) for each in table())
    return [each for each in beginnings if command.startswith(each)]


def test_each_command_is_in_the_table_and_each_of_the_table_is_complete_or_on_the_page() -> None:
    found = commands()
    assert len(found) >= 15
    assert [each for each in found if not in_table(each)] == []
    shortened = {each.removesuffix(MORE) for each in table() if each.endswith(MORE)}
    assert [each for each in shortened if not any(command.startswith(each) for command in found)] == []


def test_each_test_that_is_named_is_there() -> None:
    for command, by in table().items():
        tests = re.findall(r"`(tests/[^`:]+)::(\w+)`", by)
        assert tests or by == "by hand", command
        for path, name in tests:
            functions = [
                each for each in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(each, ast.FunctionDef)
            ]
            assert name in {each.name for each in functions}, (command, path, name)


def made() -> Iterator[dict[str, Any]]:
    """By the chart, with one pod and with many."""
    yield from manifests(release=RELEASE)
    yield from render_many(release=RELEASE).values()
    yield from render_many("etcd.endpoints=null", release=RELEASE).values()


def test_each_object_that_is_named_is_made_by_the_chart() -> None:
    there = {(each["kind"].lower(), each["metadata"]["name"]) for each in made()}
    places = ("", "etcd-", "agents-")  # of StatefulSets
    there |= {("pod", f"{RELEASE}-{place}{n}") for place in places for n in range(3 if place == "etcd-" else 2)}
    named = {(KINDS.get(kind, kind), name) for each in commands() | {*table()} for kind, name in OBJECTS.findall(each)}
    assert len(named) >= 5
    assert {each for each in named if each[0] != "Secret"} - there == set()


@pytest.mark.parametrize(
    "command", [each for each in sorted(commands()) if each.startswith(("helm install", "helm upgrade"))]
)
def test_each_command_of_helm_renders_what_kubernetes_takes(command: str) -> None:
    _, _, name, chart, *flags = shlex.split(command)
    if "--reuse-values" in flags:  # those of the install with many pods
        flags.remove("--reuse-values")
        [install] = [each for each in commands() if each.startswith("helm install") and "values-many" in each]
        flags = shlex.split(install)[4:] + flags
    files = [str(ROOT / each) if each.startswith("helm/") else each for each in (chart, *flags)]
    outcome = helm("template", name, *files, "--kube-version", KUBERNETES)
    assert outcome.returncode == 0, outcome.stderr
    for each in documents(outcome.stdout):
        if not each["apiVersion"].startswith("monitoring."):  # the operator's: their schemas are not Kubernetes'
            kubernetes_validate.validate(each, KUBERNETES, strict=True)


def test_what_is_run_in_a_pod_is_a_command_of_ours() -> None:
    ours = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    inside = [each.partition(" -- elastic ")[2].split() for each in commands() if " -- elastic " in each]
    assert {each[0] for each in inside} >= {"status", "scale"}
    for name, *arguments in inside:
        ours[name].make_context(name, arguments)

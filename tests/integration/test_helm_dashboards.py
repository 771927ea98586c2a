"""The chart's dashboards: ConfigMaps that Grafana's sidecar reads, whose queries name what a gateway exports, with
labels that are there; and each metric is on one of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from docs.dashboards import boards
from tests.support import ROOT
from tests.support.chart import KUBERNETES, manifests
from tests.support.promql import groupings, parsed, selectors
from tests.support.recorded_metrics import Recorder, names

pytestmark = pytest.mark.integration

DASHBOARDS = "monitoring.dashboards=true"
SUFFIX = re.compile("_(bucket|sum|count)$")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Each metric with its labels."""
    recorder = Recorder(tmp_path_factory.mktemp("metrics"))
    recorder.past()
    recorder.record(1, Recorder.answer)
    return names(recorder.recording)


def config_maps() -> list[dict[str, Any]]:
    return [each for each in manifests(DASHBOARDS) if each["kind"] == "ConfigMap"]


def dashboards() -> dict[str, dict[str, Any]]:
    """By title."""
    texts = [text for each in config_maps() for text in each["data"].values()]
    return {each["title"]: each for each in map(json.loads, texts)}


def queries() -> list[tuple[str, str, str]]:
    """Panel, query and legend; Grafana's variables are put in."""
    return [
        (panel["title"], target["expr"].replace("$__rate_interval", "5m"), target["legendFormat"])
        for board in dashboards().values()
        for panel in board["panels"]
        for target in panel["targets"]
    ]


def test_they_are_those_that_make_docs_writes() -> None:
    for path, text in boards():
        assert (ROOT / path).read_text() == text, f"run `make docs`: {path}"
    assert {path.name for path, _ in boards()} == {path.name for path in (ROOT / boards_folder()).iterdir()}


def boards_folder() -> Path:
    return next(path for path, _ in boards()).parent


def test_there_are_three_and_grafana_finds_them() -> None:
    assert set(dashboards()) == {"elastic-ep service", "elastic-ep cluster", "elastic-ep capacity"}
    for each in config_maps():
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert (
        len({each["metadata"]["name"] for each in config_maps()}) == len({b["uid"] for b in dashboards().values()}) == 3
    )
    long = [each for each in manifests(DASHBOARDS, release="a" * 53) if each["kind"] == "ConfigMap"]
    assert len({each["metadata"]["name"] for each in long}) == 3
    assert all(len(each["metadata"]["name"]) <= 63 for each in long)


def test_every_query_names_what_is_exported_with_labels_that_it_has(exported: dict[str, set[str]]) -> None:
    for panel, query, legend in queries():
        tree = parsed(query)
        for selector in selectors(tree):
            assert {each.name for each in selector.matchers.matchers} == {"namespace", "job"}, panel
            known = exported[selector.name]
            assert set(groupings(tree)) <= known, (panel, query)
        assert set(re.findall(r"{{(\w+)}}", legend)) <= set(groupings(tree)), (panel, legend)


def test_each_metric_is_on_a_dashboard(exported: dict[str, set[str]]) -> None:
    shown = {SUFFIX.sub("", selector.name) for _, query, _ in queries() for selector in selectors(parsed(query))}
    assert {SUFFIX.sub("", name) for name in exported if not name.endswith("_created")} == shown


def test_panels_do_not_overlap_and_variables_are_defined() -> None:
    for title, board in dashboards().items():
        places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
        assert len(set(places)) == len(places), title
        assert len({panel["id"] for panel in board["panels"]}) == len(places)
        known = {each["name"] for each in board["templating"]["list"]} | {"__rate_interval"}
        assert set(re.findall(r"\$\{?(\w+)", json.dumps(board))) <= known, title

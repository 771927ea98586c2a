"""The chart's alerts: each fires when its trouble is there and stays silent while the cluster is well and busy, on what
a gateway's /metrics says then; each names what the product exports, and its runbook says what to do next.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from msgspec.structs import replace

from elastic.cli.main import app
from membership.store.records import HostLink, RankExit, View
from tests.support import ROOT
from tests.support.chart import manifests, render_many
from tests.support.cluster_states import without
from tests.support.promql import Recording, fires, groupings, parsed, selectors
from tests.support.recorded_metrics import EVERY_S, SCRAPED, Recorder, names

pytestmark = pytest.mark.integration

RUNBOOK = ROOT / "docs" / "RUNBOOK.md"
MINUTES = 18
PROMTOOL = shutil.which("promtool")
Change = Callable[[Recorder], None]


def rules(*settings: str) -> dict[str, Any]:
    """The spec of the rendered PrometheusRule."""
    [rule] = [each for each in manifests("monitoring.rules=true", *settings) if each["kind"] == "PrometheusRule"]
    spec: dict[str, Any] = rule["spec"]
    return spec


def alerts(*settings: str) -> dict[str, dict[str, Any]]:
    [group] = rules(*settings)["groups"]
    return {each["alert"]: each for each in group["rules"]}


def well(at: Recorder) -> None:
    """Requests come and are served, some of them at once and one rather late."""
    for first_token_s in (0.2, 0.3, 0.4, 4.0):
        at.answer(first_token_s=first_token_s)


def no_gateway(at: Recorder) -> None:
    at.state = None


def no_engine(at: Recorder) -> None:
    at.link.ready = False
    at.state = replace(at.state, engine=None, engine_status=None)


def stalled(at: Recorder) -> None:
    at.link.age_s = 31.0


def uncovered(at: Recorder) -> None:
    at.state = without(at.state, 0, 2)


def errors(at: Recorder) -> None:
    well(at)
    at.answer("error")


def shedding(at: Recorder) -> None:
    at.status(shed={"wait": int(at.now / EVERY_S)})


def queue(at: Recorder) -> None:
    at.status(waiting=1)


def slow_first_token(at: Recorder) -> None:
    at.answer(first_token_s=20.0)


def kv_full(at: Recorder) -> None:
    at.status(kv_usage=0.99)


def rank_missing(at: Recorder) -> None:
    at.state = without(at.state, 3)


def rank_set_aside(at: Recorder) -> None:
    at.state = without(at.state, 3, quarantined=True)


def rank_dying(at: Recorder) -> None:
    deaths = int(at.now / EVERY_S / 3)
    at.state = replace(at.state, exits={3: RankExit(rank=3, incarnation=1, reason="killed", at=1.0, restarts=deaths)})


def rank_slow(at: Recorder) -> None:
    at.status(slow=(1,))


def one_replica(at: Recorder) -> None:
    view = at.state.view
    placement = {rank: (((0, 1), (0, 1)), ((2, 3), (2, 3)))[rank] for rank in (0, 1)}
    members = tuple(each for each in view.members if each.rank < 2)
    desired = replace(at.state.desired, ranks=2, slots=(0, 1))
    at.state = replace(at.state, desired=desired, view=View(epoch=4, members=members, placement=placement))


def link_down(at: Recorder) -> None:
    beats = {node: replace(each, links={"m": HostLink(links=4, up=3)}) for node, each in at.state.heartbeats.items()}
    at.state = replace(at.state, heartbeats=beats)


SCENES: dict[str, tuple[Change, set[str]]] = {  # alert -> what makes it fire, and which others follow from that
    "ElasticEPDown": (no_gateway, set()),
    "ElasticEPNoEngine": (no_engine, {"ElasticEPQueue"}),
    "ElasticEPStalled": (stalled, set()),
    "ElasticEPUncovered": (uncovered, {"ElasticEPRanksMissing"}),
    "ElasticEPErrors": (errors, set()),
    "ElasticEPShedding": (shedding, set()),
    "ElasticEPQueue": (queue, set()),
    "ElasticEPSlowFirstToken": (slow_first_token, set()),
    "ElasticEPKVFull": (kv_full, set()),
    "ElasticEPRanksMissing": (rank_missing, {"ElasticEPOneReplica"}),
    "ElasticEPRankSetAside": (rank_set_aside, {"ElasticEPOneReplica"}),
    "ElasticEPRankDying": (rank_dying, set()),
    "ElasticEPRankSlow": (rank_slow, set()),
    "ElasticEPOneReplica": (one_replica, set()),
    "ElasticEPLinkDown": (link_down, set()),
}


def seconds(rule: dict[str, Any]) -> float:
    return 60.0 * float(rule.get("for", "0m").removesuffix("m"))


def fired(recording: Recording, times: list[float]) -> set[str]:
    return {name for name, rule in alerts().items() if fires(rule["expr"], seconds(rule), recording, times)}


def recorded(folder: Path, change: Change) -> tuple[Recording, list[float]]:
    """A scene from its first minute on."""
    recorder = Recorder(folder)

    def then(at: Recorder) -> None:
        if change is not well and at.now <= EVERY_S:
            well(at)
        change(at)

    times = recorder.record(MINUTES, then)
    return recorder.recording, times


def test_each_alert_is_silent_while_the_cluster_is_well_and_busy(tmp_path: Path) -> None:
    assert fired(*recorded(tmp_path, well)) == set()


@pytest.mark.parametrize("name", SCENES)
def test_an_alert_fires_when_its_trouble_is_there(name: str, tmp_path: Path) -> None:
    change, others = SCENES[name]
    assert fired(*recorded(tmp_path, change)) == {name} | others


def test_each_alert_has_a_scene() -> None:
    assert set(alerts()) == set(SCENES)


def test_one_replica_is_no_alert_where_it_is_meant_to_be() -> None:
    assert set(SCENES) - set(alerts("redundancy=1.5")) == {"ElasticEPOneReplica"}


def test_what_alerts_name_is_exported_with_these_labels(tmp_path: Path) -> None:
    exported = names(recorded(tmp_path, well)[0])
    for name, rule in alerts().items():
        tree = parsed(rule["expr"])
        for selector in selectors(tree):
            assert {each.name for each in selector.matchers.matchers} <= exported[selector.name], (name, selector.name)
            matched = {each.name: each.value for each in selector.matchers.matchers}
            assert (matched["namespace"], matched["job"]) == ("default", "demo"), "no other release's"
        known = set().union(*(exported[selector.name] for selector in selectors(tree)))
        assert set(groupings(tree)) <= known, name
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= set(groupings(tree)) | {*SCRAPED}


def test_the_runbook_says_of_each_alert_what_it_means_and_what_to_do() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    sections = re.split("^### ", RUNBOOK.read_text(), flags=re.MULTILINE)[1:]
    found = {title: body for title, _, body in (section.partition("\n") for section in sections)}
    assert list(found) == list(SCENES), "in the order of the alerts"
    for name, rule in alerts().items():
        assert rule["annotations"]["runbook_url"] == f"docs/RUNBOOK.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert "**Do:**" in found[name], name
        for command in re.findall("`elastic (\\w+)", found[name]):
            assert command in commands, (name, command)
    elsewhere = alerts("monitoring.runbook=https://wiki/runbook")
    assert elsewhere["ElasticEPDown"]["annotations"]["runbook_url"] == "https://wiki/runbook#elasticepdown"


def test_scrapes_are_of_the_services_port_where_metrics_are() -> None:
    settings = ("monitoring.serviceMonitor=true", "monitoring.labels.release=prometheus", "monitoring.interval=30s")
    for more in ((), ("api.tlsSecret=tls",)):
        by_kind = {each["kind"]: each for each in manifests(*settings, *more)}
        monitor, service = by_kind["ServiceMonitor"], by_kind["Service"]
        [endpoint] = monitor["spec"]["endpoints"]
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        assert (endpoint["port"], endpoint["path"]) == (service["spec"]["ports"][0]["name"], "/metrics")
        assert endpoint.get("scheme") == ("https" if more else None)
        assert (endpoint["interval"], service["metadata"]["name"]) == ("30s", SCRAPED["job"])
    assert not {"ServiceMonitor", "PodMonitor", "PrometheusRule", "ConfigMap"} & {each["kind"] for each in manifests()}


def test_with_many_pods_each_pod_that_has_metrics_is_scraped_once_and_as_of_the_same_job() -> None:
    made = list(render_many("monitoring.serviceMonitor=true").values())
    [monitor] = [each["spec"] for each in made if each["kind"] == "PodMonitor"]
    [endpoint] = monitor["podMetricsEndpoints"]
    [expression] = monitor["selector"]["matchExpressions"]
    assert (expression["key"], expression["operator"]) == ("app.kubernetes.io/component", "In")
    [by_service] = [each["spec"]["selector"] for each in made if each["kind"] == "Service"]
    for each in made:
        if each["kind"] not in ("Deployment", "StatefulSet", "Job"):
            continue
        pod = each["spec"]["template"]
        labels = pod["metadata"]["labels"]
        [container] = pod["spec"]["containers"]
        ports = {port["name"] for port in container.get("ports") or ()}
        found = monitor["selector"]["matchLabels"].items() <= labels.items()
        found = found and labels[expression["key"]] in expression["values"]
        assert found == (endpoint["port"] in ports), container["name"]
        assert not (found and by_service.items() <= labels.items()), "a ServiceMonitor has it, too"
    assert endpoint["path"] == "/metrics"
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": SCRAPED["job"]}]


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool: what follows is checked by tests/support/promql.py alone")
@pytest.mark.parametrize("name", ["", *SCENES])
def test_prometheus_itself_says_the_same(name: str, tmp_path: Path) -> None:
    """`promtool test rules` on the same series."""
    change, others = SCENES.get(name, (well, set()))
    recording, times = recorded(tmp_path, change)
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    series = [
        {
            "series": f"{metric}{{{','.join(f'{key}={value!r}' for key, value in labels)}}}".replace("'", '"'),
            "values": at,
        }
        for (metric, labels), samples in recording.items()
        for at in [" ".join(f"{dict(samples).get(when, '_')}" for when in (0.0, *times))]
    ]
    firing = [{"labels": f'{{alertname="{each}"}}', "value": 1} for each in ({name} | others) - {""}]
    query = {
        "expr": 'group by (alertname) (ALERTS{alertstate="firing"})', "eval_time": f"{MINUTES}m", "exp_samples": firing
    }  # fmt: skip
    case = {"interval": "1m", "input_series": series, "promql_expr_test": [query]}
    wanted = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(wanted))
    outcome = subprocess.run(
        [str(PROMTOOL), "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr

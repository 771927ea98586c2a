"""What `elastic doctor` says beforehand of deaths: from the planner alone, for ranks on one host or on several."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from elastic.cli.doctor import Finding, examine, foreign_packages, show_findings
from elastic.cli.main import app
from elastic.demo.model import write_demo_model
from elastic.serve.options import ServeOptions
from elastic.serve.supervisor import Supervisor
from membership.base.timing import TIMINGS
from tests.support.replaced_files import put_back, replace_text, replace_weights

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "demo-moe"
    write_demo_model(directory)
    return directory


def coverage(model: Path, ranks: int, redundancy: float, hosts: int = 1) -> Finding:
    (found,) = [f for f in examine(model, ranks, redundancy, hosts) if f.what == "coverage"]
    return found


def test_two_replicas_survive_a_rank_and_a_host(model: Path) -> None:
    found = coverage(model, 4, 2.0, hosts=2)
    assert found.level == "ok"
    assert "any one rank may die" in found.message
    assert "any one host may die" in found.message


def test_one_replica_does_not_and_it_says_what_would(model: Path) -> None:
    found = coverage(model, 4, 1.0)
    assert found.level == "warn"
    assert "the death of rank 0 or 1 or 2 or 3 leaves experts without a replica" in found.message
    assert found.hint.endswith("slots: --redundancy 2")


def test_hosts_of_unequal_size_need_more(model: Path) -> None:
    found = coverage(model, 3, 2.0, hosts=2)
    assert found.level == "warn"
    assert "any one rank may die" in found.message
    assert "host0 leaves experts without a replica" in found.message
    assert found.hint.endswith("slots: --redundancy 3")
    assert coverage(model, 3, 3.0, hosts=2).level == "ok"


def test_one_rank_needs_another(model: Path) -> None:
    assert coverage(model, 1, 2.0).hint == "add a rank"


def test_another_distribution_with_one_of_our_packages_is_a_failure() -> None:
    owners = {"elastic": ["elastic-ep", "elastic"], "workers": ["elastic-ep"], "numpy": ["numpy"]}
    (found,) = foreign_packages(owners)
    assert (found.what, found.level) == ("imports", "fail")
    assert "also installs elastic:" in found.message
    assert found.hint.startswith("pip uninstall elastic, then pip install --force-reinstall elastic-ep")


def test_one_finding_for_each_other_distribution() -> None:
    owners = {"elastic": ["a"], "workers": ["a", "b"], "chaos": ["elastic-ep"]}
    assert [(each.level, "workers, elastic" in each.message) for each in foreign_packages(owners)] == [
        ("fail", True),
        ("fail", False),
    ]


def test_packages_that_are_only_ours_are_ok() -> None:
    assert [each.level for each in foreign_packages({"elastic": ["elastic-ep", "elastic-ep"]})] == ["ok"]
    assert [each.level for each in examine(None, 4, 2.0) if each.what == "imports"] == ["ok"]


def test_findings_are_shown_word_for_word(capsys: pytest.CaptureFixture[str]) -> None:
    """Rich takes [embedded] for a style, [/models] for the end of one, and :key: for a picture."""
    message, hint = "no etcd in [/models]: :key:", "pip install 'elastic-ep[embedded]'"
    show_findings([Finding("etcd", "warn", message, hint)])
    assert capsys.readouterr().out == f"warn  etcd         {message}  -> {hint}\n"


def test_the_table_of_times() -> None:
    shown = CliRunner().invoke(app, ["doctor", "--timing"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert all(timing.name in shown.stdout for timing in TIMINGS)
    as_json = msgspec.json.decode(CliRunner().invoke(app, ["doctor", "--timing", "-o", "json"]).stdout)
    assert [(each["name"], each["value_s"]) for each in as_json] == [(each.name, each.value_s) for each in TIMINGS]
    assert all(each["purpose"] and each["used_in"] for each in as_json)


def test_files_that_were_replaced_since_the_cluster_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    checkpoint = tmp_path / "m"
    write_demo_model(checkpoint)

    def found() -> list[Finding]:
        return [each for each in examine(None, 4, 2.0) if each.what == "checkpoint"]

    assert found() == [], "no cluster is served"
    supervisor = Supervisor(ServeOptions(model=checkpoint, port=0, admin_port=0, state_dir=tmp_path / "state"))
    supervisor.state.claim()
    supervisor.state.publish(supervisor.address(()))
    try:
        assert [each.level for each in found()] == ["ok"]
        old = replace_weights(checkpoint)
        text = replace_text(checkpoint, "tokenizer.json", lambda text: text + " ")
        (finding,) = found()
        assert finding.level == "warn"
        assert f"model.safetensors, tokenizer.json in {checkpoint} changed" in finding.message
        assert "put the files back" in finding.hint
        put_back(old)
        put_back(text, as_copy=True)
        assert [each.level for each in found()] == ["ok"]
    finally:
        supervisor.state.release()

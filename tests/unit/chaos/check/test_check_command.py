"""`elastic-chaos check`: what it says, word for word (tests/golden/check), its exit status, and both kinds of files.

UPDATE_GOLDEN=1 writes the texts anew; look at the difference.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from chaos.check.checker import check_record
from chaos.check.evidence import Evidence
from chaos.check.faults import aftermaths
from chaos.cli.main import app
from chaos.faults.base import Injected
from chaos.record.record import Answered, AnyLine, Changed, Happened, InjectedFault, write
from chaos.workload.history import RequestRecord, save
from membership.base.events import Event
from tests.support import GOLDEN
from tests.support.damage import DAMAGES
from tests.support.recorded_run import START, good_lines, tokens

pytestmark = pytest.mark.unit

TRANSCRIPTS = GOLDEN / "check"
SHOWN = (
    "an_epoch_comes_twice", "a_deposed_leader_commits", "a_read_is_older_than_another", "a_death_moves_weights",
    "a_request_is_lost",
)  # fmt: skip


def checked(path: Path, *options: str) -> Any:
    return CliRunner().invoke(app, ["check", str(path), *options])


@pytest.mark.parametrize("name", SHOWN)
def test_the_explanation_is_as_it_was(name: str, tmp_path: Path) -> None:
    lines = list(good_lines())
    DAMAGES[name][0](lines)
    write(tmp_path / "record.jsonl", lines)
    outcome = checked(tmp_path / "record.jsonl")
    assert outcome.exit_code == 1
    golden = TRANSCRIPTS / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(outcome.output)
    assert outcome.output == golden.read_text()


def test_a_good_record_exits_0(tmp_path: Path) -> None:
    write(tmp_path / "record.jsonl", good_lines())
    outcome = checked(tmp_path / "record.jsonl", "-o", "json")
    assert outcome.exit_code == 0
    verdict = json.loads(outcome.output)
    assert verdict["ok"] is True
    assert {row["title"] for row in verdict["outcomes"]} >= {"commits", "linearizable", "requests", "coverage"}
    assert "every promise that could be checked held" in checked(tmp_path / "record.jsonl").output


def test_a_record_that_shows_nothing_proves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "record.jsonl", good_lines()[:1])
    outcome = checked(tmp_path / "record.jsonl")
    assert outcome.exit_code == 1
    assert "nothing was checked" in outcome.output
    assert "no evidence" in outcome.output


def test_a_history_of_the_older_kind_is_compared(tmp_path: Path) -> None:
    save(tmp_path / "good.json", [tokens(0)], {0: tokens(0)})
    assert checked(tmp_path / "good.json").exit_code == 0
    save(tmp_path / "bad.json", [tokens(0, ("a",))], {0: tokens(0)})
    outcome = checked(tmp_path / "bad.json")
    assert outcome.exit_code == 1
    assert "request 0 lost" in outcome.output


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text('{"line": "header"\n')
    assert "record.jsonl:1" in checked(path).stderr
    assert checked(tmp_path / "nowhere").exit_code == 1


# --- what is not promised is no violation, and nothing else is excused


def with_requests(*records: RequestRecord, others: tuple[AnyLine, ...] = ()) -> list[AnyLine]:
    return [*good_lines(), *(Answered(record=record) for record in records), *others]


def row(lines: list[AnyLine], title: str) -> Any:
    return next(row for row in check_record(lines).outcomes if row.title == title)


CUT = RequestRecord(prompt=0, id="cut", started=30.0, ended=31.0, tokens=("a",), token_times=(30.5,), error="reset")


def gateway_killed(at: float) -> InjectedFault:
    fault = Injected(fault="kill", victim="gateway", at=at, seen_at=at, proof="pidfd says gone", pid=9)
    return InjectedFault(fault=fault)


def test_a_stream_of_a_killed_gateway_is_excused() -> None:
    assert row(with_requests(CUT), "requests").figures["lost"] == 1
    assert row(with_requests(CUT, others=(gateway_killed(START + 30.7),)), "requests").figures["excused"] == 1
    assert row(with_requests(CUT, others=(gateway_killed(START + 40.0),)), "requests").figures["lost"] == 1
    other = replace(CUT, finish_reason="stop", error="", tokens=("a", "x", "c", "d"))
    assert row(with_requests(other, others=(gateway_killed(START + 30.7),)), "requests").figures["altered"] == 1


def test_a_request_that_waited_for_lost_experts_as_long_as_it_must_is_excused() -> None:
    def lost(began: float, ended: float) -> tuple[AnyLine, ...]:
        status = next(c for c in good_lines() if isinstance(c, Changed) and c.key.endswith("/engine-status"))
        return (
            replace(status, at=began, revision=101, value={**status.value, "uncovered": 4}),
            replace(status, at=ended, revision=102),
        )

    refused = replace(CUT, tokens=(), token_times=(), started=70.0, ended=101.0, error="HTTP 503: uncovered")
    long, short = lost(START + 69.0, START + 102.0), lost(START + 69.0, START + 80.0)
    assert row(with_requests(refused, others=long), "requests").figures["excused"] == 1
    assert row(with_requests(refused, others=short), "requests").figures["lost"] == 1


# --- what followed the faults


def test_what_followed_a_fault_is_measured() -> None:
    kill = next(line for line in good_lines() if isinstance(line, InjectedFault))
    since = kill.fault.at - START
    times = (since, since + 0.4, since + 0.41, since + 0.42)
    slow = replace(tokens(1), id="slow", started=since - 1.0, token_times=times)
    after = aftermaths(Evidence(with_requests(slow)))[0]
    assert (after.fault, after.victim, after.incarnation) == ("kill", "rank 1", 2)
    assert after.noticed_ms == pytest.approx(5.0)
    assert after.restored_ms == pytest.approx(310.0)
    assert after.pause_ms == pytest.approx(400.0)
    assert after.recovered_ms == -1.0  # no event says so


@pytest.mark.parametrize(("seen_at", "noticed_ms"), [(1.5, 500.0), (20.0, -1.0)])
def test_what_is_first_seen_long_after_a_fault_was_healed_is_not_of_it(seen_at: float, noticed_ms: float) -> None:
    stop = Injected(fault="stop", victim="etcd", at=START + 1.0, seen_at=START + 1.1, proof="stopped", pid=9)
    died = Event(ts=START + seen_at, role="supervisor", kind="etcd_died", epoch=0, fields={})
    (after,) = aftermaths(Evidence([InjectedFault(fault=stop, healed_at=START + 2.0), Happened(event=died)]))
    assert after.noticed_ms == pytest.approx(noticed_ms)


def test_of_two_engines_the_one_that_died_is_known_by_its_pid() -> None:
    kill = Injected(fault="kill", victim="engine", at=START + 1.0, seen_at=START + 1.1, proof="gone", pid=7)
    died = [
        Event(ts=START + at, role="supervisor", kind="role_died", epoch=0, fields={"name": name, "pid": pid})
        for at, name, pid in ((0.5, "engine", 5), (1.2, "engine-standby", 7), (9.0, "engine", 6))
    ]
    (after,) = aftermaths(Evidence([InjectedFault(fault=kill), *(Happened(event=event) for event in died)]))
    assert after.noticed_ms == pytest.approx(200.0)

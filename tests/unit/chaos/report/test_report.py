"""The report of a run: its figures are what the record says, to the millisecond, and its page is safe and alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from chaos.cli.main import app
from chaos.record.record import Answered, AnyLine, Changed, Expected, Verified, write
from chaos.report import Checked, figures, page
from chaos.report.charts import words
from chaos.report.faults import family
from tests.support.records import STARTED, answered, fault_at, happened, header, soak

pytestmark = pytest.mark.unit

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"


def killed() -> list[AnyLine]:
    """Two streams, one scale, and rank 1 dies at 1 s; it is noticed after 2 ms and whole again after 700 ms."""
    lines: list[AnyLine] = [header(ranks=2), fault_at(1.0, "kill", "rank 1", pid=42, proof="pidfd says gone")]
    for rank in (0, 1):
        for kind in ("rank_spawned", "rank_ready", "rank_attached", "rank_prepared"):
            lines.append(happened(-2.0, kind, "agent", rank=rank, incarnation=rank + 1))
    lines += [
        happened(-1.0, "epoch_committed", "controller", 1, ranks=[0, 1], reason="all are ready"),
        happened(-0.9, "epoch_adopted", "engine", 1, pause_ms=1.5),
        happened(1.002, "rank_masked", rank=1, incarnation=2, source="robust futex", requests=1),
        happened(1.010, "rank_died", "agent", rank=1, incarnation=2, detected_by="pidfd"),
        happened(1.050, "epoch_committed", "controller", 2, ranks=[0], reason="without rank 1"),
        happened(1.100, "rank_spawned", "agent", rank=1, incarnation=3),
        happened(1.105, "rank_died", "agent", rank=1, incarnation=2, detected_by="a late word of the old one"),
        happened(1.200, "rank_ready", "agent", rank=1, incarnation=3),
        happened(1.250, "rank_attached", "agent", rank=1, incarnation=3),
        happened(1.300, "rank_recovered", rank=1, ms=298.0),
        happened(1.600, "rank_prepared", "agent", rank=1, incarnation=3),
        happened(1.700, "epoch_committed", "controller", 3, ranks=[0, 1], reason="all are ready"),
        happened(1.750, "epoch_adopted", "engine", 3, pause_ms=20.0),
        *(
            happened(at, "operation_phase", "controller", operation="op", phase=phase, target=3)
            for at, phase in ((1.8, "spawning"), (1.85, "loading"), (1.9, "aborted"))
        ),
        Expected(record=answered(-5.0, [-4.9, -4.88, -4.86, -4.84])),
        Answered(record=answered(0.5, [0.6, 0.98, 1.38, 2.0])),
        Answered(record=answered(0.55, [0.65, 0.66, 0.67, 0.68])),
    ]
    return lines


def test_each_fault_has_what_followed_from_it() -> None:
    found = figures(killed())
    (fault,) = found.faults
    assert (fault.at, fault.proven_ms, fault.family, fault.proof) == (1.0, 20.0, "death", "pidfd says gone")
    assert (fault.noticed_ms, fault.noticed_by) == (2.0, "engine: rank_masked (robust futex)")
    assert (fault.resumed_ms, fault.whole_ms) == (300.0, 700.0)
    assert fault.gap_ms == 620.0  # open at 1.38 s, ends at 2.0 s: within a second of it
    assert (found.totals.whole.count, found.totals.whole.p99_ms, found.kinds[0].whole_max_ms) == (1, 700.0, 700.0)


def test_a_rank_is_in_one_state_at_a_time() -> None:
    healthy, victim = figures(killed()).ranks
    assert [tuple(span)[:3] for span in map(msgspec.structs.astuple, healthy.spans)] == [(0.0, 2.0, "serving")]
    assert [(span.since, span.state) for span in victim.spans] == [
        (0.0, "serving"), (1.002, "masked"), (1.01, "dead"), (1.1, "launching"), (1.2, "handshaking"),
        (1.25, "loading"), (1.6, "standby"), (1.7, "serving"),
    ]  # fmt: skip
    assert all(a.until == b.since for a, b in zip(victim.spans, victim.spans[1:], strict=False))


def test_streams_in_buckets() -> None:
    seen = figures(killed()).seen
    assert (seen.tokens, seen.series.bucket_s, len(seen.series.tokens_per_s)) == (8, 0.1, 20)
    rates = {number: rate for number, rate in enumerate(seen.series.tokens_per_s) if rate}
    assert rates == {6: 50.0, 9: 10.0, 13: 10.0, 19: 10.0}  # the token of 2.0 s counts to the last bucket
    assert {n: gap for n, gap in enumerate(seen.series.gap_max_ms) if gap} == {6: 10.0, 9: 380.0, 13: 400.0, 19: 620.0}
    assert (seen.gap_p50_ms, seen.gap_max_ms, seen.steady_p99_ms) == (380.0, 620.0, 20.0)
    assert (seen.stalls.ended, seen.stalls.request) == ((980, 1380, 2000), (0, 0, 0))
    assert (seen.requests.lanes, seen.requests.lane) == (2, (0, 1))
    assert (seen.requests.began, seen.requests.first, seen.requests.lasted) == ((500, 550), (100, 100), (1500, 130))
    assert sum(seen.gap_counts.counts) == 6


def test_epochs_and_operations() -> None:
    found = figures(killed())
    assert [(each.epoch, each.at, each.adopted) for each in found.epochs] == [
        (1, -1.0, -0.9), (2, 1.05, -1.0), (3, 1.7, 1.75),
    ]  # fmt: skip
    (operation,) = found.operations
    assert (operation.ended, [(p.since, p.until, p.state) for p in operation.phases]) == (
        "aborted", [(1.8, 1.85, "spawning"), (1.85, 1.9, "loading")],
    )  # fmt: skip
    assert (found.totals.epochs, found.totals.operations, found.totals.rolled_back) == (2, 1, 1)


def test_a_store_that_was_watched_says_more_of_an_operation() -> None:
    times = {"proposed": STARTED + 1.75, "spawning": STARTED + 1.8, "loading": STARTED + 1.85, "aborted": STARTED + 1.9}
    value = {"id": "op", "kind": "scale", "target": 3, "phase_times": times, "error": "cancelled"}
    watched = Changed(revision=9, key="/elastic-ep/demo/ops/op", at=STARTED + 1.9, value=value)
    (operation,) = figures([*killed(), watched]).operations
    assert (operation.kind, operation.error, operation.phases[0].state) == ("scale", "cancelled", "proposed")


def test_an_engine_that_took_over_and_an_etcd_that_was_away() -> None:
    found = figures([
        header(), fault_at(1.0, "kill", "engine", pid=7), fault_at(2.0, "kill", "etcd", pid=9),
        fault_at(2.5, "stop", "etcd", healed=2.6), fault_at(2.7, "net-cut", "host b", healed=2.9),
        happened(-9.0, "role_started", "supervisor", name="engine", pid=6),
        happened(-9.0, "role_started", "supervisor", name="engine-standby", pid=7),
        happened(-8.0, "engine_elected", token=4, pid=7),
        happened(1.01, "role_died", "supervisor", name="engine-standby", pid=7, reason="killed by SIGKILL"),
        happened(1.02, "engine_elected", token=9, pid=6),
        happened(1.04, "role_started", "supervisor", name="engine-standby", pid=8),
        happened(2.1, "etcd_died", "supervisor"),
        happened(2.4, "epoch_staged", "controller", 5),
        happened(9.0, "etcd_died", "supervisor"),  # of another cause than the stop, long healed
        Answered(record=answered(0.5, [0.9, 1.3, 2.2])),
    ])  # fmt: skip
    engine, etcd, stopped, cut = found.faults
    assert (engine.lane, engine.noticed_ms, engine.resumed_ms, engine.whole_ms) == ("engine-standby", 10.0, 300.0, 40.0)
    assert (etcd.noticed_ms, etcd.whole_ms, engine.gap_ms) == (100.0, 400.0, 900.0)
    assert (stopped.noticed_ms, stopped.whole_ms, stopped.healed) == (-1.0, -1.0, 2.6)
    assert (cut.family, cut.lane, cut.gap_ms) == ("network", "host b", 0.0)
    spans = {lane.name: [(span.since, span.state) for span in lane.spans] for lane in found.roles}
    assert spans["engine"] == [(0.0, "waiting"), (1.02, "in office")]
    assert spans["engine-standby"] == [(0.0, "in office"), (1.01, "down"), (1.04, "waiting")]
    assert spans["etcd"] == [(0.0, "up"), (2.1, "down"), (2.4, "up")]
    assert spans["host b"] == [(0.0, "place")]


def test_an_engine_that_stands_down_and_a_step_that_fails() -> None:
    found = figures([
        header(ranks=1), fault_at(0.5, "stop", "engine-standby", healed=0.9), fault_at(1.5, "step-raise", "rank 0"),
        Changed(revision=1, key="/elastic-ep/demo/leader", at=STARTED, listed=True),
        happened(0.2, "role_died", "supervisor", name="engine", pid=6, reason="killed by SIGKILL"),
        happened(0.3, "role_started", "supervisor", name="engine", pid=8),
        happened(0.4, "engine_elected", token=9, pid=7),  # which no event mentions: the other one
        happened(0.6, "leader_left", "controller", token=3, fenced=True),
        happened(0.8, "engine_elected", token=11, pid=8),
        happened(1.6, "step_setback", rank=0, status="failed"),
    ])  # fmt: skip
    spans = {lane.name: [(span.since, span.state) for span in lane.spans] for lane in found.roles}
    assert spans["engine-standby"] == [(0.0, "up"), (0.4, "in office"), (0.8, "waiting")]
    assert spans["engine"] == [(0.0, "up"), (0.2, "down"), (0.3, "waiting"), (0.8, "in office")]
    assert spans["controller"] == [(0.0, "up"), (0.6, "waiting")]
    assert [(each.noticed_ms, each.whole_ms) for each in found.faults] == [(-1.0, -1.0), (100.0, -1.0)]


def test_without_events_from_before_the_run_the_ranks_of_its_header_serve() -> None:
    found = figures([header(ranks=2), happened(1.0, "rank_masked", rank=1, incarnation=2, source="queue")])
    assert [[span.state for span in lane.spans] for lane in found.ranks] == [["serving"], ["serving"]]
    listed = Changed(revision=1, key="/elastic-ep/demo/view", at=STARTED, value={"members": [{"rank": 5}]})
    assert [lane.name for lane in figures([header(), listed, fault_at(1.0, "stop", "rank 5")]).ranks] == ["rank 5"]


def test_a_promise_held_if_all_that_checked_it_say_so() -> None:
    lines = [*killed(), Verified(promise="G1", ok=True, said="812 changes"), Verified(promise="G6", ok=True, said="up")]
    found = figures(lines, [Checked(promise="G1", ok=False, said="the checker: 1 broken", evidence=("revision 7",))])
    verdicts = {each.id: each.verdict for each in found.promises}
    assert verdicts == {"G1": "broke", "G3": "held", "G6": "held"} | dict.fromkeys(
        ("G2", "G4", "G5", "G7", "G8", "G9"), "unjudged"
    )
    assert (found.verdict, found.promises[0].said) == ("broke", ("812 changes", "the checker: 1 broken"))
    assert figures([header()]).verdict == "unjudged"  # nothing checked is nothing held


def test_a_failing_run_shows_the_evidence() -> None:
    lines = [
        *killed(),
        Answered(record=answered(0.7, [0.8, 0.9], error="ReadTimeout", finish_reason="", status=0)),
        Answered(record=answered(0.8, [0.9, 1.0, 1.1, 1.2], tokens=("t0", "XX", "t2", "t3"), id="cmpl-9")),
    ]
    found = figures(lines)
    assert (found.totals.lost, found.totals.duplicated, found.totals.altered, found.totals.refused) == (1, 0, 1, 1)
    assert found.seen.requests.wrong == (2, 3)
    shown = page(found)
    assert "A promise broke" in shown
    assert "request 3 (prompt 0) of 0.700 s: lost, after 2 of 4 tokens: ReadTimeout" in shown
    assert "request 4 (prompt 0, cmpl-9) of 0.800 s: altered, token 1: got" in shown


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.data = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._inside = dict(attrs).get("id") or ""

    def handle_data(self, data: str) -> None:
        self.data += data if self._inside == "data" else ""
        self._inside = ""


def test_hostile_text_stays_text() -> None:
    record = answered(0.5, [0.6], id=HOSTILE, error=HOSTILE)
    lines: list[AnyLine] = [
        header(what=HOSTILE, replay=HOSTILE, model=HOSTILE, cluster=HOSTILE),
        fault_at(0.2, HOSTILE, HOSTILE, proof=HOSTILE),
        happened(0.3, "role_died", HOSTILE, name=HOSTILE, reason=HOSTILE),
        happened(0.4, "epoch_committed", "controller", 2, ranks=[0], reason=HOSTILE),
        happened(0.5, "operation_phase", "controller", operation=HOSTILE, phase=HOSTILE, target=1, error=HOSTILE),
        happened(0.6, "rank_died", "agent", rank=0, incarnation=1, reason=HOSTILE),
        Verified(promise=HOSTILE, ok=False, said=HOSTILE),
        Expected(record=record),
        Answered(record=record),
    ]
    judged = [Checked(promise="G1", ok=False, said=HOSTILE, evidence=(HOSTILE,))]
    found, plain = figures(lines, judged), figures(killed())
    hostile, harmless = Page(page(found)), Page(page(plain))
    assert hostile.tags.count("script") == harmless.tags.count("script") == 2
    assert "img" not in hostile.tags
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert "{{ 7 * 7 }}" in page(found)
    assert msgspec.json.decode(hostile.data)["faults"][0]["proof"] == HOSTILE  # and the script gets what was said


def test_the_page_needs_nothing_else() -> None:
    text = page(figures(soak()))
    loads = [value for name, value in Page(text).attributes if name in ("src", "href", "srcset", "action", "poster")]
    assert all(value.startswith("#") for value in loads), loads
    assert not re.search(r"https?://|url\(|@import|\bimport\(|fetch\(|XMLHttpRequest|WebSocket", text)
    assert "default-src 'none'" in text


def test_a_long_soak_is_a_small_page() -> None:
    found = figures(soak(15_000, 400, streams=24, tokens=8))
    assert (found.totals.requests, found.totals.faults, found.verdict) == (15_000, 400, "held")
    assert len(page(found).encode()) < 3_000_000
    assert len(msgspec.json.encode(found)) < 3_000_000


def test_the_command_writes_page_and_figures(tmp_path: Path) -> None:
    record, saved, run = tmp_path / "run.jsonl", tmp_path / "run.json", CliRunner()
    ran = {"rank": 1, "incarnation": 2, "pid": 42}  # so the checker knows the fault's target
    lines = [*killed(), Changed(revision=5, key="/elastic-ep/demo/ranks/1/2", at=STARTED, value=ran, listed=True)]
    write(record, lines)
    done = run.invoke(app, ["report", str(record), "--json", str(saved)])
    assert (done.exit_code, (tmp_path / "run.html").read_text()[:15]) == (0, "<!doctype html>")
    assert msgspec.json.decode(saved.read_bytes())["totals"]["faults"] == 1
    twice = Answered(record=answered(0.7, [0.8, 0.9, 1.0, 1.1], id="cmpl-9"))
    write(record, [*lines, twice, twice])
    assert run.invoke(app, ["report", str(record), "--output", str(tmp_path / "x.html")]).exit_code == 1
    assert "two requests had the id cmpl-9" in (tmp_path / "x.html").read_text()  # as the checker says
    record.write_text('{"line": "nonsense"}\n')
    failed = run.invoke(app, ["report", str(record)])
    assert (failed.exit_code, "run.jsonl:1" in failed.output) == (1, True)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("host-death", "death"), ("host-link-down", "network"), ("net-delay", "network"), ("step-delay", "freeze"),
     ("etcd-slow-disk", "store"), ("clock-jump", "clock"), ("fd-exhaustion", "memory"), ("brand-new", "other")],
)  # fmt: skip
def test_families_of_faults(fault: str, expected: str) -> None:
    assert family(fault) == expected


def test_durations_in_words() -> None:
    shown = ["–", "0 ms", "0.4 ms", "100 ms", "1.3 s", "59.9 s", "2 min 5 s"]
    assert [words(ms) for ms in (-1, 0, 0.4, 99.96, 1300, 59_900, 125_000)] == shown

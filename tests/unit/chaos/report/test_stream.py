"""A run as a recording for the live page: the same document as a gateway's, at each moment, and what clients got."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from chaos.cli.main import app
from chaos.record.record import AnyLine, write
from chaos.report.stream import recording
from membership.base.events import Event
from tests.support.recorded_run import START, good_lines
from tests.unit.elastic.gateway.test_live import applied

pytestmark = pytest.mark.unit


def sent(lines: list[AnyLine]) -> list[tuple[float, str, Any]]:
    found = []
    for block in b"".join(recording(lines)).decode().split("\n\n")[:-1]:
        kind, data, at = block.split("\n")
        found.append(
            (
                float(at.removeprefix("id: ")),
                kind.removeprefix("event: "),
                msgspec.json.decode(data.removeprefix("data: ")),
            )
        )
    return found


def test_the_document_follows_the_run() -> None:
    messages = sent(list(good_lines()))
    assert messages[0] == (START, "begin", {"now": START})
    times = [at for at, _, _ in messages]
    assert times == sorted(times)
    documents = list(itertools.accumulate((data for _, kind, data in messages if kind == "patch"), applied, initial={}))
    serving = [
        sorted(int(rank) for rank, each in document.get("ranks", {}).items() if each["state"] == "serving")
        for document in documents
    ]
    sizes = [ranks for ranks, _ in itertools.groupby(serving)]
    assert [0, 1, 2] in sizes
    assert any(1 not in ranks and len(ranks) == 2 for ranks in sizes), "rank 1 died"
    assert [0, 1, 2, 3] in sizes, "four ranks"
    last = documents[-1]
    assert (len(serving[-1]), last["status"]["desired"]) == (2, 2)
    assert {name: each["phase"] for name, each in last["operations"].items()} == {
        "up": "done", "stuck": "aborted", "down": "done",
    }  # fmt: skip


def test_events_and_traffic_come_at_their_times() -> None:
    messages = sent(list(good_lines()))
    traffic = [(at, data) for at, kind, data in messages if kind == "traffic"]
    assert traffic == [
        (1003.0, [{"at": 1002, "tokens": 8, "ended": 0, "gap_ms": 100.0}]),
        (1004.0, [{"at": 1003, "tokens": 8, "ended": 2, "gap_ms": 100.0}]),
        (1005.0, [{"at": 1004, "tokens": 0, "ended": 2, "gap_ms": 0.0}]),
    ]
    masked = [(at, msgspec.convert(each, Event)) for at, kind, data in messages if kind == "events" for each in data]
    assert [at for at, each in masked if each.kind == "rank_masked"] == [
        each.ts for _, each in masked if each.kind == "rank_masked"
    ]


def test_the_command_writes_it(tmp_path: Path) -> None:
    record, out = tmp_path / "run.jsonl", tmp_path / "run.sse"
    write(record, good_lines())
    CliRunner().invoke(app, ["report", str(record), "--stream", str(out)])
    assert out.read_bytes() == b"".join(recording(good_lines()))

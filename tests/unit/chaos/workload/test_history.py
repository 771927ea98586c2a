"""The comparison must distinguish lost, duplicated and altered, and must not pass an empty history."""

from __future__ import annotations

import pytest

from chaos.workload.history import RequestRecord, compare, load, percentile, save

pytestmark = pytest.mark.unit

ORACLE = {0: RequestRecord(prompt=0, started=0.0, tokens=("a", "b", "c", "d"), finish_reason="stop")}


def seen(*tokens: str, finish: str = "stop", error: str = "") -> RequestRecord:
    return RequestRecord(prompt=0, started=0.0, tokens=tokens, finish_reason=finish, error=error)


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (seen("a", "b", "c", "d"), None),
        (seen("a", "b", "c", "d", finish=""), "lost"),
        (seen("a", "b", error="HTTP 503"), "lost"),
        (seen("a", "b", "d"), "lost"),
        (seen("a", "b", "b", "c", "d"), "duplicated"),
        (seen("a", "x", "c", "d"), "altered"),
        (seen("a", "b", "c", "d", finish="length"), "altered"),
        (seen("a", "b", "x"), "altered"),
    ],
)
def test_each_difference_has_its_name(record: RequestRecord, kind: str | None) -> None:
    verdict = compare([record], ORACLE)
    assert [d.kind for d in verdict.differences] == ([] if kind is None else [kind])
    assert verdict.ok == (kind is None)


def test_an_empty_history_proves_nothing() -> None:
    assert not compare([], ORACLE).ok


def test_history_survives_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path / "h.json", [seen("a")], ORACLE)
    saved = load(tmp_path / "h.json")
    assert saved.oracle == ORACLE
    assert saved.history[0].tokens == ("a",)


def test_percentile_and_gaps() -> None:
    assert percentile([], 0.5) == 0.0
    assert percentile([1.0, 2.0, 3.0, 100.0], 0.99) == 100.0
    record = RequestRecord(prompt=0, started=0.0, token_times=(1.0, 1.5, 1.6))
    assert [round(g) for g in record.gaps_ms()] == [500, 100]

"""Stored records: round trips, tolerance of what is newer but compatible, refusal of what is not."""

from __future__ import annotations

import json

import pytest

from membership.base.enums import OperationKind
from membership.base.errors import SchemaError, StoreError
from membership.store.codec import SCHEMA_VERSION, decode, encode
from membership.store.records import (
    Desired,
    Member,
    Operation,
    Phase,
    RankRecord,
    RankState,
    RebalanceRequest,
    Record,
    View,
)

pytestmark = pytest.mark.unit

RECORDS: list[Record] = [
    View(epoch=3, members=(Member(rank=0, node="n", incarnation=7),), placement={0: ((0, 1), ()), 255: ((2,), (0,))}),
    RankRecord(rank=1, node="n", incarnation=2, pid=3, state=RankState.STANDBY, liveness_handle=bytes(range(256))),
    Operation(id="x", kind=OperationKind.SCALE, target=6, phase=Phase.LOADING, phase_times={"loading": 1.5}),
    Desired(ranks=4),
]


def stored(version: object = SCHEMA_VERSION, kind: object = "Desired", data: object = None) -> bytes:
    return json.dumps({"v": version, "kind": kind, "data": {"ranks": 4} if data is None else data}).encode()


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_round_trip(record: Record) -> None:
    assert decode(encode(record), type(record)) == record


def test_an_operator_can_read_it() -> None:
    assert json.loads(encode(Desired(ranks=4))) == {"v": 1, "kind": "Desired", "data": {"ranks": 4}}


def test_a_renamed_record_keeps_its_stored_name() -> None:
    data = encode(RebalanceRequest(at=1.0))
    assert json.loads(data)["kind"] == "RebalanceWish"
    assert decode(data, RebalanceRequest) == RebalanceRequest(at=1.0)


def test_unknown_fields_are_tolerated() -> None:
    data = json.dumps({"v": 1, "kind": "Desired", "since": "later", "data": {"ranks": 4, "colour": "blue"}}).encode()
    assert decode(data, Desired) == Desired(ranks=4)


def test_a_newer_schema_is_refused_with_what_to_do() -> None:
    with pytest.raises(
        SchemaError, match=f"schema version {SCHEMA_VERSION + 1}.*reads up to {SCHEMA_VERSION}"
    ) as caught:
        decode(stored(version=SCHEMA_VERSION + 1, data={"entirely": "different"}), Desired)
    assert "upgrade" in caught.value.hint


def test_a_record_of_another_kind_is_refused() -> None:
    with pytest.raises(SchemaError, match="expected a Desired record, found View"):
        decode(encode(View(epoch=1)), Desired)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"4", b"{}", stored(version="one"), stored(data={}), stored(data={"ranks": "four"}), stored()[:-3]],
)
def test_a_damaged_record_is_refused(data: bytes) -> None:
    with pytest.raises(SchemaError, match="Desired") as caught:
        decode(data, Desired)
    assert isinstance(caught.value, StoreError)

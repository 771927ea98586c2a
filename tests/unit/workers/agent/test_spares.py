"""When the cluster is settled enough for a spare to be made: never while a rank is missing, on its way, or suspect."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from membership.base.enums import OperationKind
from membership.store.records import (
    Assignment,
    Desired,
    EngineStatus,
    Operation,
    Phase,
    RankSpec,
    View,
)
from tests.support.cluster_states import TOKEN, healthy, without
from workers.agent.spares import settled

pytestmark = pytest.mark.unit


def test_a_whole_cluster_is_settled() -> None:
    assert settled(healthy())
    assert settled(healthy(engine=None, engine_status=None)), "no engine is there to take up the view"


@pytest.mark.parametrize(
    "changes",
    [
        {"view": None},
        {"next": View(epoch=4)},
        {"operations": {"o": Operation(id="o", kind=OperationKind.SCALE, target=5, phase=Phase.SPAWNING)}},
        {"engine_status": None},
        {"engine_status": EngineStatus(token=TOKEN, epoch=2)},
        {"engine_status": EngineStatus(token=TOKEN - 1, epoch=3)},
        {"desired": Desired(ranks=5, slots=(0, 1, 2, 3, 4))},
        {"assignments": {"n": Assignment(node="n", ranks=(RankSpec(rank=1, incarnation=9),))}},
    ],
)
def test_not_while_something_is_to_be_done(changes: dict[str, Any]) -> None:
    assert not settled(healthy(**changes))


def test_not_between_a_death_and_the_view_with_its_successor() -> None:
    whole = healthy()
    assert whole.view is not None
    dead = without(whole, 2)
    assert not settled(dead), "its loss is not durable yet"
    masked = replace(dead, view=replace(whole.view, members=tuple(m for m in whole.view.members if m.rank != 2)))
    specs = tuple(spec for spec in whole.assignments["n"].ranks if spec.rank != 2)
    left = replace(masked, assignments={"n": Assignment(node="n", ranks=specs, agent_started=1.0)})
    assert not settled(left), "its successor is to be assigned"
    exits = {2: replace(left.exits[2], quarantined=True)}
    assert settled(replace(left, exits=exits)), "no rank comes into a slot that was set aside"


def test_an_operation_that_ended_is_no_hindrance() -> None:
    assert settled(healthy(operations={"o": Operation(id="o", kind=OperationKind.SCALE, target=4, phase=Phase.DONE)}))

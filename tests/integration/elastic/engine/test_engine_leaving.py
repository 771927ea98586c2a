"""The engine empties ranks that a staged view leaves out: their requests go on elsewhere, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.elastic.engine.test_engine import Service
from tests.support.helpers import eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr("elastic.engine.migration.COPY_TIMEOUT_S", 60.0)
    service = Service(tmp_path)
    service.start(4)
    service.gateway.submit(16, 150)
    service.underway(50)
    yield service
    service.close()


def emptied(service: Service, revision: int) -> None:
    """Wait until the engine says that nothing is left to move for this staged view; tokens flow meanwhile."""

    def vacated() -> bool:
        status = service.cluster.state().engine_status
        return status is not None and status.vacated_revision == revision

    service.gateway.pump(vacated, what="ranks without requests")


def silence(service: Service, *ranks: int) -> None:
    for rank in ranks:
        service.cluster.ranks[rank].send(do="copy nothing")
        service.cluster.ranks[rank].receive()


def test_requests_leave_before_their_ranks_do(service: Service) -> None:
    emptied(service, service.cluster.stage(0, 1))
    moved = service.engine.events("request_moved")
    assert {event.fields["source"] for event in moved} == {2, 3}
    service.cluster.commit(0, 1)
    service.cluster.adopted()
    service.gateway.finish()
    assert service.engine.events("epoch_adopted")[-1].fields["requests"] == 0


def test_a_staged_view_that_is_taken_back_ends_the_moves(service: Service) -> None:
    service.cluster.stage(0, 1)
    service.gateway.pump(lambda: service.engine.events("request_moved"), what="the first move")
    service.store.delete(service.cluster.keys.next)
    service.gateway.finish()
    service.gateway.submit(8, 10)
    service.gateway.finish()


@pytest.mark.parametrize("mute", [(2, 3), (0, 1)], ids=["sources", "targets"])
def test_ranks_that_do_not_copy_hold_nothing_up(
    service: Service, monkeypatch: pytest.MonkeyPatch, mute: tuple[int, ...]
) -> None:
    monkeypatch.setattr("elastic.engine.migration.COPY_TIMEOUT_S", 0.5)
    silence(service, *mute)
    emptied(service, service.cluster.stage(0, 1))
    assert service.engine.events("request_moved") == []
    service.cluster.commit(0, 1)
    service.cluster.adopted()
    service.gateway.finish()
    assert service.engine.events("epoch_adopted")[-1].fields["requests"] > 0


@pytest.mark.parametrize("victim", [0, 2], ids=["target", "source"])
def test_a_death_while_blocks_are_copied(service: Service, victim: int) -> None:
    silence(service, victim)
    service.cluster.stage(0, 1)
    service.underway(10)
    service.cluster.ranks[victim].kill()
    eventually(lambda: service.engine.events("rank_masked"), 30.0, "the mask")
    service.cluster.bury(victim)
    emptied(service, service.cluster.stage(*{0, 1} - {victim}))
    service.gateway.finish()

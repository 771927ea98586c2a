"""The engine with real queues and real rank processes: deaths, views, holds and an absent store, token for token."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.trace import format_trace_id

from membership.base.enums import DetectedBy
from membership.base.errors import Fenced
from membership.store.codec import encode
from membership.store.in_memory import MemoryStore
from membership.store.interface import Put
from membership.store.records import RankExit
from tests.support.helpers import eventually, hang
from tests.support.spans import SAMPLED, TRACE, kept_spans
from tests.support.standins import EngineThread, Gateway, StandInCluster, cluster_config, oracle

pytestmark = pytest.mark.integration


class Service:
    """Store, ranks, engine and gateway of one test."""

    def __init__(self, folder: Path, store: MemoryStore | None = None, **config: object) -> None:
        self.store = store or MemoryStore()
        self.cluster = StandInCluster(self.store, cluster_config(**config))
        self.cluster.configure()
        self.engine = EngineThread(self.store, folder)
        self.gateway = Gateway(self.cluster)

    def start(self, ranks: int) -> None:
        """The first epoch with this number of ranks, and the gateway connected."""
        self.cluster.spawn(*range(ranks))
        self.cluster.attach()
        self.cluster.commit(*range(ranks))
        self.cluster.adopted()
        self.gateway.connect()

    def underway(self, tokens: int) -> None:
        """Wait until this many tokens have come since now."""
        before = self.gateway.emitted()
        self.gateway.pump(lambda: self.gateway.emitted() >= before + tokens, what=f"{tokens} more tokens")

    def close(self) -> None:
        self.gateway.close()
        self.engine.close()
        self.cluster.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.close()


def test_requests_are_spread_over_ranks_and_exact(service: Service) -> None:
    service.start(3)
    service.gateway.submit(12, 20)
    service.gateway.finish()
    (adopted,) = service.engine.events("epoch_adopted")
    assert adopted.epoch == 1
    assert adopted.fields["step_ms"] == 0.0, "there was no request"


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_costs_no_token(service: Service, victim: int) -> None:
    service.start(3)
    service.gateway.submit(12, 150)
    service.underway(100)
    service.cluster.ranks[victim].kill()
    service.gateway.finish()
    (masked,) = service.engine.events("rank_masked")
    assert masked.rank == victim
    assert masked.fields["requests"] == 4
    (recovered,) = service.engine.events("rank_recovered")
    assert recovered.rank == victim
    status = service.cluster.state().engine_status
    assert status is not None
    eventually(lambda: steps_of(service).get("ok", 0) > 10, 30.0, "counts of steps in the status")
    assert set(steps_of(service)) <= {"ok", "rank_lost"}
    eventually(
        lambda: (s := service.cluster.state().engine_status) and s.masked == (victim,), 30.0, "mask in the status"
    )


def test_an_exit_that_comes_with_the_view_after_it_is_a_loss(service: Service) -> None:
    """By the view alone the rank has left: then nobody reads what it had computed, or says that it recovers."""
    service.start(2)
    service.gateway.submit(6, 150)
    service.underway(30)
    cluster, gone = service.cluster, service.cluster.ranks[1].record
    cluster.epoch += 1
    ended = RankExit(rank=1, incarnation=gone.incarnation, reason="killed", at=time.time())
    view = cluster.view(cluster.epoch, (0,))
    cluster.store.txn([], [Put(cluster.keys.exit(1), encode(ended)), Put(cluster.keys.view, encode(view))])
    service.gateway.finish()
    (masked,) = service.engine.events("rank_masked")
    assert (masked.rank, masked.fields["source"], masked.fields["requests"] > 0) == (1, DetectedBy.AGENT, True)
    assert [event.rank for event in service.engine.events("rank_recovered")] == [1]
    assert service.engine.events("rank_left") == []


def test_a_traced_request_that_survives_a_kill_shows_it_in_its_trace(service: Service) -> None:
    """Over the real queues: ranks answer with their times, the engine makes the spans."""
    with kept_spans() as kept:
        service.start(2)
        service.gateway.submit(2, 150, trace=SAMPLED)
        service.gateway.submit(2, 150)
        service.underway(40)
        service.cluster.ranks[1].kill()
        service.gateway.finish()
        (masked,) = service.engine.events("rank_masked")
        eventually(lambda: sum(s.name == "engine" for s in kept.get_finished_spans()) == 2, 30.0, "spans of both")
    spans = kept.get_finished_spans()
    assert {format_trace_id(span.context.trace_id) for span in spans} == {TRACE}
    traced = {span.attributes["elastic_ep.request_id"] for span in spans if span.name == "engine" and span.attributes}
    assert traced == {"r0", "r1"}
    (recovery,) = [span for span in spans if span.name == "recovery"]
    said = recovery.attributes or {}
    assert (said["elastic_ep.rank"], said["elastic_ep.target_rank"], said["elastic_ep.epoch"]) == (1, 0, 1)
    (event,) = recovery.events
    assert (event.name, (event.attributes or {})["elastic_ep.event.ts"]) == ("rank_masked", masked.ts)
    steps = [span for span in spans if span.name == "step"]
    assert {(step.attributes or {})["elastic_ep.rank"] for step in steps} == {0, 1}
    assert all((step.attributes or {})["elastic_ep.exchange_s"] == service.cluster.step_s / 2 for step in steps)


def test_a_record_that_cannot_be_read_ends_nobodys_service(service: Service) -> None:
    service.start(3)
    service.gateway.submit(12, 60)
    service.underway(50)
    service.store.put(service.cluster.keys.op("x"), b"{")
    service.cluster.ranks[1].kill()
    service.gateway.finish()
    service.store.delete(service.cluster.keys.op("x"))
    service.cluster.bury(1)
    service.cluster.commit(0, 2)
    service.cluster.adopted()


def test_ranks_without_a_record_prove_that_they_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing runs and no lease holds: only the engine knows which rank runs and which does not."""
    monkeypatch.setattr("workers.fleet.fleet.STEP_DEADLINE_S", 1.0)
    with contextlib.closing(Service(tmp_path)) as service:
        service.start(3)
        hang(service.cluster.ranks[1].process.pid)
        for rank in range(3):
            service.store.delete(service.cluster.keys.rank(rank, service.cluster.ranks[rank].record.incarnation))
        eventually(lambda: (s := service.cluster.state().engine_status) and s.masked, 30.0, "a mask in the status")
        service.gateway.submit(6, 20)
        service.gateway.finish()
        assert [(e.rank, e.fields["source"]) for e in service.engine.events("rank_masked")] == [(1, "deadline")]


def steps_of(service: Service) -> dict[str, int]:
    """How the engine says its steps ended."""
    status = service.cluster.state().engine_status
    return status.steps if status else {}


def test_a_dead_slot_serves_again_as_a_new_incarnation(service: Service) -> None:
    service.start(2)
    service.gateway.submit(8, 150)
    service.underway(50)
    service.cluster.ranks[1].kill()
    service.cluster.bury(1)
    service.cluster.commit(0)
    service.underway(50)
    service.cluster.spawn(1)
    service.cluster.attach(1)
    service.cluster.commit(0, 1)
    service.cluster.adopted()
    service.gateway.submit(6, 40)
    service.gateway.finish()
    assert [event.epoch for event in service.engine.events("epoch_adopted")] == [1, 2, 3]
    status = service.cluster.state().engine_status
    assert status is not None
    assert status.masked == ()


def test_views_grow_and_shrink_while_requests_run(service: Service) -> None:
    service.start(2)
    service.gateway.submit(10, 150)
    service.underway(50)
    service.cluster.spawn(2, 3)
    service.cluster.attach(2, 3)
    service.cluster.commit(0, 1, 2, 3)
    service.cluster.adopted()
    service.gateway.submit(10, 60)
    service.underway(100)
    service.cluster.commit(1, 3)
    service.cluster.adopted()
    service.gateway.finish()
    shrink = service.engine.events("epoch_adopted")[-1]
    assert shrink.fields["requests"] > 0, "there were requests on the departed ranks"
    assert 0.0 < shrink.fields["step_ms"] <= shrink.fields["pause_ms"], "the first step is a part of the pause"
    assert service.engine.events("rank_masked") == []


def test_a_view_waits_for_its_ranks_and_the_present_one_serves_on(service: Service) -> None:
    service.start(1)
    service.cluster.spawn(1)
    service.cluster.commit(0, 1)
    service.gateway.submit(3, 30)
    service.gateway.finish()
    assert len(service.engine.events("epoch_adopted")) == 1
    service.cluster.attach(1)
    service.cluster.adopted()


def test_without_ranks_requests_wait_for_the_first_view(service: Service) -> None:
    service.gateway.connect()
    service.gateway.submit(4, 10)
    service.cluster.spawn(0)
    service.cluster.attach()
    service.cluster.commit(0)
    service.gateway.finish()


def test_lost_coverage_holds_until_the_repaired_view(service: Service) -> None:
    service.cluster.spawn(0, 1)
    service.cluster.attach()
    service.cluster.commit(0, 1, experts={0: (0, 1), 1: (1, 2, 3)})
    service.cluster.adopted()
    service.gateway.connect()
    service.gateway.submit(8, 150)
    service.underway(50)
    service.cluster.ranks[1].kill()
    eventually(lambda: (s := service.cluster.state().engine_status) and s.uncovered == 2, 30.0, "coverage lost")
    service.gateway.silence(0.3)
    assert len(service.gateway.ends) < 8, "nothing was left to hold"
    service.cluster.bury(1)
    service.cluster.commit(0)
    service.gateway.finish()


def test_coverage_that_does_not_come_back_ends_in_503(tmp_path: Path) -> None:
    service = Service(tmp_path, coverage_deadline_s=0.3)
    try:
        service.gateway.connect()
        service.gateway.submit(2, 10)
        service.gateway.pump(lambda: len(service.gateway.ends) == 2, what="rejections")
        assert all(end.startswith("503 experts were not available") for end in service.gateway.ends.values())
    finally:
        service.close()


def test_while_a_view_is_prepared_that_may_bring_lost_experts_no_request_is_given_up(tmp_path: Path) -> None:
    service = Service(tmp_path, coverage_deadline_s=0.5)
    try:
        service.cluster.spawn(0, 1)
        service.cluster.attach()
        service.cluster.commit(0, 1, experts={0: (0, 1), 1: (1, 2, 3)})
        service.cluster.adopted()
        service.gateway.connect()
        service.gateway.submit(4, 190)
        service.underway(20)
        service.cluster.stage(0, 1)
        service.cluster.ranks[1].kill()
        eventually(lambda: (s := service.cluster.state().engine_status) and s.uncovered == 2, 30.0, "coverage lost")
        service.gateway.silence(1.5)
        assert len(service.gateway.ends) < 4, "nothing was left to hold"
        service.cluster.bury(1)
        service.cluster.commit(0)
        service.gateway.finish()
    finally:
        service.close()


def test_experts_that_are_not_restored_cost_a_503_and_the_next_requests_nothing(tmp_path: Path) -> None:
    service = Service(tmp_path, coverage_deadline_s=2.0)
    try:
        service.cluster.spawn(0, 1)
        service.cluster.attach()
        service.cluster.commit(0, 1, experts={0: (0, 1), 1: (1, 2, 3)})
        service.cluster.adopted()
        service.gateway.connect()
        service.gateway.submit(4, 190)
        service.underway(20)
        service.cluster.ranks[1].kill()
        service.gateway.pump(lambda: len(service.gateway.ends) == 4, what="all requests to end")
        cut = [name for name, end in service.gateway.ends.items() if end != "length"]
        assert cut, "nothing was left to hold"
        assert all(service.gateway.ends[name].startswith("503 experts were not available") for name in cut)
        for name in cut:
            output = service.gateway.outputs[name]
            assert output == oracle(service.gateway.requests[name])[: len(output)], "no token without its experts"
            del service.gateway.requests[name], service.gateway.ends[name], service.gateway.outputs[name]
        service.cluster.bury(1)
        service.cluster.commit(0)
        service.cluster.adopted()
        service.gateway.submit(4, 20)
        service.gateway.finish()
    finally:
        service.close()


def test_a_rank_that_answers_coverage_lost_is_asked_again(service: Service) -> None:
    service.start(2)
    service.gateway.submit(6, 150)
    service.underway(30)
    service.cluster.ranks[0].send(do="answer", status="coverage_lost")
    service.cluster.ranks[0].receive()
    eventually(lambda: service.engine.events("step_setback"), 30.0, "such an answer")
    service.cluster.ranks[0].send(do="answer", status="ok")
    service.gateway.finish()


def test_serving_goes_on_while_the_store_is_away(service: Service) -> None:
    service.start(2)
    service.gateway.submit(6, 150)
    service.underway(20)
    service.store.outage = True
    service.underway(200)
    service.cluster.ranks[0].kill()
    service.gateway.finish()
    assert service.engine.error is None
    service.store.outage = False


def test_a_replaced_engine_stands_down(service: Service) -> None:
    service.start(1)
    service.store.delete(service.cluster.keys.engine)
    eventually(lambda: service.engine.error, 30.0, "the engine to stand down")
    assert isinstance(service.engine.error, Fenced)
    assert service.engine.events("engine_stood_down")


def test_a_stopped_rank_is_given_up_long_before_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.fleet.fleet.STEP_DEADLINE_S", 600.0)
    service = Service(tmp_path)
    try:
        service.start(2)
        service.gateway.submit(6, 60)
        service.underway(50)
        hang(service.cluster.ranks[1].process.pid)
        service.gateway.finish()
        (masked,) = service.engine.events("rank_masked")
        assert (masked.rank, masked.fields["source"]) == (1, "stopped")
    finally:
        service.close()


def test_cancelled_requests_make_room(service: Service) -> None:
    from elastic.protocol import Abort

    service.start(1)
    service.gateway.submit(20, 100)
    service.underway(20)
    for name in list(service.gateway.requests)[:18]:
        service.gateway.send(Abort(name))
        del service.gateway.requests[name]
        service.gateway.ends.pop(name, None)
    service.gateway.pump(lambda: all(n in service.gateway.ends for n in service.gateway.requests), what="the others")
    idle = eventually(
        lambda: (s := service.cluster.state().engine_status) and s.running == s.waiting == 0, 30.0, "an empty engine"
    )
    assert idle


def test_the_engine_is_light() -> None:
    script = "import sys, elastic.engine.role; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0, time.monotonic() - started

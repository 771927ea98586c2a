"""The agent with real rank processes: from an assignment to ranks that serve, and what it does when they die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from membership.base.errors import Fenced
from membership.base.events import EventLog
from membership.base.rank_id import RankId
from membership.planning.identity import learned
from membership.store.codec import decode, encode
from membership.store.in_memory import MemoryStore
from membership.store.interface import Watch
from membership.store.records import (
    AgentRecord,
    Checkpoint,
    ClusterState,
    Desired,
    KillRequest,
    RankRecord,
    RankState,
)
from tests.support.agent_scene import KEYS, Scene, agent
from tests.support.helpers import eventually, hang
from workers.protocol.liveness import NUMBERS_PER_S, LivenessPage
from workers.protocol.messages import EngineMessage, StepResult
from workers.queue.message_queue import MessageQueue, MsgpackCodec

pytestmark = pytest.mark.integration

A, B, C, D = (RankId(rank, rank + 1) for rank in range(4))


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    made = MemoryStore()
    yield made
    made.close()


@pytest.fixture
def scene(store: MemoryStore, tmp_path: Path) -> Scene:
    made = Scene(store, tmp_path / "events.jsonl")
    made.configure()
    return made


@pytest.fixture
def steps() -> Iterator[MessageQueue]:
    made = MessageQueue("steps", codec=MsgpackCodec(EngineMessage))
    yield made
    made.shutdown()


def test_assigned_ranks_get_registered_attached_prepared_and_cleaned_up(scene: Scene, steps: MessageQueue) -> None:
    lacking: list[str] = []
    scene.store.put(KEYS.desired, encode(Desired(ranks=4)))
    with agent(scene, report=lacking.append):
        scene.assign(A, B, C, D)
        state = scene.until_registered(A, B, C, D)
        assert {record.state for record in state.ranks.values()} == {RankState.HANDSHAKING}
        assert state.ranks[B].exchange_handle == b"exchange-1-2"
        scene.until(lambda s: not s.agents["n"].importing, "the imports of later ranks to be done")
        assert all(psutil.pid_exists(record.pid) for record in state.ranks.values())
        token = scene.elect(steps)
        state = scene.until(lambda s: all(r.engine_token == token for r in s.ranks.values()), "all attached")
        answers = MessageQueue.create_from_handle(state.ranks[A].response_handle, "e", codec=MsgpackCodec(StepResult))
        answers.shutdown()
        revision = scene.stage(1, A, B, C)
        state = scene.until(lambda s: all(s.ranks[k].prepared_revision == revision for k in (A, B, C)), "prepared")
        assert state.ranks[A].state is RankState.STANDBY
        assert state.ranks[A].fingerprint == "small"
        assert (state.ranks[D].state, state.ranks[D].prepared_revision) == (RankState.HANDSHAKING, 0)
        scene.commit()
        scene.engine_runs(token, 1)
        eventually(lambda: len(scene.events("rank_prepared")) == 3, 30, "prepared events")
        eventually(lambda: lacking[-1] == "ranks [3] do not serve yet", 30, "what the agent lacks")
        scene.assign(A, B, C)
        scene.store.put(KEYS.desired, encode(Desired(ranks=3)))
        eventually(lambda: lacking[-1] == "", 30, "the agent to be ready")
        scene.assign(A, B, C, (3, 9))
        scene.until_registered((3, 9))
        assert lacking.count("") == 1, "it has been ready: what is added later takes that from nobody"
    state = scene.state()
    assert state.ranks == {}
    assert state.agents == {}
    assert len(scene.events("rank_spawned")) == len(scene.events("rank_ready")) == 5


def test_a_killed_rank_leaves_an_exit_and_is_not_started_again_under_its_name(scene: Scene) -> None:
    with agent(scene, killable=True):
        scene.assign(A, B, C, D)
        pid = scene.until_registered(A, B, C, D).ranks[B].pid
        os.kill(pid, signal.SIGKILL)
        state = scene.until(lambda s: B not in s.ranks, "the record gone")
        assert state.exits[1].incarnation == 2
        assert state.exits[1].restarts == 1
        state = scene.until(lambda s: "killed by signal 9" in s.exits[1].reason, "the signal in the exit")
        assert not state.exits[1].quarantined
        assert state.ranks.keys() == {A, C, D}, "the others stay"
        [died] = scene.events("rank_died")
        assert (died.rank, died.fields["detected_by"]) == (1, "robust futex")
        eventually(lambda: scene.events("rank_exited"), 30, "the exit event")
        assert scene.events("rank_exited")[0].fields["signal"] == 9
        scene.assign(A, B, C, D)
        scene.assign(A, (1, 9), C, D)
        scene.until_registered((1, 9))
        assert [e.fields["incarnation"] for e in scene.events("rank_spawned") if e.rank == 1] == [2, 9]
        scene.store.put(KEYS.kill, encode(KillRequest(rank=2, incarnation=C.incarnation, by="ann")))
        state = scene.until(lambda s: "killed by signal 9" in s.exits[2].reason if 2 in s.exits else False, "its end")
        assert state.ranks.keys() == {A, (1, 9), D}
        assert [(e.rank, e.fields["by"]) for e in scene.events("rank_kill_requested")] == [(2, "ann")]


def test_a_rank_that_is_not_assigned_any_more_ends_without_an_exit(scene: Scene) -> None:
    with agent(scene):
        scene.assign(A, B)
        pid = scene.until_registered(A, B).ranks[B].pid
        scene.assign(A)
        state = scene.until(lambda s: B not in s.ranks, "the rank retired")
        assert state.exits == {}
        eventually(lambda: not psutil.pid_exists(pid), 30, "its process ended")
        assert A in state.ranks


def test_a_stopped_rank_loses_its_lease_and_is_killed(scene: Scene) -> None:
    scene.configure(lease_ttl_s=3.0)  # shorter, the other one may be late, too
    with agent(scene):
        scene.assign(A, B)
        pid = scene.until_registered(A, B).ranks[B].pid
        hang(pid)
        state = scene.until(lambda s: B not in s.ranks and 1 in s.exits, "the stopped rank out")
        assert "no heartbeat" in state.exits[1].reason
        eventually(lambda: not psutil.pid_exists(pid), 30, "the stopped rank killed")
        assert scene.state().ranks.keys() == {A}


def test_the_heartbeat_of_a_stopped_rank_ages_and_the_others_stay_young(scene: Scene) -> None:
    scene.configure(lease_ttl_s=10.0)
    with agent(scene):
        scene.assign(A, B)
        pid = scene.until_registered(A, B).ranks[B].pid
        scene.until(lambda s: set(beats(s)) == {1, 2}, "both heartbeats")
        hang(pid)
        try:
            state = scene.until(lambda s: beats(s)[1] > beats(s)[2] + 2.5, "the stopped rank's heartbeat left behind")
            assert state.heartbeats["n"].at - beats(state)[2] > 2.5
        finally:
            os.kill(pid, signal.SIGCONT)
        scene.until(lambda s: beats(s)[2] > beats(state)[2] + 2.5, "its heartbeat to go on")
    assert scene.state().heartbeats == {}


def beats(state: ClusterState) -> dict[int, float]:
    """Incarnation -> time of its last heartbeat seen."""
    return state.heartbeats["n"].beats if "n" in state.heartbeats else {}


def test_preparing_is_done_again_for_a_newer_view_and_failures_are_published(scene: Scene) -> None:
    scene.configure("fail-prepare")
    with agent(scene):
        scene.assign(A, B)
        scene.until_registered(A, B)
        for epoch in (1, 2):
            revision = scene.stage(epoch, A, B)
            state = scene.until(lambda s, r=revision: s.ranks[A].failed_revision == r, "A's failure")  # type: ignore[misc]
            assert "no room for experts" in state.ranks[A].prepare_error
            scene.until(lambda s, r=revision: s.ranks[B].prepared_revision == r, "B prepared")  # type: ignore[misc]


def test_preparing_waits_for_every_member(scene: Scene) -> None:
    with agent(scene):
        scene.assign(A)
        scene.until_registered(A)
        revision = scene.stage(1, A, B)
        eventually(lambda: scene.events("rank_loaded"), 30, "A to have loaded")
        assert scene.state().ranks[A].prepared_revision == 0
        scene.assign(A, B)
        scene.until(lambda s: B in s.ranks and s.ranks[B].prepared_revision == revision, "B prepared")
        scene.until(lambda s: s.ranks[A].prepared_revision == revision, "A prepared")


def test_a_model_that_does_not_load_is_published_and_the_rank_stays(scene: Scene) -> None:
    scene.configure("fail-load")
    with agent(scene):
        scene.assign(A)
        scene.until_registered(A)
        revision = scene.stage(1, A)
        state = scene.until(lambda s: s.ranks[A].failed_revision == revision, "the failure")
        assert "no such checkpoint" in state.ranks[A].prepare_error


@pytest.fixture
def pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights of a rank that loads piecemeal."""
    monkeypatch.setenv("SMALL_WORKER_DIARY", str(tmp_path))
    os.mkfifo(tmp_path / "bytes")
    return tmp_path / "bytes"


def loads(state: ClusterState) -> dict[int, tuple[int, int]]:
    """Incarnation of a rank that loads -> bytes there, bytes in all."""
    return state.heartbeats["n"].loads if "n" in state.heartbeats else {}


def test_a_load_that_advances_has_no_deadline_and_its_rank_joins_engines_meanwhile(
    scene: Scene, pipe: Path, steps: MessageQueue
) -> None:
    scene.configure("piecemeal", launch_deadline_s=5.0, load_stall_s=30.0)
    with agent(scene):
        scene.assign(A)
        scene.until_registered(A)
        revision = scene.stage(1, A)
        with pipe.open("wb", buffering=0) as weights:
            for done in range(4):
                scene.until(lambda s, done=done: loads(s).get(1) == (done, 4), f"{done} bytes there")
                weights.write(b"x")
            token = scene.elect(steps)
            state = scene.until(lambda s: s.ranks[A].engine_token == token, "it to join the engine while it loads")
            assert (state.ranks[A].state, state.ranks[A].loaded) == (RankState.LOADING, False)
            scene.until(lambda s: time.time() > s.ranks[A].started + 6.0, "the launch deadline to be past")
        state = scene.until(lambda s: s.ranks[A].prepared_revision == revision, "it to be prepared")
        scene.until(lambda s: not loads(s), "no load any more")
    assert [e.kind for e in EventLog.read(scene.path) if "load" in e.kind] == ["rank_load_started", "rank_loaded"]
    assert scene.events("rank_loaded")[0].fields["took_ms"] > 6000, "longer than the launch deadline"


def test_a_load_that_stalls_is_given_up_and_no_peer_waits_for_a_link_meanwhile(scene: Scene, pipe: Path) -> None:
    scene.configure("piecemeal", load_stall_s=6.0)
    with agent(scene):
        scene.assign(A, B)
        pid = scene.until_registered(A, B).ranks[B].pid
        scene.stage(1, A, B)
        with pipe.open("wb", buffering=0) as weights:
            scene.until(lambda s: len(loads(s)) == 2, "both to load")
            weights.write(b"x")
            state = scene.until(lambda s: s.exits.keys() == {0, 1}, "both given up")
            reasons = " ".join(each.reason for each in state.exits.values())
            assert all(f"its load stalled at {done} of 4 bytes: no progress for " in reasons for done in (0, 1))
            assert not state.ranks
        eventually(lambda: not psutil.pid_exists(pid), 30, "the stalled rank killed")
    assert len(scene.events("rank_load_stalled")) == 2
    assert {e.fields["detected_by"] for e in scene.events("rank_died")} == {"stall"}
    assert scene.events("rank_prepare_failed") == [], "none was asked to link with a rank that still loads"


def test_a_rank_that_cannot_start_backs_off(scene: Scene) -> None:
    scene.configure("fail-at-start-1")
    with agent(scene):
        scene.assign(A, B)
        scene.until_registered(A)
        first = scene.until(lambda s: 1 in s.exits, "the first exit").exits[1]
        assert "this worker fails at its start" in first.reason
        scene.assign(A, (1, 5))
        second = scene.until(lambda s: s.exits[1].incarnation == 5, "the second exit").exits[1]
        assert second.restarts == 2
        assert second.not_before - second.at > first.not_before - first.at - 0.06


def test_a_host_without_room_for_another_process_keeps_the_ranks_it_has_and_tries_again(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is refused: that is no death of the slot, which would be set aside for it."""
    refused: list[int] = []

    def refuse(*_: object) -> None:
        refused.append(1)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("membership.base.attempts.ATTEMPT_PAUSE_S", 0.01)
    with agent(scene):
        scene.assign(A)
        scene.until_registered(A)
        with monkeypatch.context() as patch:
            patch.setattr("workers.agent.executor.WorkerProcParent.make_worker_process", refuse)
            scene.assign(A, B)
            eventually(lambda: len(refused) >= 4, 30.0, "four refusals")
            assert "Too many open files" in str(scene.events("rank_start_postponed")[0].fields["reason"])
            # Each attempt has a record for a moment, until it is refused.
            eventually(lambda: scene.state().ranks.keys() == {A}, 30.0, "the record of the refused one to be gone")
        state = scene.until_registered(A, B)
        assert state.exits == {}


def test_ranks_join_each_new_engine(scene: Scene, steps: MessageQueue) -> None:
    with agent(scene):
        scene.assign(A)
        scene.until_registered(A)
        first = scene.elect(steps)
        handle = scene.until(lambda s: s.ranks[A].engine_token == first, "attached").ranks[A].response_handle
        later = MessageQueue("steps-later", codec=MsgpackCodec(EngineMessage))
        second = scene.elect(later)
        state = scene.until(lambda s: s.ranks[A].engine_token == second, "attached to the next")
        assert state.ranks[A].response_handle != handle
        assert later.readers
        later.shutdown()


def test_what_a_rank_runs_for_an_engine_that_was_replaced_is_called_off(scene: Scene, steps: MessageQueue) -> None:
    """Its main thread may wait in a GPU's kernels and answer nobody, so not even the new engine can reach it."""
    with agent(scene):
        scene.assign(A)
        scene.until_registered(A)
        first = scene.elect(steps)
        rank = scene.until(lambda s: s.ranks[A].engine_token == first, "attached").ranks[A]
        with LivenessPage.attach(rank.liveness_handle) as page:
            replaced_at = int(time.monotonic() * NUMBERS_PER_S)
            hang(rank.pid)
            second = scene.elect(steps)
            eventually(lambda: page.called_off > replaced_at, 20.0, "what it ran to be called off")
            os.kill(rank.pid, signal.SIGCONT)
            scene.until(lambda s: A in s.ranks and s.ranks[A].engine_token == second, "attached to the next")
            assert page.called_off < time.monotonic() * NUMBERS_PER_S, "steps of the new engine are not"


def test_an_outage_of_the_store_leaves_ranks_running_and_registers_them_after_it(
    scene: Scene, store: MemoryStore
) -> None:
    with agent(scene):
        scene.assign(A, B)
        before = scene.until_registered(A, B)
        store.outage = True
        os.kill(before.ranks[B].pid, signal.SIGKILL)
        eventually(lambda: scene.events("rank_died"), 30, "the death noticed without the store")
        for lease in [kv.lease for kv in list(store._items.values()) if kv.lease]:
            with store._changed:
                store._end(lease)  # all leases run out meanwhile
        store.outage = False
        state = scene.until(
            lambda s: "n" in s.agents and A in s.ranks and 1 in s.exits, "all published after the outage"
        )
        assert state.ranks[A].pid == before.ranks[A].pid
        assert B not in state.ranks


def test_records_of_an_earlier_agent_are_removed_and_its_assignment_is_not_run(
    scene: Scene, store: MemoryStore
) -> None:
    with agent(scene):
        scene.assign(A)
        scene.until_registered(A)
    store.put(KEYS.rank(*A), encode(RankRecord(rank=0, node="n", incarnation=1, pid=1, state=RankState.STANDBY)))
    store.put(KEYS.rank(*B), encode(RankRecord(rank=1, node="m", incarnation=2, pid=1, state=RankState.STANDBY)))
    with agent(scene):
        state = scene.until(lambda s: "n" in s.agents and A not in s.ranks, "the stale record gone")
        assert B in state.ranks, "another node's"
        assert len(scene.events("rank_spawned")) == 1
        scene.assign((0, 5))
        scene.until_registered((0, 5))


def test_a_second_agent_of_the_same_node_is_refused(
    scene: Scene, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.agent.begin.TAKEOVER_S", 0.3)
    store.put(KEYS.agent("n"), encode(AgentRecord(node="n", pid=os.getpid(), started=1.0)))
    with pytest.raises(Fenced, match=r"another agent \(pid \d+\) runs as node n"), agent(scene) as thread:
        eventually(lambda: not thread.is_alive(), 30, "the second agent to stand down")


def serve_model(scene: Scene, path: Path, *keys: RankId) -> None:
    """Have `keys` serve model "one" with experts "AAAA" and "BBBB", on record as the controller leaves it."""
    (path / "model").write_text("one")
    (path / "experts").write_text("AAAABBBB")
    scene.assign(*keys)
    scene.until_registered(*keys)
    revision = scene.stage(1, *keys)
    state = scene.until(lambda s: all(s.ranks[key].prepared_revision == revision for key in keys), "prepared")
    known = learned(state)
    assert known == Checkpoint(parts={"weights": "one", "kernels": "small"}, experts=(b"AAAABBBB",))
    scene.commit()
    scene.store.put(KEYS.checkpoint, encode(known))


def test_a_rank_that_loaded_another_model_is_refused_at_once_and_others_serve(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALL_WORKER_DIARY", str(tmp_path))
    with agent(scene):
        serve_model(scene, tmp_path, A, B)
        (tmp_path / "model").write_text("two")
        later = RankId(1, 9)
        published = scene.store.watch(KEYS.rank(*later), 0)
        monkeypatch.setattr("workers.agent.decide._refusals", lambda *_: [])  # the next look would be too late
        os.kill(scene.state().ranks[B].pid, signal.SIGKILL)
        scene.until(lambda s: B not in s.ranks, "the death published")
        scene.assign(A, later)
        pid = scene.until_registered(A, later).ranks[later].pid
        revision = scene.stage(2, A, later)
        records = until_gone(published)
        assert len(records) > 1
        assert not any(record.identity for record in records), "the controller would start another rank in the slot"
        exited = scene.until(lambda s: s.exits[1].incarnation == 9, "the refusal").exits[1]
        assert (exited.refused, exited.quarantined) == (True, True)
        assert exited.reason == (
            "rank 1 on node n has another model than the cluster serves: weights (two instead of one)"
        )
        eventually(lambda: not psutil.pid_exists(pid), 30, "its process ended")
        assert later not in scene.state().ranks
        assert scene.until(lambda s: s.ranks[A], "the other one").ranks[A].prepared_revision < revision
        [refused] = scene.events("rank_refused")
        assert (refused.rank, refused.fields["reason"]) == (1, exited.reason)
        assert [event.rank for event in scene.events("rank_quarantined")] == [1]
        eventually(lambda: len(scene.events("rank_exited")) == 2, 30, "its exit status")
        assert scene.state().exits[1].reason == exited.reason, "that we killed it is no news"


def until_gone(watch: Watch) -> list[RankRecord]:
    """All that was published of a rank until its record was withdrawn."""
    records: list[RankRecord] = []
    with closing(watch):
        while True:
            batch = watch.next(30.0)
            assert batch is not None, "the record stays"
            for event in batch.events:
                if event.kind == "delete":
                    return records
                records.append(decode(event.kv.value, RankRecord))


def test_an_expert_with_other_weights_is_not_used_by_a_serving_rank_and_refuses_a_new_one(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALL_WORKER_DIARY", str(tmp_path))
    with agent(scene):
        serve_model(scene, tmp_path, A)
        (tmp_path / "experts").write_text("AAAAXXXX")
        scene.assign(A, C)
        scene.until_registered(A, C)
        revision = scene.stage(2, A, C)
        state = scene.until(lambda s: 2 in s.exits and s.ranks[A].failed_revision == revision, "both failed")
        assert "weights of expert 1 of MoE layer 0" in state.ranks[A].prepare_error
        assert state.ranks[A].prepared_revision < revision
        assert "weights of expert 1 of MoE layer 0" in state.exits[2].reason
        assert (state.exits[2].refused, 0 in state.exits) == (True, False)

"""A node's agent: runs the ranks that the controller assigned to this node, as a kubelet runs pods, and records them.

Light: no torch. One thread decides and acts (`Agent.run`); what others notice (the store's mirror, the executor, the
end of a call) they post to it. What to do is `agent_state.decide`; what stands in the store is the registrar's. The
agent's end is its ranks' end: they read its death pipes, and no other process has a copy of the write ends.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import structlog
from msgspec.structs import replace as changed

from membership.base import failpoints
from membership.base.enums import DetectedBy
from membership.base.errors import ElasticError
from membership.base.events import EventLog
from membership.base.rank_id import RankId
from membership.base.timing import ATTACH_TIMEOUT_S, RETIRE_TIMEOUT_S
from membership.store.interface import Store
from membership.store.keys import Keys
from membership.store.mirror import Mirror
from membership.store.records import AgentRecord, ClusterConfig
from workers.agent import decide
from workers.agent.begin import wait_for_config, wait_for_name
from workers.agent.decide import (
    Attach,
    Effect,
    Heartbeat,
    Life,
    Load,
    LocalRank,
    Prepare,
    Retire,
    RetireEpoch,
    Spawn,
)
from workers.agent.executor import Death, MultiprocExecutor
from workers.agent.exits import Exits
from workers.agent.forkserver import Serving
from workers.agent.handles import WorkerProcHandle
from workers.agent.preload import WORKER_CLASS, preload_for
from workers.agent.registrar import Registrar
from workers.agent.spares import Spares
from workers.protocol.restart_policy import RestartPolicy, policy_of
from workers.protocol.rpc import Outcome

TICK_S = 0.1
ATTACH_RETRY_S = 0.3
BEATS_PER_TTL = 8
HEARTBEATS_EVERY_S = 1.0

log = structlog.get_logger(__name__)


class Agent:
    """One life of a node's agent."""

    def __init__(
        self,
        store: Store,
        mirror: Mirror,
        keys: Keys,
        config: ClusterConfig,
        node: str,
        events: EventLog,
        worker_class: str,
        policy: RestartPolicy,
        spares: int = 0,
        *,
        executor: Callable[..., MultiprocExecutor] = MultiprocExecutor,
        registrar: Callable[..., Registrar] = Registrar,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        chance: random.Random | None = None,
    ) -> None:
        self._clock, self._wall = clock, wall
        me = AgentRecord(node=node, pid=os.getpid(), started=wall(), capacity=config.max_ranks)
        self.me = changed(me, spares_wanted=spares)
        self._mirror, self._config, self._events = mirror, config, events
        self._ranks: dict[RankId, LocalRank] = {}
        self._beats: dict[RankId, Heartbeat] = {}
        self._next_beat_check = 0.0
        self._heartbeats_at = 0.0
        self._buried: set[RankId] = set()
        self._exits = Exits(policy, chance)
        self._pids: dict[int, RankId] = {}
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._keys = keys
        self._registrar = registrar(store, keys, config.lease_ttl_s)
        self._executor = executor(
            config,
            node,
            worker_class=worker_class,
            preload=preload_for(worker_class, config.model, config.dtype),
            on_serving=lambda serving: self._post(self._forkserver_serves, serving),
            on_weights=partial(events.emit, cluster=config.cluster, node=node),
        )
        self._executor.register_failure_callback(lambda death: self._post(self._died, death))
        self._executor.register_exit_callback(lambda pid, status: self._post(self._exited, pid, status))
        self._spares = Spares(
            spares, self._executor, config, policy, self._post,
            lambda pids: self._registrar.publish(keys.agent(node), changed(self.me, spares=pids)),
            partial(events.emit, cluster=config.cluster, node=node),
        )  # fmt: skip
        self._unsubscribe = mirror.subscribe(lambda state: self._post(_nothing))
        self._registrar.publish(keys.agent(node), self.me)

    def run(self, stop: threading.Event) -> None:
        """Do what is assigned until asked to stop."""
        while not stop.is_set():
            self.turn()

    def leave(self, grace_s: float) -> None:
        """Ask to be relieved of all ranks, and go on until none is left; at most `grace_s`, and only if it can be."""
        if not grace_s:
            return
        self.me = changed(self.me, leaving=True)
        self._registrar.publish(self._keys.agent(self.me.node), self.me)
        ranks = sorted(rank for rank, _ in self._ranks)
        self._events.emit("agent_leaving", cluster=self._config.cluster, node=self.me.node, ranks=ranks)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline and decide.relief(self._mirror.state(), self.me, self._ranks):
            self.turn()

    def turn(self, timeout_s: float = TICK_S) -> None:
        """Take what was posted, waiting a little for something, and do what is due."""
        self._take_posted(timeout_s)
        now = self._wall()
        self._check_heartbeats(self._clock())
        state = self._mirror.state()
        for key in decide.stale_records(state, self.me.node, self._ranks):
            self._registrar.withdraw(key)
        self._act(decide.decide(state, self.me, self._ranks, self._buried, now))
        self._spares.tend(state, now)

    def close(self) -> None:
        """End the ranks, then give up the leases."""
        self._unsubscribe()
        self._executor.shutdown()
        self._registrar.close()

    def _post(self, work: Callable[..., None], *args: Any) -> None:
        self._posted.put(partial(work, *args))

    def _take_posted(self, timeout_s: float) -> None:
        try:
            if timeout_s:
                self._posted.get(timeout=timeout_s)()
            while True:
                self._posted.get_nowait()()
        except queue.Empty:
            return

    # --- acting -------------------------------------------------------------------------------------------------

    def _act(self, effects: list[Effect]) -> None:
        self._spawn([e.key for e in effects if isinstance(e, Spawn)])
        for effect in effects:
            if isinstance(effect, Retire):
                self._retire(effect)
            elif isinstance(effect, Attach):
                self._attach(effect)
            elif isinstance(effect, Load):
                self._update(effect.key, loading=True)
                self._call(effect.key, "initialise", (), self._config.launch_deadline_s, self._loaded, effect.revision)
            elif isinstance(effect, Prepare):
                self._update(effect.key, preparing_revision=effect.revision)
                args, limit_s = (effect.view, effect.peers), self._config.launch_deadline_s
                self._call(effect.key, "prepare_epoch", args, limit_s, self._prepared, effect.revision)
            elif isinstance(effect, RetireEpoch):
                self._update(effect.key, retired=effect.mark)
                key, epoch = effect.key, effect.epoch
                self._call(key, "retire_epoch", (epoch,), RETIRE_TIMEOUT_S, self._retired_epoch, epoch)

    def _spawn(self, keys: list[RankId]) -> None:
        for key in keys:
            failpoints.hit("agent.before.spawn", key.rank)
            self._ranks[key] = LocalRank(*key, started=self._wall())
            self._update(key)
            self._emit("rank_spawned", key)
        left = [key for key in keys if not self._spares.take(key, self._adopted)]
        if left:
            self._fork(left)

    def _fork(self, keys: list[RankId]) -> None:
        limit_s = self._config.launch_deadline_s
        try:
            self._executor.start(keys, limit_s, lambda key, outcome: self._post(self._started, key, outcome))
        except OSError as error:  # no process, descriptor or memory to be had: others must go on
            for key in keys:
                self._emit("rank_died", key, detected_by=DetectedBy.START, reason=str(error))
                self._bury(key, f"cannot be started: {error}")

    def _retire(self, effect: Retire) -> None:
        key = effect.key
        self._emit("rank_retiring", key, reason=effect.failure or "not assigned any more")
        if effect.failure:
            self._bury(key, effect.failure)
        else:
            self._update(key, life=Life.ENDING)
        self._executor.retire([key], lambda key: self._post(self._ended, key), kill=bool(effect.failure))

    def _attach(self, effect: Attach) -> None:
        self._update(effect.key, attaching_token=effect.token)
        args = (effect.token, effect.broadcast_handle, effect.mask_handle)
        self._call(effect.key, "attach_engine", args, ATTACH_TIMEOUT_S, self._attached, effect.token)

    def _call(
        self,
        key: RankId,
        method: str,
        args: tuple[Any, ...],
        limit_s: float,
        then: Callable[[RankId, int, Any, str], None],
        subject: int,
    ) -> None:
        """Call one rank; `then` gets (key, subject, result, "") or (key, subject, None, error) in our thread."""

        def done(future: Future[Outcome]) -> None:
            error = future.exception(timeout=0)
            result = None if error else future.result(timeout=0)[key]
            self._post(self._called, key, then, subject, result, str(error) if error else "")

        self._executor.submit(method, args, keys=[key], timeout_s=limit_s).future.add_done_callback(done)

    def _called(
        self, key: RankId, then: Callable[[RankId, int, Any, str], None], subject: int, result: Any, error: str
    ) -> None:
        if key in self._ranks:
            then(key, subject, result, error)

    # --- what came of it ----------------------------------------------------------------------------------------

    def _started(self, key: RankId, outcome: WorkerProcHandle | ElasticError) -> None:
        rank = self._ranks.get(key)
        if isinstance(outcome, ElasticError):
            if rank is not None and rank.life is Life.ENDING:
                self._ended(key)
            elif rank is not None:
                self._emit("rank_died", key, detected_by=DetectedBy.START, reason=str(outcome))
                self._bury(key, str(outcome))
            return
        self._pids[outcome.child.pid] = key
        if rank is None or rank.life is Life.ENDING:
            self._executor.retire([key], lambda key: self._post(self._ended, key), kill=True)
            return
        self._beats[key] = Heartbeat(-1, self._clock())
        self._update(
            key, life=Life.READY, pid=outcome.child.pid,
            liveness_handle=outcome.liveness_handle, exchange_handle=outcome.exchange_handle,
        )  # fmt: skip
        self._emit("rank_ready", key, pid=outcome.child.pid, took_ms=_ms(self._wall() - rank.started))

    def _adopted(self, key: RankId, outcome: WorkerProcHandle | ElasticError, fingerprint: str) -> None:
        """A spare has become this rank; or it has not, and the rank starts as any other."""
        if isinstance(outcome, ElasticError):
            rank = self._ranks.get(key)
            if rank is not None and rank.life is Life.STARTING:
                self._fork([key])
            elif rank is not None:
                self._ended(key)
            return
        self._started(key, outcome)
        if key in self._ranks:
            self._update(key, loaded=True, fingerprint=fingerprint)

    def _attached(self, key: RankId, token: int, handle: Any, error: str) -> None:
        if error:
            log.warning("attach_failed", rank=key.rank, token=token, error=error)
            self._update(key, attaching_token=0, attach_not_before=self._wall() + ATTACH_RETRY_S)
        else:
            self._update(key, attaching_token=0, attached_token=token, response_handle=handle)
            self._emit("rank_attached", key, token=token)

    def _loaded(self, key: RankId, revision: int, fingerprint: Any, error: str) -> None:
        if error:
            self._emit("rank_load_failed", key, error=error)
            self._update(key, loading=False, failed_revision=revision, prepare_error=error)
        else:
            self._update(key, loading=False, loaded=True, fingerprint=fingerprint)
            self._emit("rank_loaded", key, took_ms=_ms(self._wall() - self._ranks[key].started))

    def _prepared(self, key: RankId, revision: int, result: Any, error: str) -> None:
        if error:
            self._emit("rank_prepare_failed", key, revision=revision, error=error)
            self._update(key, failed_revision=revision, prepare_error=error)
        else:
            self._update(key, prepared_revision=revision, prepare_error="")
            self._emit("rank_prepared", key, revision=revision, **(result if isinstance(result, dict) else {}))

    def _retired_epoch(self, key: RankId, epoch: int, result: Any, error: str) -> None:
        if error:
            log.warning("retire_epoch_failed", rank=key.rank, epoch=epoch, error=error)

    def _died(self, death: Death) -> None:
        if death.key in self._ranks:
            self._emit("rank_died", death.key, pid=death.pid, detected_by=death.detected_by)
            self._bury(death.key, f"detected by {death.detected_by}")
        self._spares.died(death.key, f"detected by {death.detected_by}")
        self._executor.forget(death.key)

    def _exited(self, pid: int, status: int) -> None:
        """The exit status, which comes after the death was noticed: put it into the exit record."""
        key = self._pids.pop(pid, None)
        if key is None:
            return
        how = {"signal": -status} if status < 0 else {"exit_code": status}
        self._emit("rank_exited", key, pid=pid, **how)
        if (told := self._exits.ended(key, status)) is not None:
            self._registrar.record_exit(told)

    def _ended(self, key: RankId) -> None:
        """A rank that was asked to go has gone."""
        if self._ranks.pop(key, None) is not None:
            self._beats.pop(key, None)
            self._buried.add(key)
            self._registrar.withdraw(key)
            self._emit("rank_retired", key)

    def _bury(self, key: RankId, reason: str) -> None:
        """The rank is dead: its record goes at once, together with the restart policy's verdict."""
        del self._ranks[key]
        self._beats.pop(key, None)
        self._buried.add(key)
        verdict = self._exits.died(key, reason, self._mirror.state().exits, self._wall())
        self._registrar.withdraw(key, verdict)
        if verdict.quarantined:
            self._emit("rank_quarantined", key, reason=verdict.reason)

    def _check_heartbeats(self, now: float) -> None:
        ttl_s = self._config.lease_ttl_s
        if now < self._next_beat_check:
            return
        self._next_beat_check = now + ttl_s / BEATS_PER_TTL
        for key, seen in list(self._beats.items()):
            worker = self._executor.workers.get(key)
            if worker is None:
                continue
            self._beats[key] = beat = decide.observe(seen, worker.liveness.beats, now)
            self._registrar.set_renewing(key, decide.advancing(beat))
            if decide.hung(beat, now, after_s=ttl_s) and self._ranks[key].life is Life.READY:
                silence = f"no heartbeat for {now - beat.advanced_at:.1f} s"
                self._emit("rank_died", key, pid=worker.child.pid, detected_by=DetectedBy.HEARTBEAT, reason=silence)
                self._bury(key, silence)
                self._executor.retire([key], lambda key: self._post(self._ended, key), kill=True)
        self._spares.check(now)
        if now >= self._heartbeats_at:
            self._heartbeats_at = now + HEARTBEATS_EVERY_S
            told = decide.heartbeats(self.me.node, self._beats, now, self._wall())
            self._registrar.note(self._keys.heartbeats(self.me.node), told, beside=self._keys.agent(self.me.node))

    # --- small things -------------------------------------------------------------------------------------------

    def _update(self, key: RankId, **changes: Any) -> None:
        self._ranks[key] = rank = replace(self._ranks[key], **changes)
        self._registrar.publish_rank(decide.record_of(rank, self.me.node))

    def _emit(self, kind: str, key: RankId, **fields: Any) -> None:
        view = self._mirror.state().view
        self._events.emit(
            kind, cluster=self._config.cluster, epoch=view.epoch if view else 0, rank=key.rank,
            incarnation=key.incarnation, node=self.me.node, **fields,
        )  # fmt: skip

    def _forkserver_serves(self, serving: Serving) -> None:
        if serving.error:
            log.error("forkserver_cannot_serve", error=serving.error)
        self._events.emit(
            "forkserver_ready", cluster=self._config.cluster, node=self.me.node,
            error=serving.error, import_ms=_ms(serving.import_s),
        )  # fmt: skip


def run_agent(
    store: Store,
    cluster: str,
    node: str,
    stop: threading.Event,
    events: EventLog,
    worker_class: str = WORKER_CLASS,
    policy: RestartPolicy | None = None,
    spares: int = 0,
    drain_grace_s: float = 0.0,
) -> None:
    """Be the agent of `node` until `stop` is set, then, for up to `drain_grace_s`, until others do its ranks' work."""
    keys = Keys(cluster)
    with Mirror(store, cluster) as mirror:
        config = wait_for_config(mirror, stop)
        if config is None:
            return
        wait_for_name(mirror, node, stop)
        agent = Agent(store, mirror, keys, config, node, events, worker_class, policy or policy_of(config), spares)
        try:
            agent.run(stop)
            agent.leave(drain_grace_s)
        finally:
            agent.close()


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


def _nothing() -> None:
    """Only to wake the agent's thread."""

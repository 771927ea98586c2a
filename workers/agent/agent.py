"""A node's agent: runs the ranks that the controller assigned to this node, as a kubelet runs pods, and records them.

Light: no torch. One thread decides and acts (`Agent.run`). The store's mirror, the executor and the ends of calls post
to it. What to do is `decide.decide`; the registrar keeps the records in the store. When the agent ends its ranks end:
they read its death pipes, and no other process has a copy of the write ends.
"""

from __future__ import annotations

import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from msgspec.structs import replace as changed

from membership.base import failpoints
from membership.base.attempts import Attempts, is_shortage, pause_s
from membership.base.endings import OomKills, kills_so_far
from membership.base.enums import DetectedBy
from membership.base.errors import ElasticError, NoResources, WaitTimeout
from membership.base.events import EventLog
from membership.base.network import Network
from membership.base.rank_id import RankId
from membership.base.timing import ATTACH_TIMEOUT_S, RETIRE_TIMEOUT_S
from membership.planning.identity import refusal
from membership.store.interface import Store
from membership.store.keys import Keys
from membership.store.mirror import Mirror
from membership.store.records import AgentRecord, ClusterConfig, ClusterState
from workers.agent import decide
from workers.agent.begin import admitted, model_of
from workers.agent.decide import LocalRank, Phase
from workers.agent.devices import Devices, Noted
from workers.agent.executor import Death, Elsewhere, MultiprocExecutor
from workers.agent.exits import Exits
from workers.agent.forkserver import Serving
from workers.agent.handles import WorkerProcHandle
from workers.agent.join_secrets import JoinSecrets
from workers.agent.load_watch import UNTIL_IT_STALLS, Failing, LoadWatch
from workers.agent.preload import WORKER_CLASS
from workers.agent.registrar import Registrar
from workers.agent.restart_policy import policy_of
from workers.agent.spares import Spares
from workers.protocol.far_link import FarLink
from workers.protocol.host_links import HostLinks
from workers.protocol.rpc import Outcome, PendingCall
from workers.queue.handle import this_host

TICK_S = 0.1
ATTACH_RETRY_S = 0.3
CHECKS_PER_TTL = 8
HEARTBEATS_EVERY_S = 1.0
REPLACED = "ranks of this node serve what they hold, and new ones get that while its agent lives"

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class AgentOptions:
    """How an agent runs its node."""

    worker_class: str = WORKER_CLASS
    spares: int = 0  # warm spares to keep
    drain_grace_s: float = 0.0  # how long to wait, once asked to stop, for other nodes to take over its ranks
    capacity: int = 0  # most ranks on this node; 0: as many as the cluster may have
    model: str = ""  # this node's copy of the checkpoint, if it is not where `elastic serve` has it
    network: Network | None = None  # how ranks and engines on other hosts are reached
    report: Callable[[str], None] = lambda lacking: None  # what is missing until all that is meant for this node serves
    code: str = ""  # versions of what its ranks compute with, for other hosts to compare
    machine: str = ""  # what this node ends with, and the zone that is in
    zone: str = ""
    killable: bool = False  # whether its ranks may be killed on request
    keep: Path | None = None  # where config and tokenizer go that this node gets of another


@dataclass(frozen=True)
class Parts:
    """What an agent is made of. A simulation has its own."""

    executor: Callable[..., MultiprocExecutor] = MultiprocExecutor
    registrar: Callable[..., Registrar] = Registrar
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    chance: random.Random | None = None
    oom_kills: Callable[[], int | None] = kills_so_far


class Agent:
    """One run of a node's agent."""

    def __init__(
        self,
        store: Store,
        mirror: Mirror,
        config: ClusterConfig,
        node: str,
        events: EventLog,
        options: AgentOptions,
        parts: Parts | None = None,
    ) -> None:
        parts = parts or Parts()
        self._clock, self._wall = parts.clock, parts.wall
        self._secrets = JoinSecrets(options.network, self._clock)
        self.me = AgentRecord(
            node=node, pid=os.getpid(), started=self._wall(), capacity=options.capacity or config.max_ranks,
            spares_wanted=options.spares, importing=True, code=options.code, join_keys=self._secrets.keys,
            host=this_host() if options.network is not None else "",
            address=options.network.address if options.network is not None else "",
            machine=options.machine, zone=options.zone, killable=options.killable,
        )  # fmt: skip
        if options.model:
            config = changed(config, model=options.model)
        self._mirror, self._config, self._report = mirror, config, options.report
        self._whole = False  # once all that was meant for this node has served
        self._ranks: dict[RankId, LocalRank] = {}
        self._heartbeats: dict[RankId, decide.Heartbeat] = {}
        self._loads = LoadWatch(config)
        self._next_check = self._publish_heartbeats_at = 0.0  # when heartbeats are looked at next, and written
        self._attempts = Attempts("agent", clock=self._clock)
        self._start_failures, self._start_at = 0, 0.0  # in a row, for want of something; when to start again after that
        self._links, self._devices = HostLinks(), Devices(self._emit)
        self._asked: set[RankId] = set()  # for their links, and have not answered yet
        self._unreported: dict[RankId, float] = {}  # ranks that have prepared a view -> since when
        self._buried: set[RankId] = set()
        self._exits = Exits(policy := policy_of(config), parts.chance, OomKills(parts.oom_kills))
        self._pids: dict[int, RankId] = {}
        self._posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._keys = Keys(config.cluster)
        self._registrar = parts.registrar(store, self._keys, config.lease_ttl_s)
        self._emit_of_node = partial(events.emit, cluster=config.cluster, node=node)
        self._executor = parts.executor(
            config,
            node,
            worker_class=options.worker_class,
            on_serving=partial(self._post, self._forkserver_serves),
            on_weights=self._emit_of_node,
            elsewhere=Elsewhere(options.network),
        )
        self._executor.register_failure_callback(partial(self._post, self._died))
        self._executor.register_exit_callback(partial(self._post, self._exited))
        self._spares = Spares(
            options.spares, self._executor, config, policy, self._post, self._publish_spares, self._emit_of_node
        )
        self._unsubscribe = mirror.subscribe(lambda state: self._post(_nothing))
        self._publish_me()

    def run(self, stop: threading.Event) -> None:
        """Do what is assigned until asked to stop."""
        while not stop.is_set():
            if not self._attempts.run(self.turn):
                stop.wait(TICK_S)

    def leave(self, grace_s: float, hurry: threading.Event) -> None:
        """Ask other nodes to take over the ranks, and work until that is done: at most `grace_s`, not if none can."""
        if not grace_s:
            return
        self.me = changed(self.me, leaving=True)
        self._publish_me()
        ranks = sorted(rank for rank, _ in self._ranks)
        self._emit_of_node("agent_leaving", ranks=ranks)
        deadline = time.monotonic() + grace_s
        while (
            not hurry.is_set()
            and time.monotonic() < deadline
            and decide.relief(self._mirror.state(), self.me, self._ranks)
        ):
            self.turn()

    def turn(self, timeout_s: float = TICK_S) -> None:
        """Take what was posted, waiting a little for something, and do what is due. Fenced: its name is another's."""
        self._registrar.require_name()
        self._take_posted(timeout_s)
        now = self._wall()
        self._check_heartbeats(self._clock())
        state = self._mirror.state()
        self._follow_join_secret(state)
        for key in decide.stale_records(state, self.me.node, self._ranks):
            self._registrar.withdraw(key)
        self._act(decide.decide(state, self.me, self._ranks, self._buried, now))
        if decide.report_due(self._ranks, self._unreported, self._clock()):
            self._publish_ranks(self._unreported.keys() & self._ranks.keys())
            self._unreported.clear()
        self._spares.tend(state, now)
        for process in decide.pools_to_free(state, self._executor.left_pools()):
            self._executor.free_pool(process)
        for number in decide.expert_pieces_to_free(state, self.me.node, self._executor.expert_pieces()):
            self._executor.free_expert_piece(number)
        if not self._whole:
            self._report(lacking := decide.lacking(state, self.me, self._buried, now))
            self._whole = not lacking

    def close(self, hurry: threading.Event | None = None) -> None:
        """End the ranks, by SIGKILL once `hurry` is set; then give up the leases, and what was assigned."""
        self._unsubscribe()
        self._executor.shutdown((hurry or threading.Event()).is_set)
        self._registrar.close()
        self._registrar.unassign(self.me)

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

    def _publish_me(self) -> None:
        self._registrar.publish(self._keys.agent(self.me.node), self.me)

    def _publish_spares(self, pids: tuple[int, ...]) -> None:
        self.me = changed(self.me, spares=pids)
        self._publish_me()

    # --- acting -------------------------------------------------------------------------------------------------

    def _act(self, effects: list[decide.Effect]) -> None:
        if self._clock() >= self._start_at:
            self._spawn([e.key for e in effects if isinstance(e, decide.Spawn)])
        for effect in effects:
            if isinstance(effect, decide.Retire):
                self._retire(effect)
            elif isinstance(effect, decide.Refuse):
                self._refuse(effect.key, effect.reason)
            elif isinstance(effect, decide.Attach):
                self._attach(effect)
            elif isinstance(effect, decide.Kill):
                self._ranks[effect.key] = replace(self._ranks[effect.key], killed=True)
                self._emit("rank_kill_requested", effect.key, by=effect.by)
                self._executor.kill(effect.key)
            elif isinstance(effect, decide.Load):
                self._update(effect.key, loading=True)
                self._emit("rank_load_started", effect.key)
                self._call_load(effect.key, "initialise", (), partial(self._loaded, effect))
            elif isinstance(effect, decide.Prepare):
                self._update(effect.key, preparing_revision=effect.revision)
                args = effect.view, effect.peers
                self._call_load(effect.key, "prepare_epoch", args, partial(self._prepared, effect))
            elif isinstance(effect, decide.RetireEpoch):
                self._update(effect.key, retired=effect.mark)
                then = partial(self._retired_epoch, effect)
                self._call(effect.key, "retire_epoch", (effect.epoch,), RETIRE_TIMEOUT_S, then)

    def _follow_join_secret(self, state: ClusterState) -> None:
        """Ranks that are started now listen with the secret that the cluster uses now."""
        renewed = self._secrets.look(state.config)
        me = changed(self.me, join_keys=self._secrets.keys)
        if self._secrets.network is not None:
            me = changed(me, **self._executor.use(self._secrets.network, state))
        if me != self.me:
            self.me = me
            self._publish_me()
        if renewed:
            self._spares.renew()

    def _spawn(self, keys: list[RankId]) -> None:
        for key in keys:
            failpoints.hit("agent.before.spawn", key.rank)
            self._ranks[key] = LocalRank(key, started=self._wall(), join_key=self._secrets.key)
            self._update(key)
            self._emit("rank_spawned", key)
        left = [key for key in keys if not self._spares.take(key, self._adopted)]
        if left:
            self._fork(left)

    def _fork(self, keys: list[RankId]) -> None:
        try:
            self._executor.start(keys, self._config.launch_deadline_s, partial(self._post, self._started))
        except Exception as error:
            if not is_shortage(error):
                raise
            for key in keys:
                self._postpone(key, str(error))

    def _postpone(self, key: RankId, reason: str) -> None:
        """No process, descriptor or memory to be had for a rank: it is no death of its slot, and tried again later."""
        self._start_failures += 1
        self._start_at = self._clock() + pause_s(self._start_failures)
        self._emit("rank_start_postponed", key, reason=reason)
        log.warning("rank_start_postponed", rank=key.rank, error=reason)
        del self._ranks[key]
        self._registrar.withdraw(key)

    def _retire(self, effect: decide.Retire) -> None:
        key = effect.key
        self._emit("rank_retiring", key, reason=effect.failure or "not assigned any more")
        if effect.failure:
            self._bury(key, effect.failure)
        else:
            self._update(key, phase=Phase.ENDING)
        self._end(key, kill=bool(effect.failure))

    def _refuse(self, key: RankId, reason: str) -> None:
        """No new start would help: the slot is set aside until an operator has done something about it."""
        self._emit("rank_refused", key, reason=reason)
        self._bury(key, reason, refused=True)
        self._end(key, kill=True)
        if not self._members() & self._ranks.keys():  # else the store holds what those serve
            self._executor.drop_weights()

    def _end(self, key: RankId, *, kill: bool) -> None:
        self._executor.retire([key], partial(self._post, self._ended), kill=kill)

    def _attach(self, effect: decide.Attach) -> None:
        self._update(effect.key, attaching_token=effect.token)
        self._executor.workers[effect.key].liveness.call_off_before(self._clock())  # it may wait there to no purpose
        args = effect.token, effect.broadcast_handle, effect.mask_handle, self._secrets.retired
        self._call(effect.key, "attach_engine", args, ATTACH_TIMEOUT_S, partial(self._attached, effect))

    def _call(
        self, key: RankId, method: str, args: tuple[Any, ...], limit_s: float, then: Callable[[Any, str], None]
    ) -> PendingCall:
        """Call one rank. `then` gets (result, "") or (None, error) in our thread, unless the rank is gone by then."""

        def called(future: Future[Outcome]) -> None:
            error = future.exception(timeout=0)
            if key in self._ranks:
                then(None if error else future.result(timeout=0)[key], str(error) if error else "")

        pending = self._executor.submit(method, args, keys=[key], timeout_s=limit_s)
        pending.future.add_done_callback(partial(self._post, called))
        return pending

    def _call_load(self, key: RankId, method: str, args: tuple[Any, ...], then: Callable[[Any, str], None]) -> None:
        """A call that lasts as long as the rank makes progress."""
        pending = self._call(key, method, args, UNTIL_IT_STALLS, then)
        self._loads.begin(key, pending, self._clock())
        pending.future.add_done_callback(lambda _: self._post(self._loads.end, key, pending))

    # --- what came of it ----------------------------------------------------------------------------------------

    def _started(self, key: RankId, outcome: WorkerProcHandle | ElasticError) -> None:
        rank = self._ranks.get(key)
        if isinstance(outcome, ElasticError):
            if rank is not None and rank.phase is Phase.ENDING:
                self._ended(key)
            elif rank is not None and isinstance(outcome, NoResources):
                self._postpone(key, str(outcome))
            elif rank is not None:
                self._emit("rank_died", key, detected_by=DetectedBy.START, reason=str(outcome))
                self._bury(key, str(outcome))
            return
        self._start_failures = 0
        self._pids[outcome.child.pid] = key
        if rank is None or rank.phase is Phase.ENDING:
            self._end(key, kill=True)
            return
        self._heartbeats[key] = decide.Heartbeat(-1, self._clock())
        liveness, exchange = outcome.liveness_handle, outcome.exchange_handle
        self._update(key, phase=Phase.READY, pid=outcome.child.pid, liveness_handle=liveness, exchange_handle=exchange)
        self._emit("rank_ready", key, pid=outcome.child.pid, took_ms=_ms(self._wall() - rank.started))

    def _adopted(self, key: RankId, outcome: WorkerProcHandle | ElasticError, identity: Mapping[str, str]) -> None:
        """A spare has become this rank; or it has not, and the rank starts as any other."""
        if isinstance(outcome, ElasticError):
            rank = self._ranks.get(key)
            if rank is not None and rank.phase is Phase.STARTING:
                self._fork([key])
            elif rank is not None:
                self._ended(key)
            return
        self._started(key, outcome)
        if key in self._ranks:
            self._identify(key, identity)

    def _attached(self, effect: decide.Attach, handle: Any, error: str) -> None:
        key, token = effect.key, effect.token
        if error:
            log.warning("attach_failed", rank=key.rank, token=token, error=error)
            self._update(key, attaching_token=0, attach_not_before=self._wall() + ATTACH_RETRY_S)
        else:
            self._update(key, attaching_token=0, attached_token=token, response_handle=handle)
            self._emit("rank_attached", key, token=token)

    def _loaded(self, effect: decide.Load, found: Any, error: str) -> None:
        key = effect.key
        if error:
            self._emit("rank_load_failed", key, error=error)
            self._update(key, loading=False, failed_revision=effect.revision, prepare_error=error)
        else:
            self._emit("rank_loaded", key, took_ms=_ms(self._wall() - self._ranks[key].started))
            self._identify(key, found.parts)
            self._note_replaced(found.replaced)

    def _identify(self, key: RankId, identity: Mapping[str, str]) -> None:
        """Publish what the rank has loaded. Another model is not published: the controller would see it before the slot
        is set aside, and start the next rank there.
        """
        loaded = replace(self._ranks[key], loading=False, loaded=True, identity=identity)
        reason = refusal(self._mirror.state(), decide.record_of(loaded, self.me.node))
        if reason and key not in self._members():
            self._refuse(key, reason)
        else:
            self._update(key, loading=False, loaded=True, identity=identity)

    def _note_replaced(self, files: tuple[str, ...]) -> None:
        """A rank found other files than this node has loaded, or again the same."""
        trouble = f"{', '.join(files)} in {self._config.model} changed; {REPLACED}" if files else ""
        if trouble != self.me.trouble:
            self.me = changed(self.me, trouble=trouble)
            self._publish_me()
            kind = "checkpoint_replaced" if files else "checkpoint_put_back"
            self._emit_of_node(kind, path=self._config.model, files=list(files))

    def _prepared(self, effect: decide.Prepare, result: Any, error: str) -> None:
        key, revision = effect.key, effect.revision
        if decide.replaced(self._ranks[key], revision):
            return
        digests = (found := dict(result) if isinstance(result, dict) else {}).pop("expert_digests", ())
        if not error and (error := self._refused(key, digests)) and key not in self._members():
            self._refuse(key, error)
        elif error:
            self._emit("rank_prepare_failed", key, revision=revision, error=error)
            self._update(key, failed_revision=revision, prepare_error=error)
        else:
            at = self._ranks[key].prepared_at or self._wall()
            done = {"prepared_revision": revision, "prepared_at": at, "prepare_error": "", "expert_digests": digests}
            self._ranks[key] = replace(self._ranks[key], **done)
            self._unreported.setdefault(key, self._clock())
            self._emit("rank_prepared", key, revision=revision, **found)

    def _refused(self, key: RankId, digests: tuple[bytes, ...]) -> str:
        """Why the rank must not use what it has just loaded, or nothing."""
        loaded = decide.record_of(replace(self._ranks[key], expert_digests=digests), self.me.node)
        return refusal(self._mirror.state(), loaded)

    def _members(self) -> set[RankId]:
        view = self._mirror.state().view
        return {member.id for member in view.members} if view is not None else set()

    def _retired_epoch(self, effect: decide.RetireEpoch, result: Any, error: str) -> None:
        if error:
            log.warning("retire_epoch_failed", rank=effect.key.rank, epoch=effect.epoch, error=error)

    def _died(self, death: Death) -> None:
        if death.key in self._ranks:
            self._emit("rank_died", death.key, pid=death.pid, detected_by=death.detected_by)
            worker = self._executor.workers.get(death.key)
            said = self._devices.died(death.key, worker.liveness if worker is not None else None)
            why = f"{said.last_words}; " if said.last_words else ""
            self._bury(death.key, f"{why}detected by {death.detected_by}", device_full=said.full)
        self._spares.died(death.key, f"detected by {death.detected_by}")
        self._executor.forget(death.key)

    def _exited(self, pid: int, status: int) -> None:
        """The exit status comes after the death was noticed: put it into the exit record."""
        key = self._pids.pop(pid, None)
        if key is None:
            return
        how = {"signal": -status} if status < 0 else {"exit_code": status}
        self._emit("rank_exited", key, pid=pid, **how)
        if (record := self._exits.ended(key, status)) is not None:
            self._registrar.record_exit(record)

    def _ended(self, key: RankId) -> None:
        """A rank that was asked to end has ended."""
        if self._ranks.pop(key, None) is not None:
            self._heartbeats.pop(key, None)
            self._buried.add(key)
            self._registrar.withdraw(key)
            self._emit("rank_retired", key)

    def _bury(self, key: RankId, reason: str, **how: bool) -> None:
        """The rank is dead: its record goes at once, together with the restart policy's verdict."""
        prepared_at = self._ranks.pop(key).prepared_at
        self._heartbeats.pop(key, None)
        self._buried.add(key)
        verdict = self._exits.died(key, reason, self._mirror.state().exits, self._wall(), prepared_at, **how)
        self._registrar.withdraw(key, verdict)
        if verdict.quarantined:
            self._emit("rank_quarantined", key, reason=verdict.reason)

    def _check_heartbeats(self, now: float) -> None:
        ttl_s = self._config.lease_ttl_s
        if now < self._next_check:
            return
        self._next_check, pages = now + ttl_s / CHECKS_PER_TTL, dict[RankId, Noted]()
        for key, known in list(self._heartbeats.items()):
            worker = self._executor.workers.get(key)
            if worker is None:
                continue
            pages[key] = worker.liveness
            self._heartbeats[key] = seen = decide.observe(known, worker.liveness.heartbeats, now)
            self._registrar.set_renewing(key, decide.advancing(seen))
            if decide.hung(seen, now, after_s=ttl_s) and self._ranks[key].phase is Phase.READY:
                self._kill(key, DetectedBy.HEARTBEAT, f"no heartbeat for {now - seen.advanced_at:.1f} s")
            elif (given_up := self._loads.look(key, worker.liveness.load, now)) is not None:
                self._give_load_up(key, *given_up)
        self._spares.check(now)
        if now >= self._publish_heartbeats_at:
            self._publish_heartbeats_at = now + HEARTBEATS_EVERY_S
            node = self.me.node
            record = decide.heartbeats(node, self._heartbeats, self._loads.seen, now, self._wall())
            taking = self._executor.weights.taking_from if self.me.address else ()
            gpus = self._devices.look(pages)
            record = changed(record, links=self._links.record(), weights_from=taking, gpus=gpus)
            self._registrar.note(self._keys.heartbeats(node), record, beside=self._keys.agent(node))
            if self.me.address:
                self._ask_for_links()

    def _ask_for_links(self) -> None:
        """What ranks know of their links with other hosts is published with the next heartbeats."""
        self._links.keep(self._ranks.keys())
        self._asked &= self._ranks.keys()
        ready = [key for key, rank in self._ranks.items() if rank.phase is Phase.READY and key not in self._asked]
        for key in ready:
            self._asked.add(key)
            self._call(key, "far_links", (), ATTACH_TIMEOUT_S, partial(self._note_links, key))

    def _note_links(self, key: RankId, links: dict[RankId, FarLink] | None, error: str) -> None:
        self._asked.discard(key)
        if links is not None:
            others = {id: r.node for id, r in self._mirror.state().ranks.items() if r.node != self.me.node}
            self._links.reported(key, links, others)

    def _give_load_up(self, key: RankId, call: Failing, reason: str) -> None:
        """A rank that serves keeps what it has; another one would never get further."""
        self._emit("rank_load_stalled", key, reason=reason)
        if key in self._members():
            call.fail(WaitTimeout(reason))
        elif self._ranks[key].phase is Phase.READY:
            self._kill(key, DetectedBy.STALL, reason)

    def _kill(self, key: RankId, detected_by: DetectedBy, reason: str) -> None:
        self._emit("rank_died", key, pid=self._ranks[key].pid, detected_by=detected_by, reason=reason)
        self._bury(key, reason)
        self._exits.killed(key)
        self._end(key, kill=True)

    # --- small things -------------------------------------------------------------------------------------------

    def _update(self, key: RankId, **changes: Any) -> None:
        self._ranks[key] = replace(self._ranks[key], **changes)
        self._publish_ranks([key])

    def _publish_ranks(self, keys: Iterable[RankId]) -> None:
        node = self.me.node
        self._registrar.publish_all({self._keys.rank(*key): decide.record_of(self._ranks[key], node) for key in keys})

    def _emit(self, kind: str, key: RankId, **fields: Any) -> None:
        view = self._mirror.state().view
        fields |= {"epoch": view.epoch if view else 0, "rank": key.rank, "incarnation": key.incarnation}
        self._emit_of_node(kind, **fields)

    def _forkserver_serves(self, serving: Serving) -> None:
        if serving.error:
            log.error("forkserver_cannot_serve", error=serving.error)
        self.me = changed(self.me, importing=False)
        self._publish_me()
        self._emit_of_node("forkserver_ready", error=serving.error, import_ms=_ms(serving.import_s))


def run_agent(
    store: Store,
    cluster: str,
    node: str,
    stop: threading.Event,
    events: EventLog,
    options: AgentOptions | None = None,
    hurry: threading.Event | None = None,
) -> None:
    """Be the agent of `node` until `stop` is set, then until other nodes have its ranks' work (`drain_grace_s`).

    Once `hurry` is set, it waits for nothing more, and ends its ranks at once.
    """
    options, hurry = options or AgentOptions(), hurry or threading.Event()
    with Mirror(store, cluster) as mirror:
        config = mirror.wait_for_config(stop)
        if config is None:
            return
        network = admitted(mirror, config, node, options.network, stop)
        model = model_of(mirror, options.model, node, options.keep, network, stop)
        options = replace(options, network=network, model=model)
        agent = Agent(store, mirror, config, node, events, options)
        try:
            agent.run(stop)
            agent.leave(options.drain_grace_s, hurry)
        finally:
            agent.close(hurry)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 1)


def _nothing() -> None:
    """Only to wake the agent's thread."""

"""A node: the shipped agent over an executor whose ranks are simulated processes. They end with their agent."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from msgspec.structs import replace as changed

from chaos.simulation.gpus import Windows
from chaos.simulation.invariants import require
from chaos.simulation.process import Process
from chaos.simulation.rank import RankProcess
from membership.base.enums import DetectedBy
from membership.base.errors import ElasticError, RankDied, RankFailed, StoreUnavailable, WaitTimeout
from membership.base.rank_id import RankId
from membership.store.mirror import Mirror
from workers.agent.agent import Agent, AgentOptions, Parts
from workers.agent.decide import relief
from workers.agent.executor import LADDER_S, Death
from workers.agent.registrar import Registrar

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster

TICK_S = 0.15
READY_S = (0.03, 0.2)
KILL_AFTER_S = 3.0
GRACE_S = 20.0
OnStarted = Callable[[RankId, Any], None]


class Handle:
    """The agent's handle of a rank that is ready."""

    def __init__(self, rank: RankProcess) -> None:
        self.child = self.liveness = rank
        self.liveness_handle, self.exchange_handle = b"l", b"x%d.%d" % rank.key
        self.dead = ""


@dataclass(frozen=True)
class Pending:
    """A call under way."""

    future: Future[dict[RankId, Any]]
    key: RankId
    given_up: Callable[[Pending, ElasticError], None]

    def fail(self, error: ElasticError) -> None:
        """See workers/protocol/rpc.py."""
        self.given_up(self, error)


class SimExecutor:
    """In place of workers/agent/executor.py."""

    def __init__(self, host: Host, *args: Any, **kwargs: Any) -> None:
        self.workers: dict[RankId, Handle] = {}
        self._host = host
        self._starting: dict[RankId, tuple[RankProcess, OnStarted]] = {}
        self._going: set[RankId] = set()
        self._pools: set[RankId] = set()
        self.windows = Windows()
        self._calls: list[Pending] = []
        self._on_death: Callable[[Death], None] = lambda death: None
        self._on_exit: Callable[[int, int], None] = lambda pid, status: None

    def register_failure_callback(self, callback: Callable[[Death], None]) -> None:
        self._on_death = callback

    def register_exit_callback(self, callback: Callable[[int, int], None]) -> None:
        self._on_exit = callback

    def start(self, keys: Collection[RankId], timeout_s: float, on_started: OnStarted) -> None:
        """Fork ranks, each of which is ready a little later."""
        for key in keys:
            self._pools.add(key)
            rank = self._host.cluster.fork(key, self._host)
            self._starting[key] = (rank, on_started)
            rank.after(rank.random.uniform(*READY_S), self._ready, key)
            self._host.after(timeout_s, self._not_ready, key, WaitTimeout(f"rank {key[0]} was not ready"))

    def _ready(self, key: RankId) -> None:
        self._host.after(0.001, self._started, key)

    def _started(self, key: RankId) -> None:
        found = self._starting.pop(key, None)
        if found is not None:
            self.workers[key] = Handle(found[0])
            found[1](key, self.workers[key])
            self._host.wake(0.0)

    def _not_ready(self, key: RankId, error: ElasticError) -> None:
        found = self._starting.pop(key, None)
        if found is not None:
            found[0].die()
            found[1](key, error)
            self._host.wake(0.0)

    def submit(
        self, method: str, args: tuple[Any, ...] = (), *, keys: Collection[RankId] = (), timeout_s: float = 60.0
    ) -> Pending:
        (key,) = keys
        call = Pending(Future(), key, self._fail)
        worker = self.workers.get(key)
        if worker is None or worker.dead:
            call.future.set_exception(RankDied(f"rank {key[0]} is dead"))
            return call
        self._calls.append(call)
        reply = partial(self._host.after, 0.001, self._replied, call)
        self._host.clock.after(self._host.cluster.delay(), worker.child.call, method, args, reply)
        if timeout_s < math.inf:
            self._host.after(timeout_s, self._fail, call, WaitTimeout(f"{method}: no answer within {timeout_s:g} s"))
        return call

    def _replied(self, call: Pending, value: Any, error: str) -> None:
        if error:
            self._fail(call, RankFailed(error))
        elif call in self._calls:
            self._calls.remove(call)
            call.future.set_result({call.key: value})
            self._host.wake(0.0)

    def _fail(self, call: Pending, error: ElasticError) -> None:
        if call in self._calls:
            self._calls.remove(call)
            call.future.set_exception(error)
            self._host.wake(0.0)

    def kill(self, key: RankId) -> None:
        worker = self.workers.get(key)
        if worker is not None and not worker.dead:
            worker.child.die()

    def died(self, rank: RankProcess) -> None:
        self._host.after(0.001, self._bury, rank)
        self._host.after(max(0.004, rank.runs_on_for_s), self._exited, rank)

    def _bury(self, rank: RankProcess) -> None:
        self._not_ready(rank.key, RankDied(f"rank {rank.key[0]} ended before it was ready"))
        worker = self.workers.get(rank.key)
        if worker is None or worker.dead:
            return
        worker.dead = "its process ended"
        for call in [call for call in self._calls if call.key == rank.key]:
            self._fail(call, RankDied(f"rank {rank.key[0]} died"))
        if rank.key not in self._going:
            self._on_death(Death(rank.key, rank.pid, DetectedBy.PIDFD))
            self._host.wake(0.0)

    def _exited(self, rank: RankProcess) -> None:
        self._on_exit(rank.pid, rank.status)
        self._host.wake(0.0)

    def retire(self, keys: Collection[RankId], on_ended: Callable[[RankId], None], *, kill: bool = False) -> None:
        """End ranks. One that has died before is reported as any death."""
        for key in keys:
            if key in self._starting:
                self._host.after(0.001, self._starting[key][0].die)
            elif key in self.workers and self.workers[key].child.alive:
                rank = self.workers[key].child
                self._going.add(key)
                after_s = 0.001 if kill else KILL_AFTER_S if rank.stopped else 0.02
                self._host.after(after_s, self._end, rank, on_ended)

    def _end(self, rank: RankProcess, on_ended: Callable[[RankId], None]) -> None:
        rank.die()
        if rank.over:
            self._ended(rank, on_ended)
        else:
            self._host.after(min(rank.runs_on_for_s, LADDER_S[-1]), self._ended, rank, on_ended)

    def _ended(self, rank: RankProcess, on_ended: Callable[[RankId], None]) -> None:
        self._forget(rank.key)
        on_ended(rank.key)
        self._host.wake(0.0)

    def forget(self, key: RankId) -> None:
        self._host.after(0.0, self._forget, key)

    def _forget(self, key: RankId) -> None:
        self.workers.pop(key, None)
        self._going.discard(key)

    def left_pools(self) -> set[RankId]:
        return self._pools - self.workers.keys() - self._starting.keys()

    def free_pool(self, key: RankId) -> None:
        self._pools.discard(key)

    def expert_pieces(self) -> frozenset[int]:
        """Of a host without GPUs: none."""
        return frozenset()

    def check_pool(self, key: RankId) -> None:
        """Whether it may be read: RankFailed if it is not kept."""
        if key not in self._pools or not self._host.alive:
            raise RankFailed(f"the pool of {key} is not kept")

    def drop_weights(self) -> None:
        return  # a simulated host stores none

    def shutdown(self, hurry: Callable[[], bool]) -> None:
        for rank in [r for r in self._host.cluster.ranks.values() if r.host is self._host]:
            rank.die()


class SimAgent(Agent):
    """As shipped, with a check of each eviction: the rank must have been stopped or hung."""

    host: Host

    def _bury(self, key: RankId, reason: str, **how: bool) -> None:
        rank = self.host.cluster.ranks.get(key)
        if rank is not None and "heartbeat" in reason:
            ill = rank.stopped or rank.ill_until > self.host.clock.now - 0.5
            require(ill, f"rank {key[0]} beats, and its agent evicted it: {reason}")
        super()._bury(key, reason, **how)


class Host(Process):
    """One agent process of a node."""

    def __init__(self, cluster: Cluster, node: str, number: int, at: str) -> None:
        super().__init__(cluster, f"agent {node}.{number}", at)
        self.node = node
        self.mirror: Mirror | None = None
        self.agent: SimAgent | None = None
        self.executor = SimExecutor(self)
        self.registrar: Registrar | None = None
        self.leaves_by = 0.0
        self.after(self.random.uniform(0.0, 0.05), self._tick)

    def turn(self) -> None:
        """Follow the store, take a turn of the agent, and write the records that are due."""
        try:
            if self.agent is None:
                self._begin()
        except StoreUnavailable:
            return
        if self.agent is None or self.mirror is None or self.registrar is None:
            return
        self.client.follow(self.mirror)
        self.agent.turn(0.0)
        if self.registrar.due:
            self.registrar.turn()
        if self.leaves_by:
            self._leave_when_relieved(self.agent, self.mirror)

    def _begin(self) -> None:
        if self.mirror is None:
            keys = self.cluster.keys
            self.mirror = Mirror(self.client, keys.cluster, clock=self.clock, background=False)
        self.client.follow(self.mirror)
        if self.node not in self.mirror.state().agents:
            config = self.cluster.config
            parts = Parts(
                executor=cast(Any, lambda *args, **kwargs: self.executor),
                registrar=self._make_registrar,
                clock=self.clock,
                wall=self.wall,
                chance=self.random,
                oom_kills=lambda: None,
            )
            options = AgentOptions("simulated:Worker")
            self.agent = SimAgent(self.client, self.mirror, config, self.node, self.cluster.events, options, parts)
            self.agent.host = self

    def _make_registrar(self, store: Any, keys: Any, ttl_s: float) -> Registrar:
        self.registrar = Registrar(store, keys, ttl_s, clock=self.clock, background=False)
        return self.registrar

    def leave(self) -> bool:
        """SIGTERM: it asks to be relieved of its ranks. False if it is leaving already."""
        if self.agent is None or self.leaves_by:
            return False
        self.leaves_by = self.clock.now + GRACE_S
        self.agent.me = changed(self.agent.me, leaving=True)
        self.agent._registrar.publish(self.cluster.keys.agent(self.node), self.agent.me)
        self.wake()
        return True

    def _leave_when_relieved(self, agent: Agent, mirror: Mirror) -> None:
        over = self.clock.now >= self.leaves_by
        if over or not relief(mirror.state(), agent.me, agent._ranks):
            try:
                agent.close()
            finally:
                self.die()

    def die(self) -> None:
        """Its ranks see their death pipes close; a stopped one does so when it resumes."""
        if self.alive:
            super().die()
            for rank in [rank for rank in self.cluster.ranks.values() if rank.host is self]:
                rank.after(0.002, rank.die)

    def _tick(self) -> None:
        self.turn()
        self.after(TICK_S, self._tick)

"""Warm spares: rank processes without a slot, with the model's skeleton loaded, that can become any rank.

A spare saves a new rank the fork and the load of the model. Spares are made one at a time, in the background
(`WorkerProc.initialise`), and only while the cluster is settled: so none competes with a repair. All calls come from
the agent's thread; callbacks post to it.

One that lacks device memory is no accident: the next one would, too, and takes memory beside ranks that serve until it
fails. So the next ones are made ever later, and at once when ranks have left; the history has the first alone.

On GPUs a spare is on one of them, by its number, as ranks are by their slots. It becomes only a rank of that GPU: on
another one two ranks would share its time and memory. So a host needs as many spares as GPUs to have one at any death.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import structlog

from membership.base.attempts import is_shortage
from membership.base.errors import ElasticError, RankFull
from membership.base.rank_id import ProcessId, RankId, SpareId
from membership.base.timing import SPARE_ADOPT_TIMEOUT_S
from membership.store.records import ClusterConfig, ClusterState
from workers.agent.decide import Heartbeat, hung, observe
from workers.agent.executor import MultiprocExecutor
from workers.agent.handles import WorkerProcHandle
from workers.agent.load_watch import UNTIL_IT_STALLS, LoadWatch
from workers.agent.restart_policy import RestartPolicy, backoff_s, full_spare_s, recent_deaths
from workers.protocol.device_note import NOTHING
from workers.protocol.rpc import PendingCall

TO_HAVE_SPARES = "no spare until one loads, and ever rarer attempts: give fewer --spares, or leave them memory"
DOUBTS = 2  # observations without a heartbeat after which a spare is not taken any more

log = structlog.get_logger(__name__)

Adopted = Callable[[RankId, WorkerProcHandle | ElasticError, Mapping[str, str]], None]
"""(rank, its process or why there is none, its identity)"""


def settled(state: ClusterState) -> bool:
    """Whether the engine uses a view with all ranks that are wanted, and no change is under way."""
    view, engine = state.view, state.engine_status
    if view is None or state.next is not None or any(op.active for op in state.operations.values()):
        return False
    if state.engine is not None and (engine is None or engine.token != state.engine_token or engine.epoch < view.epoch):
        return False
    members = {m.id for m in view.members}
    if any(last.id in members for last in state.exits.values()):
        return False
    wanted = {slot for slot in (state.desired.slots if state.desired else ()) if not _set_aside(state, slot)}
    assigned = {spec.id for a in state.assignments.values() for spec in a.ranks}
    return assigned <= members and wanted <= set(view.ranks)


def next_number(last: int, present: Iterable[int], devices: int) -> int:
    """Of the next spare: larger than the last one, and on the device with the fewest of those present."""
    there = Counter(number % devices for number in present)
    fewest = min(there[device] for device in range(devices))
    return next(number for number in count(last + 1) if there[number % devices] == fewest)


def _set_aside(state: ClusterState, slot: int) -> bool:
    last = state.exits.get(slot)
    return last is not None and last.quarantined


@dataclass
class _Spare:
    """One process, since it was asked for."""

    begun: float
    ready: bool = False
    pid: int = 0
    identity: Mapping[str, str] = field(default_factory=dict)
    heartbeat: Heartbeat = field(default_factory=lambda: Heartbeat(-1, 0.0))


class Spares:
    """This node's spares: makes up to `wanted` of them, and promotes them to ranks."""

    def __init__(
        self,
        wanted: int,
        executor: MultiprocExecutor,
        config: ClusterConfig,
        policy: RestartPolicy,
        post: Callable[..., None],
        publish: Callable[[tuple[int, ...]], None],
        emit: Callable[..., object],
    ) -> None:
        self._wanted, self._executor, self._config, self._policy = wanted, executor, config, policy
        self._post, self._publish, self._emit = post, publish, emit
        self._spares: dict[SpareId, _Spare] = {}
        self._last = 0  # number given out
        self._devices = 1  # that ranks take in turn, as far as a spare has said
        self._loads = LoadWatch(config)
        self._deaths: tuple[float, ...] = ()
        self._full = 0  # that lacked device memory, in a row
        self._members = self._beside = 0  # of the view: now, and when the last of those failed
        self._not_before = 0.0
        self._chance = random.Random()

    def tend(self, state: ClusterState, now: float) -> None:
        """Make a spare if one is missing and the cluster is settled."""
        self._members = len(state.view.members) if state.view is not None else 0
        if self._full and self._members < self._beside:  # there is more memory than there was
            self._not_before, self._beside = now, self._members
        short = len(self._spares) < self._wanted and all(spare.ready for spare in self._spares.values())
        if not short or now < self._not_before or not settled(state):
            return
        self._last = next_number(self._last, (key.number for key in self._spares), self._devices)
        key = SpareId(self._last)
        self._spares[key] = _Spare(now)
        try:
            self._executor.start([key], self._config.launch_deadline_s, partial(self._post, self._started))
        except Exception as error:
            if not is_shortage(error):
                raise
            self.lost(key, f"cannot be started: {error}")

    def take(self, key: RankId, adopted: Adopted) -> bool:
        """Whether a spare is to become this rank; then `adopted` is called in the agent's thread."""
        there = (spare for spare, known in self._spares.items() if known.ready and known.heartbeat.misses < DOUBTS)
        found = next((spare for spare in there if (spare.number - key.rank) % self._devices == 0), None)
        if found is None:
            return False
        identity = self._spares.pop(found).identity
        self._publish_ready()

        def taken(key: RankId, outcome: WorkerProcHandle | ElasticError) -> None:
            if isinstance(outcome, ElasticError):
                self.lost(found, str(outcome))
            adopted(key, outcome, identity)

        self._executor.adopt(found, key, SPARE_ADOPT_TIMEOUT_S, partial(self._post, taken))
        return True

    def lost(self, key: SpareId, reason: str, *, full: bool = False) -> None:
        """A spare has died or failed: end what is left of it. The next one waits as the restart policy says.

        `full`: for want of device memory.
        """
        known = self._spares.pop(key, None)
        now = time.time()
        recent = recent_deaths(self._policy, self._deaths, now)
        self._deaths = (*recent, now)
        self._full = self._full + 1 if full else 0
        if full:
            self._beside = self._members
            wait_s = full_spare_s(self._policy, self._full, self._chance.random())
            reason = f"{reason}; {TO_HAVE_SPARES}"
            log.warning("spare_lacks_device_memory", number=key.number, again_in_s=round(wait_s), reason=reason)
        else:
            wait_s = backoff_s(self._policy, len(recent) + 1, self._chance.random())
        self._not_before = now + wait_s
        if self._full <= 1:
            self._emit("spare_lost", number=key.number, pid=known.pid if known else 0, reason=reason)
        worker = self._executor.workers.get(key)
        if worker is None or not worker.dead:
            self._executor.retire([key], lambda key: None, kill=True)
        self._publish_ready()

    def renew(self) -> None:
        """End all of them; others are made. What they were started with is outdated."""
        for key in list(self._spares):
            del self._spares[key]
            self._executor.retire([key], lambda key: None, kill=True)
        if self._full:  # those that ended may have had the memory that the next one lacked
            self._full, self._not_before = 0, 0.0
        self._publish_ready()

    def died(self, key: ProcessId, reason: str) -> None:
        """A spare died. If it was being promoted, the promotion's own callback reports it."""
        if isinstance(key, SpareId) and key in self._spares:
            self._failed(key, reason)

    def check(self, now: float) -> None:
        """Drop spares whose heartbeat stopped, and those whose load did."""
        for key, spare in list(self._spares.items()):
            worker = self._executor.workers.get(key)
            if worker is None:
                continue
            if not spare.ready:
                if (given_up := self._loads.look(key, worker.liveness.load, now)) is not None:
                    self.lost(key, given_up[1])
                continue
            spare.heartbeat = observe(spare.heartbeat, worker.liveness.heartbeats, now)
            if hung(spare.heartbeat, now, after_s=self._config.lease_ttl_s):
                self.lost(key, f"no heartbeat for {now - spare.heartbeat.advanced_at:.1f} s")

    def _started(self, key: SpareId, outcome: WorkerProcHandle | ElasticError) -> None:
        spare = self._spares.get(key)
        if spare is None:
            return  # it was given up meanwhile
        if isinstance(outcome, ElasticError):
            self.lost(key, str(outcome))
        else:
            spare.pid = outcome.child.pid
            pending = self._executor.submit("initialise", keys=[key], timeout_s=UNTIL_IT_STALLS)
            self._loads.begin(key, pending, time.monotonic())
            pending.future.add_done_callback(lambda _: self._post(self._loaded, key, pending))

    def _loaded(self, key: SpareId, pending: PendingCall) -> None:
        self._loads.end(key, pending)
        called = pending.future
        spare, error = self._spares.get(key), called.exception(timeout=0)
        if spare is None:
            return  # its death came first
        if error is not None:
            self._failed(key, str(error), full=isinstance(error, RankFull))
            return
        self._full = 0
        identity = called.result(timeout=0)[key]
        spare.ready, spare.identity, self._devices = True, identity.parts, identity.devices
        spare.heartbeat = Heartbeat(-1, time.monotonic())
        self._emit("spare_ready", number=key.number, pid=spare.pid, took_ms=round((time.time() - spare.begun) * 1e3, 1))
        self._publish_ready()

    def _failed(self, key: SpareId, reason: str, *, full: bool = False) -> None:
        """As `lost`. Its process may have ended before it answered: then its last words say why, in either order."""
        worker = self._executor.workers.get(key)
        said = worker.liveness.note if worker is not None else NOTHING
        why = f"{said.last_words}; " if said.last_words not in reason else ""
        self.lost(key, f"{why}{reason}", full=full or said.full)

    def _publish_ready(self) -> None:
        self._publish(tuple(spare.pid for spare in self._spares.values() if spare.ready))

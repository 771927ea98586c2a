"""A cluster in miniature: agents, ranks and an engine act on a MemoryStore under a virtual clock.

Controllers are real as far as it matters: the product's planner, transactions and fences. Whenever a view is committed
the invariants are checked: epochs rise by one, every expert has a holder, members have prepared it, no rank that was
evicted is back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from msgspec.structs import replace

from chaos.simulation.invariants import Invariants, early, idle, require, require_none
from chaos.simulation.invariants import Violation as Violation
from membership.base.rank_id import RankId
from membership.operations.change import Change, scale
from membership.operations.operations import propose
from membership.placement.tally import Domain
from membership.planning.controller import transaction
from membership.planning.identity import refusal
from membership.planning.planner import Effect, due, reconcile
from membership.store.codec import encode
from membership.store.in_memory import MemoryStore
from membership.store.interface import Compare, Store
from membership.store.keys import Keys, Reading
from membership.store.records import (
    AgentRecord,
    ClusterConfig,
    ClusterState,
    Desired,
    EngineRecord,
    EngineStatus,
    LeaderRecord,
    Operation,
    Phase,
    RankExit,
    RankRecord,
    RankSpec,
    RankState,
)

CONFIG = ClusterConfig(
    cluster="sim", model="/m", served_model_name="m", moe_layers=2, experts=8, max_ranks=12, launch_deadline_s=20.0
)


@dataclass
class World:
    """Everything outside the controller, and the controllers that were ever elected."""

    desired: int = 4
    store: Store = field(default_factory=MemoryStore)
    nodes: tuple[str, ...] = ("a",)
    config: ClusterConfig = CONFIG
    now: float = 1000.0
    epochs: list[int] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    bad: set[int] = field(default_factory=set)  # slots whose ranks cannot prepare anything
    slow: set[int] = field(default_factory=set)  # slots whose ranks load for as long as a test wants
    mute: set[int] = field(default_factory=set)  # slots whose ranks never register
    others: set[int] = field(default_factory=set)  # slots whose new ranks load another model
    capacity: int = 12  # ranks that an agent takes
    domains: dict[str, Domain] = field(default_factory=dict)  # of nodes whose agents say what they end with
    crowded: bool = False  # the engine has requests on ranks that leave
    pause_ms: float = 0.0  # of the last flip, as the engine publishes it
    engine: bool = True
    join_keys: tuple[str, ...] = ()  # of the engine's host
    elected: bool = True  # False: controllers run elsewhere

    def __post_init__(self) -> None:
        self.keys = Keys(self.config.cluster)
        self._reading = Reading()
        self.processes: set[RankId] = set()  # that run, whatever their records say
        self.put(self.keys.config, self.config)
        self.put(self.keys.desired, Desired(ranks=self.desired))
        self.invariants = Invariants(self.config, self.epochs)
        self.gone: set[RankId] = set()  # members that died with their agent: only the engine knows
        self.deaths: dict[int, int] = {}
        for node in self.nodes:
            self.start_agent(node)
        if self.engine:
            self.start_engine()
        self.token = 0
        if self.elected:
            self.elect()

    def put(self, key: str, record: object) -> int:
        return self.store.put(key, encode(record))  # type: ignore[arg-type]

    @property
    def state(self) -> ClusterState:
        revision, items = self.store.range(self.keys.prefix)
        self._reading.list(items)
        return self._reading.state(revision)

    @property
    def evicted(self) -> set[RankId]:
        """Members that are out for good."""
        return self.invariants.evicted

    @property
    def serving(self) -> tuple[int, ...]:
        view = self.state.view
        return view.ranks if view else ()

    # --- processes that come and go

    def start_agent(self, node: str) -> None:
        self.now += 0.001
        zone, machine = self.domains.get(node, Domain("", ""))
        self.put(
            self.keys.agent(node),
            AgentRecord(node=node, pid=1, started=self.now, capacity=self.capacity, machine=machine, zone=zone),
        )

    def leave(self, node: str) -> None:
        """The agent asks to be relieved of its ranks."""
        self.put(self.keys.agent(node), replace(self.state.agents[node], leaving=True))

    def stop_agent(self, node: str) -> None:
        """The agent dies, and its ranks by their death pipes; all leases run out."""
        self.processes -= {key for key, record in self.state.ranks.items() if record.node == node}
        self.lapse(node)
        view = self.state.view
        self.gone |= {m.id for m in (view.members if view else ()) if m.node == node}

    def lapse(self, node: str) -> None:
        """All leases of a node run out, whether or not its agent and ranks run."""
        self.store.delete(self.keys.agent(node))
        for (rank, incarnation), record in self.state.ranks.items():
            if record.node == node:
                self.store.delete(self.keys.rank(rank, incarnation))

    def start_engine(self) -> None:
        self.store.delete(self.keys.engine)
        self.store.delete(self.keys.engine_status)
        record = EngineRecord(node="a", pid=1, address="x", broadcast_handle=b"", mask_handle=b"")
        self.put(self.keys.engine, record)

    def elect(self) -> None:
        """Another controller takes over; the one before does not know yet."""
        self.store.delete(self.keys.leader)
        self.token = self.put(self.keys.leader, LeaderRecord(node="a", pid=1))

    def kill(
        self,
        rank: int,
        quarantined: bool = False,
        backoff_s: float = 0.3,
        reason: str = "killed by signal 9",
        refused: bool = False,
    ) -> None:
        """SIGKILL whatever runs in the slot now; its agent notices."""
        for slot, incarnation in sorted(self.state.ranks):
            if slot == rank:
                self.deaths[rank] = self.deaths.get(rank, 0) + 1
                last = RankExit(
                    rank=rank,
                    incarnation=incarnation,
                    reason=reason,
                    at=self.now,
                    restarts=self.deaths[rank],
                    not_before=self.now + backoff_s,
                    quarantined=quarantined,
                    refused=refused,
                )
                self.processes.discard((slot, incarnation))
                self.put(self.keys.exit(rank), last)
                self.store.delete(self.keys.rank(rank, incarnation))

    def mask(self, *ranks: int) -> None:
        state, epoch = self.state, self.epochs[-1]
        published = state.engine_status
        if published is not None and (published.token, published.epoch) == (state.engine_token, epoch):
            ranks = tuple(sorted({*ranks, *published.masked}))  # within an epoch no rank is unmasked
        status = EngineStatus(token=state.engine_token, epoch=epoch, masked=ranks, join_keys=self.join_keys)
        self.put(self.keys.engine_status, status)

    def scale(self, target: int, timeout_s: float = 60.0, op_id: str | None = None) -> Operation:
        return self.ask(scale(target), timeout_s, op_id)

    def ask(self, change: Change, timeout_s: float = 60.0, op_id: str | None = None) -> Operation:
        return propose(self.store, self.keys.cluster, change, op_id=op_id, timeout_s=timeout_s, clock=lambda: self.now)

    # --- what everyone does

    def agents_act(self, random: Random | None = None) -> bool:
        """Each agent does what it is due to, or by chance only some of it. Return whether anything changed."""
        before = self.state.revision
        for node, agent in self.state.agents.items():
            assignment = self.state.assignments.get(node)
            if assignment is None or assignment.agent_started != agent.started:
                continue
            wanted = {spec.id: spec for spec in assignment.ranks}
            for (rank, incarnation), record in self.state.ranks.items():
                if record.node == node and (rank, incarnation) not in wanted:
                    self.processes.discard((rank, incarnation))
                    self.store.delete(self.keys.rank(rank, incarnation))
            for spec in wanted.values():
                if random is None or random.random() < 0.7:
                    self._rank_acts(node, spec)
        return self.state.revision != before

    def _rank_acts(self, node: str, spec: RankSpec) -> None:
        state, key = self.state, spec.id
        last = state.exits.get(spec.rank)
        if spec.rank in self.mute or (last is not None and last.incarnation >= spec.incarnation):
            return
        record = state.ranks.get(spec.id)
        if record is None:
            record = RankRecord(rank=key[0], node=node, incarnation=key[1], pid=1, state=RankState.LAUNCHING)
            self.processes.add(key)
        elif record.state is RankState.LAUNCHING:
            record = replace(record, state=RankState.HANDSHAKING)
        elif state.next is not None and any(key == m.id for m in state.next.members):
            record = record if record.identity else replace(record, identity=self._loads(spec.rank))
            if why := refusal(state, record):
                self.kill(spec.rank, quarantined=True, reason=why, refused=True)
                return
            if spec.rank in self.bad and record.failed_revision != state.next_revision:
                record = replace(record, failed_revision=state.next_revision, prepare_error="no memory")
            elif spec.rank not in self.bad | self.slow and record.prepared_revision != state.next_revision:
                record = replace(record, prepared_revision=state.next_revision, state=RankState.STANDBY)
        if record != state.ranks.get(spec.id):
            self.put(self.keys.rank(*key), record)

    def _loads(self, slot: int) -> dict[str, str]:
        return {"weights": "another" if slot in self.others else "ours"}

    def engine_acts(self) -> bool:
        state = self.state
        if state.engine is None or state.view is None:
            return False
        status = state.engine_status
        masked = {m.rank for m in state.view.members if m.id in self.gone}
        if status is not None and (status.token, status.epoch) == (state.engine_token, state.view.epoch):
            masked |= set(status.masked)
        published = EngineStatus(
            token=state.engine_token,
            epoch=state.view.epoch,
            masked=tuple(sorted(masked)),
            pause_ms=self.pause_ms,
            vacated_revision=0 if self.crowded or state.next is None else state.next_revision,
            join_keys=self.join_keys,
        )
        if published != status:
            self.put(self.keys.engine_status, published)
        return published != status

    def controller_acts(self, state: ClusterState | None = None, token: int = 0) -> bool:
        """The controller that holds (or held) `token` looks at `state` and does one thing. True: it took effect."""
        state = state or self.state
        acted, effects = False, reconcile(state, self.now)
        if not effects and state.revision == self.state.revision:
            require_none(idle(state, self.now))
        for effect in effects:
            compares, ops = transaction(effect, state, self.keys)
            fence = Compare(self.keys.leader, "create", "=", token or self.token)
            before = self.state
            if self.store.txn([fence, *compares], ops).succeeded:
                acted = True
                self.effects.append(effect)
                self._check(before, self.state)
        return acted

    def settle(
        self, random: Random | None = None, rounds: int = 600, until: Callable[[], bool] = lambda: False
    ) -> None:
        """Let all processes act and time pass until nothing happens (or `until`). Violation if that takes too long."""
        for _ in range(rounds):
            if until():
                return
            busy = self.controller_acts()
            busy |= self.agents_act(random)
            busy |= self.engine_acts()
            if not busy and (random is None or not self.agents_act()):
                at = due(self.state, self.now)
                if at is None:
                    return
                self.now = at
            self.now += 0.001
        raise Violation(f"never settles: {[e.reason for e in self.effects[-12:]]}")

    # --- what must hold

    def _check(self, before: ClusterState, after: ClusterState) -> None:
        require_none(early(before, after, self.now))
        view = after.view
        if self.invariants.changed(before, after) and view is not None:
            for member in view.members:
                record = after.ranks.get(member.id)
                prepared = record is not None and record.prepared_revision == before.next_revision
                require(prepared, f"{member} is committed, and has not prepared, or is dead")
            models = {record.identity["weights"] for m in view.members if (record := after.ranks.get(m.id))}
            require(len(models) == 1, f"models are mixed: {models}")

    def assert_whole(self, count: int) -> None:
        """The cluster is as asked for, with nothing left over."""
        self.invariants.whole(self.state, count)


def phases(operation: Operation) -> list[Phase]:
    """The phases that it went through, in order."""
    return [Phase(name) for name in operation.phase_times]

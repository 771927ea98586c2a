"""The status document: the cluster as operators, probes and tests see it. Pure; CLI and gateway share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any, Generic, TypeVar

import msgspec

from membership.base.enums import Exactness
from membership.operations.change import describe_change
from membership.operations.pause import paused_words
from membership.placement.balance import imbalance
from membership.placement.plan import coverage
from membership.placement.survivability import Sole, sole_holders
from membership.placement.tally import Domain
from membership.planning.cluster_facts import ClusterFacts
from membership.planning.identity import name_of
from membership.planning.rebalance import loads_of
from membership.store.records import (
    ClusterConfig,
    ClusterState,
    EngineStatus,
    ExpertLoad,
    Member,
    Operation,
    Phase,
    RankState,
    View,
)

T = TypeVar("T")


class Health(StrEnum):
    """State of the whole cluster."""

    STARTING = "starting"  # no view yet
    SERVING = "serving"
    DEGRADED = "degraded"  # a rank or the engine is missing; every expert has a live replica
    UNCOVERED = "uncovered"  # some expert has none
    STOPPED = "stopped"


class Owner(StrEnum):
    """What sets the desired number of ranks."""

    OPERATOR = "operator"
    AGENTS = "agents"


class LoadStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a rank has loaded, as its agent last published it (once per second)."""

    bytes: int
    total: int
    sources: tuple[str, ...] = ()  # nodes from which its host takes weights, if it lacks the files


class GpuStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The GPU of a rank, as the rank last saw it (once in two seconds); memory is of all processes there.

    `graphs`: kinds of steps that the rank has recorded, of `graph_rows` rows, the last at `recorded_at`.
    `exchange`: how rows travel to the host's other ranks, cuda or host; `exchange_reason`: why over host memory.
    """

    index: int
    uuid: str
    used_gb: float
    free_gb: float
    total_gb: float
    graphs: int = 0
    graph_rows: tuple[int, ...] = ()
    recorded_at: float = 0.0
    exchange: str = ""
    exchange_reason: str = ""


class RankStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One rank slot. `pid` 0 and `slots` 0: it has none. `heartbeat_age_ms` (age of the last heartbeat
    that its agent observed, published once per second) null: no agent has published one."""

    rank: int
    node: str
    pid: int
    incarnation: int
    state: RankState
    slots: int  # experts held, over all layers
    heartbeat_age_ms: float | None
    restarts: int
    slow: bool = False  # far slower than the others, but it serves on; left out if it is not
    reason: str = ""  # why its slot is set aside; left out if it is not
    load: LoadStatus | None = None  # left out while it loads nothing
    gpu: GpuStatus | None = None  # left out if it computes on none
    sole_experts: int = 0  # (layer, expert) pairs that its end would leave without a live replica; left out if none


class CoverageStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The smallest number of live replicas of any expert; the number of (layer, expert) pairs without one."""

    min_live_replicas: int
    uncovered: int


class NodeStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A host with an agent; `ranks`: present and planned. Safe to delete: no rank is there, planned or ending.

    `machine` and `zone`: what it ends with, as its agent says; left out if it does not. Nodes that name one machine
    end together, so each of them has the machine's `sole_experts`.
    """

    node: str
    ranks: int
    safe_to_delete: bool
    trouble: str = ""  # its copy of the checkpoint is another one by now; left out if it is not
    machine: str = ""
    zone: str = ""
    sole_experts: int = 0  # (layer, expert) pairs that its end would leave without a live replica; left out if none


class LinkStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The connections from one host to another, of its ranks or of the engine; each side reports what it sends.

    `rtt_ms`: the longest, as kernels have learned it. The counters only rise while the reporting process lives.
    """

    role: str  # ranks | engine
    node: str
    peer_node: str
    links: int
    up: int
    rtt_ms: float
    sent_bytes: int
    retransmits: int
    suspects: int  # how often the other host was silent
    cuts: int  # links that ended though both ends lived on


class PauseStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Planned changes are refused until then."""

    until: float
    by: str
    reason: str
    words: str


class OperationStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The active operation; `what` describes it in words."""

    id: str
    kind: str
    target: int
    ranks: tuple[int, ...]
    what: str
    phase: Phase
    progress: float
    started: float
    deadline: float


class RequestsStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Load, as the engine last published it."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    shed: int = 0  # refused for want of room since this engine began


class PrefixCacheStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of requests that got a rank since the active engine began, and those that the rank had already."""

    queried_tokens: int = 0
    cached_tokens: int = 0


class SparesStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Warm spares over all hosts: the wanted number, and the number ready."""

    wanted: int = 0
    ready: int = 0


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The document."""

    cluster: str
    state: Health
    epoch: int
    desired: int
    ranks: tuple[RankStatus, ...]
    coverage: CoverageStatus
    operation: OperationStatus | None
    requests: RequestsStatus
    spares: SparesStatus = SparesStatus()
    owner: Owner = Owner.OPERATOR
    drained: tuple[int, ...] = ()  # slots that stay empty until they are undrained
    nodes: tuple[NodeStatus, ...] = ()
    links: tuple[LinkStatus, ...] = ()  # between hosts; empty on one host
    pause: PauseStatus | None = None
    exactness: Exactness = Exactness.INVARIANT  # stock: tokens may depend on the batch
    imbalance: float | None = None  # the busiest rank's measured expert load over the mean; null: not measured yet
    prefix_cache: PrefixCacheStatus | None = None  # null: it is off
    store: str = ""  # what is wrong with the store, and what follows from it; empty: nothing
    model: str = ""  # names what is served by content: equal in clusters that serve the same; empty before any view


def cluster_status(state: ClusterState, now: float, store: str = "") -> ClusterStatus:
    """Describe this state of the cluster. `store`: what is wrong with the store that it was read from."""
    if state.config is None:
        nothing = CoverageStatus(min_live_replicas=0, uncovered=0)
        return ClusterStatus(
            cluster="", state=Health.STARTING, epoch=0, desired=0, ranks=(), coverage=nothing, operation=None,
            requests=RequestsStatus(), store=store,
        )  # fmt: skip
    facts = ClusterFacts(state, now)
    covered = _coverage(facts)
    operation = state.active
    return ClusterStatus(
        cluster=state.config.cluster,
        state=_health(facts, covered),
        epoch=facts.view.epoch,
        desired=facts.desired.ranks,
        ranks=tuple(sorted(_ranks(facts), key=lambda r: (r.rank, r.incarnation))),
        coverage=covered,
        operation=None if operation is None else _operation(operation),
        requests=_requests(state.engine_status),
        spares=_spares(state),
        owner=Owner.AGENTS if state.config.follow_agents else Owner.OPERATOR,
        drained=facts.desired.cordoned,
        nodes=tuple(_node(facts, node) for node in sorted(state.agents)),
        links=tuple(links_of(state)),
        pause=_pause(state, now),
        exactness=state.config.exactness,
        imbalance=_imbalance(facts),
        prefix_cache=_prefix_cache(state.config, state.engine_status),
        store=store,
        model=name_of(state.checkpoint),
    )


def _prefix_cache(config: ClusterConfig, load: EngineStatus | None) -> PrefixCacheStatus | None:
    if not config.prefix_cache:
        return None
    if load is None:
        return PrefixCacheStatus()
    return PrefixCacheStatus(queried_tokens=load.queried_tokens, cached_tokens=load.cached_tokens)


def _spares(state: ClusterState) -> SparesStatus:
    agents = state.agents.values()
    return SparesStatus(wanted=sum(a.spares_wanted for a in agents), ready=sum(len(a.spares) for a in agents))


def _node(facts: ClusterFacts, node: str) -> NodeStatus:
    ranks = sum(where == node for where, _ in facts.assigned.values())
    ending = any(facts.state.ranks[key].node == node for key in facts.lingering)
    safe = not ranks and not ending and bool(facts.members) and node not in facts.offices
    agent = facts.state.agents[node]
    return NodeStatus(
        node=node, ranks=ranks, safe_to_delete=safe, trouble=agent.trouble, machine=agent.machine, zone=agent.zone,
        sole_experts=_sole(facts).machines.get(facts.domain(node).machine, 0),
    )  # fmt: skip


def links_of(state: ClusterState) -> Iterator[LinkStatus]:
    """Between hosts, as agents and the engine publish them about once per second."""
    reported = [("ranks", node, known.links) for node, known in sorted(state.heartbeats.items())]
    if state.engine is not None and state.engine_status is not None:
        reported.append(("engine", state.engine.node, state.engine_status.links))
    for role, node, links in reported:
        for peer_node, link in sorted(links.items()):
            yield LinkStatus(
                role=role, node=node, peer_node=peer_node, links=link.links, up=link.up,
                rtt_ms=round(link.rtt_s * 1e3, 3), sent_bytes=link.sent_bytes, retransmits=link.retransmits,
                suspects=link.suspects, cuts=link.cuts,
            )  # fmt: skip


def _pause(state: ClusterState, now: float) -> PauseStatus | None:
    pause = state.pause
    if pause is None or not state.paused(now):
        return None
    return PauseStatus(until=pause.until, by=pause.by, reason=pause.reason, words=paused_words(pause, now))


def _health(facts: ClusterFacts, covered: CoverageStatus) -> Health:
    state = facts.state
    if not (state.agents or state.engine or state.ranks) and facts.view.epoch:
        return Health.STOPPED
    if not facts.members:
        return Health.STARTING
    if covered.uncovered:
        return Health.UNCOVERED
    if not _driven(state):
        return Health.DEGRADED  # requests wait for an engine
    whole = len(facts.alive) == len(facts.members)
    scaling = facts.operation is not None
    complete = whole and (scaling or len(facts.alive) >= facts.target)
    return Health.SERVING if complete else Health.DEGRADED


def _driven(state: ClusterState) -> bool:
    """Whether the active engine has adopted a view."""
    status = state.engine_status
    return state.engine is not None and status is not None and status.token == state.engine_token and status.epoch > 0


class _Remembered(Generic[T]):
    """The last answer of a pure function, while it is asked about the same record with the same further arguments.

    What follows from a large placement takes tens of milliseconds, and probes, metrics and pages ask all the time.
    """

    def __init__(self, answer: Callable[..., T]) -> None:
        self._answer = answer
        self._known: tuple[View, tuple[Any, ...], T] | None = None

    def __call__(self, view: View, *more: Any) -> T:
        known = self._known
        if known is None or known[0] is not view or known[1] != more:
            self._known = known = (view, more, self._answer(view, *more))
        return known[2]


@_Remembered
def _coverage_of(view: View, alive: tuple[int, ...], experts: int) -> CoverageStatus:
    found = coverage(view.placement, alive, experts)
    return CoverageStatus(min_live_replicas=found.min_live_replicas, uncovered=len(found.uncovered))


@_Remembered
def _imbalance_of(view: View, config: ClusterConfig, load: ExpertLoad | None) -> float | None:
    loads = loads_of(config, load)
    return round(imbalance(view.placement, loads), 3) if loads is not None else None


@_Remembered
def _sole_of(view: View, alive: tuple[tuple[int, Domain], ...], config: ClusterConfig) -> Sole:
    return sole_holders(view.placement, dict(alive), config.moe_layers, config.experts)


def _sole(facts: ClusterFacts) -> Sole:
    return _sole_of(facts.view, tuple(facts.domains(facts.alive).items()), facts.config)


def _coverage(facts: ClusterFacts) -> CoverageStatus:
    if not facts.members:
        return CoverageStatus(min_live_replicas=0, uncovered=0)
    return _coverage_of(facts.view, tuple(m.rank for m in facts.alive), facts.config.experts)


def _imbalance(facts: ClusterFacts) -> float | None:
    return _imbalance_of(facts.view, facts.config, facts.state.expert_load) if facts.members else None


def _ranks(facts: ClusterFacts) -> Iterator[RankStatus]:
    alive = set(facts.alive)
    shown: set[int] = set()
    for member in facts.members:
        shown.add(member.rank)
        yield _rank(facts, member, _member_state(facts, member, member in alive))
    for rank, newcomer in facts.newcomers.items():
        if rank not in shown:
            shown.add(rank)
            yield _rank(facts, newcomer.member, _newcomer_state(facts, newcomer.member))
    for key in facts.lingering:
        record = facts.state.ranks[key]
        member = Member(rank=record.rank, node=record.node, incarnation=record.incarnation)
        if record.rank not in shown and not facts.exited(member):
            shown.add(record.rank)
            yield _rank(facts, member, RankState.DRAINING)
    for rank, last in facts.state.exits.items():
        wanted = rank in facts.desired.slots if facts.desired.slots else rank < facts.desired.ranks
        if rank not in shown and (wanted or last.quarantined):
            gone = Member(rank=rank, node="", incarnation=last.incarnation)
            yield _rank(facts, gone, RankState.QUARANTINED if last.quarantined else RankState.DEAD)


def _newcomer_state(facts: ClusterFacts, member: Member) -> RankState:
    if facts.exited(member):
        return RankState.QUARANTINED if facts.state.exits[member.rank].quarantined else RankState.DEAD
    record = facts.record(member)
    return RankState.LAUNCHING if record is None else record.state


def _member_state(facts: ClusterFacts, member: Member, alive: bool) -> RankState:
    last = facts.state.exits.get(member.rank)
    if not alive and last is not None and last.quarantined and last.incarnation >= member.incarnation:
        return RankState.QUARANTINED
    if member.rank in facts.masked and not facts.exited(member):
        return RankState.MASKED
    if not alive:
        return RankState.DEAD
    staged = facts.state.next
    planned = facts.operation is not None or member in facts.relieved
    leaving = planned and staged is not None and staged.member(member.rank) is None
    return RankState.DRAINING if leaving else RankState.SERVING


def _rank(facts: ClusterFacts, member: Member, state: RankState) -> RankStatus:
    record = facts.record(member)
    last, load = facts.state.exits.get(member.rank), facts.state.engine_status
    held = facts.view.placement.get(member.rank, ()) if member in facts.members else ()
    return RankStatus(
        rank=member.rank,
        node=member.node,
        pid=0 if record is None else record.pid,
        incarnation=member.incarnation,
        state=state,
        slots=sum(map(len, held)),
        heartbeat_age_ms=_heartbeat_age_ms(facts, member),
        restarts=0 if last is None else last.restarts,
        slow=state is RankState.SERVING and load is not None and member.rank in load.slow,
        reason=last.reason if last is not None and state is RankState.QUARANTINED else "",
        load=_load(facts, member),
        gpu=_gpu(facts, member),
        sole_experts=_sole(facts).ranks.get(member.rank, 0) if member in facts.members else 0,
    )


def _gpu(facts: ClusterFacts, member: Member) -> GpuStatus | None:
    published = facts.state.heartbeats.get(member.node)
    seen = published.gpus.get(member.incarnation) if published is not None else None
    if seen is None:
        return None
    return GpuStatus(
        index=seen.index, uuid=seen.uuid, used_gb=_gb(seen.total - seen.free), free_gb=_gb(seen.free),
        total_gb=_gb(seen.total), graphs=seen.graphs, graph_rows=seen.graph_rows, recorded_at=seen.recorded_at,
        exchange=seen.exchange, exchange_reason=seen.exchange_reason,
    )  # fmt: skip


def _gb(nbytes: int) -> float:
    return round(nbytes / 1e9, 2)


def _load(facts: ClusterFacts, member: Member) -> LoadStatus | None:
    published = facts.state.heartbeats.get(member.node)
    if published is None or member.incarnation not in published.loads:
        return None
    done, total = published.loads[member.incarnation]
    return LoadStatus(bytes=done, total=total, sources=published.weights_from)


def _heartbeat_age_ms(facts: ClusterFacts, member: Member) -> float | None:
    heartbeats = facts.state.heartbeats.get(member.node)
    seen_at = None if heartbeats is None else heartbeats.beats.get(member.incarnation)
    return None if seen_at is None else round(max(0.0, facts.now - seen_at) * 1000, 1)


def _requests(load: EngineStatus | None) -> RequestsStatus:
    if load is None:
        return RequestsStatus()
    return RequestsStatus(
        running=load.running,
        waiting=load.waiting,
        waiting_tokens=load.waiting_tokens,
        shed=sum(load.shed.values()),
    )


def _operation(operation: Operation) -> OperationStatus:
    return OperationStatus(
        id=operation.id,
        kind=operation.kind,
        target=operation.target,
        ranks=operation.ranks,
        what=describe_change(operation),
        phase=operation.phase,
        progress=operation.progress,
        started=operation.started,
        deadline=operation.deadline,
    )

"""What a node's agent should do next: a pure function of the cluster's state and of what its ranks have done so far.

Level-triggered, as a kubelet is: `decide` runs after every change and names all that is missing now, without what is
under way already (`LocalRank` notes that). So an agent that missed some events is right again after one call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, auto

from membership.base.rank_id import ProcessId, RankId
from membership.base.timing import RECOVERY_FIRST_S
from membership.planning.cluster_facts import ClusterFacts
from membership.planning.identity import KERNELS, refusal
from membership.store.records import AgentRecord, Assignment, ClusterState, Heartbeats, RankRecord, RankState, View
from workers.protocol.load_progress import LoadSeen
from workers.protocol.window_client import PIECES

REPORT_WITHIN_S = 1.0
"""Ranks of a node that prepare a view are reported together, if they are done within this."""
Peers = dict[int, tuple[int, bytes]]
"""rank -> (incarnation, exchange handle)"""


class Phase(Enum):
    """Of a local process: STARTING until its ready message is here, ENDING once we asked it to end."""

    STARTING = auto()
    READY = auto()
    ENDING = auto()


@dataclass(frozen=True)
class LocalRank:
    """Everything the agent knows about one of its processes."""

    key: RankId
    started: float
    pid: int = 0
    phase: Phase = Phase.STARTING
    liveness_handle: bytes = b""
    exchange_handle: bytes = b""
    identity: Mapping[str, str] = field(default_factory=dict)  # once it has loaded
    expert_digests: tuple[bytes, ...] = ()
    attached_token: int = 0
    response_handle: bytes = b""
    attaching_token: int = 0
    attach_not_before: float = 0.0
    loading: bool = False
    loaded: bool = False  # device and model; experts come with a view
    preparing_revision: int = 0
    prepared_revision: int = 0
    prepared_at: float = 0.0  # the first time that it had prepared a view
    failed_revision: int = 0
    prepare_error: str = ""
    retired: tuple[int, int] = (0, 0)  # (epoch, prepared revision) at the last retire_epoch
    join_key: str = ""  # of the join secret that it was started with
    killed: bool = False  # on request, and its death is not noticed yet


@dataclass(frozen=True)
class Spawn:
    """Start this rank."""

    key: RankId


@dataclass(frozen=True)
class Retire:
    """End this rank's process; it is no longer wanted, or (`failure`) it never got ready."""

    key: RankId
    failure: str = ""


@dataclass(frozen=True)
class Refuse:
    """End this rank's process and set its slot aside: it would compute something else than the others."""

    key: RankId
    reason: str


@dataclass(frozen=True)
class Attach:
    """Join the queues of the engine that holds `token`."""

    key: RankId
    token: int
    broadcast_handle: bytes
    mask_handle: bytes


@dataclass(frozen=True)
class Load:
    """Take the device and load the model, for the staged view with this mod revision."""

    key: RankId
    revision: int


@dataclass(frozen=True)
class Prepare:
    """Make ready for the staged view, whose key has this mod revision. Once all its members have loaded: they link
    with each other within a deadline, and a load has none."""

    key: RankId
    revision: int
    view: View
    peers: Peers


@dataclass(frozen=True)
class RetireEpoch:
    """Drop what `epoch` does not need. `mark` is what LocalRank.retired becomes."""

    key: RankId
    epoch: int
    mark: tuple[int, int]


@dataclass(frozen=True)
class Kill:
    """SIGKILL this rank, as a fault would: its death is then noticed as any other."""

    key: RankId
    by: str


Effect = Spawn | Retire | Refuse | Kill | Attach | Load | Prepare | RetireEpoch


def decide(
    state: ClusterState, me: AgentRecord, ranks: Mapping[RankId, LocalRank], buried: Iterable[RankId], now: float
) -> list[Effect]:
    """All that is to be done now. `buried` are incarnations that have died here and must not run again."""
    effects: list[Effect] = []
    effects += _processes(state, me, ranks, frozenset(buried), now)
    going = {e.key for e in effects if isinstance(e, Retire)}
    effects += _refusals(state, me.node, [r for r in ranks.values() if r.key not in going])
    going |= {e.key for e in effects if isinstance(e, Refuse)}
    ready = [r for r in ranks.values() if r.phase is Phase.READY and r.key not in going]
    effects += _kills(state, me, ready)
    effects += _attachments(state, ready, now)
    effects += _preparations(state, ready, now)
    effects += _retired_epochs(state, ready)
    return effects


def _processes(
    state: ClusterState, me: AgentRecord, ranks: Mapping[RankId, LocalRank], buried: frozenset[RankId], now: float
) -> list[Effect]:
    assignment, config = state.assignments.get(me.node), state.config
    if assignment is None or config is None or assignment.agent_started != me.started:
        return []  # no assignment for this run of the agent yet: change nothing
    wanted = {spec.id for spec in assignment.ranks}
    effects: list[Effect] = []
    for key in sorted(wanted - ranks.keys() - buried):
        last = state.exits.get(key.rank)
        if last is None or last.incarnation < key.incarnation:
            effects.append(Spawn(key))
    for rank in ranks.values():
        if rank.phase is Phase.ENDING:
            continue
        if rank.key not in wanted:
            effects.append(Retire(rank.key))
        elif rank.phase is Phase.STARTING and now - rank.started > config.launch_deadline_s:
            effects.append(Retire(rank.key, failure=f"not ready within {config.launch_deadline_s:g} s"))
    return effects


def _refusals(state: ClusterState, node: str, ranks: list[LocalRank]) -> list[Effect]:
    """Those that have loaded something else. A member of the view never has: it was compared before it joined."""
    members = {member.id for member in state.view.members} if state.view is not None else set()
    newcomers = [r for r in ranks if r.identity and r.phase is Phase.READY and r.key not in members]
    found = {r.key: refusal(state, record_of(r, node)) for r in newcomers}
    return [Refuse(key, reason) for key, reason in found.items() if reason]


def _attachments(state: ClusterState, ready: list[LocalRank], now: float) -> list[Effect]:
    engine, token = state.engine, state.engine_token
    if engine is None or token == 0:
        return []
    return [
        Attach(r.key, token, engine.broadcast_handle, engine.mask_handle)
        for r in ready
        if max(r.attached_token, r.attaching_token) < token and now >= r.attach_not_before
    ]


def _preparations(state: ClusterState, ready: list[LocalRank], now: float) -> list[Effect]:
    view, revision = state.next, state.next_revision
    if view is None:
        return []
    ids = {member.id for member in view.members}
    members = [r for r in ready if r.key in ids and r.failed_revision < revision]
    effects: list[Effect] = [Load(r.key, revision) for r in members if not r.loaded and not r.loading]
    peers = peers_of(view, state)
    if peers is not None and all(state.ranks[member.id].loaded for member in view.members):
        effects += [
            Prepare(r.key, revision, view, peers)
            for r in members
            if r.loaded and max(r.preparing_revision, r.prepared_revision) < revision and not _gives_way(state, r, now)
        ]
    return effects


def _gives_way(state: ClusterState, rank: LocalRank, now: float) -> bool:
    """Whether a new rank waits with its experts for requests that a death has interrupted: mapping them takes the
    processors, and what the memory can carry, from the very step that these are in. Not for long: that may be a long
    prompt. The ranks that serve prepare meanwhile, as they take a call between two steps only.
    """
    status = state.engine_status
    recovering = status is not None and status.token == state.engine_token and bool(status.recovering)
    return recovering and 0.0 <= now - rank.started < RECOVERY_FIRST_S


def replaced(rank: LocalRank, revision: int) -> bool:
    """Whether a preparation that has ended was replaced by one of a later view, whose result may be here already:
    they end in any order."""
    return revision < rank.preparing_revision


def report_due(ranks: Mapping[RankId, LocalRank], unreported: Mapping[RankId, float], now: float) -> bool:
    """Whether to publish that ranks have prepared a view (`unreported`: since when): once no other one here still does.

    The controller needs all of them, and each write wakes every reader of the cluster. After a while the others are
    published all the same, so that it shows which rank is waited for.
    """
    newest = max((ranks[key].prepared_revision for key in unreported if key in ranks), default=0)
    preparing = any(
        r.phase is Phase.READY
        and r.preparing_revision > max(r.prepared_revision, r.failed_revision)
        and r.preparing_revision >= newest  # one that still does an earlier view is not in this one
        for r in ranks.values()
    )
    return bool(unreported) and (not preparing or now >= min(unreported.values()) + REPORT_WITHIN_S)


def _kills(state: ClusterState, me: AgentRecord, ready: list[LocalRank]) -> list[Effect]:
    asked = state.kill
    if asked is None or not me.killable:
        return []
    return [Kill(r.key, asked.by) for r in ready if r.key == asked.id and not r.killed]


def _retired_epochs(state: ClusterState, ready: list[LocalRank]) -> list[Effect]:
    view, status = state.view, state.engine_status
    if view is None or status is None or status.epoch != view.epoch or status.token != state.engine_token:
        return []
    if state.next is not None:
        return []  # what is being prepared must not be dropped
    ids = {member.id for member in view.members}
    return [
        RetireEpoch(r.key, view.epoch, (view.epoch, r.prepared_revision))
        for r in ready
        if r.key in ids and r.retired != (view.epoch, r.prepared_revision)
    ]


def peers_of(view: View, state: ClusterState) -> Peers | None:
    """Where each member of `view` is reached; None while some member has not published that yet."""
    peers: Peers = {}
    for member in view.members:
        record = state.ranks.get(member.id)
        if record is None or not record.exchange_handle:
            return None
        peers[member.rank] = (member.incarnation, record.exchange_handle)
    return peers


def record_of(rank: LocalRank, node: str) -> RankRecord:
    """The rank as the rest of the cluster may see it."""
    if not rank.exchange_handle:
        state = RankState.LAUNCHING
    elif rank.prepared_revision:
        state = RankState.STANDBY
    else:
        state = RankState.LOADING if rank.loading or rank.loaded else RankState.HANDSHAKING
    return RankRecord(
        rank=rank.key.rank,
        node=node,
        incarnation=rank.key.incarnation,
        pid=rank.pid,
        state=state,
        started=rank.started,
        prepared_revision=rank.prepared_revision,
        prepare_error=rank.prepare_error,
        failed_revision=rank.failed_revision,
        engine_token=rank.attached_token,
        response_handle=rank.response_handle,
        liveness_handle=rank.liveness_handle,
        exchange_handle=rank.exchange_handle,
        fingerprint=rank.identity.get(KERNELS, ""),
        identity={name: value for name, value in rank.identity.items() if name != KERNELS},
        loaded=rank.loaded,
        expert_digests=rank.expert_digests,
        join_key=rank.join_key,
    )


def pools_to_free(state: ClusterState, left: Iterable[ProcessId]) -> list[ProcessId]:
    """KV pools of ranks that have ended, which the engine does not read any more, or never will."""
    view, status = state.view, state.engine_status
    if view is None or status is None or status.token != state.engine_token:
        return list(left)  # a new engine knows nothing of what is in them
    if status.epoch < view.epoch:
        return []  # it has yet to see who is in the view, and may not know of the death
    unnoticed = {member.id for member in view.members if member.rank not in status.masked}
    return [process for process in left if process not in unnoticed and process not in set(status.reading)]


def expert_pieces_to_free(state: ClusterState, me: str, numbers: Iterable[int]) -> list[int]:
    """Memory of experts on GPUs whose slot no rank of this host will fill."""
    desired, assigned = state.desired, {slot: a.node for a in state.assignments.values() for slot in _slots_of(a)}
    if desired is None:
        return []
    elsewhere = {slot for slot, node in assigned.items() if node != me}
    aside = {slot for slot, last in state.exits.items() if last.quarantined}
    kept = (set(desired.slots) | assigned.keys()) - elsewhere - aside
    return [number for number in numbers if number // PIECES not in kept]


def _slots_of(assignment: Assignment) -> list[int]:
    return [spec.rank for spec in assignment.ranks]


def relief(state: ClusterState, me: AgentRecord, ranks: Iterable[RankId]) -> bool:
    """Whether an agent that leaves should go on waiting: it has ranks still, and others serve that can take over."""
    staying = {node for node, agent in state.agents.items() if not agent.leaving}
    others = any(m.node in staying and m.node != me.node for m in (state.view.members if state.view else ()))
    return others and any(True for _ in ranks)


def lacking(state: ClusterState, me: AgentRecord, buried: Collection[RankId], now: float) -> str:
    """What is missing until all that is meant for this node serves; nothing: it does.

    `buried`: ranks of this agent that have died. Where they were set aside a rolling update must not go on.
    """
    facts = ClusterFacts(state, now)
    mine = state.agents.get(me.node)
    if mine is None or mine.started != me.started or state.desired is None:
        return "the cluster does not know this agent yet"
    if facts.config.follow_agents and me.node not in facts.desired.nodes:
        return "the cluster's size does not count this agent yet"
    here = {spec.id for node, spec in facts.assigned.values() if node == me.node}
    serving = {member.id for member in facts.alive if member.node == me.node}
    if starting := sorted(rank for rank, _ in here - serving):
        return f"ranks {starting} do not serve yet"
    aside = {slot for slot, last in state.exits.items() if last.quarantined}
    if failed := sorted(slot for slot in aside if state.exits[slot].id in buried):
        return f"ranks {failed} were set aside here: see `elastic explain`"
    if (unplaced := facts.target - len(aside.intersection(facts.fill)) - len(facts.assigned)) > 0 and len(
        here
    ) < me.capacity:
        return f"{unplaced} ranks have no host yet"
    return ""


def stale_records(state: ClusterState, node: str, ranks: Mapping[RankId, LocalRank]) -> list[RankId]:
    """Records of this node without a process of ours: an earlier run of the agent left them."""
    return [key for key, record in state.ranks.items() if record.node == node and key not in ranks]


# --- the failure detector -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heartbeat:
    """The agent's view of one rank's heartbeat counter. Only observations count, never elapsed time alone: an agent
    that was itself held up has observed nothing, and must not take its ranks for hung."""

    counter: int
    advanced_at: float
    misses: int = 0  # observations since then without advance


def observe(heartbeat: Heartbeat, counter: int, now: float) -> Heartbeat:
    """The view after reading `counter` at `now`."""
    if counter != heartbeat.counter:
        return Heartbeat(counter, now)
    return replace(heartbeat, misses=heartbeat.misses + 1)


def advancing(heartbeat: Heartbeat) -> bool:
    """Whether the last observation saw an advance: only then is the rank's lease renewed."""
    return heartbeat.misses == 0


def hung(heartbeat: Heartbeat, now: float, *, after_s: float, misses: int = 4) -> bool:
    """Whether the process must be taken for stopped: several observations in a row, over at least `after_s`."""
    return heartbeat.misses >= misses and now - heartbeat.advanced_at >= after_s


def heartbeats(
    node: str, ranks: Mapping[RankId, Heartbeat], loads: Mapping[ProcessId, LoadSeen], now: float, wall: float
) -> Heartbeats:
    """What the cluster may know of it. `now` is on the observations' clock, `wall` the time of day at that moment."""
    beats = {key.incarnation: wall - (now - seen.advanced_at) for key, seen in ranks.items() if seen.counter >= 0}
    bytes_of = {k.incarnation: (seen.done, seen.total) for k, seen in loads.items() if isinstance(k, RankId)}
    return Heartbeats(node=node, at=wall, beats=beats, loads=bytes_of)

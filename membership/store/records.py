"""The records that live in the store, and the cluster's state as read from them. Plain data, only lookups.

Every record is a frozen msgspec struct; `codec.py` gives it a schema version on the wire. All times are
`time.time()` seconds unless a name says otherwise.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from membership.base.enums import OperationKind
from membership.base.timing import CLOCK_SKEW_S, COVERAGE_DEADLINE_S, LAUNCH_DEADLINE_S, LEASE_TTL_S, RESTART_WINDOW_S

Placement = dict[int, tuple[tuple[int, ...], ...]]
"""rank -> for each MoE layer (0-based among MoE layers) the logical experts that the rank holds, ascending."""


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything stored."""


class RankState(StrEnum):
    """What an operator sees. LAUNCHING..STANDBY precede commit; SERVING..MASKED are in the view; the rest are out."""

    LAUNCHING = "launching"
    HANDSHAKING = "handshaking"
    LOADING = "loading"
    STANDBY = "standby"
    SERVING = "serving"
    DRAINING = "draining"
    MASKED = "masked"
    DEAD = "dead"
    QUARANTINED = "quarantined"


class Phase(StrEnum):
    """Phases of an operation; `membership/store/phases.py` holds the one table of legal transitions."""

    PROPOSED = "proposed"
    SPAWNING = "spawning"
    HANDSHAKING = "handshaking"
    LOADING = "loading"
    READY = "ready"
    COMMITTED = "committed"
    RETIRING = "retiring"
    DONE = "done"
    ABORTED = "aborted"


class ClusterConfig(Record, frozen=True, kw_only=True):
    """What the cluster serves and how; written once by `elastic serve` (key `config`), constant afterwards."""

    cluster: str
    model: str  # absolute path of the checkpoint directory
    served_model_name: str
    moe_layers: int
    experts: int
    redundancy: float = 2.0
    max_ranks: int = 64
    dtype: str = "auto"  # auto | float32 | bfloat16
    exactness: str = "invariant"  # invariant | stock
    device: str = "auto"
    max_model_len: int = 4096
    block_size: int = 16  # tokens per KV block
    kv_blocks: int = 1024  # KV blocks per rank
    max_batched_tokens: int = 512  # per rank and step: decode tokens plus prefill chunk
    max_seqs: int = 64  # per rank and step
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = 0
    follow_agents: int = 0  # ranks per agent, if their number is to set the size; 0: operators do
    lease_ttl_s: float = LEASE_TTL_S
    expert_bytes: int = 0  # weights of one expert in one layer; for reports of what a change would move
    rebalance_bytes: int = 2 << 30  # weights that one background rebalance may have ranks load; 0: never rebalance
    load_bytes_per_s: int = 0  # so much of the checkpoint the ranks of a host read while they prepare a view; 0: no cap
    restart_intensity: int = 6  # so many deaths of a slot within the window set it aside
    restart_window_s: float = RESTART_WINDOW_S
    launch_deadline_s: float = LAUNCH_DEADLINE_S
    coverage_deadline_s: float = COVERAGE_DEADLINE_S  # how long a request waits for lost experts before it gets a 503


class Member(Record, frozen=True, kw_only=True):
    """One rank of a view. `incarnation` is unique and rising over the cluster's life: a restart gets a new one."""

    rank: int
    node: str
    incarnation: int


class View(Record, frozen=True, kw_only=True):
    """The durable membership: epoch, members and who holds which expert. Key `view`; the staged next one is `next`."""

    epoch: int
    members: tuple[Member, ...] = ()
    placement: Placement = {}
    staged: float = 0.0  # when the controller staged it
    attempt: int = 0  # how often the same membership was staged before, after failures to prepare
    unfinished: bool = False  # a step of a rebalance of which more is to come
    urgent: bool = False  # requests wait for what it has ranks load: no cap of their bandwidth

    def member(self, rank: int) -> Member | None:
        """The member in slot `rank`, if any."""
        return next((m for m in self.members if m.rank == rank), None)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the members, ascending."""
        return tuple(sorted(m.rank for m in self.members))


class Desired(Record, frozen=True, kw_only=True):
    """How many ranks somebody wants. Key `desired`. `operation` is the id of the operation that set it."""

    ranks: int
    operation: str = ""
    slots: tuple[int, ...] = ()  # the rank slots that make it up, once the controller has chosen; who scales keeps them
    nodes: tuple[str, ...] = ()  # whom `follow_agents` counts; a node whose agent died is still counted
    cordoned: tuple[int, ...] = ()  # drained slots: not counted in `ranks`, and empty until they are undrained


class Pause(Record, frozen=True, kw_only=True):
    """Planned changes are refused, and none begins by itself, until then. Key `pause`. Faults are handled as ever."""

    until: float
    since: float
    by: str = ""
    reason: str = ""


class RebalanceRequest(Record, frozen=True, kw_only=True):
    """Somebody wants load evened out now rather than when it is worth it. Key `rebalance`; for a view staged before."""

    at: float
    by: str = ""


class RankSpec(Record, frozen=True, kw_only=True):
    """One rank that a node's agent must run."""

    rank: int
    incarnation: int
    launched: float = 0.0  # when the controller assigned it; it must have registered within `launch_deadline_s`


class Assignment(Record, frozen=True, kw_only=True):
    """All ranks that a node's agent must run, and no others. Key `assign/<node>`; written by the controller alone."""

    node: str
    ranks: tuple[RankSpec, ...] = ()
    agent_started: float = 0.0  # `started` of the agent it is for: a later agent of the node must not spawn from it


class AgentRecord(Record, frozen=True, kw_only=True):
    """A live agent. Key `agents/<node>`, under the agent's lease."""

    node: str
    pid: int
    started: float
    capacity: int = 64
    spares_wanted: int = 0
    spares: tuple[int, ...] = ()  # the processes that wait for a slot
    leaving: bool = False  # it asks to be relieved of its ranks, and ends once it has none


class RankRecord(Record, frozen=True, kw_only=True):
    """A rank as its agent sees it. Key `ranks/<rank>/<incarnation>`, under the rank's own lease.

    The agent renews that lease only while the rank's heartbeat advances, and revokes it when the process is gone.
    """

    rank: int
    node: str
    incarnation: int
    pid: int
    state: RankState  # launching | handshaking | loading | standby (the rest follows from view and mask)
    started: float = 0.0
    prepared_revision: int = 0  # mod revision of the staged view (`next`) that this rank has fully prepared
    prepare_error: str = ""  # why it could not prepare `failed_revision`
    failed_revision: int = 0
    engine_token: int = 0  # token of the engine whose queues this rank has joined
    response_handle: bytes = b""  # queue handle of the rank's replies to that engine
    liveness_handle: bytes = b""
    exchange_handle: bytes = b""
    fingerprint: str = ""  # kernel fingerprint: ranks of one view must agree, or outputs could differ


class RankExit(Record, frozen=True, kw_only=True):
    """The last death in a rank slot, and the restart policy's verdict. Key `exits/<rank>`; written by its agent."""

    rank: int
    incarnation: int
    reason: str
    at: float
    restarts: int = 0  # deaths in this slot so far
    not_before: float = 0.0  # the controller must not relaunch the slot earlier (backoff)
    quarantined: bool = False
    forgiven: float = 0.0  # deaths up to then do not count any more: when an operator ended the quarantine

    def held_back_s(self, now: float) -> float:
        """How much longer the slot must be left empty. Where its agent's clock is far ahead of ours: not at all."""
        backoff_s, left_s = self.not_before - self.at, self.not_before - now
        return left_s if backoff_s > 0 and 0 < left_s <= backoff_s + CLOCK_SKEW_S else 0.0


class Heartbeats(Record, frozen=True, kw_only=True):
    """When a node's ranks were last seen to beat. Key `heartbeats/<node>`, under its agent's lease; once per second.

    For people: nobody decides anything from it, so a mirror takes it over without waking its readers.
    """

    node: str
    at: float  # when it was written
    beats: dict[int, float] = {}  # incarnation -> when its beat counter was last seen to have risen


class EngineRecord(Record, frozen=True, kw_only=True):
    """The engine that may drive steps. Key `engine`, under its lease; the key's create revision is the engine token."""

    node: str
    pid: int
    address: str  # ZeroMQ endpoint for gateways
    broadcast_handle: bytes  # queue handle that ranks join
    mask_handle: bytes  # live-mask page that ranks map


class EngineStatus(Record, frozen=True, kw_only=True):
    """What the engine is doing. Key `engine-status`, under the engine's lease; once per second and on change."""

    token: int
    epoch: int  # the view in use: lower than `view`'s until the engine has flipped
    masked: tuple[int, ...] = ()
    uncovered: int = 0  # (layer, expert) pairs without a live replica
    running: int = 0
    waiting: int = 0
    step: int = 0
    steps: dict[str, int] = {}  # how many ended how, since this engine began: ok | rank_lost | a StepStatus
    pause_ms: float = 0.0  # how long tokens had to wait at the flip to `epoch`
    slow: tuple[int, ...] = ()  # ranks far slower than the others
    vacated_revision: int = 0  # mod revision of the staged view (`next`) whose leavers have no request left to move


class ExpertLoad(Record, frozen=True, kw_only=True):
    """How much work each expert had lately, as the engine saw it. Key `expert-load`, under the engine's lease.

    Written every few seconds, when it says something new; a mirror takes it over without waking its readers.
    """

    at: float
    loads: tuple[tuple[int, ...], ...] = ()  # [MoE layer][expert], in 16ths of the layer's mean


class GatewayRecord(Record, frozen=True, kw_only=True):
    """A live gateway. Key `gateways/<name>`, under its lease."""

    name: str
    pid: int
    url: str
    admin_url: str


class LeaderRecord(Record, frozen=True, kw_only=True):
    """The controller in charge. Key `leader`, under its lease; the key's create revision is its fencing token."""

    node: str
    pid: int


class Counter(Record, frozen=True, kw_only=True):
    """A number that only rises. Key `incarnation`: the last incarnation given out; written by the controller alone."""

    value: int = 0


class Operation(Record, frozen=True, kw_only=True):
    """A change somebody asked for. Key `ops/<id>`; at most one has a phase other than DONE or ABORTED."""

    id: str
    kind: OperationKind
    target: int  # ranks desired once it is done
    ranks: tuple[int, ...] = ()  # whom a drain or undrain names
    previous: int = 0  # ranks desired before, restored if it aborts
    phase: Phase = Phase.PROPOSED
    progress: float = 0.0
    started: float = 0.0
    deadline: float = 0.0
    finished: float = 0.0
    if_epoch: int = 0
    epoch: int = 0  # epoch committed by it
    phase_times: dict[str, float] = {}  # phase -> when it was entered
    bytes_moved: int = 0
    pause_ms: float = 0.0  # measured by the engine at the flip
    error: str = ""
    cancelled: str = ""  # by whom; the controller rolls it back

    @property
    def active(self) -> bool:
        """Whether it has not ended yet."""
        return self.phase not in (Phase.DONE, Phase.ABORTED)


class ClusterState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything under the cluster's prefix at one store revision: the sole input of the pure deciders."""

    revision: int
    config: ClusterConfig | None = None
    desired: Desired | None = None
    pause: Pause | None = None
    rebalance: RebalanceRequest | None = None
    view: View | None = None
    view_revision: int = 0
    next: View | None = None
    next_revision: int = 0
    leader_revision: int = 0  # create revision of the leader key = the controller's fencing token
    engine: EngineRecord | None = None
    engine_token: int = 0
    engine_status: EngineStatus | None = None
    expert_load: ExpertLoad | None = None
    agents: dict[str, AgentRecord] = {}
    assignments: dict[str, Assignment] = {}
    ranks: dict[tuple[int, int], RankRecord] = {}  # (rank, incarnation) -> record
    exits: dict[int, RankExit] = {}
    heartbeats: dict[str, Heartbeats] = {}
    gateways: dict[str, GatewayRecord] = {}
    operations: dict[str, Operation] = {}
    incarnation: int = 0  # the last incarnation given out (key `incarnation`, a Counter)
    incarnation_revision: int = 0

    def paused(self, now: float) -> bool:
        """Whether planned changes wait."""
        return self.pause is not None and now < self.pause.until

    @property
    def active(self) -> Operation | None:
        """The operation under way."""
        return next((op for op in self.operations.values() if op.active), None)

    @property
    def history(self) -> tuple[Operation, ...]:
        """All operations on record, the latest last."""
        return tuple(sorted(self.operations.values(), key=lambda op: (op.started, op.id)))

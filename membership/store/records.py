"""The records in the store, and the cluster's state as read from them. Plain data with lookups only.

Every record is a frozen msgspec struct; `codec.py` gives it a schema version on the wire. All times are
`time.time()` seconds unless a name says otherwise.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from membership.base.enums import Device, Dtype, Exactness, Homes, OperationKind
from membership.base.rank_id import RankId
from membership.base.timing import (
    CLOCK_SKEW_S,
    COVERAGE_DEADLINE_S,
    LAUNCH_DEADLINE_S,
    LEASE_TTL_S,
    LOAD_STALL_S,
    MAX_WAIT_S,
    RESTART_WINDOW_S,
    STEP_BUDGET_S,
)

Placement = dict[int, tuple[tuple[int, ...], ...]]
"""rank -> for each MoE layer (0-based among MoE layers) the logical experts that the rank holds, ascending."""
MAX_RANKS = 256
"""Rank slots of a cluster: as many as live masks have places, and half as many as queues have."""
DIGEST_BYTES = 4
"""Of the digest of one expert's weights."""


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of everything stored."""


class RankProcess(Record, frozen=True, kw_only=True):
    """What concerns one process of a rank. `incarnation` is unique and rising: a restart gets a new one."""

    rank: int
    incarnation: int

    @property
    def id(self) -> RankId:
        """The identity of the process."""
        return RankId(self.rank, self.incarnation)


class RankState(StrEnum):
    """What an operator sees. LAUNCHING..STANDBY precede commit; SERVING..MASKED are in the view."""

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
    """What the cluster serves and how; written once by `elastic serve` (key `config`).

    Constant afterwards, but for `join_…`, which `elastic keys rotate` changes.
    """

    cluster: str
    model: str  # absolute path of the checkpoint directory
    served_model_name: str
    moe_layers: int
    experts: int
    redundancy: float = 2.0
    max_ranks: int = 64
    dtype: Dtype = Dtype.AUTO
    exactness: Exactness = Exactness.INVARIANT
    device: Device = Device.AUTO
    max_model_len: int = 4096
    block_size: int = 16  # tokens per KV block
    kv_blocks: int = 1024  # KV blocks per rank
    gpu_exchange: int = 0  # rows travel between the GPUs of so many ranks; 0: over host memory
    homes: Homes = Homes.APART
    prefix_cache: bool = True  # KV blocks of earlier requests serve later ones that begin alike
    kv_pools: bool = True  # a dead rank's KV blocks serve its requests on the other ranks of its host
    max_batched_tokens: int = 512  # per rank and step: decode tokens plus prefill chunks
    step_budget_s: float = STEP_BUDGET_S  # which the prefill chunks of a step keep to; 0: no limit but the above
    max_seqs: int = 64  # per rank and step
    max_waiting_requests: int = 1024  # that wait for a place on a rank; further ones are refused
    max_waiting_tokens: int = 1_000_000  # in the prompts of those that wait
    max_wait_s: float = MAX_WAIT_S  # for a place on a rank, before a request is refused
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = 0
    ranks_asked: int = 0  # by --ranks at the last start, 0: not given; the same number again changes nothing
    follow_agents: int = 0  # ranks per agent, if the number of agents sets the size; 0: operators set it
    lease_ttl_s: float = LEASE_TTL_S
    expert_bytes: int = 0  # weights of one expert in one layer
    rebalance_bytes: int = 2 << 30  # max weights loaded by one background rebalance; 0: never rebalance
    load_bytes_per_s: int = 0  # max rate at which a host's ranks get weights for a view, or it sends them; 0: unlimited
    restart_intensity: int = 6  # number of deaths within the window that quarantine a slot
    restart_window_s: float = RESTART_WINDOW_S
    launch_deadline_s: float = LAUNCH_DEADLINE_S  # of a rank's start and of its handshakes, never of a load
    load_stall_s: float = LOAD_STALL_S  # a load that makes no progress for this long is given up
    coverage_deadline_s: float = COVERAGE_DEADLINE_S  # max wait of a request for lost experts, none on their way
    files: tuple[tuple[str, str], ...] = ()  # (name, digest) of the checkpoint's small files, e.g. tokenizer.json
    served_model_aliases: tuple[str, ...] = ()  # more names of the model in the API
    min_agents: int = 1  # how many must be there before the first ranks start
    join_key: str = ""  # public half of what the join secret gives; "": the cluster is on one host
    join_generation: int = 0  # how often that secret has been replaced
    join_keys_before: tuple[str, ...] = ()  # of all secrets that were replaced, the oldest first
    join_grace: bool = False  # whether the last of these still opens what listens with it
    join_since: int = 0  # the last incarnation that was given out before the secret was replaced
    gpu_exchange_reason: str = ""  # why `gpu_exchange` is 0, if it was not asked for

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names of the model in the API."""
        return (self.served_model_name, *self.served_model_aliases)

    @property
    def join_keys_retired(self) -> tuple[str, ...]:
        """Of the secrets with which nothing may listen any more."""
        return self.join_keys_before[:-1] if self.join_grace else self.join_keys_before


class Checkpoint(Record, frozen=True, kw_only=True):
    """What the cluster serves, by content: as its first view loaded it. Key `checkpoint`; constant afterwards."""

    parts: dict[str, str] = {}  # as `RankRecord.identity`
    experts: tuple[bytes, ...] = ()  # as `RankRecord.expert_digests`; every expert is known


class Member(RankProcess, frozen=True, kw_only=True):
    """One rank of a view."""

    node: str


class View(Record, frozen=True, kw_only=True):
    """The durable membership: epoch, members and placement. Key `view`; the staged next view is key `next`."""

    epoch: int
    members: tuple[Member, ...] = ()
    placement: Placement = {}
    staged: float = 0.0  # when the controller staged it
    attempt: int = 0  # number of earlier attempts with the same members that failed to prepare
    unfinished: bool = False  # a rebalance step that another one follows
    urgent: bool = False  # requests wait for the experts that it loads: `load_bytes_per_s` does not apply

    def member(self, rank: int) -> Member | None:
        """The member in slot `rank`, if any."""
        return next((m for m in self.members if m.rank == rank), None)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Ranks of the members, ascending."""
        return tuple(sorted(m.rank for m in self.members))


class Desired(Record, frozen=True, kw_only=True):
    """The desired size. Key `desired`. `operation`: id of the operation that set it."""

    ranks: int
    operation: str = ""
    slots: tuple[int, ...] = ()  # its rank slots, once the controller has chosen them
    nodes: tuple[str, ...] = ()  # counted by `follow_agents`, also while a node's agent is dead
    cordoned: tuple[int, ...] = ()  # drained slots: not counted in `ranks`, and empty until they are undrained


class Pause(Record, frozen=True, kw_only=True):
    """Planned changes are refused, and none starts by itself, until `until`. Key `pause`. Faults are still handled."""

    until: float
    since: float
    by: str = ""
    reason: str = ""


class RebalanceRequest(Record, frozen=True, kw_only=True):
    """A request to rebalance now. Key `rebalance`; it applies to views staged before `at`."""

    at: float
    by: str = ""


class KillRequest(RankProcess, frozen=True, kw_only=True):
    """A request to SIGKILL this incarnation of a rank, as a fault would. Key `kill`: the latest one. It needs no end:
    the incarnation never comes again."""

    by: str = ""


class RankSpec(RankProcess, frozen=True, kw_only=True):
    """One rank that a node's agent must run."""

    launched: float = 0.0  # when it was assigned; it must register within `launch_deadline_s`


class Assignment(Record, frozen=True, kw_only=True):
    """Exactly the ranks that a node's agent must run. Key `assign/<node>`; written only by the controller."""

    node: str
    ranks: tuple[RankSpec, ...] = ()
    agent_started: float = 0.0  # `started` of the addressed agent: a later agent of the node must not act on it


class AgentRecord(Record, frozen=True, kw_only=True):
    """A live agent. Key `agents/<node>`, under the agent's lease."""

    node: str
    pid: int
    started: float
    capacity: int = 64
    spares_wanted: int = 0
    spares: tuple[int, ...] = ()  # pids of its spare processes
    leaving: bool = False  # it asks that its ranks move away, and exits once it has none
    trouble: str = ""  # what is wrong with its copy of the checkpoint, while its ranks serve on
    host: str = ""  # which host and network namespace it is in, if other hosts reach it
    address: str = ""  # at which they do
    importing: bool = False  # a rank that is started there now waits for imports of seconds, on a busy host of minutes
    code: str = ""  # versions of what its ranks compute with, as in `RankRecord.identity`, if other hosts reach it
    join_keys: tuple[str, ...] = ()  # of all join secrets that it has
    weights_at: str = ""  # ZeroMQ endpoint where other hosts get weights and small files of its checkpoint
    weights_key: str = ""  # CURVE public key of that endpoint
    machine: str = ""  # what ends with others of the same name: a server, a Kubernetes node. Empty: the node by itself
    zone: str = ""  # the zone that this is in, if one is known
    killable: bool = False  # an operator allows that its ranks are killed on request
    notices: bytes = b""  # the queue by which it tells engines on other hosts of its ranks' deaths, if they reach it


class RankRecord(RankProcess, frozen=True, kw_only=True):
    """A rank as its agent observes it. Key `ranks/<rank>/<incarnation>`, under the rank's own lease.

    The agent renews that lease only while the rank's heartbeat advances, and revokes it when the process is gone.
    """

    node: str
    pid: int
    state: RankState  # launching | handshaking | loading | standby (the rest follows from view and mask)
    started: float = 0.0
    prepared_revision: int = 0  # mod revision of the staged view (`next`) that this rank has prepared
    prepare_error: str = ""  # why it could not prepare `failed_revision`
    failed_revision: int = 0
    engine_token: int = 0  # token of the engine whose queues it has joined
    response_handle: bytes = b""  # queue handle of its replies to that engine
    liveness_handle: bytes = b""
    exchange_handle: bytes = b""
    fingerprint: str = ""  # of its kernels: ranks of one view must agree, or outputs could differ
    identity: dict[str, str] = {}  # all else that decides a bit of its output: name of the part -> its digest or value
    loaded: bool = False  # all but its experts
    expert_digests: tuple[bytes, ...] = ()  # [MoE layer]: DIGEST_BYTES per expert; zeros: it has not loaded that one
    join_key: str = ""  # of the join secret with which it listens to ranks on other hosts


class RankExit(RankProcess, frozen=True, kw_only=True):
    """The last death in a rank slot, and the restart policy's verdict. Key `exits/<rank>`; written by its agent."""

    reason: str
    at: float
    restarts: int = 0  # deaths in this slot so far
    not_before: float = 0.0  # the controller must not relaunch the slot earlier (backoff)
    quarantined: bool = False
    forgiven: float = 0.0  # when an operator ended the quarantine: earlier deaths no longer count
    refused: bool = False  # it would have computed something else than the other ranks

    def held_back_s(self, now: float) -> float:
        """How much longer the slot must stay empty. 0.0 if the agent's clock is too far ahead of ours."""
        backoff_s, left_s = self.not_before - self.at, self.not_before - now
        return left_s if backoff_s > 0 and 0 < left_s <= backoff_s + CLOCK_SKEW_S else 0.0


class HostLink(Record, frozen=True, kw_only=True):
    """Connections from one node to another, of all ranks there or of the engine. The counters only rise."""

    links: int = 0
    up: int = 0  # of them
    rtt_s: float = 0.0  # the longest of them, as kernels have learned it
    sent_bytes: int = 0
    retransmits: int = 0  # packets that were sent again
    suspects: int = 0  # how often the other node was silent
    cuts: int = 0  # links that ended though both ends lived on


class GpuUse(Record, frozen=True, kw_only=True):
    """A rank's GPU, as the rank last saw it. Memory is of all processes there."""

    index: int  # as the rank counts the GPUs of its host
    uuid: str
    free: int  # bytes
    total: int
    graphs: int = 0  # kinds of steps that the rank has recorded
    graph_rows: tuple[int, ...] = ()  # the numbers of rows of these
    recorded_at: float = 0.0  # the last of them
    exchange: str = ""  # cuda | host: how rows travel to other ranks of the host
    exchange_reason: str = ""  # why over host memory


class Heartbeats(Record, frozen=True, kw_only=True):
    """The last observed heartbeat of each of a node's ranks. Key `heartbeats/<node>`, under the agent's lease; 1 Hz.

    For display only. No decision depends on it, so a mirror stores it without waking its readers.
    """

    node: str
    at: float  # when it was written
    beats: dict[int, float] = {}  # incarnation -> when its heartbeat counter last rose
    loads: dict[int, tuple[int, int]] = {}  # incarnation of a rank that loads -> bytes that are there, bytes in all
    links: dict[str, HostLink] = {}  # node -> links of this node's ranks with ranks there
    weights_from: tuple[str, ...] = ()  # nodes from which this node's ranks take weights now
    gpus: dict[int, GpuUse] = {}  # incarnation of a rank that computes on one -> what it last saw


class EngineRecord(Record, frozen=True, kw_only=True):
    """The elected engine. Key `engine`, under its lease; the key's create revision is the engine token."""

    node: str
    pid: int
    address: str  # ZeroMQ endpoint for gateways of its host
    broadcast_handle: bytes  # queue handle that ranks join
    mask_handle: bytes  # live-mask page that ranks map
    host: str = ""  # which host and network namespace it is in
    remote: str = ""  # ZeroMQ endpoint for gateways elsewhere
    remote_key: bytes = b""  # CURVE public key of that endpoint
    join_key: str = ""  # of the join secret with which it listens to other hosts


class EngineStatus(Record, frozen=True, kw_only=True):
    """The engine's status. Key `engine-status`, under the engine's lease; once per second and on change."""

    token: int
    epoch: int  # the view in use: lower than `view`'s until the engine has flipped
    masked: tuple[int, ...] = ()
    uncovered: int = 0  # (layer, expert) pairs without a live replica
    running: int = 0
    waiting: int = 0
    queried_tokens: int = 0  # of requests that got a rank, since this engine began
    cached_tokens: int = 0  # of those, the ones that the rank had in its prefix cache: they were not computed
    salvaged_tokens: int = 0  # of those, the ones that it read from a dead rank's KV pool
    waiting_tokens: int = 0  # of those that wait
    shed: dict[str, int] = {}  # why -> number of requests refused for want of room since this engine began
    kv_usage: float = 0.0  # part of all ranks' KV blocks that requests use
    preemptions: int = 0  # requests that lost their KV blocks to older ones, since this engine began
    step: int = 0
    steps: dict[str, int] = {}  # outcome -> number of steps since this engine began: ok | rank_lost | a StepStatus
    pause_ms: float = 0.0  # how long tokens waited at the flip to `epoch`
    slow: tuple[int, ...] = ()  # ranks much slower than the others
    vacated_revision: int = 0  # mod revision of the staged view whose departing ranks have no request left
    reading: tuple[RankId, ...] = ()  # dead ranks whose KV pools it may still have read
    links: dict[str, HostLink] = {}  # node -> its connections with ranks there, if that is another host
    recovering: tuple[int, ...] = ()  # lost ranks whose requests have not all gone on elsewhere, though they could
    join_keys: tuple[str, ...] = ()  # of all join secrets that it has


class ExpertLoad(Record, frozen=True, kw_only=True):
    """Each expert's recent load, measured by the engine. Key `expert-load`, under the engine's lease.

    Written every few seconds if it changed. A mirror stores it without waking its readers.
    """

    at: float
    loads: tuple[tuple[int, ...], ...] = ()  # [MoE layer][expert], in 16ths of the layer's mean


class GatewayRecord(Record, frozen=True, kw_only=True):
    """A live gateway. Key `gateways/<name>`, under its lease."""

    name: str
    pid: int
    url: str
    admin_url: str
    node: str = ""
    join_keys: tuple[str, ...] = ()  # of all join secrets that it has


class LeaderRecord(Record, frozen=True, kw_only=True):
    """The controller in charge. Key `leader`, under its lease; the key's create revision is its fencing token."""

    node: str
    pid: int


class Counter(Record, frozen=True, kw_only=True):
    """A number that only rises. Key `incarnation`: the last incarnation given out; written only by the controller."""

    value: int = 0


class Operation(Record, frozen=True, kw_only=True):
    """A requested change in progress, or a finished one. Key `ops/<id>`; at most one is neither DONE nor ABORTED."""

    id: str
    kind: OperationKind
    target: int  # desired ranks once it is done
    ranks: tuple[int, ...] = ()  # the slots of a drain or undrain
    previous: int = 0  # desired ranks before, restored if it aborts
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
    """Everything under the cluster's prefix at one store revision: the only input of pure decisions."""

    revision: int
    config: ClusterConfig | None = None
    checkpoint: Checkpoint | None = None
    desired: Desired | None = None
    pause: Pause | None = None
    rebalance: RebalanceRequest | None = None
    kill: KillRequest | None = None
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
    ranks: dict[RankId, RankRecord] = {}
    exits: dict[int, RankExit] = {}
    heartbeats: dict[str, Heartbeats] = {}
    gateways: dict[str, GatewayRecord] = {}
    operations: dict[str, Operation] = {}
    incarnation: int = 0  # the last incarnation given out (key `incarnation`, a Counter)
    incarnation_revision: int = 0
    missing: dict[RankId, float] = {}  # whose records or agents' records are gone, since when: own_times.py, no key

    def paused(self, now: float) -> bool:
        """Whether planned changes are paused."""
        return self.pause is not None and now < self.pause.until

    @property
    def active(self) -> Operation | None:
        """The operation under way."""
        return next((op for op in self.operations.values() if op.active), None)

    @property
    def history(self) -> tuple[Operation, ...]:
        """All operations on record, the latest last."""
        return tuple(sorted(self.operations.values(), key=lambda op: (op.started, op.id)))

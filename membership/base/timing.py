"""How long until a failure is detected, a rank evicted, a view committed, a lease lost or a wait given up.

Each such time of the product is defined here and imported where it is used; `TIMINGS` is the table that
`elastic doctor --timing` prints. Intervals of polling are not in it: they only have to be short enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """One time. `name` is the constant in this module; `used_in` the file whose behaviour it sets."""

    group: str
    name: str
    value_s: float
    used_in: str
    purpose: str


_rows: list[tuple[str, str, float, str]] = []


def _times(group: str, used_in: str) -> Callable[[float, str], float]:
    """Return what adds a row to the table and returns its value."""

    def add(value_s: float, purpose: str) -> float:
        _rows.append((group, used_in, value_s, purpose))
        return value_s

    return add


# --- A rank that hangs, stops or is slow. (A dead process is detected at once, by the kernel: robust futex or pidfd.)

_time = _times("rank failure", "workers/fleet/watchdog.py")
LATE_S = _time(0.1, "A step is late after 3 x its usual duration, but not before this")
LATE_MAX_S = _time(0.4, "A step is late after this at the latest; then its ranks are examined")
STOPPED_S = _time(0.25, "A late rank whose process is stopped (SIGSTOP) for this long is masked")
HUNG_S = _time(0.8, "A late rank that makes no progress for this long, and for 8 x the usual step, is masked")
_time = _times("rank failure", "workers/fleet/fleet.py")
STEP_DEADLINE_S = _time(
    10.0, "Last resort: a rank that owes an answer this long is masked; 3 x this if it has heartbeats"
)
_time = _times("rank failure", "workers/fleet/pace.py")
PACE_WINDOW_S = _time(2.0, "A rank 4 x slower than the others in 2 such windows in a row is reported as slow")
_time = _times("rank failure", "workers/exchange/loop.py")
EXCHANGE_ANSWER_TIMEOUT_S = _time(30.0, "Max wait of a rank for the rows that it asked other ranks to compute")
_time = _times("rank failure", "workers/rank/engine_port.py")
STEP_OUTPUT_TIMEOUT_S = _time(120.0, "Max wait in a rank for a step's output from the device")
_time = _times("rank failure", "workers/rank/worker_proc.py")
ORPHAN_GRACE_S = _time(1.0, "A rank whose agent died exits by itself; after this it is ended hard")

# --- Leases: until the store itself declares a process gone. Each is renewed three times per time to live.

_time = _times("lease", "membership/store/records.py")
LEASE_TTL_S = _time(
    3.0, "A controller, engine, agent or rank that stops renewing is gone after this (default of `lease_ttl_s`)"
)
CLOCK_SKEW_S = _time(2.0, "Tolerated clock skew between nodes when a backoff time is checked")
_time = _times("lease", "membership/store/pace.py")
LEASE_TTL_MAX_S = _time(
    20.0, "The longest lease while the store answers slowly: doubled until it lasts for 6 answers, or up to this"
)
_time = _times("lease", "elastic/serve/stored_config.py")
LEASE_GRACE_S = _time(2.0, "Of a cluster whose server was killed: max wait beyond the TTL for etcd to end its leases")
_time = _times("lease", "workers/agent/begin.py")
TAKEOVER_S = _time(30.0, "Max wait of a new agent for its predecessor's record to disappear")

# --- A change of members: launch, preparation of the next view, commit, retirement.

_time = _times("change", "elastic/gateway/admin.py")
SHORTEST_TIMEOUT_S = _time(1.0, "The shortest timeout that an operation or pause may be given")
LONGEST_TIMEOUT_S = _time(86_400.0, "The longest one")
_time = _times("change", "membership/operations/operations.py")
OPERATION_TIMEOUT_S = _time(300.0, "An operation that is not done by then is rolled back (default of --timeout)")
_time = _times("change", "membership/store/records.py")
LAUNCH_DEADLINE_S = _time(
    60.0, "A rank must register, and link with its peers, within this (default of `launch_deadline_s`)"
)
LOAD_STALL_S = _time(60.0, "A load that makes no progress for this long is given up (default of `load_stall_s`)")
_time = _times("change", "workers/agent/spares.py")
SPARE_ADOPT_TIMEOUT_S = _time(1.0, "A spare that is not promoted within this is not used: a rank is forked")
_time = _times("change", "workers/agent/handles.py")
FORK_TIMEOUT_S = _time(2.0, "Max wait for the forkserver to fork a rank")
_time = _times("change", "workers/agent/decide.py")
RECOVERY_FIRST_S = _time(1.0, "A new rank's experts wait for requests that a death interrupted, this long at most")
_time = _times("change", "workers/agent/agent.py")
ATTACH_TIMEOUT_S = _time(10.0, "Max time a rank takes to join the engine's queues, before it is asked again")
RETIRE_TIMEOUT_S = _time(60.0, "Max time a rank takes to retire an old epoch")
_time = _times("change", "membership/planning/planner.py")
PREPARE_RETRY_S = _time(0.5, "Pause before a view that a member failed to prepare is staged again; doubles each time")
PREPARE_RETRY_MAX_S = _time(10.0, "The longest such pause; a member that failed 3 times is replaced")
_time = _times("change", "membership/planning/cluster_facts.py")
VACATE_S = _time(30.0, "Max time a commit waits for requests to migrate off departing ranks")
RECORD_MISSING_S = _time(10.0, "A new rank is lost once its record, or its agent's, has been missing for this long")
_time = _times("change", "elastic/engine/migration.py")
COPY_TIMEOUT_S = _time(5.0, "Max time for one half of a migrating request's KV copy")
_time = _times("rank failure", "elastic/engine/salvage.py")
SALVAGE_WAIT_S = _time(0.05, "A step waits for dead ranks' KV blocks for this long, or as long as it would take itself")
_time = _times("rank failure", "workers/rank/early_reads.py")
EARLY_READ_TIMEOUT_S = _time(30.0, "Max time of a read of a dead rank's KV pool beside a step; then its rank ends")
_time = _times("change", "workers/rank/gpu_exchange.py")
TOGETHER_S = _time(20.0, "How long GPUs wait for one another within a step that is not called off")
_time = _times("change", "workers/model/cuda/kv_memory.py")
KV_ROOM_S = _time(5.0, "Max wait of a rank for room for its KV cache on a GPU, where its predecessor's is still read")
_time = _times("change", "workers/protocol/window_client.py")
WINDOW_TIMEOUT_S = _time(
    5.0, "Max wait of a rank for its agent's GPU windows, and for the end of who had its slot before"
)
_time = _times("change", "workers/protocol/pool_client.py")
POOL_TIMEOUT_S = _time(0.3, "Max wait of a rank for its agent to hand over a dead rank's KV pool")
KEEP_TIMEOUT_S = _time(5.0, "Max wait of a rank on a GPU for its agent to keep its KV pool")
_time = _times("change", "workers/rank/left_pools.py")
POOL_MAPPED_S = _time(1.0, "How long a dead rank's KV pool on a GPU stays mapped after it was last read")
_time = _times("change", "workers/agent/handles.py")
POOL_DEATH_S = _time(0.05, "How long an agent that is asked for that pool waits for the kernel's sign of the death")

# --- Repair and rebalance in the background.

_time = _times("rebalance", "membership/planning/rebalance.py")
RESTORE_REST_S = _time(5.0, "From the last view until lost redundancy is restored")
BALANCE_REST_S = _time(10.0, "From the last view until uneven load is balanced")
REQUEST_VALID_S = _time(60.0, "A request to rebalance now expires after this")
_time = _times("rebalance", "workers/rank/load_turns.py")
LOAD_REPORT_S = _time(1.0, "Up to 16 ranks report their experts' load in such a time; of more, each does so less often")
_time = _times("rebalance", "membership/planning/planner.py")
FAILED_REST_S = _time(60.0, "Before a rebalance that ranks could not prepare is tried again")

# --- The store, and the restart of processes.

_time = _times("store", "membership/store/etcd.py")
STORE_CALL_TIMEOUT_S = _time(5.0, "Max wait for the store's answer to one call")
STORE_CONNECT_TIMEOUT_S = _time(2.0, "Max wait for a connection to the store")
_time = _times("store", "membership/store/endpoints.py")
STORE_LISTENS_S = _time(1.0, "Max wait of a command for any sign of the store")
_time = _times("store", "membership/store/mirror.py")
STORE_SILENCE_S = _time(3.0, "A store that does not answer for this long is reported; serving continues")

_time = _times("restart", "membership/base/attempts.py")
ATTEMPT_PAUSE_S = _time(0.1, "Pause before a step for which the machine lacked something is tried again; doubles")
ATTEMPT_PAUSE_MAX_S = _time(5.0, "The longest such pause")
_time = _times("restart", "membership/base/log_repeats.py")
LOG_REPEAT_S = _time(30.0, "The same warning or error is written to a log once in this time")
_time = _times("restart", "membership/base/loop_watchdog.py")
LOOP_LIMIT_S = _time(30.0, "A controller or engine whose main loop hangs for this long is ended")
_time = _times("restart", "membership/store/records.py")
RESTART_WINDOW_S = _time(
    60.0, "Window in which deaths in a rank slot count towards its quarantine (default of `restart_window_s`)"
)
_time = _times("restart", "elastic/serve/role_process.py")
STABLE_S = _time(30.0, "A role that ran this long is restarted without delay")
ROLE_RESTART_MAX_S = _time(5.0, "The longest delay before a role is restarted")
_time = _times("restart", "elastic/serve/role_main.py")
STORE_AWAITED_S = _time(30.0, "A role that starts while the store does not answer ends after this")
ROLE_GRACE_S = _time(20.0, "A role whose supervisor died stops by itself; after this it is ended hard")
HURRY_GRACE_S = _time(5.0, "The same, and for the roles of `elastic serve`, once it was asked to stop a second time")
_time = _times("restart", "elastic/serve/options.py")
STOP_GRACE_S = _time(15.0, "On SIGTERM: max time for open streams to end (default of --stop-grace)")
_time = _times("restart", "workers/agent/zygote.py")
FORKSERVER_FORK_S = _time(5.0, "Max time in which a zygote forks the next forkserver")
FORKSERVER_IMPORTS_S = _time(120.0, "The same while its imports are not done yet")

# --- Queues between processes.

_time = _times("queue", "workers/queue/writer.py")
ENQUEUE_TIMEOUT_S = _time(10.0, "Max wait of a writer for room in a queue")
_time = _times("queue", "workers/queue/remote_writer.py")
REMOTE_SILENCE_S = _time(5.0, "The other end of a cross-host queue counts as gone after this long without a message")
_time = _times("queue", "workers/queue/silence.py")
LINK_BEAT_S = _time(0.025, "Between two signs of life on a connection between hosts, sent by ZeroMQ's own thread")
LINK_SUSPECT_MIN_S = _time(
    0.2, "Another host is suspected if its kernel acknowledges nothing for 2 x (RTT + 4 x jitter), but not before this"
)
LINK_SUSPECT_MAX_S = _time(0.3, "And after this at the latest, where acknowledgements do not take longer anyway")
_time = _times("queue", "workers/exchange/tcp/redial.py")
LINK_RETRY_S = _time(0.1, "A link between hosts that was cut is made again after this; doubles with each attempt")
LINK_RETRY_MAX_S = _time(2.0, "The longest such pause")
LINK_DIAL_S = _time(1.5, "Max time of such an attempt")
_time = _times("queue", "workers/rank/call_port.py")
REPLY_TIMEOUT_S = _time(5.0, "Max wait of a rank for room for its reply to the agent")
_time = _times("queue", "workers/rank/engine_port.py")
STEP_ANSWER_TIMEOUT_S = _time(1.0, "Max wait of a rank for room for its answer to the engine")

# --- Requests, seen from the gateway.

_time = _times("request", "membership/store/records.py")
COVERAGE_DEADLINE_S = _time(
    30.0, "Max wait of a request for lost experts, none on their way, before a 503 (default of `coverage_deadline_s`)"
)
STEP_BUDGET_S = _time(0.1, "Time of a step that the prompts in it keep to; 0: none (default of `step_budget_s`)")
MAX_WAIT_S = _time(120.0, "Max wait of a request for a place on a rank before it gets a 429 (default of `max_wait_s`)")
_time = _times("request", "elastic/engine/waiting.py")
RETRY_AFTER_S = _time(5.0, "Retry-After while it is not known how soon places become free, or experts come back")
RETRY_AFTER_MIN_S = _time(1.0, "The shortest Retry-After of a request that is refused for want of a place")
RETRY_AFTER_MAX_S = _time(60.0, "The longest one")
_time = _times("request", "elastic/gateway/engine_link.py")
ENGINE_SILENCE_S = _time(5.0, "An engine that answers no ping for this long is connected to anew")
ENGINE_WAIT_S = _time(60.0, "Max wait of a request for an engine")
STALL_S = _time(
    300.0, "Max time a request goes without a token while there is an engine (the first: plus `max_wait_s`)"
)
_time = _times("request", "elastic/gateway/health.py")
ENGINE_GRACE_S = _time(10.0, "The gateway stays ready for this long without an engine")
STUCK_S = _time(60.0, "The gateway turns not ready if no request got a token for this long")

_time = _times("request", "elastic/gateway/http.py")
BODY_TIMEOUT_S = _time(30.0, "Max time in which a request's body must arrive")
_time = _times("request", "elastic/gateway/unread.py")
UNREAD_S = _time(10.0, "Max time in which the rest of a body that is not read is awaited, before its connection closes")
_time = _times("request", "elastic/gateway/connection.py")
HEADER_TIMEOUT_S = _time(20.0, "Max time in which a request's header must arrive")
IDLE_TIMEOUT_S = _time(75.0, "A connection without a request is closed after this")
SEND_TIMEOUT_S = _time(120.0, "A client that takes nothing of its answer for this long is disconnected")

_names = [name for name in globals() if name.endswith("_S")]
TIMINGS: tuple[Timing, ...] = tuple(
    Timing(group, name, value_s, used_in, purpose)
    for name, (group, used_in, value_s, purpose) in zip(_names, _rows, strict=True)
)

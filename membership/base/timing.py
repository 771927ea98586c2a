"""How long until a failure is detected, a rank evicted, a view committed, a lease lost or a wait given up.

Each such time of the product is defined here and imported where it is used; `TIMINGS` is the table that
`elastic doctor --timing` prints. Intervals of polling are not in it: they only have to be short enough.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """One time. `name` is the constant in this module; `used_in` the file whose behaviour it sets."""

    group: str
    name: str
    value_s: float
    used_in: str
    purpose: str


_rows: list[Timing] = []
_group = ""  # of the rows that follow


def _define(name: str, value_s: float, used_in: str, purpose: str) -> float:
    _rows.append(Timing(_group, name, value_s, used_in, purpose))
    return value_s


# --- A rank that hangs, stops or is slow. (A dead process is detected at once, by the kernel: robust futex or pidfd.)

_group = "rank failure"
LATE_S = _define(
    "LATE_S", 0.1, "workers/fleet/watchdog.py", "A step is late after 3 x its usual duration, but not before this"
)
LATE_MAX_S = _define(
    "LATE_MAX_S",
    0.4,
    "workers/fleet/watchdog.py",
    "A step is late after this at the latest; then its ranks are examined",
)
STOPPED_S = _define(
    "STOPPED_S",
    0.25,
    "workers/fleet/watchdog.py",
    "A late rank whose process is stopped (SIGSTOP) for this long is masked",
)
HUNG_S = _define(
    "HUNG_S",
    0.8,
    "workers/fleet/watchdog.py",
    "A late rank that makes no progress for this long (or 8 x the usual step) is masked",
)
STEP_DEADLINE_S = _define(
    "STEP_DEADLINE_S",
    10.0,
    "workers/fleet/fleet.py",
    "A rank that owes an answer for this long is masked; 3 x this if it has heartbeats",
)
PACE_WINDOW_S = _define(
    "PACE_WINDOW_S",
    2.0,
    "workers/fleet/pace.py",
    "A rank 4 x slower than the others in 2 such windows in a row is reported as slow",
)
EXCHANGE_ANSWER_TIMEOUT_S = _define(
    "EXCHANGE_ANSWER_TIMEOUT_S",
    30.0,
    "workers/exchange/loop.py",
    "Max wait of a rank for the rows that it asked other ranks to compute",
)
STEP_OUTPUT_TIMEOUT_S = _define(
    "STEP_OUTPUT_TIMEOUT_S",
    120.0,
    "workers/rank/engine_port.py",
    "Max wait in a rank for a step's output from the device",
)
ORPHAN_GRACE_S = _define(
    "ORPHAN_GRACE_S",
    1.0,
    "workers/rank/worker_proc.py",
    "A rank whose agent died exits by itself; after this it is ended hard",
)

# --- Leases: until the store itself declares a process gone. Each is renewed three times per time to live.

_group = "lease"
LEASE_TTL_S = _define(
    "LEASE_TTL_S",
    3.0,
    "membership/store/records.py",
    "A controller, engine, agent or rank that stops renewing is gone after this (default of the setting `lease_ttl_s`)",
)
CLOCK_SKEW_S = _define(
    "CLOCK_SKEW_S",
    2.0,
    "membership/store/records.py",
    "Tolerated clock skew between nodes when a backoff time is checked",
)
TAKEOVER_S = _define(
    "TAKEOVER_S", 30.0, "workers/agent/begin.py", "Max wait of a new agent for its predecessor's record to disappear"
)

# --- A change of members: launch, preparation of the next view, commit, retirement.

_group = "change"
OPERATION_TIMEOUT_S = _define(
    "OPERATION_TIMEOUT_S",
    300.0,
    "membership/operations/operations.py",
    "An operation that is not done by then is rolled back (default of --timeout)",
)
LAUNCH_DEADLINE_S = _define(
    "LAUNCH_DEADLINE_S",
    60.0,
    "membership/store/records.py",
    "A rank must register, and a staged view be prepared, within this (default of the setting `launch_deadline_s`)",
)
SPARE_ADOPT_TIMEOUT_S = _define(
    "SPARE_ADOPT_TIMEOUT_S",
    1.0,
    "workers/agent/spares.py",
    "A spare that is not promoted within this is not used: a rank is forked",
)
FORK_TIMEOUT_S = _define(
    "FORK_TIMEOUT_S", 2.0, "workers/agent/handles.py", "Max wait for the forkserver to fork a rank"
)
ATTACH_TIMEOUT_S = _define(
    "ATTACH_TIMEOUT_S",
    10.0,
    "workers/agent/agent.py",
    "Max time a rank takes to join the engine's queues, before it is asked again",
)
PREPARE_RETRY_S = _define(
    "PREPARE_RETRY_S",
    0.5,
    "membership/planning/planner.py",
    "Pause before a view that a member failed to prepare is staged again; doubles each time",
)
PREPARE_RETRY_MAX_S = _define(
    "PREPARE_RETRY_MAX_S",
    10.0,
    "membership/planning/planner.py",
    "The longest such pause; a member that failed 3 times is replaced",
)
VACATE_S = _define(
    "VACATE_S",
    30.0,
    "membership/planning/cluster_facts.py",
    "Max time a commit waits for requests to migrate off departing ranks",
)
COPY_TIMEOUT_S = _define(
    "COPY_TIMEOUT_S", 5.0, "elastic/engine/migration.py", "Max time for one half of a migrating request's KV copy"
)
RETIRE_TIMEOUT_S = _define(
    "RETIRE_TIMEOUT_S", 60.0, "workers/agent/agent.py", "Max time a rank takes to retire an old epoch"
)

# --- Repair and rebalance in the background.

_group = "rebalance"
RESTORE_REST_S = _define(
    "RESTORE_REST_S", 5.0, "membership/planning/rebalance.py", "From the last view until lost redundancy is restored"
)
BALANCE_REST_S = _define(
    "BALANCE_REST_S", 10.0, "membership/planning/rebalance.py", "From the last view until uneven load is balanced"
)
FAILED_REST_S = _define(
    "FAILED_REST_S",
    60.0,
    "membership/planning/planner.py",
    "Before a rebalance that ranks could not prepare is tried again",
)
REQUEST_VALID_S = _define(
    "REQUEST_VALID_S", 60.0, "membership/planning/rebalance.py", "A request to rebalance now expires after this"
)

# --- The store, and the restart of processes.

_group = "store"
STORE_CALL_TIMEOUT_S = _define(
    "STORE_CALL_TIMEOUT_S", 5.0, "membership/store/etcd.py", "Max wait for the store's answer to one call"
)
STORE_CONNECT_TIMEOUT_S = _define(
    "STORE_CONNECT_TIMEOUT_S", 2.0, "membership/store/etcd.py", "Max wait for a connection to the store"
)
STORE_SILENCE_S = _define(
    "STORE_SILENCE_S",
    3.0,
    "membership/store/mirror.py",
    "A store that does not answer for this long is reported; serving continues",
)

_group = "restart"
LOOP_LIMIT_S = _define(
    "LOOP_LIMIT_S",
    30.0,
    "membership/base/loop_watchdog.py",
    "A controller or engine whose main loop hangs for this long is ended",
)
RESTART_WINDOW_S = _define(
    "RESTART_WINDOW_S",
    60.0,
    "membership/store/records.py",
    "Window in which deaths in a rank slot count towards its quarantine (default of the setting `restart_window_s`)",
)
STABLE_S = _define(
    "STABLE_S", 30.0, "elastic/serve/role_process.py", "A role that ran this long is restarted without delay"
)
ROLE_RESTART_MAX_S = _define(
    "ROLE_RESTART_MAX_S", 5.0, "elastic/serve/role_process.py", "The longest delay before a role is restarted"
)
ROLE_GRACE_S = _define(
    "ROLE_GRACE_S",
    20.0,
    "elastic/serve/role_main.py",
    "A role whose supervisor died stops by itself; after this it is ended hard",
)
FORKSERVER_FORK_S = _define(
    "FORKSERVER_FORK_S", 5.0, "workers/agent/zygote.py", "Max time in which a zygote forks the next forkserver"
)
FORKSERVER_IMPORTS_S = _define(
    "FORKSERVER_IMPORTS_S", 120.0, "workers/agent/zygote.py", "The same while its imports are not done yet"
)

# --- Queues between processes.

_group = "queue"
ENQUEUE_TIMEOUT_S = _define(
    "ENQUEUE_TIMEOUT_S", 10.0, "workers/queue/writer.py", "Max wait of a writer for room in a queue"
)
REMOTE_SILENCE_S = _define(
    "REMOTE_SILENCE_S",
    5.0,
    "workers/queue/remote_writer.py",
    "The other end of a cross-host queue counts as gone after this long without a message",
)
REPLY_TIMEOUT_S = _define(
    "REPLY_TIMEOUT_S", 5.0, "workers/rank/call_port.py", "Max wait of a rank for room for its reply to the agent"
)
STEP_ANSWER_TIMEOUT_S = _define(
    "STEP_ANSWER_TIMEOUT_S",
    1.0,
    "workers/rank/engine_port.py",
    "Max wait of a rank for room for its answer to the engine",
)

# --- Requests, seen from the gateway.

_group = "request"
COVERAGE_DEADLINE_S = _define(
    "COVERAGE_DEADLINE_S",
    30.0,
    "membership/store/records.py",
    "Max wait of a request for lost experts before it gets a 503 (default of the setting `coverage_deadline_s`)",
)
ENGINE_SILENCE_S = _define(
    "ENGINE_SILENCE_S",
    5.0,
    "elastic/gateway/engine_link.py",
    "An engine that answers no ping for this long is connected to anew",
)
ENGINE_WAIT_S = _define("ENGINE_WAIT_S", 60.0, "elastic/gateway/engine_link.py", "Max wait of a request for an engine")
STALL_S = _define(
    "STALL_S",
    300.0,
    "elastic/gateway/engine_link.py",
    "Max time a request goes without a token while there is an engine",
)
ENGINE_GRACE_S = _define(
    "ENGINE_GRACE_S", 10.0, "elastic/gateway/health.py", "The gateway stays ready for this long without an engine"
)
STUCK_S = _define(
    "STUCK_S", 60.0, "elastic/gateway/health.py", "The gateway turns not ready if no request got a token for this long"
)

TIMINGS: tuple[Timing, ...] = tuple(_rows)

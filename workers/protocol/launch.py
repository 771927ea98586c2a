"""How a rank process begins: what its parent passes to it, and what it answers on its ready pipe.

Both halves of WorkerProc use it: the parent's (`workers/agent/worker_proc.py`) and the child's
(`workers/rank/worker_proc.py`), which do not import each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from membership.base.network import Network
from membership.base.rank_id import ProcessId
from membership.store.records import ClusterConfig

RANK_MODULE = "workers.rank.worker_proc"
"""The child half. The parent's side only names it, for the forkserver to import."""
RANK_MAIN = f"{RANK_MODULE}:run_rank"
READY_STR = "READY"
FAILED_STR = "FAILED"
MAX_READY_BYTES = 64 * 1024


@dataclass(frozen=True)
class Launch:
    """Everything that a new rank process is given."""

    key: ProcessId
    node: str
    config: ClusterConfig
    worker_class: str
    input_handle: bytes  # queue of its parent's calls
    external_input_handles: tuple[bytes, ...] = ()  # queues of callers on other hosts (nnodes > 1)
    scale_up: bool = True  # elastic launch: the device and the model come later, by calls
    weights: bytes = b""  # the host's weight store
    pools: bytes = b""  # the host's KV pools
    windows: bytes = b""  # the host's GPU windows
    network: Network | None = None  # how ranks and engines on other hosts are reached; None: there are none
    experts: bytes = b""  # the host's memory of experts on GPUs


class Ready(msgspec.Struct, frozen=True):
    """The one message on the ready pipe. `status` is READY_STR, or FAILED_STR with the `error`."""

    status: str
    handle: bytes = b""  # queue of its replies
    peer_response_handles: list[bytes] = []
    liveness: bytes = b""
    exchange: bytes = b""
    error: str = ""

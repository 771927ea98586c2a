"""`WorkerProc` as a whole, for code from outside that wants all its members: import it from here.

Inside the product each process imports only its own half: the parent's is `workers/agent/worker_proc.py`, the child's
`workers/rank/worker_proc.py`. Neither imports what the other needs.
"""

from __future__ import annotations

from workers.agent.worker_proc import WorkerProcParent
from workers.rank.worker_proc import WorkerProcChild


class WorkerProc(WorkerProcParent, WorkerProcChild):
    """One rank's process: how a parent makes it and waits for it, and what it does until it ends."""

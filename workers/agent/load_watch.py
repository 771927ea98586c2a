"""Loads of a node's ranks: how far each one is, and which has stalled.

A call that loads has no deadline of its own, as bytes take what the disk takes. It is given up once nothing advances
for `--load-stall` (`load_progress.py`); while a rank does something else in the call, once it takes longer than a
launch. Only observations count, as for heartbeats: an agent that was held up has seen nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from membership.base.errors import ElasticError
from membership.base.rank_id import ProcessId
from membership.store.records import ClusterConfig
from workers.agent.decide import Heartbeat, hung, observe
from workers.protocol.load_progress import LoadSeen

UNTIL_IT_STALLS = math.inf
"""The timeout of a call that is watched."""
_NOTHING = LoadSeen(loading=False, done=0, total=0, marks=-1)
SLACK_S = 5.0  # a rank gives a launch's deadline up by itself, with a better reason


class Failing(Protocol):
    """A call that can be given up."""

    def fail(self, error: ElasticError) -> None:
        """End it with this error."""


@dataclass(frozen=True)
class Load:
    """One call that loads, and the rank's marks as last seen."""

    call: Failing
    marks: Heartbeat
    seen: LoadSeen = _NOTHING


def stalled(load: Load, config: ClusterConfig, now: float) -> str:
    """Why the load must be given up at `now`; "" if it goes on."""
    seen, limit_s = load.seen, config.load_stall_s
    if not seen.loading:
        limit_s = max(limit_s, config.launch_deadline_s + SLACK_S)
    if not hung(load.marks, now, after_s=limit_s):
        return ""
    what = f"its load stalled at {seen.done} of {seen.total} bytes" if seen.loading else "it did not get to load"
    return f"{what}: no progress for {now - load.marks.advanced_at:.1f} s"


class LoadWatch:
    """The loads under way. All calls come from the agent's thread."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._loads: dict[ProcessId, Load] = {}

    def begin(self, key: ProcessId, call: Failing, now: float) -> None:
        """The rank was asked to load; a call that it replaces needs no watching any more."""
        self._loads[key] = Load(call, Heartbeat(-1, now))

    def end(self, key: ProcessId, call: Failing) -> None:
        """That call has ended."""
        if key in self._loads and self._loads[key].call is call:
            del self._loads[key]

    def look(self, key: ProcessId, seen: LoadSeen, now: float) -> tuple[Failing, str] | None:
        """What the rank's page shows now; the call and the reason, if it must be given up."""
        load = self._loads.get(key)
        if load is None:
            return None
        self._loads[key] = load = Load(load.call, observe(load.marks, seen.marks, now), seen)
        reason = stalled(load, self._config, now)
        return (load.call, reason) if reason else None

    @property
    def seen(self) -> dict[ProcessId, LoadSeen]:
        """Of the processes that load now."""
        return {key: load.seen for key, load in self._loads.items() if load.seen.loading}

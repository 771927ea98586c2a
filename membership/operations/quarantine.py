"""Ends the quarantine of a rank slot, once an operator has removed the cause of its deaths.

The exit record is changed, not deleted: without it the dead rank would count as alive. The agent no longer counts the
slot's earlier deaths (`workers/agent/restart_policy.py`), and the controller starts a new incarnation.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from msgspec.structs import replace

from membership.base.errors import ConfigError, OperationConflict
from membership.store.codec import decode, encode
from membership.store.interface import Compare, Put, Store
from membership.store.keys import Keys
from membership.store.records import RankExit

ATTEMPTS = 5


def unquarantine(store: Store, cluster: str, rank: int, clock: Callable[[], float] = time.time) -> RankExit:
    """Allow the slot to be filled again; return its exit record, unchanged if it was not in quarantine.

    ConfigError: no rank died in this slot. OperationConflict: its record kept changing.
    """
    key = Keys(cluster).exit(rank)
    for _ in range(ATTEMPTS):
        found = store.get(key)
        if found is None:
            raise ConfigError(
                f"rank {rank} is not in quarantine: no death of it is on record", hint="see: elastic status"
            )
        last = decode(found.value, RankExit)
        if not last.quarantined:
            return last
        forgiven = max(clock(), last.at)  # whatever our clock
        pardoned = replace(last, quarantined=False, refused=False, not_before=0.0, forgiven=forgiven)
        if store.txn([Compare(key, "mod", "=", found.mod_revision)], [Put(key, encode(pardoned))]).succeeded:
            return pardoned
    raise OperationConflict(f"the exit record of rank {rank} keeps changing", hint="ask again")

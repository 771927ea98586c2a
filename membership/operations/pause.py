"""Maintenance: planned changes are refused, and none starts by itself, for a while. Faults are still handled.

A pause always expires (`ttl_s`): a forgotten one must not freeze a cluster for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from membership.base.errors import ConfigError
from membership.store.codec import encode
from membership.store.interface import Compare, Put, Store
from membership.store.keys import Keys
from membership.store.records import Pause


def pause(
    store: Store, cluster: str, ttl_s: float, *, by: str = "", reason: str = "", clock: Callable[[], float] = time.time
) -> Pause:
    """Refuse planned changes for `ttl_s`. Replaces an earlier pause. ConfigError: there is no such cluster."""
    keys, now = Keys(cluster), clock()
    record = Pause(until=now + ttl_s, since=now, by=by, reason=reason)
    if not store.txn([Compare(keys.config, "mod", ">", 0)], [Put(keys.pause, encode(record))]).succeeded:
        raise ConfigError(f"there is no cluster {cluster!r} in this store", hint="check --cluster and --etcd")
    return record


def resume(store: Store, cluster: str) -> bool:
    """End the pause; return whether there was one."""
    return store.delete(Keys(cluster).pause)


def paused_words(pause: Pause, now: float) -> str:
    """The pause in one line, for refusals and banners."""
    by = f" by {pause.by}" if pause.by else ""
    why = f": {pause.reason}" if pause.reason else ""
    return f"planned changes are paused{by} for another {max(0.0, pause.until - now):.0f} s{why}"

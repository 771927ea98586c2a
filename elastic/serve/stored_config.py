"""What `elastic serve` writes into the store before it starts a role: the cluster's config and size.

A cluster that served the same model before continues from its last epoch, at the size that it had, unless `--ranks` is
another than at its last start: a pod has the same flags at each start. While another process serves the cluster,
nothing is written. One that was killed cannot say that it is gone: its leases run out, or are revoked if it was here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import msgspec

from elastic.serve.options import DEFAULT_RANKS, DEFAULTS, ServeOptions
from elastic.serve.predecessor import Predecessor
from elastic.serve.role_process import revoke_leases
from membership.base.errors import ConfigError, PlanRefused, StoreError
from membership.base.timing import LEASE_GRACE_S
from membership.planning.cluster_facts import scale_refusal
from membership.store import codec
from membership.store.interface import Compare, Delete, KeyValue, Put, Store
from membership.store.keys import Keys
from membership.store.records import ClusterConfig, Desired

POLL_S = 0.1


def write_config(
    store: Store,
    config: ClusterConfig,
    options: ServeOptions,
    say: Callable[[str], None],
    predecessor: Predecessor | None = None,
) -> tuple[ClusterConfig, int]:
    """Store the config and the size; return both as they are now. `say` tells the user what is awaited or kept."""
    keys = Keys(config.cluster)
    before = store.get(keys.config)
    known = codec.decode(before.value, ClusterConfig) if before else None
    if options.etcd and known is not None:
        if predecessor is not None and predecessor.served(config.cluster, options.etcd):
            for key in predecessor.fence(store, (keys.leader, keys.engine)):
                say(f"{key} was held by the server that was killed here: taken over")
        require_unserved(store, keys, known.lease_ttl_s, say)
    same_model = known is not None and _shape(known) == _shape(config)
    desired = Desired(ranks=options.ranks or DEFAULT_RANKS)
    as_asked = known is not None and options.ranks in (None, known.ranks_asked)
    if same_model and as_asked and (found := store.get(keys.desired)) is not None:
        desired = _kept(codec.decode(found.value, Desired))
        config = _for_size(config, desired.ranks, limited=options.max_ranks is not None)
        if desired != Desired(ranks=options.ranks or 0):
            how = "elastic scale" if options.ranks else "--ranks"
            say(f"{desired.ranks} ranks, as the cluster was left ({how} sets another size)")
    revoke_leases(store, keys.prefix)
    puts = [Put(keys.config, codec.encode(config)), Put(keys.desired, codec.encode(desired))]
    wipe = [
        Delete(keys.next),
        Delete(keys.checkpoint),
        *(Delete(f"{keys.prefix}{k}/", prefix=True) for k in ("assign", "exits", "ranks", "ops")),
    ]
    if known is not None and not same_model:
        wipe.append(Delete(keys.view))
    outcome = store.txn([Compare(keys.config, "mod", "=", before.mod_revision if before else 0)], [*wipe, *puts])
    if not outcome.succeeded:
        raise StoreError("this cluster's config was written by another process at the same time", hint="try again")
    return config, desired.ranks


def require_unserved(store: Store, keys: Keys, lease_ttl_s: float, say: Callable[[str], None]) -> None:
    """Wait until no controller and no engine holds office. ConfigError: one does for longer than a lease lasts.

    So it is renewed, by a process that lives.
    """
    patience_s = lease_ttl_s + LEASE_GRACE_S
    deadline = time.monotonic() + patience_s
    announced, pause = False, threading.Event()
    while held := [kv for key in (keys.leader, keys.engine) if (kv := store.get(key)) is not None]:
        if not announced:
            say(f"cluster {keys.cluster!r} was served until now: up to {patience_s:g} s until its leases run out")
            announced = True
        if time.monotonic() > deadline:
            raise ConfigError(
                f"cluster {keys.cluster!r} is being served by another process on this etcd: {_names(held)} is renewed",
                hint="stop it, or choose another name with --cluster",
            )
        pause.wait(POLL_S)


def _names(held: list[KeyValue]) -> str:
    return " and ".join(kv.key for kv in held)


def _kept(last: Desired) -> Desired:
    """The size and the drained slots. Which slots and hosts make up the size is decided anew."""
    return msgspec.structs.replace(last, operation="", slots=(), nodes=())


def _for_size(config: ClusterConfig, ranks: int, *, limited: bool) -> ClusterConfig:
    if not limited:
        config = msgspec.structs.replace(config, max_ranks=max(ranks, DEFAULTS["max_ranks"]))
    if refused := scale_refusal(config, ranks):
        raise PlanRefused(f"the size at which the cluster was left: {refused}", hint="give another --ranks")
    return config


def _shape(config: ClusterConfig) -> tuple[int, int]:
    return config.moe_layers, config.experts

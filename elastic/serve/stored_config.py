"""What `elastic serve` writes into the store before it starts a role: the cluster's config and size.

A cluster that served the same model before continues from its last epoch, at the size that it had, unless `--ranks` is
another than at its last start: a pod has the same flags at each start. While another process serves the cluster,
nothing is written. One that was killed cannot say that it is gone: its leases run out, or are revoked if it was here.
A cluster that lives on other hosts is joined as it is. So is one that may: its ranks there were not stopped, and etcd
does not see them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass

import msgspec

from elastic.serve.gpu_memory import FLAG
from elastic.serve.join_secret import ENV, FILE
from elastic.serve.options import DEFAULT_RANKS, DEFAULTS, InitOptions, ServeOptions, options_of
from elastic.serve.predecessor import Predecessor
from elastic.serve.role_process import nodes_of, revoke_leases
from membership.base.errors import ConfigError, PlanRefused, StoreError
from membership.base.timing import LEASE_GRACE_S
from membership.planning.cluster_facts import scale_refusal
from membership.store import codec
from membership.store.interface import Compare, Delete, KeyValue, Put, Store
from membership.store.keys import Keys
from membership.store.records import Assignment, ClusterConfig, Desired

POLL_S = 0.1
ANEW = "if no process of it lives on any host, run `elastic init --anew` first"
OF_MODEL = ("moe_layers", "experts", "expert_bytes", "vocab_size", "eos_token_ids", "files")
OF_JOIN_SECRET = ("join_key", "join_generation", "join_keys_before", "join_grace", "join_since")
NOT_FLAGS = {
    **dict.fromkeys(OF_MODEL, "model"),
    **dict.fromkeys(OF_JOIN_SECRET, "join secret"),
    "served_model_aliases": "--served-model-name",
}


def write_config(
    store: Store,
    config: ClusterConfig,
    options: ServeOptions | InitOptions,
    say: Callable[[str], None],
    predecessor: Predecessor | None = None,
    node: str = "",
    join_keys: tuple[str, ...] = (),
) -> tuple[ClusterConfig, int]:
    """Store the config and the size; return both as they are now. `say` tells the user what is awaited or kept.

    `node`: ours; "": whatever may live elsewhere, the cluster begins anew. `join_keys`: of all join secrets we have.
    """
    keys = Keys(config.cluster)
    before = store.get(keys.config)
    known = codec.decode(before.value, ClusterConfig) if before else None
    config = with_known_secret(config, known, join_keys)
    if options.etcd and known is not None:
        if predecessor is not None and predecessor.served(config.cluster, options.etcd):
            for key in predecessor.fence(store, (keys.leader, keys.engine)):
                say(f"{key} was held by the server that was killed here: taken over")
        hosts = _elsewhere(store, keys, node)
        if node and config.join_key and (hosts.living or hosts.unseen):
            return _joined(store, keys, config, options, known, hosts, say)
        if node and known.join_key and (hosts.living or hosts.unseen):
            where = f"lives on {_named(hosts.living)}" if hosts.living else _unseen(hosts)
            raise ConfigError(
                f"cluster {keys.cluster!r} {where} and spans hosts",
                hint="to join it, give --advertise and its join secret; else choose another name with --cluster"
                + ("" if hosts.living else f"; or, {ANEW}"),
            )
        require_unserved(store, keys, known.lease_ttl_s, say)
    _require_unretired(config)
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


def with_known_secret(config: ClusterConfig, known: ClusterConfig | None, join_keys: Container[str]) -> ClusterConfig:
    """The cluster may use any of the join secrets that we have: which one it is `elastic keys rotate` says.

    If we lack it, ours replaces it: which ones were used stays known.
    """
    if known is None:
        return config
    if known.join_key == config.join_key or known.join_key in join_keys:
        return msgspec.structs.replace(config, **{name: getattr(known, name) for name in OF_JOIN_SECRET})
    replaced = (known.join_key,) if known.join_key and config.join_key else ()
    return msgspec.structs.replace(
        config,
        join_generation=known.join_generation + len(replaced),
        join_keys_before=(*known.join_keys_before, *replaced),
    )


def _require_unretired(config: ClusterConfig) -> None:
    """ConfigError if the cluster would go back to a join secret that was replaced, and may be known to others."""
    if config.join_key in config.join_keys_before:
        raise ConfigError(
            f"cluster {config.cluster!r} has replaced this join secret by another one: it is not gone back to",
            hint="bring the one that it used last, e.g. with --join-secret-file; if that is lost, a new one: "
            "elastic keys new",
        )


@dataclass(frozen=True)
class Elsewhere:
    """Other hosts of the cluster. `unseen`: ranks are assigned to them, and none of their processes holds a lease."""

    living: frozenset[str]
    unseen: frozenset[str]


def _elsewhere(store: Store, keys: Keys, node: str) -> Elsewhere:
    """An agent that stops takes its assignment along, so one that is left is of a host that died, or is cut off."""
    _, found = store.range(keys.assignments)
    assigned = [codec.decode(each.value, Assignment) for each in found]
    living = nodes_of(store, keys.prefix) - {node}
    unseen = {each.node for each in assigned if each.ranks} - {node} - living
    return Elsewhere(frozenset(living), frozenset(unseen))


def _unseen(hosts: Elsewhere) -> str:
    return f"has ranks on {_named(hosts.unseen)}, which may be cut off from this etcd"


def _named(hosts: Iterable[str]) -> str:
    names = sorted(hosts)
    return f"host{'s' * (len(names) > 1)} {', '.join(names)}"


def require_no_secret(store: Store, keys: Keys, node: str) -> None:
    """ConfigError if the cluster has a join secret that other hosts have: ours must be the same."""
    found = store.get(keys.config)
    if found is None or not codec.decode(found.value, ClusterConfig).join_key:
        return
    hosts = _elsewhere(store, keys, node)
    if where := hosts.living | hosts.unseen:
        raise ConfigError(
            f"cluster {keys.cluster!r} is on {_named(where)}, and this cluster has a join secret",
            hint=f"bring it with --join-secret-file or {ENV}; `elastic serve` there has it in STATE-DIR/{FILE}"
            + ("" if hosts.living else f"; {ANEW}"),
        )


def _joined(
    store: Store,
    keys: Keys,
    config: ClusterConfig,
    options: ServeOptions | InitOptions,
    known: ClusterConfig,
    hosts: Elsewhere,
    say: Callable[[str], None],
) -> tuple[ClusterConfig, int]:
    """What the cluster has, unchanged. ConfigError: it was begun with other settings than ours."""
    if hosts.living:
        where, otherwise = f"lives on {_named(hosts.living)}", "stop the cluster on all hosts first"
    else:
        where, otherwise = _unseen(hosts), ANEW
    if other := differing(config, options, known):
        raise ConfigError(
            f"cluster {keys.cluster!r} {where}, and has another {in_words(other)}",
            hint=f"start this host with the same flags, model and join secret, or {otherwise}",
        )
    found = store.get(keys.desired)
    ranks = codec.decode(found.value, Desired).ranks if found is not None else options.ranks or DEFAULT_RANKS
    say(f"cluster {keys.cluster!r} {where}: this host joins it; {ranks} ranks are wanted, as before")
    if options.kv_cache_memory and config.kv_blocks != known.kv_blocks:
        say(
            f"its KV caches have {known.kv_blocks} blocks on all hosts;"
            f" {FLAG} {options.kv_cache_memory:g} would be {config.kv_blocks} here"
        )
    return msgspec.structs.replace(known, model=config.model), ranks


def in_words(settings: Iterable[str]) -> str:
    """Settings of a config, as users know them: by their flags, or by what they come from."""
    flags = {stated.field: stated.flags[0] for stated in options_of(ServeOptions)}
    return ", ".join(dict.fromkeys(NOT_FLAGS.get(name) or flags.get(name, name) for name in settings))


def differing(config: ClusterConfig, options: ServeOptions | InitOptions, known: ClusterConfig) -> list[str]:
    """Names of the settings that the known config has otherwise, save those that hosts or operations may change."""
    free = {"model", "ranks_asked", "gpu_exchange_reason"} | (set() if options.max_ranks else {"max_ranks"})
    free |= {"gpu_exchange", "max_batched_tokens"} if options.gpu_exchange is None else set()  # by each host's GPUs
    free |= {"kv_blocks"} if options.kv_cache_memory else set()
    names = [each.name for each in msgspec.structs.fields(ClusterConfig) if each.name not in free]
    return [name for name in names if getattr(config, name) != getattr(known, name)]


def require_unserved(store: Store, keys: Keys, lease_ttl_s: float, say: Callable[[str], None]) -> None:
    """Wait until no controller and no engine holds office. ConfigError: one does for longer than its lease lasts, which
    is longer than `lease_ttl_s` if the store was slow. So it is renewed, by a process that lives.
    """
    began, patience_s, pause = time.monotonic(), 0.0, threading.Event()
    while held := [kv for key in (keys.leader, keys.engine) if (kv := store.get(key)) is not None]:
        if not patience_s:
            patience_s = max(lease_ttl_s, *(store.lifetime_s(kv.lease) for kv in held)) + LEASE_GRACE_S
            say(f"cluster {keys.cluster!r} was served until now: up to {patience_s:g} s until its leases run out")
        if time.monotonic() > began + patience_s:
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

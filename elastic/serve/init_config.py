"""`elastic init`: what roles need before they begin, written once. They may be started before it or after it, in any
order; to run it again changes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial

from msgspec.structs import replace

from elastic.serve.cluster_config import cluster_config
from elastic.serve.join_secret import secrets_of
from elastic.serve.options import DEFAULT_RANKS, InitOptions
from elastic.serve.role_main import connected, reach_store
from elastic.serve.role_process import nodes_of
from elastic.serve.state_dir import ClusterAddress
from elastic.serve.stored_config import differing, in_words, with_known_secret, write_config
from membership.base.errors import ConfigError
from membership.store import codec
from membership.store.interface import Compare, Put, Store
from membership.store.keys import Keys
from membership.store.records import ClusterConfig, Desired
from workers.queue.network import join_key, join_keys


def run_init(options: InitOptions, say: Callable[[str], None]) -> None:
    """Write the cluster's config and size into its etcd, unless they are there."""
    if not options.etcd:
        hint = "start an etcd that all hosts reach, and name it with --etcd"
        raise ConfigError("`elastic init` needs --etcd: roles meet there", hint=hint)
    config = cluster_config(options)
    secrets = secrets_of(options.join_secret_file, config.cluster)
    config = replace(config, join_key=join_key(secrets))
    address = ClusterAddress(cluster=config.cluster, etcd=options.etcd, credentials=options.credentials())
    with closing(reach_store(partial(connected, address), threading.Event(), options.etcd_wait_s)) as store:
        init_config(store, config, options, say, join_keys(secrets))


def init_config(
    store: Store,
    config: ClusterConfig,
    options: InitOptions,
    say: Callable[[str], None],
    ours: tuple[str, ...] = (),
) -> None:
    """The same in this store. ConfigError: processes live there that were begun with other settings.

    `ours`: the join keys of all secrets that we have.
    """
    keys, ranks = Keys(config.cluster), options.ranks or DEFAULT_RANKS
    puts = [Put(keys.config, codec.encode(config)), Put(keys.desired, codec.encode(Desired(ranks=ranks)))]
    if store.txn([Compare(keys.config, "mod", "=", 0)], puts).succeeded:
        by_agents = config.follow_agents if options.ranks is None else 0
        size = f"{by_agents} ranks for each agent" if by_agents else f"{ranks} ranks"
        say(f"cluster {config.cluster!r} may begin, with {size}")
        return
    found = store.get(keys.config)
    known = codec.decode(found.value, ClusterConfig) if found is not None else None
    other = differing(with_known_secret(config, known, ours), options, known) if known is not None else []
    if not other and not options.anew:
        say(f"cluster {config.cluster!r} is there already: nothing is changed")
    elif hosts := nodes_of(store, keys.prefix):
        with_other = f" with another {in_words(other)}" if other else ""
        raise ConfigError(
            f"cluster {config.cluster!r} lives on {', '.join(sorted(hosts))}{with_other}",
            hint="stop its roles on all hosts first, or give the settings that it has",
        )
    else:
        write_config(store, config, options, say, join_keys=ours)
        say(f"cluster {config.cluster!r} {f'has another {in_words(other)} now' if other else 'begins anew'}")

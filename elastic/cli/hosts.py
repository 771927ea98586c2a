"""What `elastic doctor --cluster` says: does this host reach the other hosts, and is it like them? Read-only."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec

from elastic.cli.clocks import clock_findings, offsets
from elastic.cli.connection import Connection, require_embedded
from elastic.cli.differences import Here, differences, others, reference
from elastic.cli.reach import AT_ONCE, by_node, listeners, not_listening, reach
from elastic.serve.model_check import Finding
from elastic.serve.options import StoreOptions
from elastic.serve.state_dir import ClusterAddress
from membership.base.errors import ElasticError
from membership.planning.identity import HINT_COMPUTES, KERNELS, THREADS
from membership.store.endpoints import require_listener
from membership.store.keys import Keys, state_from
from membership.store.records import ClusterConfig, ClusterState
from workers.model.code import code_version
from workers.model.content import small_files
from workers.queue.handle import this_host


def examine_hosts(options: StoreOptions, model: Path | None) -> Iterator[Finding]:
    """Findings about the other hosts, and about this one beside them. `model`: this host's copy; nothing raises."""
    here = this_host()
    try:
        address = _address(options)
        require_listener(address.etcd)
        with closing(address.connect()) as store:
            keys = Keys(address.cluster)
            revision, items = store.range(keys.prefix)
            state = state_from(items, revision)
            nodes = {agent.node for agent in others(state, here)}
            clocks = offsets(store, keys, nodes) if nodes else {}
    except ElasticError as error:
        yield Finding("cluster", "fail", str(error), error.hint)
        return
    if state.config is None:
        yield Finding(
            "cluster", "fail", f"there is no cluster {address.cluster!r} in this etcd", "elastic init, or serve"
        )
        return
    yield from _reachable(state, here)
    yield from clock_findings(nodes, clocks)
    yield from _compared(state, state.config, here, model)


def _address(options: StoreOptions) -> ClusterAddress:
    if options.etcd:
        return ClusterAddress(cluster=options.cluster, etcd=options.etcd, credentials=options.credentials())
    state = Connection(cluster=options.cluster, state_dir=options.state_dir).state()
    address = state.address()
    require_embedded(address, state)
    return msgspec.structs.replace(address, credentials=options.credentials(address.credentials))


def _reachable(state: ClusterState, here: str) -> Iterator[Finding]:
    found = list(listeners(state, here))
    if not found:
        yield Finding("hosts", "ok", "no process of another host listens for this one")
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="reach") as pool:
        outcomes = dict(zip(found, pool.map(reach, (each.endpoint for each in found)), strict=True))
    yield from by_node(outcomes)
    yield from not_listening(state, here)


def _compared(state: ClusterState, config: ClusterConfig, here: str, model: Path | None) -> Iterator[Finding]:
    path, kernels = str(model or config.model), ""
    try:
        files = small_files(path)
    except ElasticError as error:
        yield Finding("checkpoint", "fail", str(error), error.hint)
        return
    try:
        if _measures(state, here):
            kernels = _fingerprint(config, reference(state, "dtype"), reference(state, THREADS))
    except ElasticError as error:
        yield Finding("kernels", "warn", f"they could not be compared: {error}", error.hint or HINT_COMPUTES)
    yield from differences(state, Here(here, code_version(), path, files, kernels))


def _measures(state: ClusterState, here: str) -> bool:
    """Whether there are kernels to compare with, and no rank of this host that has said how it rounds."""
    own = {agent.node for agent in state.agents.values() if agent.host == here}
    said = any(record.node in own and record.fingerprint for record in state.ranks.values())
    return bool(reference(state, KERNELS)) and not said


def _fingerprint(config: ClusterConfig, dtype: str, threads: str) -> str:
    """As a rank of this host would have it."""
    import torch

    from workers.model.devices import open_backend

    torch.set_num_threads(int(threads or 1))
    return open_backend(config.device).fingerprint(getattr(torch, dtype))

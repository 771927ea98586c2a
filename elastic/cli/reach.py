"""Which listeners of a cluster's other hosts this host reaches: for `elastic doctor --cluster`. Only connects."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from elastic.serve.model_check import Finding
from elastic.serve.options import StoreOptions
from elastic.serve.state_dir import ClusterAddress, StateDir
from membership.base.errors import ConfigError, ElasticError, QueueError
from membership.store.endpoints import require_listener
from membership.store.keys import Keys, state_from
from membership.store.records import ClusterState, RankRecord
from workers.protocol.exchange_handle import far_endpoint
from workers.queue.handle import Handle, this_host

REACH_S = 2.0
AT_ONCE = 32
HINT = "let all TCP pass between the hosts of a cluster (docs/HOSTS.md); a process that has just ended refuses, too"


class Listener(NamedTuple):
    """Something that another host listens with."""

    node: str
    what: str
    endpoint: str  # tcp://HOST:PORT


def examine_hosts(options: StoreOptions) -> Iterator[Finding]:
    """One finding per other host; nothing raises."""
    try:
        address = _address(options)
        require_listener(address.etcd)
        with closing(address.connect()) as store:
            revision, items = store.range(Keys(address.cluster).prefix)
        state = state_from(items, revision)
    except ElasticError as error:
        yield Finding("cluster", "fail", str(error), error.hint)
        return
    if state.config is None:
        yield Finding(
            "cluster", "fail", f"there is no cluster {address.cluster!r} in this etcd", "elastic init, or serve"
        )
        return
    found = list(listeners(state, this_host()))
    if not found:
        yield Finding("hosts", "ok", "no process of another host listens for this one")
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="reach") as pool:
        outcomes = dict(zip(found, pool.map(reach, (each.endpoint for each in found)), strict=True))
    yield from by_node(outcomes)


def _address(options: StoreOptions) -> ClusterAddress:
    if options.etcd:
        return ClusterAddress(cluster=options.cluster, etcd=options.etcd, credentials=options.credentials())
    state = StateDir(options.state_dir) if options.state_dir else StateDir.last_served()
    if (address := state.address()).cluster != options.cluster:
        raise ConfigError(
            f"cluster {options.cluster!r} is not the one in {state.path}", hint="name its etcd with --etcd"
        )
    return msgspec.structs.replace(address, credentials=options.credentials(address.credentials))


def listeners(state: ClusterState, here: str) -> Iterator[Listener]:
    """What other hosts listen with, by the records. `here`: our host, which is left out."""
    engine = state.engine
    if engine is not None and engine.host not in ("", here):
        steps = _queue(engine.broadcast_handle)
        yield from (
            Listener(engine.node, what, endpoint)
            for what, endpoint in (("the engine, for gateways", engine.remote), ("the engine's steps", steps.remote))
            if endpoint
        )
    for record in state.ranks.values():
        for what, host, endpoint in _of_rank(record):
            if host != here and endpoint:
                yield Listener(record.node, f"rank {record.rank}'s {what}", endpoint)


def _of_rank(record: RankRecord) -> Iterator[tuple[str, str, str]]:
    if record.response_handle:
        answers = _queue(record.response_handle)
        yield "answers", answers.host, answers.remote
    if record.exchange_handle:
        yield "rows", *far_endpoint(record.exchange_handle)


def _queue(handle: bytes) -> Handle:
    try:
        return Handle.decode(handle)
    except QueueError:
        return Handle("", "", "", "")


def reach(endpoint: str, clock: Callable[[], float] = time.monotonic) -> float | str:
    """How many seconds a connection takes to be made; or why there is none."""
    where, begun = urlsplit(endpoint), clock()
    try:
        with socket.create_connection((where.hostname or "", where.port or 0), timeout=REACH_S):
            return clock() - begun
    except TimeoutError:
        return f"no answer in {REACH_S:g} s"
    except OSError as error:
        return "refused" if error.errno == errno.ECONNREFUSED else str(error.strerror or error)


def by_node(outcomes: dict[Listener, float | str]) -> Iterator[Finding]:
    """A finding per host."""
    for node in sorted({each.node for each in outcomes}):
        there = {each: outcome for each, outcome in outcomes.items() if each.node == node}
        failed = {each: outcome for each, outcome in there.items() if isinstance(outcome, str)}
        took = [outcome for outcome in there.values() if not isinstance(outcome, str)]
        if failed:
            named = "; ".join(f"{each.what} at {each.endpoint}: {why}" for each, why in failed.items())
            message = f"{len(failed)} of {len(there)} listeners are not reached from here: {named}"
            yield Finding(f"host {node}", "fail", message, HINT)
        else:
            slowest = f"the slowest in {max(took) * 1e3:.1f} ms"
            yield Finding(f"host {node}", "ok", f"all {len(there)} listeners are reached from here, {slowest}")

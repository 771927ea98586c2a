"""Which listeners of a cluster's other hosts this host reaches, and with packets of which size: for `elastic doctor
--cluster`. Only connects.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import urlsplit

from elastic.serve.model_check import Finding
from membership.base.errors import QueueError
from membership.store.records import ClusterState, RankRecord
from workers.protocol.exchange_handle import far_endpoint
from workers.queue.handle import Handle

REACH_S = 2.0
AT_ONCE = 32
PACKET_SLACK = 16  # bytes that a connection keeps for itself in each packet, at most
LARGEST = 16384  # bytes that are compared: TCP sends no packet beyond half a window, as within one host
HINT_PACKETS = "give both hosts' interfaces the same MTU; one on the way that is smaller still is not seen from here"
_IP_MTU, _IPV6_MTU = 14, 24  # of Linux; Python has no names for them
HINT_AGENT = (
    "its log says why: deaths_not_reported, weights_not_sent; without, a death there is known by its record, later, "
    "and weights are read from the checkpoint"
)
HINT = "let all TCP pass between the hosts of a cluster (docs/HOSTS.md); a process that has just ended refuses, too"


class Listener(NamedTuple):
    """Something that another host listens with."""

    node: str
    what: str
    endpoint: str  # tcp://HOST:PORT


class Reached(NamedTuple):
    """A connection to it, as this host's kernel sees it."""

    took_s: float  # until it was made
    mtu: int  # of the way there, as far as it is known
    packet: int  # the largest that both ends take, without what the connection keeps for itself


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
    for agent in state.agents.values():
        if agent.host not in ("", here):
            ports = (("weights", agent.weights_at), ("notices of deaths", _queue(agent.notices).remote))
            yield from (Listener(agent.node, f"the agent's {what}", endpoint) for what, endpoint in ports if endpoint)
    for record in state.ranks.values():
        for what, host, endpoint in _of_rank(record):
            if host != here and endpoint:
                yield Listener(record.node, f"rank {record.rank}'s {what}", endpoint)


def not_listening(state: ClusterState, here: str) -> Iterator[Finding]:
    """Agents of other hosts that do not listen for all that they should: it works without, later or more slowly."""
    for node, agent in sorted(state.agents.items()):
        if agent.host not in ("", here):
            ports = (("notices of deaths", _queue(agent.notices).remote), ("requests for weights", agent.weights_at))
            if missing := [what for what, endpoint in ports if not endpoint]:
                message = f"its agent does not listen for {' or '.join(missing)}, or is of an older version"
                yield Finding(f"host {node}", "warn", message, HINT_AGENT)


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


def reach(endpoint: str, clock: Callable[[], float] = time.monotonic) -> Reached | str:
    """Connect to it; or say why that cannot be done."""
    where, begun = urlsplit(endpoint), clock()
    try:
        with socket.create_connection((where.hostname or "", where.port or 0), timeout=REACH_S) as made:
            took_s = clock() - begun
            six = made.family == socket.AF_INET6
            option = (socket.IPPROTO_IPV6, _IPV6_MTU) if six else (socket.IPPROTO_IP, _IP_MTU)
            headers = 60 if six else 40
            segment = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
            return Reached(took_s, made.getsockopt(*option), segment + headers)
    except TimeoutError:
        return f"no answer in {REACH_S:g} s"
    except OSError as error:
        return "refused" if error.errno == errno.ECONNREFUSED else str(error.strerror or error)


def by_node(outcomes: dict[Listener, Reached | str]) -> Iterator[Finding]:
    """What each host is reached with, and where packets must be smaller than this host's own."""
    for node in sorted({each.node for each in outcomes}):
        there = {each: outcome for each, outcome in outcomes.items() if each.node == node}
        failed = {each: outcome for each, outcome in there.items() if isinstance(outcome, str)}
        reached = [outcome for outcome in there.values() if not isinstance(outcome, str)]
        if failed:
            named = "; ".join(f"{each.what} at {each.endpoint}: {why}" for each, why in failed.items())
            message = f"{len(failed)} of {len(there)} listeners are not reached from here: {named}"
            yield Finding(f"host {node}", "fail", message, HINT)
        else:
            slowest, mtu = max(each.took_s for each in reached), min(each.mtu for each in reached)
            message = (
                f"all {len(there)} listeners are reached from here, the slowest in {slowest * 1e3:.1f} ms, MTU {mtu}"
            )
            yield Finding(f"host {node}", "ok", message)
        narrow = [each for each in reached if min(each.mtu, LARGEST) - each.packet > PACKET_SLACK]
        if narrow:
            least = min(narrow, key=lambda each: each.packet)
            message = f"it takes packets of {least.packet} bytes at most, where this host sends {least.mtu}"
            yield Finding(f"host {node}", "warn", message, HINT_PACKETS)

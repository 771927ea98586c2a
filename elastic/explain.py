"""`elastic explain`: causes of the state of the cluster, a rank or an operation; what happens next; what to do.

Pure: everything comes from the records that the decisions themselves are made from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from operator import attrgetter

import msgspec

from elastic.status import ClusterStatus, RankStatus, cluster_status
from membership.base.endings import MEMORY_HINT, OUT_OF_MEMORY
from membership.base.enums import OperationKind
from membership.base.errors import ConfigError
from membership.base.rank_id import RankId
from membership.operations.change import describe_change
from membership.planning.cluster_facts import ClusterFacts
from membership.planning.identity import HINT, advice
from membership.planning.node_selection import homeless
from membership.planning.planner import awaited
from membership.store.phases import before_commit
from membership.store.records import ClusterState, Operation, Phase, RankExit, RankState

ENDS = (Phase.DONE, Phase.ABORTED)


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """`subject`: "cluster", "rank N" or "operation ID". `because`: facts; `next`: what follows; `do`: what to do."""

    subject: str
    state: str
    because: tuple[str, ...] = ()
    next: str = ""
    do: str = ""


def explain(state: ClusterState, now: float, subject: str | None = None, store: str = "") -> tuple[Explanation, ...]:
    """Of the cluster and each rank that does not serve, or of one rank (a number) or operation (its id).

    ConfigError: there is no such rank or operation.
    """
    status = cluster_status(state, now, store)
    ranks = {each.rank: each for each in status.ranks}
    if subject is not None and subject in state.operations:
        return (explain_operation(state, now, state.operations[subject]),)
    if subject is not None:
        rank = int(subject) if re.fullmatch("[0-9]{1,9}", subject) else -1  # Python reads no number of 5000 digits
        if rank in status.drained and rank not in ranks:
            return (_drained(state, now, rank),)
        if rank not in ranks:
            known = ", ".join(map(str, ranks)) or "none"
            raise ConfigError(
                f"there is no rank or operation {subject}", hint=f"the ranks are: {known}; elastic ops ls"
            )
        return (_rank(state, now, ranks[rank]),)
    ailing = [each for each in status.ranks if each.state is not RankState.SERVING]
    return (_cluster(state, now, status, ailing), *(_rank(state, now, each) for each in ailing))


def _cluster(state: ClusterState, now: float, status: ClusterStatus, ailing: list[RankStatus]) -> Explanation:
    because = tuple(_cluster_facts(state, status, len(status.ranks) - len(ailing)))
    follows, do = _cluster_outlook(state, status)
    facts = ClusterFacts(state, now)
    because, do = (*because, *_short_of_hosts(facts)), do or _hosts_wanted(facts)
    return Explanation(subject="cluster", state=status.state, because=because, next=follows, do=do)


def _cluster_facts(state: ClusterState, status: ClusterStatus, serving: int) -> Iterator[str]:
    if status.store:
        yield status.store
    yield f"{serving} of {status.desired} wanted ranks serve, in epoch {status.epoch}"
    if status.coverage.uncovered:
        yield f"{status.coverage.uncovered} experts have no live replica: requests that need them wait"
    elif serving:
        yield f"every expert has at least {status.coverage.min_live_replicas} live replicas"
    if status.spares.wanted:
        yield f"{status.spares.ready} of {status.spares.wanted} spares wait for a rank's death"
    if state.engine is None:
        yield "no engine is active: requests wait"
    if not state.agents:
        yield "no agent is registered: no rank can be started"
    if status.drained:
        yield f"drained, and counted no more: rank {', '.join(map(str, status.drained))}"
    if status.pause is not None:
        yield status.pause.words
    yield from (f"rank {slot} died for want of memory" for slot in _starved(state, status))
    yield from (f"node {node.node}: {node.trouble}" for node in status.nodes if node.trouble)
    failed = (op for op in state.operations.values() if not op.active and op.error)
    if last := max(failed, key=attrgetter("finished"), default=None):
        yield f"operation {last.id} ({describe_change(last)}) was rolled back: {last.error}"


def _cluster_outlook(state: ClusterState, status: ClusterStatus) -> tuple[str, str]:
    """What happens next by itself, and what to do."""
    follows, do = "", ""
    if status.operation is not None:
        follows = f"{status.operation.what} goes on ({status.operation.phase}); elastic explain {status.operation.id}"
    elif state.engine is None:
        follows = "the standby takes over, or the supervisor starts one"
    elif status.coverage.uncovered:
        follows = "live ranks load the lost experts; requests that waited too long get a 503"
    if status.store:
        do = "serving goes on, membership is frozen; restore the store or start the cluster anew"
    elif not state.agents:
        do = "start an agent: elastic agent"
    elif any(node.trouble for node in status.nodes):
        do = HINT
    elif refused := [last.reason for last in state.exits.values() if last.refused]:
        do = advice(refused[0])
    elif _starved(state, status):
        do = MEMORY_HINT
    elif status.pause is not None:
        do = "when the maintenance is over: elastic resume"
    return follows, do


def _too_few_agents(facts: ClusterFacts) -> bool:
    """Whether the first ranks wait for more hosts."""
    return not facts.view.epoch and 0 < len(facts.state.agents) < facts.config.min_agents


def _short_of_hosts(facts: ClusterFacts) -> Iterator[str]:
    """Why ranks that are wanted are on no host."""
    if facts.state.config is None:
        return
    if _too_few_agents(facts):
        here = ", ".join(sorted(facts.state.agents))
        needed = facts.config.min_agents
        yield f"{len(facts.state.agents)} of {needed} agents are there ({here}): the first ranks wait (--min-agents)"
    elif slots := homeless(facts):
        yield f"no host has room for rank {', '.join(map(str, slots))}: {_fullness(facts)}"


def _fullness(facts: ClusterFacts) -> str:
    """How many ranks each host has, of those that it may have."""
    running = Counter(node for node, _ in facts.assigned.values())
    agents = sorted(facts.state.agents.items())
    return ", ".join(
        f"{node} {'is leaving' if agent.leaving else f'has {running[node]} of {agent.capacity}'}"
        for node, agent in agents
    )


def _hosts_wanted(facts: ClusterFacts) -> str:
    if facts.state.config is None:
        return ""
    if _too_few_agents(facts):
        return "start `elastic agent` on more hosts"
    if homeless(facts):
        return "start `elastic agent` on another host, or one of these with a larger --capacity; else: elastic scale N"
    return ""


def _starved(state: ClusterState, status: ClusterStatus) -> list[int]:
    """Slots whose last rank died for want of memory, and in which none serves since."""
    serving = {rank.rank for rank in status.ranks if rank.state is RankState.SERVING}
    return [slot for slot, last in state.exits.items() if OUT_OF_MEMORY in last.reason and slot not in serving]


def _rank(state: ClusterState, now: float, rank: RankStatus) -> Explanation:
    last = state.exits.get(rank.rank)
    because = [*_facts(state, now, rank), *(_history(last, now) if last is not None else ())]
    follows, do = _outlook(rank, last, now)
    facts = ClusterFacts(state, now)
    if rank.state is RankState.DEAD and rank.rank in homeless(facts):
        follows, do = f"it is started once a host has room: {_fullness(facts)}", do or _hosts_wanted(facts)
    return Explanation(subject=f"rank {rank.rank}", state=rank.state.value, because=tuple(because), next=follows, do=do)


def explain_operation(state: ClusterState, now: float, operation: Operation) -> Explanation:
    """Its purpose, the duration of each phase, what it waits for or how it ended."""
    asked = ago(now - operation.started)
    because = [f"{describe_change(operation)}, from {operation.previous} ranks, asked for {asked} ago"]
    times = sorted(operation.phase_times.items(), key=lambda item: item[1])
    spans = zip(times, [*times[1:], ("", operation.finished or now)], strict=True)
    because += [f"{phase}: {ago(end - start)}" for (phase, start), (_, end) in spans if phase not in ENDS]
    if operation.bytes_moved:
        because.append(f"{operation.bytes_moved / 1e6:.1f} MB of weights to load")
    if operation.error:
        because.append(f"rolled back: {operation.error}")
    follows, do = "", ""
    if operation.phase is Phase.ABORTED:
        follows = "nothing that served has changed"
        do = "ask again once the reason is gone"
    elif operation.phase is Phase.DONE:
        because.append(f"epoch {operation.epoch}; tokens waited {operation.pause_ms:.1f} ms at its commit")
    elif before_commit(operation):
        facts = ClusterFacts(state, now)
        because += [f"waits for {awaited(facts)}", *_short_of_hosts(facts)]
        follows = f"rolled back in {ago(operation.deadline - now)} if it is not committed by then"
        do = f"to give it up: elastic ops cancel {operation.id}"
    else:
        follows = "it is committed; it is done once the departed ranks have ended"
    return Explanation(
        subject=f"operation {operation.id}", state=operation.phase.value, because=tuple(because), next=follows, do=do
    )


def _drained(state: ClusterState, now: float, rank: int) -> Explanation:
    by = [op for op in state.history if op.kind == OperationKind.DRAIN and rank in op.ranks and op.phase is Phase.DONE]
    because = [f"operation {by[-1].id} drained it {ago(now - by[-1].finished)} ago"] if by else []
    because.append("the slot is empty: it does not count, and no rank is started in it")
    do = f"to fill it again: elastic undrain {rank}"
    return Explanation(subject=f"rank {rank}", state="drained", because=tuple(because), do=do)


def _facts(state: ClusterState, now: float, rank: RankStatus) -> Iterator[str]:
    """What the records say now."""
    if rank.pid:
        yield f"incarnation {rank.incarnation} is process {rank.pid} on node {rank.node} with {rank.slots} experts"
    if rank.heartbeat_age_ms is not None and rank.pid:
        yield f"its agent saw its heartbeat {rank.heartbeat_age_ms:.0f} ms ago"
    newcomer = ClusterFacts(state, now).newcomers.get(rank.rank)
    if newcomer is not None and newcomer.trouble:
        yield newcomer.trouble
    record = state.ranks.get(RankId(rank.rank, rank.incarnation))
    if record is not None and record.prepare_error:
        yield f"it could not prepare the next view: {record.prepare_error}"
    if rank.state is RankState.MASKED:
        yield "the engine has taken it out of use; its agent has not reported an exit"


def _history(last: RankExit, now: float) -> Iterator[str]:
    """How the last incarnation ended."""
    yield (
        f"incarnation {last.incarnation} died {ago(now - last.at)} ago: {last.reason}; "
        f"{last.restarts} {'death' if last.restarts == 1 else 'deaths'} in this slot so far"
    )
    if last.forgiven:
        yield f"an operator ended its quarantine {ago(now - last.forgiven)} ago"


def _outlook(rank: RankStatus, last: RankExit | None, now: float) -> tuple[str, str]:
    """What happens next by itself, and what to do."""
    starved = last is not None and OUT_OF_MEMORY in last.reason
    if rank.state is RankState.QUARANTINED and last is not None and last.refused:
        do = f"{advice(last.reason)}; then: elastic unquarantine {rank.rank}"
        return "the slot stays empty; the others serve on", do
    if rank.state is RankState.QUARANTINED:
        cause = MEMORY_HINT if starved else "find the cause (elastic events, the agent's log)"
        return "the slot stays empty; the others serve on", f"{cause}; then: elastic unquarantine {rank.rank}"
    if rank.state is RankState.DEAD:
        wait_s = last.held_back_s(now) if last is not None else 0.0
        follows = f"a new incarnation in {wait_s:.1f} s (backoff)" if wait_s > 0 else "a new incarnation at once"
        return follows, MEMORY_HINT if starved else ""
    if rank.state is RankState.MASKED:
        return "its lease is revoked; once the loss is committed, a new incarnation follows", ""
    if rank.state is RankState.DRAINING:
        return "it ends when the operation has", ""
    if rank.state is RankState.SERVING:
        return "", ""
    return "it joins the next view once it is loaded and prepared", ""


def ago(seconds: float) -> str:
    """A duration in the unit that suits it."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def explained(found: tuple[Explanation, ...]) -> str:
    """The explanations as text."""
    lines: list[str] = []
    for each in found:
        lines.append(f"{each.subject}: {each.state}")
        lines += [f"  {fact}" for fact in each.because]
        lines += [f"  next: {each.next}"] if each.next else []
        lines += [f"  do: {each.do}"] if each.do else []
    return "\n".join(lines)

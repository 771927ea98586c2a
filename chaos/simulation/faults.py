"""The faults of a simulated cluster. Each returns a sentence about what it did, or "" if there was nothing to fault.

Each draws from its own generator: its choices never depend on whether another fault happened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from random import Random

from chaos.simulation.cluster import Cluster
from chaos.simulation.process import Process
from chaos.simulation.rank import RankProcess
from membership.base.errors import StoreError
from membership.base.failpoint_catalogue import EDGES

Action = Callable[[Cluster, Random], str]
NOTHING = ""
DURATIONS_S = (0.1, 0.4, 1.3, 1.3, 3.0)

FAULTS: dict[str, Action] = {}


def fault(function: Action) -> Action:
    """Register it. The function's name is its kind."""
    FAULTS[function.__name__.replace("_", "-")] = function
    return function


# --- ranks


def _any_rank(cluster: Cluster, random: Random, *, working: bool = False) -> RankProcess | None:
    """One that is alive and not stopped; with `working` one that computes."""
    ranks = sorted((r for r in cluster.ranks.values() if r.alive and not r.stopped), key=lambda r: r.key)
    if working:
        ranks = [rank for rank in ranks if rank.busy]
    return random.choice(ranks) if ranks else None


def _kill_rank(cluster: Cluster, random: Random, working: bool, where: str) -> str:
    rank = _any_rank(cluster, random, working=working)
    if rank is None:
        return NOTHING
    rank.die()
    return f"{rank.name} is killed{where}"


FAULTS["kill-rank"] = partial(_kill_rank, working=False, where="")
FAULTS["kill-in-step"] = partial(_kill_rank, working=True, where=" in its step")


@fault
def kill_two(cluster: Cluster, random: Random) -> str:
    """All holders of an expert, up to two."""
    view = cluster.store.state.view
    held = [rank for rank, layers in view.placement.items() if 0 in layers[0]] if view else []
    found = sorted((r for r in cluster.ranks.values() if r.key[0] in held), key=lambda r: r.key)[:2]
    for rank in found:
        rank.die()
    return f"{' and '.join(rank.name for rank in found)} are killed, all holders of an expert" if found else NOTHING


def _suspend(cluster: Cluster, random: Random, hang: str, how: str) -> str:
    rank = _any_rank(cluster, random)
    if rank is None:
        return NOTHING
    seconds = random.choice(DURATIONS_S)
    rank.stop(hang)
    cluster.clock.after(seconds, rank.resume)
    return f"{rank.name} {how} for {seconds:g} s"


@fault
def stop_rank(cluster: Cluster, random: Random) -> str:
    """SIGSTOP, and SIGCONT later. It wakes as a zombie if it was evicted meanwhile."""
    return _suspend(cluster, random, "", "is stopped")


@fault
def hang_rank(cluster: Cluster, random: Random) -> str:
    """Its main thread hangs in native code, with or without the interpreter's lock: heartbeats stop or go on."""
    return _suspend(cluster, random, random.choice(["native", "gil"]), "hangs")


@fault
def slow_rank(cluster: Cluster, random: Random) -> str:
    """Everything takes it ten times as long."""
    rank = _any_rank(cluster, random)
    if rank is None or rank.slow > 1.0:
        return NOTHING
    rank.slow = 10.0
    cluster.clock.after(4.0, setattr, rank, "slow", 1.0)
    return f"{rank.name} is ten times slower for 4 s"


@fault
def unable(cluster: Cluster, random: Random) -> str:
    """For a while the ranks of one slot cannot prepare any view."""
    slot = random.randrange(6)
    if slot in cluster.bad:
        return NOTHING
    cluster.bad.add(slot)
    cluster.clock.after(random.choice(DURATIONS_S), cluster.bad.discard, slot)
    return f"ranks in slot {slot} cannot prepare for a while"


# --- roles: one process is killed (and started again later), stopped for a while, or cut off from the store


def _agents(cluster: Cluster, random: Random) -> Sequence[Process]:
    """An agent takes its ranks along when it is killed; while it is stopped its leases run out and its ranks go on."""
    return list(cluster.hosts.values())


def _engine(cluster: Cluster, random: Random) -> Sequence[Process]:
    """The one in office. Meanwhile another one may take office."""
    return [cluster.engine or random.choice(cluster.engines)]


def _controller(cluster: Cluster, random: Random) -> Sequence[Process]:
    """The leader, perhaps between its decision and its transaction."""
    return [cluster.leader or random.choice(cluster.controllers)]


def _gateway(cluster: Cluster, random: Random) -> Sequence[Process]:
    """Its streams end when it is killed."""
    return [cluster.gateway]


Choose = Callable[[Cluster, Random], Sequence[Process]]


def _kill(cluster: Cluster, random: Random, among: Choose) -> str:
    process = random.choice(among(cluster, random))
    return f"{process.name} is killed" if cluster.kill(process) else NOTHING


def _stop(cluster: Cluster, random: Random, among: Choose) -> str:
    process, seconds = random.choice(among(cluster, random)), random.choice(DURATIONS_S)
    return f"{process.name} is stopped for {seconds:g} s" if cluster.freeze(process, seconds) else NOTHING


def _cut(cluster: Cluster, random: Random, among: Choose) -> str:
    process, seconds = random.choice(among(cluster, random)), random.choice(DURATIONS_S)
    if not process.alive or process.client.cut:
        return NOTHING
    process.client.cut = True
    cluster.clock.after(seconds, setattr, process.client, "cut", False)
    return f"{process.name} is cut off from the store for {seconds:g} s"


for role, choose in (("agent", _agents), ("engine", _engine), ("controller", _controller), ("gateway", _gateway)):
    FAULTS[f"kill-{role}"] = partial(_kill, among=choose)
    FAULTS[f"cut-{role}"] = partial(_cut, among=choose)
    if role != "gateway":
        FAULTS[f"stop-{role}"] = partial(_stop, among=choose)


@fault
def zombie_controller(cluster: Cluster, random: Random) -> str:
    """A controller carries out an old decision, perhaps under a token that has been superseded."""
    decided = [(c, past) for c in cluster.controllers if c.alive and not c.stopped for past in c.past]
    if not decided:
        return NOTHING
    controller, decision = random.choice(decided)
    effect, state = decision[:2]
    controller.do(controller.repeat, *decision)
    return f"{controller.name} repeats what it decided at revision {state.revision}: {effect.reason}"


# --- the network


@fault
def reset(cluster: Cluster, random: Random) -> str:
    """The gateway's connection to its engine breaks, and all requests are submitted again."""
    return "the gateway's connection breaks" if cluster.gateway.reset() else NOTHING


@fault
def mute(cluster: Cluster, random: Random) -> str:
    """All messages between gateway and engine are lost. Neither learns it until the connection breaks."""
    connection = cluster.gateway.connection
    if connection is None or connection.cut:
        return NOTHING
    connection.cut = True
    cluster.clock.after(random.choice(DURATIONS_S), connection.broken)
    return "the gateway's connection loses everything for a while"


@fault
def lag(cluster: Cluster, random: Random) -> str:
    """All messages are slow for a while."""
    most_s = random.choice([0.05, 0.2])
    cluster.slow_down(most_s, random.choice(DURATIONS_S))
    return f"messages take up to {1000 * most_s:.0f} ms"


# --- the store


@fault
def outage(cluster: Cluster, random: Random) -> str:
    """No process reaches it. Its leases continue to run out."""
    if cluster.store.outage:
        return NOTHING
    cluster.store.outage = True
    seconds = random.choice(DURATIONS_S)
    cluster.clock.after(seconds, setattr, cluster.store, "outage", False)
    return f"the store is out for {seconds:g} s"


@fault
def new_leader(cluster: Cluster, random: Random) -> str:
    """etcd elects another leader: all watches break, and all leases get their full time again."""
    if cluster.store.outage:
        return NOTHING
    cluster.store.outage = True
    cluster.store.outage = False
    cluster.store.renew_all()
    return "the store's leader changes"


@fault
def compaction(cluster: Cluster, random: Random) -> str:
    """Overwritten values are forgotten. A client whose watch is behind must list again."""
    with suppress(StoreError):
        cluster.store.compact(cluster.store.state.revision)
        return f"the store is compacted at {cluster.store.state.revision}"
    return NOTHING


@fault
def doubt(cluster: Cluster, random: Random) -> str:
    """The answers to a process's next writes are lost. Some of those writes take effect."""
    processes = [process for process in cluster.processes if process.alive]
    if not processes:
        return NOTHING
    process = random.choice(processes)
    process.client.doubtful = random.choice([1, 2, 5])
    return f"{process.name} gets no answer to its next {process.client.doubtful} writes"


@fault
def lapse(cluster: Cluster, random: Random) -> str:
    """A lease ends although its holder is alive."""
    key = cluster.store.lapse(random)
    return f"the lease of {key} runs out" if key else NOTHING


# --- clocks


@fault
def skew(cluster: Cluster, random: Random) -> str:
    """The wall clock of a controller or an agent is wrong for a while."""
    process = random.choice([*cluster.controllers, *cluster.hosts.values()])
    if process.skew_s:
        return NOTHING
    process.skew_s = random.choice([-30.0, -2.0, 0.7, 5.0, 60.0])
    cluster.clock.after(random.choice(DURATIONS_S), setattr, process, "skew_s", 0.0)
    return f"the clock of {process.name} is off by {process.skew_s:g} s for a while"


# --- failpoints


@fault
def controller_dies_at_edge(cluster: Cluster, random: Random) -> str:
    """Before or after its next transaction of some kind."""
    return _at_edge(cluster, random, random.choice(["kill", "raise"]))


@fault
def controller_hangs_at_edge(cluster: Cluster, random: Random) -> str:
    """Before or after its next transaction of some kind."""
    return _at_edge(cluster, random, "hang")


def _at_edge(cluster: Cluster, random: Random, action: str) -> str:
    edge = random.choice([*EDGES, "staged", "assigned", "committed", "committed"])
    point, seconds = f"controller.{random.choice(['before', 'after'])}.{edge}", random.choice(DURATIONS_S)
    cluster.failpoints.armed[point] = (action, seconds)
    return f"armed: {point}={action}"


@fault
def role_fails_at_point(cluster: Cluster, random: Random) -> str:
    """An agent before it spawns, an engine before or after it flips, a rank before it prepares."""
    points = ["agent.before.spawn", "engine.before.flip", "engine.after.flip"]
    point, action = random.choice(points), random.choice(["kill", "raise", "hang"])
    if random.random() < 0.3:
        point, action = "rank.before.prepare", "raise"
    cluster.failpoints.armed[point] = (action, random.choice(DURATIONS_S))
    return f"armed: {point}={action}"

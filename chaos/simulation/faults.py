"""The faults of a simulated cluster. Each says in words what it did, or "" if there was nothing to do it to.

Each draws from a generator of its own, so that what one does never depends on whether another happened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from random import Random

from chaos.simulation.cluster import Cluster
from chaos.simulation.process import Process
from chaos.simulation.rank import RankProcess
from membership.base.errors import StoreError
from membership.base.failpoint_catalogue import EDGES

Happen = Callable[[Cluster, Random], str]
NOTHING = ""
SOME_S = (0.1, 0.4, 1.3, 1.3, 3.0)

FAULTS: dict[str, Happen] = {}


def fault(happen: Happen) -> Happen:
    """Its name is its kind."""
    FAULTS[happen.__name__.replace("_", "-")] = happen
    return happen


def _a_rank(cluster: Cluster, random: Random, *, working: bool = False) -> RankProcess | None:
    """One that lives, members before others; `working`: one whose answer is waited for."""
    ranks = sorted((r for r in cluster.ranks.values() if r.alive and not r.stopped), key=lambda r: r.key)
    if working:
        ranks = [rank for rank in ranks if rank.busy]
    return random.choice(ranks) if ranks else None


# --- ranks


@fault
def kill_rank(cluster: Cluster, random: Random) -> str:
    """SIGKILL."""
    rank = _a_rank(cluster, random)
    if rank is None:
        return NOTHING
    rank.die()
    return f"{rank.name} is killed"


@fault
def kill_in_step(cluster: Cluster, random: Random) -> str:
    """SIGKILL of a rank that computes a step."""
    rank = _a_rank(cluster, random, working=True)
    if rank is None:
        return NOTHING
    rank.die()
    return f"{rank.name} is killed in its step"


@fault
def kill_two(cluster: Cluster, random: Random) -> str:
    """Both holders of an expert, if there are two."""
    view = cluster.store.state.view
    held = [rank for rank, layers in view.placement.items() if 0 in layers[0]] if view else []
    found = sorted((r for r in cluster.ranks.values() if r.key[0] in held), key=lambda r: r.key)[:2]
    for rank in found:
        rank.die()
    return f"{' and '.join(rank.name for rank in found)} are killed, all holders of an expert" if found else NOTHING


def _ill(cluster: Cluster, random: Random, hang: str, how: str) -> str:
    rank = _a_rank(cluster, random)
    if rank is None:
        return NOTHING
    seconds = random.choice(SOME_S)
    rank.stop(hang)
    cluster.clock.after(seconds, rank.resume)
    return f"{rank.name} {how} for {seconds:g} s"


@fault
def stop_rank(cluster: Cluster, random: Random) -> str:
    """SIGSTOP, and SIGCONT later: a zombie if it was given up meanwhile."""
    return _ill(cluster, random, "", "is stopped")


@fault
def hang_rank(cluster: Cluster, random: Random) -> str:
    """Its main thread hangs in native code; its heart beats, or does not."""
    return _ill(cluster, random, random.choice(["native", "gil"]), "hangs")


@fault
def slow_rank(cluster: Cluster, random: Random) -> str:
    """It takes ten times as long for everything."""
    rank = _a_rank(cluster, random)
    if rank is None:
        return NOTHING
    rank.slow = 10.0
    cluster.clock.after(4.0, setattr, rank, "slow", 1.0)
    return f"{rank.name} is ten times slower for 4 s"


@fault
def unable(cluster: Cluster, random: Random) -> str:
    """A slot whose ranks cannot prepare anything."""
    slot = random.randrange(6)
    cluster.bad.add(slot)
    cluster.clock.after(random.choice(SOME_S), cluster.bad.discard, slot)
    return f"ranks in slot {slot} cannot prepare for a while"


# --- roles


def _kill(cluster: Cluster, random: Random, among: Sequence[Process]) -> str:
    process = random.choice(among)
    return f"{process.name} is killed" if cluster.kill(process) else NOTHING


def _freeze(cluster: Cluster, random: Random, among: Sequence[Process]) -> str:
    process, seconds = random.choice(among), random.choice(SOME_S)
    return f"{process.name} is stopped for {seconds:g} s" if cluster.freeze(process, seconds) else NOTHING


@fault
def kill_agent(cluster: Cluster, random: Random) -> str:
    """With its ranks."""
    return _kill(cluster, random, list(cluster.hosts.values()))


@fault
def stop_agent(cluster: Cluster, random: Random) -> str:
    """Its leases run out; its ranks live."""
    return _freeze(cluster, random, list(cluster.hosts.values()))


@fault
def kill_engine(cluster: Cluster, random: Random) -> str:
    """The one in office."""
    return _kill(cluster, random, [cluster.engine or random.choice(cluster.engines)])


@fault
def stop_engine(cluster: Cluster, random: Random) -> str:
    """The one in office; another may take it meanwhile."""
    return _freeze(cluster, random, [cluster.engine or random.choice(cluster.engines)])


@fault
def kill_controller(cluster: Cluster, random: Random) -> str:
    """The leader."""
    return _kill(cluster, random, [cluster.leader or random.choice(cluster.controllers)])


@fault
def stop_controller(cluster: Cluster, random: Random) -> str:
    """The leader, perhaps between its decision and its transaction."""
    return _freeze(cluster, random, [cluster.leader or random.choice(cluster.controllers)])


@fault
def zombie_controller(cluster: Cluster, random: Random) -> str:
    """A controller carries out what it decided a while ago, perhaps under a token that leads no more."""
    decided = [(c, past) for c in cluster.controllers if c.alive and not c.stopped for past in c.past]
    if not decided:
        return NOTHING
    controller, decision = random.choice(decided)
    effect, state = decision[:2]
    controller.do(controller.repeat, *decision)
    return f"{controller.name} repeats what it decided at revision {state.revision}: {effect.reason}"


@fault
def kill_gateway(cluster: Cluster, random: Random) -> str:
    """Its streams end; others begin."""
    return _kill(cluster, random, [cluster.gateway])


# --- the network


@fault
def reset(cluster: Cluster, random: Random) -> str:
    """The gateway's connection to its engine breaks: everything is submitted again."""
    return "the gateway's connection breaks" if cluster.gateway.reset() else NOTHING


@fault
def mute(cluster: Cluster, random: Random) -> str:
    """What gateway and engine say is lost on the way, and nobody tells them."""
    connection = cluster.gateway.connection
    if connection is None or connection.cut:
        return NOTHING
    connection.cut = True
    cluster.clock.after(random.choice(SOME_S), connection.broken)
    return "the gateway's connection loses everything for a while"


@fault
def lag(cluster: Cluster, random: Random) -> str:
    """Everything takes long: answers come late, in the middle of what they change."""
    cluster.slow_down(random.choice([0.05, 0.2]), random.choice(SOME_S))
    return f"messages take up to {1000 * cluster.delay_s[1]:.0f} ms"


def _cut(cluster: Cluster, random: Random, among: Sequence[Process]) -> str:
    process, seconds = random.choice(among), random.choice(SOME_S)
    if not process.alive or process.client.cut:
        return NOTHING
    process.client.cut = True
    cluster.clock.after(seconds, setattr, process.client, "cut", False)
    return f"{process.name} is cut off from the store for {seconds:g} s"


@fault
def cut_agent(cluster: Cluster, random: Random) -> str:
    """From the store."""
    return _cut(cluster, random, list(cluster.hosts.values()))


@fault
def cut_engine(cluster: Cluster, random: Random) -> str:
    """From the store: it serves on under the last view, until another takes office."""
    return _cut(cluster, random, [cluster.engine or random.choice(cluster.engines)])


@fault
def cut_controller(cluster: Cluster, random: Random) -> str:
    """From the store."""
    return _cut(cluster, random, [cluster.leader or random.choice(cluster.controllers)])


@fault
def cut_gateway(cluster: Cluster, random: Random) -> str:
    """From the store."""
    return _cut(cluster, random, [cluster.gateway])


# --- the store


@fault
def outage(cluster: Cluster, random: Random) -> str:
    """Nobody reaches it; its leases go on running out."""
    if cluster.store.outage:
        return NOTHING
    cluster.store.outage = True
    seconds = random.choice(SOME_S)
    cluster.clock.after(seconds, setattr, cluster.store, "outage", False)
    return f"the store is out for {seconds:g} s"


@fault
def new_leader(cluster: Cluster, random: Random) -> str:
    """The store has another leader: all watches break, leases get their full time again."""
    if cluster.store.outage:
        return NOTHING
    cluster.store.outage = True
    cluster.store.outage = False
    cluster.store.renew_all()
    return "the store's leader changes"


@fault
def compaction(cluster: Cluster, random: Random) -> str:
    """What was overwritten is forgotten: who is behind must list again."""
    with suppress(StoreError):
        cluster.store.compact(cluster.store.state.revision)
        return f"the store is compacted at {cluster.store.state.revision}"
    return NOTHING


@fault
def doubt(cluster: Cluster, random: Random) -> str:
    """Answers to a process's next writes are lost, whether they took effect or not."""
    processes = [process for process in cluster.everybody if process.alive]
    process = random.choice(processes)
    process.client.doubtful = random.choice([1, 2, 5])
    return f"{process.name} gets no answer to its next {process.client.doubtful} writes"


@fault
def lapse(cluster: Cluster, random: Random) -> str:
    """A lease ends though its holder lives."""
    key = cluster.store.lapse(random)
    return f"the lease of {key} runs out" if key else NOTHING


# --- clocks


@fault
def skew(cluster: Cluster, random: Random) -> str:
    """A controller's or an agent's time of day is off."""
    process = random.choice([*cluster.controllers, *cluster.hosts.values()])
    process.skew_s = random.choice([-30.0, -2.0, 0.7, 5.0, 60.0])
    cluster.clock.after(random.choice(SOME_S), setattr, process, "skew_s", 0.0)
    return f"the clock of {process.name} is off by {process.skew_s:g} s for a while"


# --- failpoints


@fault
def controller_dies_at_edge(cluster: Cluster, random: Random) -> str:
    """At its next transaction of some kind: before it, or after."""
    return _at_edge(cluster, random, random.choice(["kill", "raise"]))


@fault
def controller_hangs_at_edge(cluster: Cluster, random: Random) -> str:
    """As above."""
    return _at_edge(cluster, random, "hang")


def _at_edge(cluster: Cluster, random: Random, action: str) -> str:
    edge = random.choice([*EDGES, "staged", "assigned", "committed", "committed"])
    point, seconds = f"controller.{random.choice(['before', 'after'])}.{edge}", random.choice(SOME_S)
    cluster.failpoints.armed[point] = (action, seconds)
    return f"armed: {point}={action}"


@fault
def role_fails_at_point(cluster: Cluster, random: Random) -> str:
    """An agent before it spawns, an engine before or after it flips, a rank before it prepares."""
    points = ["agent.before.spawn", "engine.before.flip", "engine.after.flip"]
    point, action = random.choice(points), random.choice(["kill", "raise", "hang"])
    if random.random() < 0.3:
        point, action = "rank.before.prepare", "raise"
    cluster.failpoints.armed[point] = (action, random.choice(SOME_S))
    return f"armed: {point}={action}"

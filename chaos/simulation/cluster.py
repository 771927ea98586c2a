"""A whole simulated cluster: all roles as shipped, under one clock.

It starts and restarts processes, reports their ends to those that watch them, and says what is checked when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from random import Random
from typing import Any

from msgspec.structs import replace as changed

from chaos.simulation.clock import Clock, Worst
from chaos.simulation.controller import ControllerProcess
from chaos.simulation.engine import EngineProcess, SimServer
from chaos.simulation.exchange import SimMask
from chaos.simulation.fleet import Broadcast
from chaos.simulation.gateway import ClientRequest, GatewayProcess
from chaos.simulation.gpus import RUN_ON_S, SLOTS
from chaos.simulation.host import Host
from chaos.simulation.invariants import Invariants, Violation, early, require, require_none, unmasked
from chaos.simulation.kv_model import EOS, KvModel
from chaos.simulation.network import Network, Stream, Way
from chaos.simulation.process import Died, Process
from chaos.simulation.rank import Outbox, RankProcess
from chaos.simulation.store import SimStore
from membership.base.failpoints import FaultInjected
from membership.base.rank_id import RankId
from membership.store.codec import encode
from membership.store.keys import Keys
from membership.store.records import ClusterConfig, ClusterState, Desired

SERVED = ClusterConfig(
    cluster="sim", model="/m", served_model_name="m", moe_layers=2, experts=8, max_ranks=12, block_size=4,
    kv_blocks=12, max_batched_tokens=9, max_seqs=4, max_model_len=48, eos_token_ids=(EOS,), vocab_size=50,
    coverage_deadline_s=20.0, lease_ttl_s=1.0, launch_deadline_s=8.0, load_stall_s=8.0, restart_window_s=15.0,
)  # fmt: skip
WITH_GPUS = changed(SERVED, gpu_exchange=SLOTS)
RESTART_S = (0.1, 0.6)
DELAY_S = (0.0005, 0.004)


class Events:
    """Counts events by kind, in place of the event log."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def emit(self, kind: str, **fields: Any) -> None:
        self.counts[kind] += 1


class Failpoints:
    """Actions at the product's failpoints. Each is taken once, when a process next passes its failpoint."""

    def __init__(self, cluster: Cluster) -> None:
        self.armed: dict[str, tuple[str, float]] = {}
        self.triggered: list[str] = []
        self._cluster = cluster

    def hit(self, name: str, rank: int | None) -> None:
        action, seconds = self.armed.get(name, ("", 0.0))
        if not action or (action == "hang" and name.startswith("controller.")):
            return
        self._trigger(name)
        if action == "kill":
            raise Died(name)
        if action == "raise":
            raise FaultInjected(f"failpoint {name}")
        if self._cluster.running is not None:
            self._cluster.freeze(self._cluster.running, seconds)

    def hang_s(self, name: str) -> float:
        """For how long a controller hangs here."""
        action, seconds = self.armed.get(name, ("", 0.0))
        if action != "hang":
            return 0.0
        self._trigger(name)
        return seconds

    def _trigger(self, name: str) -> None:
        del self.armed[name]
        self.triggered.append(name)


class Cluster:
    """All processes and what connects them. Only the cluster itself draws from `chance`, never what is done to it."""

    def __init__(
        self, seed: str, nodes: tuple[str, ...], desired: int, config: ClusterConfig = SERVED, *, hosts: bool = False
    ) -> None:
        """`hosts`: each node is a host of its own, with a network between them; else all is on one."""
        self.seed, self.nodes, self.config = seed, nodes, config
        self.chance = Random(f"{seed} cluster")
        self.clock = Clock()
        self.network = Network(self.clock, Random(f"{seed} network"), nodes if hosts else ())
        self.keys = Keys(config.cluster)
        self.store = SimStore(self.clock, self.keys)
        self.invariants = Invariants(config)
        self.events: Any = Events()
        self.failpoints = Failpoints(self)
        self.kv = KvModel(config.block_size)
        self.ranks: dict[RankId, RankProcess] = {}  # that are alive
        self.broadcasts: dict[bytes, Broadcast] = {}
        self.masks: dict[bytes, SimMask] = {}
        self.outboxes: dict[bytes, Outbox] = {}
        self.servers: dict[str, SimServer] = {}
        self.bad: set[int] = set()  # slots whose ranks cannot prepare
        self.dark: Counter[str] = Counter()  # hosts without power, and by how many faults
        self.lag_s = Worst(self.clock)
        self.running: Process | None = None
        self.violation: Violation | None = None
        self.tokens = 0
        self.requests: dict[str, ClientRequest] = {}
        self.killed: set[RankId] = set()
        self._prepared: set[tuple[RankId, int]] = set()  # (rank, revision of the staged view)
        self._tokens: dict[str, int] = {}
        self._pids = self._started = 0
        self.store.put(self.keys.config, encode(config))
        self.store.put(self.keys.desired, encode(Desired(ranks=desired)))
        self.store.on_change = self._changed
        self.hosts = {node: self._host(node) for node in nodes}
        places = list(nodes) if hosts else [""]
        Random(f"{seed} places").shuffle(places)
        one, two = places[0], places[-1]
        self.controllers = [self._controller(two), self._controller(one)]
        self.engines = [self._engine(one), self._engine(two)]
        self.gateway = self._gateway(places[len(places) // 2])

    # --- processes

    def _next_number(self) -> int:
        self._started += 1
        return self._started

    def _host(self, node: str) -> Host:
        return Host(self, node, self._next_number(), node if self.network.hosts else "")

    def _controller(self, at: str) -> ControllerProcess:
        return ControllerProcess(self, self._next_number(), at)

    def _engine(self, at: str) -> EngineProcess:
        return EngineProcess(self, self._next_number(), at)

    def _gateway(self, at: str) -> GatewayProcess:
        return GatewayProcess(self, self._next_number(), at)

    def next_pid(self) -> int:
        """A number that is never used again."""
        self._pids += 1
        return self._pids

    def fork(self, key: RankId, host: Host) -> RankProcess:
        require(key not in self.ranks and key not in self.killed, f"rank {key} is started twice")
        self.killed.add(key)
        self.ranks[key] = RankProcess(self, key, host)
        return self.ranks[key]

    def rank_died(self, rank: RankProcess) -> None:
        """The kernel notifies its agent, and engines of its host; its agent others; its connections end.

        Of a host that loses its power nothing arrives but, once it is back, that its connections are gone.
        """
        self.ranks.pop(rank.key, None)
        rank.host.executor.died(rank)
        for process in self.engines:
            if process.fleet is None:
                continue
            if process.at == rank.at:
                process.after(0.001, process.fleet.on_death, rank.key)
            elif rank.host.alive and not rank.host.stopped and not self.dark[rank.at]:
                self.tell(rank.at, process, process.fleet.reported.arrived, rank.key)
        for other in list(self.ranks.values()) if rank.at else ():
            if other.at != rank.at and rank.key in other.exchange.links:
                self.tell(rank.at, other, other.exchange.lost, rank.key)

    def tell(self, at: str, process: Process, call: Callable[[RankId], None], key: RankId) -> None:
        """A process of another host, over the network."""
        Stream(self.network, self.clock, at, process.at).send(self.delay(), process.after, 0.0, call, key)

    def connected(self, one: Process, two: Process) -> bool:
        """Whether each of them can hear the other."""
        return self.network.connected(one.at, two.at)

    def supervise(self, delay_s: float = 0.0) -> None:
        """Start every process again that has ended, as `elastic serve` does; not on a host without power."""
        for node, host in self.hosts.items():
            if not host.alive and not self.dark[node]:
                self.hosts[node] = self._host(node)
        self.controllers = [each if self._stays(each) else self._controller(each.at) for each in self.controllers]
        self.engines = [each if self._stays(each) else self._engine(each.at) for each in self.engines]
        if not self._stays(self.gateway):
            self.gateway = self._gateway(self.gateway.at)

    def _stays(self, process: Process) -> bool:
        return process.alive or self.dark[process.at] > 0

    def kill(self, process: Process) -> bool:
        """SIGKILL. It is started again a little later. False if it was dead."""
        was = process.alive
        process.die()
        if was:
            self.clock.after(self.chance.uniform(*RESTART_S), self.supervise)
        return was

    def processes_of(self, host: str) -> list[Process]:
        """All that lives there; ranks before their agent."""
        every = (*sorted(self.ranks.values(), key=lambda rank: rank.key), *self.processes)
        return [process for process in every if process.at == host and process.alive]

    def lose_power(self, host: str, ways: list[Way]) -> None:
        """All of a host ends at once, and what its connections have not sent is lost. `ways`: all of its ways."""
        self.dark[host] += 1
        self.network.cut(ways)
        self.network.boots[host] += 1
        for process in self.processes_of(host):
            process.die()

    def power_back(self, host: str, ways: list[Way]) -> None:
        """It runs again."""
        self.dark[host] = max(0, self.dark[host] - 1)
        self.network.heal(ways)
        self.clock.after(self.chance.uniform(*RESTART_S), self.supervise)

    def freeze(self, process: Process, seconds: float) -> bool:
        """SIGSTOP, and SIGCONT after `seconds`. False if it was dead or stopped."""
        if not process.alive or process.stopped:
            return False
        process.stop()
        self.clock.after(seconds, process.resume)
        return True

    @property
    def processes(self) -> list[Process]:
        """All processes but ranks."""
        return [*self.hosts.values(), *self.controllers, *self.engines, self.gateway]

    @property
    def engine(self) -> EngineProcess | None:
        """The engine in office, by the store."""
        token = self.store.state.engine_token
        return next((e for e in self.engines if e.engine is not None and e.token == token), None)

    @property
    def leader(self) -> ControllerProcess | None:
        """The controller that leads, by the store."""
        token = self.store.state.leader_revision
        return next((c for c in self.controllers if c.election is not None and c.election.token == token), None)

    def delay(self) -> float:
        """The delay of one message in seconds."""
        most_s = self.lag_s.now()
        return self.chance.uniform(*((0.0, most_s) if most_s else DELAY_S))

    def slow_down(self, most_s: float, seconds: float) -> None:
        """Messages take up to `most_s` for a while."""
        self.lag_s.add(most_s, seconds)

    def heal(self) -> None:
        self.failpoints.armed.clear()
        self.bad.clear()
        self.lag_s.clear()
        self.store.outage = False
        self.dark.clear()
        self.network.heal_all()
        for process in (*self.processes, *self.ranks.values()):
            process.client.cut, process.client.doubtful, process.skew_s = False, 0, 0.0
        for process in self.processes:
            process.resume()
        for rank in list(self.ranks.values()):
            rank.slow, rank.runs_on_s = 1.0, RUN_ON_S
            rank.resume()
        self.supervise()

    # --- what is checked

    def report(self, violation: Violation) -> None:
        """An invariant is broken. The first one counts."""
        self.violation = self.violation or violation

    def report_all(self, broken: Iterable[str]) -> None:
        """Report what is broken, if anything is."""
        for invariant in broken:
            self.report(Violation(invariant))

    def count_tokens(self, number: int) -> None:
        self.tokens += number

    def elected(self, office: str, token: int) -> None:
        """An engine or controller took office. Its token must be higher than all before."""
        latest = self._tokens.get(office, 0)
        require(token > latest, f"an {office} was elected under token {token}, after one with {latest}")
        self._tokens[office] = token

    def _changed(self, author: str, before: ClusterState, after: ClusterState) -> None:
        try:
            self._check(author, before, after)
        except Violation as violation:
            self.report(violation)
        if any(event.kv.key.startswith(self.keys.quiet) is False for event in self.store._history[-1].events):
            for process in (*self.hosts.values(), *self.controllers, *self.engines, self.gateway):
                if process.alive and not process.client.away:
                    process.wake(0.001 + 4 * self.delay())

    def _check(self, author: str, before: ClusterState, after: ClusterState) -> None:
        if after.ranks is not before.ranks:
            self._prepared |= {(key, record.prepared_revision) for key, record in after.ranks.items()}
        require_none(unmasked(before, after))
        if not author.startswith("controller"):
            return
        committed = self.invariants.changed(before, after)
        by = next((c for c in self.controllers if c.name == author), None)
        if by is not None and by.decided is not None:
            state, now = by.decided
            require_none(early(state, after, now))
        if committed and after.view is not None:
            for member in after.view.members:
                key = member.id
                require((key, before.next_revision) in self._prepared, f"{member} is committed, and never prepared")
            token = by.decided_in.token if by is not None and by.decided_in is not None else 0
            require(token == before.leader_revision, f"{author} committed under token {token}, and leads no more")

    def _apart(self) -> Iterator[str]:
        """Members on other hosts without a link, although nothing is cut."""
        for rank in self.ranks.values():
            if peers := rank.exchange.far.returning & self.ranks.keys():
                yield f"{rank.name} has no link with {sorted(peers)}"

    def trouble(self) -> str:
        """What is not yet as it should be without faults; "" if all is well."""
        state = self.store.state
        desired = state.desired
        try:
            self.invariants.whole(state, desired.ranks if desired else 0)
            if desired is not None and state.view is not None and set(state.view.ranks) & set(desired.cordoned):
                raise Violation(f"drained slots {desired.cordoned} are filled: {state.view.ranks}")
            status, view = state.engine_status, state.view
            current = (state.engine_token, view.epoch if view is not None else 0)
            adopted = status is not None and (status.token, status.epoch) == current and not status.masked
            require(adopted, f"the engine has not adopted the view: {status}")
            require_none(self._apart())
        except Violation as violation:
            return str(violation)
        lost = {name: len(each.tokens) for name, each in self.requests.items() if not each.ended}
        return f"requests have not ended (tokens so far): {lost}" if lost else ""

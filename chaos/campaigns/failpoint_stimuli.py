"""The stimulus that makes a process pass each failpoint: a change of size, a kill, a client that goes away, …"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass

import httpx

from chaos.faults import kill
from chaos.faults.base import NotInjected
from chaos.faults.site import ServedSite
from chaos.target.cluster import Cluster
from chaos.target.waiting import until
from elastic.cli.client import AdminClient
from elastic.serve.api_keys import client_headers
from membership.base.errors import ElasticError, WaitTimeout
from membership.base.failpoint_catalogue import EDGES, RPCS
from membership.operations.change import scale
from membership.store.records import ClusterState, Operation

SMALL, LARGE = 2, 3  # ranks between which the cluster is changed
DEADLINE_S = 15.0  # of an operation
SLACK_S = 1.0  # until its end is seen
READY_S = 30.0  # for the cluster to be as a stimulus needs it
HTTP_S = 1.5
LONG_REQUESTS, LONG_TOKENS = 6, 200


class Scene:
    """The cluster as stimuli see it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.site = cluster, ServedSite(cluster)

    @property
    def state(self) -> ClusterState:
        """What the store says."""
        return self.cluster.client().state()

    @property
    def size(self) -> int:
        """How many ranks are wanted."""
        desired = self.state.desired
        return desired.ranks if desired is not None else 0

    @property
    def other_size(self) -> int:
        """The size that a change leads to."""
        return LARGE if self.size == SMALL else SMALL

    @property
    def victim(self) -> int:
        """The rank that is killed where one is to be: the last of the view, whose numbers may have gaps."""
        return max(until(lambda: self.cluster.client().view().ranks, "a view with ranks", READY_S))

    def pid(self, victim: str) -> int:
        """Its process; 0 if there is none now."""
        with suppress(NotInjected):
            return self.site.pid(victim)
        return 0

    def rank_pids(self) -> set[int]:
        """The processes of ranks that are recorded."""
        return {record.pid for record in self.state.ranks.values() if record.pid}

    def wait_whole(self, dead: AbstractSet[int], timeout_s: float) -> None:
        """Until there is a leader, all ranks serve, no operation is active, and no record names a `dead` process."""
        deadline = time.monotonic() + timeout_s

        def quiet() -> bool:
            state = self.state
            pids = {record.pid for record in state.ranks.values()}
            pids |= {record.pid for record in state.agents.values()}
            pids |= {record.pid for record in state.gateways.values()}
            pids |= {state.engine.pid} if state.engine is not None else set()
            return state.active is None and state.leader_revision > 0 and pids.isdisjoint(dead)

        until(quiet, f"a leader, no operation, and no record of processes {sorted(dead)}", timeout_s)
        self.cluster.wait_serving(self.size, timeout_s=max(1.0, deadline - time.monotonic()))

    def change(self) -> None:
        """Change the size, without a fault."""
        self.cluster.scale(self.other_size, DEADLINE_S)
        self.wait_whole(frozenset(), READY_S)

    def wait_spare(self) -> None:
        """Until a warm spare waits."""
        until(lambda: any(a.spares for a in self.state.agents.values()), "a spare", READY_S)


class UnderWay:
    """The stimulus under way, if it has an end that can be waited for."""

    def __init__(self, scene: Scene, operation: Operation | None = None) -> None:
        self._scene, self.operation = scene, operation

    @property
    def over(self) -> bool:
        """Whether it is known to have ended."""
        found = self._scene.state.operations.get(self.operation.id) if self.operation is not None else None
        return found is not None and not found.active

    def ended(self) -> str:
        """Wait until it has ended, in words; WaitTimeout if it is still active at its deadline."""
        if self.operation is None:
            return ""
        name, left = self.operation.id, self.operation.deadline + SLACK_S - time.time()

        def over() -> Operation | None:
            found = self._scene.state.operations.get(name)
            return found if found is not None and not found.active else None

        operation = until(over, f"operation {name} to end by its deadline", left)
        return f", scale to {operation.target} {operation.phase}{f': {operation.error}' if operation.error else ''}"


Begin = Callable[[Scene], UnderWay]


@dataclass(frozen=True)
class Stimulus:
    """Makes a process pass a point."""

    words: str
    begin: Begin
    needs: int = 0  # the size to start from; 0: any
    spare: bool = False  # whether there must be one
    also: str = ""  # a fault that it takes to get there, of `{victim}`
    again_s: float = 0.0  # after which it is begun once more, and so on: its effect may be over too soon

    def prepare(self, scene: Scene) -> None:
        """See that it can be begun."""
        scene.wait_whole(frozenset(), READY_S)
        if self.needs not in (0, scene.size):
            scene.change()
        if self.spare:
            scene.wait_spare()

    def arm(self, scene: Scene, failpoint: str) -> None:
        """Arm this failpoint, and what it takes to get there."""
        also = self.also.format(victim=scene.victim) if self.also else ""
        scene.site.arm(";".join(filter(None, (failpoint, also))))

    @contextmanager
    def under_way(self, scene: Scene) -> Iterator[UnderWay]:
        """Begin it; for the length of the block it is repeated, if it has to be."""
        begun, stop = self.begin(scene), threading.Event()
        repeating = threading.Thread(target=self._repeat, args=(scene, stop), name="stimulus", daemon=True)
        repeating.start()
        try:
            yield begun
        finally:
            stop.set()
            repeating.join(timeout=READY_S)
            if repeating.is_alive():
                raise WaitTimeout(f"the stimulus ({self.words}) did not stop")

    def _repeat(self, scene: Scene, stop: threading.Event) -> None:
        while self.again_s and not stop.wait(self.again_s):
            with suppress(ElasticError):  # the last one is not over yet
                self.begin(scene)


# --- stimuli


def _nothing(scene: Scene) -> UnderWay:
    return UnderWay(scene)


def _change(scene: Scene) -> UnderWay:
    request = scale(scene.other_size)
    return UnderWay(scene, scene.cluster.client().propose(request, op_id=None, if_epoch=None, timeout_s=DEADLINE_S))


def _change_when_busy(scene: Scene) -> UnderWay:
    """Change while each rank has long requests."""
    running = threading.Semaphore(0)
    for number in range(LONG_REQUESTS):
        threading.Thread(target=_stream, args=(scene, number, running), name="long-request", daemon=True).start()
    for _ in range(LONG_REQUESTS):
        if not running.acquire(timeout=READY_S):
            raise WaitTimeout(f"not all of {LONG_REQUESTS} requests run after {READY_S:g} s")
    return _change(scene)


def _stream(scene: Scene, number: int, running: threading.Semaphore) -> None:
    """One request to its end; releases `running` once it runs."""
    lines = _lines(scene, "Numbers " * (number + 1), READY_S)
    if next(lines, None) is not None:
        running.release()
    for _ in lines:
        continue


def _lines(scene: Scene, prompt: str, timeout_s: float) -> Generator[str, None, None]:
    """The lines of a long answer. A gateway's death ends it early, which does not matter here."""
    body = {"model": scene.cluster.model_name(), "prompt": prompt, "max_tokens": LONG_TOKENS, "stream": True}
    client = httpx.Client(headers=client_headers(), timeout=timeout_s, trust_env=False)
    with (
        suppress(httpx.HTTPError),
        client,
        client.stream("POST", f"{scene.cluster.url}/v1/completions", json=body) as answer,
    ):
        yield from answer.iter_lines()


def _change_and_cancel(scene: Scene) -> UnderWay:
    begun = _change(scene)
    if begun.operation is not None:
        scene.cluster.client().cancel(begun.operation.id, "the failpoint matrix")
    return begun


def _kill(victim: str) -> Begin:
    def begin(scene: Scene) -> UnderWay:
        kill(until(lambda: scene.pid(victim), f"a process of {victim}", READY_S))
        return UnderWay(scene)

    return begin


def _kill_rank(scene: Scene) -> UnderWay:
    return _kill(f"rank {scene.victim}")(scene)


def _by_gateway(cancelled: bool) -> Begin:
    """Change through the admin API; if the gateway does not answer, ask the store, with the same id."""

    def begin(scene: Scene) -> UnderWay:
        address, request, name = scene.cluster.state.address(), scale(scene.other_size), f"matrix-{time.time_ns()}"
        admin = AdminClient(address.admin_url, address.token(), timeout_s=HTTP_S)
        try:
            with suppress(ElasticError):
                admin.propose(request, op_id=name, if_epoch=None, timeout_s=DEADLINE_S)
            operation = scene.cluster.client().propose(request, op_id=name, if_epoch=None, timeout_s=DEADLINE_S)
            if cancelled:
                with suppress(ElasticError):
                    admin.cancel(name, "the failpoint matrix")
        finally:
            admin.close()
        return UnderWay(scene, operation)

    return begin


def _go_away(scene: Scene) -> UnderWay:
    """A client that closes its stream after the first token."""
    with closing(_lines(scene, "A client", HTTP_S)) as lines:
        next(lines, "")
    return UnderWay(scene)


LOAD = Stimulus("requests that come and run", _nothing)
CHANGE = Stimulus("a change of size", _change)
UP = Stimulus("scale up", _change, needs=SMALL)
UP_BY_SPARE = Stimulus("scale up, with a spare", _change, needs=SMALL, spare=True)
DOWN = Stimulus("scale down", _change, needs=LARGE)
DOWN_BUSY = Stimulus("scale down, of ranks with requests", _change_when_busy, needs=LARGE)
CANCEL = Stimulus("a change that is cancelled", _change_and_cancel)
ADMIN_CHANGE = Stimulus("a change through the gateway", _by_gateway(cancelled=False))
ADMIN_CANCEL = Stimulus("a change that is cancelled through the gateway", _by_gateway(cancelled=True))
KILL_RANK = Stimulus("a rank's death", _kill_rank)
KILL_TWICE = Stimulus("a rank's death, and its successor's", _kill_rank, also="rank.before.prepare@{victim}=1*kill")
NEW_CONTROLLER = Stimulus("a controller's death", _kill("controller"))
NEW_ENGINE = Stimulus("an engine's death", _kill("engine"))
GO_AWAY = Stimulus("clients that go away", _go_away, again_s=0.3)

_EDGES = {"spawning": UP, "handshaking": UP, "aborted": CANCEL, "staged": KILL_RANK, "unstaged": KILL_TWICE,
          "assigned": DOWN}  # fmt: skip
_RPCS = {"become": UP_BY_SPARE, "initialise": UP, "attach_engine": NEW_ENGINE}
STIMULI: Mapping[str, Stimulus] = {
    **{f"controller.{when}.{edge}": _EDGES.get(edge, CHANGE) for edge in EDGES for when in ("before", "after")},
    **{f"{side}.{rpc}": _RPCS.get(rpc, CHANGE) for rpc in RPCS for side in ("agent.before", "rank")},
    "controller.before.campaign": NEW_CONTROLLER,
    "agent.before.spawn": UP,
    "agent.before.retire": DOWN,
    "agent.before.grant": UP,
    "agent.before.publish": UP,
    "agent.before.withdraw": DOWN,
    "rank.registered": UP,
    "rank.before.prepare": CHANGE,
    "rank.prepared": CHANGE,
    "rank.step": LOAD,
    "rank.launched": LOAD,
    "rank.copy": DOWN_BUSY,
    "rank.shutdown": DOWN,
    "engine.before.campaign": LOAD,  # the standby's
    "engine.before.attach": UP,
    "engine.before.step": LOAD,
    "engine.before.copy": DOWN_BUSY,
    "engine.before.flip": CHANGE,
    "engine.after.flip": CHANGE,
    "engine.before.status": LOAD,
    "engine.hello": LOAD,
    "engine.submit": LOAD,
    "engine.abort": GO_AWAY,
    "gateway.before.hello": LOAD,
    "gateway.before.submit": LOAD,
    "gateway.before.abort": GO_AWAY,
    "gateway.before.propose": ADMIN_CHANGE,
    "gateway.before.cancel": ADMIN_CANCEL,
    "mirror.before.list": NEW_CONTROLLER,
    "mirror.before.watch": NEW_CONTROLLER,
}
"""For each point, what makes a process pass it."""

"""An engine process: it stands by, takes office, and serves turn by turn. Engine, status and lease are as shipped."""

from __future__ import annotations

import itertools
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from chaos.simulation.fleet import SimFleet
from chaos.simulation.process import Process
from elastic.engine.gateway_server import EngineServer, Route
from elastic.engine.loop import Engine, Peers
from elastic.engine.status_writer import StatusWriter
from membership.base.errors import Fenced, LeaseLost, StoreUnavailable, WaitTimeout
from membership.store.codec import encode
from membership.store.election import Election
from membership.store.lease import LeaseKeeper
from membership.store.mirror import Mirror
from membership.store.records import EngineRecord

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster
    from chaos.simulation.gateway import Connection

TICK_S, STEP_TICK_S = 0.25, 0.05
STATUS_S = 3.0


class SimServer(EngineServer):
    """The engine's server for gateways as shipped, without its socket."""

    def __init__(self, process: EngineProcess, name: str) -> None:
        self.address, self._process = name, process
        self._on_message = process.wake_now
        self._inbox, self._outbox, self._routes, self._numbers = deque(), deque(), {}, itertools.count(1)
        self._token, self._failure = 0, None
        self.connections: dict[bytes, Connection] = {}

    def serve(self, engine_token: int) -> None:
        """Answer from now on. Earlier messages have waited."""
        self._token = engine_token
        for connection in list(self.connections.values()):
            connection.served()

    def send(self, outputs: Any) -> None:
        """Send at once: the connection adds the delay."""
        self._outbox.extend(self._addressed(outputs))
        self._send_all()

    def receive(self, connection: bytes, message: Any) -> None:
        self._receive((cast(Any, None), connection), message)  # there are no sockets here

    def _send_to(self, gateway: Route, message: Any) -> bool:
        connection = self.connections.get(gateway[1])
        return connection is not None and connection.to_gateway(message)

    def close(self) -> None:
        for connection in list(self.connections.values()):
            connection.broken()
        self.connections.clear()


class EngineProcess(Process):
    """One engine process."""

    def __init__(self, cluster: Cluster, number: int, at: str) -> None:
        super().__init__(cluster, f"engine {number}", at)
        self.mirror: Mirror | None = None
        self.engine: Engine | None = None
        self.fleet: SimFleet | None = None
        self.server: SimServer | None = None
        self.token = 0
        self._keeper: LeaseKeeper | None = None
        self._election: Election | None = None
        self._status: StatusWriter | None = None
        self._published_at = 0.0
        self.after(self.random.uniform(0.0, 0.05), self._tick)

    def wake_now(self) -> None:
        self.wake(0.0)

    def turn(self) -> None:
        try:
            if self.mirror is None:
                self.mirror = Mirror(self.client, self.cluster.keys.cluster, clock=self.clock, background=False)
            self.client.follow(self.mirror)
            if self.engine is None:
                self._campaign(self.mirror)
            else:
                self._serve(self.engine)
        except (StoreUnavailable, WaitTimeout):
            return  # tried again at the next tick
        except (Fenced, LeaseLost):
            self._stand_down()

    def _campaign(self, mirror: Mirror) -> None:
        if self._keeper is None:
            ttl_s = self.cluster.config.lease_ttl_s
            self._open()
            self._keeper = LeaseKeeper(self.client, ttl_s, self.clock, background=False, persistent=True)
            self.after(ttl_s / 3, self._renew, self._keeper)
        fleet, server = self.fleet, self.server
        if fleet is None or server is None:
            return
        record = EngineRecord(
            node=self.name, pid=1, address=server.address,
            broadcast_handle=fleet.broadcast_handle, mask_handle=fleet.mask_handle,
        )  # fmt: skip
        self._election = Election(self.client, self.cluster.keys.engine, encode(record), self._keeper)
        self.token = self._election.campaign(0.0)
        mirror.turn()
        if mirror.state().revision < self.token:
            return  # cut off at this moment: it is elected all the same, and notices at its next turn
        fleet.open(self.token)
        lease = partial(getattr, self._keeper, "lease")
        status = StatusWriter(self.client, self.cluster.keys, self.token, lease, self.wake_now, background=False)
        self._status, self._keeper.on_carried = status, status.rewrite
        peers = Peers(mirror, fleet, server, status, self.cluster.events)
        self.engine = Engine(self.cluster.config, self.token, peers, clock=self.clock, wall=self.wall)
        mirror.subscribe(self.engine.on_membership)
        self.cluster.elected("engine", self.token)
        server.serve(self.token)

    def _open(self) -> None:
        number = self.cluster.next_pid()
        self.fleet, self.server = SimFleet(self, number), SimServer(self, f"engine-{number}")
        self.cluster.broadcasts[self.fleet.steps.name] = self.fleet.steps
        self.cluster.masks[self.fleet.mask_page.name] = self.fleet.mask_page
        self.cluster.servers[self.server.address] = self.server

    def _serve(self, engine: Engine) -> None:
        before = engine._scheduler.step
        engine.turn()
        scheduler = engine._scheduler
        status = self._status
        if status is not None and (status.urgent or self.clock.now >= self._published_at + STATUS_S):
            self._published_at = self.clock.now
            status.turn()
        if scheduler.step != before or (scheduler.running and not scheduler.unanswered and not scheduler.held):
            retry = scheduler.next_retry() or 0.0
            self.wake(max(0.004, retry - self.clock.now))

    def _renew(self, keeper: LeaseKeeper) -> None:
        pause = keeper.turn() if keeper is self._keeper else None
        if pause is not None:
            self.after(pause, self._renew, keeper)
        elif keeper is self._keeper and self.engine is None:
            self._keeper = None

    def _stand_down(self) -> None:
        """Replaced by another engine: stand by again, with new queues."""
        self._close()
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.close()
        self.engine, self.fleet, self.server, self._status = None, None, None, None
        if self.mirror is not None:
            self.mirror.close()
        self.mirror = None

    def _close(self) -> None:
        if self.fleet is not None and self.server is not None:
            self.cluster.broadcasts.pop(self.fleet.steps.name, None)
            self.cluster.servers.pop(self.server.address, None)
            self.fleet.steps.shutdown()
            self.server.close()

    def die(self) -> None:
        """Its queues and connections end with it."""
        if self.alive:
            super().die()
            self._close()

    def _tick(self) -> None:
        self.turn()
        busy = self.engine is not None and bool(self.engine._scheduler.unanswered)
        self.after(STEP_TICK_S if busy else TICK_S, self._tick)

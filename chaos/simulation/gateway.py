"""A gateway with the shipped link and journal, its connections to engines, and clients that compare with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import msgspec

from chaos.simulation.invariants import require
from chaos.simulation.kv_model import oracle
from chaos.simulation.network import Stream
from chaos.simulation.process import Process
from elastic.gateway.engine_link import EngineLink, LinkSettings, Target
from elastic.gateway.journal import Delta, Request
from elastic.protocol import Hello, Submit, ToEngine, ToGateway
from membership.base.errors import RequestError, StoreUnavailable
from membership.store.mirror import Mirror
from workers.protocol.messages import Sampling

if TYPE_CHECKING:
    from chaos.simulation.cluster import Cluster
    from chaos.simulation.engine import EngineProcess, SimServer

TICK_S, PING_S, RECONNECT_S = 0.25, 1.0, 0.1
SETTINGS = LinkSettings(engine_wait_s=60.0, stall_s=120.0, silence_s=3.0)

_decoder = msgspec.msgpack.Decoder(ToEngine)


@dataclass
class ClientRequest:
    """A client's request, and what it has received."""

    submit: Submit
    expected: tuple[list[int], str]
    tokens: list[int] = field(default_factory=list)
    ended: str = ""
    on_token: Any = None
    served_now: Callable[[], int] = lambda: 0
    clock: Any = None
    asked_at: float = 0.0
    patience_s: float = 0.0  # a refusal before that is a violation
    served_by: int = 0  # token of the engine that its last tokens are of

    def deliver(self, request_id: str, news: Delta | RequestError) -> None:
        require(not self.ended, f"request {request_id} goes on after its end")
        if isinstance(news, RequestError):
            require(news.status == 503, f"request {request_id} ended with {news.status}: {news}")
            waited_s = self.clock() - self.asked_at
            require(waited_s >= self.patience_s, f"request {request_id} was refused after {waited_s:.1f} s: {news}")
            self.ended = "refused"
            return
        engine = self.served_now()
        require(engine >= self.served_by, f"request {request_id} has tokens of engine {engine}, after {self.served_by}")
        self.served_by = engine
        self.tokens += news.tokens
        self.on_token(len(news.tokens))
        right = self.expected[0][: len(self.tokens)] == self.tokens
        require(right, f"request {request_id} was altered: {self.tokens}, not {self.expected[0]}")
        if news.finish_reason:
            self.ended = news.finish_reason
            got = (self.tokens, self.ended)
            require(got == self.expected, f"request {request_id} ended as {got}, not {self.expected}")


class Connection:
    """One connection of a gateway to an engine. Messages arrive late and in order, or are lost."""

    def __init__(self, gateway: GatewayProcess, server: SimServer, engine: EngineProcess, number: int) -> None:
        self.name = b"c%d" % number
        self.alive, self.cut = True, False
        self._gateway, self._server, self._engine = gateway, server, engine
        network, clock = gateway.cluster.network, gateway.clock
        self._there = Stream(network, clock, gateway.at, engine.at)
        self._back = Stream(network, clock, engine.at, gateway.at)
        server.connections[self.name] = self

    def send(self, data: bytes) -> Connection:
        """As a socket does. Returns an object that takes a callback."""
        self._there.send(self._gateway.cluster.delay(), self._arrive, _decoder.decode(data))
        return self

    def add_done_callback(self, callback: Any) -> None:
        """Nothing is waited for."""

    def _arrive(self, message: ToEngine) -> None:
        if self.alive and not self.cut:
            self._engine.after(0.0, self._received, message)

    def _received(self, message: ToEngine) -> None:
        if self.alive and self._server._token:  # before it serves, messages wait in its socket: see `served`
            self._server.receive(self.name, message)

    def served(self) -> None:
        """The engine begins to serve, and gets the greeting that has waited in its socket."""
        self._engine.after(0.001, self._received, Hello("gateway"))

    def to_gateway(self, message: ToGateway) -> bool:
        """False if there is no connection any more."""
        if not self.alive:
            return False
        self._back.send(self._gateway.cluster.delay(), self._come, message)
        return True

    def _come(self, message: ToGateway) -> None:
        if self.alive and not self.cut:
            self._gateway.after(0.0, self._gateway.received, self, message)

    def broken(self) -> None:
        """It ends and the gateway is notified. Messages on their way are lost."""
        if self.alive:
            self.alive = False
            self._server.connections.pop(self.name, None)
            if self._engine.at == self._gateway.at:
                self._gateway.after(0.002, self._gateway.disconnected, self)
            else:
                self._back.finish(0.002, self._gateway.after, 0.0, self._gateway.disconnected, self)


class GatewayProcess(Process):
    """One gateway process."""

    def __init__(self, cluster: Cluster, number: int, at: str) -> None:
        super().__init__(cluster, f"gateway {number}", at)
        self.link = EngineLink(self.name, SETTINGS, clock=self.clock)
        self.mirror: Mirror | None = None
        self.connection: Connection | None = None
        self.requests: dict[str, ClientRequest] = {}
        self._target: Target | None = None
        self._ping_at = self._retry_at = 0.0
        self._answering = 0  # token of the engine that sent the last message
        self.after(self.random.uniform(0.0, 0.05), self._tick)

    def turn(self) -> None:
        """Follow the engine's token, and keep one connection to the engine that holds it."""
        try:
            if self.mirror is None:
                self.mirror = Mirror(self.client, self.cluster.keys.cluster, clock=self.clock, background=False)
            self.client.follow(self.mirror)
            self.link.on_state(self.mirror.state())
        except StoreUnavailable:
            return
        if self.link._target != self._target:
            self._disconnect()
            self._target = self.link._target
        self._connect()

    def _connect(self) -> None:
        target, now = self._target, self.clock.now
        server = self.cluster.servers.get(target.address) if target is not None else None
        if self.connection is None and server is not None and now >= self._retry_at:
            engine = server._process
            if not self.cluster.network.connected(self.at, engine.at):
                return
            self.connection = Connection(self, server, engine, self.cluster.next_pid())
            self.link._last_message_at = now
            self.link._socket = cast(Any, self.connection)
            self._ping_at = now

    def received(self, connection: Connection, message: ToGateway) -> None:
        """A message has arrived. Which ones count, the link decides; the clients' check goes by what it says itself."""
        if connection is self.connection and self._target is not None:
            self._answering = message.engine_token
            self.link._receive(message, self._target)

    def disconnected(self, connection: Connection) -> None:
        if connection is self.connection:
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None and self._target is not None:
            connection.alive = False
            connection._server.connections.pop(connection.name, None)
            self.link._detach(self._target)
            self._retry_at = self.clock.now + RECONNECT_S

    def reset(self) -> bool:
        """Break the connection; whether there was one."""
        if self.connection is None:
            return False
        self.connection.broken()
        return True

    # --- clients

    def submit(self, name: str, prompt: list[int], max_tokens: int) -> None:
        request = Request(id=name, prompt=prompt, sampling=Sampling(), max_tokens=max_tokens)
        submit = request.submission()
        found = ClientRequest(
            submit, oracle(submit), on_token=self.cluster.count_tokens, clock=self.clock, asked_at=self.clock.now,
            patience_s=self.cluster.config.coverage_deadline_s, served_now=lambda: self._answering,
        )  # fmt: skip
        self.requests[name] = self.cluster.requests[name] = found
        self.link.open(cast(Any, found), [request])

    def abort(self, name: str) -> None:
        self.requests[name].ended = "aborted"
        self.link.close(name)

    @property
    def open(self) -> list[str]:
        return [name for name, ask in self.requests.items() if not ask.ended]

    def die(self) -> None:
        """Its streams end with it; nothing else is promised."""
        if self.alive:
            super().die()
            for name in self.open:
                self.requests[name].ended = "broken"
            if self.connection is not None:
                self.connection.alive = False
                self.connection._server.connections.pop(self.connection.name, None)

    def _tick(self) -> None:
        self.turn()
        now = self.clock.now
        if self.connection is not None and now >= self._ping_at:
            self._ping_at = now + PING_S
            if now - self.link._last_message_at >= SETTINGS.silence_s:
                self._disconnect()
            else:
                self.link._send(Hello(self.name))
        self.link.expire(now)
        self.after(TICK_S, self._tick)

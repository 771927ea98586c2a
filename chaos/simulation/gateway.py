"""A gateway with the shipped link and journal, its connections to engines, and clients who compare with the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import msgspec

from chaos.simulation.laws import require
from chaos.simulation.process import Process
from chaos.simulation.ranks import oracle
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
class Ask:
    """A client's request, and what it got."""

    submit: Submit
    expected: tuple[list[int], str]
    tokens: list[int] = field(default_factory=list)
    ended: str = ""
    on_token: Any = None
    clock: Any = None
    asked_at: float = 0.0
    patience_s: float = 0.0  # nobody may refuse it sooner

    def deliver(self, request_id: str, news: Delta | RequestError) -> None:
        """Called by the link."""
        require(not self.ended, f"request {request_id} goes on after its end")
        if isinstance(news, RequestError):
            require(news.status == 503, f"request {request_id} ended with {news.status}: {news}")
            waited_s = self.clock() - self.asked_at
            require(waited_s >= self.patience_s, f"request {request_id} was refused after {waited_s:.1f} s: {news}")
            self.ended = "refused"
            return
        self.tokens += news.tokens
        self.on_token(len(news.tokens))
        right = self.expected[0][: len(self.tokens)] == self.tokens
        require(right, f"request {request_id} was altered: {self.tokens}, not {self.expected[0]}")
        if news.finish_reason:
            self.ended = news.finish_reason
            got = (self.tokens, self.ended)
            require(got == self.expected, f"request {request_id} ended as {got}, not {self.expected}")


class Connection:
    """One connection of a gateway to an engine. A message arrives late, in order, or not at all."""

    def __init__(self, gateway: GatewayProcess, server: SimServer, engine: EngineProcess, number: int) -> None:
        self.name = b"c%d" % number
        self.alive, self.cut = True, False
        self._gateway, self._server, self._engine = gateway, server, engine
        self._there = self._back = 0.0
        server.connections[self.name] = self

    def send(self, data: bytes) -> Connection:
        """As a socket does; returns what has a callback."""
        self._there = max(self._there, self._gateway.clock.now + self._gateway.cluster.delay())
        self._gateway.clock.after(self._there - self._gateway.clock.now, self._arrive, _decoder.decode(data))
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
        """The engine begins to serve: what has waited is the gateway's greeting."""
        self._engine.after(0.001, self._received, Hello("gateway"))

    def to_gateway(self, message: ToGateway) -> bool:
        """False if there is no connection any more."""
        if not self.alive:
            return False
        self._back = max(self._back, self._gateway.clock.now + self._gateway.cluster.delay())
        self._gateway.clock.after(self._back - self._gateway.clock.now, self._come, message)
        return True

    def _come(self, message: ToGateway) -> None:
        if self.alive and not self.cut:
            self._gateway.after(0.0, self._gateway.heard, self, message)

    def broken(self) -> None:
        """It ends, and the gateway is told; what was on its way is lost."""
        if self.alive:
            self.alive = False
            self._server.connections.pop(self.name, None)
            self._gateway.after(0.002, self._gateway.disconnected, self)


class GatewayProcess(Process):
    """One gateway process."""

    def __init__(self, cluster: Cluster, life: int) -> None:
        super().__init__(cluster, f"gateway {life}")
        self.link = EngineLink(self.name, SETTINGS, clock=self.clock)
        self.mirror: Mirror | None = None
        self.connection: Connection | None = None
        self.asks: dict[str, Ask] = {}
        self._target: Target | None = None
        self._ping_at = self._retry_at = 0.0
        self.after(self.random.uniform(0.0, 0.05), self._tick)

    def turn(self) -> None:
        """Follow the token; keep one connection to who holds it."""
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
            self.connection = Connection(self, server, engine, self.cluster.next_pid())
            self.link._last_message_at = now
            self.link._socket = cast(Any, self.connection)
            self._ping_at = now

    def heard(self, connection: Connection, message: ToGateway) -> None:
        """Something has arrived; what comes from others than our engine says nothing."""
        if connection is self.connection and self._target is not None and message.engine_token == self._target.token:
            self.link._last_message_at = self.clock.now
            self.link._handle(message)

    def disconnected(self, connection: Connection) -> None:
        """Our socket says so."""
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
        """The connection breaks; whether there was one."""
        there = self.connection is not None
        if self.connection is not None:
            self.connection.broken()
        return there

    # --- clients

    def ask(self, name: str, prompt: list[int], max_tokens: int) -> bool:
        """A client asks for something; False if it is turned away, as a full or leaving gateway does."""
        request = Request(id=name, prompt=prompt, sampling=Sampling(), max_tokens=max_tokens)
        submit = request.submission()
        found = Ask(
            submit, oracle(submit), on_token=self.cluster.count_tokens, clock=self.clock, asked_at=self.clock.now,
            patience_s=self.cluster.config.coverage_deadline_s,
        )  # fmt: skip
        self.asks[name] = self.cluster.asks[name] = found
        self.link.open(cast(Any, found), [request])
        return True

    def abort(self, name: str) -> None:
        """The client goes away."""
        self.asks[name].ended = "aborted"
        self.link.close(name)

    @property
    def open(self) -> list[str]:
        """Requests that have not ended."""
        return [name for name, ask in self.asks.items() if not ask.ended]

    def die(self) -> None:
        """The streams that it was serving end (this is not promised otherwise)."""
        if self.alive:
            super().die()
            for name in self.open:
                self.asks[name].ended = "broken"
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

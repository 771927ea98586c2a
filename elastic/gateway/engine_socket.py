"""A connection to an engine's socket, over which nothing is sent or believed before its owner is known.

A gateway sends prompts over it and hands on what comes back. On this host the process at the other end must be of our
user: the directory of the socket says so before, the kernel's credentials of the connection afterwards. On another
host it must have the join secret: the keys of the connection (CURVE) say so.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from membership.base.errors import ConfigError
from membership.base.network import Network
from membership.base.run_dir import entered
from membership.store.records import EngineRecord
from workers.ipc.peer import Peer
from workers.queue.curve import use_curve
from workers.queue.endpoints import connect
from workers.queue.handle import this_host
from workers.queue.network import Purpose, connecting_keys, same_secret

SCHEME = "ipc://"
RECONNECT_MS, RECONNECT_MAX_MS = 20, 500  # while the engine does not listen yet
REFUSED = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


@dataclass(frozen=True)
class EngineSocket:
    """Made by `engine_socket`: to an engine on this host."""

    EVENTS: ClassVar = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED

    socket: zmq.asyncio.Socket
    _monitor: Any

    async def connected(self) -> None:
        """Until there is a connection. ConfigError if the process at the other end must not be talked to."""
        event = await recv_monitor_message(self._monitor)
        with socket.socket(fileno=os.dup(event["value"])) as connection:
            if refusal := Peer.of(connection).refusal():
                raise ConfigError(refusal)

    async def disconnected(self) -> None:
        """Until the connection has ended."""
        await recv_monitor_message(self._monitor)


@dataclass(frozen=True)
class FarSocket(EngineSocket):
    """To an engine on another host."""

    EVENTS: ClassVar = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | REFUSED

    _address: str

    async def connected(self) -> None:
        while True:
            event = (await recv_monitor_message(self._monitor))["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return
            if event & REFUSED:
                raise ConfigError(
                    f"what listens at {self._address} shook no hands: it has just ended, or has another join secret"
                )


def is_near(engine: EngineRecord) -> bool:
    """Whether it is on this host, where it is reached by its Unix socket."""
    return engine.host in ("", this_host())


@contextmanager
def engine_socket(
    context: zmq.asyncio.Context, engine: EngineRecord, routing_id: bytes, network: Network | None = None
) -> Iterator[EngineSocket]:
    """Connect to an engine. ConfigError: its socket is not in a directory of our user, and of ours alone; or it is on
    another host, and one of us has no network, or another join secret.
    """
    with ExitStack() as opened:
        dealer = context.socket(zmq.DEALER)
        opened.callback(dealer.close, linger=0)
        dealer.set(zmq.ROUTING_ID, routing_id)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            dealer.set(option, 0)
        dealer.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        dealer.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        near = is_near(engine)
        monitor: Any = dealer.get_monitor_socket(EngineSocket.EVENTS if near else FarSocket.EVENTS)
        opened.callback(monitor.close, linger=0)
        opened.callback(_stop_monitor, dealer)
        if near:
            path = _socket_path(engine.address)
            inside = opened.enter_context(entered(path.parent))
            dealer.connect(f"{SCHEME}{inside / path.name}")
            yield EngineSocket(dealer, monitor)
        else:
            _use_keys(dealer, engine, network)
            connect(dealer, engine.remote)
            yield FarSocket(dealer, monitor, engine.remote)


def _socket_path(address: str) -> Path:
    path = Path(address.removeprefix(SCHEME))
    if not address.startswith(SCHEME) or not path.is_absolute():
        raise ConfigError(f"the engine's address {address!r} is no socket of this host")
    return path


def _use_keys(dealer: zmq.asyncio.Socket, engine: EngineRecord, network: Network | None) -> None:
    if network is None or not engine.remote:
        whose = "this gateway" if network is None else "it"
        raise ConfigError(
            f"the engine is on another host ({engine.node}), and {whose} runs without --advertise",
            hint="start the roles on both hosts with --advertise and the same join secret",
        )
    theirs = same_secret(engine.remote_key, network, Purpose.GATEWAYS)
    use_curve(dealer, connecting_keys(theirs, Purpose.GATEWAYS), engine.remote_key)


def _stop_monitor(dealer: zmq.asyncio.Socket) -> None:
    with suppress(zmq.ZMQError):
        dealer.disable_monitor()

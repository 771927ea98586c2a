"""A connection to an engine's socket, over which nothing is sent or believed before its owner is known.

A gateway sends prompts over it and hands on what comes back, so the process at the other end must be of our user: the
directory of the socket says so before, the kernel's credentials of the connection afterwards.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from membership.base.errors import ConfigError
from membership.base.run_dir import entered
from workers.ipc.peer import Peer

SCHEME = "ipc://"
RECONNECT_MS, RECONNECT_MAX_MS = 20, 500  # while the engine does not listen yet


@dataclass(frozen=True)
class EngineSocket:
    """Made by `engine_socket`."""

    socket: zmq.asyncio.Socket
    _monitor: Any

    async def connected(self) -> None:
        """Until there is a connection. ConfigError if the process at the other end is of another user."""
        event = await recv_monitor_message(self._monitor)
        with socket.socket(fileno=os.dup(event["value"])) as connection:
            if refusal := Peer.of(connection).refusal():
                raise ConfigError(refusal)

    async def disconnected(self) -> None:
        """Until the connection has ended."""
        await recv_monitor_message(self._monitor)


@contextmanager
def engine_socket(context: zmq.asyncio.Context, address: str, routing_id: bytes) -> Iterator[EngineSocket]:
    """Connect to an engine. ConfigError if its socket is not in a directory of our user, and of ours alone."""
    with ExitStack() as opened:
        path = Path(address.removeprefix(SCHEME))
        if not address.startswith(SCHEME) or not path.is_absolute():
            raise ConfigError(f"the engine's address {address!r} is no socket of this host")
        inside = opened.enter_context(entered(path.parent))
        dealer = context.socket(zmq.DEALER)
        opened.callback(dealer.close, linger=0)
        dealer.set(zmq.ROUTING_ID, routing_id)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            dealer.set(option, 0)
        dealer.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        dealer.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        monitor: Any = dealer.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        opened.callback(monitor.close, linger=0)
        opened.callback(_stop_monitor, dealer)
        dealer.connect(f"{SCHEME}{inside / path.name}")
        yield EngineSocket(dealer, monitor)


def _stop_monitor(dealer: zmq.asyncio.Socket) -> None:
    with suppress(zmq.ZMQError):
        dealer.disable_monitor()

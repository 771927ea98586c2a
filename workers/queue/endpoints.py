"""Listening for other hosts, and connecting to them: IPv4 and IPv6, at any port or at one of a range."""

from __future__ import annotations

import os
from typing import Any

import zmq

from membership.base.errors import ConfigError
from membership.base.network import ANY_PORT, Ports, bracketed


def listen_for_hosts(socket: zmq.Socket[Any], address: str, ports: Ports = ANY_PORT) -> str:
    """Bind at this address; the endpoint that others connect to. ConfigError if no port of the range is free."""
    host = bracketed(address)
    _prepare(socket, host)
    for port in in_turn(ports):
        try:
            socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise
        else:
            return f"tcp://{host}:{socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(':')[2]}"
    raise ConfigError(
        f"no port of --port-range {ports} is free at {address}",
        hint="three for each engine, standbys too, and each agent, eight for each rank are enough (docs/HOSTS.md)",
    )


def connect(socket: zmq.Socket[Any], endpoint: str) -> None:
    """Connect to what `listen_for_hosts` returned elsewhere."""
    _prepare(socket, endpoint)
    socket.connect(endpoint)


def in_turn(ports: Ports) -> list[int]:
    """The ports to try. Each process begins elsewhere: the port of one that has just ended is not taken at once."""
    start, count = os.getpid(), ports.last - ports.first + 1
    return [ports.first + (start + each) % count for each in range(count)]


def _prepare(socket: zmq.Socket[Any], where: str) -> None:
    """ZeroMQ knows no IPv6 address unless it is asked to; a name means an IPv4 address then as before."""
    if "[" in where:
        socket.setsockopt(zmq.IPV6, 1)

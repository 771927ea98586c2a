"""What a host's processes listen with, and what a host without the join secret gets from there.

By the kernel's table of its network namespace, not by what processes say.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from chaos.target.hosts import Hosts
from membership.store.records import ClusterState
from workers.protocol.exchange_handle import AutoHandle, TcpHandle
from workers.queue.handle import Handle

ANSWER_S = 30.0  # strangers are hung up on after 5 s at the latest
ROW = re.compile(r"^(tcp|udp) .* (\S+):(\d+) +\S+:\* +users:\((.*)\)")
GREETING_BYTES, MECHANISM = 64, slice(12, 32)  # of ZeroMQ's first message


class Open(NamedTuple):
    """One socket."""

    protocol: str
    address: str
    port: int
    pids: frozenset[int]


def listening(hosts: Hosts, host: str) -> list[Open]:
    """All that are open there, to whichever process they belong."""
    table = subprocess.run(
        hosts.command(host, "ss", "-Htulnp"), capture_output=True, text=True, timeout=30, check=True
    ).stdout
    found = [ROW.match(re.sub(r" +", " ", line)) for line in table.splitlines()]
    assert all(found), f"no processes in {table}"
    return [Open(m[1], m[2], int(m[3]), frozenset(map(int, re.findall(r"pid=(\d+)", m[4])))) for m in found if m]


def role_of(pid: int) -> str:
    """The command that it runs, or "rank"."""
    words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").replace("\0", " ").split()
    if "elastic.cli" in words:
        return words[words.index("elastic.cli") + 1]
    return "rank" if "Worker" in words[0] else words[0]


def said_to_a_stranger(where: Open) -> bytes:
    """All bytes that it sends to one that speaks ZeroMQ without encryption, until it hangs up."""
    hello = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    ready = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
    said = b""
    with socket.create_connection((where.address, where.port), timeout=ANSWER_S) as made:
        try:
            made.sendall(hello + ready)
            while more := made.recv(4096):
                said += more
        except ConnectionResetError:  # it left some of it unread
            pass
    return said


def is_greeting(said: bytes) -> bool:
    """Nothing, or that it speaks ZeroMQ and, if it came to that before it hung up, that it wants CURVE."""
    if len(said) == GREETING_BYTES and said[MECHANISM].rstrip(b"\0") != b"CURVE":
        return False
    return not said or (len(said) <= GREETING_BYTES and (said[:1], said[9:10]) == (b"\xff", b"\x7f"))


def known_by_the_store(state: ClusterState) -> dict[str, bytes]:
    """Endpoints of all hosts, with their public keys: who reads etcd has these without the secret."""
    found: dict[str, bytes] = {}
    for handle in _queues(state):
        found[handle.remote] = handle.remote_key
    if state.engine is not None:
        found[state.engine.remote] = state.engine.remote_key
    for agent in state.agents.values():
        found[agent.weights_at] = agent.weights_key.encode()
    for rank in state.ranks.values():
        tcp = msgspec.msgpack.decode(msgspec.msgpack.decode(rank.exchange_handle, type=AutoHandle).tcp, type=TcpHandle)
        found[tcp.address] = tcp.key
    return {endpoint: key for endpoint, key in found.items() if endpoint}


def _queues(state: ClusterState) -> Iterator[Handle]:
    if state.engine is not None:
        yield Handle.decode(state.engine.broadcast_handle)
    yield from (Handle.decode(agent.notices) for agent in state.agents.values())
    yield from (Handle.decode(rank.response_handle) for rank in state.ranks.values())


def handshake(endpoint: str, server_key: bytes, keys: tuple[bytes, bytes]) -> zmq.Event:
    """How the handshake of one with these keys (public, secret) ends."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.curve_serverkey, (dealer.curve_publickey, dealer.curve_secretkey) = server_key, keys
        ends = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        monitor = dealer.get_monitor_socket(ends | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
        dealer.connect(endpoint)
        assert monitor.poll(ANSWER_S * 1000), f"{endpoint}: no end of the handshake"
        event: zmq.Event = recv_monitor_message(monitor)["event"]
        dealer.disable_monitor()
        return event


def asked_as_a_stranger(among: list[Open]) -> dict[Open, bytes]:
    """What each of these says, all of them at once."""
    with ThreadPoolExecutor(len(among)) as pool:
        return dict(zip(among, pool.map(said_to_a_stranger, among), strict=True))

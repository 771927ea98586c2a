"""The other host's side of benchmarks/hosts.py: it answers, each way in a process of its own.

python -m benchmarks.hosts_peer WAY OUR_ADDRESS ARGUMENT
"""

from __future__ import annotations

import select
import socket
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import zmq
from torch import Tensor

from membership.base.logs import configure
from membership.base.network import Network
from membership.base.rank_id import RankId
from membership.base.starter import end_with_starter
from membership.store.records import Member, Placement, View
from workers.exchange.loop import Exchange
from workers.exchange.tcp.transport import TcpTransport
from workers.ipc.doorbell import Doorbell
from workers.queue.handle import Handle
from workers.queue.message_queue import MessageQueue, MsgpackCodec
from workers.queue.network import keys_for, remote_of
from workers.queue.sealed import SealedSocket

HIDDEN, ROWS, TOP_K, EXPERTS = 1024, 32, 2, 16
ROW_BYTES = 2 * HIDDEN
ASKED, ANSWERED = ROWS * ROW_BYTES, ROWS * TOP_K * ROW_BYTES
SMALL = bytes(200)
WAIT_S = 60.0
PLACEMENT: Placement = {0: ((),), 1: (tuple(range(EXPERTS)),)}
VIEW = View(
    epoch=1,
    members=tuple(Member(rank=rank, node=str(rank), incarnation=rank + 1) for rank in PLACEMENT),
    placement=PLACEMENT,
)


def network(address: str) -> Network:
    """This host among both."""
    return Network(address, "bench", b"a secret of both sides of the benchmark")


class Identity:
    """Experts that cost nothing."""

    def __init__(self, held: Sequence[int]) -> None:
        self._held = frozenset(held)

    def holds(self, layer: int, expert: int) -> bool:
        return expert in self._held

    def padded(self, rows: int) -> int:
        return rows

    def compute_many(self, layer: int, experts: Sequence[int], sizes: Sequence[int], rows: Tensor) -> Tensor:
        return rows


class Rank:
    """One of two: rank 0 has no expert, so that all of its rows travel; rank 1 has all."""

    def __init__(self, rank: int, address: str) -> None:
        self.bell = Doorbell()
        opener = partial(TcpTransport, network=network(address))
        bank = Identity(PLACEMENT[rank][0])
        self.exchange = Exchange(RankId(rank, rank + 1), bank, self.bell, opener, answer_timeout_s=WAIT_S)

    def link(self, peer: RankId, handle: bytes) -> None:
        """With the other one."""
        self.exchange.connect({peer: handle}, WAIT_S)

    def close(self) -> None:
        """Its links, and the thread that waits for rings."""
        self.exchange.close()
        self.bell.close()


def say(text: str) -> None:
    """To the parent."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def exchange(address: str, handle: str) -> None:
    """Rank 1."""
    rank = Rank(1, address)
    say(rank.exchange.handle().hex())
    rank.link(RankId(0, 1), bytes.fromhex(handle))
    while True:
        rank.bell.wait(rank.exchange.pending, WAIT_S)
        rank.exchange.serve()


def echo(address: str, sizes: str) -> None:
    """Bare TCP: so many bytes are asked, and so many answered."""
    nbytes, answered = map(int, sizes.split())
    with socket.create_server((address, 0)) as server:
        say(str(server.getsockname()[1]))
        connection, _peer = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked, answer = memoryview(bytearray(nbytes)), bytes(answered)
        while take(connection, asked):
            connection.sendall(answer)


def take(connection: socket.socket, into: memoryview) -> bool:
    """Fill it; False at the end."""
    got = 0
    while got < len(into):
        count = connection.recv_into(into[got:])
        if not count:
            return False
        got += count
    return True


def sealed(address: str, keys: str) -> None:
    """The same, encrypted."""
    with socket.create_server((address, 0)) as server:
        say(str(server.getsockname()[1]))
        connection = SealedSocket(server.accept()[0], bytes.fromhex(keys), connects=False)
        answer = memoryview(bytes(ANSWERED))
        while True:
            take_sealed(connection)
            send_sealed(connection, answer)


def send_sealed(connection: SealedSocket, data: memoryview) -> None:
    """All of it."""
    done = connection.send(b"", [data])
    while not done:
        select.select([], [connection], [], WAIT_S)
        done = connection.flush()


def take_sealed(connection: SealedSocket) -> None:
    """One message."""
    while not connection.take():
        select.select([connection], [], [], WAIT_S)


def gloo(address: str, rounds: str) -> None:
    """`all_to_all_single` of the same bytes, in lockstep with the other side."""
    with socket.create_server((address, 0)) as free:
        port = free.getsockname()[1]
    say(str(port))
    with closing(GlooCall(0, address, port)) as call:
        for _ in range(int(rounds)):
            call()


class GlooCall:
    """Rows from rank 1 to rank 0, and its answers back. Rank 0 has the store in which both meet."""

    def __init__(self, rank: int, address: str, port: int) -> None:
        dist.init_process_group("gloo", init_method=f"tcp://{address}:{port}", rank=rank, world_size=2)
        self.rows, self.answers = (torch.zeros(count, HIDDEN, dtype=torch.bfloat16) for count in (ROWS, ROWS * TOP_K))
        self.none = torch.zeros(0, HIDDEN, dtype=torch.bfloat16)
        self.answers_here = rank == 0

    def __call__(self) -> None:
        if self.answers_here:
            dist.all_to_all_single(self.rows, self.none, [0, ROWS], [0, 0])
            dist.all_to_all_single(self.none, self.answers, [0, 0], [0, ROWS * TOP_K])
        else:
            dist.all_to_all_single(self.none, self.rows, [0, 0], [ROWS, 0])
            dist.all_to_all_single(self.answers, self.none, [ROWS * TOP_K, 0], [0, 0])

    def close(self) -> None:
        """Join gloo's threads: C++ ends a process that lets go of one which runs (`std::terminate`)."""
        dist.destroy_process_group()


def queue(address: str, handle: str) -> None:
    """A rank's queues: steps in, answers out. Without an address it is on the same host."""
    steps = Handle.decode(bytes.fromhex(handle))
    codec = MsgpackCodec(bytes)
    remote = remote_of(network(address)) if address else None
    with MessageQueue("answers", codec, remote=remote) as answers:
        say(answers.export_handle().encode().hex())
        keys = keys_for(steps, network(address))
        with MessageQueue.create_from_handle(steps, "far", None, WAIT_S, codec, keys) as reader:
            while True:
                reader.dequeue(WAIT_S)
                answers.enqueue(SMALL)


def ping(address: str, _: str) -> None:
    """Bare ZeroMQ: ROUTER."""
    router = zmq.Context.instance().socket(zmq.ROUTER)
    say(str(router.bind_to_random_port(f"tcp://{address}")))
    while True:
        route, *_rest = router.recv_multipart()
        router.send_multipart([route, SMALL])


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Rows, experts and weights of rank 0."""
    g = torch.Generator().manual_seed(0)
    ids = torch.rand(ROWS, EXPERTS, generator=g).argsort(dim=1)[:, :TOP_K]
    return torch.randn(ROWS, HIDDEN, generator=g).bfloat16(), ids, torch.rand(ROWS, TOP_K, generator=g)


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """p50 and p99 in microseconds."""
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e6
    return round(float(p50), 1), round(float(p99), 1)


if __name__ == "__main__":
    configure("benchmark")  # stdout is for the parent
    end_with_starter()
    torch.set_num_threads(1)
    {"exchange": exchange, "echo": echo, "sealed": sealed, "gloo": gloo, "queue": queue, "ping": ping}[sys.argv[1]](
        *sys.argv[2:]
    )

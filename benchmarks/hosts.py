"""Two hosts (network namespaces of this machine): what steps and rows cost between them, beside bare sockets.

    python -m benchmarks.hosts [--rounds 300] [--decode 3] [--weights 2.8 --rate 1gbit] [--faults 20] [-o json]

Each way answers from a process in the other namespace; the ways take turns in one run. `rows`: dispatch + combine of 32
rows, top-2, hidden 1024, against bare TCP and gloo's all_to_all with the same bytes (which encrypt nothing), and
`sealed`: TCP, encrypted as rows are. `step`: 200 bytes to a rank and back over our queues, against a bare ZeroMQ DEALER
and ROUTER, bare TCP (`small`) and (`shm`) the queues of one host: `cpu_us` is processor time of both ends per round.
Each host has half of the processors for itself: a kernel that may choose puts both ends on one core as it likes, and
then a packet costs half as much.
`--decode N`: N rounds of eight streams on 2 hosts x 2 ranks and on 1 host x 4 ranks. `--weights GB`: see
benchmarks/hosts_weights.py. `--faults N`: N deaths of a rank, and a sixth as many of a host and of its cable; see
benchmarks/hosts_faults.py. It takes root.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import zmq

from benchmarks import hosts_faults, hosts_weights
from benchmarks.hosts_cluster import two_hosts
from benchmarks.hosts_peer import (
    ANSWERED,
    ASKED,
    SMALL,
    VIEW,
    WAIT_S,
    GlooCall,
    Rank,
    inputs,
    network,
    percentiles,
    send_sealed,
    take,
    take_sealed,
)
from benchmarks.mq import cpu_ns
from chaos.target.checkpoint import checkpoint
from chaos.target.cluster import Cluster, ServedCluster
from chaos.target.hosts import Hosts, made_hosts
from chaos.workload.streams import Load, Workload
from membership.base import starter
from membership.base.logs import configure
from membership.base.rank_id import RankId
from workers.exchange.model_side import StepContext
from workers.ipc.doorbell import Doorbell
from workers.queue.handle import Handle, Remote
from workers.queue.message_queue import MessageQueue, MsgpackCodec
from workers.queue.network import keys_for, remote_of
from workers.queue.sealed import SealedSocket, new_keys

TURNS = 6  # the first one warms up
GLOO_SHARE = 5  # gloo does that many times fewer rounds
LOAD = Load(streams=8, max_tokens=64, prompts=8)
Call = Callable[[], object]
Table = dict[str, dict[str, float]]


class Ways:
    """All ways to the other host, opened from ours."""

    def __init__(self, hosts: Hosts, rounds: int, cores: set[int], opened: ExitStack) -> None:
        """`cores`: those of the other ends."""
        self.hosts, self.rounds, self.cores, self.opened = hosts, rounds, cores, opened
        self.there, self.here = hosts.addresses["b"], hosts.outside
        self.peers = dict[str, int]()  # way -> process at its other end, where its processor time counts

    def peer(self, way: str, argument: str = "", *, near: bool = False) -> tuple[subprocess.Popen[str], str]:
        """Its process there, or on our host, and the line that it says first."""
        command = [sys.executable, "-m", "benchmarks.hosts_peer", way, "" if near else self.there, argument]
        command = command if near else self.hosts.command("b", *command)
        environ = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", starter.ENV: starter.named()}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=environ)
        self.opened.callback(_end, process)
        os.sched_setaffinity(process.pid, self.cores)  # before it has started: what it starts inherits that
        return process, (process.stdout.readline() if process.stdout else "").strip()

    def spent_s(self, way: str) -> float:
        """Processor time so far of our process and of the one at the other end; 0 where it does not count."""
        pids = [os.getpid(), self.peers[way]] if way in self.peers else []
        return cpu_ns(pids) / 1e9

    def rows(self) -> Call:
        """Our exchange."""
        rank = Rank(0, self.here)
        self.opened.callback(rank.close)
        _, handle = self.peer("exchange", rank.exchange.handle().hex())
        rank.link(RankId(1, 2), bytes.fromhex(handle))
        tensors, step = inputs(), StepContext(VIEW, 1, 1, 1)

        def call() -> None:
            rank.exchange.begin_step(step)
            rank.exchange.dispatch_combine(0, *tensors)

        return call

    def tcp(self) -> Call:
        """The same bytes over a bare socket."""
        return self.bare("tcp", ASKED, ANSWERED)

    def small(self) -> Call:
        """The bytes of a step, and of its answer."""
        return self.bare("small", len(SMALL), len(SMALL))

    def bare(self, way: str, nbytes: int, answered: int) -> Call:
        """There and back; both ends sleep in `recv`."""
        process, port = self.peer("echo", f"{nbytes} {answered}")
        self.peers[way] = process.pid
        connection = self.opened.enter_context(socket.create_connection((self.there, int(port)), timeout=WAIT_S))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked, answer = bytes(nbytes), memoryview(bytearray(answered))

        def call() -> None:
            connection.sendall(asked)
            take(connection, answer)

        return call

    def sealed(self) -> Call:
        """The same bytes over a bare socket, encrypted as rows are."""
        keys = new_keys()
        _, port = self.peer("sealed", keys.hex())
        bare = socket.create_connection((self.there, int(port)), timeout=WAIT_S)
        connection = SealedSocket(bare, keys, connects=True)
        self.opened.callback(connection.close)
        asked = memoryview(bytes(ASKED))

        def call() -> None:
            send_sealed(connection, asked)
            take_sealed(connection)

        return call

    def gloo(self) -> Call:
        """And by collectives."""
        _, port = self.peer("gloo", str(TURNS * self.gloo_rounds))
        call = GlooCall(1, self.there, int(port))
        self.opened.callback(call.close)
        return call

    @property
    def gloo_rounds(self) -> int:
        """Per turn."""
        return max(1, self.rounds // GLOO_SHARE)

    def step(self) -> Call:
        """Our queues between the hosts: one of steps, one of answers."""
        return self.queues("step", remote_of(network(self.here)))

    def shm(self) -> Call:
        """The same queues on one host."""
        return self.queues("shm", None)

    def queues(self, way: str, remote: Remote | None) -> Call:
        """Both ends; the process at the other end counts with ours."""
        codec = MsgpackCodec(bytes)
        steps = self.opened.enter_context(MessageQueue("steps", codec, remote=remote))
        process, text = self.peer("queue", steps.export_handle().encode().hex(), near=remote is None)
        self.peers[way] = process.pid
        handle, bell = Handle.decode(bytes.fromhex(text)), Doorbell()
        self.opened.callback(bell.close)
        keys = keys_for(handle, network(self.here))
        answers = MessageQueue.create_from_handle(handle, "near", bell, WAIT_S, codec, keys)
        self.opened.callback(answers.shutdown)
        steps.wait_until_ready(["far"], WAIT_S)

        def call() -> None:
            steps.enqueue(SMALL)
            answers.dequeue(WAIT_S)

        return call

    def ping(self) -> Call:
        """Bare ZeroMQ."""
        _, port = self.peer("ping")
        dealer = zmq.Context.instance().socket(zmq.DEALER)
        self.opened.callback(dealer.close, linger=0)
        dealer.connect(f"tcp://{self.there}:{port}")

        def call() -> None:
            dealer.send(SMALL)
            dealer.recv()

        return call


def race(ways: Ways) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each call, by way; and seconds of processor per call, of both ends, of those where it counts."""
    rounds = ways.rounds
    contenders = {
        "rows": (ways.rows(), rounds), "tcp": (ways.tcp(), rounds), "sealed": (ways.sealed(), rounds),
        "gloo": (ways.gloo(), ways.gloo_rounds),
        "step": (ways.step(), rounds), "ping": (ways.ping(), rounds), "small": (ways.small(), rounds),
        "shm": (ways.shm(), rounds),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in contenders}
    spent = dict.fromkeys(ways.peers, 0.0)
    for turn in range(TURNS):
        for name, (call, count) in contenders.items():
            before = ways.spent_s(name)
            for _ in range(count):
                begun = time.perf_counter()
                call()
                if turn:
                    found[name].append(time.perf_counter() - begun)
            if turn and name in spent:
                spent[name] += ways.spent_s(name) - before
    return found, {name: each / len(found[name]) for name, each in spent.items()}


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=WAIT_S)


@contextmanager
def clusters(folder: Path) -> Iterator[dict[str, Cluster]]:
    """Both at once; each rests while the other works."""
    model = checkpoint(None, folder)
    with ExitStack() as opened:
        two = two_hosts(model, folder, opened)
        one = opened.enter_context(ServedCluster(model, 4, state_dir=folder / "one"))
        for cluster in (two, one):
            cluster.wait_serving(4, 300.0)
        yield {"two hosts": two, "one host": one}


def decode(rounds: int) -> dict[str, float]:
    """Tokens per second of eight streams, the median of the rounds."""
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="elastic-ep-bench-") as folder, clusters(Path(folder)) as both:
        for turn in range(rounds + 1):
            for name, cluster in both.items():
                begun = time.perf_counter()
                records = Workload(cluster.url, cluster.model_name(), LOAD).run_once()
                if turn:
                    tokens = sum(len(record.tokens) for record in records)
                    speeds.setdefault(name, []).append(tokens / (time.perf_counter() - begun))
    return {name: round(sorted(found)[len(found) // 2], 1) for name, found in speeds.items()}


def report(times: dict[str, list[float]], spent: dict[str, float]) -> Table:
    """A row per way, and the ratios."""
    found: Table = {
        name: dict(zip(("p50_us", "p99_us"), percentiles(each), strict=True)) for name, each in times.items()
    }
    p50 = {name: row["p50_us"] for name, row in found.items()}
    for name, each in spent.items():
        found[name]["cpu_us"] = round(each * 1e6, 1)
    found["ratios (p50)"] = {
        "rows over tcp": round(p50["rows"] / p50["tcp"], 2),
        "rows over sealed": round(p50["rows"] / p50["sealed"], 2),
        "gloo over rows": round(p50["gloo"] / p50["rows"], 2),
        "step over ping": round(p50["step"] / p50["ping"], 2),
        "step over small": round(p50["step"] / p50["small"], 2),
    }
    found["ratios (cpu)"] = {f"{way} over shm": round(spent[way] / spent["shm"], 2) for way in ("step", "small")}
    return found


@contextmanager
def halved() -> Iterator[set[int]]:
    """This process keeps to half of its processors meanwhile; the other half. All of them, where there is one."""
    every = os.sched_getaffinity(0)
    ours = set(sorted(every)[: max(1, len(every) // 2)])
    os.sched_setaffinity(0, ours)
    try:
        yield every - ours or every
    finally:
        os.sched_setaffinity(0, every)


def decode_row(rounds: int) -> dict[str, float]:
    """Both speeds, and their ratio."""
    speeds = decode(rounds)
    return {**speeds, "ratio": round(speeds["two hosts"] / speeds["one host"], 2)}


def main() -> None:
    """Run, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="of each way, per turn; 0: none")
    parser.add_argument("--decode", type=int, default=0)
    parser.add_argument("--weights", type=float, default=0.0, metavar="GB")
    parser.add_argument("--rate", default="1gbit", help="of the link over which weights come, as tc has it")
    parser.add_argument("--faults", type=int, default=0)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    configure("benchmark")  # what is logged goes to stderr
    torch.set_num_threads(1)
    found: Table = {}
    if options.rounds:
        with ExitStack() as opened:
            hosts, cores = opened.enter_context(made_hosts("b")), opened.enter_context(halved())
            os.environ["GLOO_SOCKET_IFNAME"] = hosts.bridge
            found |= report(*race(Ways(hosts, options.rounds, cores, opened)))
    if options.decode:
        found["decode, tokens/s"] = decode_row(options.decode)
    if options.weights:
        found[f"weights, {options.rate}"] = hosts_weights.measure(options.weights, 3, options.rate)
    if options.faults:
        rare = max(1, options.faults // 6)
        found |= hosts_faults.table(hosts_faults.measure(options.faults, rare, rare))
    if options.output == "json":
        print(json.dumps(found))
        return
    for name, row in found.items():
        print(f"{name:30s}", "  ".join(f"{key} {value:g}" for key, value in row.items()))


if __name__ == "__main__":
    main()

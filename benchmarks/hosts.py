"""Two hosts (network namespaces of this machine): what steps and rows cost between them, beside bare sockets.

    python -m benchmarks.hosts [--rounds 300] [--decode 3] [-o json]

Each way answers from a process in the other namespace; the ways take turns in one run. `rows`: dispatch + combine of 32
rows, top-2, hidden 1024, against bare TCP and gloo's all_to_all with the same bytes (TCP and gloo are not encrypted).
`step`: 200 bytes to a rank and back over our queues, against a bare ZeroMQ DEALER and ROUTER. `--decode N`: N
rounds of eight streams on 2 hosts x 2 ranks and on 1 host x 4 ranks. It takes root.
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
    take,
)
from chaos.target.checkpoint import checkpoint
from chaos.target.cluster import Cluster, ServedCluster
from chaos.target.host_cluster import HostCluster
from chaos.target.hosts import Hosts, made_hosts
from chaos.workload.streams import Load, Workload
from elastic.serve.etcd_server import EtcdServer
from membership.base import starter
from membership.base.logs import configure
from membership.base.rank_id import RankId
from workers.exchange.model_side import StepContext
from workers.ipc.doorbell import Doorbell
from workers.queue.handle import Handle
from workers.queue.message_queue import MessageQueue, MsgpackCodec
from workers.queue.network import keys_for, remote_of

TURNS = 6  # the first one warms up
GLOO_SHARE = 5  # gloo does that many times fewer rounds
LOAD = Load(streams=8, max_tokens=64, prompts=8)
Call = Callable[[], object]


class Ways:
    """All ways to the other host, opened from ours."""

    def __init__(self, hosts: Hosts, rounds: int, opened: ExitStack) -> None:
        self.hosts, self.rounds, self.opened = hosts, rounds, opened
        self.there, self.here = hosts.addresses["b"], hosts.outside

    def peer(self, way: str, argument: str = "") -> tuple[subprocess.Popen[str], str]:
        """Its process there, and the line that it says first."""
        command = self.hosts.command("b", sys.executable, "-m", "benchmarks.hosts_peer", way, self.there, argument)
        environ = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", starter.ENV: starter.named()}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=environ)
        self.opened.callback(_end, process)
        return process, (process.stdout.readline() if process.stdout else "").strip()

    def rows(self) -> Call:
        """Our exchange."""
        rank = Rank(0, self.here)
        self.opened.callback(rank.exchange.close)
        _, handle = self.peer("exchange", rank.exchange.handle().hex())
        rank.link(RankId(1, 2), bytes.fromhex(handle))
        tensors, step = inputs(), StepContext(VIEW, 1, 1, 1)

        def call() -> None:
            rank.exchange.begin_step(step)
            rank.exchange.dispatch_combine(0, *tensors)

        return call

    def tcp(self) -> Call:
        """The same bytes over a bare socket."""
        _, port = self.peer("echo")
        connection = self.opened.enter_context(socket.create_connection((self.there, int(port)), timeout=WAIT_S))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked, answer = bytes(ASKED), memoryview(bytearray(ANSWERED))

        def call() -> None:
            connection.sendall(asked)
            take(connection, answer)

        return call

    def gloo(self) -> Call:
        """And by collectives."""
        _, port = self.peer("gloo", str(TURNS * self.gloo_rounds))
        return GlooCall(1, self.there, int(port))

    @property
    def gloo_rounds(self) -> int:
        """Per turn."""
        return max(1, self.rounds // GLOO_SHARE)

    def step(self) -> Call:
        """Our queues: one of steps, one of answers."""
        codec = MsgpackCodec(bytes)
        steps = self.opened.enter_context(MessageQueue("steps", codec, remote=remote_of(network(self.here))))
        _, text = self.peer("queue", steps.export_handle().encode().hex())
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


def race(ways: Ways) -> dict[str, list[float]]:
    """Seconds of each call, by way."""
    rounds = ways.rounds
    contenders = {
        "rows": (ways.rows(), rounds), "tcp": (ways.tcp(), rounds), "gloo": (ways.gloo(), ways.gloo_rounds),
        "step": (ways.step(), rounds), "ping": (ways.ping(), rounds),
    }  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(TURNS):
        for name, (call, count) in contenders.items():
            for _ in range(count):
                begun = time.perf_counter()
                call()
                if turn:
                    found[name].append(time.perf_counter() - begun)
    return found


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=WAIT_S)


@contextmanager
def clusters(folder: Path) -> Iterator[dict[str, Cluster]]:
    """Both at once; each rests while the other works."""
    model = checkpoint(None, folder)
    with ExitStack() as opened:
        hosts = opened.enter_context(made_hosts("a", "b"))
        etcd = opened.enter_context(EtcdServer(folder / "etcd", address=hosts.outside))
        two = HostCluster(hosts, etcd.url, folder, gateway="a")
        opened.callback(two.close)
        at = ("--capacity", "2", "--min-agents", "2", "--host", hosts.addresses["a"])
        two.start("a", "serve", str(model), "--ranks", "4", *at)
        while not two.secret.exists():
            two.require_alive()
            time.sleep(0.1)
        two.join("b", "agent", "--capacity", "2")
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


def report(times: dict[str, list[float]], speeds: dict[str, float]) -> dict[str, dict[str, float]]:
    """A row per way, and the ratios."""
    found = {name: dict(zip(("p50_us", "p99_us"), percentiles(each), strict=True)) for name, each in times.items()}
    p50 = {name: row["p50_us"] for name, row in found.items()}
    found["ratios (p50)"] = {
        "rows over tcp": round(p50["rows"] / p50["tcp"], 2),
        "gloo over rows": round(p50["gloo"] / p50["rows"], 2),
        "step over ping": round(p50["step"] / p50["ping"], 2),
    }
    if speeds:
        ratio = speeds["two hosts"] / speeds["one host"]
        found["decode, tokens/s"] = {
            **{name: round(speed, 1) for name, speed in speeds.items()},
            "ratio": round(ratio, 2),
        }
    return found


def main() -> None:
    """Run, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--decode", type=int, default=0)
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    options = parser.parse_args()
    configure("benchmark")  # what is logged goes to stderr
    torch.set_num_threads(1)
    with ExitStack() as opened:
        hosts = opened.enter_context(made_hosts("b"))
        os.environ["GLOO_SOCKET_IFNAME"] = hosts.bridge
        times = race(Ways(hosts, options.rounds, opened))
    found = report(times, decode(options.decode) if options.decode else {})
    if options.output == "json":
        print(json.dumps(found))
        return
    for name, row in found.items():
        print(f"{name:18s}", "  ".join(f"{key} {value:g}" for key, value in row.items()))


if __name__ == "__main__":
    main()

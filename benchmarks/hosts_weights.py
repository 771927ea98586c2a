"""How soon does a new host have the weights of another one, beside a bare TCP copy of as many bytes? It takes root.

    python -m benchmarks.hosts_weights [--gigabytes 2.8] [--repeats 3] [--rate 10gbit] [-o json]

Two hosts (network namespaces of this machine). Host b holds a checkpoint in its weight store and sends of it; ours has
its config only, and an empty store, in each round. Both ways take turns: `peer` is all that a load does (look, fetch
over CURVE, compare checksums, deposit, map); `copy` reads from one socket into memory that is there. `--rate` bounds
what host b sends, as a real link does; without it the link is as fast as this machine copies memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from statistics import median

import torch

from benchmarks.checkpoints import Shape, make
from benchmarks.hosts_peer import WAIT_S, network, say, take
from chaos.target.hosts import Hosts, made_hosts
from membership.base import starter
from membership.base.logs import configure
from membership.base.starter import end_with_starter
from membership.store.records import ClusterConfig
from workers.agent.peer_hosts import HostSource
from workers.agent.weight_store import WeightStore
from workers.bulk.server import BulkServer
from workers.model.load import LoadedModel, load_model
from workers.model.peer_weights import OtherHosts
from workers.protocol.weight_client import WeightClient
from workers.protocol.weight_peers import Peer
from workers.queue.network import Purpose, remote_of

PATIENCE_S = 30.0
LOADED_S = 600.0  # until host b has read its checkpoint
CHUNK = 1 << 20


def everything(path: Path, store: WeightStore, others: OtherHosts | None = None) -> LoadedModel:
    """What a rank that holds all experts loads."""
    loaded = load_model(path, store=WeightClient(store.handle()), others=others)
    info = loaded.info
    every = [(layer, expert) for layer in range(info.moe_layers) for expert in range(info.experts)]
    for _ in loaded.source.load_many(every):
        pass
    return loaded


def holder(address: str, path: str) -> None:
    """Host b: it says where it listens, for weights and for a copy of as many bytes, and answers until it is killed."""
    config = ClusterConfig(cluster="bench", model=path, served_model_name="m", moe_layers=1, experts=1)
    with closing(WeightStore()) as store, socket.create_server((address, 0)) as plain:
        everything(Path(path), store).checkpoint.close()
        server = BulkServer(remote_of(network(address), Purpose.WEIGHTS), HostSource(store, config))
        say(f"{server.endpoint} {server.key} {plain.getsockname()[1]} {store.nbytes}")
        data = memoryview(bytearray(os.urandom(CHUNK)))
        while True:
            connection, _ = plain.accept()
            with connection, suppress(ConnectionError):
                for sent in range(0, store.nbytes, CHUNK):
                    connection.sendall(data[: store.nbytes - sent])


class Rounds:
    """Both ways from host b to ours."""

    def __init__(self, hosts: Hosts, path: Path, bare: Path, opened: ExitStack) -> None:
        self._bare, self._address = bare, hosts.addresses["b"]
        self._others = OtherHosts(network(hosts.outside), PATIENCE_S)
        there = ("-m", "benchmarks.hosts_weights", "--holder", self._address, str(path))
        command = hosts.command("b", sys.executable, *there)
        environ = {**os.environ, starter.ENV: starter.named()}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=environ)
        opened.callback(process.communicate, timeout=WAIT_S)
        opened.callback(process.kill)
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise RuntimeError("host b ended before it listened")
        endpoint, key, port, nbytes = line.split()
        self._peer, self._port, self.nbytes = Peer("b", endpoint, key), int(port), int(nbytes)
        self._into = memoryview(bytearray(self.nbytes))

    def copy(self) -> float:
        """Seconds of a bare copy."""
        with socket.create_connection((self._address, self._port), timeout=WAIT_S) as connection:
            begun = time.perf_counter()
            if not take(connection, self._into):
                raise RuntimeError("the copy ended early")
            return time.perf_counter() - begun

    def peer(self) -> float:
        """Seconds of a load from the other host, into an empty store."""
        with closing(WeightStore()) as store:
            store.know((self._peer,), lambda name: b"")
            begun = time.perf_counter()
            loaded = everything(self._bare, store, self._others)
            took_s = time.perf_counter() - begun
            loaded.checkpoint.close()
            if store.nbytes < 0.99 * self.nbytes:
                raise RuntimeError(f"only {store.nbytes} of {self.nbytes} bytes arrived")
            return took_s


@contextmanager
def limited(hosts: Hosts, rate: str) -> Iterator[None]:
    """What host b sends is bounded; empty: it is not."""
    if not rate:
        yield
        return
    tc = ["tc", "-n", hosts.namespace("b"), "qdisc"]
    queue = ["dev", "eth0", "root", "tbf", "rate", rate, "burst", "4mb", "latency", "100ms"]
    subprocess.run([*tc, "replace", *queue], check=True, timeout=WAIT_S)
    try:
        yield
    finally:
        subprocess.run([*tc, "del", "dev", "eth0", "root"], check=True, timeout=WAIT_S)


def measure(gigabytes: float, repeats: int, rate: str) -> dict[str, float]:
    """Medians of both ways."""
    with tempfile.TemporaryDirectory(prefix="elastic-ep-bench-") as folder, ExitStack() as opened:
        path, bare = Path(folder, "model"), Path(folder, "bare")
        make(path, Shape.of_size(gigabytes))
        bare.mkdir()
        shutil.copy(path / "config.json", bare)
        hosts = opened.enter_context(made_hosts("b"))
        rounds = Rounds(hosts, path, bare, opened)
        rounds.peer()  # the first one imports; an agent's forkserver has done that
        opened.enter_context(limited(hosts, rate))
        copies, loads = list[float](), list[float]()
        for _ in range(repeats):
            copies.append(rounds.copy())
            loads.append(rounds.peer())
    copy_s, peer_s = median(copies), median(loads)
    return {
        "GB": round(rounds.nbytes / 1e9, 2), "copy_s": round(copy_s, 2), "peer_s": round(peer_s, 2),
        "copy_MB_per_s": round(rounds.nbytes / 1e6 / copy_s), "peer_MB_per_s": round(rounds.nbytes / 1e6 / peer_s),
        "ratio": round(peer_s / copy_s, 2),
    }  # fmt: skip


def main() -> None:
    """Run, and print a line or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rate", default="", help="of the link, as tc has it: 1gbit")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text")
    parser.add_argument("--holder", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    configure("benchmark")  # what is logged goes to stderr
    torch.set_num_threads(1)
    if options.holder:
        end_with_starter()
        holder(*options.holder)
        return
    found = measure(options.gigabytes, options.repeats, options.rate)
    if options.output == "json":
        print(json.dumps(found))
    else:
        print("weights of a peer ", "  ".join(f"{key} {value:g}" for key, value in found.items()))


if __name__ == "__main__":
    main()

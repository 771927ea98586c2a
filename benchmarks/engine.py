"""How many steps per second the engine drives when ranks answer at once: its own overhead, queues included.

python -m benchmarks.engine [--ranks 4] [--sequences 1 8 32] [--tokens 400]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from elastic.serve.etcd_server import EtcdServer
from membership.store.etcd import connect
from tests.support.standins import Gateway, StandInCluster, cluster_config


def measure(ranks: int, per_rank: int, tokens: int) -> dict[str, float]:
    """Run `per_rank` sequences on each rank to their end."""
    config = cluster_config(kv_blocks=4096, block_size=16, max_seqs=64, max_batched_tokens=512, max_model_len=2048)
    with tempfile.TemporaryDirectory() as folder, EtcdServer(Path(folder) / "etcd") as etcd:
        store = connect([etcd.url])
        cluster = StandInCluster(store, config, step_s=-1.0)
        cluster.configure()
        command = [sys.executable, "-m", "tests.support.engine_process", etcd.url, f"{folder}/events"]
        engine = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        gateway = Gateway(cluster)
        try:
            cluster.spawn(*range(ranks))
            cluster.attach()
            cluster.commit(*range(ranks))
            cluster.adopted()
            gateway.connect()
            gateway.submit(ranks * per_rank, tokens, prompt=32)
            begun = time.perf_counter()
            gateway.pump(lambda: len(gateway.ends) == len(gateway.requests), 300.0)
            seconds = time.perf_counter() - begun
        finally:
            gateway.close()
            engine.terminate()
            engine.wait(timeout=20)
            cluster.close()
            store.close()
    return {
        "sequences_per_rank": per_rank,
        "steps_per_s": round(tokens / seconds),
        "ms_per_step": seconds / tokens * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=400)
    options = parser.parse_args()
    for per_rank in options.sequences:
        print(json.dumps(measure(options.ranks, per_rank, options.tokens)), flush=True)


if __name__ == "__main__":
    main()

"""How long ranks of one host take to load a checkpoint, how much they read, and how much private memory that takes.

    python -m benchmarks.loading --gigabytes 2.8 --ranks 2

Makes a checkpoint of that size with random weights (`--path` keeps it), then loads all of it in `--ranks` processes at
once, as an agent's ranks do: over one weight store, and without one, where each reads all by itself. Both sides
alternate, `--repeats` times. Prints seconds, bytes read over bytes of the model (the store's counters, and what
/proc/<pid>/io says), and the peak of anonymous memory per rank.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoints import Shape, make
from workers.agent.weight_store import WeightStore

LOOK_S = 0.02


def rank(path: str, handle: str) -> None:
    """One rank: load everything, and say what it took."""
    import torch

    from workers.model.load import load_model
    from workers.protocol.weight_client import WeightClient
    from workers.rank.environment import give_memory_back

    torch.set_num_threads(1)
    torch.zeros(1).clone()
    print("ready", flush=True)
    sys.stdin.readline()
    peak, over = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, over))
    before = _read_so_far()
    watcher.start()
    started = time.perf_counter()
    loaded = load_model(path, store=WeightClient(bytes.fromhex(handle)) if handle else None)
    every = [(layer, expert) for layer in range(loaded.info.moe_layers) for expert in range(loaded.info.experts)]
    kept = list(loaded.source.load_many(every))
    give_memory_back()
    took_s = time.perf_counter() - started
    over.set()
    watcher.join(10)
    read = _read_so_far() - before
    print(json.dumps({
        "took_s": took_s, "read": loaded.checkpoint.bytes_read, "io": read, "peak": peak[0], "after": _anonymous(),
        "experts": len(kept),
    }), flush=True)  # fmt: skip
    sys.stdin.readline()


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _watch(peak: list[int], over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        peak[0] = max(peak[0], _anonymous())


def _read_so_far() -> int:
    return int(Path("/proc/self/io").read_text(encoding="utf-8").split()[1])


def load(path: Path, ranks: int, *, shared: bool) -> dict[str, Any]:
    """All ranks at once."""
    store = WeightStore() if shared else None
    handle = store.handle().hex() if store is not None else ""
    command = [sys.executable, "-m", "benchmarks.loading", "--rank", str(path), handle]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") for _ in range(ranks)
    ]
    try:
        for process in processes:
            while _line(process) != "ready":
                continue
        started = time.perf_counter()
        for process in processes:
            _go(process)
        found = [json.loads(_line(process)) for process in processes]
        took_s = time.perf_counter() - started
        descriptors = len(store._shards) if store is not None else 0
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=60)
        if store is not None:
            store.close()
    return {
        "took_s": took_s, "read": sum(f["read"] for f in found), "io": sum(f["io"] for f in found),
        "peak": max(f["peak"] for f in found), "after": max(f["after"] for f in found), "descriptors": descriptors,
    }  # fmt: skip


def _line(process: subprocess.Popen[str]) -> str:
    if process.stdout is None or not (line := process.stdout.readline()):
        raise RuntimeError("a rank ended")
    return line.strip()


def _go(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        process.stdin.write("go\n")
        process.stdin.flush()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--path", type=Path)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        rank(*given.rank)
        return
    path = given.path or Path(tempfile.mkdtemp(prefix="elastic-ep-loading-"))
    try:
        if not (path / "config.json").exists():
            make(path, Shape.of_size(given.gigabytes))
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for _ in range(given.repeats):
            for shared in (True, False):
                runs[shared].append(load(path, given.ranks, shared=shared))
        print(f"{size / 1e9:.2f} GB, {given.ranks} ranks, median of {given.repeats}")
        for shared, found in runs.items():
            middle = {key: median(run[key] for run in found) for key in found[0]}
            print(
                f"{'one store   ' if shared else 'each alone  '} {middle['took_s']:6.2f} s"
                f"   read/size {middle['read'] / size:.2f} (/proc/io {middle['io'] / size:.2f})"
                f"   anonymous per rank: peak {middle['peak'] / 1e6:.0f} MB, afterwards {middle['after'] / 1e6:.0f} MB"
                f"   descriptors {middle['descriptors']:.0f}"
            )
        took = {shared: median(run["took_s"] for run in found) for shared, found in runs.items()}
        print(f"time, one store / each alone: {took[True] / took[False]:.2f}")
    finally:
        if given.path is None:
            shutil.rmtree(path)


if __name__ == "__main__":
    main()

"""What it took until a service was ready: seconds, bytes that its ranks read, private memory, deaths."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from chaos.target.cluster import ServedCluster
from membership.base.errors import ElasticError
from workers.ipc.huge_pages import map_shared

LOOK_S = 0.05
READY_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Load:
    """Bytes, but for `ready_s` and `deaths`."""

    ready_s: float
    nbytes: int  # of the checkpoint
    read: int  # by all ranks
    anonymous: int  # the most of one rank
    deaths: int


PROBE_BYTES = 256 << 20


def conditions(path: Path) -> str:
    """What a start of this moment is measured under, in words. The checkpoint is in the page cache afterwards.

    Seconds of a processor for new memory are the machine's own: a hypervisor that takes back what is free charges
    twenty times as much for it as a machine without one, and more than half of a load is memory.
    """
    began = time.process_time()
    fd = os.memfd_create("elastic-ep-probe")
    try:
        os.ftruncate(fd, PROBE_BYTES)
        map_shared(fd, PROBE_BYTES)
    finally:
        os.close(fd)
    memory_s, began, nbytes, piece = time.process_time() - began, time.monotonic(), 0, bytearray(8 << 20)
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while got := opened.readinto(piece):
                nbytes += got
    per_gb_s, rate = memory_s * 1e9 / PROBE_BYTES, nbytes / (time.monotonic() - began) / 1e9
    return f"1 GB of new memory takes {per_gb_s:.2f} s here, the files were read at {rate:.1f} GB/s"


IMPORTS = """
import importlib, sys
from elastic.serve.role_fork import MODULES
from workers.agent.preload import WORKER_CLASS, preload_for
for name in (*preload_for(WORKER_CLASS, sys.argv[1]), *MODULES, "elastic.serve.supervisor"):
    importlib.import_module(name.partition(":")[0])
"""


def compiled(path: Path, cache: Path) -> dict[str, str]:
    """The environment in which a service finds all of its modules compiled, as it does where it was installed.

    Else a start measures Python's compiler, wherever PYTHONDONTWRITEBYTECODE is set: ten seconds and more.
    """
    environ = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(cache)}
    command = [sys.executable, "-c", IMPORTS, str(path)]
    subprocess.run(command, env={**os.environ, **environ}, check=True, timeout=READY_TIMEOUT_S)
    return environ


def loaded(cluster: ServedCluster, path: Path) -> Load:
    """Wait until the service, which has just been started, is ready."""
    began, over, peaks = time.monotonic(), threading.Event(), dict[int, int]()
    watcher = threading.Thread(target=_watch, args=(cluster, over, peaks))
    watcher.start()
    try:
        ranks = cluster.wait_serving(2, timeout_s=READY_TIMEOUT_S)["ranks"]
        ready_s = time.monotonic() - began
    finally:
        over.set()
        watcher.join(30.0)
    return Load(
        ready_s,
        sum(file.stat().st_size for file in path.glob("*.safetensors")),
        sum(_number(rank["pid"], "io", "rchar") for rank in ranks),
        1024 * max(peaks.values(), default=0),
        sum(event.kind == "rank_died" for event in cluster.events()),
    )


def _watch(cluster: ServedCluster, over: threading.Event, peaks: dict[int, int]) -> None:
    """Note the most private memory of each rank, in kB."""
    while not over.wait(LOOK_S):
        try:
            pids = [rank["pid"] for rank in cluster.status()["ranks"]]
        except (ElasticError, OSError):
            continue  # it has no store yet
        for pid in filter(None, pids):
            peaks[pid] = max(peaks.get(pid, 0), _number(pid, "status", "RssAnon"))


def _number(pid: int, file: str, name: str) -> int:
    """From /proc; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)

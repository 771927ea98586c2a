"""What it costs to start: seconds until `elastic serve` of the demo model is ready, and seconds of processors by role.

    python -m benchmarks.cold_start [CHECKOUT ...] [--rounds 5] [--ranks 2]

One checkout (default: this one) or more, in turns; the median of each, and its ratio to the first's. The interpreter is
this one. Seconds of processors count the same on a busy machine, roughly; seconds until it is ready do not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from benchmarks.recovery_cluster import import_path
from elastic.demo.model import write_demo_model
from elastic.serve.etcd_server import free_ports
from elastic.serve.tls import authorities
from membership.base.process_stats import command_words

READY_S = 300.0
POLL_S = 0.02
TITLES = {"elastic-ep::Worker": "ranks", "elastic-ep::zygote": "zygote", "elastic-ep::forkserver": "zygote"}


@contextmanager
def served(checkout: Path, model: Path, ranks: int, folder: Path) -> Iterator[tuple[float, psutil.Process]]:
    """Seconds until it was ready, and its supervisor."""
    ports = free_ports(2)
    command = [sys.executable, "-m", "elastic.cli", "serve", str(model), "--ranks", str(ranks)]
    command += ["--port", str(ports[0]), "--admin-port", str(ports[1]), "--state-dir", str(folder / "state")]
    begun = time.monotonic()
    with (folder / "log").open("wb") as out:
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": import_path(checkout)}, cwd=folder, stdout=out, stderr=out
        )
    try:
        while not _ready(ports[0]):
            if process.poll() is not None or time.monotonic() - begun > READY_S:
                raise RuntimeError(
                    f"not ready: {(folder / 'log').read_text(errors='replace', encoding='utf-8')[-2000:]}"
                )
            time.sleep(POLL_S)
        yield time.monotonic() - begun, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60.0)


def _ready(port: int) -> bool:
    try:
        url = f"http://127.0.0.1:{port}"
        return httpx.get(f"{url}/readyz", timeout=2.0, trust_env=False, verify=authorities(url)).is_success
    except httpx.HTTPError:
        return False


def seconds_by_role(supervisor: psutil.Process) -> Counter[str]:
    """Of processors, by now; those of children that ended count as their parent's."""
    found: Counter[str] = Counter()
    for process in (supervisor, *supervisor.children(recursive=True)):
        times = process.cpu_times()
        found[_role(process, supervisor)] += sum(times[:4])
    return found


def _role(process: psutil.Process, supervisor: psutil.Process) -> str:
    words = command_words(process.pid)
    if process == supervisor:
        return "supervisor"
    if "elastic.cli" in words:
        return words[words.index("elastic.cli") + 1]
    return next((role for title, role in TITLES.items() if words and words[0].startswith(title)), "etcd")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    looks: dict[Path, list[Counter[str]]] = {checkout.resolve(): [] for checkout in options.checkouts}
    with tempfile.TemporaryDirectory() as scratch:
        write_demo_model(model := Path(scratch) / "demo-moe")
        for _ in range(options.rounds):
            for checkout, found in looks.items():
                with (
                    tempfile.TemporaryDirectory(dir=scratch) as folder,
                    served(checkout, model, options.ranks, Path(folder)) as (ready_s, supervisor),
                ):
                    by_role = seconds_by_role(supervisor)
                found.append(Counter({"until ready": ready_s, "all processors": by_role.total(), **by_role}))
    print(f"{'seconds':16}" + "".join(f"{checkout.name:>18}" for checkout in looks))
    for row in next(iter(looks.values()))[0]:
        medians = [statistics.median(look[row] for look in found) for found in looks.values()]
        print(f"{row:16}" + "".join(f"{each:10.2f} ({each / medians[0]:4.2f}x)" for each in medians))


if __name__ == "__main__":
    main()

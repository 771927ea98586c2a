"""What a change of size costs requests under way: the table of docs/benchmarks.md.

    python -m benchmarks.scaling [--rows commit,size,restart,planner] [--cycles 30] [--seed 0] [--receipts FILE]

Real processes: `elastic serve` with the demo model, clients over HTTP. Each scale is proven (operation done, its epoch
committed and stepped under, by all its ranks) and each run is compared with an unscaled one. Receipts are JSON lines.
Exit 1 if a request was lost, duplicated or altered. Rows:

    commit      4 -> 8 and 8 -> 4 under load: pause at commit, pace while preparing, time to full size (forkserver)
    size        time to full size with spares, and of an idle cluster
    restart     service interruption beside a full restart with the new size
    planner     58 layers x 256 experts x 64 ranks: time of a plan; balance after one loss, and what it moves
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.recovery_report import Report
from benchmarks.scaling_cluster import row_commit, row_size
from benchmarks.scaling_planner import row_planner
from benchmarks.scaling_restart import row_restart

ROWS: dict[str, Callable[[Report, int, int], None]] = {
    "commit": row_commit, "size": row_size, "restart": row_restart, "planner": row_planner,
}  # fmt: skip


def main() -> None:
    """Run the rows that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--cycles", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--receipts", type=Path)
    options = parser.parse_args()
    names = options.rows.split(",")
    unknown = set(names) - ROWS.keys()
    if unknown or options.cycles < 1:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}" if unknown else "--cycles must be at least 1")
    report = Report(options.receipts)
    for name in dict.fromkeys(names):
        ROWS[name](report, options.cycles, options.seed)
    sys.stdout.write(report.table())
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()

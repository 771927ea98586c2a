"""Every loss that the product promises to survive, many times over, and what it cost: the table of docs/benchmarks.md.

    python -m benchmarks.recovery [--rows detect,kills,spare,agent,stop,engine,controller,cost] [--kills 100]
                                  [--seed 0] [--receipts FILE]

Real processes: `elastic serve` with 4 ranks of the demo model, clients over HTTP. Each kill is proven (exit status,
/proc) and each run is compared with a fault-free one. Receipts are JSON lines. Exit 1 if a request was lost,
duplicated or altered. Rows (in brackets: what they are called in --rows as well):

    detect      SIGKILL of a rank with 2 GB until the engine knows, beside a bare robust futex in the same run
    kills       (rows, gap, restore) until lost rows are answered; token gaps; full strength from the forkserver
    spare       full strength with --spares 1
    agent       full strength after the agent, and with it all ranks, was killed
    stop        SIGSTOP of a rank, loaded and idle
    engine      until streams go on
    controller  the data plane's stall
    cost        tokens/s with and without detection and masking
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.recovery_cost import row_cost
from benchmarks.recovery_others import row_agent, row_controller, row_engine, row_stop
from benchmarks.recovery_ranks import row_detect, row_kills
from benchmarks.recovery_report import Report

ALIASES = {"rows": ("kills",), "gap": ("kills",), "restore": ("kills", "spare", "agent")}


def row_spare(report: Report, kills: int, seed: int) -> None:
    """Full strength where a spare waits at each kill."""
    row_kills(report, kills, seed, ("--spares", "1"))


ROWS: dict[str, Callable[[Report, int, int], None]] = {
    "detect": row_detect, "kills": row_kills, "spare": row_spare, "agent": row_agent, "stop": row_stop,
    "engine": row_engine, "controller": row_controller, "cost": row_cost,
}  # fmt: skip


def main() -> None:
    """Run the rows that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--receipts", type=Path)
    options = parser.parse_args()
    names = [name for asked in options.rows.split(",") for name in ALIASES.get(asked, (asked,))]
    unknown = set(names) - ROWS.keys()
    if unknown or options.kills < 1:
        parser.error(f"no such rows: {', '.join(sorted(unknown))}" if unknown else "--kills must be at least 1")
    report = Report(options.receipts)
    for name in dict.fromkeys(names):
        ROWS[name](report, options.kills, options.seed)
    sys.stdout.write(report.table())
    sys.exit(1 if report.failures else 0)


if __name__ == "__main__":
    main()

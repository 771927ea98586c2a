"""What `recovery.py` says: a receipt per kill (JSON lines), and the table with targets and measured columns."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.workload.history import Verdict, percentile

HEAD = "| what | condition | target p50 / p99 | p50 | p99 | n |\n|---|---|---|---|---|---|"


@dataclass
class Line:
    """One line of the table."""

    what: str
    condition: str
    target: str
    values: Sequence[float]
    digits: int = 1
    unit: str = "ms"

    def text(self) -> str:
        """As markdown."""
        if not self.values:
            return f"| {self.what} | {self.condition} | {self.target} | - | - | 0 |"
        cells = [f"{percentile(self.values, q):.{self.digits}f} {self.unit}" for q in (0.5, 0.99)]
        return f"| {self.what} | {self.condition} | {self.target} | {cells[0]} | {cells[1]} | {len(self.values)} |"


@dataclass
class Report:
    """Collects the lines; writes and prints the receipts as they come."""

    path: Path | None
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: int = 0

    def receipt(self, row: str, **facts: Any) -> None:
        """Save what one kill (or one run's verdict) was."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"row": row, **facts}) + "\n")

    def ended(self, row: str, verdict: Verdict, **facts: Any) -> None:
        """A run has ended: what its clients got."""
        counts = {kind: verdict.count(kind) for kind in ("lost", "duplicated", "altered")}
        self.failures += not verdict.ok
        self.receipt(row, verdict="ok" if verdict.ok else "broken", requests=verdict.requests, **counts, **facts)
        said = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        self.note(f"{row}: {verdict.requests} requests, {said}")
        for difference in verdict.differences[:5]:
            self.note(f"{row}: request {difference.prompt} {difference.kind}: {difference.explanation}")

    def add(self, *arguments: Any, **named: Any) -> None:
        """A line of the table; printed at once, since the rest takes minutes."""
        self.lines.append(Line(*arguments, **named))
        say(self.lines[-1].text())

    def note(self, text: str) -> None:
        """A line under the table."""
        self.notes.append(text)
        say(text)

    def table(self) -> str:
        """All of it."""
        rows = "\n".join(line.text() for line in self.lines)
        return f"{HEAD}\n{rows}\n\n" + "\n".join(f"* {note}" for note in self.notes) + "\n"


def say(text: str) -> None:
    """A line on stderr: progress of a long run."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()

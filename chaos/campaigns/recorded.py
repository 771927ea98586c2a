"""A campaign whose whole record is checked in the end: every promise is judged, and not only the streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chaos.campaigns.campaign import SHOWN, Campaign
from chaos.check.checker import check_record
from chaos.faults.base import Injected

COMPARED_HERE = ("requests", "by the run")  # what the campaign itself has judged


@dataclass(kw_only=True)
class Recorded(Campaign):
    """What a soak and a churn have in common, over one host or several."""

    watched: bool = True
    epochs: int = 0  # committed meanwhile

    def before(self) -> None:
        """Note the epoch."""
        self.epochs = -self.cluster.status()["epoch"]

    def after(self) -> None:
        """Count the epochs."""
        if not self.troubles:
            self.epochs += self.cluster.status()["epoch"]

    def note(self, fault: Injected) -> None:
        """Into the record: it was injected."""
        if self.recorder is not None:
            self.recorder.injected(fault)

    def note_healed(self, fault: Injected) -> None:
        """Into the record: it was taken back."""
        if self.recorder is not None:
            self.recorder.healed(fault)

    def verify(self, promise: str, broken: Sequence[str], held: str) -> None:
        """Into the record: what only the run itself can know."""
        if self.recorder is not None:
            self.recorder.verified(promise, not broken, "; ".join(broken) or held)

    def verify_strength(self, waits_ms: Sequence[float]) -> None:
        """Into the record: it came back to full strength each time."""
        longest_s = max(waits_ms, default=0.0) / 1000
        self.verify("G8", self.troubles, f"{len(waits_ms)} waits for full strength, the longest {longest_s:.1f} s")

    @property
    def refused(self) -> int:
        """Requests that were not answered, though every expert came back in time."""
        return sum(record.status != 200 for record in self.history)

    def broken(self) -> list[str]:
        """What did not hold, a line each."""
        return [*self.verdict().explained(SHOWN), *self.unproven(), *self._found()]

    def refusals(self) -> list[str]:
        """The same, of a campaign whose every request must be answered."""
        return [f"{self.refused} requests were refused, though every expert came back in time"] if self.refused else []

    def _found(self) -> list[str]:
        """What the checks of the record found."""
        outcomes = check_record(self.recorder.lines()).outcomes if self.recorder is not None else ()
        found = [f for outcome in outcomes if outcome.title not in COMPARED_HERE for f in outcome.findings]
        return [f"{each.promise}: {each.what}" for each in found]

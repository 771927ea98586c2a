"""The wall clock of one process jumps or drifts; the machine's own clock stays as it is.

A time namespace shifts only monotonic clocks, and an LD_PRELOAD library is not available everywhere. All our processes
except etcd are Python, so the clock is shifted where Python reads it (`clockwork/sitecustomize.py`), without a line in
the product. A cluster must be started with `environment`; its processes then record the time that they believe.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from chaos.faults.base import Faults, NotInjected, Params, Site, see
from chaos.faults.process import Hold, ProcessInjector

ENV = "ELASTIC_CHAOS_CLOCKS"
NOTICED_S = 5.0  # a process notices the shift when it next reads its clock
SLACK_S = 0.5
VICTIMS = ("gateway", "engine", "engine-standby", "controller", "agent", "supervisor")  # ranks read no wall clock
NEEDS = ("the environment of chaos.faults.clock",)

FAULTS = Faults()


def environment(state_dir: Path) -> dict[str, str]:
    """The variables that the processes of the cluster with this state directory must be started with."""
    here = str(Path(__file__).parent / "clockwork")
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    return {ENV: str(_offsets(state_dir)), "PYTHONPATH": path}


def _offsets(state_dir: Path) -> Path:
    """The file with the clock offset of each process."""
    return state_dir / "clocks.json"


@FAULTS.entry(
    "clock-jump", "the wall clock of one process jumps", victims=VICTIMS, heals=True, needs=NEEDS,
    params={"seconds": 3600.0, "rate": 0.0},
)  # fmt: skip
class ClockShift(ProcessInjector):
    """The process's wall clock is `seconds` ahead (behind, if negative) and gains `rate` seconds per second."""

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        super().__init__(site, victim, params)
        self._seconds, self._rate = float(params["seconds"]), float(params["rate"])
        self._file = _offsets(site.state_dir())
        self._noticed = False

    def _affect(self, hold: Hold) -> str:
        if self._seconds == 0 and self._rate == 0:
            raise NotInjected("a clock that is shifted by 0 s is right")
        answer = self._answer(hold)
        answer.unlink(missing_ok=True)
        self._shift(hold, {"seconds": self._seconds, "rate": self._rate})
        see(answer.exists, f"{hold.name} looking at its clock (was it started with the environment?)", NOTICED_S)
        self._noticed = True
        see(answer.read_text, f"{self.victim} saying what time it believes")
        ahead = float(answer.read_text(encoding="utf-8")) - answer.stat().st_mtime
        if abs(ahead - self._seconds) > SLACK_S:
            raise NotInjected(f"{self.victim} believes a time {ahead:+.1f} s from ours, not {self._seconds:+g} s")
        drift = f", and drifts by {self._rate:+g} s/s" if self._rate else ""
        return f"its own clock reads {ahead:+.1f} s from ours{drift}"

    def _restore(self, hold: Hold) -> None:
        answer = self._answer(hold)
        answer.unlink(missing_ok=True)
        self._shift(hold, None)
        if self._noticed and not hold.gone():
            see(lambda: answer.exists() or hold.gone(), f"{hold.name} seeing its clock right", NOTICED_S)
        answer.unlink(missing_ok=True)

    def _answer(self, hold: Hold) -> Path:
        """The file in which the process says what time it believes after a change of its offset."""
        return Path(f"{self._file}.{hold.pid}")

    def _shift(self, hold: Hold, shift: dict[str, float] | None) -> None:
        """Write the process's offset into the file; None removes it."""
        known: dict[str, dict[str, float]] = {}
        if self._file.exists():
            known = msgspec.json.decode(self._file.read_bytes(), type=dict[str, dict[str, float]])
        known.pop(str(hold.pid), None)
        if shift is not None:
            known[str(hold.pid)] = shift
        draft = self._file.with_name(f".{self._file.name}.draft")
        draft.write_bytes(msgspec.json.encode(known))
        now = time.time_ns()
        os.utime(draft, ns=(now, now))
        draft.replace(self._file)


@FAULTS.entry(
    "clock-skew", "the wall clock of one process is off, and drifts", victims=VICTIMS, heals=True, needs=NEEDS,
    params={"seconds": -5.0, "rate": 0.05},
)  # fmt: skip
class ClockSkew(ClockShift):
    """The same with other defaults: a little off, and drifting."""

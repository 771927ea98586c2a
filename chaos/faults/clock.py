"""The wall clock of one process jumps or drifts, the machine's stays as it is.

A time namespace shifts only monotonic clocks, and an LD_PRELOAD library is not everywhere; all our processes but etcd
are Python, so theirs is shifted where Python reads it (`clockwork/sitecustomize.py`), without a line in the product.
A cluster must be started with `environment`; what its processes record from then on bears the time they believe.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import msgspec

from chaos.faults.base import NotInjected, Site
from chaos.faults.fault import Fault, Params
from chaos.faults.process import Hold, OnProcess, see

ENV = "ELASTIC_CHAOS_CLOCKS"
NOTICED_S = 5.0  # a process notices when it looks at its clock
SLACK_S = 0.5
VICTIMS = ("gateway", "engine", "engine-standby", "controller", "agent", "supervisor")  # ranks look at no wall clock


def environment(state_dir: Path) -> dict[str, str]:
    """What the processes of the cluster with this state directory must be started with."""
    here = str(Path(__file__).parent / "clockwork")
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
    return {ENV: str(_offsets(state_dir)), "PYTHONPATH": path}


def _offsets(state_dir: Path) -> Path:
    """The file that says whose clock is off by how much."""
    return state_dir / "clocks.json"


class ClockShift(OnProcess):
    """From now on the process's wall clock is `seconds` ahead (behind, if negative), and gains `rate` s per second."""

    name = "clock-jump"

    def __init__(self, site: Site, victim: str, params: Params) -> None:
        super().__init__(site, victim, params)
        self._seconds, self._rate = float(params["seconds"]), float(params["rate"])
        self._file = _offsets(site.state_dir())
        self._noticed = False

    def _deal(self, hold: Hold) -> str:
        if self._seconds == 0 and self._rate == 0:
            raise NotInjected("a clock that is shifted by 0 s is right")
        told = Path(f"{self._file}.{hold.pid}")
        told.unlink(missing_ok=True)
        self._give({"seconds": self._seconds, "rate": self._rate}, hold.pid)
        see(told.exists, f"{self.victim}, process {hold.pid}, looking at its clock (was it started so?)", NOTICED_S)
        self._noticed = True
        see(lambda: bool(told.read_text()), f"{self.victim} saying what time it believes")
        ahead = float(told.read_text()) - told.stat().st_mtime
        if abs(ahead - self._seconds) > SLACK_S:
            raise NotInjected(f"{self.victim} believes a time {ahead:+.1f} s from ours, not {self._seconds:+g} s")
        return f"its own clock reads {ahead:+.1f} s from ours" + (
            f", and drifts by {self._rate:+g} s/s" * bool(self._rate)
        )

    def _heal(self, hold: Hold) -> None:
        told = Path(f"{self._file}.{hold.pid}")
        told.unlink(missing_ok=True)
        self._give(None, hold.pid)
        if self._noticed and not hold.gone():
            see(
                lambda: told.exists() or hold.gone(),
                f"{self.victim}, process {hold.pid}, seeing its clock right",
                NOTICED_S,
            )
        told.unlink(missing_ok=True)

    def _give(self, shift: dict[str, float] | None, pid: int) -> None:
        """Change one process's entry in the file."""
        known = (
            msgspec.json.decode(self._file.read_bytes(), type=dict[str, dict[str, float]])
            if self._file.exists()
            else {}
        )
        known.pop(str(pid), None)
        if shift is not None:
            known[str(pid)] = shift
        draft = self._file.with_name(f".{self._file.name}.draft")
        draft.write_text(json.dumps(known))
        now = time.time_ns()
        os.utime(draft, ns=(now, now))
        draft.replace(self._file)


class ClockSkew(ClockShift):
    """The same with other defaults: a little off, and drifting."""

    name = "clock-skew"


FAULTS = {
    "clock-jump": Fault(
        about="the wall clock of one process jumps", victims=VICTIMS, heals=True, make=ClockShift,
        needs=("the environment of chaos.faults.clock",), params={"seconds": 3600.0, "rate": 0.0},
    ),
    "clock-skew": Fault(
        about="the wall clock of one process is off, and drifts", victims=VICTIMS, heals=True, make=ClockSkew,
        needs=("the environment of chaos.faults.clock",), params={"seconds": -5.0, "rate": 0.05},
    ),
}  # fmt: skip

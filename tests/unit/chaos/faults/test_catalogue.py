"""The catalogue of faults: the victims of each, its parameters, and the step faults, which go through failpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos.faults import checkpoint, clock, disk, ipc, oom, parent, signals, step, store
from chaos.faults.base import NotInjected
from chaos.faults.catalogue import FAULTS, injector
from membership.base.events import Event
from membership.base.failpoints import KIND

pytestmark = pytest.mark.unit


class Armed:
    """A site whose only rank passes `rank.step` as soon as it is armed."""

    def __init__(self) -> None:
        self.armed: list[str] = []
        self.history = [
            Event(ts=1.0, role="rank", kind=KIND, rank=2, fields={"name": "rank.step", "action": "hang", "pid": 6})
        ]

    def pid(self, victim: str) -> int:
        raise NotInjected(f"there is no process of {victim}")

    def arm(self, failpoints: str) -> None:
        self.armed.append(failpoints)
        if failpoints:
            action = failpoints.partition("*")[2].partition(":")[0]
            fields = {"name": failpoints.partition("@")[0], "action": action, "pid": 7}
            self.history.append(Event(ts=2.0, role="rank", kind=KIND, rank=2, fields=fields))

    def events(self) -> list[Event]:
        return list(self.history)

    def state_dir(self) -> Path:
        return Path()

    def url(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("name", "point", "armed"),
    [("step-raise", "step", "raise"), ("step-hang", "step", "hang"), ("step-hang-gil", "step", "hang-gil"),
     ("step-delay", "step", "delay:200"), ("launch-hang", "launched", "hang"),
     ("crash-device", "launched", "lose-device"), ("device-oom", "launched", "fill-device")],
)  # fmt: skip
def test_a_step_fault_is_armed_seen_in_the_history_and_disarmed(name: str, point: str, armed: str) -> None:
    site = Armed()
    fault = injector(name, site, "rank 2")
    injected = fault.inject()
    assert (injected.fault, injected.pid, injected.seen_at) == (name, 7, 2.0)  # not the one of before
    fault.heal()
    fault.heal()
    times = 2 if name == "device-oom" else 1  # the first time the step is run again
    assert site.armed == [f"rank.{point}@2={times}*{armed}", ""]


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(NotInjected, match="no fault 'flood'"):
        injector("flood", Armed(), "engine")
    with pytest.raises(NotInjected, match="engine is no victim"):
        injector("step-hang", Armed(), "engine")
    with pytest.raises(NotInjected, match="no such parameter: speed"):
        injector("slow", Armed(), "engine", {"speed": 2})
    with pytest.raises(NotInjected, match="no process of rank 2"):
        injector("kill", Armed(), "rank 2").inject()


def test_every_entry_says_what_it_is_in_a_line() -> None:
    for name, fault in FAULTS.items():
        assert len(fault.about.splitlines()) == 1, name
        assert fault.victims, name


def test_an_injector_bears_the_name_of_its_entry_and_heals_what_was_never_injected() -> None:
    for table in (
        signals.FAULTS,
        oom.FAULTS,
        step.FAULTS,
        parent.FAULTS,
        ipc.FAULTS,
        disk.FAULTS,
        checkpoint.FAULTS,
        clock.FAULTS,
        store.FAULTS,
    ):
        for name, fault in table.items():
            for victim in fault.victims:
                site = Armed()
                made = injector(name, site, f"{victim} 0" if victim == "rank" else victim)
                assert made.fault == name
                made.heal()
                assert site.armed == []

"""What is taken for proof that a proxy's fault happened: no healthy answer, and no sign without its counter."""

from __future__ import annotations

import pytest

from chaos.faults.probe import Answer
from chaos.faults.proxied import SETTINGS, shown
from chaos.faults.proxy import Counters, Faults, Way

pytestmark = pytest.mark.unit

WELL = Answer(seconds=0.002, size=100_000)
NONE = Counters()


def test_an_answer_as_before_proves_nothing() -> None:
    busy = Counters(accepted=9, up=9999, down=9999, stalled=9, reset=9, cut=9)
    for name, (_, faults) in SETTINGS.items():
        assert not shown(faults, WELL, WELL, NONE, NONE, busy), name
    assert not shown(Faults(), WELL, Answer(seconds=9.0, size=100_000), NONE, NONE, busy)


@pytest.mark.parametrize(
    ("fault", "after", "now"),
    [
        ("net-delay", Answer(seconds=0.052, size=1), NONE),
        ("net-slow", Answer(seconds=0.6, size=100_000), NONE),
        ("net-loss", Answer(seconds=0.21, size=1), Counters(stalled=1)),
        ("net-black-hole", Answer(seconds=1.0, error="TimeoutError"), NONE),
        ("net-deaf", Answer(seconds=1.0, error="TimeoutError"), Counters(up=50)),
        ("net-mute", Answer(seconds=1.0, error="TimeoutError"), Counters(down=50)),
        ("net-reset", Answer(seconds=0.0, error="ConnectionResetError"), Counters(reset=1)),
        ("net-refuse", Answer(seconds=0.0, error="ConnectionRefusedError"), NONE),
        ("net-cut", Answer(seconds=0.0, error="IncompleteRead"), Counters(cut=1)),
    ],
)
def test_each_fault_is_proven_by_what_is_felt_and_by_what_was_counted(fault: str, after: Answer, now: Counters) -> None:
    assert shown(SETTINGS[fault][1], WELL, after, NONE, NONE, now)


@pytest.mark.parametrize(
    ("fault", "after", "now"),
    [
        ("net-delay", Answer(seconds=0.03, size=1), NONE),  # something else was slow
        ("net-slow", Answer(seconds=0.6, size=100), NONE),  # too little to say
        ("net-loss", Answer(seconds=0.21, size=1), NONE),  # nothing was lost
        ("net-black-hole", Answer(seconds=1.0, error="TimeoutError"), Counters(down=1)),  # something passed
        ("net-black-hole", Answer(seconds=0.0, error="ConnectionRefusedError"), NONE),  # the server is gone
        ("net-deaf", Answer(seconds=1.0, error="TimeoutError"), Counters(down=1)),
        ("net-reset", Answer(seconds=0.0, error="ConnectionResetError"), NONE),  # by another cause
        ("net-cut", Answer(seconds=0.0, error="IncompleteRead"), NONE),
    ],
)
def test_signs_of_something_else_prove_nothing(fault: str, after: Answer, now: Counters) -> None:
    assert not shown(SETTINGS[fault][1], WELL, after, NONE, NONE, now)


def test_a_limit_upwards_alone_does_not_show_in_a_small_request() -> None:
    slow = Answer(seconds=0.6, size=100_000)
    assert not shown(Faults(up=Way(bytes_per_s=1000)), WELL, slow, NONE, NONE, NONE)

"""A step that fails for want of something is tried again, later each time; a bug is raised."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import zmq

from membership.base.attempts import Attempts, is_shortage, pause_s
from membership.base.errors import StoreUnavailable

pytestmark = pytest.mark.unit


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def raising(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (OSError(errno.EMFILE, "Too many open files"), True),
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (zmq.ZMQError(errno.ENOMEM), True),
        (RuntimeError("a bug"), False),
        (ValueError("a bug"), False),
        (zmq.ZMQError(zmq.ETERM), False),
        (StoreUnavailable("an error with a handler of its own"), False),
    ],
)
def test_what_the_machine_lacks_is_told_apart_from_a_bug(error: Exception, lacks: bool) -> None:
    assert is_shortage(error) is lacks
    attempts = Attempts("loop")
    if lacks:
        assert not attempts.run(raising(error))
    else:
        with pytest.raises(type(error)):
            attempts.run(raising(error))
        assert Attempts("loop", also=(type(error),)).run(raising(error)) is False


def test_a_failed_step_waits_longer_each_time_and_holds_up_no_other() -> None:
    clock, tried, done = Clock(), [0], [0]
    attempts = Attempts("loop", clock=clock)

    def fail() -> None:
        tried[0] += 1
        raise OSError(errno.EMFILE, "Too many open files")

    def succeed() -> None:
        done[0] += 1

    waits = []
    for _ in range(8):
        assert not attempts.run(fail, "one")
        assert attempts.run(succeed, "other")
        waits.append(round(attempts.wait_s("one"), 3))
        assert not attempts.run(fail, "one"), "not before its time"
        clock.now += attempts.wait_s("one")
    assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert (tried[0], done[0]) == (8, 8)
    assert attempts.run(succeed, "one")
    assert attempts.wait_s("one") == 0.0
    assert not attempts.run(fail, "one")
    assert attempts.wait_s("one") == pytest.approx(pause_s(1)), "the count begins anew"


def test_a_step_that_does_not_come_again_is_not_left_out() -> None:
    attempts, done = Attempts("loop", clock=Clock()), []
    assert not attempts.once(raising(OSError("no")), "one")
    assert attempts.once(lambda: done.append(1), "one")
    assert done

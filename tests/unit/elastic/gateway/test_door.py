"""Which connection gives way when a port is full, how many there may be, and what is said of failures."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from structlog.testing import capture_logs

from elastic.gateway.server import REPORT_EVERY_S, Door
from elastic.serve.listening import DEFAULT_MOST, FEWEST, most_connections
from membership.base.errors import ConfigError

pytestmark = pytest.mark.unit


class Client:
    """A connection, as its port sees it."""

    def __init__(self, door: Any) -> None:
        self.door, self.dropped = door, False
        self.let_in = door.entered(self)
        door.owing(self, True)

    def drop(self) -> None:
        self.dropped = True


def test_the_one_that_owes_longest_gives_way() -> None:
    door: Any = Door(3)
    first, second, third = (Client(door) for _ in range(3))
    door.owing(first, False)  # it has asked for something
    assert Client(door).let_in
    assert [each.dropped for each in (first, second, third)] == [False, True, False]
    door.owing(first, True)  # it has its answer: it owes since now only
    assert Client(door).let_in
    assert [each.dropped for each in (first, third)] == [False, True]


def test_clients_that_wait_for_us_are_not_dropped() -> None:
    door: Any = Door(2)
    busy = [Client(door) for _ in range(2)]
    for each in busy:
        door.owing(each, False)
    late = Client(door)
    assert (late.let_in, [each.dropped for each in busy]) == (False, [False, False])
    later = Client(door)
    assert (later.let_in, late.dropped) == (False, True)
    door.left(busy[0])
    assert Client(door).let_in


def test_failures_are_told_once_per_period() -> None:
    now = [100.0]
    door = Door(1, clock=lambda: now[0])
    with capture_logs() as lines:
        for _ in range(1000):
            door.report(OSError(errno.EMFILE, "Too many open files"))
        now[0] += REPORT_EVERY_S
        door.report(OSError(errno.EMFILE, "Too many open files"))
    assert [(line["event"], line["times"]) for line in lines] == [("accept_failed", 1), ("accept_failed", 1000)]


@pytest.mark.parametrize(
    ("descriptors", "wanted", "most"),
    [(256, None, 112), (1024, None, 880), (1024, 100, 100), (1 << 20, None, DEFAULT_MOST), (1 << 20, 9000, 9000)],
)
def test_the_limit_leaves_descriptors_for_the_rest(descriptors: int, wanted: int | None, most: int) -> None:
    assert most_connections(descriptors, wanted) == most


@pytest.mark.parametrize(("descriptors", "wanted"), [(144 + FEWEST - 1, None), (64, None), (1024, 881)])
def test_too_few_descriptors_say_how_many_it_takes(descriptors: int, wanted: int | None) -> None:
    with pytest.raises(ConfigError, match=f"the limit of open files is {descriptors}") as refused:
        most_connections(descriptors, wanted)
    least = int(str(refused.value).split()[-1])
    assert most_connections(least, wanted) == (wanted or FEWEST)
    assert str(least) in refused.value.hint

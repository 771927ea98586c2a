"""What a host sends later: in the order in which it is due, by a clock that is passed in."""

from __future__ import annotations

import math

import pytest

from workers.bulk.server import Outbox
from workers.protocol.weight_peers import Asked, Read

pytestmark = pytest.mark.unit


def test_what_is_due_is_taken_once_and_in_order() -> None:
    outbox, asked = Outbox(), [Asked(number, Read(1, 0, 1)) for number in range(4)]
    assert outbox.wait_s(0.0) == math.inf
    for at, each in zip((3.0, 1.0, 2.0, 1.0), asked, strict=True):
        outbox.put(at, b"a host", each)
    assert outbox.wait_s(0.5) == 0.5
    assert outbox.take(0.5) == []
    assert [each.number for _, each in outbox.take(2.0)] == [1, 3, 2]
    assert outbox.wait_s(2.0) == 1.0
    assert outbox.take(2.0) == []
    assert [(route, each.number) for route, each in outbox.take(9.0)] == [(b"a host", 0)]
    assert outbox.wait_s(9.0) == math.inf

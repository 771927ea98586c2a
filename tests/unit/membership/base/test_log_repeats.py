"""The same warning is written once per period, with the number of those left out; another one always."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from membership.base import logs
from membership.base.log_repeats import MAX_KINDS, SUPPRESSED, Repeats

pytestmark = pytest.mark.unit


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(logs, "Repeats", lambda: Repeats(made, 10.0))
    return made


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    logs.configure("test", json_lines=True)
    yield stream
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_once_per_period_and_then_the_number_of_those_left_out(written: io.StringIO, clock: Clock) -> None:
    log = structlog.get_logger("a")
    for number in range(100):
        log.warning("event_not_written", error=f"disk full at {number}", dropped=number)
    assert [line["event"] for line in lines(written)] == ["event_not_written"]
    clock.now = 11.0
    log.info("anything")
    _, told, other = lines(written)
    assert (told["event"], told["of"], told["lines"], other["event"]) == (
        SUPPRESSED,
        "event_not_written",
        99,
        "anything",
    )
    log.warning("event_not_written", error="disk full at 7", dropped=8)
    assert lines(written)[-1]["event"] == "event_not_written", "a new period"


def test_what_differs_in_its_facts_is_written(written: io.StringIO) -> None:
    log = structlog.get_logger("a")
    for rank in range(3):
        log.warning("rank_slow", rank=rank, factor=1.5 + rank)
        log.warning("rank_slow", rank=rank, factor=9.0)
        log.info("rank_slow", rank=rank)
    assert [line["rank"] for line in lines(written) if line["level"] == "warning"] == [0, 1, 2]
    assert len(lines(written)) == 6, "what is only information is not counted"


def test_a_librarys_lines_too(written: io.StringIO) -> None:
    """asyncio's, when a server is out of descriptors: 52 MB in 12 s."""
    for number in range(1000):
        logging.getLogger("asyncio").error("socket.accept() out of system resource\nsocket: fd=%d", number)
        logging.getLogger("asyncio").error(f"written out: {number}")
    assert len(lines(written)) == 2


def test_kinds_of_one_event_are_limited(written: io.StringIO) -> None:
    for number in range(10 * MAX_KINDS):
        structlog.get_logger("a").warning("gateway_message_malformed", size=number)
    assert len(lines(written)) == MAX_KINDS


PROGRAM = """
import os, sys
import structlog
from membership.base.logs import configure, write_line
if sys.argv[1] == "closed":
    os.close(2)
if sys.argv[1] == "no stream":
    sys.stderr.close()
configure("worker", json_lines=True)
log = structlog.get_logger("a")
for number in range(5000):
    log.warning("a_line", number=number % 60, padding="x" * 500)
    log.info("another", padding="x" * 500)
    write_line(sys.stderr, "for people")
os.write(1, b"alive")
"""


@pytest.mark.parametrize("where", ["full", "closed", "no stream", "unread pipe", "broken pipe"])
def test_no_process_fails_or_waits_for_a_line_that_cannot_be_written(where: str) -> None:
    read, write = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    if where == "broken pipe":
        os.close(read)
    try:
        errors = {"full": full, "unread pipe": write, "broken pipe": write}.get(where)
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, where], stdout=subprocess.PIPE, stderr=errors, timeout=60, check=False
        )
    finally:
        for fd in (write, full, *([] if where == "broken pipe" else [read])):
            os.close(fd)
    assert ended.stdout == b"alive"

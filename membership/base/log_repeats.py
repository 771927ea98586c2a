"""Warnings and errors that come again and again are written once per period, with the number of those left out.

A disk that is full or a store that is away would otherwise fill the log with one sentence, and the disk with the log.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog

from membership.base.timing import LOG_REPEAT_S

MAX_KINDS = 64  # different lines of one event per period
VARYING = frozenset({"timestamp", "dropped", "retry_s", "failures", "attempt"})  # fields that tell no two apart
SUPPRESSED = "log_lines_suppressed"

log = structlog.get_logger(__name__)


@dataclass
class _Period:
    """What was written of one event since `begun`."""

    begun: float
    seen: set[str] = field(default_factory=set)
    suppressed: int = 0


class Repeats(logging.Filter):
    """Lets the first of equal warnings or errors of a period pass. Equal: event and fields, numbers in errors aside."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, period_s: float = LOG_REPEAT_S) -> None:
        super().__init__()
        self._clock, self._period_s = clock, period_s
        self._periods: dict[str, _Period] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to write this record. Reports first what was left out in periods that are over."""
        for event, count in self._ended():
            log.warning(SUPPRESSED, of=event, lines=count, period_s=self._period_s)
        if record.levelno < logging.WARNING:
            return True
        event, facts = _identity(record)
        if event == SUPPRESSED:
            return True
        with self._lock:
            period = self._periods.setdefault(event, _Period(self._clock()))
            if facts in period.seen or len(period.seen) >= MAX_KINDS:
                period.suppressed += 1
                return False
            period.seen.add(facts)
        return True

    def _ended(self) -> list[tuple[str, int]]:
        now = self._clock()
        with self._lock:
            over = [event for event, period in self._periods.items() if now - period.begun >= self._period_s]
            ended = [(event, self._periods.pop(event).suppressed) for event in over]
        return [(event, count) for event, count in ended if count]


def _identity(record: logging.LogRecord) -> tuple[str, str]:
    """The event, and what distinguishes its lines: of ours the fields, of a library's the text without its numbers."""
    if not isinstance(record.msg, dict):
        return f"{record.name}: {_unnumbered(str(record.msg))}"[:200], _unnumbered(record.getMessage())
    fields: dict[str, Any] = record.msg
    facts = [
        f"{name}={_unnumbered(str(value)) if name in ('error', 'reason') else value}"
        for name, value in sorted(fields.items())
        if name not in VARYING and not isinstance(value, float)
    ]
    return str(fields.get("event")), " ".join(facts)


def _unnumbered(text: str) -> str:
    return re.sub(r"[0-9a-f]*\d[0-9a-f]*", "#", text)

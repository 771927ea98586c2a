"""Structured logs for every process: people read them on a terminal, machines read JSON lines. Always on stderr.

No process fails, or waits, for a line that cannot be written (a full disk, a closed terminal, a pipe that is not read):
it is lost, and counted. A warning or error that comes again and again is written once per period (`log_repeats.py`).

Tracebacks are plain text in both: no frames drawn around them, no local variables (which may hold what clients said).
"""

from __future__ import annotations

import logging
import os
import select
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TextIO

import structlog

from membership.base.log_repeats import Repeats

log = structlog.get_logger(__name__)

_always: dict[str, object] = {}  # shared by all loggers: each keeps the processors of its first use


class PrefixedStream:
    """A text stream that begins each line with a prefix: so lines of many ranks on one terminal are distinguishable."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self.stream = stream
        self.prefix = prefix
        self._at_line_start = True

    def write(self, text: str) -> int:
        """Write, with the prefix wherever a line begins."""
        for line in text.splitlines(keepends=True):
            self.stream.write(self.prefix + line if self._at_line_start else line)
            self._at_line_start = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        """Flush what is below."""
        with suppress(BrokenPipeError, ValueError):  # the reader of our logs is gone: no reason to fail
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


class SafeHandler(logging.StreamHandler[Any]):
    """A handler that never raises, and never waits for the reader of a pipe or terminal. `lost`: lines not written."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.lost = 0
        self._poll = _poll_of(stream)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, or count it."""
        if self._poll is not None and not self._poll.poll(0):
            self.lost += 1
            return
        lost = self.lost
        super().emit(record)
        if lost and self.lost == lost:
            self.lost = 0
            log.warning("log_lines_lost", lines=lost)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name that logging calls
        """The line is lost."""
        self.lost += 1


def write_line(stream: Any, line: str) -> bool:
    """Write a line for people; False if its reader is gone, or does not read."""
    try:
        poll = _poll_of(stream)
        if poll is not None and not poll.poll(0):
            return False
        stream.write(line + "\n")
        stream.flush()
    except (OSError, ValueError, AttributeError):  # ValueError: it is closed; AttributeError: there is none
        return False
    return True


def _poll_of(stream: Any) -> select.poll | None:
    """What says whether the stream takes a line without waiting; None for files, which always do."""
    try:
        fd = stream.fileno()
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return None
    except (OSError, ValueError, AttributeError):  # none, or closed
        return None
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return poll


def configure(role: str, *, json_lines: bool | None = None, level: str = "info", **fields: object) -> None:
    """Send structlog's and the standard library's records to stderr; JSON unless that is a terminal.

    `role` and `fields` are in every line, whichever thread wrote it.
    """
    stream: Any = sys.stderr
    as_json = not stream.isatty() if json_lines is None else json_lines
    if as_json and isinstance(stream, PrefixedStream):
        stream = stream.stream  # a prefix would break the JSON; the fields carry the same facts
    renderer: Any = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    _always.clear()
    identify(role=role, **fields)

    def add_fields(logger: object, method: str, event: dict[str, Any]) -> dict[str, Any]:
        return {**_always, **event}

    shared: list[Any] = [
        add_fields,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = SafeHandler(stream)
    handler.addFilter(Repeats())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore", "uvicorn.access", "grpc"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def identify(**fields: object) -> None:
    """Add these fields to every line from now on."""
    _always.update(fields)


def open_log(path: Path) -> IO[bytes]:
    """The file for a process's words. One that cannot be had costs the words, not the process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        log.warning("log_not_opened", path=str(path), error=str(error))
        return open(os.devnull, "ab")

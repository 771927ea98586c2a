"""Structured logs for every process: people read them on a terminal, machines read JSON lines. Always on stderr.

Tracebacks are plain text in both: no frames drawn around them, no local variables (which may hold what clients said).
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Any, TextIO

import structlog

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
    handler = logging.StreamHandler(stream)
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

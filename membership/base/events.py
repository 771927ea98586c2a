"""The history of a cluster: one file of JSON lines that all processes of a machine append to, and its readers.

Metrics, the live view and the checker read this. A line is one `write` to a file opened for appending, so lines of
several processes never mix. Readers skip a line that was cut short (full disk, crash) and read on after it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import structlog

FOLLOW_POLL_S = 0.1
CHUNK = 1 << 16

log = structlog.get_logger(__name__)


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that happened. `fields` holds what only this kind of event has."""

    ts: float
    role: str
    kind: str
    cluster: str = ""
    epoch: int = 0
    rank: int | None = None
    fields: dict[str, Any] = {}


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Event)
_BEGIN = b'{"ts":'  # of every line

FilePath = str | os.PathLike[str]


class EventLog:
    """Writes one role's events. A full disk loses events, never the service; `dropped` counts them."""

    def __init__(self, path: FilePath, role: str, cluster: str = "", clock: Callable[[], float] = time.time) -> None:
        self._path = Path(path)
        self._role = role
        self._cluster = cluster
        self._clock = clock
        self._lock = threading.Lock()
        self._torn = False
        self.dropped = 0

    def emit(self, kind: str, /, *, cluster: str = "", epoch: int = 0, rank: int | None = None, **fields: Any) -> Event:
        """Append one event, and return it."""
        event = Event(
            ts=self._clock(),
            role=self._role,
            kind=kind,
            cluster=cluster or self._cluster,
            epoch=epoch,
            rank=rank,
            fields=fields,
        )
        with self._lock:
            self._append(_encoder.encode(event) + b"\n")
        return event

    def _append(self, line: bytes) -> None:
        if self._torn:
            line = b"\n" + line  # end the line that was cut short
        try:
            # Opened each time: nothing to close, and a file moved away by rotation is released.
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                written = os.write(fd, line)
            finally:
                os.close(fd)
        except OSError as error:
            self.dropped += 1
            log.warning("event_not_written", path=str(self._path), error=str(error), dropped=self.dropped)
            return
        self._torn = written < len(line)
        self.dropped += self._torn

    @staticmethod
    def read(path: FilePath) -> list[Event]:
        """Return all events so far; none if there is no file yet."""
        tail, events = Tail(path), list[Event]()
        while (more := tail.read()) is not None:
            events += more
        return events

    @staticmethod
    def follow(path: FilePath, stop: threading.Event, poll_s: float = FOLLOW_POLL_S) -> Iterator[Event]:
        """Yield the events so far, then new ones as they come, until `stop` is set."""
        tail = Tail(path)
        while True:
            stopping = stop.is_set()  # read first: what was written before `stop` is still yielded
            events = tail.read()
            yield from events or ()
            if events is None:
                if stopping:
                    return
                stop.wait(poll_s)


class Tail:
    """Reads a history in chunks. A line without its end is still being written: it is returned by a later read."""

    def __init__(self, path: FilePath) -> None:
        self._path = Path(path)
        self._position = 0
        self._rest = b""

    def read(self) -> list[Event] | None:
        """Return the events of the next chunk, perhaps none; None if nothing was written since the last read."""
        chunk = _chunk(self._path, self._position)
        if not chunk:
            return None
        self._position += len(chunk)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [event for line in lines if (event := _event(line)) is not None]


def _chunk(path: Path, position: int) -> bytes:
    if not path.exists():
        return b""
    with open(path, "rb") as file:
        file.seek(position)
        return file.read(CHUNK)


def _event(line: bytes) -> Event | None:
    if not line:
        return None
    try:
        return _decoder.decode(line)
    except msgspec.MsgspecError as error:
        log.warning("damaged_event_skipped", line=line[:80].decode(errors="replace"), error=str(error))
        whole = line.find(_BEGIN, 1)  # the line that another process wrote right after it
        return _event(line[whole:]) if whole > 0 else None

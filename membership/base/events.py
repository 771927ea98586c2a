"""The history of a cluster: one file of JSON lines that all processes of a machine append to, and its readers.

Metrics, the live view and the checker read this. A line is one `write` to a file opened for appending, so lines of
several processes never mix. Readers skip a line that was cut short (full disk, crash) and read on after it.

A file that has grown to its limit becomes `NAME.1`, the one before it `NAME.2`, and so on (`rotation.py`). Writers hold
a shared lock while they write, and the one that renames holds it alone: nothing is written to a file that has a
successor. So a reader that has come to the end of such a file has all of it, and goes on in the next. Files are known
apart by their beginning, which holds a time stamp: the number of an inode is soon given out again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import structlog

from membership.base.rotation import MAX_FILES, Limit, appending, kept, open_to_read, succeed

FOLLOW_POLL_S = 0.1
CHUNK = 1 << 16
BEGINNING = 96  # bytes: more than a time stamp, less than any event
LOST = "events_lost"

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
    """Writes one role's events. A full disk loses events, never the service; `dropped` counts them.

    Once there is room again the event `events_lost` says how many they were. `limit`: when the file gets a successor.
    """

    def __init__(
        self,
        path: FilePath,
        role: str,
        cluster: str = "",
        clock: Callable[[], float] = time.time,
        limit: Limit | None = None,
    ) -> None:
        self._path = Path(path)
        self._role = role
        self._cluster = cluster
        self._clock = clock
        self._limit = limit
        self._lock = threading.Lock()
        self._torn = False
        self._unreported = 0
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
            if self._append(event) and self._unreported:
                lost, self._unreported = self._unreported, 0
                self._append(
                    Event(ts=self._clock(), role=self._role, kind=LOST, cluster=event.cluster, fields={"count": lost})
                )
        return event

    def _append(self, event: Event) -> bool:
        line = _encoder.encode(event) + b"\n"
        if self._torn:
            line = b"\n" + line  # end the line that was cut short
        try:
            # Opened each time: nothing to close, and a file that has been renamed is released.
            with appending(self._path) as fd:
                written = os.write(fd, line)
                full = self._limit is not None and os.fstat(fd).st_size >= self._limit.max_bytes
        except OSError as error:
            self._lose()
            log.warning("event_not_written", path=str(self._path), error=str(error), dropped=self.dropped)
            return False
        self._torn = written < len(line)
        if self._torn:
            self._lose()
        if full and self._limit is not None:
            succeed(self._path, self._limit)
        return not self._torn

    def _lose(self) -> None:
        self.dropped += 1
        self._unreported += 1

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
        self._begins = b""  # how the file that is being read begins; empty before the first
        self._read: deque[bytes] = deque(maxlen=MAX_FILES)  # how those begin that were read to their end
        self._position = 0
        self._rest = b""

    @classmethod
    def recent(cls, path: FilePath, nbytes: int) -> Tail:
        """Begin near the end: with the last whole lines of about `nbytes` of the newest file."""
        tail = cls(path)
        try:
            with ExitStack() as opened:
                file = open_to_read(tail._path, opened)
                if file is not None and (skipped := os.fstat(file.fileno()).st_size - nbytes) > 0:
                    tail._begins = file.read(BEGINNING)
                    file.seek(skipped)
                    file.readline()
                    tail._position = file.tell()
        except OSError as error:  # then from the beginning, as soon as that can be read
            log.warning("events_not_read", path=str(path), error=str(error))
        return tail

    def read(self) -> list[Event] | None:
        """Return the events of the next chunk, perhaps none; None if nothing was written since the last read."""
        try:
            chunk = self._chunk()
        except OSError as error:  # no descriptor to be had, or its disk is away: it can be read later
            log.warning("events_not_read", path=str(self._path), error=str(error))
            return None
        if not chunk:
            return None
        self._position += len(chunk)
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [event for line in lines if (event := _event(line)) is not None]

    def _chunk(self) -> bytes:
        """What comes next: more of the same file; if it has a successor and is at its end, the beginning of that."""
        with ExitStack() as opened:
            if self._begins and (current := open_to_read(self._path, opened)) is not None and self._is_mine(current):
                return current.read(CHUNK)
            files = kept(self._path, opened)  # the newest first
            mine = next((number for number, file in enumerate(files) if self._begins and self._is_mine(file)), None)
            if mine is not None:
                if chunk := files[mine].read(CHUNK):
                    return chunk
                self._read.append(self._begins)
                files = files[:mine]
            elif self._begins:
                log.warning("events_missed", path=str(self._path), reason="their file was removed before it was read")
            for file in reversed(files):
                if chunk := self._first_of(file):
                    return chunk
        return b""

    def _is_mine(self, file: BinaryIO) -> bool:
        """Whether it is the file that is being read; then it stands where that has come to."""
        begins = file.read(len(self._begins))
        file.seek(self._position)
        return begins == self._begins

    def _first_of(self, file: BinaryIO) -> bytes:
        """The first chunk of a file that was not read yet."""
        file.seek(0)
        chunk = file.read(CHUNK)
        begins = chunk[:BEGINNING]
        if not chunk or any(begins.startswith(known) for known in self._read):
            return b""
        self._begins, self._position, self._rest = begins, 0, b""
        return chunk


def _event(line: bytes) -> Event | None:
    if not line:
        return None
    try:
        return _decoder.decode(line)
    except msgspec.MsgspecError as error:
        log.warning("damaged_event_skipped", line=line[:80].decode(errors="replace"), error=str(error))
        whole = line.find(_BEGIN, 1)  # the line that another process wrote right after it
        return _event(line[whole:]) if whole > 0 else None
